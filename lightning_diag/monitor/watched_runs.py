"""All runs that the page shows: one, or those of a sweep, side by side."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_diag.monitor.live_charts import CHARTS
from lightning_diag.monitor.losses_of_all import losses_of_all
from lightning_diag.monitor.watched_run import MOST_ROWS, WatchedRun

__all__ = ["WatchedRuns"]

_MOST_RUNS = 200
_MOST_FINDINGS = 50
_FEWEST_ROWS = 2000
_READING = 0.5  # seconds that one answer may wait for files


class WatchedRuns:
    """A run folder, or a folder with runs in it, such as a sweep's.

    Nothing is read while nobody asks: the files are looked at when they are asked for, and not
    more often than once in `interval` seconds. Of many runs each look reads some, so that an
    answer takes no longer than one of few; of those that did not change it reads nothing. May be
    asked by several threads.

    Args:
        path: The folder, which need not exist yet.
        interval: Seconds between two looks.
        clock: Gives the time in Unix seconds.

    Raises:
        ValueError: `interval` is not positive.
    """

    def __init__(
        self, path: str | Path, interval: float = 5.0, clock: Callable[[], float] = time.time
    ) -> None:
        if not interval > 0:
            raise ValueError(f"`interval` must be positive, got {interval}.")
        self.path = Path(path)
        self.interval = interval
        self._clock = clock
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._runs: dict[Path, WatchedRun] = {}
        self._next = 0

    @property
    def runs(self) -> list[WatchedRun]:
        """The runs, in the order in which they were found; never fewer than before."""
        return list(self._runs.values())

    def look(self, *, at_once: bool = False, first: Sequence[int] = ()) -> bool:
        """Read what is new, unless that was done a moment ago; whether anything was.

        Args:
            at_once: Read now, and all that is there.
            first: Places among `runs` of those that are read before the others.
        """
        with self._lock:
            now = self._clock()
            if not at_once and now - self._looked < self.interval:
                return False
            if self._next == 0:
                self._find()
            changed = self._read(first, at_once=at_once)
            if self._next == 0 and not any(run.behind for run in self._runs.values()):
                self._looked = now
            return changed

    def state(self, whole: Sequence[int] = (0,)) -> dict[str, Any]:
        """Everything but the charts, as plain values for the page.

        Args:
            whole: Places among `runs` of those of which findings and charts are told, too.
        """
        self.look(first=whole)
        with self._lock:
            runs = self.runs
            return {
                "title": self.path.resolve().name,
                "interval": self.interval,
                "order": list(CHARTS),
                "version": sum(run.versions.get("training", 0) for run in runs) + len(runs),
                "behind": self._next > 0 or any(run.behind for run in runs),
                "runs": [self._run_state(run, n in whole) for n, run in enumerate(runs)],
            }

    def chart(self, number: int, name: str) -> dict[str, Any] | None:
        """A chart of one run.

        Args:
            number: Its place among `runs`.
            name: A name out of `CHARTS`.

        Raises:
            LookupError: There is no such run, or no such chart.
        """
        with self._lock:
            (run,) = self._picked([number])
            return run.chart(name)

    def together(self, picked: Sequence[int] = ()) -> dict[str, Any] | None:
        """The losses of all runs in one chart; None where none has any.

        Args:
            picked: Places among `runs` of those to tell apart, see `losses_of_all`.

        Raises:
            LookupError: There is no such run.
        """
        with self._lock:
            chart = losses_of_all(self.runs, self._picked(picked))
            spec: dict[str, Any] | None = chart and chart.to_dict(validate=False)
            return spec

    # ---- reading ----

    def _find(self) -> None:
        folders = self._folders()
        most = max(_FEWEST_ROWS, MOST_ROWS // max(1, len(folders)))
        for folder in folders:
            if folder not in self._runs:
                alone = folder == self.path
                name = "" if alone else folder.relative_to(self.path).as_posix()
                self._runs[folder] = WatchedRun(folder, self._clock, most, name)

    def _read(self, first: Iterable[int], *, at_once: bool) -> bool:
        """Look at the runs, from where the last look stopped, for as long as there is time."""
        runs = self.runs
        until = time.monotonic() + _READING
        changed = [run.look() for run in self._picked(n for n in first if n < len(runs))]
        start, self._next = self._next, 0
        for number in range(start, len(runs)):
            # at least one, or a slow one before them would leave the others unread
            if not at_once and number > start and time.monotonic() > until:
                self._next = number
                break
            changed.append(runs[number].look())
        return any(changed)

    def _picked(self, numbers: Iterable[int]) -> list[WatchedRun]:
        runs, wanted = self.runs, list(numbers)
        for number in wanted:
            if not 0 <= number < len(runs):
                raise LookupError(f"There are {len(runs)} runs, got number {number}.")
        return [runs[number] for number in wanted]

    def _run_state(self, run: WatchedRun, whole: bool) -> dict[str, Any]:
        told: dict[str, Any] = {"summary": run.summary().to_dict()}
        if whole:
            findings = [one.to_dict() | {"issue": one.issue} for one in run.findings]
            told["findings"] = findings[:_MOST_FINDINGS]
            told["charts"] = {name: run.versions[name] for name in CHARTS if name in run.versions}
        return told

    def _folders(self) -> list[Path]:
        """The run itself, or the folders with runs in it, up to two levels down."""
        if (self.path / "run.json").exists() or any(self.path.glob("records/*.jsonl")):
            return [self.path]
        found = {file.parent for file in self.path.glob("*/run.json")}
        found |= {file.parent for file in self.path.glob("*/*/run.json")}
        if found:
            return sorted(found, key=_natural)[:_MOST_RUNS]
        # nothing yet: a run that has not begun
        return [] if self._runs else [self.path]


def _natural(path: Path) -> tuple[int, str]:
    # the jobs of a sweep are numbered
    return (int(path.name) if path.name.isdecimal() else -1, str(path))
