"""What the gradient chart draws: the points, the marks beside them, and what was left out."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_diag.report.norms import WHOLE
from lightning_diag.report.thinning import thin
from lightning_diag.rules.traces import Trace, component_traces, whole_traces

if TYPE_CHECKING:
    import polars as pl

__all__ = ["HEALTHY", "SILENT", "FlowData", "flow_data"]

HEALTHY = (1e-3, 1.0)
"""Band of mean gradient norms that the reference systems call healthy."""

SILENT = "zero or none, drawn at the floor"
"""What is said of a step at which a component got no gradient."""

_TOP = 10  # components drawn by themselves
_POINTS = 5000  # a series
_ALL_POINTS = 12_000  # a chart: the page holds every one of them
_LOWEST = 1e-12


@dataclass(frozen=True)
class FlowData:
    """Rows for the gradient chart.

    Args:
        names: The components drawn, largest median norm first.
        points: ``{step, component, l2, segment}``; a new segment starts after a gap.
        marks: ``{step, component, l2, what}`` of zeros, non-finite and skipped steps.
        steps: First and last step.
        domain: Lower and upper edge of the norm axis, powers of ten.
        clip: Norm that the Trainer clips to.
        said: What a reader must know of points or components left out.
        described: The chart in words.
    """

    names: list[str]
    points: list[dict[str, Any]]
    marks: list[dict[str, Any]]
    steps: list[int]
    domain: list[float]
    clip: float | None
    said: list[str]
    described: str


def flow_data(grad: "pl.DataFrame") -> FlowData:
    """Cut, thin and describe the rows of ``records/grad.jsonl``."""
    whole, parts = whole_traces(grad), component_traces(grad)
    skipped = _skipped(whole)
    ranked = sorted(parts, key=_typical, reverse=True)
    drawn, said = ranked[:_TOP], []
    if len(ranked) > _TOP:
        said.append(
            f"The {_TOP} components with the largest norms of {len(ranked)}; the others are in "
            "gradient_norms.csv."
        )
    limit = max(200, min(_POINTS, _ALL_POINTS // max(1, len(drawn))))
    points: list[dict[str, Any]] = []
    most = 0
    for trace in drawn:
        rows = _series(trace, skipped)
        most = max(most, len(rows))
        points += [rows[index] for index in thin([row["l2"] or 0.0 for row in rows], limit)]
    if most > limit:
        said.append(f"Thinned from {most} to {limit} points a line; lows and highs are kept.")
    steps = [step for trace in [*parts, *whole] for step in trace.steps] or [0]
    first, last = min(steps), max(steps)
    domain = _domain([row["l2"] for row in points], parts, whole)
    marks = _thinned(_marks([*drawn, *_only_marked(ranked[_TOP:])], whole, skipped, domain), limit)
    names = [str(trace.component) for trace in drawn]
    return FlowData(
        names=names,
        points=points,
        marks=marks,
        steps=[first, last] if first < last else [first - 1, first + 1],
        domain=domain,
        clip=_clip(whole),
        said=said,
        described=_describe(names, len(ranked), steps, domain, marks),
    )


def _typical(trace: Trace) -> float:
    norms = sorted(l2 for l2 in trace.numbers("l2") if l2 >= 0)
    return norms[len(norms) // 2] if norms else -1.0


def _skipped(whole: list[Trace]) -> set[int]:
    return {
        step
        for trace in whole
        for step, mark in zip(trace.steps, trace.numbers("skipped"), strict=True)
        if mark > 0
    }


def _broken(trace: Trace) -> list[tuple[int, float, bool]]:
    names = ("l2", "nonfinite", "l2_nonfinite")
    rows = zip(trace.steps, *(trace.numbers(name) for name in names), strict=True)
    return [(step, l2, bad > 0 or overflow > 0) for step, l2, bad, overflow in rows]


def _silent_steps(trace: Trace) -> set[int]:
    """Steps at which something trainable got zeros or nothing; what is frozen is not silent."""
    columns = (trace.numbers(name) for name in ("l2", "tensors", "missing"))
    return {
        step
        for step, l2, tensors, missing in zip(trace.steps, *columns, strict=True)
        if (l2 == 0 and (tensors > 0 or missing > 0)) or (math.isnan(l2) and missing > 0)
    }


def _series(trace: Trace, skipped: set[int]) -> list[dict[str, Any]]:
    rows, segment, open_segment = [], 0, False
    for step, l2, bad in _broken(trace):
        if l2 > 0 and not bad and step not in skipped:
            row = {"step": step, "component": str(trace.component), "l2": _short(l2)}
            rows.append({**row, "segment": segment})
            open_segment = True
        elif open_segment:
            segment, open_segment = segment + 1, False
    return rows


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _only_marked(rest: list[Trace]) -> list[Trace]:
    """Components that are not drawn, but have a non-finite row that must not be hidden."""
    return [trace for trace in rest if any(bad for *_, bad in _broken(trace))]


def _marks(
    parts: list[Trace], whole: list[Trace], skipped: set[int], domain: list[float]
) -> list[dict[str, Any]]:
    marks = []
    for trace in parts:
        silent = _silent_steps(trace)
        for step, _, bad in _broken(trace):
            row = {"step": step, "component": str(trace.component)}
            if step in skipped:
                continue
            if bad:
                marks.append({**row, "l2": domain[1], "what": "NaN or infinity"})
            elif step in silent:
                marks.append({**row, "l2": domain[0], "what": SILENT})
    named = {mark["step"] for mark in marks if mark["what"] == "NaN or infinity"}
    for trace in whole:
        for step, _, bad in _broken(trace):
            if bad and step not in skipped | named:
                row = {"step": step, "component": WHOLE, "l2": domain[1]}
                marks.append({**row, "what": "NaN or infinity"})
    top = {"component": WHOLE, "l2": domain[1], "what": "step skipped by the scaler"}
    return [*marks, *({"step": step, **top} for step in sorted(skipped))]


def _thinned(marks: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    if len(marks) <= limit:
        return marks
    return [marks[index] for index in thin([float(mark["step"]) for mark in marks], limit)]


def _domain(norms: list[float], parts: list[Trace], whole: list[Trace]) -> list[float]:
    """Powers of ten that hold the norms, the near edge of the healthy band, and a floor for 0."""
    clip = _clip(whole)
    values = [*norms, *([clip] if clip else [])] or list(HEALTHY)
    low, high = min(*values, HEALTHY[1]), max(*values, HEALTHY[0])
    low = max(low, min(_LOWEST, high / 10))
    zeros = any(_silent_steps(trace) for trace in parts)
    bottom = math.floor(math.log10(low)) - int(zeros)
    top = max(math.ceil(math.log10(high)), bottom + 2)
    return [float(f"1e{bottom}"), float(f"1e{top}")]


def _clip(whole: list[Trace]) -> float | None:
    values = [
        value
        for trace in whole
        for value, algorithm in zip(
            trace.numbers("clip_value"), trace.words("clip_algorithm"), strict=True
        )
        if value > 0 and algorithm in (None, "norm")
    ]
    return values[-1] if values else None


def _describe(
    names: list[str], total: int, steps: list[int], domain: list[float], marks: list[dict[str, Any]]
) -> str:
    shown = ", ".join(names[:_TOP])
    text = (
        f"Line chart of the gradient norm of {len(names)} of {total} components ({shown}) over "
        f"optimizer steps {min(steps)} to {max(steps)}, on a logarithmic axis from {domain[0]:g} "
        f"to {domain[1]:g}."
    )
    for kind in sorted({mark["what"] for mark in marks}):
        text += f" {sum(mark['what'] == kind for mark in marks)} marks: {kind}."
    return text
