"""The training loss as a series of windows, whoever wrote it down."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import polars as pl

__all__ = ["LOSS_FILE", "METRICS_FILE", "Losses", "training_losses", "validation_losses"]

LOSS_FILE = "records/loss.jsonl"
METRICS_FILE = "records/metrics.jsonl"

_NAMES = ("train_loss", "train_loss_step", "train/loss", "training_loss", "loss", "loss/train")
_OTHERS = ("val", "test", "valid", "eval", "dev")


class Losses(NamedTuple):
    """The training loss by windows of steps, in order; all lists are equally long.

    Attributes:
        steps: Last step of each window.
        firsts: First step of each window.
        means: Mean of the finite losses; NaN where there was none.
        lows: Smallest.
        highs: Largest.
        stds: Standard deviation within the window; 0 where it holds one step.
        counts: Steps in the window.
        rates: Largest learning rate at its last step; NaN where unknown.
        norms: Mean gradient norm; NaN where unknown.
        file: Where the rows stand.
    """

    steps: list[int]
    firsts: list[int]
    means: list[float]
    lows: list[float]
    highs: list[float]
    stds: list[float]
    counts: list[int]
    rates: list[float]
    norms: list[float]
    file: str


def training_losses(loss: "pl.DataFrame", metrics: "pl.DataFrame") -> Losses | None:
    """The series of ``loss.jsonl`` if it has losses, else of what the module logged; else None.

    Args:
        loss: Rows of ``loss.jsonl``.
        metrics: Rows of ``metrics.jsonl``.
    """
    return _from_windows(loss) or _from_metrics(metrics)


def validation_losses(metrics: "pl.DataFrame") -> tuple[list[int], list[float], str] | None:
    """Steps, values and name of the validation loss that was logged; None where there is none."""
    names = [
        name
        for name in metrics.columns
        if _is_loss(name) and any(word in name.lower() for word in ("val", "eval", "dev"))
    ]
    best = min(names, key=lambda name: (name != "val_loss", len(name)), default=None)
    if best is None:
        return None
    found = _points(metrics, best)
    return ([step for step, _ in found], [value for _, value in found], best) if found else None


def _from_windows(loss: "pl.DataFrame") -> Losses | None:
    if "loss" not in loss.columns or loss["loss"].drop_nulls().is_empty():
        return None
    rows = loss.sort("step").to_dicts()

    def numbers(key: str) -> list[float]:
        return [math.nan if row.get(key) is None else float(row[key]) for row in rows]

    return Losses(
        steps=[int(row["step"]) for row in rows],
        firsts=[int(row.get("first_step") or 0) for row in rows],
        means=numbers("loss"),
        lows=numbers("loss_min"),
        highs=numbers("loss_max"),
        stds=numbers("loss_std"),
        counts=[int(row.get("steps") or 1) for row in rows],
        rates=numbers("lr"),
        norms=numbers("gradient_norm"),
        file=LOSS_FILE,
    )


def _from_metrics(metrics: "pl.DataFrame") -> Losses | None:
    names = [name for name in metrics.columns if _is_loss(name) and not _is_other(name)]
    known = [name for name in _NAMES if name in names]
    # of several unknown ones, which may be the parts of a sum, none stands for the whole
    chosen = known[0] if known else names[0] if len(names) == 1 else None
    found = _points(metrics, chosen) if chosen else []
    if not found:
        return None
    steps, values = [step for step, _ in found], [value for _, value in found]
    rates = dict(_points(metrics, _rate_name(metrics.columns)))
    nothing = [math.nan] * len(steps)
    return Losses(
        steps=steps,
        firsts=steps,
        means=values,
        lows=values,
        highs=values,
        stds=[0.0] * len(steps),
        counts=[1] * len(steps),
        rates=[rates.get(step, math.nan) for step in steps],
        norms=nothing,
        file=METRICS_FILE,
    )


def _is_loss(name: str) -> bool:
    lower = name.lower()
    return "loss" in lower and not lower.endswith(("_nonfinite", "_epoch"))


def _is_other(name: str) -> bool:
    return any(word in name.lower() for word in _OTHERS)


def _rate_name(columns: Sequence[str]) -> str | None:
    return next((one for one in columns if one == "lr" or one.startswith(("lr-", "lr_"))), None)


def _points(metrics: "pl.DataFrame", name: str | None) -> list[tuple[int, float]]:
    if name is None or "step" not in metrics.columns or not metrics[name].dtype.is_numeric():
        return []
    rows = metrics.select("step", name).drop_nulls().sort("step", maintain_order=True)
    points = zip(rows["step"].to_list(), rows[name].to_list(), strict=True)
    return [(int(step), float(value)) for step, value in points]
