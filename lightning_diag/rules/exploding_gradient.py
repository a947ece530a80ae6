"""A gradient that grows out of all proportion."""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_series import LOSS_FILE
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import calm_start
from lightning_diag.rules.sizes import sizes
from lightning_diag.rules.stopped_early import stopped_finding
from lightning_diag.rules.traces import (
    GRAD_FILE,
    Trace,
    after_warmup,
    component_traces,
    evidence_steps,
    outliers,
    streaks,
    whole_traces,
    without_skipped,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = ["ExplodingGradient", "exploding_gradient"]

_SUGGESTION = (
    "Lower the learning rate (0.3 times is a good first try), warm it up over the first few "
    "hundred steps, and clip the gradient norm at 1, or tighter than now. If it began at one "
    "step, look at the batch of that step."
)


@dataclass(frozen=True)
class ExplodingGradient:
    """Thresholds of `exploding_gradient`."""

    max_l2: float = field(default=100.0, metadata={"unit": "l2 norm"})
    large_l2: float = field(default=10.0, metadata={"unit": "l2 norm"})
    own_ratio: float = field(default=10.0, metadata={"unit": "times its own median"})
    absurd_l2: float = field(default=1e4, metadata={"unit": "median l2 norm"})
    harm: float = field(default=100.0, metadata={"unit": "times the loss before"})
    left: float = field(default=2.0, metadata={"unit": "times the loss before, afterwards"})
    growth: float = field(default=100.0, metadata={"unit": "times the start of the run"})
    sigmas: float = field(default=6.0, metadata={"unit": "robust standard deviations"})
    history_rows: float = field(default=5, metadata={"unit": "rows"})
    min_rows: float = field(default=3, metadata={"unit": "rows"})
    warmup_rows: float = field(default=1, metadata={"unit": "rows"})
    warmup_share: float = field(default=0.05, metadata={"unit": "share of rows"})


class _Rise(NamedTuple):
    component: str | None
    steps: list[int]  # the rows that stand out
    peak: float
    usual: float
    lasting: bool
    harmed: bool = False  # short, but the loss has not come back from it


@rule(
    "exploding_gradient",
    family="gradients",
    needs=("grad", "loss", "collapse"),
    thresholds=ExplodingGradient,
    explains=(
        "saturated_activation",
        *("nonfinite_gradient", "nonfinite_loss", "clipping_dominates", "gradient_imbalance"),
        *("update_too_large", "divergence", "loss_spike", "loss_oscillation", "dead_relu"),
        *("dead_component", "constant_prediction", "representation_collapse", "not_learning"),
    ),
    reference="Pascanu et al. 2013, On the difficulty of training recurrent neural networks; "
    "bands of the reference systems: 100, and 10 for large.",
    remedy=calm_start,
)
def exploding_gradient(
    grad: "pl.DataFrame",
    loss: "pl.DataFrame",
    collapse: "pl.DataFrame",
    thresholds: ExplodingGradient,
) -> list[Finding]:
    """Norms above `max_l2` that also stand far above the component's own past.

    A norm of 1000 that is always 1000 belongs to a loss that is summed rather than averaged: that
    is worth a note, not an alarm. One or two lone spikes are a note as well. Where the rows of
    gradients are few, the norms that stand beside the loss are taken.
    """
    frame = without_skipped(grad)
    whole = whole_traces(frame)
    parts = [rise for one in component_traces(frame) if (rise := _rise(one, thresholds))]
    wholes = [(rise, one) for one in whole if (rise := _rise(one, thresholds))]
    if wholes:
        rise, trace = max(wholes, key=lambda pair: (pair[0].lasting, pair[0].peak))
        rise = rise._replace(harmed=not rise.lasting and _harmed(loss, rise.steps, thresholds))
        return [_finding(rise._replace(component=_leader(rise, parts)), parts, trace, thresholds)]
    if parts:
        rise = max(parts, key=lambda one: (one.lasting, one.peak))
        clipped = whole[0] if whole else None
        return [_finding(rise, parts, clipped, thresholds)]
    windows = _windows(loss)
    between = _rise(windows, thresholds)
    if between is not None:
        clips = any(one.numbers("clip_value")[0] > 0 for one in whole if one.steps)
        return [_finding(between, parts, windows, thresholds, clips=clips, file=LOSS_FILE)]
    at_once = _at_the_start(loss, thresholds)
    if at_once is not None:
        return [at_once]
    broken = _before_a_break(loss, thresholds)
    if broken is not None:
        return [broken]
    ended = stopped_finding(
        collapse, "exploding_gradient", "The gradient norm rose to {norm}", _SUGGESTION
    )
    alone = _stands_alone(component_traces(frame), thresholds)
    return ended or [one for trace in whole for one in _steadily_large(trace, alone, thresholds)]


def _windows(loss: "pl.DataFrame") -> Trace:
    """The mean norms of ``loss.jsonl``, of the windows in which each step was taken."""
    import polars as pl

    columns = ("first_step", "gradient_norm", "gradient_nonfinite", "skipped")
    empty = pl.DataFrame(
        schema=dict.fromkeys(("step", "l2", "zeros", "count", "nonfinite"), pl.Float64)
    )
    if not set(columns) <= set(loss.columns):
        return Trace(None, empty)
    kept = loss.filter((pl.col("gradient_nonfinite") == 0) & (pl.col("skipped") == 0))
    whole = [pl.lit(0.0).alias("zeros"), pl.lit(1.0).alias("count"), pl.lit(0.0).alias("nonfinite")]
    names = [pl.col("first_step").alias("step"), pl.col("gradient_norm").alias("l2")]
    return Trace(None, kept.select(*names, *whole).drop_nulls().sort("step"))


def _harmed(loss: "pl.DataFrame", steps: list[int], t: ExplodingGradient) -> bool:
    """Whether the loss leapt at one of these steps, and stayed up after it."""
    if not {"first_step", "step", "loss"} <= set(loss.columns):
        return False
    rows = loss.drop_nulls("loss").sort("step").to_dicts()
    for at, row in enumerate(rows):
        before = [one["loss"] for one in rows[max(0, at - 3) : at]]
        after = [one["loss"] for one in rows[at + 2 : at + 7]]
        struck = any(row["first_step"] <= step <= row["step"] for step in steps)
        if struck and before and after and median(before) > 0:
            usual = median(before)
            return bool(row["loss"] > t.harm * usual and median(after) > t.left * usual)
    return False


def _at_the_start(loss: "pl.DataFrame", t: ExplodingGradient) -> Finding | None:
    """A first step out of all proportion, after which nothing is learned."""
    names = ("first_step", "step", "loss", "loss_min", "gradient_norm", "gradient_norm_max")
    if not set(names) <= set(loss.columns) or loss.height <= t.history_rows:
        return None
    rows = loss.drop_nulls(("loss", "gradient_norm", "gradient_norm_max")).sort("step").to_dicts()
    if len(rows) <= t.history_rows or rows[0]["first_step"] != 0:
        return None
    first, later = rows[0], rows[1:]
    peak, usual = first["gradient_norm_max"], median(row["gradient_norm"] for row in later)
    level = median(row["loss"] for row in later[-len(later) // 3 :])
    if peak <= t.growth * t.max_l2 or peak <= t.growth * usual or level < 0.9 * first["loss_min"]:
        return None
    return Finding(
        rule="exploding_gradient",
        severity="critical",
        first_step=0,
        last_step=int(first["step"]),
        observed=peak,
        threshold=t.growth * t.max_l2,
        unit="l2 norm before clipping",
        evidence=Evidence(LOSS_FILE, (int(first["step"]),)),
        message=(
            f"The gradient norm of the whole model was {peak:.3g} within the first "
            f"{first['step'] + 1} steps, and {usual:.3g} after them: what those steps did to the "
            "weights has not been undone, and the loss has not come down since."
        ),
        suggestion=(
            "Start with smaller weights (for a recurrent network orthogonal ones, with a gain of 1 "
            "at most), or clip the gradient norm at 1 from the first step on, and warm the "
            "learning rate up."
        ),
        confidence=0.8,
    )


def _before_a_break(loss: "pl.DataFrame", t: ExplodingGradient) -> Finding | None:
    """A norm out of all proportion right before the first step that was not finite."""
    names = ("step", "first_step", "gradient_norm", "gradient_norm_max", "nonfinite", "skipped")
    if not {*names, "gradient_nonfinite"} <= set(loss.columns):
        return None
    usual: list[float] = []
    for row in loss.sort("step").to_dicts():
        norm, peak = row["gradient_norm"], row["gradient_norm_max"]
        if (row["nonfinite"] or row["gradient_nonfinite"]) and not row["skipped"]:
            typical = median(usual) if usual else t.max_l2
            if peak is None or peak <= max(t.growth * t.max_l2, t.growth * typical):
                return None
            first = row.get("first_nonfinite")
            step = max(row["first_step"], (row["step"] if first is None else int(first)) - 1)
            return Finding(
                rule="exploding_gradient",
                severity="critical",
                first_step=step,
                last_step=int(row["step"]),
                observed=peak,
                threshold=t.growth * t.max_l2,
                unit="l2 norm before clipping",
                evidence=Evidence(LOSS_FILE, (int(row["step"]),)),
                message=(
                    f"The gradient norm of the whole model was {peak:.3g} right before NaN or "
                    f"infinity appeared, at about step {step}: the step that it made was far too "
                    "large."
                ),
                suggestion=_SUGGESTION,
                confidence=0.7,
            )
        if norm is not None:
            usual.append(norm)
    return None


def _norms(trace: Trace) -> tuple[list[int], list[float]]:
    rows = zip(trace.steps, sizes(trace), strict=True)
    kept = [(step, size.l2) for step, size in rows if size.l2 > 0]
    return [step for step, _ in kept], [l2 for _, l2 in kept]


def _rise(trace: Trace, t: ExplodingGradient) -> _Rise | None:
    steps, norms = _norms(trace)
    skip = after_warmup(len(norms), t.warmup_rows, t.warmup_share)
    steps, norms = steps[skip:], norms[skip:]
    if not norms or max(norms) <= t.max_l2:
        return None
    flags = _above_own_past(norms, t)
    grown, usual = _growth(norms, t)
    if grown:
        flags = [one > max(t.max_l2, t.own_ratio * usual) for one in norms]
    if not any(flags):
        return None
    lasting = grown or any(stop - start >= t.min_rows for start, stop in streaks(flags))
    high = [step for step, flag in zip(steps, flags, strict=True) if flag]
    if not grown:
        usual = median([one for one, flag in zip(norms, flags, strict=True) if not flag])
    return _Rise(trace.component, high, max(norms), usual, lasting)


def _above_own_past(norms: list[float], t: ExplodingGradient) -> list[bool]:
    # the floor keeps 6 sigma at `own_ratio` or above where the past hardly moves at all
    floor = math.log(t.own_ratio) / t.sigmas
    logs = [math.log(one) for one in norms]
    heights = outliers(logs, sigmas=t.sigmas, window=128, history=int(t.history_rows), floor=floor)
    return [height > 1.0 and one > t.max_l2 for height, one in zip(heights, norms, strict=True)]


def _growth(norms: list[float], t: ExplodingGradient) -> tuple[bool, float]:
    """Whether the end of the run towers over its start, and the start's median."""
    rows = int(t.min_rows)
    if len(norms) < 2 * rows:
        return False, 0.0
    quarter = max(rows, len(norms) // 4)
    start, end = median(norms[:quarter]), median(norms[-quarter:])
    return end > max(t.max_l2, t.growth * start), start


def _leader(whole: _Rise, parts: list[_Rise]) -> str | None:
    """The component whose peak makes up most of the whole model's."""
    if not parts:
        return None
    top = max(parts, key=lambda one: one.peak)
    return top.component if top.peak**2 >= 0.5 * whole.peak**2 else None


def _finding(
    rise: _Rise,
    parts: list[_Rise],
    trace: Trace | None,
    t: ExplodingGradient,
    *,
    clips: bool | None = None,
    file: str = GRAD_FILE,
) -> Finding:
    clipped = trace is not None and _norm_clipped(trace, rise.steps) if clips is None else clips
    name = f"`{rise.component}`" if rise.component else "the whole model"
    others = sum(one.component != rise.component for one in parts)
    also = f" {others} other part{'s' * (others != 1)} rose with it." if others else ""
    cushion = " Clipping cut these steps down, which limits the harm." if clipped else ""
    often = "and stayed up" if rise.lasting else f"at {len(rise.steps)} measured step(s)"
    harm = " The loss leapt with it, and has not come back." if rise.harmed else ""
    return Finding(
        rule="exploding_gradient",
        severity=_severity(rise, clipped, t),
        component=rise.component,
        first_step=rise.steps[0],
        last_step=rise.steps[-1],
        observed=rise.peak,
        threshold=t.max_l2,
        unit="l2 norm before clipping",
        evidence=Evidence(file, evidence_steps(rise.steps)),
        message=(
            f"The gradient norm of {name} rose to {rise.peak:.3g} {often}, first at step "
            f"{rise.steps[0]}; {rise.usual:.3g} was usual.{also}{cushion}{harm}"
        ),
        suggestion=_SUGGESTION,
        confidence=0.9 if rise.lasting else 0.6,
    )


def _severity(rise: _Rise, clipped: bool, t: ExplodingGradient) -> Severity:
    if rise.lasting:
        out_of_hand = rise.peak > t.growth * rise.usual and not clipped
        return "critical" if out_of_hand else "warning"
    if rise.harmed:
        return "critical"
    return "warning" if len(rise.steps) >= t.min_rows and not clipped else "info"


def _norm_clipped(trace: Trace, steps: list[int]) -> bool:
    at = dict(zip(trace.steps, trace.numbers("clipped"), strict=True))
    marks = [at.get(step, 0.0) for step in steps]
    return sum(mark > 0 for mark in marks) > 0.5 * len(marks)


def _absurd(steps: list[int], typical: float, t: ExplodingGradient) -> Finding:
    return Finding(
        rule="exploding_gradient",
        severity="warning",
        first_step=steps[0],
        last_step=steps[-1],
        observed=typical,
        threshold=t.absurd_l2,
        unit="median l2 norm before clipping",
        evidence=Evidence(GRAD_FILE, evidence_steps(steps)),
        message=(
            f"The gradient norm is {typical:.3g} at the median, from the first steps on: signals "
            "grow on their way through the model, or the loss itself is huge."
        ),
        suggestion=(
            "Look at what makes them grow: weights that start too large (the deviation of a "
            "layer's weights belongs near one over the root of its inputs), sums over many "
            "neighbours or positions where a mean was meant, inputs or targets that are not "
            "scaled, a missing normalization."
        ),
        confidence=0.7,
    )


def _stands_alone(traces: list[Trace], t: ExplodingGradient) -> bool:
    """Whether one part towers over all others, which is an imbalance and no growth."""
    norms = sorted(median(found) for one in traces if (found := _norms(one)[1]))
    return len(norms) > 1 and norms[-1] > t.growth * norms[-2]


def _steadily_large(trace: Trace, alone: bool, t: ExplodingGradient) -> list[Finding]:
    steps, norms = _norms(trace)
    skip = after_warmup(len(norms), t.warmup_rows, t.warmup_share)
    steps, norms = steps[skip:], norms[skip:]
    if len(norms) < t.history_rows or median(norms) <= t.large_l2:
        return []
    typical = median(norms)
    if typical > t.absurd_l2 and not alone:
        return [_absurd([trace.steps[0], *steps], typical, t)]
    return [
        Finding(
            rule="exploding_gradient",
            severity="info",
            first_step=steps[0],
            last_step=steps[-1],
            observed=typical,
            threshold=t.large_l2,
            unit="median l2 norm before clipping",
            evidence=Evidence(GRAD_FILE, evidence_steps(steps)),
            message=f"The gradient norm is large, {typical:.3g} at the median, but steady.",
            suggestion=(
                "Usually nothing to do. A loss that is summed rather than averaged over the batch "
                "does this; averaging it makes clipping and learning rates comparable to others'."
            ),
            confidence=0.7,
        )
    ]
