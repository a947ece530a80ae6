"""Updates that are large in proportion to the weights they change."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_series import Losses, training_losses
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import lower_rate
from lightning_diag.rules.traces import evidence_steps, streaks
from lightning_diag.rules.update_traces import (
    UPDATE_FILE,
    Updates,
    middle,
    update_traces,
    weighty,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = ["UpdateTooLarge", "update_too_large"]

_SUGGESTION = (
    "Lower the learning rate (0.3 times is a good first try), for this part alone where the others "
    "are calm, and warm it up over the first few hundred steps. If it began at one step, look at "
    "the gradient and at the batch of that step; clipping the gradient norm limits the harm."
)


@dataclass(frozen=True)
class UpdateTooLarge:
    """Thresholds of `update_too_large`."""

    max_ratio: float = field(default=0.1, metadata={"unit": "update over weight"})
    lost_ratio: float = field(default=1.0, metadata={"unit": "update over weight"})
    early_ratio: float = field(default=0.3, metadata={"unit": "update over weight"})
    early_steps: float = field(default=50, metadata={"unit": "steps"})
    min_rows: float = field(default=4, metadata={"unit": "rows"})
    max_jump: float = field(default=30.0, metadata={"unit": "times its own median"})
    jump_ratio: float = field(default=0.1, metadata={"unit": "update over weight"})
    leap: float = field(default=2.0, metadata={"unit": "times the size of the weights"})
    least_size: float = field(default=0.01, metadata={"unit": "root mean square of the weights"})
    min_count: float = field(default=50, metadata={"unit": "elements"})
    learns: float = field(default=0.6, metadata={"unit": "share of the loss at the start"})
    most: float = field(default=0.5, metadata={"unit": "share of components"})


@rule(
    "update_too_large",
    family="updates",
    needs=("update", "loss", "metrics"),
    thresholds=UpdateTooLarge,
    explains=(
        *("divergence", "loss_spike", "loss_oscillation", "nonfinite_loss"),
        *("nonfinite_gradient", "exploding_gradient", "dead_relu", "saturated_activation"),
    ),
    reference="About 1e-3 is the rule of thumb: Karpathy, A recipe for training neural networks, "
    "and CS231n. SageMaker Debugger's WeightUpdateRatio warns at 10 only.",
    remedy=lower_rate,
)
def update_too_large(
    update: "pl.DataFrame",
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    thresholds: UpdateTooLarge,
) -> list[Finding]:
    """Steps that change a component by more than a tenth of its size, row after row.

    Components of a few elements and such that start from zero are left out: their ratio says
    nothing. The first steps of Adam are larger than all later ones, so more is allowed there, and
    where the loss falls all the same it is only noted.
    """
    traces = weighty(update_traces(update), thresholds.min_count)
    learns = _learns(training_losses(loss, metrics), thresholds)
    large = [one for one in traces if _span(one, thresholds) is not None]
    if len(large) > 1 and len(large) > thresholds.most * len(traces):
        return [_lasting(large, None, learns, thresholds)]
    found = [_lasting([one], one.component, learns, thresholds) for one in large]
    return found or _jumped(traces, thresholds) or _leapt(traces, thresholds)


def _learns(losses: Losses | None, t: UpdateTooLarge) -> bool:
    """Whether the loss is far below its start, and near its best."""
    means = losses.means if losses else []
    if len(means) < 4 or any(math.isnan(one) for one in means) or not means[0] > 0:
        return False
    now = median(means[-3:])
    best = min(median(means[i : i + 3]) for i in range(len(means) - 2))
    return now < t.learns * means[0] and now < 2 * best


def _span(trace: Updates, t: UpdateTooLarge) -> tuple[int, int] | None:
    """The longest stretch of rows that are too large, as half-open indices."""
    flags = [
        ratio > (t.early_ratio if step < t.early_steps else t.max_ratio)
        for step, ratio in zip(trace.steps, trace.ratios, strict=True)
    ]
    spans = [one for one in streaks(flags) if one[1] - one[0] >= t.min_rows]
    return max(spans, key=lambda one: one[1] - one[0], default=None)


def _lasting(
    large: list[Updates], component: str | None, learns: bool, t: UpdateTooLarge
) -> Finding:
    spans = [(one, span) for one in large if (span := _span(one, t)) is not None]
    steps = sorted({step for one, (a, b) in spans for step in one.steps[a:b]})
    usual = max(middle(one.ratios[a:b]) for one, (a, b) in spans)
    # large from the start may be what it takes to learn; a leap in the middle of a run is not
    leapt = any(jump > t.max_jump for one, (a, b) in spans for jump in one.jumps[a:b])
    harmless = learns and not leapt
    severity: Severity = "info" if harmless else "critical" if usual > t.lost_ratio else "warning"
    still = " The loss falls all the same." if learns else ""
    name = "most parts of the model" if component is None else f"`{component}`"
    worst = max(spans, key=lambda pair: middle(pair[0].ratios[pair[1][0] : pair[1][1]]))[0]
    which = f", most of all `{worst.component}`" if component is None else ""
    return Finding(
        rule="update_too_large",
        severity=severity,
        component=component,
        first_step=steps[0],
        last_step=steps[-1],
        observed=usual,
        threshold=t.max_ratio,
        unit="update over weight",
        evidence=Evidence(UPDATE_FILE, evidence_steps(steps)),
        message=(
            f"Each step changes {name} by {usual:.2g} of the size of its weights{which}, at "
            f"{len(steps)} measured steps from step {steps[0]} on. About 0.001 is usual; a step "
            f"above 0.1 overwrites what was learned before.{still}"
        ),
        suggestion=_SUGGESTION,
        confidence=0.9,
    )


def _leapt(traces: list[Updates], t: UpdateTooLarge) -> list[Finding]:
    """Weights that are another size than the steps on both sides can have made them: a note.

    What did it, or what came of it, has a rule of its own.
    """
    leaps = []
    for trace in traces:
        rows = list(zip(trace.steps, trace.ratios, trace.sizes, strict=True))
        for (before, small, old), (step, large, new) in pairwise(rows):
            unknown = any(math.isnan(one) for one in (small, large, old, new))
            if unknown or old < t.least_size or new < t.leap * old:
                continue
            # three times what the larger of both ratios makes of all steps between them
            if 3 * max(small, large) * (step - before) < math.log(new / old):
                leaps.append((trace.component, before, step, new / old))
    if not leaps:
        return []
    component, before, step, times = max(leaps, key=lambda one: one[3])
    several = len({name for name, *_ in leaps}) > t.most * len(traces) > 1
    name = "most parts of the model" if several else f"`{component}`"
    return [
        Finding(
            rule="update_too_large",
            severity="info",
            component=None if several else component,
            first_step=before + 1,
            last_step=step,
            observed=times,
            threshold=t.leap,
            unit="times its size",
            evidence=Evidence(UPDATE_FILE, (before, step)),
            message=(
                f"Between the steps {before} and {step} the weights of {name} became {times:.3g} "
                "times as large, far more than the steps that were measured on both sides add up "
                "to: a single step there, or something that wrote into them, has overwritten them."
            ),
            suggestion=(
                "Look at what happened there: an optimizer whose moments were lost or reset (a "
                "checkpoint without its state), a rate that leapt for a step, weights that were "
                "loaded or rescaled. Warm the rate up again after such a change."
            ),
            confidence=0.7,
        )
    ]


def _jumped(traces: list[Updates], t: UpdateTooLarge) -> list[Finding]:
    found = []
    for trace in traces:
        rows = list(zip(trace.steps, trace.jumps, trace.ratios, strict=True))
        jumps = [row for row in rows if row[1] > t.max_jump and row[2] > t.jump_ratio]
        if not jumps:
            continue
        step, jump, ratio = max(jumps, key=lambda row: row[1])
        lone = len(jumps) == 1 and not ratio > t.lost_ratio and not math.isinf(jump)
        found.append(
            Finding(
                rule="update_too_large",
                severity="info" if lone else "warning",
                component=trace.component,
                first_step=jumps[0][0],
                last_step=jumps[-1][0],
                observed=jump,
                threshold=t.max_jump,
                unit="times its own median",
                evidence=Evidence(UPDATE_FILE, evidence_steps(one[0] for one in jumps)),
                message=(
                    f"At step {step} `{trace.component}` was changed by {ratio:.2g} of the size of "
                    f"its weights, {jump:.3g} times its usual update."
                ),
                suggestion=_SUGGESTION,
                confidence=0.6,
            )
        )
    return found
