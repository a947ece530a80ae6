"""Updates of each component, and the learning rate, cut out of the rows of several files."""

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_diag.rules.loss_series import LOSS_FILE, METRICS_FILE
from lightning_diag.rules.once import once_a_frame

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "UPDATE_FILE",
    "Rates",
    "Updates",
    "learning_rates",
    "middle",
    "typical_ratios",
    "update_traces",
    "weighty",
]

UPDATE_FILE = "records/update.jsonl"
_WANTED = (
    *("step", "component", "skipped", "count", "update_l2", "weight_l2", "weight_rms", "ratio"),
    *("unchanged_share", "lr", "jump", "nonfinite"),
)


class Updates(NamedTuple):
    """The updates of one component in order of steps; all lists are equally long.

    Attributes:
        component: Its name.
        steps: The steps that were measured and made.
        ratios: Norm of the update over that of the weights; NaN where there is none.
        rates: Learning rate; NaN where unknown.
        unchanged: Share of elements that stayed the same; NaN where unknown.
        jumps: The update over its running median; NaN where there is no history.
        sizes: Root mean square of the weights; NaN where unknown.
        elements: How many there are.
        from_zero: Whether its weights began at, or next to, zero.
    """

    component: str
    steps: list[int]
    ratios: list[float]
    rates: list[float]
    unchanged: list[float]
    jumps: list[float]
    sizes: list[float]
    elements: float
    from_zero: bool


@once_a_frame
def update_traces(update: "pl.DataFrame") -> list[Updates]:
    """One trace a component, in order of appearance, without skipped steps.

    Where several optimizers move one component at a step, squared norms add up.
    """
    parts: dict[str, dict[int, list[dict[str, Any]]]] = {}
    names = [name for name in _WANTED if name in update.columns]
    if "step" not in names or "component" not in names:
        return []
    for row in update.select(names).iter_rows(named=True):
        if row["component"] is not None and row["step"] is not None:
            parts.setdefault(row["component"], {}).setdefault(row["step"], []).append(row)
    return [_trace(name, rows) for name, rows in parts.items()]


def _trace(component: str, by_step: dict[int, list[dict[str, Any]]]) -> Updates:
    steps = sorted(by_step)
    rows = [_merged(by_step[step]) for step in steps]
    spread = [row["weight_rms"] for row in rows if not math.isnan(row["weight_rms"])]
    # a part that begins at zero has no size yet for its updates to be compared with
    return Updates(
        component=component,
        steps=steps,
        ratios=[row["ratio"] for row in rows],
        rates=[row["lr"] for row in rows],
        unchanged=[row["unchanged_share"] for row in rows],
        jumps=[row["jump"] for row in rows],
        sizes=[row["weight_rms"] for row in rows],
        elements=max((row["count"] for row in rows), default=0.0),
        from_zero=bool(spread) and spread[0] < 0.1 * max(spread) and spread[0] < 3e-3,
    )


def _merged(rows: list[dict[str, Any]]) -> dict[str, float]:
    def numbers(name: str) -> list[float]:
        return [math.nan if row.get(name) is None else float(row[name]) for row in rows]

    def largest(name: str) -> float:
        return max((one for one in numbers(name) if not math.isnan(one)), default=math.nan)

    merged = {name: largest(name) for name in ("lr", "jump", "weight_rms", "unchanged_share")}
    merged["count"] = sum(one for one in numbers("count") if not math.isnan(one))
    if any(one > 0 for one in numbers("nonfinite")):
        return {**merged, "ratio": math.nan}
    if len(rows) == 1:
        return {**merged, "ratio": numbers("ratio")[0]}
    moved, size = (math.hypot(*numbers(name)) for name in ("update_l2", "weight_l2"))
    return {**merged, "ratio": moved / size if size > 0 else math.nan}


def weighty(traces: Iterable[Updates], min_count: float) -> list[Updates]:
    """The components with so many elements that a ratio of norms says something of them."""
    return [one for one in traces if one.elements >= min_count and not one.from_zero]


def typical_ratios(traces: Sequence[Updates]) -> tuple[list[int], list[float]]:
    """At each step the median ratio of the components that have one."""
    at: dict[int, list[float]] = {}
    for trace in traces:
        for step, ratio in zip(trace.steps, trace.ratios, strict=True):
            if not math.isnan(ratio):
                at.setdefault(step, []).append(ratio)
    steps = sorted(at)
    return steps, [median(at[step]) for step in steps]


def middle(values: Iterable[float]) -> float:
    """The median of what is known; NaN where nothing is.

    Example:
        >>> middle([3.0, float("nan"), 1.0])
        2.0
    """
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


class Rates(NamedTuple):
    """The learning rate over the run, by windows of steps in order; all lists are equally long.

    Attributes:
        firsts: First step of each window.
        steps: Last step of each window.
        lows: Smallest rate in the window.
        highs: Largest.
        lasts: The rate at its last step; NaN where it was not a finite number.
        file: Where the rows stand.
    """

    firsts: list[int]
    steps: list[int]
    lows: list[float]
    highs: list[float]
    lasts: list[float]
    file: str


def learning_rates(
    loss: "pl.DataFrame", metrics: "pl.DataFrame", update: "pl.DataFrame"
) -> Rates | None:
    """The learning rate, the largest of all groups, from the file that knows it best.

    Args:
        loss: Rows of ``loss.jsonl``, with the ends of the rate in every window.
        metrics: Rows of ``metrics.jsonl``, where `LearningRateMonitor` writes ``lr-...``.
        update: Rows of ``update.jsonl``.
    """
    # the windows of the first know the ends of the rate between two rows too
    return _rates_of_loss(loss) or _rates_of_update(update) or _rates_of_metrics(metrics)


def _rates_of_loss(loss: "pl.DataFrame") -> Rates | None:
    if "lr" not in loss.columns:
        return None
    names = [
        name
        for name in ("first_step", "step", "lr", "lr_min", "lr_max", "lr_nonfinite")
        if name in loss.columns
    ]
    rows = [
        row
        for row in loss.select(names).sort("step").iter_rows(named=True)
        if row["step"] is not None and (row["lr"] is not None or row.get("lr_nonfinite"))
    ]
    lasts = [math.nan if row["lr"] is None else float(row["lr"]) for row in rows]

    def ends(name: str) -> list[float]:
        given = (row.get(name) for row in rows)
        return [b if a is None else float(a) for a, b in zip(given, lasts, strict=True)]

    firsts = [row["step"] if row.get("first_step") is None else row["first_step"] for row in rows]
    steps = [row["step"] for row in rows]
    if not rows:
        return None
    return Rates(firsts, steps, ends("lr_min"), ends("lr_max"), lasts, LOSS_FILE)


def _rates_of_metrics(metrics: "pl.DataFrame") -> Rates | None:
    names = [
        name
        for name in metrics.columns
        if (name == "lr" or name.startswith(("lr-", "lr_")))
        and not name.endswith(("_nonfinite", "-momentum", "-weight_decay"))
        and metrics[name].dtype.is_numeric()
    ]
    if not names or "step" not in metrics.columns:
        return None
    at: dict[int, float] = {}
    for step, *rates in metrics.select("step", *names).iter_rows():
        known = [float(rate) for rate in rates if rate is not None]
        if known and step is not None:
            at[step] = max([*known, at.get(step, -math.inf)])
    return _points(at, METRICS_FILE)


def _rates_of_update(update: "pl.DataFrame") -> Rates | None:
    if not {"step", "lr"} <= set(update.columns):
        return None
    at: dict[int, float] = {}
    for step, rate in update.select("step", "lr").iter_rows():
        if step is not None and rate is not None:
            at[step] = max(float(rate), at.get(step, -math.inf))
    return _points(at, UPDATE_FILE)


def _points(at: dict[int, float], file: str) -> Rates | None:
    steps = sorted(at)
    values = [at[step] for step in steps]
    return Rates(steps, steps, values, values, values, file) if steps else None
