"""A file of JSON Lines as a frame, whatever a crash or a writer still at work has left in it."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

__all__ = ["parse_records", "read_records"]

_START = b'{"step":'


def read_records(path: Path) -> "tuple[pl.DataFrame, Callable[[], pl.Series], int]":
    """The rows of one record file, in the order in which they were written.

    Args:
        path: The file; one that is missing has no rows.

    Returns:
        The rows, with step, epoch, time, attempt and component first; a function that gives the
        byte at which each row begins; and the number of lines that could not be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    return parse_records(data)


def parse_records(data: bytes) -> "tuple[pl.DataFrame, Callable[[], pl.Series], int]":
    """The same of what such a file holds."""
    import polars as pl

    if not data.strip():
        return _shaped(pl.DataFrame()), functools.partial(pl.Series, [], dtype=pl.Int64), 0
    try:
        rows = pl.read_ndjson(data, infer_schema_length=None)
    except pl.exceptions.PolarsError:
        return _read_line_by_line(data)
    return _shaped(rows), functools.partial(_line_starts, data), 0


def _read_line_by_line(data: bytes) -> "tuple[pl.DataFrame, Callable[[], pl.Series], int]":
    import polars as pl

    rows: list[dict[str, Any]] = []
    starts: list[int] = []
    torn = position = 0
    for line in data.split(b"\n"):
        start, position = position, position + len(line) + 1
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            torn += 1
            # a row of another process may stand behind the torn one
            behind = max(line.rfind(_START), 0)
            row, start = _row(line[behind:]), start + behind
        if row is not None:
            rows.append(row)
            starts.append(start)
    return _shaped(_frame(rows)), functools.partial(pl.Series, starts, dtype=pl.Int64), torn


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _frame(rows: list[dict[str, Any]]) -> "pl.DataFrame":
    import polars as pl

    names = dict.fromkeys(name for row in rows for name in row)
    return pl.DataFrame([_column(name, [row.get(name) for row in rows]) for name in names])


def _column(name: str, values: list[Any]) -> "pl.Series":
    import polars as pl

    nested = {isinstance(value, (list, dict)) for value in values if value is not None}
    try:
        if len(nested) < 2:
            return pl.DataFrame({name: values}, infer_schema_length=None, strict=False)[name]
    except (pl.exceptions.PolarsError, ValueError, OverflowError):
        pass
    # lists beside numbers, and whatever else no column holds
    return pl.Series(name, [None if value is None else json.dumps(value) for value in values])


def _line_starts(data: bytes) -> "pl.Series":
    import polars as pl

    starts, position = [], 0
    for line in data.split(b"\n"):
        if line.strip():  # polars, too, passes over an empty line
            starts.append(position)
        position += len(line) + 1
    return pl.Series(starts, dtype=pl.Int64)


def _shaped(rows: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl

    common = {
        "step": pl.Int64,
        "epoch": pl.Int64,
        "time": pl.Float64,
        "attempt": pl.Int64,
        "component": pl.String,
    }
    columns = [
        (pl.col(name) if name in rows.columns else pl.lit(None))
        .cast(dtype, strict=False)
        .alias(name)
        for name, dtype in common.items()
    ]
    for name, dtype in rows.schema.items():
        if name not in common:
            # nothing but nulls so far: a number that was never finite
            columns.append(pl.col(name).cast(pl.Float64) if dtype == pl.Null else pl.col(name))
    return rows.select(columns) if rows.width else pl.DataFrame(schema=common)
