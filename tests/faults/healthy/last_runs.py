"""Healthy runs by one more stranger."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

from tests.faults.case import Config, Job, healthy
from tests.faults.faulty._shared import low_rank
from tests.faults.faulty.fresh_tasks import digits, each_word, steps, table
from tests.faults.faulty.last_tasks import (
    Bound,
    Codes,
    Dilated,
    Mixer,
    Penalized,
    ResNet,
    Sets,
    Story,
    Tagger,
    Variational,
    WideAndDeep,
    additions,
    amounts,
    clouds,
    counts,
    diabetes,
    horizon,
    plain,
    recalls,
    shapes,
    spirals,
    standard_wine,
    tags,
)
from tests.faults.healthy.checks import accuracy, answers, error, fresh, job, least, most
from tests.faults.networks import Learner
from tests.faults.witness import Witness

Check = Callable[[Witness], None]

SGD = "torch.optim.SGD"
ADAMW = "torch.optim.AdamW"


def _right(tensors: Callable[[], tuple[Tensor, ...]], bound: float) -> Check:
    def verify(witness: Witness) -> None:
        assert all(map(math.isfinite, witness.losses))
        least(accuracy(witness, tensors()), bound, "accuracy on fresh samples")

    return verify


def _near(tensors: Callable[[], tuple[Tensor, ...]], bound: float) -> Check:
    def verify(witness: Witness) -> None:
        assert all(map(math.isfinite, witness.losses))
        most(error(witness, tensors()), bound, "error on fresh samples")

    return verify


_shapes = partial(shapes, 4000, seed=521)


@healthy(
    "last_shapes_residual_network",
    "cnn",
    config=steps(
        220,
        optimizer={"_target_": SGD, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
    ),
    verify=_right(_shapes, 0.95),
)
def _residual(config: Config) -> Job:
    return job(ResNet(), F.cross_entropy, config, _shapes())


_spirals = partial(spirals, 5000, seed=522)


@healthy(
    "last_spirals_of_three_arms",
    "mlp",
    config=steps(250, optimizer={"_target_": "torch.optim.NAdam", "lr": 5e-3}),
    verify=_right(_spirals, 0.93),
)
def _arms(config: Config) -> Job:
    return job(plain([2, 48, 48, 3]), F.cross_entropy, config, _spirals())


@healthy(
    "last_wine_of_three_growers",
    "mlp",
    tricky="thirteen batches make an epoch, and it is learned by heart",
    config=steps(150, optimizer={"lr": 3e-3}, hardware={"batch_size": 8}),
    verify=_right(standard_wine, 0.94),
)
def _growers(config: Config) -> Job:
    net = nn.Sequential(nn.Dropout(0.2), plain([13, 24, 3], nn.ReLU))
    return job(net, F.cross_entropy, config, standard_wine())


_clouds = partial(clouds, 6000, seed=523)


@healthy(
    "last_clouds_of_three_sizes",
    "mlp",
    config=steps(250, optimizer={"_target_": ADAMW, "lr": 3e-3}, hardware={"batch_size": 64}),
    verify=_right(_clouds, 0.85),
)
def _sizes(config: Config) -> Job:
    return job(Sets(), F.cross_entropy, config, _clouds())


_tags = partial(tags, 5000, seed=524)


@healthy(
    "last_tags_in_both_directions",
    "rnn",
    config={
        "trainer": {"max_steps": 260, "gradient_clip_val": 5.0},
        "optimizer": {"lr": 1e-2},
    },
    verify=_right(_tags, 0.97),
)
def _directions(config: Config) -> Job:
    return job(Tagger(), each_word, config, _tags())


_recalls = partial(recalls, 6000, seed=525)


def _warm_cosine(config: Config, optimizer: torch.optim.Optimizer) -> schedules.LRScheduler:
    total = config["trainer"]["max_steps"]
    warm = schedules.LinearLR(optimizer, 0.05, 1.0, 30)
    cosine = schedules.CosineAnnealingLR(optimizer, total - 30)
    return schedules.SequentialLR(optimizer, [warm, cosine], [30])


@healthy(
    "last_story_recalls_the_third_word_back",
    "transformer",
    tricky="each word is right to look at one place alone",
    config=steps(300, optimizer={"_target_": ADAMW, "lr": 6e-3}, hardware={"batch_size": 48}),
    verify=_right(_recalls, 0.95),
)
def _third_back(config: Config) -> Job:
    schedule = partial(_warm_cosine, config)
    return job(Story(), each_word, config, _recalls(), schedule=schedule)


@healthy(
    "last_mixer_with_dropout_and_smoothing",
    "mlp",
    tricky="the loss has a floor far above zero",
    config=steps(250, optimizer={"_target_": ADAMW, "lr": 4e-3, "weight_decay": 0.05}),
    verify=_right(digits, 0.9),
)
def _smoothed(config: Config) -> Job:
    loss = partial(F.cross_entropy, label_smoothing=0.1)
    return job(Mixer(layers=2, dropout=0.1), loss, config, digits())


_horizon = partial(horizon, 6000, seed=526)


@healthy(
    "last_forecast_of_six_moments",
    "cnn",
    config=steps(250, optimizer={"_target_": "torch.optim.Adamax", "lr": 8e-3}),
    verify=_near(_horizon, 0.1),
)
def _moments(config: Config) -> Job:
    return job(Dilated(), F.smooth_l1_loss, config, _horizon())


_counts = partial(counts, 5000, seed=527)


def _knows_rates(witness: Witness) -> None:
    x, y = fresh(_counts())
    truth = 0.7 + 0.6 * x[:, :1] + 0.4 * x[:, 1:2].abs()
    best = float(F.poisson_nll_loss(truth, y))
    most(float(F.poisson_nll_loss(answers(witness, x), y)), best + 0.1, "loss on fresh counts")


@healthy(
    "last_counts_by_their_logarithm",
    "mlp",
    tricky="the loss goes below zero",
    config=steps(250, optimizer={"lr": 2e-3}),
    verify=_knows_rates,
)
def _by_logarithm(config: Config) -> Job:
    return job(plain([6, 40, 40, 1]), F.poisson_nll_loss, config, _counts())


def _logarithms() -> tuple[Tensor, Tensor]:
    x, y = amounts(6000, seed=528)
    return x, y.log()


def _likelihood(said: Tensor, wanted: Tensor) -> Tensor:
    mean, logarithm = said.chunk(2, -1)
    return F.gaussian_nll_loss(mean, wanted, logarithm.clamp(-8, 8).exp())


def _knows_amounts(witness: Witness) -> None:
    x, y = fresh(_logarithms())
    most(float(F.mse_loss(answers(witness, x)[:, :1], y)), 0.15, "error on fresh amounts")


@healthy(
    "last_amounts_with_their_own_noise",
    "mlp",
    tricky="the loss goes below zero, and gradients grow as the noise is known to be small",
    config=steps(280, optimizer={"lr": 4e-3}),
    verify=_knows_amounts,
)
def _own_noise(config: Config) -> Job:
    return job(plain([7, 48, 48, 2]), _likelihood, config, _logarithms())


def _rows() -> tuple[Tensor, Tensor, Tensor]:
    return table(6000, seed=529)


def _tells(witness: Witness) -> None:
    *inputs, y = fresh(_rows())
    said = answers(witness, *inputs) > 0
    least(float((said == (y > 0)).float().mean()), 0.8, "accuracy on fresh rows")


@healthy(
    "last_both_columns_wide_and_deep",
    "mlp",
    config=steps(250, optimizer={"_target_": "torch.optim.Adagrad", "lr": 0.05}),
    verify=_tells,
)
def _wide_and_deep(config: Config) -> Job:
    return job(WideAndDeep(), F.binary_cross_entropy_with_logits, config, _rows())


@healthy(
    "last_diabetes_half_of_it_is_chance",
    "linear",
    tricky="half of the variance cannot be known",
    config=steps(150, optimizer={"_target_": SGD, "lr": 0.02}),
    verify=_near(diabetes, 0.65),
)
def _chance(config: Config) -> Job:
    return job(nn.Linear(10, 1), F.mse_loss, config, diabetes())


_additions = partial(additions, 8000, length=12, seed=530)


class Adds(nn.Module):
    """A GRU and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@healthy(
    "last_additions_of_two_marked_numbers",
    "gru",
    tricky="nothing is learned for a while",
    config={
        "trainer": {"max_steps": 300, "gradient_clip_val": 1.0},
        "optimizer": {"lr": 1e-2},
        "hardware": {"batch_size": 64},
    },
    verify=_near(_additions, 0.03),
)
def _marked(config: Config) -> Job:
    return job(Adds(), F.mse_loss, config, _additions())


def _points() -> tuple[Tensor, Tensor]:
    x = low_rank(5000, features=20, latent=5)
    return x, x


def _rebuilds(witness: Witness) -> None:
    x, _ = fresh(_points())
    again = answers(witness, x)[:, :20]
    most(float(F.mse_loss(again, x) / x.var()), 0.25, "share of the variance that is lost")


@healthy(
    "last_codes_with_a_small_penalty",
    "autoencoder",
    config=steps(250, optimizer={"lr": 5e-3}),
    verify=_rebuilds,
)
def _small_penalty(config: Config) -> Job:
    return job(Codes(), Penalized(0.01), config, _points(), outputs="loss")


class Warming(Learner):
    """The divergence's weight grows over the first hundred steps."""

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.loss.weight = 0.1 * min(1.0, self.global_step / 100)


@healthy(
    "last_variational_weight_grows_to_a_tenth",
    "autoencoder",
    tricky="the loss rises with the weight",
    config=steps(250, optimizer={"lr": 4e-3}),
    verify=_rebuilds,
)
def _grows(config: Config) -> Job:
    net = Variational(20, latent=6)
    return job(net, Bound(0.0), config, _points(), outputs="loss", learner=Warming)
