"""Units and inputs that look odd: zeros, dead ones, ends of curves, counts, sparse columns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, healthy
from tests.faults.healthy.checks import (
    accuracy,
    answers,
    error,
    fresh,
    job,
    least,
    most,
    nearest_centre,
)
from tests.faults.networks import CNN, MLP, GRUClassifier
from tests.faults.witness import Witness


def _points() -> tuple[Tensor, Tensor]:
    return data.blobs(6400, noise=1.5)


def _right(witness: Witness) -> None:
    best = nearest_centre(6400, noise=1.5)
    least(accuracy(witness, _points()), best - 0.03, "accuracy on fresh points")


def _inside(witness: Witness, part: nn.Module, *inputs: Tensor) -> Tensor:
    """What a part of the trained network puts out."""
    seen: list[Tensor] = []
    handle = part.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    answers(witness, *inputs)
    handle.remove()
    return seen[0]


# ---- zeros ----


def _half_zero(witness: Witness) -> None:
    _right(witness)
    assert witness.model is not None
    out = _inside(witness, witness.model.net.body[3], fresh(_points())[0])
    share = float((out == 0).float().mean())
    least(share, 0.4, "share of zeros")
    most(share, 0.75, "share of zeros")


@healthy(
    "relu_half_zero",
    "mlp",
    verify=_half_zero,
    tricky="half of all activations are zero, as ReLU has it",
)
def _half(config: Config) -> Job:
    return job(MLP([16, 256, 256, 4]), F.cross_entropy, config, _points())


def _some_dead(witness: Witness) -> None:
    _right(witness)
    assert witness.model is not None
    out = _inside(witness, witness.model.net.body[1], fresh(_points())[0])
    dead = float((out <= 0).all(0).float().mean())
    least(dead, 0.08, "share of units that never fire")
    most(dead, 0.2, "share of units that never fire")


@healthy(
    "wide_relu_some_dead",
    "mlp",
    verify=_some_dead,
    tricky="one unit in eight never fires; the rest suffice",
)
def _some_dead_job(config: Config) -> Job:
    net = MLP([16, 256, 64, 4])
    with torch.no_grad():
        net.body[0].bias[::8] = -20.0
    return job(net, F.cross_entropy, config, _points())


class Sparse(nn.Module):
    """A wide code in which a few units fire at a time."""

    def __init__(self, features: int, width: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, width), nn.ReLU())
        self.decoder = nn.Linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        return torch.cat([self.decoder(code), code], 1)


def _atoms(samples: int = 3000) -> tuple[Tensor, Tensor]:
    """Few of forty directions at a time."""
    g = torch.Generator().manual_seed(1)
    used = (torch.rand(samples, 40, generator=g) < 0.08).float()
    x = used * torch.rand(samples, 40, generator=g).add(0.5) @ torch.randn(40, 20, generator=g)
    return x, x


def _sparse_loss(out: Tensor, target: Tensor) -> Tensor:
    rebuilt, code = out.split([20, 256], 1)
    return F.mse_loss(rebuilt, target) + 5e-3 * code.abs().sum(1).mean()


def _sparse_well(witness: Witness) -> None:
    x, _ = fresh(_atoms())
    rebuilt, code = answers(witness, x).split([20, 256], 1)
    most(float(F.mse_loss(rebuilt, x) / x.var()), 0.1, "share of variance left")
    least(float((code == 0).float().mean()), 0.7, "share of zeros")


@healthy(
    "sparse_code",
    "autoencoder",
    config={"trainer": {"max_steps": 400}},
    verify=_sparse_well,
    tricky="most of the code is zero on purpose",
)
def _sparse(config: Config) -> Job:
    return job(Sparse(20), _sparse_loss, config, _atoms())


class Winners(nn.Module):
    """Keeps the largest eighth of its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        limit = x.topk(x.shape[-1] // 8, -1).values[..., -1:]
        return x * (x >= limit)


@healthy(
    "only_winners_fire",
    "mlp",
    verify=_right,
    tricky="seven eighths of the activations are zero by design",
)
def _winners(config: Config) -> Job:
    net = nn.Sequential(nn.Linear(16, 128), Winners(), nn.Linear(128, 4))
    return job(net, F.cross_entropy, config, _points())


# ---- curves ----


def _with(kind: Callable[[], nn.Module]) -> Callable[[Config], Job]:
    def build(config: Config) -> Job:
        net = nn.Sequential(nn.Linear(16, 64), kind(), nn.Linear(64, 64), kind(), nn.Linear(64, 4))
        return job(net, F.cross_entropy, config, _points())

    return build


healthy("softplus_units", "mlp", verify=_right, tricky="activations that are never zero")(
    _with(nn.Softplus)
)
healthy("gelu_units", "mlp", verify=_right)(_with(nn.GELU))
healthy("silu_units", "mlp", verify=_right)(_with(nn.SiLU))
healthy("elu_units", "mlp", verify=_right, tricky="many activations near -1")(_with(nn.ELU))
healthy("tanh_units", "mlp", verify=_right)(_with(nn.Tanh))
healthy("capped_relu", "mlp", verify=_right, tricky="activations end at six")(_with(nn.ReLU6))
healthy("hard_swish_units", "mlp", verify=_right)(_with(nn.Hardswish))


class Signs(nn.Module):
    """The sign, with the gradient of a straight line between -1 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        line = x.clamp(-1, 1)
        return line + (x.sign() - line).detach()


@healthy(
    "binary_units",
    "mlp",
    config={"trainer": {"max_steps": 300}},
    verify=_right,
    tricky="every activation is -1 or 1, gradients pass straight through",
)
def _binary(config: Config) -> Job:
    net = nn.Sequential(
        nn.Linear(16, 128),
        nn.BatchNorm1d(128),
        Signs(),
        nn.Linear(128, 4),
    )
    return job(net, F.cross_entropy, config, _points())


@healthy(
    "gates_at_their_ends",
    "gru",
    config={"optimizer": {"lr": 1e-2}, "trainer": {"max_steps": 300}},
    verify=lambda witness: least(accuracy(witness, _first_counts()), 0.97, "accuracy"),
    tricky="gates that must stay shut to remember",
)
def _gates(config: Config) -> Job:
    return job(GRUClassifier(4, 2), F.cross_entropy, config, _first_counts())


def _first_counts(samples: int = 4096) -> tuple[Tensor, Tensor]:
    """The first step alone decides; the rest is to be ignored."""
    x, _ = data.sequences(samples, time=8)
    return x, (x[:, 0, 0] > 0).long()


# ---- outputs ----


@healthy(
    "log_softmax_and_nll",
    "mlp",
    verify=_right,
    tricky="a softmax in the network, and the loss that belongs to it",
)
def _log_softmax(config: Config) -> Job:
    net = nn.Sequential(MLP([16, 64, 4]), nn.LogSoftmax(-1))
    return job(net, F.nll_loss, config, _points())


class Expert(nn.Module):
    """The mean of four small networks' probabilities, weighted by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.parts = nn.ModuleList(MLP([16, 16, 4]) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([one(x).softmax(-1) for one in self.parts], 1)
        return (self.gate(x).softmax(-1)[..., None] * each).sum(1)


@healthy(
    "mixture_of_probabilities",
    "moe",
    config={"trainer": {"max_steps": 300}},
    verify=_right,
    tricky="the outputs are probabilities, and the loss takes their logarithm",
)
def _probabilities(config: Config) -> Job:
    return job(Expert(), lambda out, y: F.nll_loss(out.clamp(min=1e-7).log(), y), config, _points())


# ---- inputs ----


def _counts(samples: int = 3000) -> tuple[Tensor, Tensor]:
    """Counts with a long tail, by their logarithm; the class shifts some rates."""
    g = torch.Generator().manual_seed(1)
    y = torch.randint(3, (samples,), generator=g)
    rates = (1.0 * torch.randn(3, 30, generator=g)).exp()
    x = torch.poisson(3 * rates[y], generator=g).log1p()
    return (x - x.mean(0)) / x.std(0), y


@healthy(
    "counts_by_their_logarithm",
    "mlp",
    verify=lambda witness: least(accuracy(witness, _counts()), 0.97, "accuracy"),
    tricky="few different values, many of them the same",
)
def _count_job(config: Config) -> Job:
    return job(MLP([30, 32, 3]), F.cross_entropy, config, _counts())


def _grey() -> tuple[Tensor, Tensor]:
    x, y = data.images(2560)
    return ((x + 1) / 3).clamp(0, 1), y


@healthy(
    "images_from_zero_to_one",
    "cnn",
    verify=lambda witness: least(accuracy(witness, _grey()), 0.97, "accuracy"),
    tricky="inputs are not centred",
)
def _grey_job(config: Config) -> Job:
    return job(CNN(1, 4), F.cross_entropy, config, _grey())


def _bytes(samples: int = 2560) -> tuple[Tensor, Tensor]:
    x, y = data.images(samples)
    return ((x + 1) / 3).clamp(0, 1).mul(255).round(), y


@healthy(
    "bytes_through_batch_norm",
    "cnn",
    verify=lambda witness: least(accuracy(witness, _bytes()), 0.97, "accuracy"),
    tricky="inputs of 0 to 255, which the network itself brings to scale",
)
def _byte_job(config: Config) -> Job:
    net = nn.Sequential(nn.BatchNorm2d(1, affine=False), CNN(1, 4))
    return job(net, F.cross_entropy, config, _bytes())


def _table(samples: int = 3000) -> tuple[Tensor, Tensor]:
    """Numbers, one-hot columns and a column that is the same for all."""
    g = torch.Generator().manual_seed(1)
    numbers = torch.randn(samples, 6, generator=g)
    kind = torch.randint(10, (samples,), generator=g)
    x = torch.cat([numbers, F.one_hot(kind, 10).float(), torch.zeros(samples, 2)], 1)
    effect = torch.randn(10, generator=g)[kind]
    y = numbers[:, 0] - numbers[:, 1] * (kind > 4) + effect
    return x, (y + 0.1 * torch.randn(samples, generator=g))[:, None]


@healthy(
    "table_with_kinds",
    "mlp",
    config={"trainer": {"max_steps": 400}},
    verify=lambda witness: most(error(witness, _table()), 0.08, "error (noise 0.01, variance 2.5)"),
    tricky="one-hot columns, and two columns that are always zero",
)
def _table_job(config: Config) -> Job:
    return job(MLP([18, 64, 64, 1]), F.mse_loss, config, _table())


def _words(samples: int = 3000, kinds: int = 400) -> tuple[Tensor, Tensor]:
    """Which words occur, of many; a text has about twenty."""
    g = torch.Generator().manual_seed(1)
    y = torch.randint(2, (samples,), generator=g)
    usual = torch.rand(kinds, generator=g) * 0.08
    likely = torch.stack([usual, usual.roll(37)])
    return (torch.rand(samples, kinds, generator=g) < likely[y]).float(), y


@healthy(
    "which_words_occur",
    "linear",
    config={"optimizer": {"lr": 1e-2}, "trainer": {"max_steps": 300}},
    verify=lambda witness: least(accuracy(witness, _words()), 0.9, "accuracy"),
    tricky="95 % of the inputs are zero",
)
def _words_job(config: Config) -> Job:
    return job(nn.Linear(400, 2), F.cross_entropy, config, _words())


def _gaps(samples: int = 4096) -> tuple[Tensor, Tensor]:
    """A fifth of the values is missing: zero, with a column that says so."""
    x, y = data.blobs(samples)
    g = torch.Generator().manual_seed(3)
    there = (torch.rand(x.shape, generator=g) > 0.2).float()
    return torch.cat([x * there, there], 1), y


@healthy(
    "missing_values_marked",
    "mlp",
    verify=lambda witness: least(accuracy(witness, _gaps()), 0.95, "accuracy"),
    tricky="a fifth of the inputs is zero because it is missing",
)
def _gap_job(config: Config) -> Job:
    return job(MLP([32, 64, 4]), F.cross_entropy, config, _gaps())


class Field(nn.Module):
    """Places in the unit square by sines of many frequencies, then a network."""

    def __init__(self, frequencies: int = 24) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * torch.randn(2, frequencies))
        self.net = MLP([2 * frequencies, 64, 64, 1])

    def forward(self, x: Tensor) -> Tensor:
        angle = 6.2832 * x @ self.frequencies
        return self.net(torch.cat([angle.sin(), angle.cos()], -1))


def _picture(samples: int = 6000) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(samples, 2, generator=g)
    return x, torch.sin(12 * x[:, :1]) * torch.cos(9 * x[:, 1:])


@healthy(
    "picture_from_places",
    "mlp",
    config={"hardware": {"batch_size": 128}, "trainer": {"max_steps": 400}},
    verify=lambda witness: most(error(witness, _picture()), 0.02, "error (variance 0.25)"),
    tricky="inputs between 0 and 1; the loss ends near zero",
)
def _picture_job(config: Config) -> Job:
    return job(Field(), F.mse_loss, config, _picture())


def _series(samples: int = 3000, time: int = 24) -> tuple[Tensor, Tensor]:
    """The next value of a sum of two waves with noise."""
    g = torch.Generator().manual_seed(1)
    start = 6.2832 * torch.rand(samples, 2, generator=g)
    t = torch.arange(time + 1)
    x = torch.sin(start[:, :1] + 0.5 * t) + 0.5 * torch.sin(start[:, 1:] + 1.3 * t)
    x = x + 0.05 * torch.randn(x.shape, generator=g)
    return x[:, :-1, None], x[:, -1:]


def _forecasts(witness: Witness) -> None:
    x, y = fresh(_series())
    before: Any = F.mse_loss(x[:, -1], y)
    most(error(witness, _series()), 0.1 * float(before), "error against that of the last value")


@healthy(
    "next_value_of_a_series",
    "gru",
    config={"optimizer": {"lr": 5e-3}, "trainer": {"max_steps": 300}},
    verify=_forecasts,
    tricky="the loss falls two orders of magnitude",
)
def _series_job(config: Config) -> Job:
    return job(GRUClassifier(1, 1), F.mse_loss, config, _series())
