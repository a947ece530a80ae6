"""Which recorded gradient norms say something about a clip value, and why the others do not."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_diag.records import Run

__all__ = ["History", "histories", "runaway", "training_losses", "trusted"]

# far above its own past: so many times its median, and so many robust standard deviations
_TIMES, _SIGMAS = 10.0, 6.0
_GROWTH = 100.0
_WINDOW, _PAST = 128, 5
_LASTING = 3
_STAYS = 0.8
_COLUMNS = (
    *("step", "global_norm", "l2", "min", "max", "count", "nonfinite", "skipped", "optimizer"),
    *("clip_value", "clip_algorithm"),
)


@dataclass
class History:
    """The gradient sizes of one optimizer, by rising step.

    Attributes:
        optimizer: Its place among several, or None.
        algorithm: ``"norm"`` or ``"value"``, what the sizes are for.
        steps: The measured steps whose size counts so far.
        sizes: Norm, or largest magnitude, at these steps; finite and above 0.
        excluded: Reason to number of rows that do not count.
        current: The clip value of the run; None where it did not clip.
        ended_at: The first of the rows without a finite gradient that end the run, or None.
    """

    optimizer: int | None
    algorithm: str
    steps: list[int]
    sizes: list[float]
    excluded: dict[str, int]
    current: float | None
    ended_at: int | None


def histories(run: "Run", algorithm: str | None) -> list[History]:
    """Read the rows of the whole model, apart for each optimizer.

    Args:
        run: The run.
        algorithm: ``"norm"`` or ``"value"``; None for the one that the run clips with.
    """
    import polars as pl

    grad = run.frame("grad")
    absent = [pl.lit(None).alias(name) for name in _COLUMNS if name not in grad.columns]
    frame = grad.with_columns(absent).filter(pl.col("component").is_null()).select(_COLUMNS)
    rows = frame.sort("optimizer", "step", maintain_order=True).to_dicts()
    return [
        _history(optimizer, list(own), run.config, algorithm)
        for optimizer, own in groupby(rows, key=lambda row: row["optimizer"])
    ]


def _history(
    optimizer: float | None,
    rows: list[dict[str, Any]],
    config: dict[str, Any],
    algorithm: str | None,
) -> History:
    trainer = config.get("trainer")
    settings = trainer if isinstance(trainer, dict) else {}
    named = [row["clip_algorithm"] for row in rows if row["clip_algorithm"]]
    last = named[-1] if named else settings.get("gradient_clip_algorithm")
    chosen = algorithm or ("value" if last == "value" else "norm")
    clips = [row["clip_value"] for row in rows if row["clip_value"]]
    current = clips[-1] if clips else settings.get("gradient_clip_val")
    if chosen != (last or "norm") or not isinstance(current, int | float) or not current > 0:
        current = None
    found = History(
        None if optimizer is None else int(optimizer), chosen, [], [], {}, current, None
    )
    broken: list[int] = []
    for row in rows:
        size = _size(row, chosen)
        why = _unfit(row, size)
        if why is None and size is not None:
            found.steps.append(row["step"])
            found.sizes.append(size)
            broken.clear()
        else:
            found.excluded[str(why)] = found.excluded.get(str(why), 0) + 1
            broken += [row["step"]] if why != "no_gradient" else []
    if len(broken) >= _LASTING:
        found.ended_at = broken[0]
    return found


def _size(row: dict[str, Any], algorithm: str) -> float | None:
    if algorithm == "norm":
        size = row["l2"] if row["global_norm"] is None else row["global_norm"]
    else:
        ends = (row["min"], row["max"])
        size = None if None in ends else max(-ends[0], ends[1])
    return None if size is None or not math.isfinite(size) else float(size)


def _unfit(row: dict[str, Any], size: float | None) -> str | None:
    if (row["skipped"] or 0) > 0:
        return "skipped"
    if (row["nonfinite"] or 0) > 0:
        return "nonfinite"
    if row["count"] == 0 or size == 0:
        return "no_gradient"
    return "nonfinite" if size is None else None


def runaway(history: History, losses: Sequence[tuple[int, float]]) -> int | None:
    """Index of the first size of a rise that lasts to the end of the run; None where there is none.

    A rise is one to far above the own past, or a slow one over two orders of magnitude. Where the
    loss went on falling it is none: a model that leaves a plateau has larger gradients as well.

    Args:
        history: The sizes.
        losses: Step and finite training loss, by rising step.
    """
    sizes = history.sizes
    starts = [_last_stretch(flags(sizes)) for flags in (_above_start, _above_past)]
    found = [
        start for start in starts if start is not None and not _fell(losses, history.steps[start])
    ]
    if found:
        return min(found)
    return len(sizes) if history.ended_at is not None else None


def trusted(history: History, losses: Sequence[tuple[int, float]]) -> list[bool]:
    """Which sizes are no part of a stretch far above the past in which the loss did not fall.

    A lone spike is trusted: it is what clipping is for.

    Args:
        history: The sizes.
        losses: Step and finite training loss, by rising step.
    """
    kept: list[bool] = []
    for high, group in groupby(_above_past(history.sizes)):
        length = len(list(group))
        first, stop = history.steps[len(kept)], [*history.steps, None][len(kept) + length]
        kept += [not high or length < _LASTING or _fell(losses, first, stop)] * length
    return kept


def _above_past(sizes: Sequence[float]) -> list[bool]:
    past: deque[float] = deque(maxlen=_WINDOW)
    flags = []
    for value in map(math.log, sizes):
        high = len(past) >= _PAST and _far_above(value, past)
        # what stands out does not become the past, so that a rise that lasts goes on standing out
        if not high:
            past.append(value)
        flags.append(high)
    return flags


def _far_above(value: float, logs: Sequence[float]) -> bool:
    centre = median(logs)
    if value <= centre + math.log(_TIMES):
        return False
    return value > centre + _SIGMAS * 1.4826 * median([abs(one - centre) for one in logs])


def _above_start(sizes: Sequence[float]) -> list[bool]:
    quarter = len(sizes) // 4
    if quarter < _LASTING or median(sizes[-quarter:]) <= _GROWTH * median(sizes[:quarter]):
        return []
    return [size > _TIMES * median(sizes[:quarter]) for size in sizes]


def _last_stretch(flags: Sequence[bool]) -> int | None:
    """Where the stretch begins that ends with the last flag, nearly all of it flagged."""
    found, count = None, 0
    for length, place in enumerate(reversed(range(len(flags))), start=1):
        count += flags[place]
        if flags[place] and length >= _LASTING and count >= _STAYS * length:
            found = place
    return found


def _fell(losses: Sequence[tuple[int, float]], first: int, stop: int | None = None) -> bool:
    """Whether the loss was lower from `first` to before `stop` than just before, and at its end."""
    before = [loss for at, loss in losses if at < first]
    after = [loss for at, loss in losses if at >= first and (stop is None or at < stop)]
    near = before[-max(len(after), _PAST) :]
    if not near or not after:
        return False
    end = after[-max(1, len(after) // 4) :]
    return max(median(after), median(end)) < median(near)


def training_losses(run: "Run") -> Iterator[tuple[int, float]]:
    """Step and value of the training loss, as far as one was logged and finite."""
    metrics = run.frame("metrics")
    names = [name for name in metrics.columns if "loss" in name.lower()]
    names = [name for name in names if not any(word in name.lower() for word in ("val", "test"))]
    names.sort(key=lambda name: ("train" not in name.lower(), name.lower().endswith("epoch")))
    for name in names[:1]:
        for step, loss in metrics.select("step", name).iter_rows():
            if isinstance(loss, int | float) and math.isfinite(loss):
                yield step, float(loss)
