"""Rows cut by module, and since when something lasts in them."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

__all__ = ["lasting_since", "number", "rows_by", "sorted_rows"]

Rows = list[dict[str, Any]]

_SLACK = 0.2


def sorted_rows(frame: "pl.DataFrame", names: Iterable[str]) -> Rows:
    """The rows by rising step, with those of the columns that are there."""
    if "step" not in frame.columns:
        return []
    there = [name for name in dict.fromkeys(("step", *names)) if name in frame.columns]
    kept = frame.select(there).filter(frame["step"].is_not_null())
    return kept.sort("step", maintain_order=True).to_dicts()


def rows_by(frame: "pl.DataFrame", names: Iterable[str], *keys: str) -> dict[Any, Rows]:
    """The rows of each module by rising step; without those of the whole model.

    Args:
        frame: Any rows with a component.
        names: Columns to keep.
        keys: Columns that tell parts of a module apart, such as ``head``.
    """
    found: dict[Any, Rows] = {}
    for row in sorted_rows(frame, ("component", *keys, *names)):
        name = row.get("component")
        if name is not None:
            place = (name, *(row.get(key) for key in keys)) if keys else name
            found.setdefault(place, []).append(row)
    return found


def number(row: dict[str, Any], name: str) -> float:
    """A number of a row, with NaN where nothing was measured."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def lasting_since(flags: Sequence[bool], least: int, slack: float = _SLACK) -> int | None:
    """Where the stretch begins that lasts to the end, if it is at least so many rows long.

    A stretch may have a share of `slack` rows without a flag, but not its first, and of its last
    three at most one.

    Example:
        >>> lasting_since([False, True, True, True], least=3)
        1
    """
    end = len(flags)
    if end < least or sum(flags[-3:]) < min(2, len(flags[-3:])):
        return None
    start, flagged = None, 0
    for index in range(end - 1, -1, -1):
        flagged += flags[index]
        if flags[index] and flagged >= (1 - slack) * (end - index):
            start = index
    return start if start is not None and end - start >= least else None
