"""Updates that are so small that the weights stay where they are."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.finding import Evidence, Finding
from lightning_diag.rules.loss_series import training_losses
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import raise_rate
from lightning_diag.rules.traces import Trace, after_warmup, component_traces, evidence_steps
from lightning_diag.rules.update_traces import (
    UPDATE_FILE,
    Updates,
    middle,
    update_traces,
    weighty,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = ["UpdateTooSmall", "update_too_small"]


@dataclass(frozen=True)
class UpdateTooSmall:
    """Thresholds of `update_too_small`."""

    min_ratio: float = field(default=1e-6, metadata={"unit": "update over weight"})
    others_ratio: float = field(default=1e-3, metadata={"unit": "update over weight of others"})
    ever_ratio: float = field(default=1e-3, metadata={"unit": "update over weight"})
    rate_share: float = field(default=0.2, metadata={"unit": "share of the highest rate"})
    unchanged: float = field(default=0.9, metadata={"unit": "share of elements"})
    unchanged_ratio: float = field(default=1e-2, metadata={"unit": "update over weight"})
    min_rows: float = field(default=3, metadata={"unit": "rows"})
    min_share: float = field(default=0.8, metadata={"unit": "share of rows"})
    warmup_rows: float = field(default=2, metadata={"unit": "rows"})
    warmup_share: float = field(default=0.05, metadata={"unit": "share of rows"})
    learned_fall: float = field(default=0.5, metadata={"unit": "share of the loss"})
    min_count: float = field(default=50, metadata={"unit": "elements"})
    most: float = field(default=0.5, metadata={"unit": "share of components"})


@rule(
    "update_too_small",
    family="updates",
    needs=("update", "grad", "loss", "metrics"),
    thresholds=UpdateTooSmall,
    explains=(
        "constant_prediction",
        "frozen_weights",
        "not_learning",
        "slow_convergence",
        "loss_plateau",
    ),
    reference="SageMaker Debugger's WeightUpdateRatio warns below 1e-8; about 1e-3 is usual. "
    "Rounding: Gupta et al. 2015, Deep learning with limited numerical precision, section 4.",
    remedy=raise_rate,
)
def update_too_small(
    update: "pl.DataFrame",
    grad: "pl.DataFrame",
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    thresholds: UpdateTooSmall,
) -> list[Finding]:
    """Steps at full learning rate that do not move a component, though it has a gradient.

    Rows at less than a fifth of the highest rate do not count: a warm-up and the end of a decay are
    meant to be small. A run whose loss has fallen to less than half has converged: then it is only
    noted.
    """
    gradients = {one.component: one for one in component_traces(grad)}
    traces = weighty(update_traces(update), thresholds.min_count)
    judged = [(one, _judge(one, gradients.get(one.component), thresholds)) for one in traces]
    tiny = [(one, rows) for one, (rows, kind) in judged if kind == "tiny"]
    rounded = [(one, rows) for one, (rows, kind) in judged if kind == "rounded"]
    stopped = [(one, rows) for one, (rows, kind) in judged if kind == "stopped"]
    losses = training_losses(loss, metrics)
    known = [one for one in losses.means if not math.isnan(one)] if losses else []
    # the first window may have converged already: its highest loss is that of the start
    start = max(losses.highs[0], known[0]) if losses and known else 0.0
    fall = 1.0 - middle(known[-3:]) / start if len(known) > 3 and start > 0 else 0.0
    learned = fall > thresholds.learned_fall
    if losses and any(math.isnan(one) for one in losses.means):
        return []
    found = []
    for kind, those in (("tiny", tiny), ("rounded", rounded)):
        if len(those) > 1 and len(those) > thresholds.most * len(traces):
            found.append(_finding(kind, those, None, learned, thresholds))
        else:
            for one in those:
                # what the others have learned is no excuse for a part that they leave behind
                alone = kind == "tiny" and _left_behind(one[0], traces, thresholds)
                excused = learned and not alone
                found.append(_finding(kind, [one], one[0].component, excused, thresholds))
    if len(stopped) < len(traces):
        found += [_stopped_finding(one, steps, thresholds) for one, steps in stopped]
    return found


def _left_behind(trace: Updates, traces: list[Updates], t: UpdateTooSmall) -> bool:
    others = [middle(one.ratios) for one in traces if one is not trace]
    return any(ratio > t.others_ratio for ratio in others)


def _judge(trace: Updates, gradient: Trace | None, t: UpdateTooSmall) -> tuple[list[int], str]:
    """The steps that show it, and what they show: ``"tiny"``, ``"rounded"`` or nothing."""
    top = max((one for one in trace.rates if not math.isnan(one)), default=math.nan)
    skip = after_warmup(len(trace.steps), t.warmup_rows, t.warmup_share)
    columns = (trace.steps, trace.ratios, trace.unchanged, trace.rates)
    rows = [
        (step, ratio, unchanged)
        for step, ratio, unchanged, rate in list(zip(*columns, strict=True))[skip:]
        if not math.isnan(ratio) and not rate < t.rate_share * top and not rate <= 0
    ]
    enough = max(t.min_rows, t.min_share * len(rows))
    zeros = 0.0
    if gradient is not None:
        norms = [one for one in gradient.numbers("l2") if not math.isnan(one)]
        zeros = middle(gradient.numbers("zeros"))
        zeros = 0.0 if math.isnan(zeros) else zeros
        if norms and max(norms) == 0.0:
            return [], ""
    since = _stopped([row[:3] for row in list(zip(*columns, strict=True))[skip:]], gradient)
    if len(since) >= t.min_rows:
        return since, "stopped"
    tiny = [step for step, ratio, _ in rows if ratio < t.min_ratio]
    if len(tiny) >= enough:
        # what moved once and stands still now has died or blown up, which is another matter
        return ([], "") if max(row[1] for row in rows) > t.ever_ratio else (tiny, "tiny")
    # elements without a gradient, as of words that were not in the batch, need not move
    rounded = [
        step
        for step, ratio, unchanged in rows
        if ratio < t.unchanged_ratio
        and zeros < 0.5
        and unchanged - zeros > t.unchanged * (1.0 - zeros)
    ]
    return (rounded, "rounded") if len(rounded) >= enough and gradient is not None else ([], "")


def _stopped(rows: list[tuple[int, float, float]], gradient: Trace | None) -> list[int]:
    """The last steps at which nothing moved at all, where it had moved and still has a gradient."""
    if gradient is None:
        return []
    norms = dict(zip(gradient.steps, gradient.numbers("l2"), strict=True))
    since: list[int] = []
    for step, ratio, unchanged in reversed(rows):
        if ratio != 0.0 or unchanged < 1.0 or not norms.get(step, math.nan) > 0:
            break
        since.insert(0, step)
    return since if len(since) < len(rows) else []


def _stopped_finding(trace: Updates, steps: list[int], t: UpdateTooSmall) -> Finding:
    rates = dict(zip(trace.steps, trace.rates, strict=True))
    zero = all(rates[step] == 0.0 for step in steps)
    why = " Its learning rate is zero since then." if zero else ""
    return Finding(
        rule="update_too_small",
        severity="warning",
        component=trace.component,
        first_step=steps[0],
        last_step=steps[-1],
        observed=0.0,
        threshold=t.min_ratio,
        unit="update over weight",
        evidence=Evidence(UPDATE_FILE, evidence_steps(steps)),
        message=(
            f"Not one weight of `{trace.component}` has moved since step {steps[0]}, though it has "
            f"a gradient and other parts move on.{why}"
        ),
        suggestion=(
            "If this part is meant to rest from there on, freeze it with `requires_grad_(False)`, "
            "which saves its backward pass. Otherwise look at the rate of its parameter group, and "
            "at what writes its weights back."
        ),
        confidence=0.8,
    )


def _finding(
    kind: str,
    those: list[tuple[Updates, list[int]]],
    component: str | None,
    learned: bool,
    t: UpdateTooSmall,
) -> Finding:
    steps = sorted({step for _, rows in those for step in rows})
    name = "most parts of the model" if component is None else f"`{component}`"
    since = f"at {len(steps)} measured steps since step {steps[0]}"
    ratio = middle(r for one, _ in those for r in one.ratios)
    unchanged = middle(r for one, _ in those for r in one.unchanged)
    tiny = kind == "tiny"
    message = (
        f"A step changes {name} by only {ratio:.2g} of the size of its weights, {since}, at full "
        "learning rate and with a gradient. About 0.001 is usual; so it stays where it started."
        if tiny
        else f"{unchanged:.0%} of the weights of {name} do not change at all in a step, {since}: "
        "the updates are smaller than what the weights' number format can hold, and are rounded "
        "away."
    )
    suggestion = (
        "Raise the learning rate, for this part alone where the others move. If its gradient is "
        "tiny too, see why it does not arrive (depth without residuals, saturation, a weight of "
        "the loss); an optimizer that normalizes the gradient, like Adam, helps as well."
        if tiny
        else "Keep the weights in float32 and compute in half precision (`bf16-mixed` in place of "
        "`bf16-true`), or raise the learning rate."
    )
    return Finding(
        rule="update_too_small",
        severity="info" if learned else "warning",
        component=component,
        first_step=steps[0],
        last_step=steps[-1],
        observed=ratio if tiny else unchanged,
        threshold=t.min_ratio if tiny else t.unchanged,
        unit="update over weight" if tiny else "share of elements that do not change",
        evidence=Evidence(UPDATE_FILE, evidence_steps(steps)),
        message=message,
        suggestion=suggestion,
        confidence=0.8,
    )
