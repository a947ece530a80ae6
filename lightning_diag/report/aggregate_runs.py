"""One run as a summary over several sees it: its best validation, and whether it counts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diag.records.read_run import Run, read_run
from lightning_diag.spelling import did_you_mean

if TYPE_CHECKING:
    import polars as pl

__all__ = ["CLEAN", "COLLAPSED", "DIVERGED", "UNFINISHED", "UNMEASURED", "OneRun", "read_one"]

CLEAN, DIVERGED, COLLAPSED = "clean", "diverged", "collapsed"
UNFINISHED, UNMEASURED = "unfinished", "unmeasured"

_COLUMNS = {"step", "epoch", "time", "attempt", "component"}
_PREFIXES = ("validation_", "validation/", "valid_", "valid/", "val_", "val/")


@dataclass(frozen=True)
class OneRun:
    """What counts of a run.

    Args:
        path: Its folder.
        name: The name in run.json or config.yaml, or "".
        seed: Its seed, where it says one.
        state: ``clean``, or why it stands apart: ``diverged``, ``collapsed``, ``unfinished`` or
            ``unmeasured``.
        reason: One sentence for a run that stands apart.
        monitor: The metric that chose the best row.
        higher: Whether a high value of it is good.
        epoch: The epoch of the best row, as the records count it.
        step: The step of the best row.
        metrics: Every number of the best row, and of no other.
        history: Metric to its ``(epoch, value)`` in every row that has the monitored metric.
        seconds: Time from the start of the first attempt to the end of the last.
        config: config.yaml.
        info: run.json.
    """

    path: Path
    name: str
    seed: int | None
    state: str
    reason: str
    monitor: str
    higher: bool
    epoch: int | None = None
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)
    seconds: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


def read_one(path: Path) -> OneRun:
    """Read a run, whatever state it is in.

    The best row is the one of records/metrics.jsonl in which the run's `monitor` is best; all
    metrics come from it. A run stands apart where its collapse_report.json says that it collapsed,
    where the last value of a loss is not finite, where run.json does not call it finished, or where
    the monitored metric was never logged; the first of these that holds is told.

    Args:
        path: The folder of the run.
    """
    run = read_run(path)
    config, broken = _config(run)
    frame = run.frame("metrics")
    monitor, higher = _monitor(config, frame)
    rows = _rows(frame, monitor)
    best = (max if higher else min)(rows, key=lambda row: float(row[monitor]), default=None)
    state, reason = _state(run, frame, monitor, best is not None, broken)
    names = [name for name in (rows[0] if rows else {}) if name not in _COLUMNS]
    short = {name: _short(name, names, monitor) for name in names}
    found = best or {}
    return OneRun(
        path=path,
        name=str(run.info.get("name") or config.get("name") or ""),
        seed=_whole(config.get("seed", run.info.get("seed"))),
        state=state,
        reason=reason,
        monitor=_short(monitor, names, monitor),
        higher=higher,
        epoch=_whole(found.get("epoch")),
        step=_whole(found.get("step")),
        metrics={short[name]: found[name] for name in names if _finite(found.get(name))},
        history={
            short[name]: [
                (float(row["epoch"] if row["epoch"] is not None else row["step"]), row[name])
                for row in rows
                if _finite(row[name])
            ]
            for name in names
        },
        seconds=_seconds(run.info),
        config=config,
        info=run.info,
    )


def _config(run: Run) -> tuple[Mapping[str, Any], str]:
    try:
        return run.config, ""
    except ValueError:
        return {}, "config.yaml cannot be read."


def _monitor(config: Mapping[str, Any], frame: "pl.DataFrame") -> tuple[str, bool]:
    monitor = config.get("monitor")
    if not isinstance(monitor, str):
        losses = [name for name in frame.columns if name in ("val_loss", "val/loss")]
        monitor = (losses or ["val_loss"])[0]
    return monitor, config.get("monitor_mode") == "max"


def _rows(frame: "pl.DataFrame", monitor: str) -> list[dict[str, Any]]:
    """The rows with a finite monitored metric, without marks of what was not finite."""
    if monitor not in frame.columns or not frame[monitor].dtype.is_numeric():
        return []
    kept = [
        name
        for name, kind in frame.schema.items()
        if name in _COLUMNS or (kind.is_numeric() and not name.endswith("_nonfinite"))
    ]
    rows = frame.select(kept).filter(frame[monitor].is_not_null()).to_dicts()
    rows = [row for row in rows if _finite(row[monitor])]
    # a column is one of these rows' metrics where any of them has a value
    used = [name for name in kept if name in _COLUMNS or any(_finite(row[name]) for row in rows)]
    return [{name: row[name] for name in used} for row in rows]


def _state(
    run: Run, frame: "pl.DataFrame", monitor: str, measured: bool, broken: str
) -> tuple[str, str]:
    collapse = _collapse(run)
    if collapse:
        return COLLAPSED, collapse
    lost = _lost(frame)
    if lost:
        return DIVERGED, f"The last value of `{lost}` is not finite."
    status = run.info.get("status")
    if status != "finished":
        return UNFINISHED, _unfinished(run, status)
    if not measured:
        logged = [name for name in frame.columns if name not in _COLUMNS]
        if f"{monitor}_nonfinite" in logged:
            return DIVERGED, f"`{monitor}` was never finite."
        hint = did_you_mean(monitor, logged) if logged else "nothing was."
        return UNMEASURED, broken or f"`{monitor}` was never logged; {hint}"
    return CLEAN, ""


def _collapse(run: Run) -> str:
    """Why CollapseStop ended the run, or "" where it did not."""
    from json import loads

    try:
        report = loads((run.path / "collapse_report.json").read_bytes())
    except (OSError, ValueError):
        return ""
    if not isinstance(report, dict) or not report.get("collapsed"):
        return ""
    reason = report.get("stop_reason")
    said = reason.get("message") if isinstance(reason, dict) else None
    return _sentence(said or "collapse_report.json says that the run collapsed.")


def _lost(frame: "pl.DataFrame") -> str | None:
    """A loss whose last value is not finite."""
    for name in frame.columns:
        mark = f"{name}_nonfinite"
        if "loss" not in name.lower() or name.endswith("_nonfinite"):
            continue
        marks = frame[mark] if mark in frame.columns else [None] * len(frame)
        told = [
            (value, bad)
            for value, bad in zip(frame[name], marks, strict=True)
            if value is not None or bad
        ]
        if told and not _finite(told[-1][0]):
            return name
    return None


def _unfinished(run: Run, status: object) -> str:
    if status is None:
        return "run.json is missing, or cannot be read."
    if status == "running":
        return "It still trains, or its process ended without a word."
    reason = run.info.get("stop_reason")
    said = reason.get("message") if isinstance(reason, dict) else reason
    return _sentence(f"The last attempt was {status}" + (f": {said}" if said else ""))


def _sentence(text: object) -> str:
    words = " ".join(str(text).split())
    return words if words.endswith(".") else f"{words}."


def _short(name: str, names: list[str], monitor: str) -> str:
    """A name without the prefix of validation, where that leaves no doubt."""
    for prefix in _PREFIXES:
        bare = name.removeprefix(prefix)
        if name.startswith(prefix) and bare and bare not in names:
            rivals = [other for other in names if other != name and _bare(other) == bare]
            return name if rivals else bare
    return name


def _bare(name: str) -> str:
    return next(
        (name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name
    )


def _seconds(info: Mapping[str, Any]) -> float | None:
    """Time that the attempts took, without the time between them."""
    took = 0.0
    for attempt in info.get("attempts", []):
        started, ended = attempt.get("started"), attempt.get("ended")
        if _finite(started) and _finite(ended):
            took += float(ended) - float(started)
    return took or None


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
