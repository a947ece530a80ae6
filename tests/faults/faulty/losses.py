"""Losses that spike, swing, stand still, rise, or fit the training set only."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.faulty import _shared as shared
from tests.faults.faulty._shared import ADAM, SGD, both
from tests.faults.networks import (
    CNN,
    MLP,
    Autoencoder,
    GRUClassifier,
    Learner,
    Towers,
    Transformer,
)
from tests.faults.witness import Witness

FLAT = ("not_learning", "loss_plateau")


def batch_of(step: int, count: int = 1) -> slice:
    """The rows of a stream that make the batches from a step on."""
    return slice(32 * step, 32 * (step + count))


# ---- spikes ----


def spikes(step: int, factor: float) -> shared.Check:
    """The loss of one step stands far above those before it, which had come down."""

    def check(witness: Witness) -> None:
        before, seen = witness.mean_loss(step - 20, step), witness.losses[step]
        assert seen > factor * before, f"{before:.3g} becomes {seen:.3g} only"
        assert before < 0.8 * witness.mean_loss(0, 5), "it had not learned before"
        top = max(witness.losses[step - 20 : step])
        assert top < 0.5 * seen, f"a loss of {top:.3g} came before"

    return check


@fault(
    "one_batch_of_unscaled_inputs",
    "mlp",
    cause=("loss_spike", "exploding_gradient", "input_scale"),
    found=("divergence",),
    onset=120,
    verify=spikes(120, 50.0),
)
def _unscaled(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        x[batch_of(120)] *= 100

    x, y = data.blobs(6400, noise=2.0)
    train = shared.stream(config, x, y, spoil)
    return Job(Learner(MLP([16, 64, 64, 4]), F.cross_entropy, config), train)


@fault(
    "one_batch_of_unscaled_inputs_sgd",
    "autoencoder",
    cause=("loss_spike", "exploding_gradient", "input_scale"),
    found=("divergence", "nonfinite_loss", "nonfinite_gradient"),
    onset=100,
    config={"optimizer": {"_target_": SGD, "lr": 0.3}},
    verify=spikes(100, 1e3),
)
def _unscaled_autoencoder(config: Config) -> Job:
    x = shared.low_rank(6400)
    if config["data"].get("spoiled", True):
        x[batch_of(100)] *= 1000
    train = data.loader(x, x, batch_size=32, shuffle=False)
    return Job(Learner(Autoencoder(24), F.mse_loss, config, outputs="loss"), train)


@fault(
    "batches_with_wrong_labels",
    "mlp",
    cause="loss_spike",
    found=("exploding_gradient", "divergence"),
    onset=130,
    config={"optimizer": {"_target_": ADAM, "lr": 1e-3}},
    verify=spikes(130, 10.0),
)
def _wrong_labels(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        y[batch_of(130, 2)] = (y[batch_of(130, 2)] + 1) % 4

    x, y = data.blobs(6400, noise=1.5)
    train = shared.stream(config, x, y, spoil)
    return Job(Learner(MLP([16, 64, 64, 4]), F.cross_entropy, config), train)


@fault(
    "batches_with_wrong_labels_gru",
    "gru",
    cause="loss_spike",
    found=("exploding_gradient", "divergence"),
    onset=150,
    verify=spikes(150, 8.0),
)
def _wrong_labels_gru(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        y[batch_of(150)] = 1 - y[batch_of(150)]

    train = shared.stream(config, *data.sequences(6400), spoil)
    return Job(Learner(GRUClassifier(4, 2), F.cross_entropy, config), train)


# ---- swings ----


@fault(
    "samples_sorted_by_class",
    "mlp",
    cause="loss_oscillation",
    found=("loss_spike", "divergence", "exploding_gradient"),
    config={"optimizer": {"_target_": SGD, "lr": 0.1}},
    verify=lambda witness: _in_order(witness, "samples_sorted_by_class"),
)
def _sorted(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        for start in range(0, len(y), 1600):
            order = start + y[start : start + 1600].argsort()
            x[start : start + 1600], y[start : start + 1600] = x[order], y[order]

    train = shared.stream(config, *data.blobs(6400, noise=3.0), spoil)
    return Job(Learner(MLP([16, 64, 64, 4]), F.cross_entropy, config), train)


@fault(
    "samples_sorted_by_class_cnn",
    "cnn",
    cause="loss_oscillation",
    found=("loss_spike", "divergence", "exploding_gradient"),
    config={"optimizer": {"_target_": SGD, "lr": 0.05, "momentum": 0.5}},
    verify=lambda witness: _in_order(witness, "samples_sorted_by_class_cnn"),
)
def _sorted_cnn(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        for start in range(0, len(y), 640):
            order = start + y[start : start + 640].argsort()
            x[start : start + 640], y[start : start + 640] = x[order], y[order]

    train = shared.stream(config, *data.images(6400, noise=0.9), spoil)
    return Job(Learner(CNN(1, 4, batch_norm=False), F.cross_entropy, config), train)


def _in_order(witness: Witness, name: str) -> None:
    assert len(witness.batch[-1].unique()) == 1, "the first batch has several classes"
    mixed = torch.tensor(shared.replay(name, {"data": {"spoiled": False}})[50:])
    seen = torch.tensor(witness.losses[50:])
    assert seen.std() > 4 * mixed.std(), f"swings of {seen.std():.3g} and {mixed.std():.3g}"


@fault(
    "momentum_of_almost_one",
    "mlp",
    cause=("loss_oscillation", "learning_rate_too_high", "divergence"),
    found=("update_too_large", "exploding_gradient", "loss_spike"),
    onset=20,
    config={"optimizer": {"_target_": SGD, "lr": 0.05, "momentum": 0.999}},
    verify=shared.worse_than("momentum_of_almost_one", {"optimizer": {"momentum": 0.5}}, 2.0),
)
def _momentum(config: Config) -> Job:
    return shared.mlp(config)


# ---- nothing to learn, or no way to it ----


def stays(level: float, start: int = 40) -> shared.Check:
    """The mean loss stays near a level from a step on: what chance gives."""

    def check(witness: Witness) -> None:
        assert all(map(math.isfinite, witness.losses)), "the loss is not finite"
        count = len(witness.losses)
        for first in range(start, count - 39, 20):
            seen = witness.mean_loss(first, first + 40)
            assert 0.85 * level < seen < 1.15 * level, f"{seen:.3g} and not {level:.3g}"

    return check


def shuffled(y: Tensor) -> Tensor:
    """Labels of other samples."""
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(3))]


@fault(
    "labels_of_other_samples",
    "mlp",
    cause=FLAT,
    found=("constant_prediction",),
    config={"optimizer": {"_target_": SGD, "lr": 0.05}},
    verify=stays(math.log(4)),
)
def _random_labels(config: Config) -> Job:
    x, y = data.blobs(8192, noise=2.0)
    return shared.job(MLP([16, 64, 64, 4]), F.cross_entropy, config, (x, shuffled(y)))


@fault(
    "labels_of_other_images",
    "cnn",
    cause=FLAT,
    found=("constant_prediction",),
    config={"optimizer": {"_target_": ADAM, "lr": 1e-3}},
    verify=stays(math.log(4)),
)
def _random_images(config: Config) -> Job:
    x, y = data.images(6400, noise=0.6)
    return shared.job(CNN(1, 4), F.cross_entropy, config, (x, shuffled(y)))


@fault(
    "labels_one_row_off",
    "transformer",
    cause=FLAT,
    found=("constant_prediction", "attention_uniform"),
    config={"optimizer": {"_target_": ADAM, "lr": 1e-3}},
    verify=stays(math.log(2)),
)
def _off_by_one(config: Config) -> Job:
    x, y = data.tokens(8192)
    net = Transformer(20, 2)
    return shared.job(net, F.cross_entropy, config, (x, torch.roll(y, 1)))


@fault(
    "regression_to_noise",
    "mlp",
    cause=FLAT,
    found=("constant_prediction",),
    config={"optimizer": {"_target_": SGD, "lr": 0.02}},
    verify=stays(1.0),
)
def _noise(config: Config) -> Job:
    x, _ = data.regression(8192)
    y = torch.randn(8192, 1, generator=torch.Generator().manual_seed(3))
    return shared.job(MLP([8, 64, 64, 1], "gelu"), F.mse_loss, config, (x, y))


@fault(
    "feature_that_matters_is_dropped",
    "gru",
    cause=FLAT,
    found=("constant_prediction",),
    config={"optimizer": {"_target_": ADAM, "lr": 1e-3}},
    verify=stays(math.log(2)),
)
def _dropped_feature(config: Config) -> Job:
    x, y = data.sequences(8192)
    return shared.job(GRUClassifier(3, 2), F.cross_entropy, config, (x[..., 1:].clone(), y))


@fault(
    "views_of_different_things",
    "contrastive",
    cause=FLAT,
    found=("representation_collapse",),
    config={"optimizer": {"_target_": ADAM, "lr": 1e-3}},
    verify=lambda witness: _no_better_than_chance(witness),
)
def _mismatched(config: Config) -> Job:
    left, right = data.pairs(8192)
    return shared.job(
        Towers(12, 10),
        shared.contrastive_loss,
        config,
        (left, shuffled(right), torch.zeros(8192)),
        outputs="loss",
    )


def _no_better_than_chance(witness: Witness) -> None:
    assert min(witness.losses) > 0.93 * math.log(32), f"it comes to {min(witness.losses):.3g}"


@fault(
    "temperature_makes_all_pairs_alike",
    "contrastive",
    cause=("not_learning", "loss_plateau", "vanishing_gradient"),
    found=("representation_collapse", "slow_convergence"),
    verify=stays(math.log(32), 0),
)
def _flat(config: Config) -> Job:
    net = Towers(12, 10)
    net.scale.data.fill_(math.log(1e-4))
    return shared.contrastive(config, net)


@fault(
    "large_head_and_random_labels",
    "gnn",
    cause=FLAT,
    found=("constant_prediction",),
    config={"optimizer": {"_target_": SGD, "lr": 0.05}},
    verify=both(stays(math.log(2), 60), lambda witness: _began_high(witness, 1.0)),
)
def _large_head(config: Config) -> Job:
    x, adjacency, y = data.graphs(8192)
    made = shared.gnn(config)
    with torch.no_grad():
        made.model.net.head.bias.copy_(torch.tensor([3.0, -3.0]))
    return shared.job(made.model.net, F.cross_entropy, config, (x, adjacency, shuffled(y)))


def _began_high(witness: Witness, level: float) -> None:
    assert witness.mean_loss(0, 5) > level, "it does not begin high"


@fault(
    "weight_decay_of_ten",
    "mlp",
    cause=("not_learning", "constant_prediction", "vanishing_gradient", "update_too_large"),
    found=("loss_plateau", "dead_component"),
    config={"optimizer": {"_target_": SGD, "lr": 0.05, "weight_decay": 10.0}},
    verify=both(stays(math.log(4), 20), lambda witness: _vanished(witness)),
)
def _decay(config: Config) -> Job:
    return shared.mlp(config)


def _vanished(witness: Witness) -> None:
    sizes = [float(tensor.norm()) for name, tensor in witness.last.items() if "weight" in name]
    assert max(sizes) < 1e-3, f"weights of {max(sizes):.3g} are left"


@fault(
    "features_of_very_different_size",
    "mlp",
    cause=("slow_convergence", "input_scale", "learning_rate_too_low"),
    found=(*FLAT, "update_too_small"),
    config={"optimizer": {"_target_": SGD, "lr": 0.01}},
    verify=lambda witness: _hidden_scale(witness),
)
def _ill_conditioned(config: Config) -> Job:
    x, y = data.regression(2048)
    sizes = torch.tensor([1.0] * 8) if config["data"].get("scaled") else SIZES
    return shared.job(MLP([8, 64, 64, 1], "gelu"), F.mse_loss, config, (x * sizes, y))


SIZES = torch.tensor([0.01, 0.01, 0.01, 1.0, 1.0, 1.0, 1.0, 1.0])


def _hidden_scale(witness: Witness) -> None:
    spread = witness.batch[0].std(0)
    assert spread.max() > 50 * spread.min(), "the features have one scale"
    better = shared.tail(
        shared.replay(
            "features_of_very_different_size", {"data": {"scaled": True}, "optimizer": {"lr": 0.1}}
        )
    )
    seen = shared.tail(witness.losses)
    assert better < 0.4 * seen, f"{better:.3g} where scaled, {seen:.3g} as it is"


# ---- rising ----


@fault(
    "optimizer_climbs",
    "mlp",
    cause="divergence",
    found=("exploding_gradient", "loss_spike", "update_too_large", "nonfinite_loss"),
    config={"optimizer": {"_target_": SGD, "lr": 0.005, "maximize": True}},
    verify=lambda witness: _climbs(witness, 0, 2.0),
)
def _maximize(config: Config) -> Job:
    return shared.mlp(config)


@fault(
    "optimizer_climbs_from_some_step_on",
    "gnn",
    cause="divergence",
    found=("exploding_gradient", "loss_spike", "update_too_large"),
    onset=120,
    config={"optimizer": {"_target_": ADAM, "lr": 1e-3}, "trainer": {"max_steps": 250}},
    verify=lambda witness: _climbs(witness, 120, 3.0),
)
def _climb(config: Config) -> Job:
    def plan(learner: Learner) -> None:
        for group in learner.trainer.optimizers[0].param_groups:
            group["maximize"] = True

    return shared.gnn(config, plans={120: plan})


def _climbs(witness: Witness, step: int, factor: float) -> None:
    before = witness.mean_loss(max(0, step - 20), max(step, 5))
    seen = shared.tail(witness.losses)
    assert not seen < factor * before, f"the loss goes from {before:.3g} to {seen:.3g}"


@fault(
    "labels_of_other_samples_from_some_step_on",
    "mlp",
    cause=("divergence", "loss_plateau", "loss_spike"),
    found=("loss_oscillation", "exploding_gradient"),
    onset=100,
    config={"optimizer": {"_target_": SGD, "lr": 0.05}},
    verify=lambda witness: _climbs(witness, 100, 3.0),
)
def _later_labels(config: Config) -> Job:
    def spoil(x: Tensor, y: Tensor) -> None:
        y[batch_of(100, 100)] = shuffled(y[batch_of(100, 100)])

    train = shared.stream(config, *data.blobs(6400, noise=2.0), spoil)
    return Job(Learner(MLP([16, 64, 64, 4]), F.cross_entropy, config), train)


# ---- fitting the training set only ----


def few(config: Config, net: nn.Module, loss: Any, tensors: tuple[Tensor, ...], count: int) -> Job:
    """Trained on the first samples, validated on the rest."""
    train = data.loader(*[t[:count] for t in tensors], batch_size=16)
    val = data.loader(*[t[count:] for t in tensors], batch_size=64, shuffle=False)
    return Job(Learner(net, loss, config), train, val)


def overfits(onset: int) -> shared.Check:
    """The training loss falls to nothing while the validation loss rises from its lowest."""

    def check(witness: Witness) -> None:
        values = [value for _, value in witness.val_losses]
        best = min(range(len(values)), key=values.__getitem__)
        step = witness.val_losses[best][0]
        assert step <= onset + 40, f"the lowest validation loss is at {step}"
        assert values[-1] > 1.5 * values[best], f"it rises from {values[best]} to {values[-1]}"
        assert witness.fell(0.3), "the training loss does not fall"

    return check


SLOWLY = {"optimizer": {"_target_": ADAM, "lr": 2e-3}, "trainer": {"val_check_interval": 20}}


@fault(
    "wide_network_on_few_samples",
    "mlp",
    cause="overfitting",
    onset=20,
    config=SLOWLY,
    verify=overfits(20),
)
def _overfit_mlp(config: Config) -> Job:
    x, y = data.blobs(576, noise=4.0)
    return few(config, MLP([16, 256, 256, 4]), F.cross_entropy, (x, y), 64)


@fault(
    "convolutions_on_few_images",
    "cnn",
    cause="overfitting",
    onset=40,
    config=SLOWLY,
    verify=overfits(40),
)
def _overfit_cnn(config: Config) -> Job:
    x, y = data.images(560, noise=2.5)
    wrong = torch.rand(560, generator=torch.Generator().manual_seed(3)) < 0.3
    y = torch.where(wrong, shuffled(y), y)
    return few(config, CNN(1, 4, batch_norm=False), F.cross_entropy, (x, y), 64)


@fault(
    "transformer_on_few_sentences",
    "transformer",
    cause="overfitting",
    onset=40,
    config=SLOWLY,
    verify=overfits(40),
)
def _overfit_transformer(config: Config) -> Job:
    x, y = data.tokens(576)
    flip = torch.rand(576, generator=torch.Generator().manual_seed(3)) < 0.25
    return few(config, Transformer(20, 2), F.cross_entropy, (x, torch.where(flip, 1 - y, y)), 64)
