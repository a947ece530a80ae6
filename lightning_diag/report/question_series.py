"""Which of the logged metrics are losses and parts of them, and how one goes over training."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lightning_diag.report.words import flatten, step_words

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Series", "Window", "loss_parts", "part_weights", "series", "total_loss"]

_TOTALS = ("loss", "total_loss", "loss_total")
_OTHER_STAGES = ("val", "valid", "validation", "test", "eval", "sanity")
_TENTH = 10


@dataclass(frozen=True)
class Window:
    """A stretch of a series.

    Args:
        median: Of its values.
        mean: Of its values.
        first: Step of the first value.
        last: Step of the last value.
    """

    median: float
    mean: float
    first: int
    last: int

    @property
    def words(self) -> str:
        """``steps 10 to 90``."""
        return step_words(self.first, self.last)


@dataclass(frozen=True)
class Series:
    """One logged number over training.

    Args:
        name: As it was logged.
        points: Step and value, in order of steps; finite ones alone.
        lost: Steps at which it was NaN or infinite.
    """

    name: str
    points: Sequence[tuple[int, float]]
    lost: Sequence[int] = ()

    @property
    def start(self) -> Window:
        """The first tenth of the points, at least one."""
        return _window(self.points[: max(1, len(self.points) // _TENTH)])

    @property
    def end(self) -> Window:
        """The last tenth of the points, at least one."""
        return _window(self.points[-max(1, len(self.points) // _TENTH) :])

    @property
    def noise(self) -> float:
        """Median distance between neighbours: what one batch differs from the next by."""
        values = [value for _, value in self.points]
        steps = [abs(b - a) for a, b in pairwise(values)]
        return statistics.median(steps) if steps else 0.0

    def around(self, step: int) -> Window:
        """The tenth of the points that ends at a step, or the first point where none is so early.

        Args:
            step: An optimizer step.
        """
        before = [point for point in self.points if point[0] <= step] or self.points[:1]
        return _window(before[-max(1, len(self.points) // _TENTH) :])


def series(frame: "pl.DataFrame", name: str) -> Series:
    """A column of a frame of rows, by step.

    Args:
        frame: What `Run.frame` gave.
        name: A column; one that is missing or not numeric has no points.
    """
    if not {name, "step"} <= set(frame.columns) or not frame[name].dtype.is_numeric():
        return Series(name, [])
    mark = f"{name}_nonfinite"
    marks = frame[mark] if mark in frame.columns else [None] * len(frame)
    points, lost = {}, []
    for step, value, bad in zip(frame["step"], frame[name], marks, strict=True):
        if step is None or (value is None and not bad):
            continue
        if value is None or not math.isfinite(value):
            lost.append(int(step))
        else:
            points[int(step)] = float(value)
    return Series(name, sorted(points.items()), sorted(lost))


def total_loss(metrics: "pl.DataFrame", stages: Sequence[str] = ("train", "")) -> Series | None:
    """The loss that a stage logged, of those known by name the one with the most points.

    Args:
        metrics: The frame of ``records/metrics.jsonl``.
        stages: What the name may begin with: ``train_loss``, ``train/loss``, ``loss``.
    """
    found = [series(metrics, name) for name in _named(metrics, stages, _TOTALS)]
    found = [one for one in found if one.points or one.lost]
    return max(found, key=lambda one: len(one.points) + len(one.lost), default=None)


def loss_parts(metrics: "pl.DataFrame") -> dict[str, Series]:
    """The parts of a training loss by name: of ``loss_image``, ``train_image_loss``, ``image``.

    Args:
        metrics: The frame of ``records/metrics.jsonl``.
    """
    found: dict[str, Series] = {}
    for column in metrics.columns:
        name = _plain(column)
        match = re.fullmatch(r"(?:train_)?(?:loss_(?P<after>.+)|(?P<before>.+)_loss)", name)
        if match is None or name.split("_")[0] in _OTHER_STAGES or name.endswith("_nonfinite"):
            continue
        part = match["after"] or match["before"]
        if part in ("total", "train") or part.startswith(("share", "weight")):
            continue
        one = series(metrics, column)
        if len(one.points) > len(found[part].points if part in found else ()):
            found[part] = one
    return found


def part_weights(config: Mapping[str, Any], parts: Iterable[str]) -> dict[str, float]:
    """The weights of loss parts that a configuration names, such as ``image_weight: 0.5``.

    Args:
        config: The run's configuration, nested.
        parts: Names of the parts.

    Returns:
        Weights by part; without those that it does not name, or names twice and differently.
    """
    numbers = {
        key: float(value)
        for key, value in flatten(config).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    found = {}
    for part in parts:
        here = re.escape(part)
        known = re.compile(
            rf"(?:.*\.)?(?:{here}_(?:loss_)?weight|(?:loss_)?weights?[._]{here}|lambda_{here})"
        )
        values = {value for key, value in numbers.items() if known.fullmatch(key)}
        if len(values) == 1:
            found[part] = values.pop()
    return found


def _named(metrics: "pl.DataFrame", stages: Sequence[str], totals: Sequence[str]) -> Iterable[str]:
    wanted = {f"{stage}_{total}".strip("_") for stage in stages for total in totals}
    return (column for column in metrics.columns if _plain(column) in wanted)


def _plain(column: str) -> str:
    """A name without slashes, and without what Lightning appends for steps and epochs."""
    return re.sub(r"_(?:step|epoch)$", "", re.sub(r"[/.\s]+", "_", column.lower()))


def _window(points: Sequence[tuple[int, float]]) -> Window:
    values = [value for _, value in points]
    return Window(statistics.median(values), statistics.fmean(values), points[0][0], points[-1][0])
