"""A component that gets no gradient at all."""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from lightning_diag.rules.consequences import STANDSTILL
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import usual_settings
from lightning_diag.rules.traces import (
    GRAD_FILE,
    Trace,
    component_traces,
    evidence_steps,
    streaks,
    without_skipped,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = ["DeadComponent", "dead_component"]


@dataclass(frozen=True)
class DeadComponent:
    """Thresholds of `dead_component`."""

    min_rows: float = field(default=3, metadata={"unit": "rows in a row, up to the last"})
    longer_than_before: float = field(default=3.0, metadata={"unit": "times the longest earlier"})
    faded_l2: float = field(default=0.01, metadata={"unit": "share of the usual l2 norm"})


@rule(
    "dead_component",
    family="gradients",
    needs="grad",
    thresholds=DeadComponent,
    explains=(
        "unused_parameter",
        "divergence",
        "loss_spike",
        "representation_collapse",
        "gradient_imbalance",
        "vanishing_gradient",
        *STANDSTILL,
    ),
    reference="SageMaker Debugger's AllZero; Lu et al. 2019, Dying ReLU and initialization.",
    remedy=usual_settings,
)
def dead_component(grad: "pl.DataFrame", thresholds: DeadComponent) -> list[Finding]:
    """Trainable components without gradient, by zeros or by absence, up to the last rows.

    A frozen component is not sick. One that is used now and then is dead only if it has been
    silent for `longer_than_before` times its longest earlier silence.
    """
    traces = component_traces(without_skipped(grad))
    alive = {
        step
        for trace in traces
        for step, l2, bad in _columns(trace, "l2", "nonfinite")
        if l2 > 0 or bad > 0
    }
    found = [_judge(trace, alive, thresholds) for trace in traces]
    findings = [one for one in found if one is not None]
    return findings or _all_silent(traces, alive, thresholds)


def _columns(trace: Trace, first: str, second: str) -> list[tuple[int, float, float]]:
    return list(zip(trace.steps, trace.numbers(first), trace.numbers(second), strict=True))


def _silent(trace: Trace) -> list[tuple[int, bool]]:
    """Step and whether no gradient came, of the rows in which something was trainable."""
    names = ("l2", "nonfinite", "tensors", "count", "missing")
    found = []
    for step, *row in zip(trace.steps, *(trace.numbers(name) for name in names), strict=True):
        l2, nonfinite, tensors, count, missing = row
        received = tensors > 0 or count > 0
        if received or missing > 0:
            found.append((step, nonfinite == 0 and not (received and (l2 > 0 or math.isnan(l2)))))
    return found


def _last_silence(flags: list[bool], t: DeadComponent) -> int | None:
    """Where the silence begins that lasts to the end, if it is long enough."""
    found = streaks(flags)
    if not found or found[-1][1] != len(flags):
        return None
    length = found[-1][1] - found[-1][0]
    before = max((stop - start for start, stop in found[:-1]), default=0)
    return found[-1][0] if length >= max(t.min_rows, t.longer_than_before * before) else None


def _judge(trace: Trace, alive: set[int], t: DeadComponent) -> Finding | None:
    rows = [(step, silent) for step, silent in _silent(trace) if step in alive]
    start = _last_silence([silent for _, silent in rows], t)
    if start is None:
        return None
    name, steps = str(trace.component), [step for step, _ in rows[start:]]
    at = trace.steps.index(steps[-1])
    absent = not trace.numbers("count")[at] > 0 and not trace.numbers("tensors")[at] > 0
    return Finding(
        rule="dead_component",
        severity="critical",
        component=name,
        first_step=steps[0],
        last_step=steps[-1],
        observed=0.0,
        threshold=0.0,
        unit="l2 norm",
        evidence=Evidence(GRAD_FILE, evidence_steps(steps)),
        message=_message(name, steps, absent, start > 0, trace.words("first_missing")[at]),
        suggestion=_SUGGESTIONS[absent],
        confidence=0.95,
    )


_SUGGESTIONS = {
    True: (
        "Look for `.detach()`, `torch.no_grad()`, `.item()` or a NumPy detour between this part "
        "and the loss, or a forward pass that never calls it. If it is meant to rest, freeze it "
        "with `requires_grad_(False)` and leave it out of the optimizer."
    ),
    False: (
        "The part is connected, but what comes back is exactly zero: look for ReLUs that never "
        "fire (lower the learning rate, use GELU or LeakyReLU), a multiplication by zero such as "
        "a gate or loss weight of 0, a clamp or argmax. A component that should rest is frozen "
        "with `requires_grad_(False)`."
    ),
}


def _message(name: str, steps: list[int], absent: bool, later: bool, first: str | None) -> str:
    since = f"since step {steps[0]}" if later else "from the first measured step on"
    if absent:
        example = f" (the first is `{first}`)" if first else ""
        return (
            f"No gradient reaches `{name}` {since}: its parameters{example} are trainable, but the "
            "loss does not depend on them. It learns nothing."
        )
    return (
        f"The gradient of `{name}` is exactly zero {since}, while other parts get theirs. "
        "It learns nothing."
    )


def _all_silent(traces: list[Trace], alive: set[int], t: DeadComponent) -> list[Finding]:
    loud = set(alive)
    rows = [row for trace in traces for row in _silent(trace)]
    loud.update(step for step, silent in rows if not silent)
    steps = sorted({step for step, _ in rows})
    start = _last_silence([step not in loud for step in steps], t)
    if start is None:
        return []
    severity: Severity = "critical" if start == 0 else "warning"
    since = "from the first measured step on" if start == 0 else f"since step {steps[start]}"
    if start > 0 and _faded(traces, steps[:start], t):
        severity = "info"
    return [
        Finding(
            rule="dead_component",
            severity=severity,
            first_step=steps[start],
            last_step=steps[-1],
            observed=0.0,
            threshold=0.0,
            unit="l2 norm",
            evidence=Evidence(GRAD_FILE, evidence_steps(steps[start:])),
            message=f"No part of the model gets a gradient {since}: nothing is learned any more.",
            suggestion=(
                "Check that the loss depends on the model's output and is not constant (a hinge or "
                "clamp that is fully satisfied, an output that saturates). If the loss has reached "
                "its minimum, training can stop here."
            ),
            confidence=0.9 if start == 0 else 0.6,
        )
    ]


def _faded(traces: list[Trace], before: list[int], t: DeadComponent) -> bool:
    """Whether the last gradients before the silence had become small, as in convergence."""
    largest = dict.fromkeys(before, 0.0)
    for trace in traces:
        for step, l2 in zip(trace.steps, trace.numbers("l2"), strict=True):
            if step in largest and l2 > largest[step]:
                largest[step] = l2
    norms = [norm for norm in largest.values() if norm > 0]
    return bool(norms) and median(norms[-3:]) < t.faded_l2 * median(
        norms[: max(3, len(norms) // 4)]
    )
