"""A learning rate that is the cause of a loss that jumps, rises, bounces or is stuck."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_series import Losses, training_losses
from lightning_diag.rules.part_rates import parts_too_fast
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import lower_rate
from lightning_diag.rules.stopped_early import COLLAPSE_FILE, stopped_early
from lightning_diag.rules.traces import evidence_steps
from lightning_diag.rules.update_traces import (
    UPDATE_FILE,
    Rates,
    Updates,
    learning_rates,
    typical_ratios,
    update_traces,
    weighty,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = ["LearningRateTooHigh", "learning_rate_too_high"]

_SUGGESTION = (
    "Lower the learning rate, tenfold at first and then up again by threes, or let a range test "
    "choose it (`LRCache`). If the rate is known to be right for this model, warm it up over the "
    "first few per cent of the run."
)


@dataclass(frozen=True)
class LearningRateTooHigh:
    """Thresholds of `learning_rate_too_high`."""

    large_ratio: float = field(default=0.03, metadata={"unit": "update over weight"})
    large_rate: float = field(default=0.05, metadata={"unit": "learning rate"})
    huge_norm: float = field(default=100.0, metadata={"unit": "l2 norm"})
    early_rate: float = field(default=1e-3, metadata={"unit": "learning rate"})
    early_steps: float = field(default=30, metadata={"unit": "steps"})
    far_jump: float = field(default=10.0, metadata={"unit": "times the loss at the start"})
    small_level: float = field(default=0.77, metadata={"unit": "share of the loss at the start"})
    jump: float = field(default=2.0, metadata={"unit": "times the loss at the start"})
    lasting_level: float = field(default=0.65, metadata={"unit": "share of the loss at the start"})
    large_rate_level: float = field(
        default=0.6, metadata={"unit": "share of the loss at the start"}
    )
    soon_level: float = field(default=1.2, metadata={"unit": "times the loss at the start"})
    soon_windows: float = field(default=4, metadata={"unit": "windows of the loss"})
    wild_jump: float = field(default=100.0, metadata={"unit": "times the loss at the start"})
    wild_level: float = field(default=0.25, metadata={"unit": "share of the loss at the start"})
    stuck_ratio: float = field(default=0.08, metadata={"unit": "update over weight"})
    late_ratio: float = field(default=0.01, metadata={"unit": "update over weight"})
    flat_ratio: float = field(default=0.045, metadata={"unit": "update over weight"})
    stuck_level: float = field(default=0.85, metadata={"unit": "share of the loss at the start"})
    stuck_windows: float = field(default=10, metadata={"unit": "windows of the loss"})
    flat: float = field(default=0.01, metadata={"unit": "share of the loss"})
    flat_level: float = field(default=0.6, metadata={"unit": "share of the loss at the start"})
    bounce: float = field(default=2.5, metadata={"unit": "times what batches explain"})
    bounce_sum: float = field(default=0.5, metadata={"unit": "share of the loss at the start"})
    bounce_level: float = field(default=0.4, metadata={"unit": "share of the loss at the start"})
    bounce_ratio: float = field(default=0.015, metadata={"unit": "update over weight"})
    bounce_windows: float = field(default=8, metadata={"unit": "windows of the loss"})
    rise: float = field(default=1.5, metadata={"unit": "times its best level"})
    rise_level: float = field(default=0.5, metadata={"unit": "share of the loss at the start"})
    rate_rise: float = field(default=2.0, metadata={"unit": "times the highest rate before"})
    swept_rms: float = field(default=3.0, metadata={"unit": "root mean square of the weights"})
    first_ratio: float = field(default=0.08, metadata={"unit": "update over weight"})
    shrunk: float = field(default=0.05, metadata={"unit": "share of the size of the weights"})
    part_ratio: float = field(default=0.1, metadata={"unit": "update over weight"})
    part_rise: float = field(default=10.0, metadata={"unit": "times its highest rate before"})
    part_rates: float = field(default=30.0, metadata={"unit": "times the rate of other parts"})
    min_count: float = field(default=50, metadata={"unit": "elements"})


class _Case(NamedTuple):
    """What speaks for it."""

    kind: str
    first: int
    observed: float
    threshold: float
    unit: str
    said: str
    severity: Severity
    confidence: float


@rule(
    "learning_rate_too_high",
    family="updates",
    needs=("loss", "update", "metrics", "collapse"),
    thresholds=LearningRateTooHigh,
    explains=(
        *("update_too_large", "exploding_gradient", "clipping_dominates", "divergence"),
        *("loss_oscillation", "loss_spike", "loss_plateau", "not_learning", "nonfinite_loss"),
        *("nonfinite_gradient", "dead_relu", "saturated_activation", "constant_prediction"),
        *("dead_component", "vanishing_gradient", "representation_collapse"),
        *("attention_collapse", "update_too_small", "detached_graph"),
    ),
    reference="Above 2 over the sharpness a step of gradient descent climbs: LeCun et al. 1993; "
    "Cohen et al. 2021, Gradient descent on neural networks typically occurs at the edge of "
    "stability. Ratio of update to weight: Karpathy, A recipe for training neural networks.",
    remedy=lower_rate,
)
def learning_rate_too_high(
    loss: "pl.DataFrame",
    update: "pl.DataFrame",
    metrics: "pl.DataFrame",
    collapse: "pl.DataFrame",
    thresholds: LearningRateTooHigh,
) -> list[Finding]:
    """Large steps and a loss that suffers from them; either alone is not enough.

    Three courses count: the loss jumps or stays where it was from the first steps on, it rises when
    the rate is raised, or it rises later under steps that were already large before.
    """
    ended = _ended(collapse, loss, thresholds)
    if ended:
        return ended
    traces = weighty(update_traces(update), thresholds.min_count)
    losses = training_losses(loss, metrics)
    parts = _parts(traces, thresholds)
    if losses is None:
        return parts
    moves = _Moves(*typical_ratios(traces), *_first_weights(update))
    rates = learning_rates(loss, metrics, update)
    curve = _curve(losses, collapse)
    case = (
        _from_the_start(curve, rates, moves, thresholds)
        or _after_a_rise(curve, rates, moves, thresholds)
        or _later(curve, moves, thresholds)
        or _unsettled(curve, losses, moves, thresholds)
    )
    if case is None or _shrunk(traces, thresholds):
        return parts
    case = _since_large(case, rates, moves, thresholds)
    # a part that was too fast before the loss shows it is what to look at
    if parts and all((one.first_step or 0) <= case.first for one in parts):
        return parts
    return [_finding(case, losses, rates, moves)]


def _ended(collapse: "pl.DataFrame", loss: "pl.DataFrame", t: LearningRateTooHigh) -> list[Finding]:
    """A run that its very first step has ruined, so that it was stopped at once."""
    stopped = stopped_early(collapse, ended=False)
    rates = [] if "lr_max" not in loss.columns else loss["lr_max"].drop_nulls().to_list()
    if stopped is None or stopped.first is None or not stopped.turned_at_once:
        return []
    rate = max(rates, default=math.nan)
    if rate < t.early_rate:
        return []
    steps = [int(row["step"]) for row in stopped.events]
    before, after = stopped.first, stopped.events[-1]
    losses = (
        ""
        if None in (before["loss"], after["loss"])
        else (f", and the loss is {after['loss']:.3g} after {before['loss']:.3g}")
    )
    return [
        Finding(
            rule="learning_rate_too_high",
            severity="critical",
            first_step=0,
            last_step=steps[-1],
            observed=rate,
            threshold=t.early_rate,
            unit="learning rate",
            evidence=Evidence(COLLAPSE_FILE, evidence_steps(steps)),
            message=(
                f"The first step ruined the run: the gradient norm was "
                f"{before['gradient_norm']:.3g} before it and {after['gradient_norm'] or 0:.3g} "
                f"at step {steps[-1]}{losses}. The learning rate is {rate:.3g}."
            ),
            suggestion=_SUGGESTION,
            confidence=0.8,
        )
    ]


class _Moves(NamedTuple):
    """The typical ratio of update to weight by step, and the size of the weights at first."""

    steps: list[int]
    ratios: list[float]
    size: float = math.nan
    rms: float = math.nan

    def between(self, start: float, stop: float) -> float:
        """The largest ratio in a range of steps; NaN where none was measured."""
        found = [r for s, r in zip(self.steps, self.ratios, strict=True) if start <= s <= stop]
        return max(found, default=math.nan)


def _first_weights(update: "pl.DataFrame") -> tuple[float, float]:
    """Norm and root mean square of all weights at the first measured step; NaN if unknown."""
    import polars as pl

    if not {"component", "step", "weight_l2", "weight_rms"} <= set(update.columns):
        return math.nan, math.nan
    known = pl.col("weight_rms").is_not_null() & pl.col("weight_l2").is_not_null()
    whole = update.filter(pl.col("component").is_null() & known)
    row = next(whole.head(1).iter_rows(named=True), None)
    return (math.nan, math.nan) if row is None else (row["weight_l2"], row["weight_rms"])


def _shrunk(traces: Sequence[Updates], t: LearningRateTooHigh) -> bool:
    """Whether weights fade to nothing: what moves them is their decay, and not the gradient."""
    known = [[one for one in trace.sizes if not math.isnan(one)] for trace in traces]
    ends = [sizes[-1] < t.shrunk * sizes[0] for sizes in known if sizes]
    return any(ends)


def _parts(traces: Sequence[Updates], t: LearningRateTooHigh) -> list[Finding]:
    found = parts_too_fast(
        traces, times_before=t.part_rise, times_others=t.part_rates, ratio=t.part_ratio
    )
    whole = len(found) > 1 and len(found) == len(traces)
    worst = max(found, key=lambda one: one.ratio, default=None)
    findings = []
    for one in [worst] if whole and worst is not None else found:
        name = "all parts" if whole else f"`{one.component}`"
        seen = (
            f"was raised from {one.usual:.3g} to {one.rate:.3g} at about step {one.step}"
            if one.raised
            else f"is {one.rate:.3g}, where the other parts have {one.usual:.3g}"
        )
        last = max(step for trace in traces for step in trace.steps)
        findings.append(
            Finding(
                rule="learning_rate_too_high",
                severity="warning",
                component=None if whole else one.component,
                first_step=one.step,
                last_step=last,
                observed=one.ratio,
                threshold=t.part_ratio,
                unit="update over weight",
                evidence=Evidence(
                    UPDATE_FILE,
                    evidence_steps(
                        step
                        for trace in traces
                        for step in trace.steps
                        if trace.component == one.component and step >= one.step
                    ),
                ),
                message=(
                    f"The learning rate of {name} {seen}, and a step there changed the weights by "
                    f"{one.ratio:.2g} times their own size (about 0.001 is usual): what they had "
                    "learned is overwritten. That is a learning rate that is too high."
                ),
                suggestion=(
                    "Bring this rate back to that of the others, or to what it was, and raise it "
                    "by threes from there; if it must rise, warm it up."
                ),
                confidence=0.7,
            )
        )
    return findings


def _since_large(case: _Case, rates: Rates | None, moves: _Moves, t: LearningRateTooHigh) -> _Case:
    """Begun when the steps became large, where the rate itself had to rise first."""
    late = case.kind not in ("jump", "stuck")
    if late or rates is None or rates.lows[0] > 0.5 * max(rates.highs):
        return case
    risen = [
        step for step, ratio in zip(moves.steps, moves.ratios, strict=True) if ratio > t.large_ratio
    ]
    return case._replace(first=max(case.first, min(risen, default=case.first)))


class _Curve(NamedTuple):
    """The loss by windows, infinite where none was finite, and how it began.

    Attributes:
        firsts: First step of each window.
        steps: Last step.
        means: Mean of the finite losses.
        peak: Largest loss of the first two windows.
        base: The loss at the start.
        norm: Gradient norm before the first step; NaN if unknown.
        whole: Whether the windows go back to the start of the run.
    """

    firsts: list[int]
    steps: list[int]
    means: list[float]
    peak: float
    base: float
    norm: float
    whole: bool


def _curve(losses: Losses, collapse: "pl.DataFrame") -> _Curve:
    highs = [one for one in losses.highs if not math.isnan(one)]
    start, norm = _first_step(collapse)
    return _Curve(
        firsts=losses.firsts,
        steps=losses.steps,
        means=[math.inf if math.isnan(one) else one for one in losses.means],
        peak=max(highs[:2], default=math.inf),
        base=_base(losses, start),
        norm=norm,
        whole=losses.firsts[0] < 50,
    )


def _first_step(collapse: "pl.DataFrame") -> tuple[float, float]:
    """Loss and gradient norm of the first step, before anything was changed; NaN if unknown."""
    if not {"step", "loss", "gradient_norm"} <= set(collapse.columns):
        return math.nan, math.nan
    row = next(collapse.head(1).iter_rows(named=True), None)
    if row is None or row["step"] != 0:
        return math.nan, math.nan
    loss, norm = row["loss"], row["gradient_norm"]
    return math.nan if loss is None else float(loss), math.nan if norm is None else float(norm)


def _base(losses: Losses, start: float) -> float:
    """The loss at the start: of the first step, or guessed from the ends of the first window."""
    low, mean, high = losses.lows[0], losses.means[0], losses.highs[0]
    lows = [one for one in losses.lows[2:] if not math.isnan(one)]
    tops = [one for one in losses.highs[2:] if not math.isnan(one)]
    if lows and low > 0 and median(lows) < 1.3 * low and median(tops) > 0.5 * high > low:
        return max(mean, start) if start > 0 else mean  # the same noise in every window
    if not math.isnan(start):
        return start
    return low if high > 4 * low > 0 else mean


def _level(curve: _Curve) -> float:
    """The loss now: the median of the last windows, a fifth of all and at least one."""
    return median(curve.means[-max(1, min(10, len(curve.means) // 5)) :])


def _from_the_start(
    curve: _Curve, rates: Rates | None, moves: _Moves, t: LearningRateTooHigh
) -> _Case | None:
    if not curve.whole or not curve.base > 0 or math.isinf(curve.peak):
        return None
    jumped, now = curve.peak / curve.base, _level(curve) / curve.base
    early = moves.between(0, t.early_steps)
    wild = jumped > t.wild_jump and (now > t.wild_level)
    rate = math.nan if rates is None else max(rates.highs)
    large = early if not math.isnan(early) else 10 * moves.between(0, math.inf)
    # weights that have blown up hide how large the first steps were, and so do rows that are rare
    hidden = (wild and now > t.soon_level) or (math.isnan(early) and jumped > t.jump)
    if hidden and not large > t.large_ratio and rate > t.large_rate:
        large = t.large_ratio
    # what the first step must have been, where it left nothing to be measured afterwards
    first = min(rate * curve.norm / moves.size, rate / moves.rms)
    swept = moves.rms > t.swept_rms or first > t.first_ratio
    if swept and rate > t.large_rate and early < t.large_ratio and now > t.flat_level:
        early = large = max(t.stuck_ratio, first)
    if large < t.large_ratio:
        return None
    # a huge gradient before the first step asks for another scale, not for another rate
    if curve.norm > t.huge_norm and not rate > t.large_rate:
        return None
    if jumped > t.wild_jump and early > t.part_ratio:
        # even where it comes back: what the weights began with has been overwritten
        within = curve.steps[:2][-1] + 1
        said = f"jumped to {jumped:.3g} times its first value within {within} steps"
        return _case("jump", curve.firsts[0], jumped, t.wild_jump, said, now)
    strict = 2.5 if math.isnan(large) else 1.0
    # the further it jumped, the less of it has to be left
    level = t.small_level if jumped <= t.far_jump else t.lasting_level
    level = t.large_rate_level if rate > t.large_rate else level
    lasting = now > strict * (t.soon_level if len(curve.means) <= t.soon_windows else level)
    if jumped > t.jump * strict and (lasting or (wild and len(curve.means) >= t.soon_windows)):
        within = curve.steps[:2][-1] + 1
        said = f"jumped to {jumped:.3g} times its first value within {within} steps"
        return _case("jump", curve.firsts[0], jumped, t.jump, said, now)
    if math.isnan(early):
        early = 3 * moves.between(0, 100)
    if len(curve.means) < t.stuck_windows or not early > t.flat_ratio:
        return None
    late = curve.means[len(curve.means) // 2 :]
    flat = max(late) - min(late) < t.flat * abs(median(late))
    moving = (
        early > t.stuck_ratio
        and moves.between(curve.firsts[len(curve.firsts) // 2], math.inf) > t.late_ratio
    )
    if (flat and now > t.flat_level) or (moving and now > t.stuck_level):
        return _case("stuck", curve.firsts[0], now, t.stuck_level, "has not come down", now)
    return None


def _case(kind: str, first: int, observed: float, threshold: float, said: str, now: float) -> _Case:
    wild = math.isinf(now) or now > 2
    after = "is not finite now" if math.isinf(now) else f"is now at {now:.3g} times its first value"
    return _Case(
        kind=kind,
        first=first,
        observed=observed,
        threshold=threshold,
        unit="times the loss at the start",
        said=f"The loss {said}, and {after}",
        severity="critical" if wild else "warning",
        confidence=0.9 if wild else 0.7,
    )


def _after_a_rise(
    curve: _Curve, rates: Rates | None, moves: _Moves, t: LearningRateTooHigh
) -> _Case | None:
    """A rate that is raised far above all that was before, and a loss that rises with it."""
    if rates is None:
        return None
    top = rates.highs[0]
    for index in range(1, len(rates.highs)):
        high, raised = rates.highs[index], rates.highs[index] > t.rate_rise * top > 0
        start, stop = rates.firsts[index], rates.steps[index]
        series = list(zip(curve.means, curve.steps, strict=True)) if raised else []
        before = [mean for mean, step in series if step < start]
        after = [mean for mean, step in series if step >= stop]
        if len(before) >= 3 and after:
            usual = median(before[-5:])
            now = median(after[-max(1, min(10, len(after) // 3)) :])
            large = moves.between(start, math.inf)
            if now > t.rise * usual and now > t.rise_level * curve.base and not large < 0.01:
                said = (
                    f"rose from {usual:.3g} to {now:.3g} after the learning rate was raised from "
                    f"{top:.3g} to {high:.3g} at about step {start}"
                )
                wild = math.isinf(now) or now > 2 * curve.base
                return _Case(
                    "raised",
                    start,
                    now / usual if usual else math.inf,
                    t.rise,
                    "times the loss before",
                    f"The loss {said}",
                    "critical" if wild else "warning",
                    0.9,
                )
        top = max(top, high)
    return None


def _later(curve: _Curve, moves: _Moves, t: LearningRateTooHigh) -> _Case | None:
    """A loss that fell, then rose and stayed up, under steps that were large before it rose."""
    if len(curve.means) < 6 or not curve.base > 0:
        return None
    smooth = [median(curve.means[max(0, i - 2) : i + 1]) for i in range(len(curve.means))]
    best = min(range(len(smooth)), key=smooth.__getitem__)
    level = _level(curve)
    if not level > t.rise * smooth[best] or not level > t.rise_level * curve.base:
        return None
    onset = next(
        (i for i in range(best + 1, len(smooth)) if curve.means[i] > t.rise * smooth[best]), None
    )
    if onset is None or len(curve.means) - onset < 3:
        return None
    first = curve.firsts[onset]
    lowest = min(range(max(0, best - 2), best + 1), key=curve.means.__getitem__)
    before = moves.between(curve.steps[lowest] - 60, curve.steps[lowest])
    if not before > t.large_ratio:
        return None
    wild = math.isinf(level) or level > 2 * curve.base
    return _Case(
        "later",
        first,
        level / smooth[best],
        t.rise,
        "times its best level",
        f"The loss had come down to {smooth[best]:.3g} and rose to {level:.3g} from about step "
        f"{first} on",
        "critical" if wild else "warning",
        0.7,
    )


def _unsettled(
    curve: _Curve, losses: Losses, moves: _Moves, t: LearningRateTooHigh
) -> _Case | None:
    """A loss that goes up and down by far more than its batches differ, under large steps."""
    half = len(curve.means) // 2
    means, stds, counts = curve.means[half:], losses.stds[half:], losses.counts[half:]
    level = _level(curve)
    if len(means) < t.bounce_windows or not level > t.bounce_level * curve.base > 0:
        return None
    begun = curve.firsts[half]
    spans = ((begun - 60, begun - 1), (begun, math.inf))
    if math.isinf(max(means)) or not all(moves.between(*one) > t.bounce_ratio for one in spans):
        return None
    ups = sum(max(0.0, b - a) for a, b in pairwise(means))
    downs = sum(max(0.0, a - b) for a, b in pairwise(means))
    # what independent batches would make of the means: 0.4 standard deviations of a difference
    errors = [0.4 * math.sqrt(2 / n) * std for n, std in zip(counts, stds, strict=True) if n > 1]
    if len(errors) < len(means) or not ups > t.bounce * sum(errors):
        return None
    if not min(ups, 2 * downs) > t.bounce_sum * curve.base:
        return None
    return _Case(
        "unsettled",
        begun,
        ups / sum(errors),
        t.bounce,
        "times the ups that batches explain",
        f"The loss does not settle: since step {begun} it went up by {ups:.3g} in all, between "
        f"{min(means):.3g} and {max(means):.3g}, {ups / sum(errors):.2g} times what differences "
        "between batches explain",
        "warning",
        0.6,
    )


def _finding(case: _Case, losses: Losses, rates: Rates | None, moves: _Moves) -> Finding:
    largest = moves.between(case.first - 60, case.first + 60)
    if math.isnan(largest):
        largest = moves.between(0, math.inf)
    moved = (
        ""
        if not largest > 0.003
        else " Around there a step changed the weights by up to "
        f"{largest:.2g} times their own size (about 0.001 is usual)."
    )
    rate = "" if rates is None else f", which is {max(rates.highs):.3g} at the highest"
    return Finding(
        rule="learning_rate_too_high",
        severity=case.severity,
        first_step=case.first,
        last_step=losses.steps[-1],
        observed=case.observed,
        threshold=case.threshold,
        unit=case.unit,
        evidence=Evidence(losses.file, evidence_steps(_since(losses.steps, case.first))),
        message=(
            f"{case.said}.{moved} That is the mark of a learning rate that is too high{rate}."
        ),
        suggestion=_SUGGESTION,
        confidence=case.confidence,
    )


def _since(steps: Sequence[int], first: int) -> list[int]:
    return [one for one in steps if one >= first]
