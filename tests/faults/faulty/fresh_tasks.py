"""Data and networks of other kinds than the first cases have; enters no case."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults.networks import ACTIVATIONS, MLP, Learner
from tests.faults.witness import Witness

Check = Callable[[Witness], None]


def steps(count: int, **more: Any) -> dict[str, Any]:
    """Settings of a run of some steps."""
    return {"trainer": {"max_steps": count}, **more}


# ---- data ----


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits, ``(1797, 1, 8, 8)`` from zero to one."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    return torch.tensor(x).float()[order].view(-1, 1, 8, 8) / 16, torch.tensor(y)[order]


@lru_cache
def cells() -> tuple[Tensor, Tensor]:
    """Thirty raw measures of cells, and whether they are malign."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(4))
    return torch.tensor(x).float()[order], torch.tensor(y)[order]


def waves(
    samples: int, length: int = 40, classes: int = 3, noise: float = 0.5, seed: int = 201
) -> tuple[Tensor, Tensor]:
    """Tones of a frequency by class, at any phase, ``(samples, 1, length)``."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (samples,), generator=g)
    phase = 2 * math.pi * torch.rand(samples, 1, generator=g)
    time = torch.arange(length) * (0.4 + 0.5 * y[:, None])
    x = (time + phase).sin() + noise * torch.randn(samples, length, generator=g)
    return x[:, None], y


def series(
    samples: int, window: int = 20, features: int = 2, seed: int = 202
) -> tuple[Tensor, Tensor]:
    """A window of a damped oscillation with noise, and the next value, ``(samples, 1)``."""
    g = torch.Generator().manual_seed(seed)
    total = samples + window + 1
    values = torch.zeros(total, features)
    noise = 0.4 * torch.randn(total, features, generator=g)
    for t in range(2, total):
        values[t] = 1.6 * values[t - 1] - 0.8 * values[t - 2] + noise[t]
    values = values / values.std()
    windows = values.unfold(0, window, 1).transpose(1, 2)[:samples]
    return windows.contiguous(), values[window : window + samples, :1].contiguous()


def sentences(
    samples: int, length: int = 16, kinds: int = 12, seed: int = 203
) -> tuple[Tensor, Tensor]:
    """Words of which each makes some others likely, and the words that follow."""
    g = torch.Generator().manual_seed(seed)
    table = (2.5 * torch.randn(kinds, kinds, generator=g)).softmax(-1)
    words = [torch.randint(kinds, (samples,), generator=g)]
    for _ in range(length):
        words.append(torch.multinomial(table[words[-1]], 1, generator=g)[:, 0])
    text = torch.stack(words, 1)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def discs(
    samples: int, size: int = 16, noise: float = 0.4, seed: int = 204
) -> tuple[Tensor, Tensor]:
    """Pictures of a disc, and where it is, both ``(samples, 1, size, size)``."""
    g = torch.Generator().manual_seed(seed)
    centre = size * (0.25 + 0.5 * torch.rand(samples, 2, 1, 1, generator=g))
    radius = size * (0.12 + 0.13 * torch.rand(samples, 1, 1, generator=g))
    place = torch.arange(size).float()
    far = (place[:, None] - centre[:, 0]).square() + (place - centre[:, 1]).square()
    mask = (far < radius.square()).float()[:, None]
    return mask + noise * torch.randn(mask.shape, generator=g), mask


def ratings(
    samples: int, users: int = 60, items: int = 40, noise: float = 0.3, seed: int = 205
) -> tuple[Tensor, Tensor]:
    """Pairs of a user and an item, ``(samples, 2)``, and how much it is liked."""
    g = torch.Generator().manual_seed(seed)
    tastes, kinds = torch.randn(users, 3, generator=g), torch.randn(items, 3, generator=g)
    x = torch.stack([torch.randint(n, (samples,), generator=g) for n in (users, items)], 1)
    y = (tastes[x[:, 0]] * kinds[x[:, 1]]).sum(1) / 3**0.5
    return x, y + noise * torch.randn(samples, generator=g)


def table(
    samples: int, columns: int = 6, kinds: int = 8, seed: int = 206
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, a kind, and a label of zero or one, ``(samples, 1)``."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=g)
    kind = torch.randint(kinds, (samples,), generator=g)
    effect = 1.5 * torch.randn(kinds, generator=g)[kind]
    score = 2 * x[:, 0] - 1.5 * x[:, 1] + 2 * x[:, 2] * x[:, 3] + effect
    y = torch.rand(samples, generator=g) < torch.sigmoid(1.5 * score)
    return x, kind, y.float()[:, None]


def field(samples: int, frequency: float = 6.0, seed: int = 207) -> tuple[Tensor, Tensor]:
    """Places in a square, and the brightness of a picture of stripes there."""
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(samples, 2, generator=g) - 1
    turns = frequency * math.pi
    return x, (turns * x[:, :1]).sin() * (turns * x[:, 1:] / 2).cos()


# ---- networks ----


class Waveform(nn.Module):
    """Convolutions over time, a mean over time, and a head."""

    def __init__(
        self,
        classes: int,
        widths: Sequence[int] = (12, 24, 24),
        activation: str = "relu",
        *,
        norm: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((1, *widths)):
            layers += [nn.Conv1d(before, after, 5, padding=2)]
            layers += [nn.BatchNorm1d(after)] if norm else []
            layers += [ACTIVATIONS[activation]()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(-1))


def _twice(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        nn.GroupNorm(2, after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Down once, up once, with a way around; a logit for each pixel."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down, self.middle = _twice(1, width), _twice(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join = _twice(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        coarse = self.up(self.middle(F.max_pool2d(fine, 2)))
        return self.head(self.join(torch.cat([fine, coarse], 1)))


class Forecaster(nn.Module):
    """An LSTM, and a head on its last state."""

    def __init__(self, features: int = 2, width: int = 24, answers: int = 1) -> None:
        super().__init__()
        self.rnn = nn.LSTM(features, width, batch_first=True)
        self.head = nn.Linear(width, answers)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Language(nn.Module):
    """Words to the logits of the next ones, by the encoder layers of torch, which look back."""

    def __init__(
        self,
        kinds: int = 12,
        width: int = 24,
        *,
        layers: int = 1,
        heads: int = 3,
        length: int = 16,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(
                    width, heads, 3 * width, dropout, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(layers)
            ]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, kinds, bias=False)
        if tied:
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.position[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for block in self.blocks:
            y = block(y, src_mask=mask)
        return self.head(self.norm(y))


def each_word(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every word."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class Patches(nn.Module):
    """A vision transformer for digits: patches of two by two, a token for the class."""

    def __init__(self, width: int = 24, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.3 * torch.randn(17, width))
        self.blocks = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(
                    width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(layers)
            ]
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(y), -1, -1), y], 1) + self.position
        for block in self.blocks:
            y = block(y)
        return self.head(y[:, 0])


class Factors(nn.Module):
    """How well a user's vector fits an item's."""

    def __init__(self, users: int = 60, items: int = 40, width: int = 8) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        for one in (self.users, self.items):
            nn.init.normal_(one.weight, std=0.3)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return (self.users(x[:, 0]) * self.items(x[:, 1])).sum(1) + self.bias


class Table(nn.Module):
    """Numbers and a kind to the logit of a label."""

    def __init__(self, columns: int = 6, kinds: int = 8, width: int = 40) -> None:
        super().__init__()
        self.kind = nn.Embedding(kinds, 6)
        self.body = MLP([columns + 6, width, width, 1], "gelu")

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return self.body(torch.cat([x, self.kind(kind)], -1))


class Community(nn.Module):
    """Graph convolutions over one graph of groups; asked for some of its nodes.

    Args:
        classes: Number of groups.
        nodes: Number of nodes.
        width: Of each layer.
        layers: Number of rounds.
        mean: Whether neighbours are averaged, rather than summed.
        degree: Mean number of neighbours in the own group.
        activation: Between rounds.
        own: Whether a node's own features have weights of their own.
        mixing: How much more seldom an edge between two groups is.
    """

    def __init__(
        self,
        classes: int = 4,
        nodes: int = 160,
        width: int = 24,
        layers: int = 2,
        *,
        mean: bool = True,
        degree: float = 8.0,
        activation: str = "relu",
        own: bool = True,
        mixing: float = 0.15,
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(208)
        group = torch.arange(nodes) % classes
        same = group[:, None] == group
        chance = torch.where(same, degree * classes / nodes, mixing * degree / nodes)
        edges = (torch.rand(nodes, nodes, generator=g) < chance).float().triu(1)
        edges = edges + edges.T + torch.eye(nodes)
        if mean:
            edges = edges / edges.sum(1, keepdim=True)
        features = F.one_hot(group, classes) + 1.5 * torch.randn(nodes, classes, generator=g)
        self.register_buffer("edges", edges)
        self.register_buffer("features", features)
        self.groups = group
        sizes = [classes, *[width] * layers]
        self.rounds = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)])
        self.own = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)]) if own else None
        self.activation = ACTIVATIONS[activation]()
        self.head = nn.Linear(width, classes)

    def forward(self, chosen: Tensor) -> Tensor:
        x = self.features
        for number, layer in enumerate(self.rounds):
            y = layer(self.edges @ x)
            x = self.activation(y if self.own is None else y + self.own[number](x))
        return self.head(x[chosen])

    def data(self, samples: int) -> tuple[Tensor, Tensor]:
        """Nodes by chance, and their groups."""
        g = torch.Generator().manual_seed(209)
        chosen = torch.randint(len(self.groups), (samples,), generator=g)
        return chosen, self.groups[chosen]


class Views(Learner):
    """Learns an encoder from two noisy views of each sample; `loss` takes both codes."""

    noise = 0.3

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        x = batch[0]
        first, second = (self.net(x + self.noise * torch.randn_like(x)) for _ in range(2))
        loss = self.loss(first, second)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        x = batch[0]
        first, second = (self.net(x + self.noise * torch.randn_like(x)) for _ in range(2))
        self.log("val_loss", self.loss(first, second))


# ---- plans and evidence ----


def sets(name: str, value: object) -> Callable[[Learner], None]:
    """A plan: another value for an attribute of the network."""

    def plan(learner: Learner) -> None:
        setattr(learner.net, name, value)

    return plan


def norm_of(witness: Witness, step: int, beginning: str) -> float:
    """L2 norm of the gradient of all parameters whose names begin so."""
    found = [n or 0.0 for k, n in witness.norms_by_name[step].items() if k.startswith(beginning)]
    assert found, f"no parameter begins with {beginning}"
    return math.sqrt(sum(n * n for n in found))


def travel_of(witness: Witness, beginning: str) -> float:
    """How far the parameters whose names begin so went, as a share of their norm."""
    names = [n for n in witness.first if n.startswith(beginning) and n in witness.last]
    assert names, f"no parameter begins with {beginning}"
    moved = sum(float((witness.last[n] - witness.first[n]).double().square().sum()) for n in names)
    size = sum(float(witness.first[n].double().square().sum()) for n in names)
    return math.sqrt(moved / max(size, 1e-30))


def ends_above(least: float) -> Check:
    """The mean of the last fifth of the losses is no lower."""

    def verify(witness: Witness) -> None:
        last = witness.losses[-max(5, len(witness.losses) // 5) :]
        mean = sum(last) / len(last)
        assert not mean < least, f"the loss ends at {mean:.3g}"

    return verify


def worse_since(step: int, factor: float) -> Check:
    """The loss is that much larger after a step than before it, to the end."""

    def verify(witness: Witness) -> None:
        before, after = witness.mean_loss(step - 20, step), witness.mean_loss(step + 5)
        assert not after < factor * before, f"the loss goes from {before:.3g} to {after:.3g}"

    return verify


def gradient_grows_at(step: int, factor: float, beginning: str = "") -> Check:
    """The gradient of some parameters is that much larger after a step."""

    def verify(witness: Witness) -> None:
        before = sorted(norm_of(witness, s, beginning) for s in range(step - 20, step))[10]
        after = max(norm_of(witness, s, beginning) for s in range(step, step + 10))
        assert after > factor * before, f"the gradient goes from {before:.3g} to {after:.3g}"

    return verify


def no_gradient(beginning: str, since: int = 0) -> Check:
    """Some parameters have no gradient, or one of zero, from a step on."""

    def verify(witness: Witness) -> None:
        worst = max(norm_of(witness, s, beginning) for s in range(since, len(witness.norms)))
        assert worst == 0.0, f"{beginning} has a gradient of {worst:.3g}"
        if since:
            assert norm_of(witness, since // 2, beginning) > 0

    return verify


def constant_answers(witness: Witness, batch: Sequence[Tensor], most: float = 1e-3) -> None:
    """Assert that the network says the same to all samples."""
    model = witness.model
    assert model is not None
    with torch.no_grad():
        said = model(*batch)
    wide = float(said.flatten(1).std(0).max())
    assert wide < most, f"the answers differ by {wide:.3g}"
