"""Units that never fire any more."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_diag.rules.consequences import STANDSTILL
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_progress import Progress, loss_progress
from lightning_diag.rules.module_rows import lasting_since, number, rows_by
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import revive_units
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["ACTIVATION_FILE", "DeadRelu", "dead_relu"]

ACTIVATION_FILE = "records/activation.jsonl"

_COLUMNS = ("part", "function", "count", "units", "zero_share", "dead_now", "dead_share")


@dataclass(frozen=True)
class DeadRelu:
    """Thresholds of `dead_relu`."""

    max_share: float = field(default=0.5, metadata={"unit": "share of a layer's units"})
    small_layer: float = field(default=2.0, metadata={"unit": "units more, of a layer's"})
    critical_share: float = field(default=0.9, metadata={"unit": "share of a layer's units"})
    min_rows: float = field(default=3, metadata={"unit": "rows in a row, up to the last"})
    min_samples: float = field(default=16, metadata={"unit": "samples and positions a unit"})
    learnt_share: float = field(default=0.6, metadata={"unit": "share of a layer's units"})


@rule(
    "dead_relu",
    family="outputs",
    needs=("activation", "loss", "metrics"),
    thresholds=DeadRelu,
    explains=(
        *("vanishing_gradient", "dead_component", "gradient_imbalance", "representation_collapse"),
        *("unused_parameter", "frozen_weights", "divergence", "loss_spike", *STANDSTILL),
    ),
    reference="SageMaker Debugger's DeadRelu: more than half of a layer; Lu et al. 2019, Dying "
    "ReLU and initialization.",
    remedy=revive_units,
)
def dead_relu(
    activation: "pl.DataFrame",
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    thresholds: DeadRelu,
) -> list[Finding]:
    """Layers of which most units are switched off for every sample, measurement after measurement.

    That half of the outputs are zero is how a ReLU works, and is not looked at. Units that are
    silent from the start in a network that learns well are noted only, unless they are many.
    """
    progress = loss_progress(loss, metrics)
    worst: dict[str, list[_Dead]] = {}
    for name, rows in rows_by(activation, _COLUMNS).items():
        found = _judge(name, rows, thresholds)
        if found is not None:
            worst.setdefault(found.part, []).append(found)
    return [_finding(layers, progress, thresholds) for layers in worst.values()]


@dataclass(frozen=True)
class _Dead:
    """A layer whose units are dead: since which step, how many, and of how many."""

    name: str
    part: str
    function: str
    steps: list[int]
    first: bool
    share: float
    units: float
    limit: float


def _judge(name: str, rows: list[dict[str, Any]], t: DeadRelu) -> _Dead | None:
    rows = [row for row in rows if row.get("dead_now") is not None]
    units = number(rows[-1], "units") if rows else 0.0
    # a ReLU in the step itself is the hinge of a loss, and no layer
    if not units > 0 or name.partition("#")[0] == "training_step":
        return None
    limit = min(1.0, t.max_share + t.small_layer / units)
    few = number(rows[-1], "count") / units < t.min_samples
    known = [number(row, "dead_share") for row in rows]
    now = [number(row, "dead_now") for row in rows]
    # of few samples many units have nothing to say: then only what lasted for the window counts
    shares = known if few else now
    since = lasting_since([share >= limit for share in shares], int(t.min_rows))
    if since is None:
        return None
    tail = shares[-int(t.min_rows) :]
    share = known[-1] if known[-1] == known[-1] else min(tail)
    if share < limit:
        return None
    part = rows[-1].get("part")
    return _Dead(
        name,
        str(part) if part else name,
        str(rows[-1].get("function") or "relu"),
        [int(row["step"]) for row in rows[since:]],
        since == 0,
        share,
        units,
        limit,
    )


def _finding(layers: list[_Dead], progress: Progress | None, t: DeadRelu) -> Finding:
    worst = max(layers, key=lambda one: one.share)
    start = min(one.steps[0] for one in layers)
    well = progress is not None and not progress.harmed(start)
    severity: Severity = "critical" if worst.share >= t.critical_share else "warning"
    if well and worst.share < t.learnt_share and worst.first:
        severity = "info"
    elif well and severity == "critical":
        severity = "warning"
    since = "from the first measured step on" if worst.first else f"since step {worst.steps[0]}"
    others = [one.name for one in layers if one is not worst]
    beside = f" (as in {', '.join(f'`{name}`' for name in others[:3])})" if others else ""
    return Finding(
        rule="dead_relu",
        severity=severity,
        component=worst.part,
        first_step=start,
        last_step=worst.steps[-1],
        observed=worst.share,
        threshold=worst.limit,
        unit="share of units",
        evidence=Evidence(ACTIVATION_FILE, evidence_steps(worst.steps)),
        message=(
            f"{100 * worst.share:.0f} % of the {worst.units:.0f} units of `{worst.name}` "
            f"({worst.function}){beside} are switched off for every sample {since}. A unit that "
            "is always off gives nothing and gets no gradient, so it does not come back."
        ),
        suggestion=(
            "Try a lower learning rate or a warm-up first: one large step pushes the biases far "
            "below zero. Then LeakyReLU or GELU, which let a gradient through, normalized inputs, "
            "or a smaller initialization of weights and biases."
        ),
        confidence=0.9 if worst.share >= t.critical_share else 0.75,
    )
