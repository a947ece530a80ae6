"""The latest rows of a run that is going on, as frames, without reading its files again."""

import json
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from lightning_diag.records.read_records import parse_records
from lightning_diag.records.read_run import Run

if TYPE_CHECKING:
    import polars as pl

__all__ = ["LiveRows"]


class LiveRows:
    """A window on the rows of a run, which reads as `Run` does.

    A row is parsed once, when its file is first asked for after it came. A file to which nothing
    was added gives the same frame again.

    Args:
        config: The run's configuration.
        history_rows: How many rows of each file are kept, the latest.

    Raises:
        ValueError: `history_rows` is below 1.

    Example:
        >>> live = LiveRows()
        >>> live.add("grad", '{"step": 3, "component": null, "l2": 0.5}')
        >>> live.frame("grad")["l2"].to_list(), live.latest_steps("grad", 2)
        ([0.5], [3])
    """

    def __init__(self, config: dict[str, Any] | None = None, history_rows: int = 2000) -> None:
        if history_rows < 1:
            raise ValueError(f"`history_rows` must be at least 1, got {history_rows}.")
        self.config = config or {}
        self.history_rows = history_rows
        self._lines: dict[str, deque[str]] = {}
        self._unread: dict[str, int] = {}
        self._frames: dict[str, pl.DataFrame] = {}

    @property
    def prefixes(self) -> list[str]:
        """The record files that have rows, in alphabetical order."""
        return sorted(self._lines)

    def add(self, prefix: str, line: str) -> None:
        """Take a row, as `RunLogger.listen` tells it."""
        if prefix not in self._lines:
            self._lines[prefix] = deque(maxlen=self.history_rows)
        self._lines[prefix].append(line)
        self._unread[prefix] = self._unread.get(prefix, 0) + 1

    def take(self, run: Run) -> None:
        """Take the latest rows of a run that goes on."""
        for prefix in run.prefixes:
            for row in run.frame(prefix).tail(self.history_rows).to_dicts():
                self.add(prefix, json.dumps(row))

    def frame(self, prefix: str) -> "pl.DataFrame":
        """The rows of one file; none, with the columns of every row, where it has none."""
        unread = self._unread.pop(prefix, 0)
        if unread or prefix not in self._frames:
            self._frames[prefix] = self._read_on(prefix, unread)
        return self._frames[prefix]

    def latest_steps(self, prefix: str, count: int) -> list[int]:
        """The last `count` different steps of one file, oldest first."""
        steps = self.frame(prefix)["step"].drop_nulls().unique().sort()
        return [int(step) for step in steps.tail(count)]

    def _read_on(self, prefix: str, unread: int) -> "pl.DataFrame":
        """What is known of a file, with the rows that came since, the latest of both."""
        lines = self._lines.get(prefix, ())
        known = self._frames.get(prefix)
        if known is not None and unread < len(lines):
            joined = _joined(known, _parsed(islice(lines, len(lines) - unread, None)))
            if joined is not None:
                return joined.tail(self.history_rows)
        return _parsed(lines)


def _parsed(lines: Iterable[str]) -> "pl.DataFrame":
    return parse_records("\n".join(lines).encode())[0]


def _joined(known: "pl.DataFrame", new: "pl.DataFrame") -> "pl.DataFrame | None":
    """The rows of both; None where no type holds the values of a column in both."""
    import polars as pl

    if known.schema != new.schema:
        # a column without a value has no type of its own
        known, new = _without_blanks(known, new), _without_blanks(new, known)
    try:
        return pl.concat([known, new], how="diagonal_relaxed", rechunk=True)
    except pl.exceptions.PolarsError:
        return None


def _without_blanks(frame: "pl.DataFrame", other: "pl.DataFrame") -> "pl.DataFrame":
    types = other.schema
    return frame.drop(
        name
        for name, kind in frame.schema.items()
        if types.get(name, kind) != kind and frame[name].null_count() == len(frame)
    )
