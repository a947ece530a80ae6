"""Components whose gradients differ so much that one of them is left behind."""

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from lightning_diag.rules.finding import Evidence, Finding
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import boost_component
from lightning_diag.rules.sizes import Size, is_tiny, ratio, sizes_by_step, typical_others
from lightning_diag.rules.traces import (
    GRAD_FILE,
    after_warmup,
    component_traces,
    evidence_steps,
    without_skipped,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = ["GradientImbalance", "gradient_imbalance"]


@dataclass(frozen=True)
class GradientImbalance:
    """Thresholds of `gradient_imbalance`."""

    noted_ratio: float = field(default=10.0, metadata={"unit": "times the typical component"})
    max_ratio: float = field(default=1000.0, metadata={"unit": "times the typical component"})
    min_elements: float = field(default=8, metadata={"unit": "elements of a part"})
    min_rows: float = field(default=5, metadata={"unit": "rows"})
    min_share: float = field(default=0.8, metadata={"unit": "share of rows"})
    warmup_rows: float = field(default=2, metadata={"unit": "rows"})
    warmup_share: float = field(default=0.1, metadata={"unit": "share of rows"})


class _Gap(NamedTuple):
    component: str
    smaller: bool
    steps: list[int]
    times: float


@rule(
    "gradient_imbalance",
    family="gradients",
    needs="grad",
    thresholds=GradientImbalance,
    reference="Reference systems: 10 times. Layer-wise ratios: You et al. 2017, LARS, section 4.",
    remedy=boost_component,
)
def gradient_imbalance(grad: "pl.DataFrame", thresholds: GradientImbalance) -> list[Finding]:
    """Components far from the typical one, in norm and in rms, on nearly every row.

    A ratio of `noted_ratio` is common in healthy models and only noted, for the worst component;
    `max_ratio` is a warning for each. Components without any gradient are for `dead_component`.
    """
    traces = component_traces(without_skipped(grad))
    table = sizes_by_step(one for one in traces if not is_tiny(one, thresholds.min_elements))
    steps = [step for step in sorted(table) if len(table[step]) > 1]
    steps = steps[after_warmup(len(steps), thresholds.warmup_rows, thresholds.warmup_share) :]
    gaps = _gaps({step: table[step] for step in steps}, thresholds)
    gaps.sort(key=lambda gap: (-gap.times, not gap.smaller))
    extreme = [gap for gap in gaps if gap.times >= thresholds.max_ratio]
    if len(extreme) > 1 and _two_sides(extreme):
        extreme = extreme[:1]
    return [_finding(gap, thresholds) for gap in extreme or gaps[:1]]


def _two_sides(gaps: list[_Gap]) -> bool:
    """Whether two components see each other from both sides, which is one gap told twice."""
    return len(gaps) == 2 and gaps[0].smaller != gaps[1].smaller


def _gaps(table: dict[int, dict[str, Size]], t: GradientImbalance) -> list[_Gap]:
    below: dict[str, dict[int, float]] = defaultdict(dict)
    above: dict[str, dict[int, float]] = defaultdict(dict)
    for step, sizes in table.items():
        for name, typical in typical_others(sizes).items():
            below[name][step] = ratio(typical, sizes[name])
            above[name][step] = ratio(sizes[name], typical)
    found = []
    for smaller, sides in ((True, below), (False, above)):
        for name, times in sides.items():
            typical_times = median(times.values())
            wide = [step for step, one in times.items() if one >= t.noted_ratio]
            enough = len(wide) >= t.min_rows and len(wide) >= t.min_share * len(times)
            if enough and typical_times >= t.noted_ratio:
                found.append(_Gap(name, smaller, wide, typical_times))
    return found


def _finding(gap: _Gap, t: GradientImbalance) -> Finding:
    extreme = gap.times >= t.max_ratio
    side = "smaller" if gap.smaller else "larger"
    harmless = "" if extreme else " Ratios of this size are common and by themselves harmless."
    return Finding(
        rule="gradient_imbalance",
        severity="warning" if extreme else "info",
        component=gap.component,
        first_step=gap.steps[0],
        last_step=gap.steps[-1],
        observed=gap.times,
        threshold=t.max_ratio if extreme else t.noted_ratio,
        unit=f"times {side} than the typical component, by norm and by rms",
        evidence=Evidence(GRAD_FILE, evidence_steps(gap.steps)),
        message=(
            f"The gradient of `{gap.component}` is {gap.times:,.0f} times {side} than that of "
            f"the other parts.{harmless}"
        ),
        suggestion=_SUGGESTIONS[gap.smaller],
        confidence=0.7 if extreme else 0.5,
    )


_SUGGESTIONS = {
    True: (
        "With plain SGD this part learns far more slowly than the others: give it a learning rate "
        "of its own. With Adam the step size hardly depends on it, but look for a loss weight "
        "that is too small, or for layers between this part and the loss that swallow the gradient."
    ),
    False: (
        "This part decides the global norm, so that clipping shrinks everyone else's step for its "
        "sake: look at the scale of its inputs and initial weights, or weigh its loss less. With "
        "plain SGD give it a lower learning rate of its own."
    ),
}
