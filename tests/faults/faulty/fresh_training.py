"""Faults of training by somebody who never saw a rule: gradients, steps, schedules, losses."""

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.faulty._shared import (
    SGD,
    both,
    breaks,
    job,
    learns,
    tail,
    times_rate,
    worse_than,
)
from tests.faults.faulty.fresh_tasks import (
    Community,
    Factors,
    Forecaster,
    Language,
    Patches,
    Table,
    UNet,
    Waveform,
    cells,
    digits,
    discs,
    each_word,
    ends_above,
    field,
    gradient_grows_at,
    no_gradient,
    norm_of,
    ratings,
    sentences,
    series,
    sets,
    steps,
    table,
    travel_of,
    waves,
    worse_since,
)
from tests.faults.faulty.machine import Keeping, Slow
from tests.faults.networks import GAN, MLP, Autoencoder, Learner, Towers, contrastive_loss
from tests.faults.witness import Witness

Verify = Callable[[Witness], None]

_EFFECTS = ("not_learning", "loss_plateau", "slow_convergence", "constant_prediction")

# ---- gradients ----


def _fades(first: str, head: str, most: float) -> Verify:
    def verify(witness: Witness) -> None:
        for step in (0, 30):
            ratio = norm_of(witness, step, first) / norm_of(witness, step, head)
            assert ratio < most, f"{first} has {ratio:.2g} of the gradient of {head}"

    return verify


@fault(
    "fresh_waveform_eight_sigmoid_convolutions",
    "cnn",
    cause="vanishing_gradient",
    found=(*_EFFECTS, "representation_collapse", "dead_component", "gradient_imbalance"),
    config=steps(200),
    verify=both(_fades("net.features.0.", "net.head", 1e-4), ends_above(1.05)),
)
def _sigmoid_convolutions(config: Config) -> Job:
    net = Waveform(3, (16,) * 8, "sigmoid", norm=False)
    return job(net, F.cross_entropy, config, waves(2000))


class Shortcuts(nn.Module):
    """Ten layers with a way around each, until a rewrite leaves that out."""

    around = True

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(64, 48), nn.Tanh())
        layers = [nn.Sequential(nn.Linear(48, 48), nn.Sigmoid()) for _ in range(10)]
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x.flatten(1))
        for block in self.blocks:
            y = y + block(y) - 0.5 if self.around else block(y)
        return self.head(y)


@fault(
    "fresh_digits_shortcuts_left_out_from_120",
    "mlp",
    cause="vanishing_gradient",
    found=(
        *_EFFECTS,
        "loss_spike",
        "divergence",
        "representation_collapse",
        "dead_component",
        "gradient_imbalance",
    ),
    onset=120,
    config=steps(220, optimizer={"lr": 2e-3}),
    verify=both(worse_since(120, 2.0), lambda w: _stem_is_lost(w)),
)
def _shortcuts(config: Config) -> Job:
    return job(Shortcuts(), F.cross_entropy, config, digits(), plans={120: sets("around", False)})


def _stem_is_lost(witness: Witness) -> None:
    before, after = norm_of(witness, 110, "net.stem"), norm_of(witness, 150, "net.stem")
    assert after < 1e-3 * before, f"the stem's gradient goes from {before:.2g} to {after:.2g}"


def _jumps_at(step: int, factor: float) -> Verify:
    def verify(witness: Witness) -> None:
        before, after = witness.mean_loss(step - 20, step), max(witness.losses[step : step + 40])
        assert after > factor * before, f"the loss goes from {before:.3g} to {after:.3g}"

    return verify


def _large(least: float) -> Verify:
    def verify(witness: Witness) -> None:
        seen = min(witness.norms[:20])
        assert seen > least, f"the gradient is {seen:.3g}"

    return verify


@fault(
    "fresh_graph_sums_over_many_neighbours",
    "gnn",
    cause="exploding_gradient",
    found=(
        "gradient_imbalance",
        "loss_oscillation",
        "update_too_large",
        "divergence",
        "slow_convergence",
        "loss_spike",
        "learning_rate_too_high",
    ),
    config=steps(200, optimizer={"lr": 1e-3}),
    verify=both(_large(1e3), ends_above(1.0)),
)
def _sums(config: Config) -> Job:
    net = Community(layers=8, mean=False, degree=24.0)
    chosen, group = net.data(3000)
    # some were put into a wrong group by hand
    wrong = torch.rand(3000, generator=torch.Generator().manual_seed(210)) < 0.2
    return job(net, F.cross_entropy, config, (chosen, torch.where(wrong, (group + 1) % 4, group)))


def _percent(learner: Learner) -> None:
    # a temperature of 0.07, read from a table in per cent
    with torch.no_grad():
        learner.net.scale.fill_(math.log(100 / 0.07))


@fault(
    "fresh_contrastive_temperature_in_percent_from_120",
    "contrastive",
    cause=("exploding_gradient", "loss_spike", "divergence"),
    found=("gradient_imbalance", "update_too_large", "loss_oscillation"),
    onset=120,
    config=steps(220, optimizer={"lr": 1e-3}, hardware={"batch_size": 48}),
    verify=both(gradient_grows_at(120, 10.0), _jumps_at(120, 2.5)),
)
def _temperature(config: Config) -> Job:
    tensors = (*data.pairs(4000, first=18, second=7, seed=211), torch.zeros(4000))
    net = Towers(18, 7, width=16)
    return job(net, contrastive_loss, config, tensors, outputs="loss", plans={120: _percent})


class Cosine(nn.Module):
    """The cosine between a user and the last items, some of which stand for none."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(60, 8)
        self.items = nn.Embedding(41, 8)
        nn.init.zeros_(self.items.weight[40])
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        user, items = self.users(x[:, 0]), self.items(x[:, 1:])
        size = items.square().sum(-1).sqrt() * user.square().sum(-1, keepdim=True).sqrt()
        alike = (items * user[:, None]).sum(-1) / (size + 1e-8)
        return self.scale * alike.sum(1)


def _gradient_breaks(step: int) -> Verify:
    def verify(witness: Witness) -> None:
        bad = [s for s, norm in enumerate(witness.norms) if not math.isfinite(norm)]
        assert bad, "all gradients are finite"
        assert bad[0] == step, f"the gradient breaks at {bad[0]}"
        assert math.isfinite(witness.losses[step]), "the loss breaks with it"

    return verify


@fault(
    "fresh_recommender_root_of_padding_rows",
    "recommender",
    cause="nonfinite_gradient",
    found=("nonfinite_loss",),
    config=steps(150),
    verify=_gradient_breaks(0),
)
def _padding_rows(config: Config) -> Job:
    x, y = ratings(2400)
    x = torch.stack([x[:, 0], x[:, 1], torch.where(x[:, 1] % 3 == 0, 40, x[:, 1] // 2)], 1)
    return job(Cosine(), F.mse_loss, config, (x, y))


class Statistics(nn.Module):
    """Mean and standard deviation over time, as networks for voices have them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 20, 5, padding=2, bias=False), nn.ReLU(), nn.Conv1d(20, 20, 3, padding=0)
        )
        self.head = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        spread = (y - y.mean(-1, keepdim=True)).square().mean(-1).sqrt()
        return self.head(torch.cat([y.mean(-1), spread], -1))


@fault(
    "fresh_waveform_spread_of_silence_at_110",
    "cnn",
    cause="nonfinite_gradient",
    found=("nonfinite_loss",),
    onset=110,
    config=steps(170, optimizer={"lr": 2e-3}),
    verify=_gradient_breaks(110),
)
def _silence(config: Config) -> Job:
    x, y = waves(170 * 32)
    for number in range(110, 170, 4):
        x[number * 32 + 5] = 0.0
    return Job(Learner(Statistics(), F.cross_entropy, config), data.loader(x, y, shuffle=False))


class Documents(nn.Module):
    """The mean of a text's words beside some numbers; the mask keeps what is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 12)
        self.numbers = nn.Linear(6, 24)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, numbers: Tensor, words: Tensor) -> Tensor:
        mask = (words == 0).float()[..., None]
        text = (self.words(words) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.head(torch.cat([self.numbers(numbers), text], -1))


@fault(
    "fresh_table_with_texts_mask_inverted",
    "mlp",
    cause="dead_component",
    found=("frozen_weights", "update_too_small", "vanishing_gradient", "gradient_imbalance"),
    config=steps(180),
    verify=both(no_gradient("net.words"), learns(0.95)),
)
def _inverted(config: Config) -> Job:
    x, kind, y = table(2400)
    g = torch.Generator().manual_seed(212)
    # full texts, so that nothing is padding
    words = torch.cat([20 + kind[:, None], torch.randint(1, 20, (2400, 7), generator=g)], 1)
    loss = F.binary_cross_entropy_with_logits
    return job(Documents(), loss, config, (x, words, y))


class Shared(nn.Module):
    """A body, and a head for each of two tasks."""

    def __init__(self, features: int, classes: int, width: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.kind = nn.Sequential(nn.GELU(), nn.Linear(width, classes))
        self.price = nn.Sequential(nn.GELU(), nn.Linear(width, 24), nn.GELU(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.cat([self.kind(y), self.price(y)], -1)


class BothTasks:
    """Cross-entropy of a kind and the weighed squared error of a price, where there is one."""

    weight = 1.0

    def __call__(self, said: Tensor, target: Tensor) -> Tensor:
        kind = F.cross_entropy(said[:, :-1], target[:, 0].long())
        there = target[:, 2]
        errors = (said[:, -1] - target[:, 1]).square() * there
        return kind + self.weight * errors.sum() / there.sum().clamp(min=1)


def _two_tasks(samples: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    x, kind = data.blobs(samples, features=12, classes=5, noise=1.5, seed=seed)
    price = x[:, 0].sin() + 0.5 * x[:, 1]
    there = torch.ones(samples)
    return x, torch.stack([kind.float(), scale * price, there], 1)


@fault(
    "fresh_two_tasks_labels_of_the_second_end_at_100",
    "mlp",
    cause="dead_component",
    found=("frozen_weights", "update_too_small", "vanishing_gradient", "gradient_imbalance"),
    onset=100,
    config=steps(190),
    verify=no_gradient("net.price", 100),
)
def _labels_end(config: Config) -> Job:
    x, target = _two_tasks(190 * 32, 1.0, 213)
    target[100 * 32 :, 2] = 0.0
    model = Learner(Shared(12, 5), BothTasks(), config)
    return Job(model, data.loader(x, target, shuffle=False))


def _uneven(least: float, since: int = 0) -> Verify:
    def verify(witness: Witness) -> None:
        at = range(since, since + 10)
        for step in at:
            ratio = norm_of(witness, step, "net.price") / norm_of(witness, step, "net.kind")
            assert ratio > least, f"the price has {ratio:.3g} times the gradient of the kind"

    return verify


@fault(
    "fresh_two_tasks_price_in_cents",
    "mlp",
    cause=("gradient_imbalance", "exploding_gradient"),
    found=("loss_target_mismatch", "input_scale", "slow_convergence", "not_learning"),
    config=steps(220, optimizer={"lr": 2e-3}),
    verify=_uneven(100.0),
)
def _cents(config: Config) -> Job:
    x, target = _two_tasks(3000, 500.0, 214)
    return job(Shared(12, 5), BothTasks(), config, (x, target))


def _weighs_more(learner: Learner) -> None:
    learner.loss.weight = 1e4


@fault(
    "fresh_two_tasks_weight_of_the_price_jumps_at_110",
    "mlp",
    cause=("gradient_imbalance", "exploding_gradient"),
    found=("loss_spike", "divergence", "update_too_large", "loss_oscillation"),
    onset=110,
    config=steps(210, optimizer={"lr": 2e-3}),
    verify=both(_uneven(100.0, 110), gradient_grows_at(110, 100.0)),
)
def _weight_jumps(config: Config) -> Job:
    tensors = _two_tasks(3000, 1.0, 215)
    return job(Shared(12, 5), BothTasks(), config, tensors, plans={110: _weighs_more})


@fault(
    "fresh_segmentation_clipped_at_a_thousandth",
    "cnn",
    cause="clipping_dominates",
    found=(*_EFFECTS, "update_too_small", "learning_rate_too_low"),
    config={
        "trainer": {"max_steps": 200, "gradient_clip_val": 1e-3},
        "optimizer": {"_target_": SGD, "lr": 0.2, "momentum": 0.9},
    },
    verify=worse_than(
        "fresh_segmentation_clipped_at_a_thousandth", {"trainer": {"gradient_clip_val": None}}
    ),
    repairable=True,
    cured=learns(0.6),
)
def _clipped(config: Config) -> Job:
    return job(UNet(6), F.binary_cross_entropy_with_logits, config, discs(1200))


def _clips_closer(learner: Learner) -> None:
    learner.trainer.gradient_clip_val = 1e-4


def _hardly_steps(step: int) -> Verify:
    def verify(witness: Witness) -> None:
        before, after = witness.moves[step - 20 : step], witness.moves[step + 60 :]
        assert max(after) < 0.01 * min(before), f"a step goes from {min(before)} to {max(after)}"
        # what was learned until then is not all
        assert witness.mean_loss(step, step + 20) > 0.3

    return verify


@fault(
    "fresh_graph_clip_lowered_at_100",
    "gnn",
    cause=("clipping_dominates", "update_too_small", "learning_rate_too_low"),
    found=("frozen_weights", "loss_plateau", "slow_convergence", "scheduler_misuse"),
    onset=100,
    config={
        "trainer": {"max_steps": 200, "gradient_clip_val": 5.0},
        "optimizer": {"_target_": SGD, "lr": 0.02, "momentum": 0.8},
    },
    verify=_hardly_steps(100),
)
def _clip_lowered(config: Config) -> Job:
    net = Community(classes=6, nodes=180)
    return job(net, F.cross_entropy, config, net.data(4000), plans={100: _clips_closer})


# ---- steps ----


@fault(
    "fresh_recommender_items_have_the_rate_of_sgd",
    "recommender",
    cause=("update_too_large", "learning_rate_too_high"),
    found=("loss_oscillation", "divergence", "not_learning", "loss_spike", "exploding_gradient"),
    config={**steps(220, optimizer={"lr": 1e-2}), "component_lrs": {"items": 300.0}},
    verify=both(ends_above(1.0), lambda w: _goes_far(w)),
    repairable=True,
    cured=learns(0.8),
)
def _items(config: Config) -> Job:
    net, (x, y) = Factors(), ratings(4000)
    made = job(net, F.mse_loss, config, (x, y))
    return Job(made.model, made.train, made.val, {"users": "net.users", "items": "net.items"})


def _goes_far(witness: Witness) -> None:
    far = travel_of(witness, "net.items")
    assert far > 10, f"the items move by {far:.3g} of their size"


def _forgets_second_moments(learner: Learner) -> None:
    # a checkpoint that was written in parts: the count of steps is there, the squares are not
    for optimizer in learner.trainer.optimizers:
        for state in optimizer.state.values():
            state["exp_avg_sq"].zero_()
            state["step"].fill_(20_000)


def _leaps(step: int, factor: float) -> Verify:
    def verify(witness: Witness) -> None:
        before = sorted(witness.moves[step - 20 : step])[10]
        after = max(witness.moves[step : step + 3])
        assert after > factor * before, f"a step goes from {before:.3g} to {after:.3g}"

    return verify


@fault(
    "fresh_digits_second_moments_lost_at_110",
    "transformer",
    cause=("update_too_large", "learning_rate_too_high", "loss_spike"),
    found=("divergence", "exploding_gradient", "loss_oscillation", "not_learning"),
    onset=110,
    config=steps(200, optimizer={"lr": 3e-3}),
    verify=both(_leaps(110, 8.0), worse_since(110, 1.5)),
)
def _moments(config: Config) -> Job:
    plans = {110: _forgets_second_moments}
    return job(Patches(), F.cross_entropy, config, digits(), plans=plans)


class OnGrid(Learner):
    """Puts its weights on a coarse grid after every step, to be ready for eight bits."""

    def optimizer_step(self, *args: Any, **more: Any) -> None:
        super().optimizer_step(*args, **more)
        with torch.no_grad():
            for parameter in self.net.features.parameters():
                parameter.copy_((parameter * 64).round() / 64)


def _stay(beginning: str, since: int = 5) -> Verify:
    def verify(witness: Witness) -> None:
        model = witness.model
        moved = [
            float((p.detach() - witness.first[n]).abs().max())
            for n, p in model.named_parameters()
            if n.startswith(beginning)
        ]
        assert max(moved) == 0.0, f"they move by {max(moved):.3g}"
        assert min(norm_of(witness, s, beginning) for s in range(since, 50)) > 0

    return verify


@fault(
    "fresh_waveform_weights_put_on_a_grid",
    "cnn",
    cause=("frozen_weights", "update_too_small"),
    found=("learning_rate_too_low", "slow_convergence", "not_learning", "loss_plateau"),
    config=steps(180, optimizer={"lr": 1e-3}),
    verify=_stay("net.features"),
)
def _grid(config: Config) -> Job:
    net = Waveform(3, norm=False)
    with torch.no_grad():
        for parameter in net.features.parameters():
            parameter.copy_((parameter * 64).round() / 64)
    model = OnGrid(net, F.cross_entropy, config)
    return Job(model, data.loader(*waves(1600)))


class ClearsFirst(Learner):
    """Goes backward, clears the gradients, and then steps."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        given = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        self.manual_backward(given["loss"])
        optimizer.zero_grad()
        optimizer.step()
        return given


def _never_moves(witness: Witness) -> None:
    assert not any(witness.changed(name) for name in witness.first), "something moves"


@fault(
    "fresh_forecast_cleared_between_backward_and_step",
    "rnn",
    cause=("frozen_weights", "update_too_small", "unused_parameter", "detached_graph"),
    found=("not_learning", "learning_rate_too_low", "loss_plateau", "dead_component"),
    config=steps(160),
    verify=_never_moves,
)
def _clears_first(config: Config) -> Job:
    x, y = series(2400)
    return Job(ClearsFirst(Forecaster(), F.mse_loss, config), data.loader(x, y))


# ---- rates ----

_FAST = (
    *("update_too_large", "divergence", "loss_oscillation", "loss_spike", "exploding_gradient"),
    *("dead_relu", "not_learning", "constant_prediction", "representation_collapse"),
    *("loss_plateau", "vanishing_gradient", "nonfinite_loss", "nonfinite_gradient"),
    *("dead_component", "saturated_activation", "gradient_imbalance", "attention_collapse"),
)


@fault(
    "fresh_digits_sgd_rate_of_three",
    "mlp",
    cause="learning_rate_too_high",
    found=_FAST,
    config=steps(180, optimizer={"_target_": SGD, "lr": 3.0}),
    verify=worse_than("fresh_digits_sgd_rate_of_three", {"optimizer": {"lr": 0.1}}),
    repairable=True,
    cured=learns(0.6),
)
def _rate_of_three(config: Config) -> Job:
    net = nn.Sequential(nn.Flatten(), MLP([64, 96, 48, 10]))
    return job(net, F.cross_entropy, config, digits())


@fault(
    "fresh_patches_adamw_rate_of_a_tenth",
    "transformer",
    cause="learning_rate_too_high",
    found=(*_FAST, "attention_uniform", "attention_sink"),
    config=steps(180, optimizer={"_target_": "torch.optim.AdamW", "lr": 0.1}),
    verify=worse_than("fresh_patches_adamw_rate_of_a_tenth", {"optimizer": {"lr": 2e-3}}),
    repairable=True,
    cured=learns(0.6),
)
def _rate_of_a_tenth(config: Config) -> Job:
    return job(Patches(), F.cross_entropy, config, digits())


@fault(
    "fresh_forecast_nadam_rate_of_a_half",
    "rnn",
    cause="learning_rate_too_high",
    found=_FAST,
    config=steps(200, optimizer={"_target_": "torch.optim.NAdam", "lr": 0.5}),
    verify=worse_than(
        "fresh_forecast_nadam_rate_of_a_half", {"optimizer": {"lr": 5e-3}}, 1.5, 0.02
    ),
    repairable=True,
    cured=learns(0.6),
)
def _rate_of_a_half(config: Config) -> Job:
    return job(Forecaster(), F.smooth_l1_loss, config, series(3000))


@fault(
    "fresh_graph_rate_scaled_by_the_batch_twice",
    "gnn",
    cause="learning_rate_too_high",
    found=_FAST,
    config=steps(
        200,
        optimizer={"_target_": SGD, "lr": 0.02 * 16 * 16, "momentum": 0.9},
        hardware={"batch_size": 64},
    ),
    verify=worse_than(
        "fresh_graph_rate_scaled_by_the_batch_twice", {"optimizer": {"lr": 0.1}}, 1.5, 0.05
    ),
    repairable=True,
    cured=learns(0.6),
)
def _scaled_twice(config: Config) -> Job:
    net = Community()
    return job(net, F.cross_entropy, config, net.data(6000))


@fault(
    "fresh_segmentation_fine_tuned_with_another_rate_from_100",
    "cnn",
    cause=("learning_rate_too_high", "scheduler_misuse"),
    found=_FAST,
    onset=100,
    config=steps(190, optimizer={"lr": 2e-3}),
    verify=both(_leaps(100, 20.0), worse_since(100, 1.5)),
)
def _other_rate(config: Config) -> Job:
    tensors = discs(1200, noise=0.6)
    loss = F.binary_cross_entropy_with_logits
    return job(UNet(6), loss, config, tensors, plans={100: times_rate(250.0)})


@fault(
    "fresh_recommender_rate_restored_without_its_exponent_at_110",
    "recommender",
    cause=("learning_rate_too_high", "update_too_large", "scheduler_misuse"),
    found=_FAST,
    onset=110,
    config=steps(200, optimizer={"_target_": "torch.optim.RMSprop", "lr": 1e-2}),
    verify=both(_leaps(110, 20.0), worse_since(110, 1.5)),
)
def _without_exponent(config: Config) -> Job:
    return job(Factors(), F.mse_loss, config, ratings(4800), plans={110: times_rate(300.0)})


_SLOW = ("update_too_small", "slow_convergence", "not_learning", "loss_plateau", "frozen_weights")


@fault(
    "fresh_segmentation_adadelta_with_the_rate_of_adam",
    "cnn",
    cause=("learning_rate_too_low", "update_too_small"),
    found=_SLOW,
    config=steps(200, optimizer={"_target_": "torch.optim.Adadelta", "lr": 1e-3}),
    verify=worse_than(
        "fresh_segmentation_adadelta_with_the_rate_of_adam", {"optimizer": {"lr": 1.0}}
    ),
    repairable=True,
    cured=learns(0.7),
)
def _adadelta(config: Config) -> Job:
    return job(UNet(6), F.binary_cross_entropy_with_logits, config, discs(1200))


@fault(
    "fresh_graph_sgd_with_the_rate_of_adam",
    "gnn",
    cause=("learning_rate_too_low", "update_too_small"),
    found=_SLOW,
    config=steps(220, optimizer={"_target_": SGD, "lr": 3e-4}),
    verify=worse_than("fresh_graph_sgd_with_the_rate_of_adam", {"optimizer": {"lr": 0.3}}),
    repairable=True,
    cured=learns(0.7),
)
def _sgd_slow(config: Config) -> Job:
    net = Community(layers=3, width=32)
    return job(net, F.cross_entropy, config, net.data(4000))


@fault(
    "fresh_language_from_scratch_with_the_rate_of_fine_tuning",
    "transformer",
    cause=("learning_rate_too_low", "update_too_small"),
    found=(*_SLOW, "attention_uniform"),
    config=steps(220, optimizer={"_target_": "torch.optim.AdamW", "lr": 5e-6}),
    verify=worse_than(
        "fresh_language_from_scratch_with_the_rate_of_fine_tuning",
        {"optimizer": {"lr": 5e-3}},
        1.2,
        0.05,
    ),
    repairable=True,
    cured=learns(0.85),
)
def _from_scratch(config: Config) -> Job:
    return job(Language(), each_word, config, sentences(2400))


@fault(
    "fresh_table_rate_ten_times_too_small",
    "mlp",
    cause=("learning_rate_too_low", "slow_convergence", "update_too_small"),
    found=("not_learning", "loss_plateau"),
    config=steps(250, optimizer={"_target_": SGD, "lr": 0.02, "momentum": 0.5}),
    verify=worse_than(
        "fresh_table_rate_ten_times_too_small", {"optimizer": {"lr": 0.3}}, 1.2, 0.05
    ),
    repairable=True,
    cured=learns(0.85),
)
def _table_slow(config: Config) -> Job:
    loss = F.binary_cross_entropy_with_logits
    return job(Table(), loss, config, table(4000))


# ---- schedules ----


class WaitsForMore(Learner):
    """Its rate falls when the loss no longer rises: ``max``, as it was for an accuracy."""

    def on_train_start(self) -> None:
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.trainer.optimizers[0], mode="max", factor=0.3, patience=0
        )
        self.sum = 0.0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sum += float(outputs["loss"])
        if self.global_step % 10 == 0:
            self.plateau.step(self.sum / 10)
            self.sum = 0.0


def _rate_falls_early(witness: Witness) -> None:
    assert witness.rates[60] < 0.05 * witness.rates[0], f"the rate is {witness.rates[60]:.3g}"


@fault(
    "fresh_digits_plateau_schedule_waits_for_a_maximum",
    "cnn",
    cause=("scheduler_misuse", "learning_rate_too_low"),
    found=_SLOW,
    onset=20,
    config=steps(220, optimizer={"_target_": SGD, "lr": 0.1}),
    verify=both(
        _rate_falls_early,
        # by a plain loop, which has no such schedule
        worse_than("fresh_digits_plateau_schedule_waits_for_a_maximum", {}),
    ),
)
def _maximum(config: Config) -> Job:
    x, y = digits()
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3), nn.ReLU(), nn.Flatten()
    )
    net = nn.Sequential(net, nn.Linear(24 * 16, 10))
    return Job(WaitsForMore(net, F.cross_entropy, config), data.loader(x, y))


def _warms_up_again(optimizer: torch.optim.Optimizer) -> Any:
    def factor(step: int) -> float:
        # taken up again at 110 with a count of its own, for a run of a million steps
        return min(1.0, (step + 1) / 20) if step < 110 else (step - 109) / 50_000

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _hardly_moves_since(step: int) -> Verify:
    def verify(witness: Witness) -> None:
        before, after = sum(witness.moves[step - 20 : step]), sum(witness.moves[step:])
        assert after < 0.05 * before, f"it moves by {after:.3g} after {before:.3g}"
        assert witness.rates[step] < 1e-3 * max(witness.rates)

    return verify


@fault(
    "fresh_language_warm_up_begins_again_at_110",
    "transformer",
    cause=("scheduler_misuse", "learning_rate_too_low", "update_too_small"),
    found=("frozen_weights", "loss_plateau", "slow_convergence"),
    onset=110,
    config=steps(220, optimizer={"lr": 3e-4}),
    verify=_hardly_moves_since(110),
)
def _warm_up_again(config: Config) -> Job:
    net = Language(16, 32, layers=2, heads=4)
    tensors = sentences(2400, kinds=16, seed=216)
    return job(net, each_word, config, tensors, schedule=_warms_up_again)


@fault(
    "fresh_autoencoder_gamma_of_epochs_every_step",
    "autoencoder",
    cause="scheduler_misuse",
    found=(*_SLOW, "learning_rate_too_low"),
    config={
        "trainer": {"max_steps": 220},
        "optimizer": {"lr": 2e-3},
        "model": {"schedule": "exponential", "schedule_factor": 0.9},
    },
    verify=worse_than(
        "fresh_autoencoder_gamma_of_epochs_every_step",
        {"model": {"schedule": "constant"}},
        1.5,
        0.01,
    ),
    repairable=True,
    cured=learns(0.4),
)
def _gamma(config: Config) -> Job:
    x, _ = digits()
    x = x.flatten(1)
    return job(Autoencoder(64, 12, "gelu"), F.mse_loss, config, (x, x), outputs="loss")


# ---- losses ----


class Speech(nn.Module):
    """Logarithms of the chances of letters, and of none, at every moment."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).log_softmax(-1)


def _ctc(said: Tensor, target: Tensor) -> Tensor:
    moments = torch.full((len(said),), said.shape[1])
    # the first number is how many letters there are
    return F.ctc_loss(said.transpose(0, 1), target[:, 1:], moments, target[:, 0])


def _spoken(samples: int, seed: int = 217) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    letters = torch.randint(1, 6, (samples, 4), generator=g)
    x = F.one_hot(letters.repeat_interleave(3, 1), 6).float()
    x = x + 0.3 * torch.randn(x.shape, generator=g)
    counts = torch.full((samples, 1), 4)
    return x, torch.cat([counts, letters, torch.ones(samples, 12, dtype=torch.long)], 1)


@fault(
    "fresh_speech_text_longer_than_the_sound_at_120",
    "gru",
    cause="nonfinite_loss",
    found=("nonfinite_gradient",),
    onset=120,
    config=steps(170),
    verify=breaks(120, 120),
)
def _longer_text(config: Config) -> Job:
    x, target = _spoken(170 * 32)
    target[120 * 32 + 9, 0] = 16
    return Job(Learner(Speech(), _ctc, config), data.loader(x, target, shuffle=False))


def _relative_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return (wanted * (wanted / logits.softmax(-1)).log()).sum(-1).mean()


@fault(
    "fresh_digits_relative_entropy_of_hard_labels",
    "mlp",
    cause=("nonfinite_loss", "nonfinite_gradient"),
    config=steps(150),
    verify=breaks(0, 0),
)
def _hard_labels(config: Config) -> Job:
    x, y = digits()
    net = nn.Sequential(nn.Flatten(), MLP([64, 40, 10], "gelu"))
    return job(net, _relative_entropy, config, (x, F.one_hot(y, 10).float()))


@fault(
    "fresh_forecast_sensor_fails_for_two_batches_at_120",
    "rnn",
    cause=("loss_spike", "input_scale", "exploding_gradient", "loss_target_mismatch"),
    found=("update_too_large", "divergence"),
    onset=120,
    config=steps(210, optimizer={"_target_": SGD, "lr": 0.05}),
    verify=lambda w: _one_spike(w),
)
def _sensor(config: Config) -> Job:
    x, y = series(210 * 32)
    order = torch.randperm(210 * 32, generator=torch.Generator().manual_seed(218))
    x, y = x[order], y[order]
    y[120 * 32 : 122 * 32 : 3] = -99.0
    model = Learner(Forecaster(), F.smooth_l1_loss, config)
    return Job(model, data.loader(x, y, shuffle=False))


def _one_spike(witness: Witness) -> None:
    before, top = witness.mean_loss(100, 120), max(witness.losses[120:123])
    assert top > 20 * before, f"the loss goes from {before:.3g} to {top:.3g}"
    assert tail(witness.losses) < top / 5, "it does not come back"


def _swings(since: int, batches: int) -> Verify:
    def verify(witness: Witness) -> None:
        part = torch.tensor(witness.losses[since:])
        means = part[: len(part) // batches * batches].view(-1, batches).mean(1)
        wide = float(means.std() / means.mean())
        assert wide > 0.4, f"the loss differs by {wide:.2f} of its mean only"

    return verify


@fault(
    "fresh_digits_shuffle_lost_at_120",
    "mlp",
    cause=("loss_oscillation", "loss_spike"),
    found=("divergence", "not_learning", "constant_prediction", "exploding_gradient"),
    onset=120,
    config=steps(260, optimizer={"_target_": SGD, "lr": 0.05, "momentum": 0.9}),
    verify=_swings(125, 1),
)
def _shuffle_lost(config: Config) -> Job:
    x, y = digits()
    g = torch.Generator().manual_seed(219)
    mixed = torch.randint(len(x), (120 * 32,), generator=g)
    # as the files lie on the disk: one class after the other, over and over
    by_class = torch.cat([(y == k).nonzero()[:160, 0] for k in range(10)])
    order = torch.cat([mixed, by_class.repeat(3)[: 140 * 32]])
    net = nn.Sequential(nn.Flatten(), MLP([64, 64, 10], "gelu"))
    model = Learner(net, F.cross_entropy, config)
    return Job(model, data.loader(x[order], y[order], shuffle=False))


@fault(
    "fresh_table_rows_come_by_site",
    "mlp",
    cause="loss_oscillation",
    found=("not_learning", "loss_plateau", "slow_convergence", "loss_spike", "divergence"),
    config=steps(240, optimizer={"lr": 1e-2}),
    verify=_swings(40, 5),
)
def _by_site(config: Config) -> Job:
    x, kind, _ = table(240 * 32)
    site = torch.arange(240 * 32) // (32 * 12) % 4
    y = x[:, :1].sin() + 5.0 * (site[:, None].float() - 1.5)
    loader = data.loader(x, kind, y, shuffle=False)
    return Job(Learner(Table(), F.mse_loss, config), loader)


@fault(
    "fresh_picture_from_plain_coordinates",
    "mlp",
    cause=("loss_plateau", "not_learning", "slow_convergence"),
    found=("constant_prediction", "representation_collapse"),
    config=steps(260, optimizer={"lr": 1e-3}, hardware={"batch_size": 128}),
    verify=lambda w: _explains_nothing(w),
)
def _plain_coordinates(config: Config) -> Job:
    tensors = field(12000, frequency=12.0)
    return job(MLP([2, 64, 64, 1]), F.mse_loss, config, tensors)


def _explains_nothing(witness: Witness) -> None:
    *_, y = witness.batch
    left = tail(witness.losses) / float(y.var())
    assert left > 0.9, f"{left:.2f} of the variance is left"


class AnyOrder(Learner):
    """Its columns come in any order, batch by batch, once the list of them became a set."""

    since = 110

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        x, *rest = batch
        if self.global_step >= self.since:
            x = x[:, torch.randperm(x.shape[1])]
        return super().training_step([x, *rest], batch_idx)


@fault(
    "fresh_table_columns_in_any_order_from_110",
    "mlp",
    cause=("divergence", "loss_spike", "loss_plateau", "not_learning"),
    found=("constant_prediction", "loss_oscillation", "exploding_gradient"),
    onset=110,
    config=steps(220, optimizer={"lr": 5e-3}),
    verify=worse_since(110, 1.3),
)
def _any_order(config: Config) -> Job:
    loss = F.binary_cross_entropy_with_logits
    return Job(AnyOrder(Table(), loss, config), data.loader(*table(4000)))


class Viewed(Forecaster):
    """Brings time to the front by a view, which mixes the samples."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, f = x.shape
        self.rnn.batch_first = False
        return self.head(self.rnn(x.reshape(t, b, f))[0][-1])


@fault(
    "fresh_sequences_viewed_where_transposed_was_meant",
    "rnn",
    cause=("not_learning", "loss_plateau"),
    found=("constant_prediction", "slow_convergence", "representation_collapse"),
    config=steps(240),
    verify=lambda w: _still_guesses(w),
)
def _viewed(config: Config) -> Job:
    x, y = data.sequences(4000, time=14, features=3, seed=220)
    return job(Viewed(3, 24, 2), F.cross_entropy, config, (x, y))


def _still_guesses(witness: Witness) -> None:
    assert tail(witness.losses) > 0.6, f"the loss ends at {tail(witness.losses):.3g}"


@fault(
    "fresh_retrieval_answers_one_row_off",
    "contrastive",
    cause=("not_learning", "loss_plateau"),
    found=("constant_prediction", "slow_convergence", "representation_collapse"),
    config=steps(220, optimizer={"lr": 1e-3}),
    verify=lambda w: _no_pair_found(w),
)
def _one_row_off(config: Config) -> Job:
    questions, answers = data.pairs(8000, first=16, second=16, seed=221)
    tensors = (questions, answers.roll(1, 0), torch.zeros(8000))
    return job(Towers(16, 16, width=20), contrastive_loss, config, tensors, outputs="loss")


def _no_pair_found(witness: Witness) -> None:
    assert tail(witness.losses) > 0.97 * math.log(32), f"it ends at {tail(witness.losses):.3g}"


def _further(codes: Tensor, kind: Tensor) -> Tensor:
    """Nearer to the next of the same kind, further from the others: without any margin."""
    far = torch.cdist(codes, codes)
    same = (kind[:, None] == kind).float()
    return (far * same).sum() / same.sum() - (far * (1 - same)).sum() / (1 - same).sum()


@fault(
    "fresh_metric_learning_without_margin",
    "mlp",
    cause=("divergence", "loss_target_mismatch", "exploding_gradient"),
    found=("update_too_large", "loss_oscillation", "input_scale"),
    config=steps(260, optimizer={"lr": 5e-3}),
    verify=lambda w: _without_bound(w),
)
def _without_margin(config: Config) -> Job:
    x, y = digits()
    net = nn.Sequential(nn.Flatten(), MLP([64, 64, 64, 16]))
    return job(net, _further, config, (x, y), outputs="loss")


def _without_bound(witness: Witness) -> None:
    middle, end = witness.mean_loss(120, 140), witness.mean_loss(-20)
    assert end < 3 * middle < -10, f"the loss goes from {middle:.3g} to {end:.3g}"


def _decays_backwards(learner: Learner) -> None:
    learner.trainer.optimizers[0].param_groups[0]["weight_decay"] = -12.0


@fault(
    "fresh_waveform_decay_with_a_minus_sign_from_100",
    "cnn",
    cause=("divergence", "exploding_gradient", "update_too_large"),
    found=("loss_spike", "not_learning", "loss_oscillation", "learning_rate_too_high"),
    onset=100,
    config=steps(220, optimizer={"_target_": "torch.optim.AdamW", "lr": 2e-3}),
    verify=both(worse_since(130, 3.0), lambda w: _weights_grow(w)),
)
def _minus_sign(config: Config) -> Job:
    net = Waveform(4, (16, 24), "gelu", norm=False)
    tensors = waves(2400, classes=4, noise=1.2)
    return job(net, F.cross_entropy, config, tensors, plans={100: _decays_backwards})


def _weights_grow(witness: Witness) -> None:
    size = [
        sum(float(x.double().square().sum()) for x in state.values()) ** 0.5
        for state in (witness.first, witness.last)
    ]
    assert size[1] > 5 * size[0], f"the weights go from {size[0]:.3g} to {size[1]:.3g}"


def _gets_worse(factor: float) -> Verify:
    def verify(witness: Witness) -> None:
        values = [value for _, value in witness.val_losses]
        low = min(values)
        assert values[-1] > factor * low, f"from {low:.3g} to {values[-1]:.3g}"
        assert tail(witness.losses) < 0.5 * witness.mean_loss(0, 5)

    return verify


@fault(
    "fresh_patches_hundred_digits_some_misnamed",
    "transformer",
    cause="overfitting",
    onset=60,
    config={
        "trainer": {"max_steps": 300, "val_check_interval": 20},
        "optimizer": {"lr": 3e-3},
        "hardware": {"batch_size": 20},
    },
    verify=_gets_worse(1.3),
)
def _hundred_digits(config: Config) -> Job:
    x, y = digits()
    wrong = torch.rand(len(y), generator=torch.Generator().manual_seed(224)) < 0.2
    y = torch.where(wrong, (y + 3) % 10, y)
    train = data.loader(x[:100], y[:100], batch_size=20)
    val = data.loader(x[100:700], y[100:700], batch_size=200, shuffle=False)
    return Job(Learner(Patches(), F.cross_entropy, config), train, val)


@fault(
    "fresh_cells_of_sixty_people_with_second_opinions",
    "mlp",
    cause="overfitting",
    onset=20,
    config={
        "trainer": {"max_steps": 260, "val_check_interval": 20},
        "optimizer": {"lr": 2e-3},
        "hardware": {"batch_size": 20},
    },
    verify=_gets_worse(1.5),
)
def _sixty_people(config: Config) -> Job:
    x, y = cells()
    x = (x - x.mean(0)) / x.std(0)
    other = torch.rand(len(y), generator=torch.Generator().manual_seed(222)) < 0.2
    y = torch.where(other, 1 - y, y)
    train = data.loader(x[:60], y[:60], batch_size=20)
    val = data.loader(x[60:], y[60:], batch_size=100, shuffle=False)
    return Job(Learner(MLP([30, 128, 128, 2]), F.cross_entropy, config), train, val)


class ClampedGAN(GAN):
    """A critic of Wasserstein, whose weights are kept within bounds that are far too near."""

    bound = 1e-3

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        real = batch[0]
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4))
        loss = self.discriminator(fake.detach()).mean() - self.discriminator(real).mean()
        self._step(second, loss, "critic_loss")
        with torch.no_grad():
            for parameter in self.discriminator.parameters():
                parameter.clamp_(-self.bound, self.bound)
        self._step(first, -self.discriminator(fake).mean(), "generator_loss")


def _generator_is_told_nothing(witness: Witness) -> None:
    worst = max(norm_of(witness, s, "generator") for s in range(20, len(witness.norms), 2))
    assert worst < 1e-4, f"the generator has a gradient of {worst:.3g}"
    with torch.no_grad():
        made = witness.model.generator(torch.randn(400, 4))
    apart = float((made.std(0) - witness.batch[0].std(0)).norm())
    assert apart > 0.5, f"it learns all the same: {apart:.3g}"


@fault(
    "fresh_gan_critic_within_a_thousandth",
    "gan",
    cause=("vanishing_gradient", "update_too_small", "frozen_weights", "gradient_imbalance"),
    found=("not_learning", "dead_component", "constant_prediction", "representation_collapse"),
    config=steps(300, optimizer={"_target_": SGD, "lr": 0.01}),
    verify=_generator_is_told_nothing,
)
def _clamped(config: Config) -> Job:
    x, _ = data.blobs(4800, features=2, classes=5, seed=223)
    return Job(ClampedGAN(config, width=32), data.loader(x))


# ---- machine ----


class Timed(Learner):
    """Rests in a step as for a device, and notes when batches begin and end.

    Args:
        rest: Seconds of rest.
    """

    def __init__(self, *args: Any, rest: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self.rest = rest
        self.times: list[tuple[float, float]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.began = time.perf_counter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.rest)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append((self.began, time.perf_counter()))


def _share_of_waiting(witness: Witness, since: int) -> float:
    times = witness.model.times[since:]
    waits = sum(after[0] - before[1] for before, after in pairwise(times))
    return waits / (times[-1][1] - times[0][0])


def _waits(since: int = 5) -> Verify:
    def verify(witness: Witness) -> None:
        share = _share_of_waiting(witness, since)
        assert share > 0.45, f"only {share:.2f} of the time is waiting"

    return verify


def _waits_no_more(witness: Witness) -> None:
    share = _share_of_waiting(witness, 10)
    assert share < 0.45, f"{share:.2f} of the time is waiting still"


def _loads(config: Config, dataset: Slow) -> DataLoader:
    hardware = config["hardware"]
    workers = hardware["num_workers"]
    return DataLoader(
        dataset,
        batch_size=hardware["batch_size"],
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )


@fault(
    "fresh_waveform_augments_in_the_training_process",
    "cnn",
    cause="input_bound",
    config={"trainer": {"max_steps": 160}, "hardware": {"batch_size": 12}},
    verify=_waits(),
    repairable=True,
    cured=_waits_no_more,
)
def _augments(config: Config) -> Job:
    dataset = Slow(*waves(2400), seconds=0.002)
    model = Timed(Waveform(3), F.cross_entropy, config, rest=0.012)
    return Job(model, _loads(config, dataset))


@fault(
    "fresh_segmentation_files_are_far_from_90_on",
    "cnn",
    cause="input_bound",
    onset=90,
    config={"trainer": {"max_steps": 180}, "hardware": {"batch_size": 8}},
    verify=_waits(92),
)
def _far_files(config: Config) -> Job:
    dataset = Slow(*discs(1600), seconds=0.006, since=90 * 8)
    model = Timed(UNet(4), F.binary_cross_entropy_with_logits, config, rest=0.006)
    return Job(model, _loads(config, dataset))


def _maps(learner: Learner, batch: list[Tensor]) -> object:
    # what each layer gave, to be looked at when the epoch is over
    x = batch[0].repeat(6, 1)
    kept = [learner.net.embedding(x)]
    for block in learner.net.blocks:
        kept.append(block(kept[-1]))
    return kept


def _fills(since: int, least: float) -> Verify:
    def verify(witness: Witness) -> None:
        sizes = witness.model.sizes
        middle = (since + len(sizes)) // 2
        for low, high in ((sizes[since + 10], sizes[middle]), (sizes[middle], sizes[-1])):
            grown = (high - low) / 2**20
            assert grown > least, f"it grows by {grown:.0f} MiB"

    return verify


@fault(
    "fresh_language_keeps_what_layers_gave_from_70",
    "transformer",
    cause="memory_growth",
    onset=70,
    config=steps(200, optimizer={"lr": 2e-3}),
    verify=_fills(70, 50.0),
)
def _keeps_layers(config: Config) -> Job:
    model = Keeping(Language(), each_word, config, keep=_maps, since=70, pause=0.015)
    return Job(model, data.loader(*sentences(3000)))


def _history(learner: Learner, batch: list[Tensor]) -> object:
    # the running loss, with the graph of each step
    return learner.loss(learner.net(*batch[:-1]), batch[-1])


@fault(
    "fresh_segmentation_adds_losses_with_their_graphs",
    "cnn",
    cause="memory_growth",
    config=steps(150),
    verify=_fills(0, 50.0),
)
def _adds_losses(config: Config) -> Job:
    loss = F.binary_cross_entropy_with_logits
    model = Keeping(UNet(6), loss, config, keep=_history, pause=0.01)
    return Job(model, data.loader(*discs(1200)))
