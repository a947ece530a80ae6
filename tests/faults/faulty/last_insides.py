"""Faults in networks and wiring by one more stranger."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import data
from tests.faults.case import Config, Job, fault
from tests.faults.evidence import answer, seen, share, silent_units
from tests.faults.faulty._shared import SGD, both, job, learns, low_rank, times_rate, worse_than
from tests.faults.faulty.fresh_tasks import (
    constant_answers,
    digits,
    each_word,
    ends_above,
    gradient_grows_at,
    no_gradient,
    norm_of,
    sentences,
    sets,
    steps,
    table,
    worse_since,
)
from tests.faults.faulty.last_tasks import (
    Codes,
    Dilated,
    Mixer,
    Penalized,
    Recurrent,
    ResNet,
    Sets,
    Story,
    Tagger,
    WideAndDeep,
    additions,
    clouds,
    horizon,
    plain,
    recalls,
    shapes,
    spirals,
    tags,
    tallies,
)
from tests.faults.networks import Learner
from tests.faults.witness import Witness

Verify = Callable[[Witness], None]

_EFFECTS = (
    *("not_learning", "loss_plateau", "slow_convergence", "constant_prediction"),
    *("vanishing_gradient", "dead_component", "representation_collapse", "gradient_imbalance"),
)

# ---- wiring ----


class ClearsAtFirst(Learner):
    """Sets gradients to zero in the first steps alone."""

    until = 100

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        # a condition that was meant for accumulation
        if self.global_step < self.until:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)


@fault(
    "last_mixer_clears_gradients_until_100",
    "mlp",
    cause="missing_zero_grad",
    found=(
        *("exploding_gradient", "loss_oscillation", "divergence", "update_too_large"),
        *("learning_rate_too_high", "loss_spike", "not_learning"),
    ),
    onset=100,
    config=steps(200, optimizer={"_target_": SGD, "lr": 0.1}),
    verify=gradient_grows_at(110, 2.0),
)
def _clears(config: Config) -> Job:
    x, y = digits()
    return Job(ClearsAtFirst(Mixer(layers=2), F.cross_entropy, config), data.loader(x, y))


@fault(
    "last_tags_words_looked_up_without_graph_from_100",
    "rnn",
    cause="detached_graph",
    found=("frozen_weights", "dead_component", "update_too_small", "vanishing_gradient"),
    onset=100,
    config=steps(190),
    verify=no_gradient("net.words", 100),
)
def _without_graph(config: Config) -> Job:
    plans = {100: sets("blind", True)}
    return job(Tagger(), each_word, config, tags(2400), plans=plans)


class Listed(Mixer):
    """Keeps its layers in a plain list, where no optimizer finds them."""

    def stack(self, layers: list[nn.Module]) -> Sequence[nn.Module]:
        return layers


def _list_learns_nothing(witness: Witness) -> None:
    net = witness.model.net
    names = [name for name, _ in net.named_parameters()]
    assert not any(name.startswith(("places", "features")) for name in names)
    # the gradients of all steps are still there
    assert float(net.places[0][0].weight.grad.norm()) > 0


@fault(
    "last_mixer_layers_in_a_plain_list",
    "mlp",
    cause=("unoptimized_parameter", "detached_graph"),
    found=("slow_convergence", "not_learning", "missing_zero_grad"),
    config=steps(180, optimizer={"lr": 2e-3}),
    verify=_list_learns_nothing,
)
def _plain_list(config: Config) -> Job:
    return job(Listed(), F.cross_entropy, config, digits())


class Decays(Learner):
    """Has two groups, for what decays and what does not, and gives only the first."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": [], "weight_decay": 0.05}, {"params": [], "weight_decay": 0.0}]
        for parameter in self.parameters():
            groups[parameter.dim() < 2]["params"].append(parameter)
        return torch.optim.AdamW(groups[:1], lr=self.config["optimizer"]["lr"])


def _small_stay(witness: Witness) -> None:
    for name, parameter in witness.model.named_parameters():
        assert witness.changed(name) == (parameter.dim() > 1), name


@fault(
    "last_shapes_norms_and_biases_in_no_group",
    "cnn",
    cause="unoptimized_parameter",
    found=("frozen_weights", "missing_zero_grad"),
    config=steps(180, optimizer={"lr": 2e-3}),
    verify=_small_stay,
)
def _no_group(config: Config) -> Job:
    x, y = shapes(2400)
    return Job(Decays(ResNet(), F.cross_entropy, config), data.loader(x, y))


@fault(
    "last_shapes_way_around_never_called",
    "cnn",
    cause="unused_parameter",
    found=("dead_component", "frozen_weights", "slow_convergence"),
    config=steps(180, optimizer={"lr": 2e-3}),
    verify=no_gradient("net.blocks.1.around"),
)
def _never_called(config: Config) -> Job:
    net = ResNet()
    net.blocks[1].called = False
    return job(net, F.cross_entropy, config, shapes(2400))


def _draws(learner: Learner) -> None:
    # for a figure of what the network sees, as it is in evaluation
    learner.net.eval()


def _statistics_stay(witness: Witness) -> None:
    assert int(witness.last["net.stem.1.num_batches_tracked"]) == 100
    assert not witness.model.net.stem.training


@fault(
    "last_shapes_figure_leaves_evaluation_at_100",
    "cnn",
    cause="eval_mode_in_training",
    found=("loss_spike", "divergence", "exploding_gradient", "loss_oscillation"),
    onset=100,
    config=steps(190, optimizer={"lr": 2e-3}),
    verify=_statistics_stay,
)
def _figure(config: Config) -> Job:
    x, y = shapes(2400)
    model = Learner(ResNet(), F.cross_entropy, config, plans={100: _draws})
    return Job(model, data.loader(x, y))


def _resizes(learner: Learner) -> None:
    # a new head with the old weights, and known to the optimizer
    net = learner.net
    net.head.weight = nn.Parameter(net.words.weight.detach().clone())
    learner.trainer.optimizers[0].add_param_group({"params": [net.head.weight]})


def _drift_apart(witness: Witness) -> None:
    net = witness.model.net
    assert net.head.weight is not net.words.weight
    head, words = net.head.weight.detach(), net.words.weight.detach()
    apart = float((head - words).norm() / words.norm())
    assert apart > 0.01, f"they differ by {apart:.3g}"


@fault(
    "last_story_tie_lost_on_resizing_at_95",
    "transformer",
    cause="tied_weight_broken",
    onset=95,
    config=steps(190, optimizer={"lr": 2e-3}),
    verify=_drift_apart,
)
def _resized(config: Config) -> Job:
    model = Learner(Story(14, tied=True), each_word, config, plans={95: _resizes})
    return Job(model, data.loader(*sentences(3000, kinds=14, seed=513)))


def _keeps_words(learner: Learner) -> None:
    times_rate(0.0, "words")(learner)
    learner.kept = learner.net.words.weight.detach().clone()


def _words_stay(witness: Witness) -> None:
    model = witness.model
    assert torch.equal(model.kept, model.net.words.weight)
    assert not torch.equal(model.kept, witness.first["net.words.weight"])


@fault(
    "last_tags_words_get_a_rate_of_zero_at_100",
    "rnn",
    cause=("frozen_weights", "update_too_small", "scheduler_misuse", "learning_rate_too_low"),
    found=("frozen_in_optimizer",),
    onset=100,
    config={**steps(190), "component_lrs": {"words": 1.0}},
    verify=_words_stay,
)
def _zero_rate(config: Config) -> Job:
    made = job(Tagger(), each_word, config, tags(2400), plans={100: _keeps_words})
    parts = {"words": "net.words", "rnn": "net.rnn", "head": "net.head"}
    return Job(made.model, made.train, made.val, parts)


# ---- activations ----


def _most_are_silent(witness: Witness) -> None:
    part = silent_units(seen(witness, nn.ReLU))
    assert part > 0.5, f"only {part:.2f} of the units are silent"


@fault(
    "last_spirals_weights_drawn_below_zero",
    "mlp",
    cause="dead_relu",
    found=_EFFECTS,
    config=steps(180, optimizer={"lr": 1e-3}),
    verify=both(_most_are_silent, ends_above(0.9)),
)
def _drawn(config: Config) -> Job:
    net = plain([2, 48, 48, 48, 3], nn.ReLU)
    for layer in net[2:]:
        if isinstance(layer, nn.Linear):
            nn.init.uniform_(layer.weight, -0.5, 0.0)
    return job(net, F.cross_entropy, config, spirals(2400))


def _at_limits(witness: Witness) -> None:
    part = share(seen(witness, nn.Tanh), lambda x: x.abs() > 0.98)
    assert part > 0.6, f"only {part:.2f} of the outputs are at their limits"


@fault(
    "last_spirals_tanh_weights_forty_times_too_large",
    "mlp",
    cause="saturated_activation",
    found=(*_EFFECTS, "exploding_gradient"),
    config=steps(220, optimizer={"lr": 3e-3}, model={"init_scale": 40.0}),
    verify=both(
        _at_limits,
        worse_than(
            "last_spirals_tanh_weights_forty_times_too_large", {"model": {"init_scale": 1.0}}
        ),
    ),
    repairable=True,
    cured=learns(0.7),
)
def _forty_times(config: Config) -> Job:
    net = plain([2, 48, 48, 48, 3], nn.Tanh)
    with torch.no_grad():
        for layer in net[:-1]:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(config["model"]["init_scale"])
    return job(net, F.cross_entropy, config, spirals(2400))


# ---- gradients ----


def _huge(witness: Witness) -> None:
    middle = sorted(witness.norms[:20])[10]
    assert not middle < 1e3, f"the gradient is {middle:.3g}"


@fault(
    "last_additions_rectified_recurrence_grows",
    "rnn",
    cause="exploding_gradient",
    found=(
        *("nonfinite_gradient", "nonfinite_loss", "divergence", "loss_spike", "update_too_large"),
        *("learning_rate_too_high", "gradient_imbalance", "loss_oscillation", "not_learning"),
    ),
    config=steps(180, optimizer={"lr": 1e-3}),
    verify=_huge,
)
def _grows(config: Config) -> Job:
    return job(Recurrent(gain=1.4), F.mse_loss, config, additions(2400))


def _fades(witness: Witness) -> None:
    for step in (0, 40, 80):
        ratio = norm_of(witness, step, "net.0.") / norm_of(witness, step, "net.50.")
        assert ratio < 1e-4, f"the first layer has {ratio:.2g} of the gradient of the last"


@fault(
    "last_spirals_twenty_five_silu_layers",
    "mlp",
    cause="vanishing_gradient",
    found=_EFFECTS,
    config=steps(180, optimizer={"lr": 1e-3}),
    verify=both(_fades, ends_above(1.05)),
)
def _silu_layers(config: Config) -> Job:
    return job(plain([2, *[24] * 25, 3]), F.cross_entropy, config, spirals(2400))


@fault(
    "last_shapes_clipped_at_a_thousandth",
    "cnn",
    cause="clipping_dominates",
    found=("not_learning", "loss_plateau", "slow_convergence", "update_too_small"),
    config={
        "trainer": {"max_steps": 180, "gradient_clip_val": 1e-3},
        "optimizer": {"_target_": SGD, "lr": 0.05, "momentum": 0.9, "nesterov": True},
    },
    verify=worse_than(
        "last_shapes_clipped_at_a_thousandth", {"trainer": {"gradient_clip_val": None}}
    ),
    repairable=True,
    cured=learns(0.6),
)
def _clipped(config: Config) -> Job:
    return job(ResNet(), F.cross_entropy, config, shapes(2400))


class Measured(Sets):
    """Joins to the mean the deviation over the points, and shields the root by a condition."""

    def __init__(self, classes: int = 3, width: int = 32) -> None:
        super().__init__(classes, width)
        self.whole = plain([2 * width, width, classes], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        y = self.point(x)
        mean = y.mean(1)
        variance = (y - mean[:, None]).square().mean(1)
        wide = torch.where(variance > 0, variance.sqrt(), torch.zeros_like(variance))
        return self.whole(torch.cat([mean, wide], -1))


def _gradient_breaks(step: int) -> Verify:
    def verify(witness: Witness) -> None:
        bad = [s for s, norm in enumerate(witness.norms) if not math.isfinite(norm)]
        assert bad[:1] == [step], f"the gradient breaks at {bad[:1]}"
        assert math.isfinite(witness.losses[step]), "the loss breaks with it"

    return verify


@fault(
    "last_clouds_condition_does_not_shield_the_root_at_105",
    "mlp",
    cause="nonfinite_gradient",
    found=("nonfinite_loss",),
    onset=105,
    config=steps(160, optimizer={"lr": 1e-3}),
    verify=_gradient_breaks(105),
)
def _shield(config: Config) -> Job:
    x, y = clouds(160 * 32)
    # no unit is silent for a whole cloud before
    x[105 * 32 + 3] = 0.0
    net = Measured()
    net.point = plain([3, 32, 32], nn.Tanh)
    return Job(Learner(net, F.cross_entropy, config), data.loader(x, y, shuffle=False))


@fault(
    "last_both_columns_deep_part_dropped_from_100",
    "mlp",
    cause="dead_component",
    found=("frozen_weights", "update_too_small", "vanishing_gradient", "gradient_imbalance"),
    onset=100,
    config=steps(190, optimizer={"lr": 5e-3}),
    verify=no_gradient("net.deep", 100),
)
def _dropped(config: Config) -> Job:
    x, kind, y = table(2600, seed=514)
    loss, plans = F.binary_cross_entropy_with_logits, {100: sets("kept", 0.0)}
    return job(WideAndDeep(), loss, config, (x, kind, y), plans=plans)


# ---- codes and answers ----


def _codes_are_nothing(witness: Witness) -> None:
    code = answer(witness)[:, 20:]
    assert float(code.abs().max()) < 0.2, f"a code reaches {float(code.abs().max()):.3g}"
    ends_above(0.5)(witness)


@fault(
    "last_codes_penalty_of_ten",
    "autoencoder",
    cause=("representation_collapse", "constant_prediction"),
    found=("not_learning", "loss_plateau", "vanishing_gradient", "slow_convergence"),
    config=steps(200, optimizer={"lr": 3e-3}),
    verify=_codes_are_nothing,
)
def _penalty(config: Config) -> Job:
    x = low_rank(2400, features=20, latent=5)
    return job(Codes(), Penalized(10.0), config, (x, x), outputs="loss")


class Rescaled(Dilated):
    """Brings its answers back to the scale of the series."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


@fault(
    "last_forecast_scale_is_read_as_zero_from_105",
    "cnn",
    cause=("constant_prediction", "dead_component", "vanishing_gradient"),
    found=("divergence", "loss_spike", "loss_plateau", "not_learning", "frozen_weights"),
    onset=105,
    config=steps(200, optimizer={"lr": 3e-3}),
    verify=both(worse_since(105, 2.0), lambda w: constant_answers(w, w.batch[:1])),
)
def _scale_of_zero(config: Config) -> Job:
    plans = {105: sets("scale", 0.0)}
    return job(Rescaled(), F.mse_loss, config, horizon(4000), plans=plans)


# ---- attention ----


def _cools(learner: Learner) -> None:
    for block in learner.net.blocks:
        block.temperature = 1e-3


def _weights(witness: Witness) -> list[Tensor]:
    """Attention weights ``(batch, heads, queries, keys)`` of each block, by hand."""
    net, found = witness.model.net, []
    x = witness.batch[0]
    length = x.shape[1]
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    queries, keys = (
        [seen(witness, f"net.blocks.{n}.{part}")[0] for n in range(len(net.blocks))]
        for part in ("query", "key")
    )
    for block, query, key in zip(net.blocks, queries, keys, strict=True):
        query, key = (one.unflatten(-1, (4, -1)).transpose(1, 2) for one in (query, key))
        mask = net.mask(x)
        key = key if mask is None else key * mask[:, None, :, None]
        scores = query / block.temperature @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        found.append(scores.masked_fill(ahead, float("-inf")).softmax(-1))
    return found


def _looks_at_one(witness: Witness) -> None:
    for weights in _weights(witness):
        highest = float(weights[:, :, 4:].amax(-1).mean())
        assert highest > 0.9, f"the largest weight is {highest:.2f} in the mean"


@fault(
    "last_story_temperature_of_a_thousandth_from_100",
    "transformer",
    cause="attention_collapse",
    found=(
        *("loss_spike", "divergence", "exploding_gradient", "vanishing_gradient"),
        *("loss_plateau", "slow_convergence", "not_learning", "loss_oscillation"),
    ),
    onset=100,
    config=steps(200, optimizer={"lr": 2e-3}),
    verify=both(_looks_at_one, worse_since(100, 1.2)),
)
def _cooled(config: Config) -> Job:
    net = Story()
    net.head = nn.Linear(32, 3)
    return job(net, each_word, config, tallies(3000), plans={100: _cools})


class Inverted(Story):
    """Multiplies the keys by where the padding is, and not by where it is not."""

    def mask(self, x: Tensor) -> Tensor:
        return (x < 0).float()


def _looks_everywhere(witness: Witness) -> None:
    for weights in _weights(witness):
        last = weights[:, :, -1]
        assert float((last - 1 / last.shape[-1]).abs().max()) < 1e-4
    ends_above(1.2)(witness)


@fault(
    "last_story_keys_times_inverted_mask",
    "transformer",
    cause="attention_uniform",
    found=(
        *("not_learning", "loss_plateau", "slow_convergence", "dead_component"),
        *("vanishing_gradient", "frozen_weights", "update_too_small"),
    ),
    config=steps(200, optimizer={"lr": 3e-3}),
    verify=_looks_everywhere,
)
def _inverted(config: Config) -> Job:
    return job(Inverted(), each_word, config, recalls(3000))
