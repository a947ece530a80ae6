"""Hourly (or any even) series of drivers and targets: in memory, and from a table of your own."""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Series", "digest", "read_table"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Drivers and targets at the same times, one row a time.

    Attributes:
        drivers: Shape ``(times, drivers, features)``.
        targets: Shape ``(times, targets)``.
        driver_names: A name for each driver.
        target_names: A name for each target.
    """

    drivers: Array
    targets: Array
    driver_names: tuple[str, ...]
    target_names: tuple[str, ...]


def digest(series: Series) -> str:
    """SHA-256 of names and numbers.

    The numbers count to six digits, so that another processor gives the same.
    """
    code = hashlib.sha256(repr((series.driver_names, series.target_names)).encode())
    for values in (series.drivers, series.targets):
        code.update(repr(values.shape).encode())
        code.update(np.round(values, 6).__add__(0.0).astype("<f8").tobytes())
    return code.hexdigest()


def read_table(
    path: str, drivers: Mapping[str, Sequence[str]] | Sequence[str], targets: Sequence[str]
) -> Series:
    """A CSV file with a column ``date`` and a column for each driver feature and target.

    Args:
        path: The file. Its rows are in the order of time, evenly spaced.
        drivers: Columns, or each driver's name with its columns, as many for each driver.
        targets: Columns.

    Returns:
        The series, a row a line.

    Raises:
        ValueError: If the file breaks a rule; the sentence names the rule.
    """
    named = _named(drivers)
    if not targets:
        raise ValueError("`targets` must name at least one column, got none.")
    columns = [column for features in named.values() for column in features]
    values = _columns(path, [*columns, *targets])
    features = len(columns) // len(named)
    return Series(
        values[:, : len(columns)].reshape(len(values), len(named), features),
        values[:, len(columns) :],
        tuple(named),
        tuple(targets),
    )


def _named(drivers: Mapping[str, Sequence[str]] | Sequence[str]) -> dict[str, list[str]]:
    if isinstance(drivers, Mapping):
        named = {name: list(columns) for name, columns in drivers.items()}
    else:
        named = {name: [name] for name in drivers}
    counts = {name: len(columns) for name, columns in named.items()}
    if not counts or len(set(counts.values())) > 1 or not all(counts.values()):
        raise ValueError(
            f"`drivers` must name columns, as many for each driver, got {counts or 'none'}."
        )
    return named


def _columns(path: str, columns: list[str]) -> Array:
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        present = rows.fieldnames or []
        missing = [column for column in ["date", *columns] if column not in present]
        if missing:
            raise ValueError(f"`{path}` must have the columns {missing}, got {list(present)}.")
        values, before = [], ""
        for number, row in enumerate(rows, start=2):
            date = row["date"] or ""
            if date <= before:
                raise ValueError(
                    f"Dates in `{path}` must rise from line to line, written so that their text "
                    f"rises too (2024-01-31 06:00), got {date!r} in line {number}."
                )
            before = date
            values.append([_number(row[column], column, path, number) for column in columns])
    return np.asarray(values, dtype=np.float64).reshape(len(values), len(columns))


def _number(text: str | None, column: str, path: str, line: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(
            f"`{path}` must have finite numbers, got {text!r} in column `{column}`, line {line}."
        )
    return value
