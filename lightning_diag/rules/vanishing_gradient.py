"""A component whose gradient is next to nothing, so that it hardly learns."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING

from lightning_diag.rules.consequences import STANDSTILL
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import strengthen_gradient
from lightning_diag.rules.sizes import Size, is_tiny, largest, ratio, sizes, sizes_by_step
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

__all__ = ["VanishingGradient", "vanishing_gradient"]

_SUGGESTION = (
    "Look at what lies between this part and the loss: sigmoid or tanh that saturate, many layers "
    "without a skip connection or normalization, weights that start too small. Under 16-bit "
    "precision small numbers become zero: try bf16-mixed. A higher learning rate for this part "
    "helps with plain SGD; Adam divides the size out already, so there it does not."
)


@dataclass(frozen=True)
class VanishingGradient:
    """Thresholds of `vanishing_gradient`."""

    mean_l2: float = field(default=1e-5, metadata={"unit": "l2 norm"})
    lost_l2: float = field(default=1e-7, metadata={"unit": "l2 norm"})
    others_ratio: float = field(default=1000.0, metadata={"unit": "times smaller"})
    layer_l2: float = field(default=1e-4, metadata={"unit": "l2 norm of one weight matrix"})
    layer_ratio: float = field(default=3000.0, metadata={"unit": "times smaller"})
    sigmas: float = field(default=6.0, metadata={"unit": "robust standard deviations"})
    history_rows: float = field(default=10, metadata={"unit": "rows"})
    min_tensor_l2: float = field(default=1e-7, metadata={"unit": "l2 norm of one tensor"})
    min_elements: float = field(default=8, metadata={"unit": "elements of a part"})
    min_rows: float = field(default=5, metadata={"unit": "rows"})
    min_share: float = field(default=0.8, metadata={"unit": "share of rows since the first"})
    warmup_rows: float = field(default=2, metadata={"unit": "rows"})
    warmup_share: float = field(default=0.05, metadata={"unit": "share of rows"})


@rule(
    "vanishing_gradient",
    family="gradients",
    needs=("grad", "collapse"),
    thresholds=VanishingGradient,
    explains=("representation_collapse", "attention_uniform", "gradient_imbalance", *STANDSTILL),
    reference="Glorot and Bengio 2010, section 4; bands of the reference systems: mean norm 1e-5, "
    "smallest tensor norm 1e-7.",
    remedy=strengthen_gradient,
)
def vanishing_gradient(
    grad: "pl.DataFrame", collapse: "pl.DataFrame", thresholds: VanishingGradient
) -> list[Finding]:
    """Components whose gradient is tiny while others' is not, or tiny everywhere from the start.

    Tiny means a norm below `mean_l2` and `others_ratio` times below the largest other component,
    or `others_ratio` times below its own usual share, at once rather than little by little. A
    model in which everything shrinks together has converged, which is no sickness.
    """
    ended = stopped_finding(
        collapse, "vanishing_gradient", "The gradient norm fell to {norm}", _SUGGESTION
    )
    if ended:
        return ended
    frame = without_skipped(grad)
    traces = component_traces(frame)
    table = {
        step: largest(row.values()) for step, row in sizes_by_step(traces).items() if len(row) > 1
    }
    whole = _tiny_from_the_start(traces, thresholds)
    if whole is not None:
        return [whole]
    found = [_judge(trace, table, thresholds) for trace in traces]
    findings = [one for one in found if one is not None]
    if not findings:
        layers = [_between_layers(trace, thresholds) for trace in whole_traces(frame)]
        findings = [one for one in layers if one is not None]
    return findings or _smallest_tensor(whole_traces(frame), thresholds)


def _judge(trace: Trace, table: dict[int, list[Size]], t: VanishingGradient) -> Finding | None:
    name = str(trace.component)
    measured = [
        (step, size.l2, max(ratio(other, size) for other in table[step]))
        for step, size in zip(trace.steps, sizes(trace), strict=True)
        if size.l2 > 0 and size.rms > 0 and step in table
    ]
    measured = measured[after_warmup(len(measured), t.warmup_rows, t.warmup_share) :]
    tiny = [l2 < t.mean_l2 and times > t.others_ratio for _, l2, times in measured]
    onset = _onset(tiny, t)
    if onset is None:
        return _sudden_fall(name, measured, t)
    rows = measured[onset:]
    mean = fmean(l2 for _, l2, _ in rows)
    times = median(times for _, _, times in rows)
    message = (
        f"Hardly any gradient reaches `{name}`: its norm is {mean:.1e} on average, "
        f"{times:,.0f} times below the largest other part. It learns next to nothing."
    )
    severity: Severity = "critical" if mean < t.lost_l2 else "warning"
    if is_tiny(trace, t.min_elements):
        # a temperature, or a scale that a normalization takes away again
        severity = "info"
    return Finding(
        rule="vanishing_gradient",
        severity=severity,
        component=name,
        first_step=rows[0][0],
        last_step=rows[-1][0],
        observed=mean,
        threshold=t.mean_l2,
        unit="mean l2 norm",
        evidence=Evidence(GRAD_FILE, evidence_steps(step for step, _, _ in rows)),
        message=message,
        suggestion=_SUGGESTION,
        confidence=0.9,
    )


def _onset(flags: Sequence[bool], t: VanishingGradient) -> int | None:
    """Start of the longest streak, if nearly every row since then is flagged."""
    found = streaks(flags)
    if not found:
        return None
    onset = max(found, key=lambda one: one[1] - one[0])[0]
    since = flags[onset:]
    enough = sum(since) >= t.min_rows and sum(since) >= t.min_share * len(since)
    return onset if enough else None


def _sudden_fall(
    name: str, measured: list[tuple[int, float, float]], t: VanishingGradient
) -> Finding | None:
    times = [math.log(times) for _, _, times in measured]
    if len(times) < t.history_rows + t.min_rows:
        return None
    usual = median(times[: int(t.history_rows)])
    if max(times) < usual + math.log(t.others_ratio):
        return None
    heights = outliers(times, sigmas=t.sigmas, window=128, history=int(t.history_rows), floor=0.2)
    fallen = [
        height > 1.0 and one > usual + math.log(t.others_ratio)
        for height, one in zip(heights, times, strict=True)
    ]
    onset = _onset(fallen, t)
    if onset is None:
        return None
    rows = measured[onset:]
    fall = math.exp(median(times[onset:]) - usual)
    return Finding(
        rule="vanishing_gradient",
        severity="warning",
        component=name,
        first_step=rows[0][0],
        last_step=rows[-1][0],
        observed=fall,
        threshold=t.others_ratio,
        unit="times smaller than before, beside the other parts",
        evidence=Evidence(GRAD_FILE, evidence_steps(step for step, _, _ in rows)),
        message=(
            f"The gradient of `{name}` fell at step {rows[0][0]} to 1/{fall:,.0f} of its usual "
            "size beside the other parts, and stayed there."
        ),
        suggestion=_SUGGESTION,
        confidence=0.8,
    )


def _tiny_from_the_start(traces: list[Trace], t: VanishingGradient) -> Finding | None:
    largest: dict[int, float] = {}
    for trace in traces:
        for step, size in zip(trace.steps, sizes(trace), strict=True):
            if not math.isnan(size.l2):
                largest[step] = max(size.l2, largest.get(step, 0.0))
    steps = sorted(largest)
    steps = steps[after_warmup(len(steps), t.warmup_rows, t.warmup_share) :]
    # all rows count here: a model that converged had gradients at first
    rows = [largest[step] for step in sorted(largest)]
    if len(steps) < t.min_rows or max(rows) >= t.mean_l2 or not any(rows):
        return None
    mean = fmean(largest[step] for step in steps)
    return Finding(
        rule="vanishing_gradient",
        severity="warning",
        first_step=steps[0],
        last_step=steps[-1],
        observed=mean,
        threshold=t.mean_l2,
        unit="mean l2 norm of the largest component",
        evidence=Evidence(GRAD_FILE, evidence_steps(steps)),
        message=(
            "Every part of the model had next to no gradient from the first step on: the largest "
            f"norm is {mean:.1e} on average."
        ),
        suggestion=(
            "Look at the loss and the last layer first: a loss that is divided by a large number, "
            "an output that saturates (sigmoid or softmax applied twice), logits whose spread is "
            "far below 1 (a product of many unit vectors, a high temperature), weights that start "
            "too small. If the run went on from a model that had converged, this is expected."
        ),
        confidence=0.6,
    )


def _between_layers(trace: Trace, t: VanishingGradient) -> Finding | None:
    """One weight matrix that gets next to nothing beside the largest one, also inside a part."""
    columns = (trace.steps, trace.numbers("matrix_min"), trace.numbers("matrix_max"))
    rows = [
        (step, low, high / low, name)
        for step, low, high, name in zip(*columns, trace.words("smallest"), strict=True)
        # a bias with two dimensions is no layer through which the gradient passes
        if low > 0 and high > 0 and not (name or "").endswith("bias")
    ]
    rows = rows[after_warmup(len(rows), t.warmup_rows, t.warmup_share) :]
    tiny = [low < t.layer_l2 and times > t.layer_ratio for _, low, times, _ in rows]
    onset = _onset(tiny, t)
    if onset is None:
        return None
    rows = rows[onset:]
    names = Counter(name for *_, name in rows if name)
    name = names.most_common(1)[0][0] if names else None
    typical, times = median(low for _, low, _, _ in rows), median(times for _, _, times, _ in rows)
    where = f" (`{name}`)" if name else ""
    return Finding(
        rule="vanishing_gradient",
        severity="warning",
        first_step=rows[0][0] if onset else trace.steps[0],
        last_step=rows[-1][0],
        observed=typical,
        threshold=t.layer_l2,
        unit="median l2 norm of the smallest weight matrix",
        evidence=Evidence(GRAD_FILE, evidence_steps(step for step, *_ in rows)),
        message=(
            f"The gradient fades on its way through the model: one weight matrix{where} gets a "
            f"norm of {typical:.1e}, {times:.2g} times below the largest. The layers around it "
            "learn next to nothing."
        ),
        suggestion=_SUGGESTION,
        confidence=0.8,
    )


def _smallest_tensor(traces: list[Trace], t: VanishingGradient) -> list[Finding]:
    for trace in traces:
        rows = list(zip(trace.steps, trace.numbers("min_norm"), strict=True))
        rows = [row for row in rows if not math.isnan(row[1])]
        rows = rows[after_warmup(len(rows), t.warmup_rows, t.warmup_share) :]
        low = [row for row in rows if row[1] < t.min_tensor_l2]
        if len(low) < t.min_rows or len(low) < t.min_share * len(rows):
            continue
        smallest = median(norm for _, norm in low)
        return [
            Finding(
                rule="vanishing_gradient",
                severity="info",
                first_step=low[0][0],
                last_step=low[-1][0],
                observed=smallest,
                threshold=t.min_tensor_l2,
                unit="smallest l2 norm of one tensor",
                evidence=Evidence(GRAD_FILE, evidence_steps(step for step, _ in low)),
                message=(
                    "Some single tensor gets next to no gradient "
                    f"(smallest norm {smallest:.1e}), while the part it belongs to gets one."
                ),
                suggestion=(
                    "Usually nothing to do: a bias in front of a normalization, or of the keys in "
                    "attention, has no effect on the loss and so no gradient."
                ),
                confidence=0.5,
            )
        ]
    return []
