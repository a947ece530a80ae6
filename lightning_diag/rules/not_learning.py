"""A loss that does not fall, or hardly, from the start."""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_series import (
    Losses,
    first_loss,
    has_several_optimizers,
    standard_error,
    starting_level,
    training_losses,
    without_warmup,
)
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import usual_settings
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["NotLearning", "SlowConvergence", "not_learning", "slow_convergence"]

# cross-entropy of guessing among so many classes, or pairs of a batch, is their logarithm
_CHANCES = (*range(2, 11), 16, 32, 64, 100, 128, 256, 512, 1000, 1024)


@dataclass(frozen=True)
class NotLearning:
    """Thresholds of `not_learning`."""

    min_windows: float = field(default=8, metadata={"unit": "windows"})
    min_steps: float = field(default=100, metadata={"unit": "steps"})
    latest_start: float = field(default=20, metadata={"unit": "steps"})
    nothing: float = field(default=0.01, metadata={"unit": "share of the first loss"})
    hardly: float = field(default=0.03, metadata={"unit": "share of the first loss"})
    sigmas: float = field(default=3.0, metadata={"unit": "standard errors"})
    settled: float = field(default=0.06, metadata={"unit": "share of the first loss"})
    chance: float = field(default=0.12, metadata={"unit": "share of the first loss"})
    near_chance: float = field(default=0.012, metadata={"unit": "share of the loss of chance"})
    unsure: float = field(default=0.04, metadata={"unit": "standard error over the first loss"})
    converged: float = field(default=0.05, metadata={"unit": "loss"})


@dataclass(frozen=True)
class SlowConvergence:
    """Thresholds of `slow_convergence`."""

    min_windows: float = field(default=10, metadata={"unit": "windows"})
    min_steps: float = field(default=150, metadata={"unit": "steps"})
    latest_start: float = field(default=20, metadata={"unit": "steps"})
    least: float = field(default=0.01, metadata={"unit": "share of the first loss"})
    most: float = field(default=0.2, metadata={"unit": "share of the first loss"})
    steady: float = field(default=0.6, metadata={"unit": "later fall over earlier fall"})
    sigmas: float = field(default=3.0, metadata={"unit": "standard errors"})
    tiny_update: float = field(default=1e-5, metadata={"unit": "update over weight"})


@rule(
    "not_learning",
    family="losses",
    needs=("loss", "metrics", "grad", "collapse"),
    thresholds=NotLearning,
    explains=("constant_prediction", "attention_uniform"),
    reference="Karpathy 2019, A recipe for training neural networks; SageMaker Debugger's "
    "LossNotDecreasing.",
    remedy=usual_settings,
)
def not_learning(
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    grad: "pl.DataFrame",
    collapse: "pl.DataFrame",
    thresholds: NotLearning,
) -> list[Finding]:
    """The loss is where it was at the first steps, within its noise or within a few per cent.

    Steps of a warm-up do not count, nor does a loss that was next to nothing when the run began.
    """
    t = thresholds
    losses = _from_start(loss, metrics, t.latest_start)
    if losses is None or len(losses.means) < t.min_windows:
        return []
    if losses.steps[-1] - losses.firsts[0] + 1 < t.min_steps:
        return []
    start = starting_level(losses, first_loss(collapse))
    if start < losses.means[0]:  # it leapt up at once: what counts is where it came from
        losses = losses._replace(means=[start, *losses.means[1:]], stds=[0.0, *losses.stds[1:]])
    lead, tail = _ends(losses)
    first, last = lead.mean(), tail.mean()
    scale = abs(first)
    fall, error = first - last, math.hypot(standard_error(lead), standard_error(tail))
    if scale == 0.0 or not _is_flat(losses, fall, error, scale, t):
        return []
    sure = error <= t.unsure * scale and not has_several_optimizers(grad)
    # a single loss a row says little, and the first of them may come when all is learned
    seen = losses.counts[0] > 1 or losses.firsts[0] <= t.latest_start / 4
    grave = sure and seen and not _is_converged(losses, t)
    severity: Severity = "warning" if grave else "info"
    return [
        Finding(
            rule="not_learning",
            severity=severity,
            first_step=losses.firsts[0],
            last_step=losses.steps[-1],
            observed=fall / scale,
            threshold=t.hardly,
            unit="fall of the loss, as a share of the first",
            evidence=Evidence(losses.file, evidence_steps(losses.steps)),
            message=(
                f"The loss does not fall: {first:.4g} at the first steps, {last:.4g} over the last "
                f"third, up to step {losses.steps[-1]}."
            ),
            suggestion=_suggestion(severity),
            confidence=0.9 if severity == "warning" else 0.5,
        )
    ]


def _suggestion(severity: Severity) -> str:
    if severity == "info":
        return (
            "Nothing to do if the model had learned its task before this run began, or if the loss "
            "of single batches is too noisy to tell; watch a loss over more steps or samples."
        )
    return (
        "Try to learn one single batch by heart, which any model that is put together rightly can "
        "do within a few hundred steps. If it cannot, look for labels that do not belong to the "
        "inputs, a detached graph, dead activations, or a learning rate that is ten times too "
        "small or too large. If it can, look at the data and how they are shuffled."
    )


def _from_start(loss: "pl.DataFrame", metrics: "pl.DataFrame", latest: float) -> Losses | None:
    """The series without its warm-up, if it reaches back to the start of the run."""
    series = training_losses(loss, metrics)
    losses = series.finite() if series else None
    if losses is None or not losses.means or losses.firsts[0] > latest:
        return None
    return without_warmup(losses)


def _ends(losses: Losses) -> tuple[Losses, Losses]:
    """The first windows, which are few since much may be learned there, and the last third."""
    count = len(losses.means)
    few = max(1, count // 20) if losses.counts[0] > 1 else max(2, count // 10)
    lead, more = losses.part(0, few), losses.part(0, max(few, count // 4))
    # nothing was learned in the first quarter: all of it tells where the loss began
    same = more.mean() >= lead.mean() - standard_error(lead)
    return more if same else lead, losses.part(-max(3, count // 3))


def _is_flat(losses: Losses, fall: float, error: float, scale: float, t: NotLearning) -> bool:
    if -fall > max(0.2 * scale, 6 * error):
        return False  # it rises: that is another matter
    means = losses.means
    smooth = [median(means[i : i + 3]) for i in range(len(means) - 2)]
    dip = means[0] - min(smooth)
    if dip > max(0.15 * scale, 3 * fall, min(8 * error, 0.5 * scale)):
        return False  # it had learned something
    if fall < t.nothing * scale or (fall < t.hardly * scale and fall < t.sigmas * error):
        return True
    # the mean of the targets is found in a few steps, and nothing after it
    count = len(means)
    early, late = losses.part(max(2, count // 4), count // 2), losses.part(-(count // 3))
    level = late.mean()
    later = early.mean() - level
    noise = math.hypot(standard_error(early), standard_error(late))
    near = any(abs(level - math.log(k)) < t.near_chance * math.log(k) for k in _CHANCES)
    settled = later < max(2.0 * noise, 0.002 * scale, 0.2 * fall if near else 0.0)
    small = fall < (t.chance if near else t.settled) * scale
    return settled and small and noise < 2.0 * t.nothing * scale


def _is_converged(losses: Losses, t: NotLearning) -> bool:
    """Whether the loss was next to nothing at once: small, and noisy as only small losses are."""
    level, spread = median(losses.means), median(losses.stds)
    return 0 <= level < t.converged and (level < 0.1 * t.converged or spread > 0.4 * level)


@rule(
    "slow_convergence",
    family="losses",
    needs=("loss", "metrics", "grad", "update"),
    thresholds=SlowConvergence,
    reference="Smith 2017, Cyclical learning rates for training neural networks: a rate that is "
    "too small makes the loss fall slowly and evenly.",
)
def slow_convergence(
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    grad: "pl.DataFrame",
    update: "pl.DataFrame",
    thresholds: SlowConvergence,
) -> list[Finding]:
    """The loss falls little, and as fast at the end as at the start: it is far from its floor."""
    t = thresholds
    losses = _from_start(loss, metrics, t.latest_start)
    if losses is None or len(losses.means) < t.min_windows or min(losses.means) <= 0:
        return []
    if losses.steps[-1] - losses.firsts[0] + 1 < t.min_steps or has_several_optimizers(grad):
        return []
    count = len(losses.means)
    thirds = [losses.part(i * count // 3, (i + 1) * count // 3) for i in range(3)]
    a, b, c = (one.mean() for one in thirds)
    error = math.hypot(standard_error(thirds[1]), standard_error(thirds[2]))
    # the ends lie half a third beyond the middles of the outer thirds
    share = 1.5 * (a - c) / a
    if not t.least <= share <= t.most or b - c < max(t.steady * (a - b), t.sigmas * error):
        return []
    ratio = _update_ratio(update)
    tiny = ratio is not None and ratio < t.tiny_update
    moves = f" A step moves the weights by {ratio:.1e} of their size." if ratio is not None else ""
    return [
        Finding(
            rule="slow_convergence",
            severity="warning" if tiny else "info",
            first_step=losses.firsts[0],
            last_step=losses.steps[-1],
            observed=share,
            threshold=t.most,
            unit="fall of the loss over the run, as a share of the first",
            evidence=Evidence(losses.file, evidence_steps(losses.steps)),
            message=(
                f"The loss falls slowly and evenly, by {share:.1%} in {losses.steps[-1] + 1} "
                "steps, and as fast at the end as before: the run is far from where it could get."
                f"{moves}"
            ),
            suggestion=(
                "Raise the learning rate three times, and again if the loss still falls evenly; or "
                "look for the rate with LRCache. If the rate is right for the task, train longer."
            ),
            confidence=0.8 if tiny else 0.5,
        )
    ]


def _update_ratio(update: "pl.DataFrame") -> float | None:
    """Median of how far a step moves all weights, over their size."""
    if "ratio" not in update.columns or "component" not in update.columns:
        return None
    whole = update.filter(update["component"].is_null())["ratio"].drop_nulls()
    found = whole.median() if whole.dtype.is_numeric() else None
    return float(found) if isinstance(found, (int, float)) else None
