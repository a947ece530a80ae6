"""Rows cut into one trace per component, and the few measures that rules take of a trace."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from lightning_diag.rules.once import once_a_frame

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "GRAD_FILE",
    "Trace",
    "after_warmup",
    "component_traces",
    "evidence_steps",
    "outliers",
    "robust_sigma",
    "streaks",
    "whole_traces",
    "without_skipped",
]

_SUMMED = ("count", "nonfinite", "tensors", "missing", "frozen", "share")
_NUMBERS = (
    *(*_SUMMED, "l2", "zeros", "l2_nonfinite", "has_nan", "has_inf", "min_norm"),
    *("matrix_min", "matrix_max"),
)
_WHOLE = ("clip_value", "clip_coefficient", "clipped", "scale", "skipped", "skipped_total")
_WORDS = ("component", "first_missing", "first_nonfinite", "dominant", "clip_algorithm", "smallest")

GRAD_FILE = "records/grad.jsonl"


class Trace(NamedTuple):
    """The rows of one component, by rising step; component None is the whole model."""

    component: str | None
    rows: "pl.DataFrame"

    @property
    def steps(self) -> list[int]:
        """The steps that were measured."""
        found: list[int] = self.rows["step"].to_list()
        return found

    def numbers(self, name: str) -> list[float]:
        """A column as numbers, with NaN where nothing was measured."""
        column = self.rows[name].to_list()
        return [math.nan if value is None else float(value) for value in column]

    def words(self, name: str) -> list[str | None]:
        """A column as text, with None where there is none."""
        return [None if one is None else str(one) for one in self.rows[name]]


@once_a_frame
def _complete(grad: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl

    names = {**dict.fromkeys((*_NUMBERS, *_WHOLE), pl.Float64), **dict.fromkeys(_WORDS, pl.String)}
    absent = [name for name in names if name not in grad.columns]
    frame = grad.with_columns(pl.lit(None).alias(name) for name in absent)
    if "step" not in frame.columns:
        return frame.clear().with_columns(pl.lit(None, pl.Int64).alias("step"))
    casts = [pl.col(name).cast(kind, strict=False) for name, kind in names.items()]
    frame = frame.with_columns(casts).filter(pl.col("step").is_not_null())
    # an overflow stands as null in the file; NaN would poison sums and medians here
    return frame.with_columns(pl.col(name).fill_nan(None) for name in (*_NUMBERS, *_WHOLE))


@once_a_frame
def without_skipped(grad: "pl.DataFrame") -> "pl.DataFrame":
    """The rows of the steps that the gradient scaler let through."""
    import polars as pl

    frame = _complete(grad)
    keys = ["step", "optimizer"] if "optimizer" in frame.columns else ["step"]
    skipped = frame.filter(pl.col("skipped") > 0).select(keys).unique()
    return frame.join(skipped, on=keys, how="anti", nulls_equal=True, maintain_order="left")


@once_a_frame
def component_traces(grad: "pl.DataFrame") -> list[Trace]:
    """One trace per component, in order of appearance.

    Where several optimizers wrote rows for one component at one step, they are merged: squared
    norms and counts add up.
    """
    import polars as pl

    frame = _complete(grad).filter(pl.col("component").is_not_null())
    words = [pl.col(name).drop_nulls().first() for name in ("first_missing", "first_nonfinite")]
    measured = pl.col("l2").is_not_null().any()
    merged = frame.group_by("component", "step", maintain_order=True).agg(
        pl.when(measured).then((pl.col("l2") ** 2).sum().sqrt()).alias("l2"),
        *[pl.col(name).sum() for name in _SUMMED],
        *[pl.col(name).max() for name in ("zeros", "l2_nonfinite")],
        *words,
    )
    parts = merged.partition_by("component", maintain_order=True)
    return [Trace(str(part["component"][0]), part.sort("step")) for part in parts]


@once_a_frame
def whole_traces(grad: "pl.DataFrame") -> list[Trace]:
    """The rows of the whole model, one trace per optimizer."""
    import polars as pl

    frame = _complete(grad).filter(pl.col("component").is_null())
    if frame.is_empty():
        return []
    if "optimizer" not in frame.columns:
        return [Trace(None, frame.sort("step"))]
    return [Trace(None, part.sort("step")) for part in frame.partition_by("optimizer")]


def after_warmup(length: int, rows: float, share: float) -> int:
    """Index of the first row that counts: past `rows` rows and past `share` of all of them."""
    return min(length, max(int(rows), math.ceil(share * length)))


def streaks(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Unbroken runs of true flags, as half-open ranges ``(start, stop)``.

    Example:
        >>> streaks([False, True, True, False, True])
        [(1, 3), (4, 5)]
    """
    found: list[tuple[int, int]] = []
    start: int | None = None
    for index, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            found.append((start, index))
            start = None
    return found


def robust_sigma(values: Sequence[float], floor: float) -> tuple[float, float]:
    """Median and 1.4826 times the median absolute deviation, which is at least `floor`.

    For normal noise the second number estimates the standard deviation, and up to half of the
    values may be wild without moving it far.
    """
    centre = median(values)
    spread = 1.4826 * median([abs(value - centre) for value in values])
    return centre, max(spread, floor)


def outliers(
    values: Sequence[float], *, sigmas: float, window: int, history: int, floor: float
) -> list[float]:
    """How far each value lies above its own past, in robust standard deviations over `sigmas`.

    A value above 1 is an outlier and does not enter the past, so a rise that lasts keeps standing
    out. Negate the values to look for falls. The first `history` values get 0, as does NaN.
    """
    past: deque[float] = deque(maxlen=window)
    heights = []
    for value in values:
        height = 0.0
        if len(past) >= history and not math.isnan(value):
            centre, spread = robust_sigma(past, floor)
            height = (value - centre) / (sigmas * spread)
        if height <= 1.0 and not math.isnan(value):
            past.append(value)
        heights.append(height)
    return heights


def evidence_steps(steps: Iterable[int], limit: int = 20) -> tuple[int, ...]:
    """At most `limit` of the steps: the first and the last ones."""
    chosen = list(steps)
    half = limit // 2
    return tuple(chosen if len(chosen) <= limit else [*chosen[:half], *chosen[-half:]])
