"""Hydra overrides that try a suggestion, for the keys that a run's configuration really has."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lightning_diag.rules.finding import Finding
from lightning_diag.rules.settings import (
    MISSING,
    adaptive,
    count,
    look_up,
    number,
    optimizer_name,
    rate_key,
    share,
    takes_component_rates,
    word,
)
from lightning_diag.rules.unusual_settings import large_factors, small_steps, unusual_settings

__all__ = [
    "boost_component",
    "calm_start",
    "calm_steps",
    "change_activation",
    "fewer_accumulated",
    "larger_init",
    "leave_half_precision",
    "loosen_clip",
    "lower_rate",
    "more_accumulated",
    "more_workers",
    "quicken",
    "raise_rate",
    "regularize",
    "revive_units",
    "set_warmup",
    "smaller_init",
    "standardize_data",
    "steady_schedule",
    "strengthen_gradient",
    "usual_settings",
]

_USUAL_UPDATE = 1e-2
"""Update over weight at which a rate is no longer too large; Karpathy 2019 aims at 1e-3."""
_LIVELY_UPDATE = 3e-3
"""Update over weight to which a rate that is too low is raised.

Of Adam and its kin; the updates of SGD shrink with the gradient, so there it is `_USUAL_UPDATE`.
"""
_LOST_UPDATE = 2.0**-8
"""Update over weight below which weights of 8 bits (bfloat16) mostly stay as they are."""
_LOWERED = (0.01, 0.5)
_LEAST_RAISE = 2.0
_LARGEST_RAISE = 10_000.0
_GENTLE = 0.3
_AFTER_A_JUMP = 0.03
_LARGEST_ADAPTIVE_RATE = 1e-2
_SAFE_ADAPTIVE_RATE = 3e-3
_LARGEST_RATE = 1.0
_TINY_RATE = 1e-4
_TINY_ADAPTIVE_RATE = 1e-5
_MOST_OF_A_COMPONENT = 1000.0
_WARMUP = 0.1
_LONG_WARMUP = 0.3
_MOST_WORKERS = 16
_MANY_ACCUMULATED = 8
_TIGHT_CLIP = 0.1
_MOST_DROPOUT = 0.5
_BOOST = 3.0
_HALVES = ("16", "16-mixed", "16-true")
_WHOLE_HALVES = ("16-true", "bf16-true")
_SQUASHING = ("tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign")


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _update(finding: Finding) -> float | None:
    """The size of an update over that of the weights, where that is what was observed."""
    observed = finding.observed
    if observed is None or not math.isfinite(observed) or observed <= 0:
        return None
    return observed if "update" in finding.unit or "step size" in finding.unit else None


# ---- learning rate ----


def lower_rate(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """A learning rate as much lower as the evidence says, 0.01 to 0.5 times the old one.

    The size of an update grows with the rate: where its share of the weights was observed, that is
    brought down to 0.01. A loss that a step throws off grows with the square of the step: where
    that was observed, 0.3 over the root of how many times it is above its threshold, but not below
    0.03, since a loss without bounds no longer says how far. Else 0.1 times for a critical finding
    and 0.3 times for another. Adam and its kin, whose rate is the size of the step, come down to
    0.003 at least, and SGD to 1 (times one less the momentum). A component with more than 10 times
    the rate of the others comes first, and gets theirs.
    """
    update, factor = _update(finding), 0.1 if finding.severity == "critical" else 0.3
    if update is not None:
        factor = _USUAL_UPDATE / update
    elif (excess := _excess(finding)) is not None:
        factor = max(_GENTLE / math.sqrt(excess), _AFTER_A_JUMP)
    return _scaled_rate(finding, config, _within(factor, _LOWERED))


def _excess(finding: Finding) -> float | None:
    """How many times a loss is above the threshold, both counted in times of another loss."""
    observed, threshold = finding.observed, finding.threshold
    if not finding.unit.startswith("times") or "loss" not in finding.unit:
        return None
    if observed is None or threshold is None or not observed > threshold > 0:
        return None
    return observed / threshold if math.isfinite(observed) else None


def raise_rate(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """A learning rate as much higher as the updates are too small, 2 to 10,000 times the old one.

    Up to 0.003 of the weights a step with Adam and its kin, whose rate is the size of the step and
    stays at or below 0.01; up to 0.01 of them with others, of which SGD stays at or below 1 (times
    one less the momentum). Where no update was observed the rate is 3 times the old one. What else
    makes steps small comes before the rate: Adam's epsilon, SGD's dampening, weights in half
    precision, in which small updates are lost.
    """
    others = small_steps(config) or _whole_weights(finding, config)
    if others:
        return others
    update = _update(finding)
    aim = _LIVELY_UPDATE if adaptive(config) else _USUAL_UPDATE
    factor = 3.0 if update is None else aim / update
    return _scaled_rate(finding, config, max(factor, _LEAST_RAISE))


def _whole_weights(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """Weights in single precision where half of it swallows updates of the size that was seen."""
    update = _update(finding)
    if update is not None and update >= _LOST_UPDATE:
        return {}
    return _precision(config, _WHOLE_HALVES)


def _precision(config: Mapping[str, Any], changed: tuple[str, ...]) -> dict[str, object]:
    """Mixed precision with bfloat16 in place of one of these precisions."""
    for key in ("hardware.precision", "trainer.precision"):
        if str(look_up(config, key)) in changed:
            return {key: "bf16-mixed"}
    return {}


def _scaled_rate(finding: Finding, config: Mapping[str, Any], factor: float) -> dict[str, object]:
    """The rate times a factor: that of the component alone where that will do.

    A rate that is off is brought back. What is too slow in one part alone is no reason to drive
    the others, so a component gets a higher rate for itself, where the configuration can say so;
    but for a rate that is tiny itself (below 1e-5 with Adam and its kin, 1e-4 with others).
    """
    rate, limit = number(config, "optimizer.lr"), _limit(config, factor)
    most = math.inf if rate is None else limit / rate
    if rate is not None and rate < (_TINY_ADAPTIVE_RATE if adaptive(config) else _TINY_RATE):
        most = 1.0
    own = _own_rate(finding, config, factor, min(most, _MOST_OF_A_COMPONENT))
    if own is not None:
        return own
    if factor < 1 and (rate is None or rate <= limit):
        large = large_factors(config)
        if large:
            rates = look_up(config, "component_lrs")
            assert isinstance(rates, Mapping)
            return {"component_lrs": {**rates, **dict.fromkeys(large, 1.0)}}
    if rate is None:
        return {}
    new = min(rate * min(factor, _LARGEST_RAISE), limit)
    if factor > 1 and new <= rate:
        return {}
    return {"optimizer.lr": _round(new)}


def _limit(config: Mapping[str, Any], factor: float) -> float:
    """The highest rate that a rate may be changed to."""
    if adaptive(config):
        return _LARGEST_ADAPTIVE_RATE if factor > 1 else _SAFE_ADAPTIVE_RATE
    if "sgd" in optimizer_name(config):
        return _LARGEST_RATE * (1 - min(share(config, "optimizer.momentum") or 0.0, 0.99))
    return math.inf


def _own_rate(
    finding: Finding, config: Mapping[str, Any], factor: float, most: float
) -> dict[str, object] | None:
    """Factors on the rate with another one for the component; None to change the rate of all."""
    rates = look_up(config, "component_lrs")
    if rates is None and factor > 1:
        rates = {}
    if factor > 1 and not takes_component_rates(config):
        return None
    if finding.component is None or not isinstance(rates, Mapping):
        return None
    key = rate_key(finding.component, config)
    if key is None:
        return None
    old = rates.get(key, 1.0 if factor > 1 else None)
    if isinstance(old, bool) or not isinstance(old, (int, float)) or old < 0:
        return None
    if old == 0:
        # a rate of 0 is how a part is kept still on purpose, too: raised only where asked for
        return {"component_lrs": {**rates, key: 1.0}} if factor > 1 else {}
    if factor < 1 and old <= 1:
        return None
    if factor < 1:
        # updates that overwrite weights no longer say how far too large their rate is
        new = 1.0 if key in large_factors(config) else max(1.0, old * factor)
    elif old < 1:
        new = min(1.0, old * factor)
    else:
        new = min(old * factor, most)
    if factor > 1 and new <= old:
        return None if most <= 1 else {}
    return {"component_lrs": {**rates, key: _round(new)}}


def quicken(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """More optimizer steps for the same data where many batches make one, else `raise_rate`."""
    return fewer_accumulated(finding, config) or raise_rate(finding, config)


def set_warmup(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """A warm-up over a tenth of the run; one that is there already gets twice as long.

    Only for what begins early: a warm-up is over by the middle of a run.
    """
    old = share(config, "model.warmup_share")
    if old is None or old >= _LONG_WARMUP:
        return {}
    steps, first = number(config, "trainer.max_steps"), finding.first_step or 0
    if steps is not None and first > _LONG_WARMUP * steps:
        return {}
    new = _WARMUP if old < _WARMUP else min(2 * old, _LONG_WARMUP)
    return {"model.warmup_share": _round(new)}


def steady_schedule(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """A schedule that fits the run: as many steps as it has, a short warm-up, else no schedule."""
    overrides: dict[str, object] = {}
    warmup = number(config, "model.warmup_share")
    if warmup is not None and warmup > _LONG_WARMUP:
        overrides["model.warmup_share"] = _WARMUP
    steps = number(config, "trainer.max_steps")
    planned = number(config, "model.schedule_steps")
    if steps is not None and planned is not None and planned != steps:
        return {**overrides, "model.schedule_steps": int(steps)}
    if not overrides and word(config, "model.schedule") not in ("", "constant"):
        overrides["model.schedule"] = "constant"
    return overrides


# ---- size of a step, precision, clip ----


def calm_steps(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """A learning rate of 0.3 times the old one, and a clip that is tighter than the old one.

    No clip under manual optimization, where the trainer refuses one.
    """
    overrides: dict[str, object] = {}
    rate = number(config, "optimizer.lr")
    if rate is not None:
        overrides["optimizer.lr"] = _round(0.3 * rate)
    by_hand = look_up(config, "automatic_optimization") is False
    if look_up(config, "trainer.gradient_clip_val") is not MISSING and not by_hand:
        clip = number(config, "trainer.gradient_clip_val")
        tighter = 1.0 if clip is None or clip > 1.0 else _round(0.5 * clip)
        overrides["trainer.gradient_clip_val"] = tighter
    return overrides


def calm_start(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """`calm_steps`, `smaller_init` of weights that start too large, and `set_warmup`."""
    large = number(config, "model.init_scale")
    init = {"model.init_scale": 1.0} if large is not None and large > 1 else {}
    return {**calm_steps(finding, config), **set_warmup(finding, config), **init}


def leave_half_precision(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """bfloat16 in place of float16, whose range ends at 65504; `calm_steps` where that is not it.

    What is not finite before the first step was not made so by a step: there it is `smaller_init`
    of weights that start too large, and nothing else.
    """
    precision = _precision(config, _HALVES)
    if precision:
        return precision
    if finding.first_step == 0:
        large = number(config, "model.init_scale")
        return {"model.init_scale": 1.0} if large is not None and large > 1 else {}
    return calm_steps(finding, config)


def loosen_clip(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """A clip near the norm that is usual here, where the optimizer divides the size out anyway.

    Plain SGD gets one no wider than 1, and only in place of a clip below 0.1.
    """
    clip = number(config, "trainer.gradient_clip_val")
    if clip is None or not finding.observed or finding.caused_by is not None:
        return {}
    usual = clip / finding.observed
    if usual <= clip:
        return {}
    if adaptive(config):
        return {"trainer.gradient_clip_val": _round(usual)}
    if clip < _TIGHT_CLIP:
        return {"trainer.gradient_clip_val": _round(min(usual, 1.0))}
    return {}


def more_accumulated(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """Four times the batches in one optimizer step, up to 8: less noise a step."""
    old = count(config, "hardware.accumulate")
    if old is None or not 1 <= old < _MANY_ACCUMULATED:
        return {}
    return {"hardware.accumulate": min(4 * old, _MANY_ACCUMULATED)}


def fewer_accumulated(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """An eighth of the batches in one optimizer step, where there are 8 and more."""
    old = count(config, "hardware.accumulate")
    if old is None or old < _MANY_ACCUMULATED:
        return {}
    return {"hardware.accumulate": max(1, old // _MANY_ACCUMULATED)}


# ---- the network ----


def boost_component(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """Three times the learning rate for the component, where the optimizer is plain SGD.

    A third for one whose gradient is larger than that of the others. Adam and its kin divide the
    size of the gradient out, so there another rate answers nothing; nor does it for a part that is
    kept still on purpose, with a rate of 0.
    """
    rates = look_up(config, "component_lrs")
    if finding.component is None or rates is MISSING or optimizer_name(config) != "sgd":
        return {}
    key = rate_key(finding.component, config)
    if key is None or not takes_component_rates(config):
        return {}
    given = dict(rates) if isinstance(rates, Mapping) else {}
    old = given.get(key, 1.0)
    if isinstance(old, bool) or not isinstance(old, (int, float)) or not old > 0:
        return {}
    new = old / _BOOST if "larger" in finding.unit else old * _BOOST
    return {"component_lrs": {**given, key: _round(new)}}


def change_activation(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """An activation that passes a gradient: leaky ReLU for ReLU, GELU for what saturates."""
    old = word(config, "model.activation").replace("_", "")
    if old in ("relu", "relu6"):
        return {"model.activation": "leaky_relu"}
    return {"model.activation": "gelu"} if old in _SQUASHING else {}


def smaller_init(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """Weights that start at the usual size where they started larger, else at half of theirs."""
    old = number(config, "model.init_scale")
    if old is None:
        return {}
    return {"model.init_scale": 1.0 if old > 1 else _round(0.5 * old)}


def larger_init(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """Weights that start at the usual size where they started smaller."""
    old = number(config, "model.init_scale")
    return {"model.init_scale": 1.0} if old is not None and old < 1 else {}


def revive_units(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """What dead or saturated units need: `change_activation`, and weights that start no larger.

    Units that were seen alive before were killed by a step: the rate is lowered too.
    """
    overrides = change_activation(finding, config)
    large = number(config, "model.init_scale")
    if large is not None and large > 1:
        overrides["model.init_scale"] = 1.0
    rate = number(config, "optimizer.lr")
    if rate is not None and (_began_later(finding) or not overrides):
        overrides["optimizer.lr"] = _round(0.3 * rate)
    return overrides


def _began_later(finding: Finding) -> bool:
    """Whether there was an earlier look, which did not show it."""
    steps = finding.evidence.steps
    between = min((b - a for a, b in pairwise(steps) if b > a), default=1)
    return finding.began_after is not None or (finding.first_step or 0) >= between


def strengthen_gradient(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """What a gradient that vanishes needs.

    `larger_init`, and GELU for an activation that saturates; where there is neither,
    `usual_settings`, and where all is usual `boost_component`.
    """
    overrides = larger_init(finding, config)
    if word(config, "model.activation").replace("_", "") in _SQUASHING:
        overrides |= change_activation(finding, config)
    return overrides or unusual_settings(config) or boost_component(finding, config)


def usual_settings(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """What is usual in place of every setting that is not: for a run that learns nothing.

    For findings that do not say why; see `unusual_settings` for what counts as unusual.
    """
    return unusual_settings(config)


def regularize(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """Ten times the weight decay, 0.01 to 1, and 0.2 more dropout, up to 0.5."""
    overrides: dict[str, object] = {}
    decay = share(config, "optimizer.weight_decay")
    if decay is not None and decay < 1:
        overrides["optimizer.weight_decay"] = _round(_within(10 * decay, (0.01, 1.0)))
    dropout = share(config, "model.dropout")
    if dropout is not None and dropout < _MOST_DROPOUT:
        overrides["model.dropout"] = _round(min(dropout + 0.2, _MOST_DROPOUT))
    return overrides


# ---- data and machine ----


def standardize_data(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """Inputs brought to mean 0 and standard deviation 1, where the data can do that."""
    return {"data.standardize": True} if look_up(config, "data.standardize") is False else {}


def more_workers(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """Two processes that load data where there was none, else twice as many, up to 16."""
    old = count(config, "hardware.num_workers")
    if old is None or not 0 <= old < _MOST_WORKERS:
        return {}
    return {"hardware.num_workers": min(2 * old, _MOST_WORKERS) if old else 2}
