"""What the training chart draws: loss curves and learning rates out of the logged metrics."""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_diag.report.thinning import thin

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Curve", "TrainingData", "is_loss", "training_data"]

_POINTS = 5000
_MOST = 6  # curves a panel
_FEW = 60  # points up to which each gets a dot
_SHARE = re.compile(r"loss_shares?(?![a-z])")
_STAGES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
_WHOLE = {"loss", "step", "epoch", "total"}


@dataclass(frozen=True)
class Curve:
    """One metric over the steps at which it was logged.

    Args:
        name: The metric.
        points: ``{step, metric, value, segment, few}``; a new segment starts after
            a value that was lost, and ``few`` says that each point gets a dot.
        lost: ``{step, metric, what}`` of values that were NaN or infinity.
        wide: Whether it is positive and spans two decades, so that a log axis serves it better.
    """

    name: str
    points: list[dict[str, Any]]
    lost: list[dict[str, Any]]
    wide: bool


@dataclass(frozen=True)
class TrainingData:
    """Curves for the training chart, and what a reader must know of what was left out."""

    losses: list[Curve]
    rates: list[Curve]
    steps: list[int]
    said: list[str]
    described: str


def training_data(metrics: "pl.DataFrame") -> TrainingData:
    """Pick the losses and learning rates out of the frame of ``records/metrics.jsonl``."""
    numeric = [
        name
        for name, kind in metrics.schema.items()
        if kind.is_numeric() and not name.endswith("_nonfinite")
    ]
    loss_names = sorted((name for name in numeric if is_loss(name)), key=_order)
    rate_names = [name for name in numeric if name.lower().startswith("lr")]
    said = []
    for label, names in (("losses", loss_names), ("learning rates", rate_names)):
        if len(names) > _MOST:
            said.append(f"The first {_MOST} of {len(names)} {label} are drawn.")
    losses = _curves(metrics, loss_names)
    rates = _curves(metrics, rate_names)
    longest = max((metrics[name].len() - metrics[name].null_count() for name in numeric), default=0)
    if longest > _POINTS:
        said.append(f"Thinned to {_POINTS} points a line; lows and highs are kept.")
    if any(curve.lost for curve in losses):
        said.append("A cross at the top: the value was NaN or infinity.")
    steps = [row["step"] for curve in losses + rates for row in curve.points + curve.lost] or [0]
    edges = [min(steps), max(steps)] if min(steps) < max(steps) else [steps[0] - 1, steps[0] + 1]
    return TrainingData(losses, rates, edges, said, _describe(losses, rates, edges))


def is_loss(name: str) -> bool:
    """Whether a logged metric is a loss; what part of it another one makes up is none.

    Example:
        >>> is_loss("val_loss"), is_loss("loss_share/image"), is_loss("accuracy")
        (True, False, False)
    """
    lower = name.lower()
    return "loss" in lower and _SHARE.search(lower) is None


def _order(name: str) -> tuple[bool, int]:
    """The whole loss before its parts, training before validation and test."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    stage = next((_STAGES[word] for word in words if word in _STAGES), 0)
    return not _WHOLE.union(_STAGES).issuperset(words), stage


def _curves(metrics: "pl.DataFrame", names: list[str]) -> list[Curve]:
    curves = (_curve(metrics, name) for name in names[:_MOST])
    return [curve for curve in curves if curve.points or curve.lost]


def _curve(metrics: "pl.DataFrame", name: str) -> Curve:
    mark = f"{name}_nonfinite"
    columns = [metrics["step"], metrics[name]]
    marks = metrics[mark] if mark in metrics.columns else [None] * len(metrics)
    rows: list[dict[str, Any]] = []
    lost: list[dict[str, Any]] = []
    segment = 0
    for step, value, bad in zip(*columns, marks, strict=True):
        if step is None or (value is None and not bad):
            continue
        if value is None or not math.isfinite(value):
            lost.append({"step": int(step), "metric": name, "what": "NaN or infinity"})
            segment += 1
        else:
            short = float(f"{value:.6g}")
            rows.append({"step": int(step), "metric": name, "value": short, "segment": segment})
    kept = [rows[index] for index in thin([row["value"] for row in rows], _POINTS)]
    for row in kept:
        row["few"] = len(rows) <= _FEW
    values = [row["value"] for row in rows]
    wide = bool(values) and min(values) > 0 and max(values) > 100 * min(values)
    lost = [lost[index] for index in thin([float(row["step"]) for row in lost], _POINTS)]
    return Curve(name, kept, lost, wide)


def _describe(losses: list[Curve], rates: list[Curve], edges: list[int]) -> str:
    parts = []
    for curve in losses + rates:
        values = [row["value"] for row in curve.points]
        range_ = f"from {values[0]:.4g} to {values[-1]:.4g}" if values else "never finite"
        parts.append(f"{curve.name} goes {range_}")
    listed = "; ".join(parts) or "nothing was logged"
    return f"Line charts of loss and learning rate, steps {edges[0]} to {edges[1]}: {listed}."
