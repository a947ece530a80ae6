"""Losses that are fed what they are not made for."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.consequences import STANDSTILL, TURMOIL
from lightning_diag.rules.finding import Finding, Severity
from lightning_diag.rules.registry import rule
from lightning_diag.rules.wiring_rows import Fault, checked, faults

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "DoubleSoftmax",
    "LossTargetMismatch",
    "WrongReduction",
    "double_softmax",
    "loss_target_mismatch",
    "wrong_reduction",
]

_BROKEN = (
    *("dead_relu", "saturated_activation", "dead_component", "vanishing_gradient"),
    *("representation_collapse", "attention_collapse", "gradient_imbalance"),
)
_ADAPTIVE = ("adam", "lion", "lamb", "adafactor")


@dataclass(frozen=True)
class DoubleSoftmax:
    """Thresholds of `double_softmax`."""

    min_looks: float = field(default=2, metadata={"unit": "looks"})
    min_scores: float = field(default=64, metadata={"unit": "scores between 0 and 1, sigmoid"})


@rule(
    "double_softmax",
    family="wiring",
    needs="wiring",
    thresholds=DoubleSoftmax,
    explains=("vanishing_gradient", *STANDSTILL, *TURMOIL),
    reference="torch.nn.CrossEntropyLoss and BCEWithLogitsLoss take logits.",
)
def double_softmax(wiring: "pl.DataFrame", thresholds: DoubleSoftmax) -> list[Finding]:
    """Probabilities fed to a loss that applies the softmax, or the sigmoid, itself."""
    found = []
    for fault in _steady(wiring, "double_softmax"):
        softmax = fault.kind == "softmax"
        scores = sum(float(row.get("count") or 0) for row in fault.rows)
        if fault.looks < thresholds.min_looks or (not softmax and scores < thresholds.min_scores):
            continue
        name = "softmax" if softmax else "sigmoid"
        seen = "are not negative and add up to 1" if softmax else "all lie between 0 and 1"
        found.append(
            fault.finding(
                "warning",
                f"`{fault.last.get('at')}` applies a {name} itself, and is fed with probabilities: "
                f"its scores {seen}. Applied twice, it cannot come near 0 or 1, and its gradient "
                "is small.",
                f"Take the {name} out of the model's output for the loss, and apply it only where "
                "probabilities are read.",
                observed=fault.number("value") if softmax else fault.number("high"),
                threshold=1e-3 if softmax else 1.0,
                unit="largest distance of a row's sum from 1" if softmax else "largest score",
                confidence=0.95 if softmax else 0.8,
            )
        )
    return found


@dataclass(frozen=True)
class LossTargetMismatch:
    """Thresholds of `loss_target_mismatch`."""

    min_looks: float = field(default=3, metadata={"unit": "looks at constant targets"})
    min_labels: float = field(default=100, metadata={"unit": "targets, all of one value"})


@rule(
    "loss_target_mismatch",
    family="wiring",
    needs="wiring",
    thresholds=LossTargetMismatch,
    explains=(*STANDSTILL, *TURMOIL),
    reference="torch.nn.functional: shapes broadcast without an error in mse_loss and its like.",
)
def loss_target_mismatch(wiring: "pl.DataFrame", thresholds: LossTargetMismatch) -> list[Finding]:
    """Targets that do not fit the predictions: shape, range, kind, or all of one value."""
    found = []
    for fault in faults(wiring, "loss_target_mismatch"):
        if fault.kind == "constant":
            found += _constant(wiring, fault, thresholds)
            continue
        severity, message, suggestion = _mismatch(fault)
        found.append(fault.finding(severity, message, suggestion, confidence=0.9))
    return found


def _mismatch(fault: Fault) -> tuple[Severity, str, str]:
    last = fault.last
    where, shape, target = last.get("at"), last.get("input_shape"), last.get("target_shape")
    low, high = fault.number("low"), fault.number("high")
    if fault.kind == "shape":
        return (
            "warning",
            f"`{where}` compares predictions of shape {shape} with targets of shape {target}: they "
            "broadcast, so that every prediction is compared with every target.",
            "Give both one shape: `predictions.squeeze(-1)` or `targets.unsqueeze(-1)`.",
        )
    if fault.kind == "out of range":
        classes = last.get("classes")
        allowed = f"{int(classes)} classes" if classes else "targets between 0 and 1"
        return (
            "critical" if classes else "warning",
            f"`{where}` has {allowed}, and is given targets from {low:g} to {high:g}.",
            "Number the classes from 0, and give the last layer as many outputs as there are."
            if classes
            else "Scale the targets to probabilities, or take a loss for numbers.",
        )
    if fault.kind == "out of reach":
        return (
            "warning",
            f"The targets of `{where}` go from {low:g} to {high:g}, and the predictions come out "
            "of an activation that ends at 1: they cannot get there.",
            "Leave the activation out of the last layer, or scale the targets into its range.",
        )
    if fault.kind == "negative counts":
        return (
            "warning",
            f"`{where}` takes counts, and is given targets from {low:g} on: below zero it has no "
            "lower end.",
            "Give it the counts as they are, not standardized; or take a loss for numbers.",
        )
    if fault.kind == "one class":
        return (
            "warning",
            f"`{where}` has a single class (predictions of shape {shape}): its loss is always 0.",
            "For two classes with one output take `binary_cross_entropy_with_logits`.",
        )
    if fault.kind == "no target":
        return (
            "warning",
            f"No target of the batch counts in `{where}`: all of them have the ignored value.",
            "See how targets are padded and masked; the mean over none of them is NaN.",
        )
    return (
        "warning",
        f"`{where}` takes logarithms of probabilities, and is fed with something else.",
        "Apply `log_softmax` before it, or take `cross_entropy`, which does both.",
    )


def _constant(wiring: "pl.DataFrame", fault: Fault, t: LossTargetMismatch) -> list[Finding]:
    rows = [
        row
        for row in checked(wiring, "loss_target_mismatch")
        if row.get("at") == fault.last.get("at")
    ]
    values = {(row.get("low"), row.get("high")) for row in rows}
    labels = sum(float(row.get("count") or 0) for row in rows)
    steps = {row["step"] for row in rows}
    if len(values) > 1 or len(steps) < t.min_looks or labels < t.min_labels:
        return []
    return [
        fault.finding(
            "warning",
            f"All {labels:,.0f} targets of `{fault.last.get('at')}` at {len(steps)} looks have the "
            f"value {fault.number('low'):g}: there is nothing to tell apart.",
            "See how targets are read; if the data are sorted by class, shuffle them.",
            observed=labels,
            threshold=t.min_labels,
            unit="targets, all of one value",
            confidence=0.7,
        )
    ]


@dataclass(frozen=True)
class WrongReduction:
    """Thresholds of `wrong_reduction`."""

    min_looks: float = field(default=2, metadata={"unit": "looks"})
    clipped_share: float = field(default=0.5, metadata={"unit": "share of measured steps clipped"})


@rule(
    "wrong_reduction",
    family="wiring",
    needs=("wiring", "grad"),
    thresholds=WrongReduction,
    explains=(*TURMOIL, *STANDSTILL, *_BROKEN),
    reference="Goyal et al. 2017, Accurate, Large Minibatch SGD, section 3: mean over the batch.",
)
def wrong_reduction(
    wiring: "pl.DataFrame", grad: "pl.DataFrame", thresholds: WrongReduction
) -> list[Finding]:
    """A loss that is summed over the batch and never divided, so that it grows with it.

    Adam and its kin divide the size of the gradient out: with them it is noted, unless the loss
    became a sum in mid-run, or gradients are clipped, which cuts what has grown.
    """
    found = []
    for fault in _steady(wiring, "wrong_reduction"):
        if fault.looks < thresholds.min_looks:
            continue
        optimizer = str(fault.last.get("algorithm") or "")
        adaptive = any(name in optimizer.lower() for name in _ADAPTIVE)
        harmless = adaptive and fault.well_before is None and not _clipped(grad, thresholds)
        samples, summed = fault.number("samples"), fault.kind == "sum"
        since = "" if fault.well_before is None else f" since step {fault.rows[0]['step']}"
        how = (
            f"sums over {fault.number('count'):,.0f} terms of {samples:.0f} samples{since}, and "
            "the sum is not divided"
            if summed
            else f"is a mean that is multiplied by {fault.number('value'):.0f}, as many as the "
            f"batch has samples{since}"
        )
        found.append(
            fault.finding(
                "info" if harmless else "warning",
                f"The loss is no mean: `{fault.last.get('at')}` {how}. It and its gradient grow "
                "with the batch, and what the learning rate and the clipping value do with them.",
                'Take `reduction="mean"`, or divide the sum by the number of samples.',
                observed=fault.number("value"),
                threshold=0.5 if summed else 1.0,
                unit="weight of the sum in the loss" if summed else "weight of the mean",
                confidence=0.7,
            )
        )
    return found


def _clipped(grad: "pl.DataFrame", thresholds: WrongReduction) -> bool:
    import polars as pl

    if not {"component", "clip_coefficient"} <= set(grad.columns):
        return False
    whole = grad.filter(pl.col("component").is_null(), pl.col("clip_coefficient").is_not_null())
    cut = whole.filter(pl.col("clip_coefficient").cast(pl.Float64) < 1)
    return cut.height > thresholds.clipped_share * whole.height


def _steady(wiring: "pl.DataFrame", check: str) -> list[Fault]:
    """Faults that were seen at every look at which their function was called, up to the last."""
    rows = checked(wiring, check)
    found = []
    for fault in faults(wiring, check):
        calls = [row for row in rows if row.get("at") == fault.last.get("at")]
        well = [int(row["step"]) for row in calls if row["state"] != "wrong"]
        since = [row for row in fault.rows if not well or int(row["step"]) > well[-1]]
        # now and then it may be meant so, as where a batch is made up of parts
        if since and len(well) <= len(calls) - len(since):
            found.append(Fault(since, well[-1] if well else fault.well_before))
    return found
