"""Hidden units that sit at the flat ends of tanh or sigmoid."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_diag.rules.consequences import STANDSTILL
from lightning_diag.rules.dead_relu import ACTIVATION_FILE
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_progress import Progress, loss_progress
from lightning_diag.rules.module_rows import lasting_since, number, rows_by
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import revive_units
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["SaturatedActivation", "saturated_activation"]

_COLUMNS = (
    *("part", "function", "count", "units", "saturated_share", "saturated_units"),
    *("last", "gate", "last_of_part"),
)
_SIGMOIDS = ("sigmoid", "hardsigmoid")


@dataclass(frozen=True)
class SaturatedActivation:
    """Thresholds of `saturated_activation`."""

    max_share: float = field(default=0.6, metadata={"unit": "share of outputs at the ends"})
    high_share: float = field(default=0.8, metadata={"unit": "share of outputs at the ends"})
    critical_share: float = field(default=0.95, metadata={"unit": "share of outputs at the ends"})
    min_rows: float = field(default=3, metadata={"unit": "rows in a row, up to the last"})


@rule(
    "saturated_activation",
    family="outputs",
    needs=("activation", "loss", "metrics", "grad"),
    thresholds=SaturatedActivation,
    explains=(
        *("vanishing_gradient", "dead_component", "gradient_imbalance", "representation_collapse"),
        *("frozen_weights", "divergence", "loss_spike", *STANDSTILL),
    ),
    reference="SageMaker Debugger's SaturatedActivation; Glorot & Bengio 2010.",
    remedy=revive_units,
)
def saturated_activation(
    activation: "pl.DataFrame",
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    grad: "pl.DataFrame",
    thresholds: SaturatedActivation,
) -> list[Finding]:
    """Hidden layers most of whose outputs lie at the ends of tanh, sigmoid and their like.

    The last activation before the loss may be sure of itself, a gate may be open or shut: both are
    left out. In a network that learns well a layer is accused only if nearly all of it is flat.
    """
    progress = loss_progress(loss, metrics)
    several = "optimizer" in grad.columns and grad["optimizer"].drop_nulls().n_unique() > 1
    found: dict[str, list[_Flat]] = {}
    for name, rows in rows_by(activation, _COLUMNS).items():
        one = _judge(name, rows, progress, thresholds, several)
        if one is not None:
            found.setdefault(one.part, []).append(one)
    return [_finding(layers, progress, thresholds) for layers in found.values()]


@dataclass(frozen=True)
class _Flat:
    """A layer at its ends: since which steps, and what share of its outputs."""

    name: str
    part: str
    function: str
    steps: list[int]
    first: bool
    share: float
    stuck: float


def _judge(
    name: str,
    rows: list[dict[str, Any]],
    progress: Progress | None,
    t: SaturatedActivation,
    several: bool,
) -> _Flat | None:
    rows = [row for row in rows if row.get("saturated_share") is not None]
    if not rows or rows[-1].get("last") or (several and rows[-1].get("last_of_part")):
        return None
    # what a part gives may lie at the ends, as black and white do; where it is stuck, units are
    if rows[-1].get("last_of_part") and not number(rows[-1], "saturated_units") > 0:
        return None
    function = str(rows[-1].get("function") or "tanh")
    if function in _SIGMOIDS and rows[-1].get("gate") != 0:
        return None
    shares = [number(row, "saturated_share") for row in rows]
    since = lasting_since([share >= t.max_share for share in shares], int(t.min_rows))
    if since is None:
        return None
    well = progress is not None and not progress.harmed(int(rows[since]["step"]))
    tail = sorted(shares[since:])
    share = tail[len(tail) // 2]
    if well and share < t.high_share:
        return None
    part = rows[-1].get("part")
    stuck = number(rows[-1], "saturated_units")
    steps = [int(row["step"]) for row in rows[since:]]
    return _Flat(name, str(part) if part else name, function, steps, since == 0, share, stuck)


def _finding(layers: list[_Flat], progress: Progress | None, t: SaturatedActivation) -> Finding:
    worst = max(layers, key=lambda one: one.share)
    start = min(one.steps[0] for one in layers)
    well = progress is not None and not progress.harmed(start)
    severity: Severity = "critical" if worst.share >= t.critical_share and not well else "warning"
    since = "from the first measured step on" if worst.first else f"since step {worst.steps[0]}"
    others = [one.name for one in layers if one is not worst]
    beside = f" (as in {', '.join(f'`{name}`' for name in others[:3])})" if others else ""
    return Finding(
        rule="saturated_activation",
        severity=severity,
        component=worst.part,
        first_step=start,
        last_step=worst.steps[-1],
        observed=worst.share,
        threshold=t.max_share,
        unit="share of outputs at the ends",
        evidence=Evidence(ACTIVATION_FILE, evidence_steps(worst.steps)),
        message=(
            f"{100 * worst.share:.0f} % of the outputs of the hidden layer `{worst.name}` "
            f"({worst.function}){beside} lie at the function's flat ends {since}. There its slope "
            "is almost zero, and what comes before it hardly gets a gradient."
        ),
        suggestion=(
            "Normalize the inputs and start with smaller weights (Xavier, gain 1); if it began "
            "during training, lower the learning rate. Then LayerNorm or BatchNorm before the "
            "activation, or ReLU or GELU in its place."
        ),
        confidence=0.9 if worst.share >= t.high_share else 0.7,
    )
