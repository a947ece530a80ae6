"""One run as the page shows it: its state, its numbers, its findings and its charts."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_diag.monitor.kept_steps import LightRun
from lightning_diag.monitor.live_charts import CHARTS, chart_spec
from lightning_diag.rules import SEVERITIES, Finding, diagnose
from lightning_diag.rules.loss_series import Losses, training_losses, validation_losses

if TYPE_CHECKING:
    import polars as pl

__all__ = ["ENDED", "MOST_ROWS", "RunState", "Summary", "WatchedRun"]

MOST_ROWS = 20_000
"""Rows of each record file of a run that are kept for its charts, about."""

RunState = Literal[
    "waiting", "running", "silent", "ended", "failed", "interrupted", "killed", "gone"
]

_Losses = tuple[Losses | None, tuple[list[int], list[float], str] | None]

ENDED: frozenset[RunState] = frozenset({"ended", "failed", "interrupted", "killed", "gone"})
"""States in which nothing more is to be expected."""

_ENDINGS: Mapping[str, RunState] = {"failed": "failed", "interrupted": "interrupted"}
_SILENT_AFTER = 120.0
_START = 10.0  # seconds that say little of the pace
_SHARE = 10.0  # the rules rest for so many times what they took
_AT_ONCE = 0.1  # seconds that are not worth a rest


@dataclass(frozen=True)
class Summary:
    """What is to be said of a run in a line; numbers that nobody knows are None.

    Args:
        name: Of the run: its folder.
        state: ``"waiting"`` (has not begun), ``"running"``, ``"silent"`` (has not written for
            minutes), ``"ended"``, ``"failed"``, ``"interrupted"``, ``"killed"`` (its process is
            gone without a word) or ``"gone"`` (its folder was deleted).
        reason: Why it stopped, in words.
        step: Last step of which anything was written.
        planned_steps: Steps it will have made.
        progress: Share of them, 0 to 1.
        elapsed_seconds: Since the last attempt began.
        remaining_seconds: At the pace so far; None in the first ten seconds, which are mostly the
            start.
        loss: Mean training loss of the last window.
        best_val_loss: The smallest.
        learning_rate: The largest of all groups.
        samples_per_second: Of all ranks, or batches where samples are not known.
        counts: Findings by severity.
        behind: Whether older rows are still being read.
        torn: Lines that could not be read.
    """

    name: str
    state: RunState
    reason: str = ""
    step: int | None = None
    planned_steps: int | None = None
    progress: float | None = None
    elapsed_seconds: float | None = None
    remaining_seconds: float | None = None
    loss: float | None = None
    best_val_loss: float | None = None
    learning_rate: float | None = None
    samples_per_second: float | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    behind: bool = False
    torn: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain values."""
        return asdict(self)


class WatchedRun:
    """A run that is looked at again and again; each look reads only what is new.

    Args:
        path: The run folder, which need not exist yet.
        clock: Gives the time in Unix seconds.
        most_rows: Rows of each record file that are kept, about.
        name: What to call it; the name of its folder if empty.
    """

    def __init__(
        self,
        path: str | Path,
        clock: Callable[[], float] = time.time,
        most_rows: int = MOST_ROWS,
        name: str = "",
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.resolve().name
        self.findings: list[Finding] = []
        self.versions: dict[str, int] = {}
        self.looked = False
        self._clock = clock
        self._run = LightRun(self.path, most_rows)
        self._specs: dict[str, tuple[int, dict[str, Any] | None]] = {}
        self._summary: Summary | None = None
        self._losses: _Losses | None = None
        self._done: int | None = None
        self._last_written: float | None = None
        self._seen: object = None
        self._looks = 0
        self._unjudged = False
        self._judge_after = float("-inf")
        self._was_there = False

    def look(self) -> bool:
        """Read what is new; whether anything was.

        Files that are as they were are not opened, so that a run that ended costs nothing. Where
        the rules take long, they are run the more seldom: for a tenth of the time at most.
        """
        seen = self._files()
        if self.looked and seen == self._seen and not self._run.behind:
            return self._judge()
        # seen before it is read: what is written meanwhile is found by the next look
        self.looked, self._seen = True, seen
        self._summary = self._losses = None
        changed = self._run.update()
        self._was_there |= self._run.exists
        if changed:
            self._looks += 1
            there = set(self._run.prefixes)
            for name, chart in CHARTS.items():
                if there & set(chart.files) and changed & {*chart.files, *chart.also}:
                    self.versions[name] = self._looks
            self._unjudged = True
        self._judge()
        return True

    def _judge(self) -> bool:
        """Run the rules on what came since they were run; whether they were."""
        now = time.monotonic()
        if not self._unjudged or self._run.behind or now < self._judge_after:
            return False
        self.findings = diagnose(self._run) if self._run.prefixes else []
        self._unjudged, self._summary = False, None
        took = time.monotonic() - now
        self._judge_after = now + _SHARE * took if took > _AT_ONCE else now
        return True

    @property
    def behind(self) -> bool:
        """Whether there is more to read already."""
        return not self.looked or self._run.behind

    def _files(self) -> object:
        """What tells whether a file of the run was written to, from the folder alone."""
        places = [self.path / "run.json", self.path / "config.yaml"]
        found = []
        with suppress(OSError), os.scandir(self.path / "records") as entries:
            places += [Path(entry.path) for entry in entries]
        for place in places:
            with suppress(OSError):
                known = place.stat()
                found.append((place.name, known.st_ino, known.st_size, known.st_mtime_ns))
        return sorted(found)

    def chart(self, name: str) -> dict[str, Any] | None:
        """The Vega-Lite specification of a chart, drawn anew where its rows changed.

        Raises:
            KeyError: There is no chart of this name.
        """
        draw = CHARTS[name].draw
        version = self.versions.get(name, 0)
        known = self._specs.get(name)
        if known is None or known[0] != version:
            spec = chart_spec(draw, self._run, self.findings) if version else None
            known = self._specs[name] = (version, spec)
        return known[1]

    def losses(self) -> _Losses:
        """The training loss and the validation loss, see `training_losses`, `validation_losses`."""
        if self._losses is None:
            metrics = self._run.frame("metrics")
            seen = training_losses(self._run.frame("loss"), metrics)
            self._losses = seen, validation_losses(metrics)
        return self._losses

    def summary(self) -> Summary:
        """The run in a line."""
        if self._summary is None:
            self._summary = self._summed_up()
        one = self._summary
        state = self._state(self._last_written)
        remaining = None
        elapsed = one.elapsed_seconds or 0.0
        if state == "running" and self._done and one.planned_steps and elapsed >= _START:
            left = max(0, one.planned_steps - (one.step or 0) - 1)
            remaining = elapsed * left / self._done
        return replace(one, state=state, remaining_seconds=remaining)

    # ---- what is known of it ----

    def _summed_up(self) -> Summary:
        """What the rows say, in which the clock has no part."""
        run = self._run
        losses, checked = self.losses()
        step, planned = self._step(), run.info.get("planned_steps")
        done = None if step is None else step + 1
        started, last = self._times()
        self._last_written = last
        # those of the attempt whose time is known
        self._done = None if done is None else done - (self._attempt().get("first_step") or 0)
        progress = min(1.0, done / planned) if done and planned else None
        elapsed = None if started is None or last is None else max(0.0, last - started)
        reason = run.info.get("stop_reason")
        words = reason.get("message") if isinstance(reason, Mapping) else reason
        return Summary(
            name=self.name,
            state="waiting",
            reason=str(words or ""),
            step=step,
            planned_steps=planned,
            progress=progress,
            elapsed_seconds=elapsed,
            loss=_last(losses.means) if losses else None,
            best_val_loss=min((x for x in checked[1] if x == x), default=None) if checked else None,
            learning_rate=_last(losses.rates) if losses else None,
            samples_per_second=self._speed(),
            counts={one: sum(f.severity == one for f in self.findings) for one in SEVERITIES},
            behind=self.behind,
            torn=sum(run.torn.values()),
        )

    def _state(self, last: float | None) -> RunState:
        if not self._run.exists:
            return "gone" if self._was_there else "waiting"
        status = self._run.info.get("status")
        if status == "running":
            process = self._attempt().get("process")
            if isinstance(process, Mapping) and process.get("host") == platform.node():
                return "running" if _lives(process.get("pid")) else "killed"
            quiet = last is not None and self._clock() - last > _SILENT_AFTER
            return "silent" if quiet else "running"
        return _ENDINGS.get(str(status), "ended") if status else "waiting"

    def _attempt(self) -> Mapping[str, Any]:
        attempts = self._run.info.get("attempts") or [{}]
        latest: Mapping[str, Any] = attempts[-1]
        return latest

    def _step(self) -> int | None:
        steps = [self._run.frame(one)["step"].max() for one in self._run.prefixes]
        return max((int(one) for one in steps if isinstance(one, int)), default=None)

    def _times(self) -> tuple[float | None, float | None]:
        """When the attempt began, and when something was last written."""
        times = [self._run.frame(one)["time"].max() for one in self._run.prefixes]
        last = max((float(one) for one in times if isinstance(one, float)), default=None)
        started = self._attempt().get("started")
        return (float(started) if isinstance(started, (int, float)) else None), last

    def _speed(self) -> float | None:
        frame = self._run.frame("hardware")
        for name in ("samples_per_second", "batches_per_second"):
            if name in frame.columns:
                return _last(frame[name].tail(5).to_list())
        return None


def _last(values: "list[float] | pl.Series") -> float | None:
    known = [one for one in values if one is not None and one == one]
    return float(known[-1]) if known else None


def _lives(pid: object) -> bool:
    import psutil

    return isinstance(pid, int) and bool(psutil.pid_exists(pid))
