"""Parameters that are in the wrong hands, or that nothing ever teaches."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.consequences import STANDSTILL
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import raise_rate
from lightning_diag.rules.traces import evidence_steps
from lightning_diag.rules.update_traces import UPDATE_FILE
from lightning_diag.rules.wiring_rows import Fault, faults

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "FrozenInOptimizer",
    "FrozenWeights",
    "UnoptimizedParameter",
    "UnusedParameter",
    "frozen_in_optimizer",
    "frozen_weights",
    "unoptimized_parameter",
    "unused_parameter",
]

_SHARE = "share of all parameters"


@dataclass(frozen=True)
class UnoptimizedParameter:
    """Thresholds of `unoptimized_parameter`."""

    min_looks: float = field(default=2, metadata={"unit": "looks"})


@rule(
    "unoptimized_parameter",
    family="wiring",
    needs="wiring",
    thresholds=UnoptimizedParameter,
    explains=("dead_component", *STANDSTILL),
    reference="torch.optim: an optimizer moves the parameters of its groups, and no others.",
)
def unoptimized_parameter(
    wiring: "pl.DataFrame", thresholds: UnoptimizedParameter
) -> list[Finding]:
    """Trainable parameters that get a gradient and are in no optimizer.

    Without a gradient they may be meant to rest, as in a teacher: that is only noted.
    """
    found = []
    for fault in faults(wiring, "unoptimized_parameter"):
        if fault.looks < thresholds.min_looks:
            continue
        if fault.kind == "not registered":
            found.append(_not_registered(fault))
            continue
        wanting = fault.kind == "gradient"
        severity: Severity = "warning" if wanting else "info"
        what = "get a gradient, which nobody uses" if wanting else "get no gradient either"
        strangers = fault.number("value")
        stale = (
            f" The optimizers hold {strangers:.0f} parameters that the model does not have: it was "
            "changed after they were made."
            if strangers
            else ""
        )
        are = "is" if fault.number("count") == 1 else "are"
        message = (
            f"{_count(fault)} ({fault.names}) {are} trainable, but in no optimizer; they {what}. "
            f"They never change.{stale}"
        )
        suggestion = (
            "Give them to an optimizer in `configure_optimizers`. If they are meant to rest, say "
            "so with `requires_grad_(False)`: that also saves their part of the backward pass."
        )
        found.append(
            fault.finding(
                severity, message, suggestion, observed=fault.share, threshold=0.0, unit=_SHARE
            )
        )
    return found


def _not_registered(fault: Fault) -> Finding:
    are = "is" if fault.number("count") == 1 else "are"
    return fault.finding(
        "warning",
        f"{_count(fault)} ({fault.names}) {are} kept in a plain list or dictionary, which PyTorch "
        "does not look into: the model does not have them, no optimizer gets them, and they are "
        "in no checkpoint. They get a gradient, which nobody uses.",
        "Keep modules in `nn.ModuleList` or `nn.ModuleDict`, and parameters in `nn.ParameterList`.",
        observed=fault.share,
        threshold=0.0,
        unit=_SHARE,
        confidence=0.95,
    )


@dataclass(frozen=True)
class FrozenInOptimizer:
    """Thresholds of `frozen_in_optimizer`."""

    min_looks: float = field(default=2, metadata={"unit": "looks"})


@rule(
    "frozen_in_optimizer",
    family="wiring",
    needs="wiring",
    thresholds=FrozenInOptimizer,
    explains=(
        "dead_component",
        "update_too_small",
    ),
    reference="torch.optim skips parameters whose gradient is None, and only those.",
)
def frozen_in_optimizer(wiring: "pl.DataFrame", thresholds: FrozenInOptimizer) -> list[Finding]:
    """Frozen parameters in an optimizer, which is harmless unless an old gradient hangs on them."""
    found = []
    for fault in faults(wiring, "frozen_in_optimizer"):
        moving = fault.kind == "gradient left"
        if fault.looks < thresholds.min_looks:
            continue
        what = (
            "and still carry a gradient from before: the optimizer goes on moving and decaying them"
            if moving
            else "which does nothing to them as long as they have no gradient"
        )
        found.append(
            fault.finding(
                "warning" if moving else "info",
                f"{_count(fault)} ({fault.names}) are frozen and in an optimizer, {what}.",
                "Set their `grad` to None when you freeze them."
                if moving
                else "Nothing to do, or leave them out of the optimizer.",
                observed=fault.share,
                threshold=0.0,
                unit=_SHARE,
            )
        )
    return found


@dataclass(frozen=True)
class FrozenWeights:
    """Thresholds of `frozen_weights`."""

    min_steps: float = field(default=100, metadata={"unit": "steps between the looks"})
    noted_share: float = field(default=0.01, metadata={"unit": "share of all parameters"})
    min_rows: float = field(default=5, metadata={"unit": "rows of updates"})


@rule(
    "frozen_weights",
    family="wiring",
    needs=("wiring", "update"),
    thresholds=FrozenWeights,
    explains=STANDSTILL,
    reference="A step must move what it has a gradient for; Micikevicius et al. 2018, section 3.1.",
    remedy=raise_rate,
)
def frozen_weights(
    wiring: "pl.DataFrame", update: "pl.DataFrame", thresholds: FrozenWeights
) -> list[Finding]:
    """Parameters that get a gradient, are in an optimizer, and have not moved since the start.

    A warm-up that starts at zero moves nothing for a while: looks close to the start do not count.
    A small rest of a part is only noted: the gradient of a bias that cancels out is rounding alone.
    """
    found = []
    for fault in faults(wiring, "frozen_weights"):
        steps = int(fault.last["step"])
        if steps < thresholds.min_steps:
            continue
        rest = fault.share < thresholds.noted_share and fault.number("component_share") < 1
        found.append(
            fault.finding(
                "info" if rest else "warning",
                f"{_count(fault)} ({fault.names}) get a gradient and are in an optimizer, and have "
                f"the same values at step {steps} as at the start. They learn nothing.",
                "See whether their learning rate is zero, whether something puts them back after "
                "each step, or whether half precision weights swallow updates that are too small.",
                observed=float(steps),
                threshold=thresholds.min_steps,
                unit="steps without a change",
            )
        )
    return found or _put_back(update, thresholds)


def _put_back(update: "pl.DataFrame", t: FrozenWeights) -> list[Finding]:
    """Parts that every step moves, and that have the same norm, to the last bit, before each."""
    import polars as pl

    columns = {"step", "component", "weight_l2", "update_l2"}
    if not columns <= set(update.columns):
        return []
    known = update.select(*columns).drop_nulls().filter(pl.col("weight_l2") > 0)
    found = []
    for part in known.sort("step").partition_by("component", maintain_order=True):
        steps, norms = part["step"].to_list(), part["weight_l2"].to_list()
        moved = part["update_l2"].to_list()
        since = len(norms) - 1
        while since > 0 and norms[since - 1] == norms[-1] and moved[since - 1] > 0:
            since -= 1
        if len(norms) - since < t.min_rows or not moved[-1] > 0:
            continue
        name = str(part["component"][0])
        found.append(
            Finding(
                rule="frozen_weights",
                severity="warning",
                component=name,
                first_step=int(steps[since]),
                last_step=int(steps[-1]),
                observed=float(len(norms) - since),
                threshold=t.min_rows,
                unit="measured steps that moved it, and left it where it was",
                evidence=Evidence(UPDATE_FILE, evidence_steps(steps[since:])),
                message=(
                    f"Each step moves `{name}`, and before the next it has the same norm again, "
                    f"to the last bit, since step {steps[since]}: something puts its weights back. "
                    "It learns nothing."
                ),
                suggestion=(
                    "Look for what writes into these weights between the steps: averaged weights "
                    "that are copied back, a checkpoint or state that is loaded again and again, a "
                    "clamp or re-initialisation in a hook."
                ),
                confidence=0.9,
            )
        )
    return found


@dataclass(frozen=True)
class UnusedParameter:
    """Thresholds of `unused_parameter`."""

    min_steps: float = field(default=10, metadata={"unit": "steps without a gradient"})
    zero_looks: float = field(default=5, metadata={"unit": "looks at a gradient of zeros"})
    noted_share: float = field(default=0.01, metadata={"unit": "share of all parameters"})
    critical_share: float = field(default=0.5, metadata={"unit": "share of all parameters"})


@rule(
    "unused_parameter",
    family="wiring",
    needs="wiring",
    thresholds=UnusedParameter,
    explains=(
        "divergence",
        "loss_spike",
        "dead_component",
        "vanishing_gradient",
        "gradient_imbalance",
        *STANDSTILL,
    ),
    reference="DistributedDataParallel's find_unused_parameters.",
)
def unused_parameter(wiring: "pl.DataFrame", thresholds: UnusedParameter) -> list[Finding]:
    """Trainable parameters of an optimizer that got no gradient at any step that was watched.

    A small rest of a part that learns, such as a pooler that a task does not use, is only noted, as
    is what few steps have shown.
    """
    found = []
    for fault in faults(wiring, "unused_parameter"):
        zero = fault.kind == "zero"
        steps = fault.number("looks" if zero else "steps")
        enough = steps >= (thresholds.zero_looks if zero else thresholds.min_steps)
        found.append(_unused(fault, steps, enough, thresholds))
    return found


def _unused(fault: Fault, steps: float, enough: bool, t: UnusedParameter) -> Finding:
    zero = fault.kind == "zero"
    rest = fault.share < t.noted_share and fault.number("component_share") < 1
    severity: Severity = "info" if rest or not enough else "warning"
    if severity == "warning" and fault.share >= t.critical_share and not zero:
        severity = "critical"
    got = (
        f"had a gradient of nothing but zeros at all {steps:.0f} looks"
        if zero
        else f"got no gradient in any of {steps:.0f} steps"
    )
    return fault.finding(
        severity,
        f"{_count(fault)} of the optimizer ({fault.names}) {got}{_REASONS.get(fault.kind, '')}. "
        "They learn nothing.",
        _SUGGESTIONS.get(fault.kind, _SUGGESTIONS["ran"]),
        observed=fault.share,
        threshold=t.noted_share,
        unit=f"{_SHARE}, with a gradient of zeros" if zero else _SHARE,
        confidence=0.95 if enough else 0.5,
    )


_REASONS = {
    "never ran": ": their module was never called",
    "ran": ": their module was called, but the loss does not depend on what it returned",
}
_SUGGESTIONS = {
    "never ran": (
        "See whether the forward pass goes by them: a branch that is skipped in training, such as "
        "teacher forcing that leaves the decoder out, or a layer that is made and not used. Call "
        "it, or remove it."
    ),
    "ran": (
        "See where what the module returns gets lost: an output that the loss leaves out, "
        "`torch.no_grad()`, `.detach()`, `.item()`, an argmax or a detour over NumPy."
    ),
    "zero": (
        "They are connected, but what comes back is exactly zero: look for a multiplication by "
        "zero, a mask that takes everything, ReLUs that never fire, a clamp or a gate."
    ),
}


def _count(fault: Fault) -> str:
    tensors, elements = fault.number("count"), fault.number("parameters")
    plural = "s" if tensors != 1 else ""
    return (
        f"{tensors:.0f} parameter{plural} with {elements:,.0f} elements, {fault.share:.1%} of all,"
    )
