"""Attention as it should be: peaked where one place counts, even where all do, masked, causal."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, healthy
from tests.faults.healthy.checks import accuracy, answers, fresh, job, least, most, per_token
from tests.faults.networks import Attention, Transformer
from tests.faults.witness import Witness


def _maps(witness: Witness, attention: Attention, *inputs: Tensor) -> Tensor:
    """Weights of a layer, ``(batch, heads, queries, keys)``, from its inputs by its formula."""
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    answers(witness, *inputs)
    handle.remove()
    x = seen[0]
    b, t, d = x.shape
    with torch.no_grad():
        q, k, _ = attention.qkv(x).view(b, t, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
        size = d // attention.heads
        scores = q @ k.transpose(-1, -2) * attention.temperature / math.sqrt(size)
        return scores.softmax(-1)


def _copies(samples: int = 3000) -> tuple[Tensor, Tensor]:
    return data.copies(samples)


def _looks_at_one(witness: Witness) -> None:
    least(accuracy(witness, _copies()), 0.99, "accuracy on fresh tokens")
    (x, _) = fresh(_copies())
    assert witness.model is not None
    blocks = witness.model.net.blocks
    peaks = max(
        float(head.mean())
        for block in blocks
        for head in _maps(witness, block.attention, x[:64]).amax(-1).transpose(0, 1)
    )
    least(peaks, 0.9, "mean largest weight of the most peaked head")


@healthy(
    "attention_copies_one_place",
    "transformer",
    config={"model": {"warmup_share": 0.1}, "trainer": {"max_steps": 500}},
    verify=_looks_at_one,
    tricky="attention is peaked: each token looks at one other, as the task wants",
)
def _peaked(config: Config) -> Job:
    net = Transformer(16, 16, width=32, layers=1, heads=2, length=12, each=True)
    return job(net, per_token, config, _copies())


@healthy(
    "attention_copies_two_layers",
    "transformer",
    config={"optimizer": {"lr": 2e-3}, "trainer": {"max_steps": 500}},
    verify=_looks_at_one,
    tricky="attention is peaked in some heads and even in others",
)
def _peaked_deep(config: Config) -> Job:
    net = Transformer(16, 16, width=48, layers=2, heads=4, length=12, each=True)
    return job(net, per_token, config, _copies())


class Pooling(nn.Module):
    """Vectors pooled by one learned query, which starts at zero: the mean at first."""

    def __init__(self, features: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.query = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.key = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)[:, None]
        query = self.query.expand(len(x), -1, -1, -1)
        return self.head(F.scaled_dot_product_attention(query, self.key(y), y)[:, 0, 0])


def _pools_evenly(witness: Witness) -> None:
    least(accuracy(witness, data.sequences(4096)), 0.93, "accuracy on fresh sequences")
    assert witness.model is not None
    net, (x, _) = witness.model.net, fresh(data.sequences(4096))
    with torch.no_grad():
        scores = net.key(net.body(x)) @ net.query[0, 0, 0] / math.sqrt(32)
        weights = scores.softmax(-1)
    entropy = -(weights * weights.log()).sum(-1).mean() / math.log(x.shape[1])
    least(float(entropy), 0.85, "entropy of the weights against that of an even spread")


@healthy(
    "even_pooling_is_right",
    "transformer",
    verify=_pools_evenly,
    tricky="attention stays even, as a sum over all places wants",
)
def _pooling(config: Config) -> Job:
    return job(Pooling(4, 2), F.cross_entropy, config, data.sequences(4096))


class Gathering(nn.Module):
    """A first token gathers; every other sees its neighbours and that token alone."""

    def __init__(self, kinds: int, classes: int, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, width)
        self.first = nn.Parameter(torch.randn(width))
        self.gather = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.spread = Attention(width, 2, temperature=4.0)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x)
        y = torch.cat([self.first.expand(len(x), 1, -1), y], 1)
        z = self.norms[0](y)
        told = self.gather(z[:, :1], z, z, need_weights=False)[0]
        top = y[:, :1] + told
        y = torch.cat([top + self.mlp(self.norms[1](top)), y[:, 1:]], 1)
        y = y + self.spread(self.norms[2](y))
        return self.head(y[:, 1:])


def _everywhere(samples: int = 3000) -> tuple[Tensor, Tensor]:
    """Every token must tell what the whole sequence is."""
    x, y = data.tokens(samples)
    return x, y[:, None].expand(-1, 16).contiguous()


def _looks_at_first(witness: Witness) -> None:
    least(accuracy(witness, _everywhere()), 0.9, "accuracy on fresh tokens")
    assert witness.model is not None
    x, _ = fresh(_everywhere())
    weights = _maps(witness, witness.model.net.spread, x[:64])
    least(
        float(weights[..., 1:, 0].mean(0).mean(-1).max()), 0.35, "weight on the first of 17 tokens"
    )


@healthy(
    "first_token_gathers",
    "transformer",
    config={"trainer": {"max_steps": 400}},
    verify=_looks_at_first,
    tricky="most attention goes to a learned first token, which holds the answer",
)
def _gathers(config: Config) -> Job:
    return job(Gathering(20, 2), per_token, config, _everywhere())


# ---- language ----


def _chain(kinds: int = 24) -> Tensor:
    """How likely each token follows each other one."""
    g = torch.Generator().manual_seed(3)
    return (3 * torch.randn(kinds, kinds, generator=g)).softmax(-1)


def _texts(samples: int = 2500, length: int = 16) -> tuple[Tensor, Tensor]:
    chain, g = _chain(), torch.Generator().manual_seed(4)
    x = [torch.randint(24, (samples,), generator=g)]
    for _ in range(length):
        x.append(torch.multinomial(chain[x[-1]], 1, generator=g)[:, 0])
    y = torch.stack(x, 1)
    return y[:, :-1].contiguous(), y[:, 1:].contiguous()


def _near_entropy(witness: Witness) -> None:
    x, y = fresh(_texts())
    floor = float(-_chain()[x, y].log().mean())
    loss = float(per_token(answers(witness, x), y))
    most(loss, floor + 0.12, f"loss on fresh text (the chain's own is {floor:.2f})")


class Causal(nn.Module):
    """`nn.MultiheadAttention` that sees the past alone; the head is the embedding itself."""

    def __init__(self, kinds: int, width: int = 32, length: int = 16, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(width, kinds, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        mask = torch.full((length, length), -torch.inf).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.position
        z = self.norms[0](y)
        y = y + self.attention(z, z, z, attn_mask=self.mask, need_weights=False)[0]
        y = y + self.mlp(self.norms[1](y))
        return self.head(self.norms[2](y))


@healthy(
    "causal_tied_head",
    "transformer",
    config={"trainer": {"max_steps": 400}},
    verify=_near_entropy,
    tricky="head and embedding share a weight; a mask of -inf; the loss has a high floor",
)
def _causal(config: Config) -> Job:
    return job(Causal(24), per_token, config, _texts())


@healthy(
    "causal_warmup_cosine_clip",
    "transformer",
    config={
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 3e-3, "weight_decay": 0.1},
        "model": {"warmup_share": 0.1},
        "trainer": {"max_steps": 400, "gradient_clip_val": 1.0},
    },
    verify=_near_entropy,
    tricky="settings of a language model: warm-up, clip at 1, decay 0.1",
)
def _causal_settings(config: Config) -> Job:
    return job(Causal(24, tied=False), per_token, config, _texts())


# ---- padding ----


def _padded(samples: int = 4096) -> tuple[Tensor, Tensor]:
    """Tokens of the lengths 4 to 16, filled up with token 0."""
    x, _ = data.tokens(samples, kinds=20)
    x = x.clamp(min=1)
    g = torch.Generator().manual_seed(6)
    size = torch.randint(4, 17, (samples, 1), generator=g)
    x = torch.where(torch.arange(16) < size, x, 0)
    # half of them get more of token 2
    more = (torch.rand(samples, 1, generator=g) < 0.5) & (torch.rand(x.shape, generator=g) < 0.3)
    x = torch.where(more & (x > 2), 2, x)
    return x, ((x == 1).sum(1) > (x == 2).sum(1)).long()


class Padded(nn.Module):
    """`nn.TransformerEncoder` under a padding mask, and the mean over what is there."""

    def __init__(self, kinds: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        there = x != 0
        y = self.encoder(self.embedding(x), src_key_padding_mask=~there)
        return self.head((y * there[..., None]).sum(1) / there.sum(1, keepdim=True))


def _padded_right(witness: Witness) -> None:
    least(accuracy(witness, _padded()), 0.9, "accuracy on fresh tokens")
    least(float((_padded()[0] == 0).float().mean()), 0.3, "share of padding")


@healthy(
    "padded_encoder",
    "transformer",
    config={
        "optimizer": {"lr": 1e-3},
        "model": {"warmup_share": 0.1},
        "trainer": {"max_steps": 400},
    },
    verify=_padded_right,
    tricky="more than a third of all places is padding, masked by -inf",
)
def _padding(config: Config) -> Job:
    return job(Padded(20, 2), F.cross_entropy, config, _padded())


class ByHand(nn.Module):
    """Attention written out, with -inf added where nothing stands."""

    def __init__(self, kinds: int, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, width)
        self.position = nn.Parameter(0.3 * torch.randn(length, width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, kinds))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.position
        mask = torch.zeros(x.shape).masked_fill(x == 0, -torch.inf)[:, None]
        scores = self.query(y) @ self.key(y).transpose(1, 2) / y.shape[-1] ** 0.5
        return self.mlp(y + (scores + mask).softmax(-1) @ self.value(y))


def _marked(samples: int = 4096) -> tuple[Tensor, Tensor]:
    """Every token to be told again in another code; nothing is asked where nothing stands."""
    x, _ = _padded(samples)
    return x, torch.where(x == 0, -100, (7 * x + 3) % 20)


def _marked_right(witness: Witness) -> None:
    x, y = fresh(_marked())
    said = answers(witness, x).argmax(-1)
    least(float((said == y)[y != -100].float().mean()), 0.98, "accuracy where something stands")


@healthy(
    "ignored_padding",
    "transformer",
    verify=_marked_right,
    tricky="a third of the targets is -100; -inf in the scores",
)
def _ignored(config: Config) -> Job:
    return job(ByHand(20), per_token, config, _marked())


# ---- other shapes ----


class Patches(nn.Module):
    """Nine patches of an image and a class token, through two blocks."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(10, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(x), -1, -1), y], 1) + self.position
        return self.head(self.encoder(y)[:, 0])


@healthy(
    "vision_transformer",
    "transformer",
    config={"optimizer": {"lr": 1e-3}, "model": {"warmup_share": 0.1}},
    verify=lambda witness: least(accuracy(witness, data.images(2560)), 0.97, "accuracy"),
    tricky="the output is that of one token of ten",
)
def _vision(config: Config) -> Job:
    return job(Patches(4), F.cross_entropy, config, data.images(2560))


class Lookup(nn.Module):
    """Cross-attention from questions to a table of keys and values."""

    def __init__(self, kinds: int, width: int = 32) -> None:
        super().__init__()
        self.keys = nn.Embedding(kinds, width)
        self.values = nn.Embedding(kinds, width)
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.head = nn.Linear(width, kinds)

    def forward(self, table: Tensor, asked: Tensor) -> Tensor:
        key, value = self.keys(table[:, 0]), self.values(table[:, 1])
        return self.head(self.attention(self.keys(asked), key, value, need_weights=False)[0])


def _tables(samples: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(8)
    keys = torch.rand(samples, 16, generator=g).argsort(1)[:, :8]
    values = torch.randint(16, (samples, 8), generator=g)
    place = torch.randint(8, (samples, 4), generator=g)
    return torch.stack([keys, values], 1), keys.gather(1, place), values.gather(1, place)


@healthy(
    "lookup_in_a_table",
    "transformer",
    config={"optimizer": {"lr": 5e-3}, "trainer": {"max_steps": 400}},
    verify=lambda witness: least(accuracy(witness, _tables()), 0.97, "answers found"),
    tricky="cross-attention to one entry of eight",
)
def _lookup(config: Config) -> Job:
    return job(Lookup(16), per_token, config, _tables())
