"""The chart that shows a finding: the series it rests on, and the step at which it began."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_diag.report import evidence_inside as inside
from lightning_diag.report import evidence_training as training
from lightning_diag.report.annotations import Onset
from lightning_diag.report.evidence import Shown
from lightning_diag.report.series import Panel, line_chart
from lightning_diag.report.words import cut
from lightning_diag.rules.finding import Finding

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["evidence_chart"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_WIDTH = 400
_POINTS = 500  # a line: half a page wide
_LONG = 60  # characters of a title
_LEGEND = 36
_FROM_THE_START = 1

Show = Callable[["Run", Finding], Shown]

_RULES: dict[str, Show] = {
    **dict.fromkeys(("clipping_dominates",), training.clipping),
    **dict.fromkeys(("learning_rate_too_high", "learning_rate_too_low"), training.learning_rate),
    "scheduler_misuse": training.schedule,
    "constant_prediction": inside.outputs,
    **dict.fromkeys(("input_bound", "memory_growth", "gpu_underused"), inside.machine),
}
_FILES: dict[str, Show] = {
    "grad": training.gradients,
    "update": training.updates,
    "loss": training.losses,
    "metrics": training.losses,
    "nonfinite": training.losses,
    "activation": inside.activations,
    "latent": inside.representation,
    "attention": inside.attention,
    "attention_head": inside.attention,
    "wiring": inside.wiring,
}
_OTHERWISE: dict[str, Show] = {
    "nonfinite_gradient": training.gradients,
    "nonfinite_loss": training.losses,
    "exploding_gradient": training.gradients,
}


def evidence_chart(run: "Run", finding: Finding) -> Chart | None:
    """The rows that a finding rests on, of the part that it is about.

    The step at which it began is marked, with the threshold and the usual range where the axis
    shows their unit.

    Args:
        run: What `read_run` returned.
        finding: One of those that `diagnose` found in it.

    Returns:
        None where the run has no rows that show it, or none that can be drawn.
    """
    file = finding.evidence.file.rpartition("/")[2].removesuffix(".jsonl")
    show = _RULES.get(finding.rule) or _OTHERWISE.get(finding.rule) or _FILES.get(file)
    shown = Shown("", []) if show is None else show(run, finding)
    panels = [panel for panel in shown.panels if _has_values(panel)]
    if not panels or panels[0] is not shown.panels[0]:
        return None
    return line_chart(
        cut(shown.title, _LONG),
        [_short_names(panel) for panel in panels],
        said=shown.said,
        onset=_onset(finding),
        plot_width=_WIDTH,
        most_points=_POINTS,
    )


def _has_values(panel: Panel) -> bool:
    lines = [*panel.series.values(), *panel.others.values()]
    known = (value for line in lines for _, value in line if value is not None)
    return any(map(math.isfinite, known)) or any(panel.marks.values())


def _short_names(panel: Panel) -> Panel:
    """Names as long as a legend has room for, unless two would be the same."""
    series = {cut(name, _LEGEND): line for name, line in panel.series.items()}
    return replace(panel, series=series) if len(series) == len(panel.series) else panel


def _onset(finding: Finding) -> Onset | None:
    first, last = finding.first_step, finding.last_step
    if first is None:
        return None
    words = "from the start" if first <= _FROM_THE_START else f"began at step {first}"
    return Onset(first, first if last is None else last, words)
