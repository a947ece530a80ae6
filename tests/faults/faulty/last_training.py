"""Faults of training by one more stranger: rates, schedules, losses, data, the machine."""

import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.evidence import answer
from tests.faults.faulty._shared import (
    ADAMW,
    SGD,
    both,
    hardly_moves,
    job,
    learns,
    times_rate,
    worse_than,
)
from tests.faults.faulty.fresh_tasks import (
    digits,
    each_word,
    ends_above,
    steps,
    travel_of,
    worse_since,
)
from tests.faults.faulty.last_tasks import (
    Bound,
    Dilated,
    Mixer,
    ResNet,
    Sets,
    Tagger,
    Variational,
    amounts,
    clouds,
    counts,
    diabetes,
    horizon,
    plain,
    shapes,
    spirals,
    standard_wine,
    tags,
    wine,
)
from tests.faults.faulty.machine import Clocked, Keeping, Slow
from tests.faults.networks import CNN, Learner
from tests.faults.witness import Witness

Verify = Callable[[Witness], None]

RMSPROP = "torch.optim.RMSprop"

_TOO_HIGH = (
    *("update_too_large", "exploding_gradient", "divergence", "loss_oscillation", "loss_spike"),
    *("loss_plateau", "not_learning", "dead_relu", "saturated_activation", "dead_component"),
    *("constant_prediction", "representation_collapse", "vanishing_gradient", "nonfinite_loss"),
    *("nonfinite_gradient", "gradient_imbalance", "slow_convergence"),
)
_TOO_LOW = ("update_too_small", "slow_convergence", "not_learning", "loss_plateau")

# ---- rates and schedules ----


@fault(
    "last_shapes_adam_rate_of_one",
    "cnn",
    cause="learning_rate_too_high",
    found=_TOO_HIGH,
    config=steps(180, optimizer={"lr": 1.0}),
    verify=worse_than("last_shapes_adam_rate_of_one", {"optimizer": {"lr": 3e-3}}),
    repairable=True,
    cured=learns(0.7),
)
def _adam_of_one(config: Config) -> Job:
    return job(ResNet(), F.cross_entropy, config, shapes(2400))


@fault(
    "last_tags_rmsprop_rate_of_a_half",
    "rnn",
    cause="learning_rate_too_high",
    found=_TOO_HIGH,
    config=steps(180, optimizer={"_target_": RMSPROP, "lr": 0.5}),
    verify=worse_than("last_tags_rmsprop_rate_of_a_half", {"optimizer": {"lr": 3e-3}}),
    repairable=True,
    cured=learns(0.7),
)
def _rmsprop(config: Config) -> Job:
    return job(Tagger(), each_word, config, tags(2400))


@fault(
    "last_mixer_rate_finder_answers_three_at_100",
    "mlp",
    cause=("learning_rate_too_high", "scheduler_misuse", "update_too_large"),
    found=_TOO_HIGH,
    onset=100,
    config=steps(200, optimizer={"_target_": ADAMW, "lr": 3e-3}),
    verify=worse_since(100, 2.0),
)
def _finder(config: Config) -> Job:
    plans = {100: times_rate(1000.0)}
    return job(Mixer(), F.cross_entropy, config, digits(), plans=plans)


@fault(
    "last_clouds_sgd_rate_of_a_hundred_thousandth",
    "mlp",
    cause="learning_rate_too_low",
    found=_TOO_LOW,
    config=steps(200, optimizer={"_target_": SGD, "lr": 1e-5, "momentum": 0.9}),
    verify=both(
        hardly_moves(0.01),
        worse_than("last_clouds_sgd_rate_of_a_hundred_thousandth", {"optimizer": {"lr": 0.1}}, 1.2),
    ),
    repairable=True,
)
def _hundred_thousandth(config: Config) -> Job:
    return job(Sets(), F.cross_entropy, config, clouds(2400))


def _milestones(config: Config, optimizer: torch.optim.Optimizer) -> schedules.LRScheduler:
    if config["model"].get("schedule") != "milestones":
        return schedules.ConstantLR(optimizer, 1.0)
    return schedules.MultiStepLR(optimizer, [6, 12, 18], 0.1)


@fault(
    "last_shapes_milestones_of_epochs_every_step",
    "cnn",
    cause="scheduler_misuse",
    found=(*_TOO_LOW, "learning_rate_too_low"),
    config=steps(
        200,
        optimizer={"_target_": SGD, "lr": 0.05, "momentum": 0.9},
        model={"schedule": "milestones"},
    ),
    verify=worse_than(
        "last_shapes_milestones_of_epochs_every_step", {"model": {"schedule": "constant"}}
    ),
    repairable=True,
    cured=learns(0.6),
)
def _epochs(config: Config) -> Job:
    schedule = partial(_milestones, config)
    return job(ResNet(), F.cross_entropy, config, shapes(2400), schedule=schedule)


@fault(
    "last_tags_recurrence_rate_a_thousand_times",
    "rnn",
    cause=("update_too_large", "learning_rate_too_high"),
    found=_TOO_HIGH,
    config={**steps(200), "component_lrs": {"rnn": 1000.0}},
    verify=both(
        worse_than(
            "last_tags_recurrence_rate_a_thousand_times", {"component_lrs": {"rnn": 1.0}}, 1.3
        ),
        lambda w: _recurrence_goes_far(w),
    ),
    repairable=True,
    cured=learns(0.7),
)
def _thousand_times(config: Config) -> Job:
    made = job(Tagger(), each_word, config, tags(2400))
    parts = {"words": "net.words", "rnn": "net.rnn", "head": "net.head"}
    return Job(made.model, made.train, made.val, parts)


def _recurrence_goes_far(witness: Witness) -> None:
    far = travel_of(witness, "net.rnn")
    assert far > 10, f"the recurrence goes {far:.2g} times their size"


# ---- data ----


@fault(
    "last_wine_raw_columns",
    "mlp",
    cause="input_scale",
    found=_TOO_HIGH,
    config=steps(200, optimizer={"_target_": SGD, "lr": 0.02}),
    verify=worse_than("last_wine_raw_columns", {"data": {"standard": True}}),
)
def _raw(config: Config) -> Job:
    tensors = standard_wine() if config["data"].get("standard") else wine()
    return job(plain([13, 32, 32, 3]), F.cross_entropy, config, tensors)


@fault(
    "last_shapes_mean_of_bytes_subtracted_from_110",
    "cnn",
    cause="input_scale",
    found=_TOO_HIGH,
    onset=110,
    config=steps(200, optimizer={"lr": 1e-3}),
    verify=worse_since(110, 2.0),
)
def _mean_of_bytes(config: Config) -> Job:
    x, y = shapes(200 * 32)
    # the mean is that of pictures from 0 to 255
    x[110 * 32 :] -= 120.0
    net = CNN(3, 4, batch_norm=False)
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y, shuffle=False))


def _infinite_inputs(witness: Witness) -> None:
    assert not all(map(math.isfinite, witness.losses[:10]))
    seen = witness.batch[0]
    assert bool(seen.isinf().any())
    assert not bool(seen.isnan().any())


@fault(
    "last_wine_logarithm_of_the_smallest",
    "mlp",
    cause="nonfinite_data",
    found=("nonfinite_loss", "nonfinite_gradient"),
    config=steps(150, hardware={"batch_size": 48}),
    verify=_infinite_inputs,
)
def _logarithm(config: Config) -> Job:
    x, y = wine()
    return job(
        plain([13, 24, 3], nn.ReLU), F.cross_entropy, config, ((x - x.min(0).values).log(), y)
    )


def _below_zero(witness: Witness) -> None:
    target = witness.batch[1]
    assert float((target < 0).float().mean()) > 0.4
    lowest = float(answer(witness).min())
    assert lowest < -4, f"the lowest logarithm of a rate is {lowest:.3g}"


@fault(
    "last_counts_standardized_before_poisson",
    "mlp",
    cause="loss_target_mismatch",
    found=("divergence", "exploding_gradient", "update_too_large", "not_learning"),
    config=steps(220, optimizer={"lr": 5e-3}),
    verify=_below_zero,
)
def _standardized_counts(config: Config) -> Job:
    x, y = counts(2400)
    tensors = (x, (y - y.mean()) / y.std())
    return job(plain([6, 40, 40, 1]), F.poisson_nll_loss, config, tensors)


@fault(
    "last_forecast_sums_over_the_horizon",
    "cnn",
    cause="wrong_reduction",
    found=(*_TOO_HIGH, "learning_rate_too_high", "clipping_dominates"),
    config=steps(
        200,
        optimizer={"_target_": SGD, "lr": 0.02, "momentum": 0.9},
        hardware={"batch_size": 64},
    ),
    verify=worse_than(
        "last_forecast_sums_over_the_horizon", {"data": {"reduction": "mean"}}, 10.0, 0.0
    ),
)
def _sums(config: Config) -> Job:
    loss = partial(F.mse_loss, reduction=config["data"].get("reduction", "sum"))
    return job(Dilated(), loss, config, horizon(4000))


@fault(
    "last_clouds_softmax_in_forward",
    "mlp",
    cause="double_softmax",
    found=("slow_convergence", "not_learning", "loss_plateau", "vanishing_gradient"),
    config=steps(200),
    verify=ends_above(0.6),
)
def _softmax(config: Config) -> Job:
    net = nn.Sequential(Sets(), nn.Softmax(-1))
    return job(net, F.cross_entropy, config, clouds(2400))


def _gets_worse(factor: float) -> Verify:
    def verify(witness: Witness) -> None:
        values = [value for _, value in witness.val_losses]
        assert values[-1] > factor * min(values), f"{min(values):.3g} to {values[-1]:.3g}"
        assert witness.mean_loss(-10) < 0.5 * witness.mean_loss(0, 5)

    return verify


_OFTEN = {"max_steps": 260, "val_check_interval": 20}


@fault(
    "last_spirals_same_batch_for_ever",
    "mlp",
    cause="overfitting",
    onset=40,
    config={"trainer": _OFTEN, "optimizer": {"lr": 5e-3}},
    verify=_gets_worse(1.3),
)
def _same_batch(config: Config) -> Job:
    x, y = spirals(1600, noise=0.3)
    made = job(plain([2, 64, 64, 3]), F.cross_entropy, config, (x, y))
    # an iterator made anew each step gives its first batch
    train = DataLoader(TensorDataset(x, y), batch_size=32, sampler=[*range(32)] * 260)
    return Job(made.model, train, made.val)


@fault(
    "last_diabetes_forty_patients_wide_network",
    "mlp",
    cause="overfitting",
    onset=30,
    config={
        "trainer": _OFTEN,
        "optimizer": {"_target_": ADAMW, "lr": 2e-3},
        "hardware": {"batch_size": 20},
    },
    verify=_gets_worse(1.3),
)
def _forty_patients(config: Config) -> Job:
    x, y = diabetes()
    net = plain([10, 256, 256, 1])
    model = Learner(net, F.mse_loss, config)
    val = data.loader(x[40:240], y[40:240], batch_size=50, shuffle=False)
    return Job(model, data.loader(x[:40], y[:40], batch_size=20), val)


# ---- losses ----


def _of_logarithm(said: Tensor, amount: Tensor) -> Tensor:
    return F.mse_loss(said, amount.log())


def _breaks_at(step: int) -> Verify:
    def verify(witness: Witness) -> None:
        bad = [s for s, loss in enumerate(witness.losses) if not math.isfinite(loss)]
        assert bad[:1] == [step], f"the loss breaks at {bad[:1]}"

    return verify


@fault(
    "last_amounts_logarithm_of_a_refund_at_120",
    "mlp",
    cause="nonfinite_loss",
    found=("nonfinite_gradient",),
    onset=120,
    config=steps(170),
    verify=_breaks_at(120),
)
def _refund(config: Config) -> Job:
    x, y = amounts(170 * 32)
    y[120 * 32 + 7] *= -1
    net = plain([7, 40, 40, 1])
    return Job(Learner(net, _of_logarithm, config), data.loader(x, y, shuffle=False))


def _jumps(step: int, factor: float) -> Verify:
    def verify(witness: Witness) -> None:
        before, after = witness.mean_loss(step - 20, step), witness.mean_loss(step, step + 5)
        assert after > factor * before, f"the loss goes from {before:.3g} to {after:.3g}"

    return verify


@fault(
    "last_shapes_labels_encoded_anew_at_110",
    "cnn",
    cause=("loss_spike", "divergence"),
    found=("loss_oscillation", "exploding_gradient", "update_too_large"),
    onset=110,
    config=steps(200, optimizer={"lr": 2e-3}),
    verify=_jumps(110, 4.0),
)
def _encoded(config: Config) -> Job:
    x, y = shapes(200 * 32, seed=511)
    # the names came in another order
    y[110 * 32 :] = (y[110 * 32 :] + 1) % 4
    return Job(Learner(ResNet(), F.cross_entropy, config), data.loader(x, y, shuffle=False))


@fault(
    "last_rings_without_activations",
    "mlp",
    cause=("not_learning", "loss_plateau", "slow_convergence"),
    found=("constant_prediction",),
    config=steps(240),
    verify=both(
        ends_above(0.6),
        worse_than("last_rings_without_activations", {"model": {"activation": "relu"}}),
    ),
)
def _linear(config: Config) -> Job:
    kind = nn.ReLU if config["model"].get("activation") == "relu" else nn.Identity
    return job(plain([8, 48, 48, 48, 2], kind), F.cross_entropy, config, data.rings(3000, seed=515))


def _hardly_sure(witness: Witness) -> None:
    surest = float(answer(witness).softmax(-1).amax(-1).mean())
    assert surest < 0.3, f"the mean of the largest chance is {surest:.3g}"
    ends_above(2.2)(witness)


@fault(
    "last_mixer_label_smoothing_of_95_hundredths",
    "mlp",
    cause=("not_learning", "loss_plateau", "slow_convergence"),
    found=("constant_prediction", "loss_target_mismatch", "vanishing_gradient"),
    config=steps(200),
    verify=_hardly_sure,
)
def _smoothing(config: Config) -> Job:
    loss = partial(F.cross_entropy, label_smoothing=0.95)
    return job(Mixer(layers=2), loss, config, digits())


def _without_bound(witness: Witness) -> None:
    seen = witness.losses
    assert not math.isfinite(seen[-1]) or seen[-1] < -1e3, f"the loss ends at {seen[-1]:.3g}"


@fault(
    "last_variational_minus_before_the_divergence",
    "autoencoder",
    cause=("divergence", "exploding_gradient", "nonfinite_loss", "loss_target_mismatch"),
    found=("nonfinite_gradient", "update_too_large", "gradient_imbalance", "loss_oscillation"),
    config=steps(220, optimizer={"lr": 5e-3}),
    verify=_without_bound,
)
def _minus(config: Config) -> Job:
    x, _ = standard_wine()
    g = torch.Generator().manual_seed(512)
    x = x.repeat(12, 1) + 0.1 * torch.randn(12 * len(x), 13, generator=g)
    return job(Variational(13), Bound(-1.0), config, (x, x), outputs="loss")


# ---- machine ----


def _waiting(witness: Witness) -> float:
    model = witness.model
    assert isinstance(model, Clocked)
    waits, works = sum(model.waits[10:]), sum(model.works[10:])
    return waits / (waits + works)


def _waits(witness: Witness) -> None:
    assert _waiting(witness) > 0.5, f"only {_waiting(witness):.2f} of the time is waiting"


def _waits_no_more(witness: Witness) -> None:
    assert _waiting(witness) < 0.45, f"{_waiting(witness):.2f} of the time is waiting still"


@fault(
    "last_tags_splits_words_in_the_dataset",
    "rnn",
    cause="input_bound",
    config={"trainer": {"max_steps": 150}, "hardware": {"batch_size": 10}},
    verify=_waits,
    repairable=True,
    cured=_waits_no_more,
)
def _splits(config: Config) -> Job:
    hardware = config["hardware"]
    workers = hardware["num_workers"]
    train = DataLoader(
        Slow(*tags(1600), seconds=0.003),
        batch_size=hardware["batch_size"],
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )
    return Job(Clocked(Tagger(), each_word, config, rest=0.012), train)


def _answers(learner: Learner, batch: list[Tensor]) -> object:
    # for a measure at the end of the epoch, and with their graphs
    time.sleep(0.005)
    return learner.net(batch[0])


def _fills(witness: Witness) -> None:
    model = witness.model
    assert isinstance(model, Keeping)
    sizes = model.sizes
    for low, high in pairwise((sizes[10], sizes[len(sizes) // 2], sizes[-1])):
        grown = (high - low) / 2**20
        assert grown > 50, f"it grows by {grown:.0f} MiB"


@fault(
    "last_mixer_keeps_answers_for_the_epoch",
    "mlp",
    cause="memory_growth",
    config=steps(180),
    verify=_fills,
)
def _keeps(config: Config) -> Job:
    model = Keeping(Mixer(), F.cross_entropy, config, keep=_answers, pause=0.005)
    x, y = digits()
    return Job(model, data.loader(x, y))
