"""A loss that has risen for good."""

import math
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
    window_noise,
)
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import calm_steps
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Divergence", "divergence"]


@dataclass(frozen=True)
class Divergence:
    """Thresholds of `divergence`."""

    given_back: float = field(default=0.5, metadata={"unit": "share of the progress"})
    above_start: float = field(default=0.1, metadata={"unit": "share of the first loss"})
    above_best: float = field(default=0.05, metadata={"unit": "share of the best loss"})
    sigmas: float = field(default=6.0, metadata={"unit": "standard deviations of a window's mean"})
    far: float = field(default=5.0, metadata={"unit": "times the first and the best loss"})
    far_windows: float = field(default=2, metadata={"unit": "windows"})
    unbounded: float = field(default=1000.0, metadata={"unit": "times the first loss, below zero"})
    unbounded_norm: float = field(default=100.0, metadata={"unit": "times the first gradient norm"})
    min_windows: float = field(default=3, metadata={"unit": "windows"})
    given_back_windows: float = field(default=4, metadata={"unit": "windows"})


class _Rise(NamedTuple):
    start: int  # the first window that is risen
    best: float
    first: float  # the loss at the beginning
    limit: float
    level: float  # over the windows that are risen
    severity: Severity


@rule(
    "divergence",
    family="losses",
    needs=("loss", "metrics", "grad", "collapse"),
    thresholds=Divergence,
    explains=(
        "exploding_gradient",
        "loss_oscillation",
        "loss_spike",
        "loss_plateau",
        "nonfinite_loss",
        "nonfinite_gradient",
    ),
    reference="Wortsman et al. 2023, Small-scale proxies for large-scale Transformer training "
    "instabilities; llm-foundry's KillLossSpike.",
    remedy=calm_steps,
)
def divergence(
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    grad: "pl.DataFrame",
    collapse: "pl.DataFrame",
    thresholds: Divergence,
) -> list[Finding]:
    """The loss rose far above its best, by more than its noise, and stayed there up to the end.

    Where several optimizers work against each other a rising loss is part of the game, and only
    noted; so is one that falls below zero as well, as those of policies do, unless the gradients
    grow with it.
    """
    series = training_losses(loss, metrics)
    losses = by_fives(series.finite()) if series else None
    rise = _rise(losses, first_loss(collapse), thresholds) if losses and losses.means else None
    if losses is not None and rise is None:
        return _without_bound(losses, thresholds)
    if losses is None or rise is None:
        return []
    harmless = has_several_optimizers(grad) or (min(losses.lows) < 0 and _fades(losses, rise))
    severity: Severity = "info" if harmless else rise.severity
    return [_finding(losses, rise, severity)]


def _without_bound(losses: Losses, t: Divergence) -> list[Finding]:
    """A loss that falls for ever, under gradients that grow: nothing holds it."""
    norms = [norm for norm in losses.norms if math.isfinite(norm)]
    if len(losses.means) < 8 or len(norms) < 8:
        return []
    quarter = len(norms) // 4
    first, last = abs(losses.means[0]), median(losses.means[-quarter:])
    before, after = median(norms[:2]), median(norms[-quarter:])
    if last > -t.unbounded * max(first, 1.0) or after < t.unbounded_norm * before:
        return []
    at = next(i for i, mean in enumerate(losses.means) if mean < -t.far * max(first, 1.0))
    return [
        Finding(
            rule="divergence",
            severity="warning",
            first_step=losses.firsts[at],
            last_step=losses.steps[-1],
            observed=last,
            threshold=-t.unbounded * max(first, 1.0),
            unit="mean loss",
            evidence=Evidence(losses.file, evidence_steps(losses.steps[at:])),
            message=(
                f"The loss falls without a bound: from {losses.means[0]:.3g} to {last:.3g}, while "
                f"the gradient norm grew from {before:.3g} to {after:.3g}. Nothing is learned by "
                "that; the outputs grow."
            ),
            suggestion=(
                "Give the loss a lower end: a margin, a clamp, a normalization of what it "
                "compares, or its right sign."
            ),
            confidence=0.7,
        )
    ]


def _fades(losses: Losses, rise: _Rise) -> bool:
    """Whether the gradients do not grow where the loss rises."""
    before = [norm for norm in losses.norms[: rise.start] if math.isfinite(norm)]
    after = [norm for norm in losses.norms[rise.start :] if math.isfinite(norm)]
    return not before or not after or median(after) < 1.5 * median(before)


def _rise(losses: Losses, known: float | None, t: Divergence) -> _Rise | None:
    means = losses.means
    count = len(means)
    if count < max(t.far_windows, 8 if max(losses.counts) == 1 else 0):
        return None
    first = starting_level(losses, known)
    smooth = [first, *(median(means[max(0, i - 1) : i + 2]) for i in range(1, count - 1))]
    best_at = min(range(len(smooth)), key=smooth.__getitem__)
    best = smooth[best_at]
    noise = _noise(losses, best_at, first)
    margin = max(t.sigmas * noise, t.above_best * abs(best))
    above_start = first + max(t.sigmas * noise, t.above_start * abs(first))
    given_back = best + max(margin, t.given_back * (first - best))
    partly = best + max(margin, 0.6 * t.given_back * (first - best))
    far = t.far * max(abs(first), abs(best)) + max(first, 0.0)
    tests: tuple[tuple[float, float, Severity], ...] = (
        (far, t.far_windows, "critical"),
        (above_start, t.min_windows, "critical"),
        (given_back, t.given_back_windows, "warning"),
        (partly, 2 * t.given_back_windows, "warning"),
    )
    for limit, windows, severity in tests:
        start = count
        while start > 1 and means[start - 1] > limit:
            start -= 1
        if count - start < windows - (limit == far and start == 1):
            continue
        onset = start
        while onset > max(best_at, 1) and means[onset - 1] > best + 0.5 * margin:
            onset -= 1
        leapt = onset == 1 and first < means[0]
        return _Rise(0 if leapt else onset, best, first, limit, losses.mean(start), severity)
    return None


def _noise(losses: Losses, best_at: int, first: float) -> float:
    """Standard deviation of the mean of a window, in the windows up to the best one."""
    calm = losses.part(0, max(best_at + 1, 1))
    pairs = zip(calm.stds, calm.counts, strict=True)
    within = median([std / math.sqrt(count) for std, count in pairs])
    if calm.means[0] > first and len(calm.means) == 1:
        return 0.0  # it leapt up within the first window, whose spread is the leap
    between = window_noise(losses.part(0, max(best_at + 2, 5)).means) if best_at >= 3 else 0.0
    return max(within, between)


def _finding(losses: Losses, rise: _Rise, severity: Severity) -> Finding:
    step = losses.firsts[rise.start]
    above = rise.level > rise.first
    standing = (
        "higher than at the beginning"
        if above
        else "so that much of what was learned is lost again"
    )
    rates = [rate for rate in losses.rates[rise.start :] if math.isfinite(rate)]
    rate = f" (it is {rates[-1]:.3g} now)" if rates else ""
    return Finding(
        rule="divergence",
        severity=severity,
        first_step=step,
        last_step=losses.steps[-1],
        observed=rise.level,
        threshold=rise.limit,
        unit="mean loss",
        evidence=Evidence(losses.file, evidence_steps(losses.steps[rise.start :])),
        message=(
            f"Since about step {step} the loss has risen and stayed up: {rise.level:.3g} on "
            f"average, {standing} ({rise.first:.3g} at first, {rise.best:.3g} at best)."
        ),
        suggestion=(
            f"Lower the learning rate first, to 0.3 times{rate}, and go on from a checkpoint "
            f"before step {step}. Then warm it up over the first few hundred steps, and clip the "
            "gradient norm at 1. If a schedule, a new phase or new data began there, look at that "
            "first."
        ),
        confidence=0.95 if severity == "critical" else 0.8,
    )
