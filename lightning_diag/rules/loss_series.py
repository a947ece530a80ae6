"""The training loss as a series of windows, whoever wrote it down."""

import math
import weakref
from collections.abc import Sequence
from statistics import fmean, median, pstdev
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "LOSS_FILE",
    "METRICS_FILE",
    "Losses",
    "at_most",
    "by_fives",
    "first_loss",
    "has_several_optimizers",
    "is_training_loss",
    "standard_error",
    "starting_level",
    "training_losses",
    "validation_losses",
    "window_noise",
    "without_warmup",
]

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

    def part(self, start: int, stop: int | None = None) -> "Losses":
        """The windows from `start` to before `stop`."""
        return Losses._make([*(column[start:stop] for column in self[:-1]), self.file])

    def finite(self) -> "Losses":
        """The windows that have a loss."""
        kept = [index for index, mean in enumerate(self.means) if math.isfinite(mean)]
        if len(kept) == len(self.means):
            return self
        columns: list[Any] = [[column[index] for index in kept] for column in self[:-1]]
        return Losses._make([*columns, self.file])

    def mean(self, start: int = 0, stop: int | None = None) -> float:
        """Mean loss of the steps of some windows."""
        counts = self.counts[start:stop]
        total = sum(m * c for m, c in zip(self.means[start:stop], counts, strict=True))
        return total / sum(counts)


def window_noise(values: Sequence[float]) -> float:
    """Standard deviation of the noise of a series that goes up or down slowly; 0 if it is short.

    Estimated from how far each value lies from the middle between its neighbours, by the median,
    so that neither a trend nor a few jumps count.
    """
    triples = zip(values, values[1:], values[2:], strict=False)
    bends = [abs(middle - (left + right) / 2) for left, middle, right in triples]
    return 1.4826 * median(bends) / math.sqrt(1.5) if bends else 0.0


def standard_error(losses: Losses) -> float:
    """Standard error of the mean of these windows: by the noise within them, and between them."""
    steps = sum(losses.counts)
    within = fmean(std**2 for std in losses.stds) / steps if steps else 0.0
    between = window_noise(losses.means) ** 2 / max(1, len(losses.means))
    return math.sqrt(max(within, between))


def starting_level(losses: Losses, first: float | None = None) -> float:
    """The loss before anything was learned: the mean of the first window.

    Where the loss leapt up within that window it is the loss of the first step, if that is known,
    or the lowest of the window, if the loss never came back there. That mere noise does not look
    like this is made sure of: a leap goes with gradients that are far larger than any later, and
    what never comes back is even, and all of it higher.

    Args:
        losses: The series; all of it has losses.
        first: Loss of the first step.
    """
    if losses.counts[0] == 1:
        return max(losses.means[:3])  # which of single losses was large is chance
    mean, low, high = losses.means[0], losses.lows[0], losses.highs[0]
    later = losses.part(1, 31)
    if losses.counts[0] < 5 or low <= 0 or high <= 3 * low or not later.means:
        return mean
    if min(later.lows) >= 2 * low and _is_out_of_line(low, later):
        return low if first is None else max(low, min(first, mean))
    norms = [norm for norm in later.norms if math.isfinite(norm)]
    calmer = bool(norms) and losses.norms[0] > 3 * median(norms)
    # where single losses differ so much anyway, the first one says nothing
    ends = zip(later.highs, later.lows, strict=True)
    calmer = calmer and median([end / start if start > 0 else 9.0 for end, start in ends]) < 5
    if first is not None and first > 0 and calmer and mean > 3 * first and high > 10 * first:
        return first
    return mean


def _is_out_of_line(low: float, later: Losses, sigmas: float = 10.0) -> bool:
    """Whether a loss is far below the lowest ones of later windows, which are much alike."""
    if len(later.lows) < 5:
        even = all(std < 0.3 * mean for std, mean in zip(later.stds, later.means, strict=True))
        return even and min(later.lows) > 5 * low
    logs = [math.log(one) for one in later.lows]
    return fmean(logs) - math.log(low) > sigmas * pstdev(logs)


def by_fives(losses: Losses) -> Losses:
    """Windows of five rows, where each row holds a single step and there are many of them."""
    size = min(5, len(losses.means) // 8)
    if size < 2 or max(losses.counts) > 1:
        return losses
    return _merged(losses, size)


def at_most(losses: Losses, count: int) -> Losses:
    """Wider windows, so that there are no more than `count`: what is asked of each costs time."""
    size = -(-len(losses.means) // count)
    return losses if size < 2 else _merged(losses, size)


def _merged(losses: Losses, size: int) -> Losses:
    starts = range(len(losses.means) % size, len(losses.means), size)
    windows = [losses.part(start, start + size) for start in starts]
    return Losses(
        steps=[one.steps[-1] for one in windows],
        firsts=[one.firsts[0] for one in windows],
        means=[fmean(one.means) for one in windows],
        lows=[min(one.lows) for one in windows],
        highs=[max(one.highs) for one in windows],
        stds=[pstdev(one.means) for one in windows],
        counts=[sum(one.counts) for one in windows],
        rates=[one.rates[-1] for one in windows],
        norms=[one.norms[-1] for one in windows],
        file=losses.file,
    )


def first_loss(collapse: "pl.DataFrame") -> float | None:
    """The loss of the first step of the run, which `CollapseStop` writes down by itself."""
    if "loss" not in collapse.columns or collapse.is_empty():
        return None
    row = collapse.sort("step", maintain_order=True).row(0, named=True)
    return float(row["loss"]) if row["step"] == 0 and row["loss"] is not None else None


def without_warmup(losses: Losses, share: float = 0.1) -> Losses:
    """The windows from the first on whose learning rate is `share` of the largest."""
    known = [rate for rate in losses.rates if rate > 0]
    if not known:
        return losses
    least = share * max(known)
    # an unknown rate does not keep a window out
    start = next(i for i, rate in enumerate(losses.rates) if not rate < least)
    return losses.part(start)


def has_several_optimizers(grad: "pl.DataFrame") -> bool:
    """Whether several optimizers take turns, as in a GAN, where no loss must fall."""
    if "optimizer" not in grad.columns:
        return False
    return grad["optimizer"].drop_nulls().n_unique() > 1


_last: list[tuple["weakref.ref[pl.DataFrame]", "weakref.ref[pl.DataFrame]", Losses | None]] = []


def training_losses(loss: "pl.DataFrame", metrics: "pl.DataFrame") -> Losses | None:
    """The series of ``loss.jsonl`` if it has losses, else of what the module logged; else None.

    Args:
        loss: Rows of ``loss.jsonl``.
        metrics: Rows of ``metrics.jsonl``.
    """
    # one rule after the other asks the same of the same frames
    if _last and _last[0][0]() is loss and _last[0][1]() is metrics:
        return _last[0][2]
    series = _from_windows(loss) or _from_metrics(metrics)
    _last[:] = [(weakref.ref(loss), weakref.ref(metrics), series)]
    return series


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


def is_training_loss(name: str) -> bool:
    """Whether a metric is, by its name, a loss of training."""
    return _is_loss(name) and not _is_other(name)


def _from_windows(loss: "pl.DataFrame") -> Losses | None:
    if "loss" not in loss.columns or loss["loss"].drop_nulls().is_empty():
        return None
    rows = loss.sort("step", maintain_order=True)

    def column(key: str, missing: float) -> list[float]:
        if key not in rows.columns:
            return [missing] * len(rows)
        return [missing if one is None else float(one) for one in rows[key].to_list()]

    def numbers(key: str) -> list[float]:
        return column(key, math.nan)

    return Losses(
        steps=[int(step) for step in rows["step"].to_list()],
        firsts=[int(step) for step in column("first_step", 0)],
        means=numbers("loss"),
        lows=numbers("loss_min"),
        highs=numbers("loss_max"),
        stds=numbers("loss_std"),
        counts=[max(1, int(count)) for count in column("steps", 1)],
        rates=numbers("lr"),
        norms=numbers("gradient_norm"),
        file=LOSS_FILE,
    )


def _from_metrics(metrics: "pl.DataFrame") -> Losses | None:
    names = [name for name in metrics.columns if is_training_loss(name)]
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
    return [(int(step), float(value)) for step, value in points if math.isfinite(value)]
