"""A loss that leaps far above what it was."""

import math
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, NamedTuple

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_series import Losses, has_several_optimizers, training_losses
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import calm_steps
from lightning_diag.rules.traces import evidence_steps, outliers

if TYPE_CHECKING:
    import polars as pl

__all__ = ["LossSpike", "loss_spike"]

_RECENT = 5


@dataclass(frozen=True)
class LossSpike:
    """Thresholds of `loss_spike`."""

    factor: float = field(default=10.0, metadata={"unit": "times the mean of the windows before"})
    sigmas: float = field(default=6.0, metadata={"unit": "robust standard deviations"})
    history_windows: float = field(default=4, metadata={"unit": "windows"})
    large: float = field(default=0.5, metadata={"unit": "share of the progress"})
    beyond_start: float = field(default=5.0, metadata={"unit": "times the first losses"})
    many: float = field(default=3, metadata={"unit": "spikes"})
    back: float = field(default=2.0, metadata={"unit": "times the loss before the spike"})
    back_windows: float = field(default=3, metadata={"unit": "windows"})


class _Spike(NamedTuple):
    at: int
    usual: float
    large: bool  # against the progress of the run
    beyond: bool  # far above any loss at the start
    lasting: bool  # it did not come back


@rule(
    "loss_spike",
    family="losses",
    needs=("loss", "metrics", "grad"),
    thresholds=LossSpike,
    explains=("nonfinite_loss", "nonfinite_gradient"),
    reference="Ten times the mean of the window: the reference systems and Megatron-LM; 6 standard "
    "deviations of the own past: OLMo-core's SkipStepOptimizer.",
    remedy=calm_steps,
)
def loss_spike(
    loss: "pl.DataFrame", metrics: "pl.DataFrame", grad: "pl.DataFrame", thresholds: LossSpike
) -> list[Finding]:
    """Single losses far above the windows before and far out of their own past.

    A lone spike from which the loss comes back is a note, unless it towers over the first losses of
    the run, as only a batch with something wrong in it does. So is a spike of a loss that had
    become tiny, if it remains far below where the run began.
    """
    series = training_losses(loss, metrics)
    losses = series.finite() if series else None
    if losses is None or len(losses.means) <= thresholds.history_windows:
        return []
    spikes = _spikes(losses, thresholds)
    if not spikes:
        return []
    large = [one for one in spikes if one.large]
    lasting = [one for one in large if one.lasting]
    beyond = any(one.beyond for one in spikes)
    grave = bool(lasting) or beyond or len(large) >= thresholds.many
    severity: Severity = "warning" if grave and not has_several_optimizers(grad) else "info"
    return [_finding(losses, lasting or large or spikes, severity, thresholds)]


def _spikes(losses: Losses, t: LossSpike) -> list[_Spike]:
    if min(losses.lows) <= 0:
        # where a loss may be negative, "times" means nothing: its spread is what counts
        return _spikes_of(losses, t, signed=True)
    return _spikes_of(losses, t, signed=False)


def _usual(means: list[float], at: int) -> float:
    """The loss before a window: what is recent, but not what is low by chance."""
    if at == 0:
        return means[0]
    return max(
        fmean(means[max(0, at - _RECENT) : at]), median(means[max(0, at - 2 * _RECENT) : at])
    )


def _spikes_of(losses: Losses, t: LossSpike, *, signed: bool) -> list[_Spike]:
    history = int(t.history_windows)
    spread = median([high - low for high, low in zip(losses.highs, losses.lows, strict=True)])
    floor = spread / 2 if signed else math.log(3.0) / t.sigmas
    if floor <= 0 or not (signed or _has_any(losses, t.factor)):
        return []
    before = [_usual(losses.means, at) for at in range(len(losses.means))]
    pairs = zip(losses.highs, before, strict=True)
    # that the loss has fallen since says nothing about how far it leaps
    values = [max(0.0, high - low if signed else math.log(high / low)) for high, low in pairs]
    heights = outliers(values, sigmas=t.sigmas, window=64, history=history, floor=floor)
    begin = median(losses.highs[:3])
    found: list[_Spike] = []
    for at, height in enumerate(heights):
        if height <= 1.0 or (found and at == found[-1].at + 1):
            continue
        usual, high = before[at], losses.highs[at]
        if not signed and high < t.factor * usual:
            continue
        large = high - usual >= t.large * max(0.0, begin - usual)
        beyond = not signed and high >= t.beyond_start * max(losses.highs[:3])
        found.append(_Spike(at, usual, large, beyond, _is_lasting(losses, at, usual, t, signed)))
    return found


def _has_any(losses: Losses, factor: float) -> bool:
    """Whether any loss towers over a window before, which costs less to tell than the rest."""
    low = losses.means[0]
    for mean, high in zip(losses.means, losses.highs, strict=True):
        if high >= factor * low:
            return True
        low = min(low, mean)
    return False


def _is_lasting(losses: Losses, at: int, usual: float, t: LossSpike, signed: bool) -> bool:
    after = losses.means[at + 1 : at + 1 + int(t.back_windows)]
    limit = usual + 0.1 * (losses.highs[at] - usual) if signed else t.back * usual
    # a loss that got a new part leaps as well, and is then learned down again
    learned = fmean(losses.means[-3:]) < usual + 0.25 * (losses.means[at] - usual)
    return len(after) >= t.back_windows - 1 and min(after) > limit and not learned


def _finding(losses: Losses, spikes: list[_Spike], severity: Severity, t: LossSpike) -> Finding:
    worst = max(spikes, key=lambda one: losses.highs[one.at] - one.usual)
    steps = [losses.steps[one.at] for one in spikes]
    first = losses.firsts[spikes[0].at]
    lasting = any(one.lasting for one in spikes)
    number = "once," if len(spikes) == 1 else f"{len(spikes)} times, first"
    after = (
        " It has not come back to where it was."
        if lasting
        else " It came back each time."
        if len(spikes) > 1
        else " It came back soon."
    )
    return Finding(
        rule="loss_spike",
        severity=severity,
        first_step=first,
        last_step=steps[-1],
        observed=losses.highs[worst.at],
        threshold=t.factor * worst.usual if worst.usual > 0 else worst.usual,
        unit="loss",
        evidence=Evidence(losses.file, evidence_steps(steps)),
        message=(
            f"The loss leapt up {number} between the steps {first} and {steps[0]}; at worst "
            f"to {losses.highs[worst.at]:.3g}, where {worst.usual:.3g} was usual.{after}"
        ),
        suggestion=(
            "Look at the batch of that step first: a corrupt sample, an outlier or a wrong label "
            "does this. If the batch is fine, clip the gradient norm at 1, then lower the learning "
            "rate to 0.3 times; with Adam, beta2 of 0.95 in place of 0.999 also calms spikes."
            if severity != "info"
            else "Nothing to do if it stays a lone spike. If it comes again, look at the batch of "
            "that step, and clip the gradient norm at 1."
        ),
        confidence=0.9 if severity == "warning" else 0.6,
    )
