"""Clipping that cuts nearly every step by a lot, so that it, not the gradient, sets the step."""

import math
from collections import Counter
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING

from lightning_diag.rules.consequences import STANDSTILL
from lightning_diag.rules.finding import Evidence, Finding
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import loosen_clip
from lightning_diag.rules.traces import (
    GRAD_FILE,
    Trace,
    after_warmup,
    evidence_steps,
    whole_traces,
    without_skipped,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = ["ClippingDominates", "clipping_dominates"]


@dataclass(frozen=True)
class ClippingDominates:
    """Thresholds of `clipping_dominates`."""

    max_share: float = field(default=0.9, metadata={"unit": "share of steps clipped"})
    min_coefficient: float = field(default=0.1, metadata={"unit": "median clip coefficient"})
    noted_share: float = field(default=0.5, metadata={"unit": "share of steps clipped"})
    noted_coefficient: float = field(default=0.5, metadata={"unit": "median clip coefficient"})
    value_share: float = field(default=0.1, metadata={"unit": "clip value over rms"})
    min_rows: float = field(default=10, metadata={"unit": "rows"})
    warmup_rows: float = field(default=2, metadata={"unit": "rows"})
    warmup_share: float = field(default=0.34, metadata={"unit": "share of rows"})


@rule(
    "clipping_dominates",
    family="gradients",
    needs="grad",
    thresholds=ClippingDominates,
    explains=STANDSTILL,
    reference="Pascanu et al. 2013, section 3.2: the threshold belongs near the usual norm.",
    remedy=loosen_clip,
)
def clipping_dominates(grad: "pl.DataFrame", thresholds: ClippingDominates) -> list[Finding]:
    """Clipping that is at work on nearly every step and leaves little of the gradient.

    The first third of the run does not count: heavy clipping while a model settles is what
    clipping is for. Coefficients between 0.1 and 0.5 are common in large models, and only noted.
    Clipping by value dominates where the typical element is far above the value.
    """
    traces = whole_traces(without_skipped(grad))
    found = [_judge(trace, thresholds) or _by_value(trace, thresholds) for trace in traces]
    return [one for one in found if one is not None]


def _judge(trace: Trace, t: ClippingDominates) -> Finding | None:
    start = after_warmup(len(trace.steps), t.warmup_rows, t.warmup_share)
    names = ("clip_coefficient", "clip_value", "clipped")
    numbers = zip(trace.steps, *(trace.numbers(name) for name in names), strict=True)
    by_norm = [algorithm in (None, "norm") for algorithm in trace.words("clip_algorithm")]
    rows = [
        (step, coefficient, value, clipped > 0)
        for (step, coefficient, value, clipped), norm in list(zip(numbers, by_norm, strict=True))[
            start:
        ]
        if norm and not math.isnan(coefficient)
    ]
    if len(rows) < t.min_rows:
        return None
    share = fmean(clipped for *_, clipped in rows)
    left = median(coefficient for _, coefficient, _, _ in rows)
    lately = _lately(rows, t)
    if share < t.max_share and len(lately) >= t.min_rows:
        # a clip that was lowered in mid-run
        rows, share = lately, 1.0
        left = median(coefficient for _, coefficient, _, _ in rows)
    extreme = share >= t.max_share and left <= t.min_coefficient
    noted = share >= t.noted_share and left <= t.noted_coefficient
    if not (extreme or noted):
        return None
    component, part = _dominant(trace, start)
    blame = f" `{component}` supplies the largest part ({part:.0%} of these steps)." if part else ""
    steps = [step for step, _, _, clipped in rows if clipped]
    value = median(value for _, _, value, _ in rows)
    return Finding(
        rule="clipping_dominates",
        severity="warning" if extreme else "info",
        component=component if part > 0.5 else None,
        first_step=_first(trace, steps[0], t) if extreme else steps[0],
        last_step=steps[-1],
        observed=left,
        threshold=t.min_coefficient if extreme else t.noted_coefficient,
        unit="median clip coefficient",
        evidence=Evidence(GRAD_FILE, evidence_steps(steps)),
        message=(
            f"Clipping at {value:g} cut {share:.0%} of the steps after the start, and left "
            f"{left:.1%} of the gradient at the median.{blame}"
        ),
        suggestion=_SUGGESTION if extreme else _NOTE,
        confidence=0.8 if extreme else 0.5,
    )


def _lately(
    rows: list[tuple[int, float, float, bool]], t: ClippingDominates
) -> list[tuple[int, float, float, bool]]:
    """The last rows, all of which are cut down to little."""
    since = len(rows)
    while since and rows[since - 1][3] and rows[since - 1][1] <= t.min_coefficient:
        since -= 1
    return rows[since:]


def _by_value(trace: Trace, t: ClippingDominates) -> Finding | None:
    if not {"rms", "clip_value", "clip_algorithm"} <= set(trace.rows.columns):
        return None
    start = after_warmup(len(trace.steps), t.warmup_rows, t.warmup_share)
    columns = (trace.steps, trace.words("clip_algorithm"), trace.numbers("clip_value"))
    rows = [
        (step, value, value / rms)
        for step, algorithm, value, rms in list(zip(*columns, trace.numbers("rms"), strict=True))
        if algorithm == "value" and value > 0 and rms > 0
    ]
    later = rows[start:]
    if len(later) < t.min_rows:
        return None
    value, left = median(value for _, value, _ in later), median(left for *_, left in later)
    if left > t.value_share:
        return None
    return Finding(
        rule="clipping_dominates",
        severity="warning",
        first_step=rows[0][0],
        last_step=rows[-1][0],
        observed=left,
        threshold=t.value_share,
        unit="clip value over the root mean square of the gradient",
        evidence=Evidence(GRAD_FILE, evidence_steps(step for step, *_ in later)),
        message=(
            f"Every element of the gradient is cut to at most {value:g}, and a typical one is "
            f"{1 / left:,.0f} times as large: what is left is its sign."
        ),
        suggestion=(
            "Clip by norm (`gradient_clip_algorithm=norm`) near the usual norm, or raise the value "
            "far above the typical element, so that it catches the odd one only."
        ),
        confidence=0.8,
    )


_SUGGESTION = (
    "The clip, not the gradient, now sets the size of each step. Find out why the gradient is this "
    "large: a loss that is summed rather than averaged, inputs that are not scaled, weights that "
    "start too large. If it is steady, put the clip near the usual norm, so that it catches the "
    "odd step only; with plain SGD lower the learning rate by the same factor."
)
_NOTE = (
    "Usually nothing to do. If training is slow, compare with a clip near the usual norm; with "
    "plain SGD lower the learning rate by the same factor."
)


def _first(trace: Trace, step: int, t: ClippingDominates) -> int:
    """Where the rows begin that are all cut by as much; the start of the run did not decide."""
    cut = [left <= t.min_coefficient for left in trace.numbers("clip_coefficient")]
    at = trace.steps.index(step)
    while at > 0 and cut[at - 1]:
        at -= 1
    return trace.steps[at]


def _dominant(trace: Trace, start: int) -> tuple[str | None, float]:
    names = [name for name in trace.words("dominant")[start:] if name]
    if not names:
        return None, 0.0
    name, times = Counter(names).most_common(1)[0]
    return name, times / len(names)
