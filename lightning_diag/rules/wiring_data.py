"""Data that no network can use as they come: not finite, or on a scale of their own."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.consequences import STANDSTILL, TURMOIL
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.first_nonfinite import NONFINITE_FILE, first_nonfinite
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import standardize_data
from lightning_diag.rules.wiring_rows import Fault, checked

if TYPE_CHECKING:
    import polars as pl

__all__ = ["InputScale", "NonfiniteData", "input_scale", "nonfinite_data"]


@dataclass(frozen=True)
class NonfiniteData:
    """Thresholds of `nonfinite_data`."""

    min_looks: float = field(default=1, metadata={"unit": "looks"})


@rule(
    "nonfinite_data",
    family="wiring",
    needs=("wiring", "nonfinite"),
    thresholds=NonfiniteData,
    explains=("nonfinite_gradient", "nonfinite_loss", "dead_component"),
    reference="IEEE 754: what meets NaN becomes NaN.",
)
def nonfinite_data(
    wiring: "pl.DataFrame", nonfinite: "pl.DataFrame", thresholds: NonfiniteData
) -> list[Finding]:
    """NaN or infinity in a batch; where the loss stays finite it is known to the model, and noted.

    A mask of minus infinity, or NaN for what is missing, is such a case. Between two looks it is
    the replay of the first step that was not finite which tells.
    """
    rows = checked(wiring, "nonfinite_data")
    wrong = [row for row in rows if row["state"] == "wrong"]
    if not wrong or len(wrong) < thresholds.min_looks:
        return _replayed(nonfinite)
    after = [row.get("loss_finite") for row in rows if row["step"] >= wrong[0]["step"]]
    # a loss that hides an infinity breaks one step later, by the gradient
    broken, unknown = 0 in after, 1 not in after
    severity: Severity = "critical" if broken else "warning" if unknown else "info"
    fault = Fault(wrong)
    return [
        fault.finding(
            severity,
            f"The batch holds {fault.number('count'):,.0f} elements that are NaN or infinite, in "
            f"{fault.names}.{' The loss is not finite either.' if broken else ''}",
            "Clean the data: look for missing values, divisions by zero and logarithms of zero in "
            "what prepares them."
            if severity != "info"
            else "Nothing to do if they mark what is missing or masked: the loss is finite.",
            observed=fault.number("value"),
            threshold=0.0,
            unit="share of elements",
            confidence=0.95 if broken else 0.6,
        )
    ]


def _replayed(nonfinite: "pl.DataFrame") -> list[Finding]:
    row = first_nonfinite(nonfinite)
    if row.get("reason") != "data":
        return []
    step = int(row["step"])
    bad = sum(float(row.get(key) or 0) for key in ("input_nan", "input_inf"))
    return [
        Finding(
            rule="nonfinite_data",
            severity="critical",
            first_step=step,
            last_step=step,
            observed=bad,
            threshold=0.0,
            unit="elements that are NaN or infinite",
            evidence=Evidence(NONFINITE_FILE, (step,)),
            message=(
                f"The batch of step {step} holds {bad:,.0f} elements that are NaN or infinite, in "
                f"`{row.get('tensor')}`, and the loss is not finite either."
            ),
            suggestion=(
                "Clean the data: look for missing values, divisions by zero (a picture of one "
                "colour that is divided by its deviation) and logarithms of zero in what prepares "
                "them."
            ),
            confidence=0.95,
        )
    ]


@dataclass(frozen=True)
class InputScale:
    """Thresholds of `input_scale`."""

    max_rms: float = field(default=50.0, metadata={"unit": "root mean square of the input"})
    min_size: float = field(default=0.02, metadata={"unit": "largest element of the input"})
    max_shift: float = field(default=10.0, metadata={"unit": "standard deviations of its mean"})
    min_looks: float = field(default=2, metadata={"unit": "looks"})


@rule(
    "input_scale",
    family="wiring",
    needs="wiring",
    thresholds=InputScale,
    explains=(
        *("dead_component", "unused_parameter", "representation_collapse", "vanishing_gradient"),
        "constant_prediction",
        *TURMOIL,
        *STANDSTILL,
        "dead_relu",
        "saturated_activation",
        "gradient_imbalance",
    ),
    reference="LeCun et al. 1998, Efficient BackProp, section 4.3: mean 0, equal variances.",
    remedy=standardize_data,
)
def input_scale(wiring: "pl.DataFrame", thresholds: InputScale) -> list[Finding]:
    """Input of the first layer that learns on a scale for which no weights are initialised.

    Raw pixels from 0 to 255 have a root mean square of about 130. Where a normalization follows at
    once, which takes the scale away, it is only noted, as is input far from zero for its spread.
    """
    groups: dict[str, list[dict[str, object]]] = {}
    for row in checked(wiring, "input_scale"):
        if row.get("rms") is not None:
            groups.setdefault(str(row.get("names")), []).append(row)
    found = []
    for rows in groups.values():
        large = [row for row in rows if _number(row, "rms") > thresholds.max_rms]
        shifted = [row for row in rows if _shift(row) > thresholds.max_shift]
        lasting = _lasting(rows, thresholds)
        if len(large) >= thresholds.min_looks and 2 * len(large) > len(rows):
            found.append(_large(Fault(large), thresholds))
        elif lasting:
            before = rows[len(rows) - len(lasting) - 1]
            found.append(_large(Fault(lasting, int(str(before["step"]))), thresholds))
        elif all(0 < _number(row, "abs_max") < thresholds.min_size for row in rows[-3:]) and (
            len(rows) >= thresholds.min_looks
        ):
            found.append(_small(Fault(rows), thresholds))
        elif len(shifted) >= thresholds.min_looks and 2 * len(shifted) > len(rows):
            found.append(_far(Fault(shifted), thresholds))
    return found


def _small(fault: Fault, t: InputScale) -> Finding:
    normalized = bool(fault.last.get("normalized"))
    return fault.finding(
        "info" if normalized else "warning",
        f"What enters {fault.names} is tiny: its largest element is "
        f"{fault.number('abs_max'):.3g}. Weights are initialised for input of about 1.",
        "See whether the data are scaled twice (pixels divided by 255 two times); standardise "
        "features to mean 0 and deviation 1 with statistics of the training set.",
        observed=fault.number("abs_max"),
        threshold=t.min_size,
        unit="largest element of the input",
        confidence=0.7,
    )


def _lasting(rows: list[dict[str, object]], t: InputScale) -> list[dict[str, object]]:
    """The last looks, if all of them show large input that was not so before."""
    large = [_number(row, "rms") > t.max_rms for row in rows]
    count = next((n for n, one in enumerate(reversed(large)) if not one), len(large))
    return rows[len(rows) - count :] if t.min_looks <= count < len(rows) else []


def _large(fault: Fault, t: InputScale) -> Finding:
    normalized = bool(fault.last.get("normalized"))
    return fault.finding(
        "info" if normalized else "warning",
        f"What enters {fault.names} has a root mean square of {fault.number('rms'):.3g} (mean "
        f"{fault.number('mean'):.3g}, largest {fault.number('abs_max'):.3g}): weights are "
        "initialised for input of about 1.",
        "Scale the input: divide pixels by 255, standardise features to mean 0 and deviation 1 "
        "with statistics of the training set.",
        observed=fault.number("rms"),
        threshold=t.max_rms,
        unit="root mean square of the input",
        confidence=0.5 if normalized else 0.8,
    )


def _far(fault: Fault, t: InputScale) -> Finding:
    return fault.finding(
        "info",
        f"What enters {fault.names} lies far from zero for its spread: mean "
        f"{fault.number('mean'):.3g}, standard deviation {fault.number('std'):.3g}.",
        "Subtract the mean of the training set.",
        observed=_shift(fault.last),
        threshold=t.max_shift,
        unit="standard deviations of its mean",
        confidence=0.5,
    )


def _shift(row: dict[str, object]) -> float:
    mean, std = abs(_number(row, "mean")), _number(row, "std")
    # constant input, such as the ones of a graph without features, has no scale to speak of
    return mean / std if std > 0 and mean > 1 else 0.0


def _number(row: dict[str, object], key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else 0.0
