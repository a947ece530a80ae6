"""A loss that fell, and then stopped."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_series import (
    Losses,
    at_most,
    by_fives,
    has_several_optimizers,
    standard_error,
    training_losses,
)
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import usual_settings
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["LossPlateau", "loss_plateau"]

_BEFORE = 6

_MOST_WINDOWS = 1000


@dataclass(frozen=True)
class LossPlateau:
    """Thresholds of `loss_plateau`."""

    min_windows: float = field(default=10, metadata={"unit": "windows"})
    flat_windows: float = field(default=4, metadata={"unit": "windows"})
    flat_share: float = field(default=0.5, metadata={"unit": "share of the run"})
    flat: float = field(default=0.01, metadata={"unit": "share of the loss"})
    progress: float = field(default=0.05, metadata={"unit": "share of the first loss"})
    high: float = field(default=0.4, metadata={"unit": "share of the first loss"})
    noted: float = field(default=0.1, metadata={"unit": "share of the first loss"})
    missing: float = field(default=0.2, metadata={"unit": "share of the first loss"})
    steady: float = field(default=0.8, metadata={"unit": "later fall over earlier fall"})
    sigmas: float = field(default=6.0, metadata={"unit": "standard errors"})
    lost_rate: float = field(default=0.1, metadata={"unit": "learning rate over the one before"})


class _Stop(NamedTuple):
    at: int  # the first flat window
    expected: float  # where the fall before would have led
    abrupt: bool
    taken: bool  # the learning rate, at that window


@rule(
    "loss_plateau",
    family="losses",
    needs=("loss", "metrics", "grad"),
    thresholds=LossPlateau,
    reference="PyTorch's ReduceLROnPlateau: relative change; Prechelt 1998, Early stopping - but "
    "when?",
    remedy=usual_settings,
)
def loss_plateau(
    loss: "pl.DataFrame", metrics: "pl.DataFrame", grad: "pl.DataFrame", thresholds: LossPlateau
) -> list[Finding]:
    """The loss fell and then stayed flat, up to the end.

    Runs that have converged look the same, even those that fell steeply to the end, so this is a
    note, unless learning broke off in the middle of its fall when the learning rate was taken away.
    """
    t = thresholds
    series = training_losses(loss, metrics)
    losses = at_most(by_fives(series.finite()), _MOST_WINDOWS) if series else None
    if losses is None or len(losses.means) < t.min_windows or min(losses.means) <= 0:
        return []
    stop = _broken_off(losses, t) or _long_flat(losses, t)
    if stop is None:
        return []
    level, first = losses.mean(stop.at), losses.means[0]
    grave = stop.taken and not has_several_optimizers(grad)
    severity: Severity = "warning" if grave else "info"
    return [_finding(losses, stop, level, first, severity)]


def _broken_off(losses: Losses, t: LossPlateau) -> _Stop | None:
    """The window at which a steady fall turned into a flat line, far above where it led."""
    count, first = len(losses.means), losses.means[0]
    found = None
    for at in range(_BEFORE, count - int(t.flat_windows) + 1):
        taken = _rate_was_taken(losses, at, t)
        # a fall with bumps, or one that is next to nothing, leads nowhere
        falls = all(a > b for a, b in pairwise(losses.means[at - _BEFORE : at]))
        enough = _last_drop(losses.means, at) > t.missing * first / (4 * _BEFORE)
        if not enough or not (falls or taken):
            continue
        tail = losses.part(at)
        level, error = tail.mean(), standard_error(tail)
        if level < t.high * first or not _is_flat(tail, level, t):
            continue
        before = losses.part(at - _BEFORE, at)
        noise = math.hypot(error, standard_error(losses.part(at - 2, at)))
        if level > before.mean(-2) + 2 * noise:
            continue  # it rose
        expected = _led_to(before, len(tail.means), 0.0 if taken else t.steady, noise)
        missing = 0.5 * t.missing if taken else t.missing
        if level - expected > max(missing * first, t.sigmas * noise):
            stop = _Stop(at, expected, True, taken)
            if taken:
                return stop
            found = found or stop
    return found


def _last_drop(means: list[float], at: int) -> float:
    third = _BEFORE // 3
    return fmean(means[at - 2 * third : at - third]) - fmean(means[at - third : at])


def _rate_was_taken(losses: Losses, at: int, t: LossPlateau) -> bool:
    """Whether the learning rate fell to next to nothing at about that window."""
    before, after = losses.rates[max(0, at - _BEFORE) : at - 1], losses.rates[at:]
    known = [rate for rate in before if rate > 0]
    return bool(known) and all(rate < t.lost_rate * max(known) for rate in after)


def _led_to(before: Losses, windows: int, steady: float, noise: float) -> float:
    """Where a fall that slows down geometrically, or not at all, leads within some windows.

    A fall that slows down below `steady`, or that does not stand out of the noise, leads nowhere.
    """
    third = len(before.means) // 3
    a, b, c = (fmean(before.means[i * third : (i + 1) * third]) for i in range(3))
    sigmas = 6.0 if steady else 3.0
    if min(a - b, b - c) < sigmas * noise or b - c < steady * (a - b):
        return c
    ratio = min(1.0, (b - c) / (a - b))
    drops = min(windows, 2 * len(before.means)) / third
    step, level = b - c, c
    while drops >= 1.0:
        step *= ratio
        level -= step
        drops -= 1.0
    return max(level, 0.0)


def _is_flat(part: Losses, level: float, t: LossPlateau) -> bool:
    half = len(part.means) // 2
    early, late = part.part(0, half), part.part(half)
    error = math.hypot(standard_error(early), standard_error(late))
    fall = early.mean() - late.mean()
    return abs(fall) < max(2.0 * error, 0.5 * t.flat * level)


def _long_flat(losses: Losses, t: LossPlateau) -> _Stop | None:
    count, first = len(losses.means), losses.means[0]
    at = count - math.ceil(t.flat_share * count)
    tail = losses.part(at)
    level = tail.mean()
    if level < t.noted * first or first - level < t.progress * first:
        return None
    return _Stop(at, level, False, False) if _is_flat(tail, level, t) else None


def _finding(
    losses: Losses, stop: _Stop, level: float, first: float, severity: Severity
) -> Finding:
    step = losses.firsts[stop.at]
    before = [rate for rate in losses.rates[: stop.at] if rate > 0]
    after = [rate for rate in losses.rates[stop.at :] if math.isfinite(rate)]
    lowered = bool(before and after) and fmean(after) < 0.1 * max(before)
    rate = " The learning rate is far lower since then." if lowered else ""
    if stop.abrupt:
        seen = (
            f"At about step {step} the loss stopped falling all at once: it has been {level:.3g} "
            f"since, where the fall before led to {stop.expected:.3g} or below.{rate}"
        )
        advice = (
            "See what happened at that step: a schedule that takes the learning rate away, a part "
            "that was frozen or died, new data. Then go on from a checkpoint before it."
        )
    else:
        seen = (
            f"The loss fell from {first:.3g} to {level:.3g} and has been flat since about step "
            f"{step}.{rate}"
        )
        advice = (
            "Nothing to do if this is as good as the task allows: compare with a baseline and with "
            "the validation loss. If not, lower the learning rate ten times once, or try a larger "
            "model."
        )
    return Finding(
        rule="loss_plateau",
        severity=severity,
        first_step=step,
        last_step=losses.steps[-1],
        observed=level,
        threshold=stop.expected,
        unit="mean loss",
        evidence=Evidence(losses.file, evidence_steps(losses.steps[stop.at :])),
        message=seen,
        suggestion=advice,
        confidence=0.8 if stop.abrupt else 0.4,
    )
