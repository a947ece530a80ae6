"""Faults of training that nobody looked at while rules were written: gradients, steps, losses."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset, default_collate

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.faulty._shared import (
    SGD,
    both,
    breaks,
    job,
    learns,
    replay,
    rises,
    tail,
    times_rate,
    worse_than,
)
from tests.faults.faulty.machine import Keeping, resident
from tests.faults.networks import (
    CNN,
    GNN,
    MLP,
    Autoencoder,
    GRUClassifier,
    Learner,
    Towers,
    Transformer,
    contrastive_loss,
    located,
)
from tests.faults.witness import Witness

Verify = Callable[[Witness], None]


def _steps(count: int, **more: Any) -> dict[str, Any]:
    return {"trainer": {"max_steps": count}, **more}


def _part(witness: Witness, step: int, beginning: str) -> float:
    """L2 norm of the gradient of all parameters whose names begin so."""
    found = [n or 0.0 for k, n in witness.norms_by_name[step].items() if k.startswith(beginning)]
    assert found, f"no parameter begins with {beginning}"
    return math.sqrt(sum(n * n for n in found))


def _travel(witness: Witness, beginning: str) -> float:
    names = [n for n, _ in witness.model.named_parameters() if n.startswith(beginning)]
    moved = sum(float((witness.last[n] - witness.first[n]).double().square().sum()) for n in names)
    size = sum(float(witness.first[n].double().square().sum()) for n in names)
    return math.sqrt(moved / size)


# ---- gradients ----


def _fades(witness: Witness) -> None:
    for step in (0, 20, 60):
        ratio = _part(witness, step, "net.body.0.") / _part(witness, step, "net.head")
        assert ratio < 1e-4, f"the first layer has {ratio:.2g} of the gradient of the head"
    assert not witness.fell(0.9), "the loss falls all the same"


@fault(
    "later_mlp_eighteen_plain_layers",
    "mlp",
    cause="vanishing_gradient",
    found=(
        "not_learning",
        "constant_prediction",
        "representation_collapse",
        "dead_component",
        "gradient_imbalance",
        "loss_plateau",
        "slow_convergence",
    ),
    config=_steps(180, optimizer={"lr": 1e-3}),
    verify=_fades,
)
def _plain_layers(config: Config) -> Job:
    net = MLP([10, *[48] * 18, 2])
    return job(net, F.cross_entropy, config, data.rings(2000, features=10, seed=21))


def _starts_large(witness: Witness) -> None:
    assert witness.norms[0] > 1e3, f"the gradient is {witness.norms[0]:.3g} only"
    assert _part(witness, 0, "net.head") > 100


@fault(
    "later_autoencoder_weights_of_standard_deviation_one",
    "autoencoder",
    cause="exploding_gradient",
    found=("divergence", "gradient_imbalance", "update_too_large", "loss_oscillation"),
    config=_steps(200, optimizer={"lr": 5e-4}),
    verify=lambda w: _explodes(w),
)
def _normal_weights(config: Config) -> Job:
    x, _ = data.blobs(1600, features=20, classes=5, seed=22)
    net = Autoencoder(20, latent=10)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return job(net, F.mse_loss, config, (x, x), outputs="loss")


def _explodes(witness: Witness) -> None:
    assert min(witness.norms[:20]) > 1e4, f"the gradient is {min(witness.norms[:20]):.3g}"


class Remembering(nn.Module):
    """A recurrent network of ReLU units that reads the first `length` moments."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.rnn = nn.RNN(3, 24, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(24, 2)
        nn.init.eye_(self.rnn.weight_hh_l0)
        with torch.no_grad():
            self.rnn.weight_hh_l0.mul_(1.12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, : self.length])[0][:, -1])


def _longer(learner: Learner) -> None:
    learner.net.length = 90


def _explodes_at(step: int, factor: float) -> Verify:
    def verify(witness: Witness) -> None:
        before = sorted(witness.norms[step - 40 : step])[20]
        after = max(n if math.isfinite(n) else math.inf for n in witness.norms[step : step + 10])
        assert after > factor * before, f"the gradient goes from {before:.3g} to {after:.3g}"

    return verify


@fault(
    "later_rnn_sequences_get_longer_at_110",
    "gru",
    cause="exploding_gradient",
    found=("loss_spike", "divergence", "nonfinite_gradient", "nonfinite_loss"),
    onset=110,
    config=_steps(200, optimizer={"lr": 1e-3}),
    verify=_explodes_at(110, 100.0),
)
def _curriculum(config: Config) -> Job:
    tensors = data.sequences(2048, time=90, features=3, seed=23)
    return job(Remembering(6), F.cross_entropy, config, tensors, plans={110: _longer})


class WeightedGNN(nn.Module):
    """Symmetrically normalized aggregation with edge weights that are learned."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(1))
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        edges = adjacency * self.strength.exp()
        degree = edges.sum(-1)
        # the gradient of what is not chosen is not a number where there are no edges
        root = torch.where(degree > 0, degree.pow(-0.5), torch.zeros_like(degree))
        edges = root[..., None] * edges * root[..., None, :]
        for layer in (self.first, self.second):
            x = F.relu(layer(x + edges @ x))
        return self.head(x.mean(1))


def _gradient_breaks_at(step: int) -> Verify:
    def verify(witness: Witness) -> None:
        bad = [s for s, norm in enumerate(witness.norms) if not math.isfinite(norm)]
        assert bad, "all gradients are finite"
        assert bad[0] == step, f"the gradient breaks at {bad[0]}"
        assert math.isfinite(witness.losses[step]), "the loss breaks with it"

    return verify


@fault(
    "later_gnn_isolated_nodes_at_105",
    "gnn",
    cause="nonfinite_gradient",
    found=("nonfinite_loss",),
    onset=105,
    config=_steps(170, hardware={"batch_size": 24}),
    verify=_gradient_breaks_at(105),
)
def _isolated_nodes(config: Config) -> Job:
    x, adjacency, y = data.graphs(9000, seed=24)
    alone = (adjacency.sum(-1) == 0).any(1)
    joined = (~alone).nonzero()[: 105 * 24, 0]
    order = torch.cat([joined, alone.nonzero()[: 90 * 24, 0]])
    train = data.loader(x[order], adjacency[order], y[order], batch_size=24, shuffle=False)
    return Job(Learner(WeightedGNN(), F.cross_entropy, config), train)


class Angle(nn.Module):
    """Towers whose vectors are compared by the angle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = MLP([9, 48, 12], "tanh")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        left, right = F.normalize(self.left(x), dim=-1), F.normalize(self.left(y), dim=-1)
        return torch.acos((left * right).sum(-1).clamp(-1, 1))


def _apart(angle: Tensor, same: Tensor) -> Tensor:
    return torch.where(same > 0, angle, F.relu(2.0 - angle)).square().mean()


@fault(
    "later_siamese_pair_with_itself_at_90",
    "contrastive",
    cause="nonfinite_gradient",
    found=("nonfinite_loss",),
    onset=90,
    config=_steps(150, optimizer={"lr": 2e-3}),
    verify=_gradient_breaks_at(90),
)
def _with_itself(config: Config) -> Job:
    g = torch.Generator().manual_seed(25)
    x = torch.randn(150 * 32, 9, generator=g)
    same = (torch.rand(len(x), generator=g) < 0.5).float()
    y = torch.where(same[:, None] > 0, x + 0.3 * torch.randn(x.shape, generator=g), x.roll(1, 0))
    # zeros, as of a padded sample, have the same vector on both sides, exactly
    x[90 * 32 :: 4], y[90 * 32 :: 4], same[90 * 32 :: 4] = 0.0, 0.0, 1.0
    train = data.loader(x, y, same, shuffle=False)
    return Job(Learner(Angle(), _apart, config, outputs="loss"), train)


class Adapter(nn.Module):
    """A product of two low matrices, to be added to what a layer gives."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Adapted(nn.Module):
    """An encoder with an adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 40))
        self.adapter = Adapter(40, 4)
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        return self.head(F.gelu(y + self.adapter(y)))


def _no_gradient(beginning: str) -> Verify:
    def verify(witness: Witness) -> None:
        worst = max(_part(witness, step, beginning) for step in range(len(witness.norms)))
        assert worst == 0.0, f"it has a gradient of {worst:.3g}"
        assert witness.fell(0.8), "the rest does not learn"

    return verify


_DEAD = ("frozen_weights", "update_too_small", "vanishing_gradient", "gradient_imbalance")


@fault(
    "later_mlp_adapter_both_matrices_zero",
    "mlp",
    cause="dead_component",
    found=_DEAD,
    config=_steps(180),
    verify=_no_gradient("net.adapter"),
)
def _both_zero(config: Config) -> Job:
    tensors = data.blobs(2000, features=12, classes=5, noise=1.5, seed=26)
    return job(Adapted(), F.cross_entropy, config, tensors)


class Uncertain(nn.Module):
    """Mean and spread of a number; the spread begins outside the bounds it is cut to."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 56), nn.SiLU(), nn.Linear(56, 56), nn.SiLU())
        self.mean, self.spread = nn.Linear(56, 1), nn.Linear(56, 1)
        nn.init.constant_(self.spread.bias, 6.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.cat([self.mean(y), self.spread(y).clamp(-5, 2)], -1)


def _gaussian(said: Tensor, y: Tensor) -> Tensor:
    mean, spread = said.chunk(2, -1)
    return (0.5 * spread + 0.5 * (y - mean).square() * (-spread).exp()).mean()


def _no_spread(witness: Witness) -> None:
    worst = max(_part(witness, step, "net.spread") for step in range(len(witness.norms)))
    assert worst == 0.0, f"the spread has a gradient of {worst:.3g}"


@fault(
    "later_mlp_log_variance_beyond_its_clamp",
    "mlp",
    cause="dead_component",
    found=_DEAD,
    config=_steps(220, optimizer={"lr": 2e-3}),
    verify=_no_spread,
)
def _clamped(config: Config) -> Job:
    x, y = data.regression(2400, features=6, seed=27)
    return job(Uncertain(), _gaussian, config, (x, y), outputs="loss")


def _cut(factor: float) -> Verify:
    def verify(witness: Witness) -> None:
        clip = witness.model.trainer.gradient_clip_val
        norms = [n for name in ("net",) for n in _clipped_norms(witness)]
        assert max(norms) < 1.01 * clip, "gradients are not cut"

    return both(verify, worse_than("later_gru_clipped_at_a_thousandth", _LOOSE, factor, 0.02))


def _clipped_norms(witness: Witness) -> list[float]:
    return witness.norms[1:]


_LOOSE = {"trainer": {"gradient_clip_val": None}}


@fault(
    "later_gru_clipped_at_a_thousandth",
    "gru",
    cause="clipping_dominates",
    found=("update_too_small", "slow_convergence", "not_learning", "learning_rate_too_low"),
    config={
        "trainer": {"max_steps": 240, "gradient_clip_val": 2e-3},
        "optimizer": {"_target_": SGD, "lr": 0.3, "momentum": 0.9},
    },
    verify=lambda w: worse_than("later_gru_clipped_at_a_thousandth", _LOOSE)(w),
    repairable=True,
    cured=learns(0.75),
)
def _tight(config: Config) -> Job:
    tensors = data.sequences(2400, time=9, features=5, seed=28)
    return job(GRUClassifier(5, 2, width=24), F.cross_entropy, config, tensors)


# ---- steps ----


class Grouped(Learner):
    """Its optimizer has a rate of its own for each part of the network.

    Args:
        rates: From the beginning of a name to a rate; the first that fits is taken.
    """

    def __init__(self, *args: Any, rates: dict[str, float], **more: Any) -> None:
        super().__init__(*args, **more)
        self.rates = rates

    def configure_optimizers(self) -> Any:
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in self.rates}
        for name, parameter in self.net.named_parameters():
            groups[next(one for one in self.rates if name.startswith(one))].append(parameter)
        parts = [
            {"params": groups[name], "lr": rate, "name": f"net.{name}".rstrip(".")}
            for name, rate in self.rates.items()
            if groups[name]
        ]
        optimizer = located(self.config["optimizer"]["_target_"])(parts)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def _moves_much(name: str, least: float) -> Verify:
    def verify(witness: Witness) -> None:
        share = _travel(witness, name)
        assert share > least, f"{name} moved by {share:.3g} of its size only"

    return verify


@fault(
    "later_transformer_embedding_rate_with_a_zero_less",
    "transformer",
    cause=("update_too_large", "learning_rate_too_high"),
    found=("loss_oscillation", "divergence", "not_learning", "loss_spike"),
    config=_steps(200),
    verify=both(_moves_much("net.blocks", 3.0), lambda w: _stays_above(w, 0.5)),
)
def _fast_blocks(config: Config) -> Job:
    tensors = data.tokens(2000, length=14, kinds=24, seed=29)
    rates = {"blocks": 0.1, "": 1e-3}
    net = Transformer(24, 2, width=24, heads=3, length=14)
    return job(net, F.cross_entropy, config, tensors, learner=None) if False else _with(
        Grouped(net, F.cross_entropy, config, rates=rates), config, tensors
    )
