"""A learning rate schedule that does something other than it was meant to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_series import Losses, training_losses
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import steady_schedule
from lightning_diag.rules.traces import evidence_steps
from lightning_diag.rules.update_traces import (
    Rates,
    learning_rates,
    middle,
    typical_ratios,
    update_traces,
    weighty,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = ["SchedulerMisuse", "scheduler_misuse"]

_UNITS = (
    "Most often a number meant for epochs is used by a scheduler that is stepped every batch, or "
    'the other way round: compare `interval` ("step" or "epoch") in `configure_optimizers` with '
    "the unit of `T_max`, `step_size`, `gamma`, `milestones`, `patience` or the warm-up."
)


@dataclass(frozen=True)
class SchedulerMisuse:
    """Thresholds of `scheduler_misuse`."""

    ended_share: float = field(default=0.005, metadata={"unit": "share of the highest rate"})
    stepped_share: float = field(default=0.0005, metadata={"unit": "share of the highest rate"})
    early_share: float = field(default=0.02, metadata={"unit": "share of the highest rate"})
    most: float = field(default=0.7, metadata={"unit": "share of steps, at such a rate"})
    many_drops: float = field(default=4, metadata={"unit": "drops"})
    lost_share: float = field(default=0.2, metadata={"unit": "share of steps"})
    lost_steps: float = field(default=20, metadata={"unit": "steps"})
    trough_share: float = field(default=0.01, metadata={"unit": "share of the highest rate"})
    back_share: float = field(default=0.3, metadata={"unit": "share of the highest rate"})
    growth: float = field(default=5.0, metadata={"unit": "times over the last half"})
    total_growth: float = field(default=10.0, metadata={"unit": "times over the run"})
    growth_steps: float = field(default=60, metadata={"unit": "steps"})
    warmup_steps: float = field(default=150, metadata={"unit": "steps"})
    warmup_ratio: float = field(default=1e-4, metadata={"unit": "update over weight"})
    warmup_fall: float = field(default=0.05, metadata={"unit": "share of the loss"})
    min_count: float = field(default=50, metadata={"unit": "elements"})


@rule(
    "scheduler_misuse",
    family="updates",
    needs=("loss", "metrics", "update"),
    thresholds=SchedulerMisuse,
    explains=(
        "constant_prediction",
        *("learning_rate_too_high", "learning_rate_too_low", "update_too_small"),
        *("update_too_large", "frozen_weights", "not_learning", "slow_convergence"),
        *("loss_plateau", "divergence", "loss_oscillation", "loss_spike"),
    ),
    reference="torch.optim.lr_scheduler: `step` counts calls, whatever they are meant to be; "
    "cosine: Loshchilov and Hutter 2017, SGDR, equation 5, which ends at T_max.",
    remedy=steady_schedule,
)
def scheduler_misuse(
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    update: "pl.DataFrame",
    thresholds: SchedulerMisuse,
) -> list[Finding]:
    """A rate that is spent early, swings, stays at zero, rises without end or is no rate at all.

    Warm-ups, cosines that end with the run, steps down, cycles that jump back and a few reductions
    on a plateau are what schedules are for, and nothing is said of them.
    """
    rates = learning_rates(loss, metrics, update)
    if rates is None:
        return []
    for judge in (_no_rate, _zero, _exploding, _swinging, _anew):
        found = judge(rates, thresholds)
        if found is not None:
            return [found]
    found = _spent(rates, thresholds)
    if found is None:
        found = _endless_warmup(rates, training_losses(loss, metrics), update, thresholds)
    return [] if found is None else [found]


def _finding(
    rates: Rates,
    severity: Severity,
    span: tuple[int, int],
    numbers: tuple[float, float, str],
    message: str,
    suggestion: str,
    confidence: float = 0.9,
) -> Finding:
    observed, threshold, unit = numbers
    inside = [one for one in rates.steps if span[0] <= one <= span[1]]
    return Finding(
        rule="scheduler_misuse",
        severity=severity,
        first_step=span[0],
        last_step=span[1],
        observed=observed,
        threshold=threshold,
        unit=unit,
        evidence=Evidence(rates.file, evidence_steps(inside or [span[1]])),
        message=message,
        suggestion=suggestion,
        confidence=confidence,
    )


def _no_rate(rates: Rates, t: SchedulerMisuse) -> Finding | None:
    wrong = [
        index
        for index, ends in enumerate(zip(rates.lows, rates.highs, rates.lasts, strict=True))
        if any(math.isnan(one) for one in ends) or min(ends) < 0
    ]
    if not wrong:
        return None
    lowest = min((rates.lows[one] for one in wrong), default=math.nan)
    first, last = rates.firsts[wrong[0]], rates.steps[wrong[-1]]
    negative = lowest < 0
    said = f"negative, {lowest:.3g} at the lowest" if negative else "not a finite number"
    climbs = "climbs the loss instead of descending" if negative else "destroys every weight"
    return _finding(
        rates,
        "critical",
        (first, last),
        (lowest if negative else math.inf, 0.0, "learning rate"),
        f"The learning rate is {said}, first about step {first}. A step with it {climbs}.",
        "Look at the schedule's formula: a linear decay that goes on past its last step, or a "
        "division by zero. Hold it at a floor with `max(..., 0)`, and set its length to the "
        "number of optimizer steps of the run.",
    )


def _zero(rates: Rates, t: SchedulerMisuse) -> Finding | None:
    """A rate of zero from the start, for longer than the first step of a warm-up."""
    moving = next((index for index, high in enumerate(rates.highs) if high > 0), None)
    total = rates.steps[-1] - rates.firsts[0] + 1
    end = rates.steps[-1] if moving is None else rates.steps[moving - 1] if moving else -1
    still = end - rates.firsts[0] + 1
    if still < t.lost_steps or still < 0.05 * total:
        return None
    whole = moving is None or still > 0.5 * total
    until = "" if moving is None else f", and rose only at step {rates.firsts[moving]}"
    return _finding(
        rates,
        "critical" if whole else "warning",
        (rates.firsts[0], end),
        (float(still), t.lost_steps, "steps with a learning rate of zero"),
        f"The learning rate was zero for the first {still} of {total} steps{until}. Nothing can be "
        "learned while it is.",
        "A warm-up that starts at zero and is stepped once an epoch stays at zero for the whole "
        'first epoch: step it every batch (`"interval": "step"`), or start it above zero. '
        "A factor that rounds down to zero (integer division) does the same.",
    )


def _exploding(rates: Rates, t: SchedulerMisuse) -> Finding | None:
    positive = [index for index, low in enumerate(rates.lows) if low > 0]
    if not positive:
        return None
    begin, last = positive[0], len(rates.steps) - 1
    length = rates.steps[last] - rates.steps[begin]
    half = next(i for i in range(last + 1) if rates.steps[i] >= rates.steps[begin] + length / 2)
    highs = rates.highs
    if length < t.growth_steps or half == last or highs[half] <= 0:
        return None
    rises = sum(b > 1.001 * a for a, b in pairwise(highs[half:]))
    falls = sum(b < 0.999 * a for a, b in pairwise(highs[begin:]))
    grown = highs[last] / highs[half]
    over = highs[last] / rates.lows[begin]
    steady = rises >= max(3, 0.5 * (last - half)) or (rises >= 2 and grown >= t.growth**2)
    if falls or not steady or grown < t.growth or over < t.total_growth:
        return None
    first = rates.firsts[begin]
    return _finding(
        rates,
        "critical",
        (first, rates.steps[last]),
        (over, t.total_growth, "times the rate at the start"),
        f"The learning rate rises without end: from {rates.lows[begin]:.3g} at step {first} to "
        f"{highs[last]:.3g} at step {rates.steps[last]}, {grown:.3g} times over the last half "
        "alone, and it is still rising. Sooner or later every network diverges so.",
        "Make it fall: a `gamma` or factor above 1 multiplies the rate up at each step. Where the "
        "rise is a warm-up, end it after a few per cent of the run. If this is a range test of the "
        "learning rate, all is as it should be.",
    )


def _swinging(rates: Rates, t: SchedulerMisuse) -> Finding | None:
    """Falls to about zero and smooth returns: a cosine that has run past its `T_max`."""
    top = max(rates.highs)
    troughs, sudden = _returns(rates, top, t) if top > 0 else ([], 0)
    if not troughs:
        return None
    count, began = len(troughs), _peak_start(rates, top)
    period = (rates.steps[-1] + 1 - began) / count
    numbers = (float(count), 1.0, "returns from about zero")
    times = "once" if count == 1 else f"{count} times"
    pace = "" if count == 1 else f", about every {period:.0f} steps"
    if sudden > 0.5 * count:
        return _finding(
            rates,
            "info",
            (began, rates.steps[-1]),
            numbers,
            f"The learning rate fell to about zero and jumped back up {times}{pace}: warm "
            "restarts.",
            "Nothing to do if the restarts are meant. If the cycles are shorter than they should "
            f"be: {_UNITS[0].lower()}{_UNITS[1:]}",
            0.7,
        )
    return _finding(
        rates,
        "warning",
        (began, rates.steps[-1]),
        numbers,
        f"The learning rate fell to about zero and swung back up {times}{pace}, first about step "
        f"{rates.steps[troughs[0]]}: a cosine that goes on past its `T_max`. Training stands still "
        "at each trough and is shaken up again after it.",
        f"Set `T_max` to the number of scheduler steps of the whole run. {_UNITS}",
    )


def _returns(rates: Rates, top: float, t: SchedulerMisuse) -> tuple[list[int], int]:
    """Windows with a trough from which the rate came back, and how many came back at a leap."""
    troughs, sudden = [], 0
    fallen: int | None = None
    been_high = False
    for index, low in enumerate(rates.lows):
        high, last = rates.highs[index], rates.lasts[index]
        if fallen is not None and high >= t.back_share * top:
            troughs.append(fallen)
            sudden += low - rates.lasts[index - 1] >= 0.5 * top or (
                last < 0.999 * high and low <= t.trough_share * top
            )
            fallen, been_high = None, True
        if been_high and low <= t.trough_share * top:
            if last >= t.back_share * top:
                # there and back in one window: a rise that goes on at its end is a smooth one
                troughs.append(index)
                sudden += last < high or high >= 0.999 * top
            else:
                fallen = index
        been_high = been_high or high >= t.back_share * top
    full = sum(
        low <= t.trough_share * top and high >= 0.9 * top
        for low, high in zip(rates.lows, rates.highs, strict=True)
    )
    # so short a cycle does not even fill a window, and is no restart that anyone wants
    quick = full >= 3 and full >= 0.5 * len(rates.steps)
    return troughs, 0 if quick else sudden


def _peak_start(rates: Rates, top: float) -> int:
    """The step from which on the rate falls: after its first peak, or in that window."""
    peak = next(i for i, one in enumerate(rates.highs) if one >= 0.999 * top)
    while peak + 1 < len(rates.highs) and rates.lows[peak + 1] >= 0.999 * top:
        peak += 1
    level = rates.lows[peak] >= 0.999 * top
    start = rates.firsts[min(peak + level, len(rates.firsts) - 1)]
    # a schedule that ends so soon was wrong from the start
    soon = start - rates.firsts[0] < 0.1 * (rates.steps[-1] + 1 - rates.firsts[0])
    return rates.firsts[0] if soon else start


def _anew(rates: Rates, t: SchedulerMisuse) -> Finding | None:
    """A rate that fell to about zero at once and creeps up again, as a second warm-up does."""
    for index in range(3, len(rates.highs) - 2):
        top, high = max(rates.highs[:index]), rates.highs[index]
        after = rates.highs[index:]
        creeps = all(b > 1.001 * a for a, b in pairwise(after))
        before = rates.highs[index - 1] >= t.back_share * top > 0
        if before and 0 < high <= t.trough_share * top and creeps:
            return _finding(
                rates,
                "warning",
                (rates.firsts[index], rates.steps[-1]),
                (high / top, t.trough_share, "share of the highest rate"),
                f"The learning rate fell at once from {rates.highs[index - 1]:.3g} to "
                f"{rates.lows[index]:.3g} at step {rates.firsts[index]}, and creeps up since, as "
                f"in a warm-up that begins anew: it is {rates.highs[-1]:.3g} at step "
                f"{rates.steps[-1]}.",
                "Look at what happened there: a run that was resumed without the state of its "
                "scheduler, or a scheduler that was made again for a new phase. Restore its state "
                "with the optimizer's, or give it `last_epoch`.",
            )
    return None


def _spent(rates: Rates, t: SchedulerMisuse) -> Finding | None:
    """A rate that is next to nothing from somewhere in the run to its end."""
    top = max(rates.highs)
    if top <= 0:
        return None
    peak = max(index for index, one in enumerate(rates.highs) if one >= 0.999 * top)
    drops = [b / a for a, b in pairwise(rates.highs[peak:]) if b < 0.999 * a]
    changes = len(drops) / max(1, len(rates.highs) - 1 - peak)
    # steps down by ten, three of them, are what everyone trains with
    stepped = changes <= 0.34 and len(drops) < t.many_drops and 0.0 not in drops
    bound = (t.stepped_share if stepped else t.ended_share) * top
    since = _low_since(rates, peak, bound)
    last, total = rates.steps[-1], rates.steps[-1] - rates.firsts[0] + 1
    lost = 0 if since is None else last - rates.firsts[since] + 1
    if since is None or lost < t.lost_steps or lost < t.lost_share * total:
        # a rate that is low for most of the run need not be as low
        since = _low_since(rates, peak, t.early_share * top)
        lost = 0 if since is None else last - rates.firsts[since] + 1
        if since is None or lost < t.lost_steps or lost < t.most * total:
            return None
    start = rates.firsts[since]
    return _finding(
        rates,
        "warning",
        (_peak_start(rates, top), last),
        (lost / total, t.lost_share, "share of steps at about zero"),
        f"The learning rate was spent early: {top:.3g} at step {rates.steps[peak]}, "
        f"{rates.highs[since]:.3g} at step {start}, and for the last {lost} of {total} steps "
        f"({lost / total:.0%}) it is next to nothing. Training goes on without learning.",
        f"Stretch the schedule over the whole run. {_UNITS} A `ReduceLROnPlateau` needs more "
        "patience, a threshold above the noise of what it watches, and a `min_lr`.",
    )


def _low_since(rates: Rates, peak: int, bound: float) -> int | None:
    """The window from which on all rates lie below a bound; None where the last does not."""
    since = len(rates.highs)
    while since > peak + 1 and rates.highs[since - 1] <= bound:
        since -= 1
    return None if since == len(rates.highs) else since


def _endless_warmup(
    rates: Rates, losses: Losses | None, update: "pl.DataFrame", t: SchedulerMisuse
) -> Finding | None:
    """A rate that has only risen and is still too small to move anything."""
    length = rates.steps[-1] - rates.firsts[0] + 1
    top, bottom = rates.highs[-1], rates.lows[0]
    falls = any(b < 0.999 * a for a, b in pairwise(rates.highs))
    if length < t.warmup_steps or falls or losses is None or top <= 2 * bottom:
        return None
    rising = sum(b > a for a, b in pairwise(rates.highs)) >= 0.8 * (len(rates.highs) - 1)
    ratio = middle(_last(typical_ratios(weighty(update_traces(update), t.min_count))[1]))
    means = [one for one in losses.means if not math.isnan(one)]
    if not rising or not ratio < t.warmup_ratio or len(means) < 5:
        return None
    fall = 1.0 - middle(means[-5:]) / means[0] if means[0] > 0 else 1.0
    if fall > t.warmup_fall:
        return None
    return _finding(
        rates,
        "warning",
        (rates.firsts[0], rates.steps[-1]),
        (float(length), t.warmup_steps, "steps of warm-up"),
        f"The warm-up does not end: after {length} steps the learning rate is still rising, at "
        f"{top:.3g}, where a step moves the weights by only {ratio:.2g} of their size, and the "
        f"loss has fallen by {max(0.0, fall):.1%}.",
        f"Warm up over a few per cent of the run, a few hundred steps at most at first. {_UNITS}",
        0.7,
    )


def _last(values: Sequence[float]) -> Sequence[float]:
    return values[-5:]
