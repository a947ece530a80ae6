"""A validation loss that rises while the training loss goes on falling."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_series import (
    METRICS_FILE,
    Losses,
    training_losses,
    validation_losses,
    window_noise,
)
from lightning_diag.rules.registry import rule
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Overfitting", "overfitting"]


@dataclass(frozen=True)
class Overfitting:
    """Thresholds of `overfitting`."""

    min_rise: float = field(default=0.25, metadata={"unit": "share of the lowest validation loss"})
    min_validations: float = field(default=3, metadata={"unit": "validations after the lowest"})
    sigmas: float = field(default=4.0, metadata={"unit": "standard deviations of a validation"})
    noted_rise: float = field(default=0.05, metadata={"unit": "share of the lowest"})
    training_rise: float = field(default=0.05, metadata={"unit": "share of the training loss"})


@rule(
    "overfitting",
    family="losses",
    needs=("loss", "metrics"),
    thresholds=Overfitting,
    reference="Prechelt 1998, Early stopping - but when?: the generalization loss, over several "
    "validations.",
)
def overfitting(
    loss: "pl.DataFrame", metrics: "pl.DataFrame", thresholds: Overfitting
) -> list[Finding]:
    """The validation loss rose from its lowest value, and not the training loss.

    A gap between the two that stays the same is no evidence: nearly every model has one.
    """
    t = thresholds
    validation = validation_losses(metrics)
    series = training_losses(loss, metrics)
    if validation is None or len(validation[1]) <= t.min_validations:
        return []
    steps, values, name = validation
    lowest = min(range(len(values)), key=values.__getitem__)
    after = values[lowest + 1 :]
    if len(after) < t.min_validations:
        return []
    best = values[lowest]
    recent = sorted(after[-int(t.min_validations) :])
    level = recent[len(recent) // 2]
    rise = level - best
    noise = window_noise(values)
    if rise <= max(t.noted_rise * abs(best), t.sigmas * noise) or recent[0] <= best:
        return []
    fell = _training_fell(series, steps[lowest], t)
    if fell is None or not fell:
        return []
    severity: Severity = "warning" if rise > t.min_rise * abs(best) else "info"
    return [_finding(steps, values, lowest, level, name, severity, t)]


def _training_fell(series: Losses | None, step: int, t: Overfitting) -> bool | None:
    """Whether the training loss did not rise since a step; None where that is not known."""
    losses = series.finite() if series else None
    if losses is None:
        return None
    split = sum(one <= step for one in losses.steps)
    before, after = losses.part(max(0, split - 5), split), losses.part(split)
    if not before.means or not after.means:
        return None
    last = after.part(-max(3, len(after.means) // 3))
    limit = before.mean() + t.training_rise * abs(before.mean())
    return last.mean() < limit


def _finding(
    steps: list[int],
    values: list[float],
    lowest: int,
    level: float,
    name: str,
    severity: Severity,
    t: Overfitting,
) -> Finding:
    best, step = values[lowest], steps[lowest]
    share = (level - best) / abs(best) if best else float("inf")
    return Finding(
        rule="overfitting",
        severity=severity,
        first_step=step,
        last_step=steps[-1],
        observed=level,
        threshold=best + t.min_rise * abs(best),
        unit="validation loss",
        evidence=Evidence(METRICS_FILE, evidence_steps(steps[lowest:])),
        message=(
            f"`{name}` was lowest at step {step} ({best:.3g}) and has risen by {share:.0%} since, "
            f"to {level:.3g}, while the training loss did not rise: the model learns its training "
            "data by heart."
        ),
        suggestion=(
            f"Keep the checkpoint near step {step} and stop there (EarlyStopping on `{name}`). For "
            "a better model get more data or augment them, then raise weight decay or dropout, or "
            "take a smaller model."
        ),
        confidence=0.9 if severity == "warning" else 0.5,
    )
