"""A loss that is NaN or infinite."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_diag.rules.consequences import STANDSTILL
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.first_nonfinite import advice, first_nonfinite, sentence
from lightning_diag.rules.loss_series import LOSS_FILE, METRICS_FILE, is_training_loss
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import leave_half_precision
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["NonfiniteLoss", "nonfinite_loss"]

_COLLAPSE_FILE = "records/collapse.jsonl"
_ENDING = "_nonfinite"


@dataclass(frozen=True)
class NonfiniteLoss:
    """Thresholds of `nonfinite_loss`."""

    lasting_steps: float = field(default=5, metadata={"unit": "steps"})
    skipped_steps: float = field(default=20, metadata={"unit": "skipped steps"})


class _Break(NamedTuple):
    first: int
    last: int
    steps: int  # with a loss that is not finite
    skipped: int  # by the gradient scaler
    gradient: int  # taken with a gradient that is not finite


class _Seen(NamedTuple):
    breaks: list[_Break]
    last_finite: int
    file: str


@rule(
    "nonfinite_loss",
    family="losses",
    needs=("loss", "metrics", "collapse", "nonfinite"),
    thresholds=NonfiniteLoss,
    explains=(
        "nonfinite_gradient",
        "dead_component",
        "vanishing_gradient",
        "divergence",
        "loss_spike",
        "frozen_weights",
        "update_too_large",
        *STANDSTILL,
    ),
    reference="Micikevicius et al. 2018, Mixed precision training, section 3.2.",
    remedy=leave_half_precision,
)
def nonfinite_loss(
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    collapse: "pl.DataFrame",
    nonfinite: "pl.DataFrame",
    thresholds: NonfiniteLoss,
) -> list[Finding]:
    """Steps whose loss is NaN or infinite, from the first on.

    A step that the gradient scaler skipped, and a single loss that was finite again afterwards,
    have harmed little.
    """
    for seen in (_in_windows(loss), _in_collapse(collapse), _in_metrics(metrics)):
        if seen is not None and seen.breaks:
            row = first_nonfinite(nonfinite, seen.breaks[-1].last)
            return [_finding(seen, thresholds, row)]
    return []


def _in_windows(loss: "pl.DataFrame") -> _Seen | None:
    if "nonfinite" not in loss.columns:
        return None
    breaks, last_finite = [], -1
    for row in loss.sort("step", maintain_order=True).to_dicts():
        if row.get("loss") is not None:
            last_finite = int(row["step"])
        if not row.get("nonfinite"):
            continue
        first = row.get("first_nonfinite")
        first = int(row["step"] if first is None else first)
        counts = (int(row.get(key) or 0) for key in ("nonfinite", "skipped", "gradient_nonfinite"))
        steps, skipped, gradient = counts
        breaks.append(_Break(first, int(row["step"]), steps, skipped, gradient - skipped))
    return _Seen(breaks, last_finite, LOSS_FILE)


def _in_collapse(collapse: "pl.DataFrame") -> _Seen | None:
    if "kinds" not in collapse.columns:
        return None
    breaks, last_finite = [], -1
    for row in collapse.sort("step", maintain_order=True).to_dicts():
        step = int(row["step"])
        if "nonfinite_loss" in (row["kinds"] or ""):
            skipped = int(row.get("skipped") or 0)
            breaks.append(_Break(step, step, 1, skipped, 1 - skipped))
        elif row.get("loss") is not None:
            last_finite = step
    return _Seen(breaks, last_finite, _COLLAPSE_FILE)


def _in_metrics(metrics: "pl.DataFrame") -> _Seen | None:
    import polars as pl

    names = [name.removesuffix(_ENDING) for name in metrics.columns if name.endswith(_ENDING)]
    names = [name for name in names if is_training_loss(name)]
    if not names or "step" not in metrics.columns:
        return None
    bad = metrics.filter(pl.any_horizontal(pl.col(name + _ENDING) > 0 for name in names))
    breaks = [_Break(int(step), int(step), 1, 0, 0) for step in bad["step"].drop_nulls().sort()]
    kept = [pl.col(name).is_not_null() for name in names if name in metrics.columns]
    good = metrics.filter(pl.all_horizontal(kept)) if kept else metrics.clear()
    last = good["step"].drop_nulls().max()
    return _Seen(breaks, int(last) if isinstance(last, int) else -1, METRICS_FILE)


def _finding(seen: _Seen, t: NonfiniteLoss, row: dict[str, Any]) -> Finding:
    breaks = seen.breaks
    first, last = breaks[0].first, breaks[-1].last
    total = sum(one.steps for one in breaks)
    skipped = all(one.skipped >= one.steps for one in breaks)
    recovered = seen.last_finite > last
    word = "step" if total == 1 else "steps"
    before = breaks[0].gradient > breaks[0].steps and not row
    if skipped:
        after = " The gradient scaler skipped them, so the weights are unharmed."
    elif recovered:
        after = " It was finite again afterwards."
    else:
        after = " It has not been finite since: the weights are most likely lost."
    earlier = (
        " The gradient broke before the loss did, so look for the reason in the backward pass."
        if before
        else ""
    )
    return Finding(
        rule="nonfinite_loss",
        severity=_severity(total, skipped, recovered, t),
        first_step=first,
        last_step=last,
        observed=float(total),
        threshold=1.0,
        unit="steps with a loss that is NaN or infinite",
        evidence=Evidence(seen.file, evidence_steps(one.last for one in breaks)),
        message=f"At step {first} the loss was NaN or infinite; {total} {word} had this.{after}"
        f"{earlier}{sentence(row)}",
        suggestion=advice(row) + _suggestion(skipped),
        confidence=1.0,
    )


def _severity(total: int, skipped: bool, recovered: bool, t: NonfiniteLoss) -> Severity:
    if skipped:
        return "critical" if total >= t.skipped_steps and not recovered else "info"
    return "warning" if recovered and total < t.lasting_steps else "critical"


def _suggestion(skipped: bool) -> str:
    if skipped:
        return (
            "Usually nothing to do: the scaler lowers its scale until the numbers fit. If it goes "
            "on, use bf16-mixed in place of 16-mixed."
        )
    return (
        "First look at the batch of that step: NaN in the data, an empty batch or mask, the "
        "logarithm or square root of zero, a division by zero. If the loss grew before it broke, "
        "lower the learning rate (0.3 times), warm it up, and clip the gradient norm at 1; with "
        "16-bit floats use bf16-mixed. Go on from a checkpoint before that step, since NaN weights "
        "do not heal."
    )
