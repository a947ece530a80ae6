"""Gradient norms as tables: one line a component for people, one line a step for the CSV file."""

import csv
import io
import math
from dataclasses import dataclass
from statistics import fmean, median, pstdev
from typing import TYPE_CHECKING

from lightning_diag.rules.traces import Trace, component_traces, whole_traces

if TYPE_CHECKING:
    import polars as pl

__all__ = ["WHOLE", "ComponentNorms", "component_norms", "measured_steps", "norms_csv"]

WHOLE = "whole model"


@dataclass(frozen=True)
class ComponentNorms:
    """What a component's gradient norms were over a run.

    The statistics run over the rows that are finite; `std` is that of the whole population.

    Args:
        component: Its name; ``"whole model"`` for all of it.
        rows: Measured steps.
        mean: Mean l2 norm.
        std: Standard deviation of the l2 norm.
        max: Largest l2 norm.
        min: Smallest l2 norm.
        rms: Median of the norm over the root of the number of elements.
        share: Mean share of the model's squared norm, 0 to 1.
        elements: Elements that got a gradient, at the last row.
        tensors: Parameter tensors that got a gradient, at the last row.
        missing: Trainable tensors without gradient, at the last row.
        frozen: Tensors that are not trainable, at the last row.
        zero_rows: Rows on which the norm was zero.
        nonfinite_rows: Rows with NaN or infinity.
    """

    component: str
    rows: int
    mean: float | None
    std: float | None
    max: float | None
    min: float | None
    rms: float | None
    share: float | None
    elements: int
    tensors: int
    missing: int
    frozen: int
    zero_rows: int
    nonfinite_rows: int


def component_norms(grad: "pl.DataFrame") -> list[ComponentNorms]:
    """One line per component in order of appearance, then one for the whole model.

    Where several optimizers wrote rows of the whole model, the line is that of all of them.
    """
    parts = [_summary(str(trace.component), trace) for trace in component_traces(grad)]
    whole = whole_traces(grad)
    if len(whole) == 1:
        return [*parts, _summary(WHOLE, whole[0])]
    return [*parts, *(_summary(f"{WHOLE}, optimizer {_optimizer(one)}", one) for one in whole)]


def _optimizer(trace: Trace) -> object:
    return trace.rows["optimizer"][0]


def _summary(name: str, trace: Trace) -> ComponentNorms:
    bad = [value > 0 for value in trace.numbers("nonfinite")]
    over = [value > 0 for value in trace.numbers("l2_nonfinite")]
    flags = [one or other for one, other in zip(bad, over, strict=True)]
    rows = list(zip(trace.numbers("l2"), trace.numbers("count"), flags, strict=True))
    norms = [l2 for l2, _, flag in rows if not flag and not math.isnan(l2)]
    rms = [l2 / math.sqrt(count) for l2, count, flag in rows if count > 0 and not flag and l2 >= 0]
    shares = [share for share in trace.numbers("share") if not math.isnan(share)]
    return ComponentNorms(
        component=name,
        rows=len(rows),
        mean=fmean(norms) if norms else None,
        std=pstdev(norms) if norms else None,
        max=max(norms, default=None),
        min=min(norms, default=None),
        rms=median(rms) if rms else None,
        share=fmean(shares) if shares and any(shares) else None,
        elements=_last(trace, "count"),
        tensors=_last(trace, "tensors"),
        missing=_last(trace, "missing"),
        frozen=_last(trace, "frozen"),
        zero_rows=sum(norm == 0 for norm in norms),
        nonfinite_rows=sum(flags),
    )


def _last(trace: Trace, name: str) -> int:
    known = [value for value in trace.numbers(name) if not math.isnan(value)]
    return int(known[-1]) if known else 0


def measured_steps(grad: "pl.DataFrame") -> list[int]:
    """The steps at which a gradient was seen, finite or not."""
    seen = set()
    for trace in [*component_traces(grad), *whole_traces(grad)]:
        columns = (trace.numbers(name) for name in ("l2", "nonfinite", "l2_nonfinite", "missing"))
        for step, l2, *marks in zip(trace.steps, *columns, strict=True):
            if not math.isnan(l2) or any(mark > 0 for mark in marks):
                seen.add(step)
    return sorted(seen)


def norms_csv(grad: "pl.DataFrame") -> str:
    """A line per measured step: ``step``, the l2 norm of each component, ``global``.

    What was not measured or not finite is empty. Optimizers that stepped at once are merged.
    """
    parts = component_traces(grad)
    table: dict[int, dict[str, float]] = {}
    for trace in parts:
        for step, l2 in zip(trace.steps, trace.numbers("l2"), strict=True):
            table.setdefault(step, {})[str(trace.component)] = l2
    total: dict[int, float] = {}
    for trace in whole_traces(grad):
        for step, l2 in zip(trace.steps, trace.numbers("l2"), strict=True):
            total[step] = math.hypot(l2, total.get(step, 0.0))
    names = [str(trace.component) for trace in parts]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *names, "global"])
    for step in sorted(table.keys() | total.keys()):
        row = [table.get(step, {}).get(name, math.nan) for name in names]
        cells = ["" if math.isnan(l2) else repr(l2) for l2 in [*row, total.get(step, math.nan)]]
        writer.writerow([step, *cells])
    return text.getvalue()
