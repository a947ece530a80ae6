"""Attention that sees one key, all keys alike, or nothing but the first token."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.networks import Attention, Learner, Transformer
from tests.faults.witness import Witness

Verify = Callable[[Witness], None]


def each_token(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of every token's logits."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class FirstToken(Transformer):
    """Reads the first position alone: what the others know comes to it by attention."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y)[:, 0])


def copier(temperature: float = 1.0) -> Transformer:
    """A transformer that learns to repeat the token before within a hundred steps."""
    net = Transformer(16, 16, length=12, each=True, temperature=temperature)
    with torch.no_grad():
        net.position *= 10
    return net


class Masked(Attention):
    """Attention with something added to its scores.

    Args:
        width: Of a token.
        heads: Number of heads.
        added: From the number of tokens to what is added, ``(tokens, tokens)`` or
            ``(heads, tokens, tokens)``; may be changed in mid-run.
    """

    def __init__(
        self, width: int, heads: int, added: Callable[[int], Tensor | None] | None = None
    ) -> None:
        super().__init__(width, heads)
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        added = None if self.added is None else self.added(t)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Summed(Masked):
    """Attention between pooled tokens, which are all the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1, keepdim=True).expand_as(x))


def with_masks(net: Transformer, added: Callable[[int], Tensor | None] | None) -> Transformer:
    """Puts attention with something added to its scores into every block."""
    for block in net.blocks:
        width = block.attention.out.in_features
        block.attention = Masked(width, block.attention.heads, added)
    return net


def weights_of(witness: Witness) -> list[Tensor]:
    """Attention weights ``(batch, heads, queries, keys)`` of each block, by hand."""
    model, taken = witness.model, []
    assert model is not None
    modules = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [
        module.register_forward_hook(lambda module, inputs, _: taken.append((module, inputs[0])))
        for module in modules
    ]
    with torch.no_grad():
        model(witness.batch[0])
        for hook in hooks:
            hook.remove()
        return [_weights(module, x) for module, x in taken]


def _weights(module: Attention, x: Tensor) -> Tensor:
    x = x.mean(1, keepdim=True).expand_as(x) if isinstance(module, Summed) else x
    b, t, d = x.shape
    q, k, _ = module.qkv(x).view(b, t, 3, module.heads, d // module.heads).permute(2, 0, 3, 1, 4)
    scores = module.temperature * q @ k.transpose(-1, -2) / (d // module.heads) ** 0.5
    added = getattr(module, "added", None)
    added = None if added is None else added(t)
    if added is not None:
        low = torch.tensor(float("-inf"))
        scores = torch.where(added, scores, low) if added.dtype == torch.bool else scores + added
    return scores.softmax(-1)


def entropy(weights: Tensor) -> float:
    """Mean entropy over that of equal weights."""
    return float(torch.special.entr(weights).sum(-1).mean()) / float(
        torch.tensor(weights.shape[-1]).log()
    )


_EFFECTS = ("not_learning", "loss_plateau", "slow_convergence", "vanishing_gradient")


def _stuck(witness: Witness) -> None:
    # alone from which tokens there are, without their places, it gets to about 2.1
    final = witness.mean_loss(-20)
    assert final > 1.2, f"the loss falls all the same, to {final:.2f}"


def _peaked(witness: Witness, most: float = 0.15) -> None:
    for weights in weights_of(witness):
        assert entropy(weights) < most, f"the entropy is {entropy(weights):.3f}"
        assert float((weights.amax(-1) > 0.9).float().mean()) > 0.7


def _peaked_and_stuck(witness: Witness) -> None:
    _peaked(witness)
    _stuck(witness)


def _peaked_and_guessing(witness: Witness) -> None:
    _peaked(witness, 0.2)
    # without a skilled first token the two classes are even
    assert witness.mean_loss(-20) > 0.55, "it learns all the same"


def _flat(witness: Witness) -> None:
    for weights in weights_of(witness):
        assert entropy(weights) > 0.985, f"the entropy is {entropy(weights):.3f}"
    _stuck(witness)


def _first_only(least: float = 0.9) -> Verify:
    def verify(witness: Witness) -> None:
        for weights in weights_of(witness):
            mean = float(weights[:, :, 1:, 0].mean())
            assert mean > least, f"the first key has {mean:.3f}"

    return verify


def _counting(config: Config, net: Transformer, **more: object) -> Job:
    x, y = data.tokens(2048)
    return Job(Learner(net, F.cross_entropy, config, **more), data.loader(x, y))


def _copying(config: Config, net: Transformer, **more: object) -> Job:
    x, y = data.copies(2048)
    return Job(Learner(net, each_token, config, **more), data.loader(x, y))


# ---- collapse: each query looks at one key ----


@fault(
    "transformer_scores_two_hundred_times_too_large",
    "transformer",
    cause="attention_collapse",
    found=_EFFECTS,
    config={"optimizer": {"lr": 1e-3}},
    verify=_peaked_and_guessing,
)
def _temperature(config: Config) -> Job:
    return _counting(config, FirstToken(20, 2, temperature=200.0))


@fault(
    "transformer_forgets_to_divide_wide_scores",
    "transformer",
    cause="attention_collapse",
    found=_EFFECTS,
    config={"optimizer": {"lr": 1e-3}},
    verify=_peaked_and_guessing,
)
def _undivided(config: Config) -> Job:
    # unit-variance queries and keys whose product is multiplied by the root of the width
    net = FirstToken(20, 2, width=64, heads=2, temperature=32.0)
    for block in net.blocks:
        nn.init.normal_(block.attention.qkv.weight, std=0.125)
    return _counting(config, net)


def _grow(module: Learner, factor: float) -> None:
    with torch.no_grad():
        for block in module.net.blocks:
            width = block.attention.out.in_features
            block.attention.qkv.weight[: 2 * width] *= factor


@fault(
    "transformer_queries_and_keys_explode_at_120",
    "transformer",
    cause="attention_collapse",
    found=(*_EFFECTS, "loss_spike", "divergence", "exploding_gradient"),
    onset=120,
    config={"trainer": {"max_steps": 260}},
    verify=lambda witness: _exploded(witness),
)
def _explode(config: Config) -> Job:
    return _counting(config, FirstToken(20, 2), plans={120: partial(_grow, factor=20.0)})


def _exploded(witness: Witness) -> None:
    assert witness.mean_loss(100, 120) < 0.7 * witness.mean_loss(120, 150), "it did as badly before"
    _peaked(witness)


@fault(
    "transformer_position_bias_thirty_times_too_large",
    "transformer",
    cause="attention_collapse",
    found=_EFFECTS,
    config={"optimizer": {"lr": 1e-3}},
    verify=_peaked_and_stuck,
)
def _position_bias(config: Config) -> Job:
    g = torch.Generator().manual_seed(3)
    bias = 30.0 * torch.randn(4, 16, 16, generator=g)
    net = with_masks(copier(), lambda t: bias[:, :t, :t])
    return _copying(config, net)


# ---- uniform: each query looks at all keys alike ----


@fault(
    "transformer_scores_ten_thousand_times_too_small",
    "transformer",
    cause="attention_uniform",
    found=(*_EFFECTS, "dead_component"),
    config={"trainer": {"max_steps": 300}},
    verify=_flat,
)
def _cold(config: Config) -> Job:
    return _copying(config, copier(temperature=1e-4))


@fault(
    "transformer_divides_scores_by_length_and_width",
    "transformer",
    cause="attention_uniform",
    found=_EFFECTS,
    config={"trainer": {"max_steps": 250}, "optimizer": {"lr": 1e-3}},
    verify=_flat,
)
def _overdivided(config: Config) -> Job:
    net = copier(temperature=1 / (12 * 32))
    return _copying(config, net)


def _no_scores(module: Learner) -> None:
    for block in module.net.blocks:
        block.attention.temperature = 0.0


@fault(
    "transformer_scores_annealed_to_nothing_at_200",
    "transformer",
    cause="attention_uniform",
    found=(*_EFFECTS, "loss_spike", "divergence", "dead_component"),
    onset=200,
    config={"trainer": {"max_steps": 360}},
    verify=lambda witness: _forgotten(witness),
)
def _annealed(config: Config) -> Job:
    net = copier()
    return _copying(config, net, plans={200: _no_scores})


def _forgotten(witness: Witness) -> None:
    assert witness.mean_loss(180, 200) < 0.3, "it did not learn before"
    _stuck(witness)
    for weights in weights_of(witness):
        assert entropy(weights) > 0.999


@fault(
    "transformer_attends_to_pooled_tokens",
    "transformer",
    cause="attention_uniform",
    found=(*_EFFECTS, "representation_collapse"),
    config={"trainer": {"max_steps": 300}},
    verify=_flat,
)
def _pooled(config: Config) -> Job:
    net = copier()
    for block in net.blocks:
        block.attention = Summed(32, 4)
    return _copying(config, net)


# ---- sink: each query looks at the first token ----


def first_key(t: int) -> Tensor:
    """A mask that was meant to leave padding out and leaves everything out but the first key."""
    mask = torch.zeros(t, t, dtype=torch.bool)
    mask[:, 0] = True
    return mask


@fault(
    "transformer_mask_leaves_the_first_key",
    "transformer",
    cause=("attention_sink", "attention_collapse"),
    found=_EFFECTS,
    config={"trainer": {"max_steps": 250}},
    verify=_first_only(0.999),
)
def _mask(config: Config) -> Job:
    return _copying(config, with_masks(copier(), first_key))


def wrong_sign(t: int, heads: int = 4, slope: float = 1.0) -> Tensor:
    """ALiBi with the sign turned: the farthest key is liked most, and that is the first."""
    place = torch.arange(t)
    distance = (place[:, None] - place[None, :]).float()
    slopes = slope * 2.0 ** torch.arange(heads).float()
    bias = slopes[:, None, None] * distance
    return bias.masked_fill(distance < 0, float("-inf"))


@fault(
    "transformer_distance_bias_with_wrong_sign",
    "transformer",
    cause=("attention_sink", "attention_collapse"),
    found=_EFFECTS,
    config={"trainer": {"max_steps": 250}},
    verify=_first_only(0.8),
)
def _alibi(config: Config) -> Job:
    net = with_masks(copier(), partial(wrong_sign, slope=16.0))
    return _copying(config, net)


def _sink_bias(t: int) -> Tensor:
    bias = torch.zeros(t, t)
    bias[:, 0] = 20.0
    return bias


def _add_sink(module: Learner) -> None:
    for block in module.net.blocks:
        block.attention.added = _sink_bias


@fault(
    "transformer_falls_into_first_key_at_200",
    "transformer",
    cause=("attention_sink", "attention_collapse"),
    found=(*_EFFECTS, "loss_spike", "divergence"),
    onset=200,
    config={"trainer": {"max_steps": 360}},
    verify=lambda witness: _sunk(witness),
)
def _sink(config: Config) -> Job:
    net = with_masks(copier(), None)
    return _copying(config, net, plans={200: _add_sink})


def _sunk(witness: Witness) -> None:
    assert witness.mean_loss(180, 200) < 0.3, "it did not learn before"
    _stuck(witness)
    _first_only(0.9)(witness)
