"""The numbers of two runs: what they logged, how fast they were, what they took."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import polars as pl

    from lightning_diag.records.read_run import Run

__all__ = ["MetricChange", "compared_machine", "compared_metrics", "metric_points"]

Goal = Literal["min", "max"]
Points = list[tuple[int, float]]

_ROW = ("step", "epoch", "time", "attempt", "component")
_LOWER = ("loss", "error", "mse", "mae", "rmse", "perplexity", "ppl", "nll", "wer", "cer", "fid")
_HIGHER = ("acc", "accuracy", "auc", "auroc", "f1", "precision", "recall", "score", "r2", "iou")
_SMOOTHED = 5
LOSS = "loss (mean of ten steps)"
"""The name under which ``records/loss.jsonl`` is compared, where it is there."""


@dataclass(frozen=True)
class MetricChange:
    """One number in two runs.

    Args:
        name: What it is.
        unit: What it counts; nothing for metrics.
        goal: Whether less or more of it is better; None where nobody knows.
        before: In the first run: the last value, or the only one.
        after: In the second run.
        best_before: The best value of the first run.
        best_after: The best value of the second run.
        step: The last step that both runs reached.
        at_step_before: The value of the first run there; of more than twenty, the median of the
            last five up to it.
        at_step_after: The same of the second run.
    """

    name: str
    unit: str
    goal: Goal | None
    before: float | None
    after: float | None
    best_before: float | None = None
    best_after: float | None = None
    step: int | None = None
    at_step_before: float | None = None
    at_step_after: float | None = None

    @property
    def better(self) -> bool | None:
        """Whether the second run did better: at the same step where it is known, else at its end.

        A number is better than NaN. None where they are equal, where one run lacks the number, or
        where nobody knows what is good.
        """
        pair = (self.at_step_before, self.at_step_after)
        if None in pair:
            pair = (self.before, self.after)
        if self.goal is None or pair[0] is None or pair[1] is None or pair[0] == pair[1]:
            return None
        lost = math.isnan(pair[0]), math.isnan(pair[1])
        if any(lost):
            return None if all(lost) else lost[0]
        return (pair[1] < pair[0]) == (self.goal == "min")

    def to_dict(self) -> dict[str, Any]:
        """Its fields, and `better`."""
        return {**asdict(self), "better": self.better}


def compared_metrics(before: "Run", after: "Run") -> list[MetricChange]:
    """Every metric that either run logged, losses first; learning rates are left out."""
    points = [metric_points(run) for run in (before, after)]
    names = list(dict.fromkeys([*points[0], *points[1]]))
    names.sort(key=lambda name: ("loss" not in name.lower(), name == LOSS))
    return [
        _change(
            name, _goal(name, (before, after)), points[0].get(name, []), points[1].get(name, [])
        )
        for name in names
    ]


def metric_points(run: "Run") -> dict[str, Points]:
    """The values of each metric of a run, with their steps; NaN where one was not finite."""
    frame = run.frame("metrics")
    found = {
        name: values
        for name, kind in frame.schema.items()
        if name not in _ROW and not name.endswith("_nonfinite") and not _rate(name)
        if kind.is_numeric() and (values := _points(frame, name))
    }
    losses = run.frame("loss")
    if "loss" in losses.columns and losses["loss"].dtype.is_numeric():
        values = _points(losses, "loss", "nonfinite")
        if values:
            found[LOSS] = values
    return found


def compared_machine(before: "Run", after: "Run") -> list[MetricChange]:
    """Time, throughput, waiting for data, and the most memory that either run took."""
    sides = [_machine(run) for run in (before, after)]
    return [
        MetricChange(name, unit, goal, sides[0].get(name), sides[1].get(name))
        for name, unit, goal in _MACHINE
        if sides[0].get(name) is not None or sides[1].get(name) is not None
    ]


_MACHINE: tuple[tuple[str, str, Goal | None], ...] = (
    ("time", "s", None),
    ("throughput", "samples/s", "max"),
    ("step time", "s", "min"),
    ("wait for data", "share of the time", "min"),
    ("peak memory", "MiB", "min"),
    ("peak GPU memory", "MiB", "min"),
)


def _machine(run: "Run") -> dict[str, float | None]:
    hardware = run.frame("hardware")
    return {
        "time": _seconds(run.info),
        "throughput": _median(hardware, "samples_per_second"),
        "step time": _median(hardware, "step_seconds"),
        "wait for data": _median(hardware, "data_wait"),
        "peak memory": _largest(hardware, "process_memory"),
        "peak GPU memory": _largest(hardware, "gpu_memory_peak"),
    }


def _values(frame: "pl.DataFrame", name: str) -> list[float]:
    return [value for _, value in _points(frame, name) if not math.isnan(value)]


def _median(frame: "pl.DataFrame", name: str) -> float | None:
    values = _values(frame, name)
    return median(values) if values else None


def _largest(frame: "pl.DataFrame", name: str) -> float | None:
    return max(_values(frame, name), default=None)


def _seconds(info: Mapping[str, Any]) -> float | None:
    """Time that the attempts took, those that ended."""
    took = 0.0
    for attempt in info.get("attempts", []):
        started, ended = attempt.get("started"), attempt.get("ended")
        if isinstance(started, (int, float)) and isinstance(ended, (int, float)):
            took += ended - started
    return took or None


def _points(frame: "pl.DataFrame", name: str, count: str | None = None) -> Points:
    """Steps and values; NaN where the run counted a value that was not finite, in `count`."""
    if name not in frame.columns or not frame[name].dtype.is_numeric():
        return []
    mark = count or f"{name}_nonfinite"
    marks = frame[mark].to_list() if mark in frame.columns else [None] * len(frame)
    rows = zip(frame["step"].to_list(), frame[name].to_list(), marks, strict=True)
    found = [
        (int(step), math.nan if value is None or not math.isfinite(value) else float(value))
        for step, value, lost in rows
        if step is not None and (value is not None or lost)
    ]
    return sorted(found, key=lambda point: point[0])


def _rate(name: str) -> bool:
    return name.lower().startswith(("lr-", "lr_", "lr/")) or name.lower() == "lr"


def _goal(name: str, runs: tuple["Run", "Run"]) -> Goal | None:
    for run in runs:
        if run.config.get("monitor") == name and run.config.get("monitor_mode") in ("min", "max"):
            mode: Goal = "max" if run.config["monitor_mode"] == "max" else "min"
            return mode
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & set(_LOWER):
        return "min"
    return "max" if words & set(_HIGHER) else None


def _change(name: str, goal: Goal | None, before: Points, after: Points) -> MetricChange:
    step = min(before[-1][0], after[-1][0]) if before and after else None
    if step is not None and (step < before[0][0] or step < after[0][0]):
        step = None
    return MetricChange(
        name=name,
        unit="",
        goal=goal,
        before=before[-1][1] if before else None,
        after=after[-1][1] if after else None,
        best_before=_best(before, goal),
        best_after=_best(after, goal),
        step=step,
        at_step_before=None if step is None else _until(before, step),
        at_step_after=None if step is None else _until(after, step),
    )


def _best(points: Points, goal: Goal | None) -> float | None:
    if goal is None or not points:
        return None
    finite = [value for _, value in points if not math.isnan(value)]
    return (min if goal == "min" else max)(finite, default=None)


def _until(points: Points, step: int) -> float:
    """The value up to a step, without the noise of one batch."""
    values = [value for at, value in points if at <= step]
    # epochs say one number each, which is no noise
    if len(values) <= 4 * _SMOOTHED or math.isnan(values[-1]):
        return values[-1]
    return median(value for value in values[-_SMOOTHED:] if not math.isnan(value))
