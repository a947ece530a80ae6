"""Data and networks of a third kind, unlike those of the cases before; enters no case."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults.networks import ACTIVATIONS

# ---- data ----


def shapes(samples: int, noise: float = 0.5, seed: int = 501) -> tuple[Tensor, Tensor]:
    """A bar that lies or stands, red or blue, somewhere in ``(samples, 3, 14, 14)``."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (samples,), generator=g)
    place = torch.randint(2, 11, (samples,), generator=g)
    bars = (torch.arange(14) - place[:, None]).abs() <= 1
    standing = bars[:, None, :].expand(-1, 14, -1)
    bar = torch.where((y % 2 == 0)[:, None, None], standing, standing.transpose(1, 2)).float()
    x = noise * torch.randn(samples, 3, 14, 14, generator=g)
    x[torch.arange(samples), torch.where(y < 2, 0, 2)] += bar
    return x, y


def spirals(samples: int, noise: float = 0.08, seed: int = 502) -> tuple[Tensor, Tensor]:
    """Points on three arms of a spiral in the plane."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (samples,), generator=g)
    far = 0.2 + 1.3 * torch.rand(samples, generator=g)
    angle = 2.5 * far + 2 * math.pi / 3 * y
    x = far[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + noise * torch.randn(samples, 2, generator=g), y


@lru_cache
def wine() -> tuple[Tensor, Tensor]:
    """Thirteen raw measures of wines, and of which of three growers they are."""
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    return torch.tensor(x).float()[order], torch.tensor(y)[order]


def standard_wine() -> tuple[Tensor, Tensor]:
    """The same, each measure of mean zero and deviation one."""
    x, y = wine()
    return (x - x.mean(0)) / x.std(0), y


@lru_cache
def diabetes() -> tuple[Tensor, Tensor]:
    """Ten measures of patients and how far their illness went, all standardized."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.tensor(one).float() for one in load_diabetes(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(6))
    x, y = x[order] / x.std(0), (y[order, None] - y.mean()) / y.std()
    return x, y


def clouds(samples: int, points: int = 12, seed: int = 503) -> tuple[Tensor, Tensor]:
    """Sets of points in space, and which of three sizes the cloud has."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (samples,), generator=g)
    size = torch.tensor([0.7, 1.0, 1.4])[y]
    return size[:, None, None] * torch.randn(samples, points, 3, generator=g), y


def tags(samples: int, length: int = 14, kinds: int = 18, seed: int = 504) -> tuple[Tensor, Tensor]:
    """Words, and the tag of each: by the word, and another after one of three small words."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(kinds, (samples, length), generator=g)
    after = F.pad((x < 3)[:, :-1], (1, 0)).long()
    return x, (x + after) % 3


def horizon(
    samples: int, window: int = 24, ahead: int = 6, seed: int = 505
) -> tuple[Tensor, Tensor]:
    """A window of two tones with noise, ``(samples, 1, window)``, and the next values."""
    g = torch.Generator().manual_seed(seed)
    start = 6.28 * torch.rand(samples, 2, 1, generator=g)
    time = torch.arange(window + ahead)
    speeds = torch.tensor([0.35, 0.9])[:, None]
    values = (speeds * time + start).sin().sum(1)
    values = values + 0.15 * torch.randn(values.shape, generator=g)
    return values[:, None, :window], values[:, window:]


def amounts(samples: int, seed: int = 506) -> tuple[Tensor, Tensor]:
    """Seven features, and an amount above zero, ``(samples, 1)``."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 7, generator=g)
    size = 0.8 * x[:, :1] - 0.6 * x[:, 1:2] * x[:, 2:3] + 0.2 * torch.randn(samples, 1, generator=g)
    return x, size.exp()


def counts(samples: int, seed: int = 507) -> tuple[Tensor, Tensor]:
    """Six features, and how often something happened, ``(samples, 1)``."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=g)
    rate = (0.7 + 0.6 * x[:, :1] + 0.4 * x[:, 1:2].abs()).exp()
    return x, torch.poisson(rate, generator=g)


def additions(samples: int, length: int = 30, seed: int = 508) -> tuple[Tensor, Tensor]:
    """Numbers of which two are marked, ``(samples, length, 2)``, and the sum of those."""
    g = torch.Generator().manual_seed(seed)
    numbers = torch.rand(samples, length, generator=g) - 0.5
    marks = torch.zeros(samples, length)
    chosen = torch.rand(samples, length, generator=g).topk(2).indices
    marks.scatter_(1, chosen, 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(1, keepdim=True)


# ---- networks ----


class Residual(nn.Module):
    """Two convolutions beside a way around."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.around = nn.Conv2d(before, after, 1, stride, bias=False)
        self.called = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return F.relu(y + self.around(x)) if self.called else F.relu(y)


class ResNet(nn.Module):
    """A stem, two residual blocks, and a head, for pictures in colour."""

    def __init__(self, classes: int = 4, width: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(
            Residual(width, 2 * width, 2),
            Residual(2 * width, 3 * width, 2),
        )
        self.head = nn.Linear(3 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def plain(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.SiLU) -> nn.Sequential:
    """Linear layers with an activation after each but the last."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


class Sets(nn.Module):
    """A network for each point, the mean of what it says, and a network for that."""

    def __init__(self, classes: int = 3, width: int = 40) -> None:
        super().__init__()
        self.point = plain([3, width, width], nn.ReLU)
        self.whole = plain([width, width, classes], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.point(x).mean(1))


class Tagger(nn.Module):
    """Words, an LSTM in both directions, and a tag for each word."""

    blind = False

    def __init__(self, kinds: int = 18, tags: int = 3, width: int = 20) -> None:
        super().__init__()
        self.words = nn.Embedding(kinds, 16)
        self.rnn = nn.LSTM(16, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, tags)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.blind):
            y = self.words(x)
        return self.head(self.rnn(y)[0])


class Looks(nn.Module):
    """Attention to what was before, and a small network, each with a way around."""

    temperature = 1.0

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.small = plain([width, 2 * width, width], nn.GELU)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.before(x)
        query, key, value = (
            one(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in (self.query, self.key, self.value)
        )
        if mask is not None:
            key = key * mask[:, None, :, None]
        seen = F.scaled_dot_product_attention(query / self.temperature, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.small(self.between(x))


class Story(nn.Module):
    """A small language model; its head may be the table of its words."""

    def __init__(
        self, kinds: int = 14, width: int = 32, *, layers: int = 2, tied: bool = False
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(kinds, width)
        self.places = nn.Embedding(24, width)
        self.blocks = nn.ModuleList([Looks(width, 4) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, kinds, bias=False)
        if tied:
            nn.init.normal_(self.words.weight, std=0.15)
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            y = block(y, self.mask(x))
        return self.head(self.norm(y))

    def mask(self, x: Tensor) -> Tensor | None:
        """What the keys are multiplied by."""
        return None


def recalls(samples: int, length: int = 16, kinds: int = 14, seed: int = 509) -> tuple[Tensor, ...]:
    """Words, and for each the word three places before: attention has to find it."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(kinds, (samples, length), generator=g)
    return x, F.pad(x, (3, 0))[:, :length].contiguous()


class Mixer(nn.Module):
    """Digits in sixteen patches, mixed over places and over features."""

    def __init__(self, width: int = 32, layers: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2 * layers)])
        self.places = self.stack([plain([16, 32, 16], nn.GELU) for _ in range(layers)])
        self.features = self.stack([plain([width, 48, width], nn.GELU) for _ in range(layers)])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 10)

    def stack(self, layers: list[nn.Module]) -> Sequence[nn.Module]:
        """Keeps layers."""
        return nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        for number, (place, feature) in enumerate(zip(self.places, self.features, strict=True)):
            y = y + place(self.norms[2 * number](y).transpose(1, 2)).transpose(1, 2)
            y = y + feature(self.norms[2 * number + 1](y))
        return self.head(self.dropout(y.mean(1)))


class Dilated(nn.Module):
    """Convolutions over time, each looking twice as far as the one before."""

    def __init__(self, ahead: int = 6, width: int = 20, layers: int = 3) -> None:
        super().__init__()
        sizes = [1, *[width] * layers]
        self.layers = nn.ModuleList(
            [nn.Conv1d(a, b, 3, dilation=2**n) for n, (a, b) in enumerate(pairwise(sizes))]
        )
        self.head = nn.Linear(width, ahead)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = F.leaky_relu(layer(F.pad(x, (2 * 2**number, 0))), 0.1)
        return self.head(x[..., -1])


class WideAndDeep(nn.Module):
    """A linear model beside a deep one; `kept` is what is kept of the deep one."""

    kept = 1.0

    def __init__(self, columns: int = 6, kinds: int = 8) -> None:
        super().__init__()
        self.wide = nn.Linear(columns + kinds, 1)
        self.deep = nn.Sequential(nn.Linear(columns + kinds, 40), nn.ELU(), nn.Linear(40, 24))
        self.join = nn.Sequential(nn.ELU(), nn.Linear(24, 1))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        y = torch.cat([x, F.one_hot(kind, 8).float()], -1)
        return self.wide(y) + self.join(self.kept * self.deep(y))


class Recurrent(nn.Module):
    """A plain recurrent network and a head on its last state."""

    def __init__(self, kind: str = "relu", width: int = 32, gain: float = 1.0) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, width, nonlinearity=kind, batch_first=True)
        with torch.no_grad():
            self.rnn.weight_hh_l0.copy_(gain * torch.eye(width))
            self.rnn.bias_hh_l0.zero_()
            self.rnn.bias_ih_l0.zero_()
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Variational(nn.Module):
    """An encoder to a mean and a logarithm of the variance, and a decoder of a draw."""

    def __init__(self, features: int = 20, latent: int = 4) -> None:
        super().__init__()
        self.encoder = plain([features, 48, 2 * latent], nn.ELU)
        self.decoder = plain([latent, 48, features], nn.ELU)

    def forward(self, x: Tensor) -> Tensor:
        mean, logarithm = self.encoder(x).chunk(2, -1)
        draw = mean + (0.5 * logarithm).exp() * torch.randn_like(mean)
        return torch.cat([self.decoder(draw), mean, logarithm], -1)


class Bound:
    """Squared error of what is decoded, and `weight` times the divergence from the prior."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, said: Tensor, x: Tensor) -> Tensor:
        size = x.shape[-1]
        again, (mean, logarithm) = said[:, :size], said[:, size:].chunk(2, -1)
        divergence = 0.5 * (mean.square() + logarithm.exp() - logarithm - 1).sum(-1).mean()
        return (again - x).square().sum(-1).mean() + self.weight * divergence


class Codes(nn.Module):
    """An autoencoder of tanh layers; says the code after the reconstruction."""

    def __init__(self, features: int = 20, latent: int = 10) -> None:
        super().__init__()
        self.encoder = plain([features, 48, latent], ACTIVATIONS["tanh"])
        self.decoder = plain([latent, 48, features], ACTIVATIONS["tanh"])

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        return torch.cat([self.decoder(code), code], -1)


class Penalized:
    """Squared error, and the mean size of the code times a weight."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, said: Tensor, x: Tensor) -> Tensor:
        size = x.shape[-1]
        return F.mse_loss(said[:, :size], x) + self.weight * said[:, size:].abs().mean()


def tallies(samples: int, length: int = 16, kinds: int = 14, seed: int = 510) -> tuple[Tensor, ...]:
    """Words, and for each whether the first of two kinds was fewer, as many, or more so far."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(kinds, (samples, length), generator=g)
    ahead = ((x < 4).long() - ((x >= 4) & (x < 8)).long()).cumsum(1)
    return x, ahead.sign() + 1
