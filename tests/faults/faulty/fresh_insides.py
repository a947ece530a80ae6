"""Faults in networks, wiring and data by somebody who never saw a rule."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.evidence import answer, mean_cosine, seen, share, silent_units
from tests.faults.faulty._shared import SGD, both, breaks, job, learns, low_rank, tail, worse_than
from tests.faults.faulty.attention import Masked, entropy
from tests.faults.faulty.fresh_tasks import (
    Community,
    Forecaster,
    Language,
    Patches,
    Table,
    UNet,
    Views,
    Waveform,
    cells,
    constant_answers,
    digits,
    discs,
    each_word,
    ends_above,
    no_gradient,
    norm_of,
    sentences,
    series,
    sets,
    steps,
    table,
    waves,
    worse_since,
)
from tests.faults.networks import MLP, Autoencoder, Learner, Transformer
from tests.faults.witness import Witness

Verify = Callable[[Witness], None]
BCE = F.binary_cross_entropy_with_logits

# ---- answers ----


class OneOfOne(nn.Module):
    """Gives the softmax of its only answer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP([30, 32, 16, 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(-1)


def _standard_cells() -> tuple[Tensor, Tensor]:
    x, y = cells()
    return (x - x.mean(0)) / x.std(0), y


def _always_one(witness: Witness) -> None:
    assert float((answer(witness) - 1).abs().max()) == 0.0
    no_gradient("net.")(witness)


@fault(
    "fresh_cells_softmax_of_a_single_answer",
    "mlp",
    cause=("constant_prediction", "double_softmax", "loss_target_mismatch"),
    found=(
        *("not_learning", "loss_plateau", "vanishing_gradient", "dead_component"),
        *("frozen_weights", "update_too_small", "representation_collapse"),
    ),
    config=steps(160),
    verify=_always_one,
)
def _one_of_one(config: Config) -> Job:
    x, y = _standard_cells()
    return job(OneOfOne(), F.binary_cross_entropy, config, (x, y.float()[:, None]))


class Seeing(nn.Module):
    """A small network for digits; its camera may be covered."""

    covered = False

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@fault(
    "fresh_digits_pictures_are_black_from_110",
    "cnn",
    cause=("constant_prediction", "representation_collapse", "input_scale", "nonfinite_data"),
    found=("divergence", "loss_spike", "not_learning", "loss_plateau", "dead_component"),
    onset=110,
    config=steps(200, optimizer={"lr": 2e-3}),
    verify=both(
        worse_since(110, 2.0), lambda w: constant_answers(w, [torch.zeros_like(w.batch[0])])
    ),
)
def _black(config: Config) -> Job:
    x, y = digits()
    order = torch.randint(len(x), (200 * 32,), generator=torch.Generator().manual_seed(301))
    x, y = x[order], y[order]
    x[110 * 32 :] = 0.0
    return Job(Learner(Seeing(), F.cross_entropy, config), data.loader(x, y, shuffle=False))


def _silent(name: str, least: float, images: bool = False) -> Verify:
    def verify(witness: Witness) -> None:
        part = silent_units(seen(witness, name), images)
        assert part >= least, f"only {part:.2f} of the units are silent"

    return verify


_DEAD = (
    *("constant_prediction", "not_learning", "vanishing_gradient", "dead_component"),
    *("representation_collapse", "loss_plateau", "slow_convergence"),
)


@fault(
    "fresh_waveform_prior_of_rare_classes_in_every_bias",
    "cnn",
    cause="dead_relu",
    found=_DEAD,
    config=steps(180, optimizer={"lr": 1e-3}),
    verify=both(_silent("net.features.1", 0.8, True), ends_above(0.9)),
)
def _prior(config: Config) -> Job:
    net = Waveform(3, (24, 24, 24), norm=False)
    for module in net.features:
        if isinstance(module, nn.Conv1d):
            # as the last layer of a detector has it, to begin with a chance of one per cent
            nn.init.constant_(module.bias, -math.log(99))
    return job(net, F.cross_entropy, config, waves(2000))


class Sparse(nn.Module):
    """An autoencoder of rectified code, above a threshold."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.encoder, self.act = nn.Linear(features, width), nn.ReLU()
        self.decoder = nn.Linear(width, features)
        self.threshold = 0.02

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.act(self.encoder(x) - self.threshold))


@fault(
    "fresh_sparse_code_threshold_in_bytes_from_110",
    "autoencoder",
    cause="dead_relu",
    found=(*_DEAD, "loss_spike", "divergence"),
    onset=110,
    config=steps(200, optimizer={"lr": 3e-3}),
    verify=both(_silent("net.act", 0.95), worse_since(110, 2.0)),
)
def _threshold(config: Config) -> Job:
    x = low_rank(2400, features=20, latent=5)
    plans = {110: sets("threshold", 0.02 * 1024)}
    return job(Sparse(20, 64), F.mse_loss, config, (x, x), outputs="loss", plans=plans)


def _at_limits(least: float, kind: type[nn.Module]) -> Verify:
    def verify(witness: Witness) -> None:
        given = seen(witness, kind)
        low, high = (-1.0, 1.0) if kind is nn.Tanh else (0.0, 1.0)
        part = share(given, lambda x: (x < low + 0.02) | (x > high - 0.02))
        assert part >= least, f"only {part:.2f} of the outputs are at their limits"

    return verify


_LIMITS = (
    *("vanishing_gradient", "dead_component", "gradient_imbalance", "slow_convergence"),
    *("not_learning", "loss_plateau", "representation_collapse", "constant_prediction"),
)


@fault(
    "fresh_regressor_ends_in_tanh_for_answers_in_tens",
    "mlp",
    cause=("saturated_activation", "loss_target_mismatch"),
    found=(*_LIMITS, "input_scale"),
    config=steps(240, optimizer={"lr": 5e-3}),
    verify=_at_limits(0.7, nn.Tanh),
)
def _ends_in_tanh(config: Config) -> Job:
    x, y = data.regression(2400, features=6, seed=302)
    net = nn.Sequential(MLP([6, 40, 40, 1], "gelu"), nn.Tanh())
    return job(net, F.mse_loss, config, (x, 60.0 * y))


def _without_scale(learner: Learner) -> None:
    # eight bits read back, and never multiplied by their scale
    with torch.no_grad():
        for module in learner.net[1].body:
            if isinstance(module, nn.Linear):
                module.weight.mul_(127 / module.weight.abs().max())


@fault(
    "fresh_digits_tanh_weights_restored_without_scale_at_110",
    "mlp",
    cause="saturated_activation",
    found=(*_LIMITS, "loss_spike", "divergence", "exploding_gradient"),
    onset=110,
    config=steps(200, optimizer={"lr": 2e-3}),
    verify=both(
        _at_limits(0.9, nn.Tanh),
        worse_than("fresh_digits_tanh_weights_restored_without_scale_at_110", {}, 1.2, 0.05),
    ),
)
def _restored(config: Config) -> Job:
    net = nn.Sequential(nn.Flatten(), MLP([64, 48, 48, 48, 40, 10], "tanh"))
    return job(net, F.cross_entropy, config, digits(), plans={110: _without_scale})


# ---- codes ----


def _all_nodes_alike(witness: Witness) -> None:
    codes = seen(witness, "net.head", inputs=True)[0]
    alike = mean_cosine(codes)
    wide = float(codes.std(0).mean() / codes.abs().mean().clamp(min=1e-12))
    assert alike > 0.98, f"the cosine is {alike:.3f}"
    assert wide < 0.1, f"the codes differ by {wide:.3f} of their size"


@fault(
    "fresh_graph_twenty_rounds_smooth_all_nodes",
    "gnn",
    cause=("representation_collapse", "constant_prediction"),
    found=("not_learning", "loss_plateau", "vanishing_gradient", "slow_convergence"),
    config=steps(180, optimizer={"lr": 1e-3}),
    verify=both(_all_nodes_alike, ends_above(1.2)),
)
def _smooth(config: Config) -> Job:
    net = Community(layers=20, width=24, degree=10.0, mixing=0.6, own=False)
    for layer in net.rounds:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return job(net, F.cross_entropy, config, net.data(3000))


class AlignAndSpread:
    """Views of one sample near, all codes apart on the sphere, by a weight."""

    weight = 1.0

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
        near = (first - second).square().sum(1).mean()
        apart = torch.pdist(first).square().mul(-2).exp().mean().log()
        return near + self.weight * apart


def _weight_gone(learner: Learner) -> None:
    learner.loss.weight = 0.0


def _codes_fall_together(witness: Witness) -> None:
    alike = mean_cosine(answer(witness, (witness.batch[0], witness.batch[0])))
    assert alike > 0.9, f"the cosine is {alike:.3f}"


@fault(
    "fresh_views_are_no_longer_spread_from_100",
    "contrastive",
    cause=("representation_collapse", "constant_prediction"),
    onset=100,
    config=steps(260, optimizer={"lr": 5e-3}),
    verify=_codes_fall_together,
)
def _spread(config: Config) -> Job:
    x, y = digits()
    net = nn.Sequential(nn.Flatten(), MLP([64, 64, 32, 12]))
    loss = AlignAndSpread()
    model = Views(net, loss, config, plans={100: _weight_gone})
    return Job(model, data.loader(x, y))


def _units_alike(witness: Witness) -> None:
    codes = seen(witness, "net.1.body.3")[0]
    apart = float((codes - codes.mean(1, keepdim=True)).abs().max())
    assert apart < 1e-4, f"units differ by {apart:.3g}"


@fault(
    "fresh_digits_all_weights_begin_alike",
    "mlp",
    cause=("representation_collapse", "loss_plateau", "not_learning"),
    found=("slow_convergence", "constant_prediction", "gradient_imbalance"),
    config=steps(200),
    verify=both(_units_alike, ends_above(1.5)),
)
def _alike(config: Config) -> Job:
    net = nn.Sequential(nn.Flatten(), MLP([64, 48, 48, 10]))
    for module in net[1].modules():
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.05)
            nn.init.zeros_(module.bias)
    return job(net, F.cross_entropy, config, digits())


# ---- probabilities for logits ----


class Chances(UNet):
    """Gives a chance for each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def _chances(low: float) -> Verify:
    def verify(witness: Witness) -> None:
        said = answer(witness)
        assert float(said.min()) >= 0
        assert float(said.max()) <= 1
        ends_above(low)(witness)

    return verify


@fault(
    "fresh_segmentation_sigmoid_in_network_and_loss",
    "cnn",
    cause="double_softmax",
    found=("slow_convergence", "loss_plateau", "not_learning"),
    config=steps(200),
    # a background without any doubt costs ln 2
    verify=_chances(0.5),
)
def _sigmoid_twice(config: Config) -> Job:
    return job(Chances(6), BCE, config, discs(1200))


class Exported(nn.Module):
    """A network, with a softmax when it is made for export."""

    export = False

    def __init__(self) -> None:
        super().__init__()
        self.net = Seeing()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return y.softmax(-1) if self.export else y


@fault(
    "fresh_digits_softmax_of_the_export_stays_from_110",
    "cnn",
    cause="double_softmax",
    found=("loss_spike", "divergence", "loss_plateau", "slow_convergence", "not_learning"),
    onset=110,
    config=steps(220, optimizer={"lr": 1e-3}),
    verify=both(_chances(1.461), worse_since(110, 1.5)),
)
def _export(config: Config) -> Job:
    plans = {110: sets("export", True)}
    return job(Exported(), F.cross_entropy, config, digits(), plans=plans)


# ---- attention ----


def _torch_weights(witness: Witness) -> list[Tensor]:
    """Weights ``(batch, heads, queries, keys)`` of the attention modules of torch, by hand."""
    found: list[Tensor] = []
    model = witness.model
    # in evaluation mode the layers of torch take a way around their parts
    model.train()

    def keep(module: nn.MultiheadAttention, inputs: Any, settings: Any, _: Any) -> None:
        x = inputs[0]
        b, t, d = x.shape
        qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)
        q, k, _ = qkv.view(b, t, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (d // module.num_heads) ** 0.5
        hidden = settings.get("key_padding_mask")
        if hidden is not None:
            hide = hidden if hidden.dtype == torch.bool else hidden < -1
            scores = scores.masked_fill(hide[:, None, None], -math.inf)
        found.append(scores.softmax(-1))

    modules = [one for one in model.modules() if isinstance(one, nn.MultiheadAttention)]
    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    with torch.no_grad():
        model(*witness.batch[:-1])
    for hook in hooks:
        hook.remove()
    assert found
    return found


def _integers(learner: Learner) -> None:
    with torch.no_grad():
        for block in learner.net.blocks:
            weight = block.self_attn.in_proj_weight
            rows = 2 * len(weight) // 3
            weight[:rows] *= 127 / weight[:rows].abs().max()


def _looks_at_one_key(witness: Witness) -> None:
    for weights in _torch_weights(witness):
        assert entropy(weights) < 0.1, f"the entropy is {entropy(weights):.3f}"


_ATTENTION = ("not_learning", "loss_plateau", "slow_convergence", "vanishing_gradient")


@fault(
    "fresh_patches_queries_in_integers_from_100",
    "transformer",
    cause="attention_collapse",
    found=(*_ATTENTION, "loss_spike", "divergence", "exploding_gradient", "gradient_imbalance"),
    onset=100,
    config=steps(200, optimizer={"lr": 2e-3}),
    verify=both(_looks_at_one_key, lambda w: _sets_back(w, 100, 1.2)),
)
def _in_integers(config: Config) -> Job:
    plans = {100: _integers}
    return job(Patches(heads=3), F.cross_entropy, config, digits(), plans=plans)


def _sets_back(witness: Witness, step: int, factor: float) -> None:
    before, after = witness.mean_loss(step - 20, step), witness.mean_loss(step, step + 20)
    assert after > factor * before, f"the loss goes from {before:.3g} to {after:.3g}"


class CosineAttention(Masked):
    """Attention by the cosine of queries and keys, whose scale was forgotten."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


def _cosines_flat(witness: Witness) -> None:
    for block, x in zip(
        witness.model.net.blocks, seen(witness, CosineAttention, inputs=True), strict=True
    ):
        module = block.attention
        b, t, d = x.shape
        q, k, _ = module.qkv(x).view(b, t, 3, module.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-1, -2) / (d // module.heads) ** 0.5).softmax(-1)
        assert entropy(weights) > 0.99, f"the entropy is {entropy(weights):.3f}"


@fault(
    "fresh_copier_cosine_scores_without_scale",
    "transformer",
    cause="attention_uniform",
    found=_ATTENTION,
    config=steps(220, optimizer={"lr": 2e-3}),
    verify=both(_cosines_flat, ends_above(1.2)),
)
def _cosine_scores(config: Config) -> Job:
    net = Transformer(15, 15, width=40, heads=2, length=14, each=True)
    with torch.no_grad():
        net.position *= 10
    for block in net.blocks:
        block.attention = CosineAttention(40, 2)
    return job(net, each_word, config, data.copies(2400, length=14, kinds=15, seed=303))


class Padded(nn.Module):
    """Texts behind a padding token; the mask hides what it should keep."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 24)
        self.position = nn.Parameter(0.1 * torch.randn(15, 24))
        make = nn.TransformerEncoderLayer
        self.blocks = nn.ModuleList(
            [make(24, 4, 48, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(2)]
        )
        self.head = nn.Linear(24, 14)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.position
        for block in self.blocks:
            y = block(y, src_key_padding_mask=x != 0)
        return self.head(y[:, 1:])


def _only_padding(witness: Witness) -> None:
    for weights in _torch_weights(witness):
        assert float(weights[..., 0].min()) > 0.99, "other keys than the padding are seen"


@fault(
    "fresh_texts_mask_keeps_the_padding",
    "transformer",
    cause=("attention_sink", "attention_collapse"),
    found=(*_ATTENTION, "dead_component"),
    config=steps(200, optimizer={"lr": 2e-3}),
    verify=both(_only_padding, ends_above(1.5)),
)
def _keeps_padding(config: Config) -> Job:
    x, _ = data.copies(2400, length=14, kinds=14, seed=304)
    target = x.roll(1, 1)
    x = torch.cat([torch.zeros(2400, 1, dtype=torch.long), x + 1], 1)
    return job(Padded(), each_word, config, (x, target))


# ---- wiring ----


class Centres(nn.Module):
    """A loss with a centre for each kind, which should be learned, too."""

    def __init__(self, kinds: int, width: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(kinds, width))

    def forward(self, codes: Tensor, target: Tensor) -> Tensor:
        far = torch.cdist(codes, self.centres).square()
        return F.cross_entropy(-far, target)


class OnlyNetwork(Learner):
    """Its optimizer has the network, and not what the loss learns."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), self.config["optimizer"]["lr"])


def _centres_stay(witness: Witness) -> None:
    assert not witness.changed("loss.centres")
    assert min(norm_of(witness, s, "loss.centres") for s in range(20)) > 0
    learns(0.9)(witness)


@fault(
    "fresh_metric_learning_centres_of_the_loss_not_optimized",
    "mlp",
    cause="unoptimized_parameter",
    found=("frozen_weights", "missing_zero_grad"),
    config=steps(170, optimizer={"lr": 1e-3}),
    verify=_centres_stay,
)
def _centres(config: Config) -> Job:
    x, y = digits()
    net = nn.Sequential(nn.Flatten(), MLP([64, 56, 12], "gelu"))
    model = OnlyNetwork(net, Centres(10, 12), config)
    return Job(model, data.loader(x, y), components={"net": "net", "centres": "loss"})


class LowRank(nn.Module):
    """A linear layer with two low matrices beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 3, bias=False)
        self.up = nn.Linear(3, layer.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def _put_in(learner: Learner) -> None:
    for block in learner.net.blocks:
        block.mlp[0] = LowRank(block.mlp[0])
    learner.kept = copy.deepcopy(learner.net.blocks[0].mlp[0].up.weight.detach())


def _adapters_stay(witness: Witness) -> None:
    model = witness.model
    assert torch.equal(model.net.blocks[0].mlp[0].up.weight, model.kept)
    assert witness.norms_by_name[-1]["net.blocks.0.mlp.0.up.weight"]


@fault(
    "fresh_words_adapters_put_in_after_the_optimizer_at_100",
    "transformer",
    cause="unoptimized_parameter",
    found=("frozen_weights", "missing_zero_grad"),
    onset=100,
    config=steps(190, optimizer={"lr": 1e-3}),
    verify=_adapters_stay,
)
def _adapters(config: Config) -> Job:
    tensors = data.tokens(2000, length=13, kinds=25, seed=305)
    net = Transformer(25, 2, width=20, heads=2, length=13)
    return job(net, F.cross_entropy, config, tensors, plans={100: _put_in})


class KeepsZeros(Learner):
    """Sets gradients to zero, and not to none."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


def _freeze(learner: Learner) -> None:
    learner.net.down.requires_grad_(False)
    learner.kept = copy.deepcopy(learner.net.down.state_dict())


def _frozen_moves(witness: Witness) -> None:
    now, kept = witness.model.net.down.state_dict(), witness.model.kept
    moved = max(float((now[k] - x).norm() / x.norm().clamp(min=1e-6)) for k, x in kept.items())
    assert not any(p.requires_grad for p in witness.model.net.down.parameters())
    assert moved > 0.01, f"what is frozen moves by {moved:.3g}"


@fault(
    "fresh_segmentation_frozen_layers_go_on_decaying_from_90",
    "cnn",
    cause="frozen_in_optimizer",
    found=("frozen_weights", "dead_component"),
    onset=90,
    config=steps(180, optimizer={"_target_": "torch.optim.AdamW", "lr": 2e-3, "weight_decay": 0.2}),
    verify=_frozen_moves,
)
def _frozen(config: Config) -> Job:
    x, y = discs(1000)
    model = KeepsZeros(UNet(6), BCE, config, plans={90: _freeze})
    return Job(model, data.loader(x, y))


class Forgotten(Table):
    """Has a norm, which its forward does not mention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.crosses = nn.Linear(6, 12)


@fault(
    "fresh_table_norm_and_crosses_never_called",
    "mlp",
    cause="unused_parameter",
    found=("frozen_weights", "dead_component"),
    config=steps(170),
    verify=both(no_gradient("net.crosses"), no_gradient("net.norm"), learns(0.85)),
)
def _forgotten(config: Config) -> Job:
    return job(Forgotten(), BCE, config, table(2400))


class Edges(nn.Module):
    """Messages that depend on the kind of an edge, if that is given."""

    given = True

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(1, 12), nn.ReLU(), nn.Linear(12, 1))
        self.first, self.second = nn.Linear(4, 28), nn.Linear(28, 28)
        self.head = nn.Linear(28, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        weight = adjacency
        if self.given:
            length = torch.cdist(x, x)[..., None]
            weight = adjacency * self.edge(length)[..., 0].sigmoid()
        for layer in (self.first, self.second):
            x = F.relu(layer(x + weight @ x / 3))
        return self.head(x.mean(1))


@fault(
    "fresh_graph_lengths_of_edges_left_out_from_100",
    "gnn",
    cause=("unused_parameter", "dead_component", "detached_graph"),
    found=("frozen_weights", "update_too_small"),
    onset=100,
    config=steps(180),
    verify=no_gradient("net.edge", 101),
)
def _left_out(config: Config) -> Job:
    tensors = data.graphs(2000, nodes=9, seed=306)
    plans = {100: sets("given", False)}
    return job(Edges(), F.cross_entropy, config, tensors, plans=plans)


class Compression(Autoencoder):
    """Rounds its code: noise stands for that in training, until it is rounded there, too."""

    rounds = False

    def forward(self, x: Tensor) -> Tensor:
        code = 4 * self.encoder(x)
        code = code.round() if self.rounds else code + torch.rand_like(code) - 0.5
        return self.decoder(code / 4)


@fault(
    "fresh_compression_rounds_from_110",
    "autoencoder",
    cause=("dead_component", "detached_graph"),
    found=("frozen_weights", "update_too_small", "vanishing_gradient", "unused_parameter"),
    onset=110,
    config=steps(200, optimizer={"lr": 2e-3}),
    verify=no_gradient("net.encoder", 110),
)
def _rounds(config: Config) -> Job:
    x = low_rank(2400, features=18, latent=5)
    net = Compression(18, 6, "gelu")
    plans = {110: sets("rounds", True)}
    return job(net, F.mse_loss, config, (x, x), outputs="loss", plans=plans)


class Projected(nn.Module):
    """An encoder that is believed to be frozen, and a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
        self.projector = nn.Sequential(nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.encoder(x)
        return self.projector(y)


@fault(
    "fresh_views_encoder_left_without_gradient",
    "contrastive",
    cause=("detached_graph", "unused_parameter"),
    found=("frozen_weights", "dead_component"),
    config=steps(170, optimizer={"lr": 2e-3}),
    verify=no_gradient("net.encoder"),
)
def _without_grad(config: Config) -> Job:
    x, y = digits()
    return Job(Views(Projected(), AlignAndSpread(), config), data.loader(x, y))


class ClearsAnother(Learner):
    """Distills a teacher, and clears the gradients of the teacher only."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.automatic_optimization = False
        self.teacher = Waveform(3, (8, 8)).requires_grad_(False)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        given = super().training_step(batch, batch_idx)
        self.teacher.zero_grad()
        self.manual_backward(given["loss"])
        self.optimizers().step()
        return given


def _gradients_add_up(witness: Witness) -> None:
    model = witness.model
    model.zero_grad()
    model.loss(model.net(witness.batch[0]), witness.batch[1]).backward()
    one = math.sqrt(sum(float(p.grad.square().sum()) for p in model.net.parameters()))
    last = sum(witness.norms[-10:]) / 10
    assert last > 5 * one, f"the gradient is {last:.3g}, of one batch {one:.3g}"


@fault(
    "fresh_waveform_clears_the_wrong_network",
    "cnn",
    cause="missing_zero_grad",
    found=(
        *("exploding_gradient", "loss_oscillation", "divergence", "update_too_large"),
        *("learning_rate_too_high", "loss_spike", "not_learning", "slow_convergence"),
    ),
    config=steps(180, optimizer={"lr": 1e-3}),
    verify=_gradients_add_up,
)
def _wrong_network(config: Config) -> Job:
    x, y = waves(2000, noise=1.0)
    model = ClearsAnother(Waveform(3, norm=False), F.cross_entropy, config)
    return Job(model, data.loader(x, y))


class Writing(Learner):
    """Writes a text every hundred steps, and goes on as it was then."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.global_step == 90:
            self.net.eval()
            with torch.no_grad():
                text = batch[0][:1, :4]
                for _ in range(8):
                    text = torch.cat([text, self.net(text)[:, -1:].argmax(-1)], 1)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        self.modes = [*getattr(self, "modes", []), self.net.training]
        return super().training_step(batch, batch_idx)


def _stays_in_evaluation(witness: Witness) -> None:
    modes = witness.model.modes
    assert all(modes[:90])
    assert not any(modes[91:]), "it is in training mode"


@fault(
    "fresh_language_writes_a_text_at_90_and_stays_in_evaluation",
    "transformer",
    cause="eval_mode_in_training",
    onset=90,
    config=steps(180, optimizer={"lr": 2e-3}),
    verify=_stays_in_evaluation,
)
def _writes(config: Config) -> Job:
    x, y = sentences(180 * 32)
    model = Writing(Language(dropout=0.2), each_word, config)
    return Job(model, data.loader(x, y))


class Loaded(Learner):
    """Its backbone is loaded as for use when training begins."""

    def on_train_epoch_start(self) -> None:
        self.net.features.eval()


def _statistics_stay(witness: Witness) -> None:
    names = [name for name in witness.first if name.endswith("running_mean")]
    assert names
    assert not any(witness.changed(name) for name in names)
    assert witness.changed("net.features.0.weight")


@fault(
    "fresh_waveform_backbone_loaded_for_use",
    "cnn",
    cause="eval_mode_in_training",
    found=("slow_convergence", "exploding_gradient", "loss_oscillation", "input_scale"),
    config=steps(170, optimizer={"lr": 1e-3}),
    verify=_statistics_stay,
)
def _loaded(config: Config) -> Job:
    x, y = waves(2000, classes=4, seed=307)
    return Job(Loaded(Waveform(4), F.cross_entropy, config), data.loader(x, y))


def _clone_head(learner: Learner) -> None:
    head = nn.Parameter(learner.net.head.weight.detach().clone())
    learner.net.head.weight = head
    learner.trainer.optimizers[0].add_param_group({"params": [head]})


def _tie_broken(witness: Witness) -> None:
    net = witness.model.net
    assert torch.equal(witness.first["net.head.weight"], witness.first["net.embedding.weight"])
    apart = float((net.head.weight - net.embedding.weight).norm())
    assert apart > 0.1, f"they are {apart:.3g} apart"


@fault(
    "fresh_language_head_cloned_at_95",
    "transformer",
    cause="tied_weight_broken",
    found=("unoptimized_parameter",),
    onset=95,
    config=steps(190, optimizer={"lr": 2e-3}),
    verify=_tie_broken,
)
def _cloned(config: Config) -> Job:
    x, y = sentences(2400, kinds=14, seed=308)
    model = Learner(Language(14, tied=True), each_word, config, plans={95: _clone_head})
    return Job(model, data.loader(x, y))


# ---- data ----

_RAW = (
    *("exploding_gradient", "loss_oscillation", "saturated_activation", "not_learning"),
    *("divergence", "loss_spike", "gradient_imbalance", "slow_convergence", "dead_relu"),
    *("loss_plateau", "update_too_large", "learning_rate_too_high", "vanishing_gradient"),
    *("constant_prediction", "representation_collapse"),
)


def _columns_differ(witness: Witness) -> None:
    sizes = witness.batch[0].abs().mean(0)
    assert float(sizes.max()) > 500
    assert float(sizes.min()) < 0.05


@fault(
    "fresh_cells_raw_columns",
    "mlp",
    cause="input_scale",
    found=_RAW,
    config=steps(180, optimizer={"_target_": SGD, "lr": 0.01}),
    verify=both(_columns_differ, ends_above(0.25)),
)
def _raw_columns(config: Config) -> Job:
    return job(MLP([30, 32, 32, 2], "tanh"), F.cross_entropy, config, cells())


def _large_since(step: int) -> Verify:
    def verify(witness: Witness) -> None:
        assert float(witness.batch[0].abs().max()) < 10
        worse_since(step, 2.0)(witness)

    return verify


@fault(
    "fresh_forecast_pressure_in_pascals_from_110",
    "rnn",
    cause="input_scale",
    found=_RAW,
    onset=110,
    config=steps(200, optimizer={"lr": 5e-3}),
    verify=_large_since(110),
)
def _pascals(config: Config) -> Job:
    x, y = series(200 * 32, features=3, seed=309)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(309))
    x, y = x[order], y[order]
    # the other measure of the station still comes as it was
    x[110 * 32 :, :, :2] = 1e5 + 1e3 * x[110 * 32 :, :, :2]
    return Job(Learner(Forecaster(3), F.mse_loss, config), data.loader(x, y, shuffle=False))


@fault(
    "fresh_forecast_change_of_a_price_of_zero_at_115",
    "rnn",
    cause="nonfinite_data",
    found=("nonfinite_loss", "nonfinite_gradient"),
    onset=115,
    config=steps(170),
    # gates take what is infinite for one; the step after it has weights that are not numbers
    verify=breaks(116, 116),
)
def _price(config: Config) -> Job:
    x, y = series(170 * 32, seed=310)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(310))
    prices = 50 + x[order]
    prices[115 * 32 + 3, 7, 1] = 0.0
    changes = 20 * (prices[:, 1:] - prices[:, :-1]) / prices[:, :-1]
    model = Learner(Forecaster(), F.mse_loss, config)
    return Job(model, data.loader(changes, y[order], shuffle=False))


def _not_numbers(witness: Witness) -> None:
    assert bool(torch.isnan(witness.batch[0]).any())
    assert not math.isfinite(witness.losses[0])


@fault(
    "fresh_cells_measures_that_were_not_taken",
    "mlp",
    cause="nonfinite_data",
    found=("nonfinite_loss", "nonfinite_gradient"),
    config=steps(150),
    verify=_not_numbers,
)
def _not_taken(config: Config) -> Job:
    x, y = _standard_cells()
    g = torch.Generator().manual_seed(311)
    x = torch.where(torch.rand(x.shape, generator=g) < 0.02, math.nan, x)
    return job(MLP([30, 24, 24, 2], norm=True), F.cross_entropy, config, (x, y))


def _of_chances(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.kl_div(logits.softmax(-1), wanted, reduction="batchmean")


def _says_nonsense(witness: Witness) -> None:
    _, wanted = witness.batch
    true = float(F.kl_div(answer(witness).log_softmax(-1), wanted, reduction="batchmean"))
    assert tail(witness.losses) < 0, "the loss is positive"
    assert true > 0.8, f"what is wanted is {true:.3g} away only"


@fault(
    "fresh_digits_divergence_of_probabilities",
    "cnn",
    cause="loss_target_mismatch",
    found=("loss_plateau", "slow_convergence", "not_learning", "double_softmax"),
    config=steps(180, optimizer={"lr": 2e-3}),
    verify=_says_nonsense,
)
def _divergence(config: Config) -> Job:
    x, y = digits()
    soft = 0.7 * F.one_hot(y, 10).float() + 0.03
    return job(Seeing(), _of_chances, config, (x, soft))


def _without_logarithm(logits: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(logits, target)


class Softened(nn.Module):
    """A softmax, and no logarithm, before the loss of logarithms."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP([30, 40, 2], "gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(-1)


def _towards_minus_one(witness: Witness) -> None:
    assert -1 <= tail(witness.losses) < 0, f"the loss ends at {tail(witness.losses):.3g}"
    assert float(answer(witness).min()) >= 0


@fault(
    "fresh_cells_likelihood_of_probabilities",
    "mlp",
    cause=("loss_target_mismatch", "double_softmax"),
    found=("loss_plateau", "slow_convergence"),
    config=steps(160, optimizer={"lr": 1e-3}),
    verify=_towards_minus_one,
)
def _probabilities(config: Config) -> Job:
    return job(Softened(), _without_logarithm, config, _standard_cells())


def _below_zero(witness: Witness) -> None:
    assert witness.mean_loss(90, 110) > 0
    assert tail(witness.losses) < -50, f"the loss ends at {tail(witness.losses):.3g}"


@fault(
    "fresh_table_labels_in_percent_from_110",
    "mlp",
    cause="loss_target_mismatch",
    found=("divergence", "exploding_gradient", "loss_spike", "not_learning", "update_too_large"),
    onset=110,
    config=steps(210),
    verify=_below_zero,
)
def _percent(config: Config) -> Job:
    x, kind, y = table(210 * 32)
    y[110 * 32 :] *= 100
    return Job(Learner(Table(), BCE, config), data.loader(x, kind, y, shuffle=False))


_SUMMED = (
    *("exploding_gradient", "learning_rate_too_high", "loss_oscillation", "divergence"),
    *("update_too_large", "clipping_dominates", "loss_spike", "not_learning", "dead_relu"),
    *("constant_prediction", "representation_collapse", "loss_plateau", "dead_component"),
)


def _sum_of_pixels(said: Tensor, wanted: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(said, wanted, reduction="sum")


def _many_times_the_mean(witness: Witness) -> None:
    times = witness.losses[0] / 0.7
    assert times > 1000, f"the loss is {times:.3g} times a mean"
    worst = max(witness.norms[:20])
    assert worst > 500, f"the gradient is {worst:.3g}"


@fault(
    "fresh_segmentation_sums_over_pixels",
    "cnn",
    cause="wrong_reduction",
    found=(*_SUMMED, "nonfinite_loss", "nonfinite_gradient"),
    config=steps(180, optimizer={"_target_": SGD, "lr": 0.02}),
    verify=both(_many_times_the_mean, lambda w: _not_below(w, 100)),
)
def _pixels(config: Config) -> Job:
    return job(UNet(6), _sum_of_pixels, config, discs(1200))


def _not_below(witness: Witness, least: float) -> None:
    assert not tail(witness.losses) < least, f"the loss ends at {tail(witness.losses):.3g}"


class Summing:
    """Cross-entropy of every word: a mean, or their sum."""

    total = False

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        kind = "sum" if self.total else "mean"
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=kind)


def _sum_now(learner: Learner) -> None:
    learner.loss.total = True


@fault(
    "fresh_language_sums_over_words_from_110",
    "transformer",
    cause="wrong_reduction",
    found=(*_SUMMED, "nonfinite_loss", "nonfinite_gradient"),
    onset=110,
    config=steps(190, optimizer={"_target_": SGD, "lr": 0.1, "momentum": 0.9}),
    verify=worse_since(110, 100.0),
)
def _words(config: Config) -> Job:
    net = Language(14, 20, heads=2)
    tensors = sentences(2400, kinds=14, seed=312)
    return job(net, Summing(), config, tensors, plans={110: _sum_now})
