"""The latest rows of a run that is going on, as frames, without reading its files again."""

import json
from collections import deque
from typing import TYPE_CHECKING, Any

from lightning_diag.records.read_records import parse_records
from lightning_diag.records.read_run import Run

if TYPE_CHECKING:
    import polars as pl

__all__ = ["LiveRows"]


class LiveRows:
    """A window on the rows of a run, which reads as `Run` does.

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
        self._frames.pop(prefix, None)

    def take(self, run: Run) -> None:
        """Take the latest rows of a run that goes on."""
        for prefix in run.prefixes:
            for row in run.frame(prefix).tail(self.history_rows).to_dicts():
                self.add(prefix, json.dumps(row))

    def frame(self, prefix: str) -> "pl.DataFrame":
        """The rows of one file; none, with the columns of every row, where it has none."""
        if prefix not in self._frames:
            lines = "\n".join(self._lines.get(prefix, ()))
            self._frames[prefix] = parse_records(lines.encode())[0]
        return self._frames[prefix]

    def latest_steps(self, prefix: str, count: int) -> list[int]:
        """The last `count` different steps of one file, oldest first."""
        steps = self.frame(prefix)["step"].drop_nulls().unique().sort()
        return [int(step) for step in steps.tail(count)]
