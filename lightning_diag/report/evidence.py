"""What a chart of a finding's evidence shows: its panels, and how rows become lines."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_diag.report.norms import WHOLE
from lightning_diag.report.series import Panel, Points
from lightning_diag.report.words import short
from lightning_diag.rules.finding import Finding

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "BAND",
    "HEIGHT",
    "LOW",
    "Line",
    "Shown",
    "by_component",
    "is_wide",
    "marked",
    "named_in",
    "numbers",
    "split",
    "threshold",
]

Line = list[tuple[float, float | None]]
"""Step and value, in order of steps."""

HEIGHT = 122
"""Of the plot that shows the finding, in pixels."""

LOW = 60
"""Of a plot below it, which shows what happened meanwhile."""

BAND = "Green: the usual range."
"""What is said of a plot with a shaded range."""

_MANY_MARKS = 150


@dataclass(frozen=True)
class Shown:
    """What is drawn for a finding.

    Args:
        title: What the first panel shows.
        panels: Top to bottom; the first one is the evidence itself.
        said: Sentences that explain them.
    """

    title: str
    panels: Sequence[Panel]
    said: tuple[str, ...] = ()


def numbers(frame: "pl.DataFrame", column: str, where: Mapping[str, object] | None = None) -> Line:
    """A column by step, of the rows in which other columns have these values.

    Args:
        frame: What `Run.frame` gave; without the columns there are no points.
        column: Name of the numbers.
        where: Column to the value that it must have; None stands for the whole model.
    """
    wanted = dict(where or {})
    if not {column, "step", *wanted} <= set(frame.columns) or not frame[column].dtype.is_numeric():
        return []
    for name, value in wanted.items():
        known = frame[name]
        frame = frame.filter(known.is_null() if value is None else known == value)
    pairs = zip(frame["step"], frame[column], strict=True)
    return sorted(((s, v) for s, v in pairs if s is not None), key=lambda point: float(point[0]))


def by_component(frame: "pl.DataFrame", column: str) -> dict[str | None, Line]:
    """A column by step for each component, None for the whole model."""
    if "component" not in frame.columns:
        own = numbers(frame, column)
        return {None: own} if own else {}
    names = frame["component"].unique(maintain_order=True).to_list()
    found = {name: numbers(frame, column, {"component": name}) for name in names}
    return {name: line for name, line in found.items() if any(v is not None for _, v in line)}


def split(
    lines: Mapping[str | None, Line], wanted: str | None
) -> tuple[str, Line, dict[str, Line]]:
    """The line of a component, and the others, which are drawn pale.

    Where that component has none, the line is that of the whole model, or the only one.
    """
    known = list(lines)
    name = wanted if wanted in lines else None if None in lines else next(iter(known), None)
    others = {str(key): line for key, line in lines.items() if key != name and key is not None}
    return str(name or WHOLE), lines.get(name, []), others


def threshold(finding: Finding, units: Iterable[str], factor: float = 1.0) -> dict[str, float]:
    """The finding's threshold as a line to draw, where it is one of the units of the axis."""
    value = finding.threshold
    if value is None or not math.isfinite(value) or finding.unit not in tuple(units):
        return {}
    return {f"threshold {short(factor * value)}": factor * value}


def is_wide(*lines: Points) -> bool:
    """Whether all values are positive and span two decades, so that a logarithm shows more."""
    values = [v for line in lines for _, v in line if v is not None and math.isfinite(v)]
    return bool(values) and min(values) > 0 and max(values) > 100 * min(values)


def named_in(finding: Finding, names: Iterable[str]) -> str | None:
    """The first of the names that stands between backticks in the message."""
    quoted = finding.message.split("`")[1::2]
    known = set(names)
    return next((name for name in quoted if name in known), None)


def marked(steps: Iterable[Any]) -> list[float]:
    """Steps to mark, not more than can be told apart; the first and the last are among them."""
    known = sorted({float(step) for step in steps})
    if len(known) <= _MANY_MARKS:
        return known
    last = len(known) - 1
    return [known[round(index * last / (_MANY_MARKS - 1))] for index in range(_MANY_MARKS)]
