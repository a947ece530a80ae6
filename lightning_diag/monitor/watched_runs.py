"""All runs that the page shows: one, or those of a sweep, side by side."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_diag.monitor.live_charts import CHARTS
from lightning_diag.monitor.watched_run import WatchedRun
from lightning_diag.report.series import Panel, line_chart

__all__ = ["WatchedRuns"]

_MOST_RUNS = 200
_MOST_FINDINGS = 50


class WatchedRuns:
    """A run folder, or a folder with runs in it, such as a sweep's.

    Nothing is read while nobody asks: the files are looked at when they are asked for, and not
    more often than once in `interval` seconds. May be asked by several threads.

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
        self._versions = 0

    @property
    def runs(self) -> list[WatchedRun]:
        """The runs, in the order in which they were found; never fewer than before."""
        return list(self._runs.values())

    def look(self, *, at_once: bool = False) -> bool:
        """Read what is new, unless that was done a moment ago; whether anything was."""
        with self._lock:
            now = self._clock()
            if not at_once and now - self._looked < self.interval:
                return False
            self._looked = now
            for folder in self._folders():
                if folder not in self._runs:
                    self._runs[folder] = WatchedRun(folder, self._clock)
            changed = sum(run.look() for run in self._runs.values())
            self._versions += changed > 0
            return changed > 0

    def state(self) -> dict[str, Any]:
        """Everything but the charts, as plain values for the page."""
        self.look()
        with self._lock:
            return {
                "title": self.path.resolve().name,
                "interval": self.interval,
                "version": self._versions,
                "runs": [self._run_state(run) for run in self._runs.values()],
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
            if not 0 <= number < len(self._runs):
                raise LookupError(f"There are {len(self._runs)} runs, got number {number}.")
            return self.runs[number].chart(name)

    def together(self) -> dict[str, Any] | None:
        """The losses of all runs in one chart; None where none has any."""
        with self._lock:
            train, val = {}, {}
            for run in self._runs.values():
                losses, checked = run.losses()
                name = run.path.name
                if losses:
                    train[name] = list(zip(losses.steps, losses.means, strict=True))
                if checked:
                    val[name] = list(zip(checked[0], checked[1], strict=True))
            if not train and not val:
                return None
            panels = [Panel("training loss", train), Panel("validation loss", val)]
            chart = line_chart("Losses of all runs", panels)
            spec: dict[str, Any] = chart.to_dict(validate=False)
            return spec

    def _run_state(self, run: WatchedRun) -> dict[str, Any]:
        findings = [one.to_dict() | {"issue": one.issue} for one in run.findings]
        return {
            "summary": run.summary().to_dict(),
            "findings": findings[:_MOST_FINDINGS],
            "charts": {name: run.versions[name] for name in CHARTS if name in run.versions},
        }

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
