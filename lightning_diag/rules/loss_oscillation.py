"""A loss that swings up and down and does not get on."""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_series import (
    Losses,
    by_fives,
    first_loss,
    has_several_optimizers,
    starting_level,
    training_losses,
)
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import calm_steps
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["LossOscillation", "loss_oscillation"]


@dataclass(frozen=True)
class LossOscillation:
    """Thresholds of `loss_oscillation`."""

    calm_ratio: float = field(default=4.0, metadata={"unit": "times the spread of the calm phase"})
    progress_share: float = field(default=0.25, metadata={"unit": "share of the progress"})
    min_spread: float = field(default=0.3, metadata={"unit": "share of the loss"})
    recent_windows: float = field(default=5, metadata={"unit": "windows"})
    min_windows: float = field(default=3, metadata={"unit": "windows of the recent ones"})
    noted_share: float = field(default=0.3, metadata={"unit": "share of windows"})
    norm_ratio: float = field(default=5.0, metadata={"unit": "times the first gradient norm"})


class _Swings(NamedTuple):
    flags: list[bool]
    calm: float  # spread in the calm phase
    wild: float  # spread where it swings


@rule(
    "loss_oscillation",
    family="losses",
    needs=("loss", "metrics", "grad", "collapse"),
    thresholds=LossOscillation,
    reference="Cohen et al. 2021, Gradient descent on neural networks typically occurs at the edge "
    "of stability; LeCun et al. 1998, Efficient BackProp, section 5.",
    remedy=calm_steps,
)
def loss_oscillation(
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    grad: "pl.DataFrame",
    collapse: "pl.DataFrame",
    thresholds: LossOscillation,
) -> list[Finding]:
    """Swings that are far larger than in the calm phase before, at a loss that is worse than there.

    The noise of small batches is there from the first step on and shrinks with the loss, so it is
    not taken for this.
    """
    series = training_losses(loss, metrics)
    losses = by_fives(series.finite()) if series else None
    if losses is None or len(losses.means) < thresholds.recent_windows:
        return []
    first = starting_level(losses, first_loss(collapse))
    swings = _swings(losses, first, thresholds)
    window, least = int(thresholds.recent_windows), thresholds.min_windows
    total = sum(swings.flags)
    # it may have come to rest, but without having learned
    in_vain = losses.mean(-window) >= 0.7 * first > 0 and total >= 0.1 * len(losses.means)
    now = sum(swings.flags[-window:]) >= least
    dense = any(sum(swings.flags[at : at + window]) >= least for at in range(len(losses.means)))
    if not dense or not (now or in_vain or total >= thresholds.noted_share * len(losses.means)):
        return []
    severity: Severity = "warning"
    if not (now or in_vain) or has_several_optimizers(grad):
        severity = "info"
    return [_finding(losses, swings, severity, now)]


def _swings(losses: Losses, first: float, t: LossOscillation) -> _Swings:
    """Which windows swing, each compared with the calmest good phase before it."""
    leapt = first < losses.means[0]
    flags = [leapt]
    best, calm = first, 0.3 * abs(first) / t.calm_ratio if leapt else losses.stds[0]
    norm = next((one for one in losses.norms[:1] if one > 0), math.nan)
    past = deque([calm], maxlen=20)
    for at in range(1, len(losses.means)):
        mean, spread = losses.means[at], losses.stds[at]
        calm = median(past)
        wilder = spread > t.calm_ratio * max(calm, 0.02 * abs(best))
        # as wild as at the first step, but on gradients that have grown: it bounces since then
        bounces = mean >= 0.8 * first and losses.norms[at] > t.norm_ratio * norm
        matters = spread >= max(t.progress_share * (first - best), t.min_spread * abs(mean))
        count = losses.counts[at]
        lone = losses.highs[at] - mean > 0.87 * spread * (count - 1) / math.sqrt(count)
        flags.append(matters and not lone and mean > best + calm and (wilder or bounces))
        if not flags[-1]:
            best = min(best, mean)
            past.append(spread)
    wild = [spread for spread, flag in zip(losses.stds, flags, strict=True) if flag]
    return _Swings(flags, calm, median(wild) if wild else 0.0)


def _finding(losses: Losses, swings: _Swings, severity: Severity, now: bool) -> Finding:
    marked = [index for index, flag in enumerate(swings.flags) if flag]
    steps = [losses.steps[index] for index in marked]
    low = min(losses.lows[index] for index in marked)
    high = max(losses.highs[index] for index in marked)
    until = "It goes on." if now else f"It has been calm again since step {steps[-1]}."
    return Finding(
        rule="loss_oscillation",
        severity=severity,
        first_step=losses.firsts[marked[0]],
        last_step=steps[-1],
        observed=swings.wild,
        threshold=swings.calm,
        unit="standard deviation of the loss within a window",
        evidence=Evidence(losses.file, evidence_steps(steps)),
        message=(
            f"Since step {losses.firsts[marked[0]]} the loss swings between {low:.3g} and "
            f"{high:.3g} and does not fall below its best; its spread is {swings.wild:.3g}, where "
            f"{swings.calm:.3g} was usual. {until}"
        ),
        suggestion=(
            "Lower the learning rate to 0.3 times first. If it still swings, use a larger batch or "
            "accumulate gradients, lower the momentum, and see that the training data are shuffled."
        ),
        confidence=0.8,
    )
