"""A learning rate with which the run would need many times the steps it has."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.finding import Evidence, Finding
from lightning_diag.rules.loss_series import Losses, training_losses
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import raise_rate
from lightning_diag.rules.traces import evidence_steps, whole_traces
from lightning_diag.rules.update_traces import (
    UPDATE_FILE,
    Updates,
    learning_rates,
    middle,
    update_traces,
    weighty,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = ["LearningRateTooLow", "learning_rate_too_low"]


@dataclass(frozen=True)
class LearningRateTooLow:
    """Thresholds of `learning_rate_too_low`."""

    max_ratio: float = field(default=3e-4, metadata={"unit": "update over weight"})
    max_travel: float = field(default=0.05, metadata={"unit": "sum of updates over weight"})
    max_fall: float = field(default=0.1, metadata={"unit": "share of the loss"})
    steady_rate: float = field(default=0.3, metadata={"unit": "share of the highest rate"})
    min_rows: float = field(default=3, metadata={"unit": "rows"})
    min_steps: float = field(default=80, metadata={"unit": "steps"})
    min_count: float = field(default=50, metadata={"unit": "elements"})
    ever_ratio: float = field(default=1e-3, metadata={"unit": "update over weight"})
    wild_jump: float = field(default=10.0, metadata={"unit": "times the loss at the start"})
    min_clip: float = field(default=0.1, metadata={"unit": "median clip coefficient"})
    min_gradient: float = field(default=1e-3, metadata={"unit": "l2 norm"})


@rule(
    "learning_rate_too_low",
    family="updates",
    needs=("update", "loss", "metrics", "grad"),
    thresholds=LearningRateTooLow,
    explains=(
        *("update_too_small", "slow_convergence", "not_learning", "loss_plateau"),
        *("constant_prediction", "frozen_weights", "attention_uniform"),
    ),
    reference="About 1e-3 is the usual ratio of update to weight: Karpathy, A recipe for training "
    "neural networks, and CS231n. Range test: Smith 2017, Cyclical learning rates.",
    remedy=raise_rate,
)
def learning_rate_too_low(
    update: "pl.DataFrame",
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    grad: "pl.DataFrame",
    thresholds: LearningRateTooLow,
) -> list[Finding]:
    """All updates so far add up to next to nothing, and the loss is about where it was.

    Only a rate that is neither warming up nor at the end of its decay is judged, and only where a
    gradient arrives.
    """
    t = thresholds
    traces = weighty(update_traces(update), t.min_count)
    losses, rates = training_losses(loss, metrics), learning_rates(loss, metrics, update)
    if not traces or losses is None or rates is None or len(losses.means) < 4:
        return []
    top = max(rates.highs)
    # the end of a decay, unless all that came before it is in sight as well
    whole = losses.firsts[0] == 0
    steady = min(rates.lows[-1], rates.lows[len(rates.lows) // 2]) > t.steady_rate * top
    if not top > 0 or not (steady or whole):
        return []
    # a warm-up that is not over yet
    if rates.highs[-1] > 1.02 * rates.highs[len(rates.highs) // 2]:
        return []
    moved = [(one, ratio) for one in traces if not math.isnan(ratio := middle(one.ratios))]
    if not moved or max(len(one.steps) for one, _ in moved) < t.min_rows:
        return []
    fastest, ratio = max(moved, key=lambda pair: pair[1])
    typical = middle(one for _, one in moved)
    length = losses.steps[-1] - losses.firsts[0] + 1
    travel, fall = ratio * length, _fall(losses)
    norms = middle(losses.norms)
    if norms < t.min_gradient or length < t.min_steps:
        return []
    # a part that gets no gradient, or one that clipping leaves nothing of, is another matter
    if any(ratio == 0.0 for _, ratio in moved) or _clipped(grad) < t.min_clip:
        return []
    # what moved fast at first and stands still now is dead, and a jump is no lack of speed
    known = [r for one, _ in moved for r in one.ratios if not math.isnan(r)]
    if max(known) > t.ever_ratio or any(math.isnan(one) for one in losses.means):
        return []
    if max(losses.highs) > t.wild_jump * losses.means[0]:
        return []
    if ratio > t.max_ratio or travel > t.max_travel or fall > t.max_fall:
        return []
    return [_finding(fastest, losses, (typical, travel, fall, top), t)]


def _clipped(grad: "pl.DataFrame") -> float:
    """What clipping leaves of the gradient at the median; 1 where there is none."""
    left = [middle(one.numbers("clip_coefficient")) for one in whole_traces(grad)]
    return min((one for one in left if not math.isnan(one)), default=1.0)


def _fall(losses: Losses) -> float:
    """Share of the loss at the start that has been lost by now."""
    known = [one for one in losses.means if not math.isnan(one)]
    if len(known) < 4 or not known[0] > 0:
        return 1.0
    quarter = max(1, len(known) // 4)
    return 1.0 - middle(known[-quarter:]) / middle(known[: min(3, quarter)])


def _finding(
    fastest: Updates,
    losses: Losses,
    numbers: tuple[float, float, float, float],
    t: "LearningRateTooLow",
) -> Finding:
    typical, travel, fall, top = numbers
    first, last = losses.firsts[0], losses.steps[-1]
    return Finding(
        rule="learning_rate_too_low",
        severity="warning",
        first_step=first,
        last_step=last,
        observed=typical,
        threshold=t.max_ratio,
        unit="update over weight",
        evidence=Evidence(UPDATE_FILE, evidence_steps(fastest.steps)),
        message=(
            f"With a learning rate of {top:.3g} a step changes the weights by {typical:.2g} of "
            f"their size (about 0.001 is usual). Even in one direction, the {last - first + 1} "
            f"steps so far could move no part by more than {travel:.2g} of its size, and the loss "
            f"has fallen by {max(0.0, fall):.1%}."
        ),
        suggestion=(
            "Raise the learning rate tenfold, and again while the loss falls faster each time; or "
            "let a range test choose it (`LRCache`). If it was meant to be higher, look for a "
            "schedule that multiplies it away."
        ),
        confidence=0.8,
    )
