"""A gradient that holds NaN or infinity."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_diag.rules.finding import Evidence, Finding
from lightning_diag.rules.first_nonfinite import (
    NONFINITE_FILE,
    advice,
    first_nonfinite,
    sentence,
)
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import leave_half_precision
from lightning_diag.rules.traces import (
    GRAD_FILE,
    Trace,
    component_traces,
    evidence_steps,
    streaks,
    whole_traces,
    without_skipped,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = ["NonfiniteGradient", "nonfinite_gradient"]

_SUGGESTION = (
    "Look at the first parameter that is named: what feeds it may take a logarithm or square root "
    "of zero, divide by zero, or overflow. Then lower the learning rate, warm it up, and clip the "
    "gradient norm at 1; with 16-bit floats use bf16-mixed. Check that the data hold no NaN. "
    "Weights that took such a step are lost: go back to an earlier checkpoint."
)


@dataclass(frozen=True)
class NonfiniteGradient:
    """Thresholds of `nonfinite_gradient`."""

    min_rows: float = field(default=1, metadata={"unit": "rows"})
    lasting_rows: float = field(default=2, metadata={"unit": "rows"})
    skipped_rows: float = field(default=20, metadata={"unit": "skipped rows in a row"})
    spent_scale: float = field(default=1.0, metadata={"unit": "loss scale"})
    spent_rows: float = field(default=3, metadata={"unit": "skipped rows at a spent scale"})


@rule(
    "nonfinite_gradient",
    family="gradients",
    needs=("grad", "nonfinite"),
    thresholds=NonfiniteGradient,
    explains=("nonfinite_loss", "dead_component", "vanishing_gradient"),
    reference="Micikevicius et al. 2018, Mixed precision training, section 3.2.",
    remedy=leave_half_precision,
)
def nonfinite_gradient(
    grad: "pl.DataFrame", nonfinite: "pl.DataFrame", thresholds: NonfiniteGradient
) -> list[Finding]:
    """Steps that were taken with NaN or infinity in the gradient, and who had it first.

    A step that the gradient scaler skipped harmed nothing and is no evidence, unless the scaler
    cannot find any scale at which the gradient fits. Where the step was made again, the operation
    that began it is named; without rows of gradients that alone is evidence.
    """
    kept = without_skipped(grad)
    traces = component_traces(kept)
    bad: dict[int, list[str]] = {}
    for trace in [*traces, *whole_traces(kept)]:
        for step in _bad_steps(trace):
            bad.setdefault(step, [])
            if trace.component is not None:
                bad[step].append(trace.component)
    if len(bad) >= max(1, thresholds.min_rows):
        row = first_nonfinite(nonfinite, max(bad), min(bad))
        return [_taken(bad, traces, whole_traces(kept), thresholds, row)]
    row = first_nonfinite(nonfinite)
    if "nonfinite_gradient" in str(row.get("kinds")):
        return [_replayed(row)]
    return [one for trace in whole_traces(grad) for one in _scaler_lost(trace, thresholds)]


def _bad_steps(trace: Trace) -> list[int]:
    names = [
        name
        for name in ("nonfinite", "has_nan", "has_inf", "l2_nonfinite")
        if name in trace.rows.columns
    ]
    rows = zip(trace.steps, *(trace.numbers(name) for name in names), strict=True)
    return [int(step) for step, *marks in rows if any(mark > 0 for mark in marks)]


def _first_name(traces: list[Trace], step: int, component: str | None = None) -> str | None:
    for trace in traces:
        if component in (None, trace.component) and step in trace.steps:
            name = trace.words("first_nonfinite")[trace.steps.index(step)]
            if name:
                return name
    return None


def _taken(
    bad: dict[int, list[str]],
    traces: list[Trace],
    whole: list[Trace],
    t: NonfiniteGradient,
    row: dict[str, Any],
) -> Finding:
    steps = sorted(bad)
    first, last = steps[0], max([step for trace in traces + whole for step in trace.steps])
    parameter = _first_name(whole, first) or _first_name(traces, first)
    named = [name for name in bad[first] if _first_name(traces, first, name) == parameter]
    component = next(iter([*named, *bad[first]]), None)
    others = [name for name in bad[first] if name != component]
    lasting = len(steps) >= t.lasting_rows or steps[-1] == last
    where = f" in `{component}`" if component else ""
    which = f", first in the parameter `{parameter}`" if parameter else ""
    also = f"; also in {_listed(others)}" if others else ""
    after = "" if lasting else " The rows after it are finite again."
    return Finding(
        rule="nonfinite_gradient",
        severity="critical" if lasting else "warning",
        component=component,
        first_step=min(first, row.get("step", first)),
        last_step=steps[-1],
        observed=float(len(steps)),
        threshold=t.min_rows,
        unit="measured steps with NaN or infinity",
        evidence=Evidence(GRAD_FILE, evidence_steps(steps)),
        message=(
            f"At step {first} the gradient held {_kind(whole, first)}{where}{which}{also}. "
            f"{_count(len(steps), 'measured step')} had this and changed the weights.{after}"
            f"{sentence(row)}"
        ),
        suggestion=advice(row) + _SUGGESTION,
        confidence=1.0 if lasting else 0.8,
    )


def _replayed(row: dict[str, Any]) -> Finding:
    """What is known where no row of gradients was written at a step that was not finite."""
    step = int(row["step"])
    return Finding(
        rule="nonfinite_gradient",
        severity="warning",
        component=None,
        first_step=step,
        last_step=step,
        observed=1.0,
        threshold=1.0,
        unit="steps with NaN or infinity",
        evidence=Evidence(NONFINITE_FILE, (step,)),
        message=f"At step {step} the gradient held NaN or infinity.{sentence(row)}",
        suggestion=advice(row) + _SUGGESTION,
        confidence=0.9,
    )


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _kind(whole: list[Trace], step: int) -> str:
    for trace in whole:
        if step in trace.steps:
            at = trace.steps.index(step)
            nan, inf = (trace.numbers(name)[at] > 0 for name in ("has_nan", "has_inf"))
            if nan != inf:
                return "NaN" if nan else "infinity"
    return "NaN or infinity"


def _scaler_lost(trace: Trace, t: NonfiniteGradient) -> list[Finding]:
    steps, scale = trace.steps, trace.numbers("scale")
    skipped = [mark > 0 for mark in trace.numbers("skipped")]
    spent = [mark and one <= t.spent_scale for mark, one in zip(skipped, scale, strict=True)]
    runs = [run for run in streaks(skipped) if run[1] - run[0] >= t.skipped_rows]
    runs += [run for run in streaks(spent) if run[1] - run[0] >= t.spent_rows]
    if not runs:
        return []
    start, stop = min(runs)
    return [
        Finding(
            rule="nonfinite_gradient",
            severity="critical",
            component=None,
            first_step=steps[start],
            last_step=steps[stop - 1],
            observed=float(stop - start),
            threshold=t.skipped_rows,
            unit="measured steps skipped in a row",
            evidence=Evidence(GRAD_FILE, evidence_steps(steps[start:stop])),
            message=(
                f"From step {steps[start]} on the gradient scaler skipped "
                f"{_count(stop - start, 'measured step')} in a row: the gradient is not finite at "
                "any scale, and the model learns nothing."
            ),
            suggestion=_SUGGESTION,
            confidence=0.9,
        )
    ]
