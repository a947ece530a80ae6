"""Graphs that are cut, gradients that pile up, modes, ties and replicas that came apart."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.consequences import STANDSTILL, TURMOIL
from lightning_diag.rules.finding import Finding, Severity
from lightning_diag.rules.registry import rule
from lightning_diag.rules.wiring_rows import Fault, faults

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "DetachedGraph",
    "EvalModeInTraining",
    "MissingZeroGrad",
    "ReplicaDrift",
    "TiedWeightBroken",
    "detached_graph",
    "eval_mode_in_training",
    "missing_zero_grad",
    "replica_drift",
    "tied_weight_broken",
]


@dataclass(frozen=True)
class DetachedGraph:
    """Thresholds of `detached_graph`."""

    min_steps: float = field(default=10, metadata={"unit": "steps without a gradient"})
    critical_share: float = field(default=0.5, metadata={"unit": "share of all parameters"})


@rule(
    "detached_graph",
    family="wiring",
    needs="wiring",
    thresholds=DetachedGraph,
    explains=(
        "divergence",
        "loss_spike",
        "dead_component",
        "vanishing_gradient",
        "gradient_imbalance",
        *STANDSTILL,
    ),
    reference="torch.autograd: only what stands in the graph of the loss gets a gradient.",
)
def detached_graph(wiring: "pl.DataFrame", thresholds: DetachedGraph) -> list[Finding]:
    """A graph that is cut in front of parameters, or a loss that does not depend on the batch."""
    judges = {"whole loss": _whole_loss, "constant loss": _constant_loss}
    return [
        judges.get(fault.kind, _cut)(fault, thresholds)
        for fault in faults(wiring, "detached_graph")
    ]


def _whole_loss(fault: Fault, t: DetachedGraph) -> Finding:
    named = fault.last.get("names")
    place = f" The graph ends at {fault.names}." if named else ""
    return fault.finding(
        "critical",
        f"The loss needs no gradient: it is cut off from every parameter.{place}",
        "Look for `torch.no_grad()`, `.detach()`, `.item()` or a new tensor made of the loss's "
        "value in `training_step`, and for parameters that are all frozen.",
        observed=1.0,
        threshold=t.critical_share,
        unit="share of all parameters",
    )


def _cut(fault: Fault, t: DetachedGraph) -> Finding:
    steps = fault.number("steps")
    enough = steps >= t.min_steps
    severity: Severity = "warning" if enough else "info"
    if enough and fault.share >= t.critical_share:
        severity = "critical"
    return fault.finding(
        severity,
        f"{fault.number('parameters'):,.0f} trainable elements ({fault.names}) got no gradient in "
        f"{steps:.0f} steps: the graph is cut, {fault.last.get('at')}.",
        "Look there for `.detach()`, `.data`, `torch.no_grad()`, a way through NumPy or lists, or "
        "a choice such as `argmax`, which needs a straight-through estimator or Gumbel-softmax. If "
        "this part is meant to rest, freeze it with `requires_grad_(False)` and leave it out of "
        "the optimizer.",
        observed=fault.share,
        threshold=0.0,
        unit="share of all parameters",
        confidence=0.95 if enough else 0.5,
    )


def _constant_loss(fault: Fault, t: DetachedGraph) -> Finding:
    loss = fault.number("loss")
    return fault.finding(
        "warning" if loss else "info",
        f"The loss was {loss:g} to the last bit at {fault.number('looks'):.0f} looks in a row, "
        "with different batches: it does not depend on the batch or on the weights, or by less "
        "than its precision shows.",
        "See that the loss is computed from the model's output and this batch, that the output is "
        "not constant (saturated, clamped, one class only), and that the optimizer is stepped. "
        "Where gradients arrive and are tiny, the scale of the logits is at fault: see "
        "`vanishing_gradient`.",
        observed=loss,
        unit="loss",
        confidence=0.8,
    )


@dataclass(frozen=True)
class MissingZeroGrad:
    """Thresholds of `missing_zero_grad`."""

    min_looks: float = field(default=2, metadata={"unit": "looks"})


@rule(
    "missing_zero_grad",
    family="wiring",
    needs="wiring",
    thresholds=MissingZeroGrad,
    explains=TURMOIL,
    reference="torch.optim.Optimizer.zero_grad: backward adds to what is there.",
)
def missing_zero_grad(wiring: "pl.DataFrame", thresholds: MissingZeroGrad) -> list[Finding]:
    """Gradients of the last step that are still there when the next backward pass adds to them."""
    return [
        fault.finding(
            "warning",
            f"The gradients of optimizer {fault.number('optimizer'):.0f} are not zeroed between "
            "its steps: each step also uses the gradients of all steps before it.",
            "Call `optimizer.zero_grad()` before each backward pass under manual optimization, and "
            "let `optimizer_zero_grad` do its work under automatic optimization. To accumulate on "
            "purpose, use `accumulate_grad_batches`.",
            observed=fault.number("value"),
            threshold=0.0,
            unit="largest gradient left over",
        )
        for fault in faults(wiring, "missing_zero_grad")
        if fault.looks >= thresholds.min_looks
    ]


@dataclass(frozen=True)
class EvalModeInTraining:
    """Thresholds of `eval_mode_in_training`."""

    min_looks: float = field(default=2, metadata={"unit": "looks"})


@rule(
    "eval_mode_in_training",
    family="wiring",
    needs="wiring",
    thresholds=EvalModeInTraining,
    explains=("overfitting",),
    reference="Lightning 2.2 and later keep the modes that modules have when `fit` begins.",
)
def eval_mode_in_training(wiring: "pl.DataFrame", thresholds: EvalModeInTraining) -> list[Finding]:
    """Trainable modules in evaluation mode: dropout rests, normalization keeps old statistics.

    Single layers are set so on purpose, as a normalization that is to keep its statistics, and only
    noted; what is frozen is no fault at all.
    """
    found = []
    for fault in faults(wiring, "eval_mode_in_training"):
        whole = fault.kind == "container"
        if whole and fault.looks < thresholds.min_looks:
            continue
        what = "with parameters that train" if whole else "by themselves"
        found.append(
            fault.finding(
                "warning" if whole else "info",
                f"In evaluation mode while the model trains, {what}: {fault.names}. Dropout "
                "does nothing there, and batch normalization does not learn its statistics.",
                "Call `.train()` before `fit`, as for a model that `from_pretrained` gave, and "
                "after each `.eval()` inside `training_step`. A part that is meant to rest is "
                "frozen with `requires_grad_(False)` too.",
                observed=fault.number("count"),
                threshold=0.0,
                unit="modules",
                confidence=0.9 if whole else 0.4,
            )
        )
    return found


@dataclass(frozen=True)
class TiedWeightBroken:
    """Thresholds of `tied_weight_broken`."""

    min_looks: float = field(default=1, metadata={"unit": "looks"})


@rule(
    "tied_weight_broken",
    family="wiring",
    needs="wiring",
    thresholds=TiedWeightBroken,
    reference="Press and Wolf 2017, Using the Output Embedding to Improve Language Models.",
)
def tied_weight_broken(wiring: "pl.DataFrame", thresholds: TiedWeightBroken) -> list[Finding]:
    """Two names that stood for one weight, or should, and stand for two.

    A map that starts as a copy of the embedding and goes its own way was meant to be tied, as a
    rule: where it was not, raise ``min_looks``.
    """
    words: dict[str, tuple[Severity, str]] = {
        "came apart": ("warning", "were one parameter, and are two now"),
        "not tied": ("warning", "are tied by the model's configuration, and are two parameters"),
        "drifted": ("warning", "started with equal values, are two parameters, and differ now"),
    }
    found = []
    for fault in faults(wiring, "tied_weight_broken"):
        severity, what = words.get(fault.kind, words["came apart"])
        if fault.looks >= thresholds.min_looks:
            found.append(
                fault.finding(
                    severity,
                    f"{fault.names} {what}.",
                    "Tie them again after whatever replaced one of them (loading weights, moving "
                    "or wrapping the model) with `a.weight = b.weight`, before the optimizer is "
                    "made. Copying values, or `.data`, does not tie.",
                    confidence=0.6 if fault.kind == "drifted" else 0.9,
                )
            )
    return found


@dataclass(frozen=True)
class ReplicaDrift:
    """Thresholds of `replica_drift`."""

    min_looks: float = field(default=1, metadata={"unit": "looks"})


@rule(
    "replica_drift",
    family="wiring",
    needs="wiring",
    thresholds=ReplicaDrift,
    reference="DistributedDataParallel keeps replicas equal by equal gradients, and never checks.",
)
def replica_drift(wiring: "pl.DataFrame", thresholds: ReplicaDrift) -> list[Finding]:
    """Copies of one weight that differ between the processes."""
    return [
        fault.finding(
            "critical",
            f"The processes train different models: {fault.names} differ between them since step "
            f"{fault.rows[0]['step']}. Gradients are averaged over weights that are not the same.",
            "Look for weights that are changed on one rank only: a reset or an assignment under "
            "`if rank == 0`, parameters that were made after the model was wrapped, random "
            "numbers in the weights' own update.",
            observed=fault.share,
            threshold=0.0,
            unit="share of all parameters",
            confidence=0.99,
        )
        for fault in faults(wiring, "replica_drift")
        if fault.looks >= thresholds.min_looks
    ]
