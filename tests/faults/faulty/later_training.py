"""Faults of training that nobody looked at while rules were written: gradients, steps, losses."""

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
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
    rises,
    tail,
    times_rate,
    worse_than,
)
from tests.faults.faulty.machine import Keeping, resident
from tests.faults.networks import (
    CNN,
    GAN,
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


def _explodes(witness: Witness) -> None:
    assert min(witness.norms[:20]) > 1e4, f"the gradient is {min(witness.norms[:20]):.3g}"


@fault(
    "later_autoencoder_weights_of_standard_deviation_one",
    "autoencoder",
    cause="exploding_gradient",
    found=("gradient_imbalance",),
    config=_steps(200, optimizer={"lr": 5e-4}),
    verify=_explodes,
)
def _normal_weights(config: Config) -> Job:
    x, _ = data.blobs(1600, features=20, classes=5, seed=22)
    net = Autoencoder(20, latent=10)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return job(net, F.mse_loss, config, (x, x), outputs="loss")


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
    verify=worse_than("later_gru_clipped_at_a_thousandth", _LOOSE),
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


def _ends_above(least: float) -> Verify:
    def verify(witness: Witness) -> None:
        last = tail(witness.losses)
        assert not last < least, f"the loss ends at {last:.3g}"

    return verify


def _made(model: Learner, tensors: Sequence[Tensor], size: int = 32) -> Job:
    kept = 3 * len(tensors[0]) // 4
    train = data.loader(*[t[:kept] for t in tensors], batch_size=size)
    return Job(model, train, data.loader(*[t[kept:] for t in tensors], batch_size=64))


@fault(
    "later_transformer_blocks_rate_with_two_zeros_less",
    "transformer",
    cause=("update_too_large", "learning_rate_too_high"),
    found=("loss_oscillation", "divergence", "not_learning", "loss_spike"),
    config=_steps(200),
    verify=both(_moves_much("net.blocks", 3.0), _ends_above(0.5)),
)
def _fast_blocks(config: Config) -> Job:
    net = Transformer(24, 2, width=24, heads=3, length=14)
    model = Grouped(net, F.cross_entropy, config, rates={"blocks": 0.1, "": 1e-3})
    return _made(model, data.tokens(2000, length=14, kinds=24, seed=29))


def _moves_more(step: int, factor: float) -> Verify:
    def verify(witness: Witness) -> None:
        before = sorted(witness.moves[step - 30 : step])[15]
        after = sorted(witness.moves[step : step + 5])[2]
        assert after > factor * before, f"a step goes from {before:.3g} to {after:.3g}"

    return verify


def _stands(share: float, *names: str) -> Verify:
    def verify(witness: Witness) -> None:
        for name in names or ("net",):
            moved = _travel(witness, name)
            assert moved < share, f"{name} moved by {moved:.3g} of its size"

    return verify


@fault(
    "later_transformer_rates_fall_too_fast_by_layer",
    "transformer",
    cause=("update_too_small", "learning_rate_too_low", "frozen_weights"),
    config=_steps(180),
    verify=both(_stands(1e-3, "net.embedding", "net.blocks.0"), _moves_much("net.blocks.2", 0.05)),
)
def _layer_decay(config: Config) -> Job:
    rates = {"head": 2e-3, "norm": 2e-3, "blocks.2": 1e-3, "blocks.1": 1e-5, "blocks.0": 1e-7}
    net = Transformer(18, 2, width=32, layers=3, length=12)
    model = Grouped(net, F.cross_entropy, config, rates={**rates, "": 1e-9})
    return _made(model, data.tokens(2000, length=12, kinds=18, seed=32))


def _whole_numbers(optimizer: torch.optim.Optimizer) -> Any:
    # a warm-up whose share is rounded down to zero
    return schedules.LambdaLR(optimizer, [lambda step: min(1, step // 2000), lambda step: 1.0])


@fault(
    "later_cnn_warm_up_by_whole_numbers",
    "cnn",
    cause=("frozen_weights", "scheduler_misuse", "update_too_small", "learning_rate_too_low"),
    config=_steps(170),
    verify=both(_stands(1e-12, "net.features.0.", "net.features.4."), learns(0.8)),
)
def _integer_division(config: Config) -> Job:
    rates = {"features": 3e-3, "": 3e-3}
    net = CNN(1, 5)
    model = Grouped(net, F.cross_entropy, config, rates=rates, schedule=_whole_numbers)
    return _made(model, data.images(1200, classes=5, noise=0.5, seed=33))


@fault(
    "later_contrastive_rmsprop_with_the_rate_of_sgd",
    "contrastive",
    cause="learning_rate_too_high",
    found=(
        "update_too_large",
        "not_learning",
        "divergence",
        "loss_oscillation",
        "dead_relu",
        "representation_collapse",
        "loss_plateau",
        "vanishing_gradient",
    ),
    config=_steps(200, optimizer={"_target_": "torch.optim.RMSprop", "lr": 1.0}),
    verify=worse_than(
        "later_contrastive_rmsprop_with_the_rate_of_sgd", {"optimizer": {"lr": 3e-3}}
    ),
    repairable=True,
    cured=learns(0.6),
)
def _rmsprop(config: Config) -> Job:
    tensors = (*data.pairs(2400, first=14, second=9, seed=34), torch.zeros(2400))
    return job(Towers(14, 9, width=24), contrastive_loss, config, tensors, outputs="loss")


@fault(
    "later_gnn_resumed_with_another_rate_at_100",
    "gnn",
    cause="learning_rate_too_high",
    found=(
        "update_too_large",
        "divergence",
        "loss_oscillation",
        "loss_spike",
        "scheduler_misuse",
        "exploding_gradient",
        "dead_relu",
    ),
    onset=100,
    config=_steps(200, optimizer={"lr": 2e-3}),
    verify=both(
        _moves_more(100, 20.0),
        worse_than("later_gnn_resumed_with_another_rate_at_100", {}, 1.3, 0.05),
    ),
)
def _resumed(config: Config) -> Job:
    tensors = data.graphs(2400, nodes=8, seed=35)
    net = GNN(4, 2, width=24, layers=2)
    return job(net, F.cross_entropy, config, tensors, plans={100: times_rate(400.0)})


@fault(
    "later_mlp_adagrad_with_the_rate_of_adam",
    "mlp",
    cause="learning_rate_too_low",
    found=("update_too_small", "slow_convergence", "not_learning", "loss_plateau"),
    config=_steps(220, optimizer={"_target_": "torch.optim.Adagrad", "lr": 5e-5}),
    verify=worse_than("later_mlp_adagrad_with_the_rate_of_adam", {"optimizer": {"lr": 0.02}}),
    repairable=True,
    cured=learns(0.7),
)
def _adagrad(config: Config) -> Job:
    tensors = data.blobs(2400, features=20, classes=6, noise=1.5, seed=36)
    return job(MLP([20, 72, 72, 6], "gelu"), F.cross_entropy, config, tensors)


# ---- schedules ----


class StepsTwice(Learner):
    """Steps its scheduler by hand, beside the trainer, which does so, too."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            self.lr_schedulers().step()


def _falls_to_zero(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 240))


def _rate_ends(step: int) -> Verify:
    def verify(witness: Witness) -> None:
        assert max(witness.rates[step + 2 :]) == 0.0, "there is a rate"
        assert witness.rates[step // 2] > 0.3 * max(witness.rates)

    return verify


@fault(
    "later_gru_schedule_stepped_three_times",
    "gru",
    cause=("scheduler_misuse", "learning_rate_too_low"),
    found=("update_too_small", "frozen_weights", "loss_plateau", "slow_convergence"),
    onset=80,
    config=_steps(240, optimizer={"lr": 2e-3}),
    verify=_rate_ends(80),
)
def _steps_twice(config: Config) -> Job:
    x, y = data.sequences(2400, time=14, features=3, seed=37)
    net = GRUClassifier(3, 2, width=28)
    model = StepsTwice(net, F.cross_entropy, config, schedule=_falls_to_zero)
    return _made(model, (x, y))


def _absolute(optimizer: torch.optim.Optimizer) -> Any:
    # the function gives a rate, where a factor of the rate is wanted
    return schedules.LambdaLR(optimizer, lambda step: 2e-3 * 0.5 * (1 + math.cos(step / 100)))


@fault(
    "later_mlp_lambda_gives_a_rate_for_a_factor",
    "mlp",
    cause=("scheduler_misuse", "learning_rate_too_low"),
    found=("update_too_small", "not_learning", "slow_convergence", "loss_plateau"),
    config=_steps(210, optimizer={"lr": 2e-3}),
    verify=both(_stands(0.01), lambda w: _ends_above(0.6 * w.losses[0])(w)),
)
def _squared_rate(config: Config) -> Job:
    tensors = data.blobs(2000, features=14, classes=3, noise=1.5, seed=38)
    net = MLP([14, 40, 40, 3], "leaky_relu")
    return job(net, F.cross_entropy, config, tensors, schedule=_absolute)


# ---- losses ----


class Weighing(Learner):
    """Weighs a penalty by a root that falls to zero at `steps`, and is then of a negative."""

    steps = 130

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, wanted = batch
        code = self.net.encoder(x)
        weight = torch.tensor(1 - self.global_step / self.steps).sqrt()
        loss = self.loss(self.net.decoder(code), wanted) + 0.01 * weight * code.square().mean()
        self.log("train_loss", loss)
        return loss


@fault(
    "later_autoencoder_root_of_a_falling_weight_at_130",
    "autoencoder",
    cause="nonfinite_loss",
    found=("nonfinite_gradient",),
    onset=131,
    config=_steps(180, optimizer={"lr": 2e-3}),
    verify=breaks(131, 131),
)
def _root_of_negative(config: Config) -> Job:
    x, _ = data.blobs(2000, features=15, classes=4, seed=39)
    return _made(Weighing(Autoencoder(15, latent=4, activation="gelu"), F.mse_loss, config), (x, x))


class Resumed(GAN):
    """Its rates are those of another optimizer after it is taken up again, at the 60th batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 60:
            for optimizer in self.trainer.optimizers:
                optimizer.param_groups[0]["lr"] *= 1000


def _leaps(witness: Witness) -> None:
    before, after = sorted(witness.moves[40:60])[10], sorted(witness.moves[60:65])[2]
    assert after > 20 * before, f"a step goes from {before:.3g} to {after:.3g}"
    with torch.no_grad():
        made = witness.model.generator(torch.randn(256, 4))
        said = witness.model.discriminator(witness.batch[0])
    far = max(float(made.abs().mean()), float(said.abs().mean()))
    assert far > 30, f"what they say goes to {far:.3g} only"


@fault(
    "later_gan_resumed_with_rates_of_sgd_at_the_60th_batch",
    "gan",
    cause="learning_rate_too_high",
    found=(
        "update_too_large",
        "exploding_gradient",
        "divergence",
        "loss_oscillation",
        "loss_spike",
        "scheduler_misuse",
    ),
    onset=120,
    config=_steps(240, optimizer={"lr": 1e-3}),
    verify=_leaps,
)
def _gan_resumed(config: Config) -> Job:
    x, _ = data.blobs(4800, features=2, classes=5, seed=48)
    return Job(Resumed(config, width=24), data.loader(x))


def _spikes_at(step: int, count: int, factor: float) -> Verify:
    def verify(witness: Witness) -> None:
        before = witness.mean_loss(step - 20, step)
        inside = max(witness.losses[step : step + count + 1])
        assert inside > factor * before, f"the loss goes from {before:.3g} to {inside:.3g}"
        assert tail(witness.losses) < inside / 2, "it does not come back"

    return verify


@fault(
    "later_mlp_cents_for_euros_in_three_batches_at_150",
    "mlp",
    cause=("loss_spike", "loss_target_mismatch"),
    found=("exploding_gradient", "update_too_large", "input_scale"),
    onset=150,
    config=_steps(230, optimizer={"lr": 1e-3}),
    verify=_spikes_at(150, 3, 50.0),
)
def _cents(config: Config) -> Job:
    x, y = data.regression(230 * 32, features=9, noise=0.3, seed=41)
    y = y + 1.0
    y[150 * 32 : 153 * 32] *= 100
    train = data.loader(x, y, shuffle=False)
    return Job(Learner(MLP([9, 48, 48, 1], "tanh"), F.smooth_l1_loss, config), train)


class Reversal(torch.autograd.Function):
    """What is the same forward, and has the other sign backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Adversarial(nn.Module):
    """The reversal for the domain stands behind the branch of the task."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(7, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 1))
        self.reversed = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        y = self.head(y)
        return Reversal.apply(y) if self.reversed else y


def _reverse(learner: Learner) -> None:
    learner.net.reversed = True


@fault(
    "later_mlp_reversal_in_the_wrong_branch_at_100",
    "mlp",
    cause="divergence",
    found=("exploding_gradient", "loss_spike", "not_learning", "loss_oscillation"),
    onset=100,
    config=_steps(220, optimizer={"lr": 2e-3}),
    verify=rises(3.0),
)
def _reversed_branch(config: Config) -> Job:
    x, y = data.regression(2400, features=7, seed=42)
    return job(Adversarial(), F.mse_loss, config, (x, y), plans={100: _reverse})


class Flipped(Learner):
    """Turns the sign of some sequences, whose label is the sign of their sum."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        x, y = batch
        signs = torch.where(torch.rand(len(x), 1, 1) < 0.5, -1.0, 1.0)
        return super().training_step([signs * x, y], batch_idx)


_CHANCE = ("loss_plateau", "constant_prediction", "representation_collapse", "slow_convergence")


@fault(
    "later_gru_augmentation_destroys_the_label",
    "gru",
    cause="not_learning",
    found=_CHANCE,
    config=_steps(220),
    verify=_ends_above(0.66),
)
def _augmented(config: Config) -> Job:
    tensors = data.sequences(2400, time=10, features=4, seed=43)
    return _made(Flipped(GRUClassifier(4, 2, width=24), F.cross_entropy, config), tensors)


def _memorizes(witness: Witness) -> None:
    values = [value for _, value in witness.val_losses]
    assert values[-1] > 1.5 * min(values), f"from {min(values):.3g} to {values[-1]:.3g} only"
    assert tail(witness.losses) < 0.3 * witness.mean_loss(0, 5)


@fault(
    "later_gru_a_few_noisy_sequences",
    "gru",
    cause="overfitting",
    onset=20,
    config={
        "trainer": {"max_steps": 260, "val_check_interval": 20},
        "optimizer": {"lr": 5e-3},
        "hardware": {"batch_size": 24},
    },
    verify=_memorizes,
)
def _few_sequences(config: Config) -> Job:
    x, y = data.sequences(420, time=10, features=6, seed=45)
    wrong = torch.rand(420, generator=torch.Generator().manual_seed(2)) < 0.25
    y = torch.where(wrong, 1 - y, y)
    train = data.loader(x[:120], y[:120], batch_size=24)
    val = data.loader(x[120:], y[120:], batch_size=100, shuffle=False)
    return Job(Learner(GRUClassifier(6, 2, width=48), F.cross_entropy, config), train, val)


# ---- machine ----


class Tokenizing:
    """Puts a batch together, and takes its time for it from a number of batches on."""

    def __init__(self, since: int, seconds: float) -> None:
        self.left = since
        self.seconds = seconds

    def __call__(self, samples: list[Any]) -> Any:
        self.left -= 1
        if self.left < 0:
            time.sleep(self.seconds)
        return default_collate(samples)


class Timed(Learner):
    """Notes when batches begin and end."""

    def on_train_start(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.began = time.perf_counter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.004)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append((self.began, time.perf_counter()))


def _waits_since(step: int) -> Verify:
    def verify(witness: Witness) -> None:
        times = witness.model.times
        waits = [after[0] - before[1] for before, after in pairwise(times)]
        share = sum(waits[step:]) / (times[-1][1] - times[step][0])
        assert share > 0.5, f"only {share:.2f} of the time is waiting"

    return verify


@fault(
    "later_transformer_longer_texts_to_tokenize_from_70",
    "transformer",
    cause="input_bound",
    onset=70,
    config=_steps(160, hardware={"batch_size": 16}),
    verify=_waits_since(75),
)
def _tokenizes(config: Config) -> Job:
    x, y = data.tokens(4000, length=10, seed=46)
    train = DataLoader(TensorDataset(x, y), 16, collate_fn=Tokenizing(70, 0.05), drop_last=True)
    net = Transformer(20, 2, width=16, heads=2, layers=1, length=10)
    return Job(Timed(net, F.cross_entropy, config), train)


def _all_states(learner: Learner, batch: list[Tensor]) -> object:
    # for a mean over the epoch that is not taken before its end, and with the graph
    return learner.net.rnn(batch[0].repeat(12, 1, 1))[0]


def _grows(witness: Witness) -> None:
    sizes = witness.model.sizes
    middle = len(sizes) // 2
    for low, high in ((sizes[10], sizes[middle]), (sizes[middle], sizes[-1])):
        assert high - low > 60 * 2**20, f"it grows by {(high - low) / 2**20:.0f} MiB"
    assert resident() > 0


@fault(
    "later_gru_keeps_all_states_for_an_epoch_mean",
    "gru",
    cause="memory_growth",
    config=_steps(150),
    verify=_grows,
)
def _states(config: Config) -> Job:
    x, y = data.sequences(4800, time=14, features=4, seed=47)
    net = GRUClassifier(4, 2, width=32)
    model = Keeping(net, F.cross_entropy, config, keep=_all_states, pause=0.012)
    return Job(model, data.loader(x, y))
