"""Evidence in gradients, updates, learning rates and losses."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_diag.report.evidence import (
    BAND,
    HEIGHT,
    LOW,
    Line,
    Shown,
    by_component,
    is_wide,
    marked,
    numbers,
    split,
    threshold,
)
from lightning_diag.report.flow_data import HEALTHY
from lightning_diag.report.norms import WHOLE
from lightning_diag.report.series import Panel
from lightning_diag.report.words import short
from lightning_diag.rules.finding import Finding
from lightning_diag.rules.loss_series import (
    Losses,
    first_loss,
    training_losses,
    validation_losses,
)
from lightning_diag.rules.traces import Trace, component_traces, whole_traces

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = [
    "clipping",
    "gradients",
    "learning_rate",
    "loss_panel",
    "losses",
    "schedule",
    "updates",
]

_NORM = "gradient norm (l2)"
_RATIO = "update / weight"
_USUAL_RATIO = (1e-4, 1e-2)
_NORM_UNITS = (
    *("l2 norm", "l2 norm before clipping", "median l2 norm before clipping", "mean l2 norm"),
    *("mean l2 norm of the largest component", "median l2 norm of the smallest weight matrix"),
    "smallest l2 norm of one tensor",
)
_COLUMNS = {
    "median l2 norm of the smallest weight matrix": ("matrix_min", "smallest weight matrix"),
    "smallest l2 norm of one tensor": ("min_norm", "smallest tensor"),
}
_LOSS_UNITS = ("mean loss", "loss", "validation loss")
_LEAPS = ("loss_spike", "loss_oscillation", "nonfinite_loss")
_WITH_VALIDATION = ("overfitting", "divergence")
_FROM_THE_START = ("not_learning", "slow_convergence")


def gradients(run: "Run", finding: Finding) -> Shown:
    """The gradient norm of the component that is meant, with the others behind it."""
    grad = run.frame("grad")
    if finding.evidence.file.endswith("loss.jsonl") or grad.is_empty():
        return _norm_beside_loss(run, finding)
    column, name = _COLUMNS.get(finding.unit, ("l2", ""))
    whole = [trace for trace in whole_traces(grad) if column in trace.rows.columns]
    parts = component_traces(grad) if column == "l2" else []
    lines: dict[str | None, Line] = {one.component: _line(one, column) for one in parts}
    if whole:
        lines[None] = sorted(point for one in whole for point in _line(one, column))
    focus, line, others = split(lines, finding.component)
    rules = {label: value for label, value in threshold(finding, _NORM_UNITS).items() if value > 0}
    marks = {"NaN or infinite": marked(_bad([*parts, *whole], finding.component))}
    marks["zero"] = marked(step for step, value in line if value == 0)
    marks["skipped"] = marked(step for one in whole for step in _where(one, "skipped"))
    panel = Panel(
        _NORM,
        {name or focus: line},
        log=True,
        band=HEALTHY,
        rules=rules,
        marks={label: steps for label, steps in marks.items() if steps},
        others=others,
        height=HEIGHT,
    )
    said = [BAND, "Grey: other parts." if others else "", _of_marks(panel)]
    where = f"{name}, whole model" if name else focus
    return Shown(f"Gradient norm: {where}", [panel], tuple(filter(None, said)))


def _line(trace: Trace, column: str) -> Line:
    return list(zip(trace.steps, trace.numbers(column), strict=True))


def _where(trace: Trace, column: str) -> list[int]:
    known = zip(trace.steps, trace.numbers(column), strict=True)
    return [step for step, value in known if value > 0]


def _bad(traces: list[Trace], component: str | None) -> list[int]:
    own = [one for one in traces if component is None or one.component == component]
    return [
        step for one in own for key in ("nonfinite", "l2_nonfinite") for step in _where(one, key)
    ]


def _of_marks(panel: Panel) -> str:
    signs = {"zero": "Triangles: exactly zero.", "skipped": "Crosses: skipped steps."}
    said = [signs.get(label, f"Crosses: {label}.") for label in panel.marks]
    return " ".join(said)


def _norm_beside_loss(run: "Run", finding: Finding) -> Shown:
    loss = run.frame("loss")
    rules = {label: value for label, value in threshold(finding, _NORM_UNITS).items() if value > 0}
    bad = numbers(loss, "gradient_nonfinite")
    panel = Panel(
        _NORM,
        {"largest": numbers(loss, "gradient_norm_max")},
        log=True,
        band=HEALTHY,
        rules=rules,
        others={"mean": numbers(loss, "gradient_norm")},
        marks={"NaN or infinite": steps} if (steps := marked(s for s, v in bad if v)) else {},
        height=HEIGHT,
    )
    said = (BAND, "Grey: the mean of every few steps.", _of_marks(panel))
    return Shown(f"Gradient norm: {WHOLE}", [panel], tuple(filter(None, said)))


def clipping(run: "Run", finding: Finding) -> Shown:
    """How much of the gradient clipping left, step by step."""
    grad = run.frame("grad")
    line = sorted(point for one in whole_traces(grad) for point in _line(one, "clip_coefficient"))
    panel = Panel(
        "share left after clipping",
        {WHOLE: [(step, value) for step, value in line if value == value]},
        log=is_wide([(step, value) for step, value in line if value == value]),
        rules={**threshold(finding, (finding.unit,)), "1, not clipped": 1.0},
        height=HEIGHT,
    )
    return Shown("Share of the gradient that clipping leaves", [panel])


def updates(run: "Run", finding: Finding) -> Shown:
    """How far each step moved the component that is meant."""
    frame = run.frame("update")
    if "do not change" in finding.unit:
        lines = by_component(frame, "unchanged_share")
        name, line, others = split(lines, finding.component)
        panel = Panel(
            "share of unchanged elements",
            {name: line},
            domain=(0.0, 1.0),
            rules=threshold(finding, (finding.unit,)),
            others=others,
            height=HEIGHT,
        )
        return Shown(f"Elements that a step leaves as they were: {name}", [panel])
    ratio = _ratio(run, finding.component)
    if ratio is None:
        return Shown("Update over weight", [])
    if "left it where it was" in finding.unit:
        return _put_back(run, finding, ratio)
    panel = replace(ratio, rules=threshold(finding, ("update over weight",)))
    name = next(iter(panel.series))
    said = (BAND, "A step usually changes weights by about 0.001 of their size.")
    grey = ("Grey: other parts.",) * bool(panel.others)
    return Shown(f"Size of a step against the weights: {name}", [panel], (*said, *grey))


def _put_back(run: "Run", finding: Finding, ratio: Panel) -> Shown:
    """Steps of the usual size, and weights that are where they were."""
    name, line, _ = split(by_component(run.frame("update"), "weight_l2"), finding.component)
    below = Panel("weight norm (l2)", {name: line}, height=LOW)
    said = ("The steps have a size, and the weights stay where they are.", BAND)
    return Shown(f"Size of a step against the weights: {name}", [ratio, below], said)


def _ratio(run: "Run", component: str | None, height: int = HEIGHT) -> Panel | None:
    lines = by_component(run.frame("update"), "ratio")
    if not lines:
        return None
    name, line, others = split(lines, component)
    zeros = marked(step for step, value in line if value == 0)
    return Panel(
        _RATIO,
        {name: line},
        log=True,
        band=_USUAL_RATIO,
        others=others,
        marks={"zero": zeros} if zeros else {},
        height=height,
    )


def learning_rate(run: "Run", finding: Finding) -> Shown:
    """Loss and size of the steps; where steps were not measured, the learning rate."""
    loss, ratio = loss_panel(run), _ratio(run, None)
    if finding.unit == "update over weight" and ratio is not None:
        panels = [replace(ratio, rules=threshold(finding, (finding.unit,))), loss_panel(run, LOW)]
        return Shown("Size of a step against the weights", _there(panels), (BAND,))
    below = _rate(run, LOW) if ratio is None else replace(ratio, height=LOW)
    said = () if ratio is None else ("Below: how far a step moves the weights.", BAND)
    return Shown("Training loss", _there([loss, below]), said)


def _there(panels: list[Panel | None]) -> list[Panel]:
    return [panel for panel in panels if panel is not None]


def schedule(run: "Run", finding: Finding) -> Shown:
    """The learning rate over the run, with the loss below it."""
    rate = _rate(run, HEIGHT)
    grey = ("Grey: lowest and highest.",) * bool(rate and rate.others)
    return Shown("Learning rate", _there([rate, loss_panel(run, LOW)]), grey)


def _rate(run: "Run", height: int) -> Panel | None:
    loss, metrics = run.frame("loss"), run.frame("metrics")
    lines = {"learning rate": line} if (line := numbers(loss, "lr")) else {}
    lowest, highest = numbers(loss, "lr_min"), numbers(loss, "lr_max")
    others = {"lowest": lowest, "highest": highest} if lines and lowest != highest else {}
    if not lines:
        columns = [name for name in metrics.columns if name.startswith(("lr-", "lr/"))]
        lines = {name: line for name in columns if (line := numbers(metrics, name))}
    return Panel("learning rate", lines, others=others, height=height) if lines else None


def losses(run: "Run", finding: Finding) -> Shown:
    """The training loss, and what the finding compares it with."""
    loss, metrics = run.frame("loss"), run.frame("metrics")
    panel = loss_panel(run, validation=finding.rule in _WITH_VALIDATION)
    if panel is None:
        return Shown("Training loss", [])
    known = training_losses(loss, metrics)
    if finding.rule in _LEAPS and known is not None:
        highest = list(zip(known.steps, known.highs, strict=True))
        panel = replace(panel, series={**panel.series, "largest": highest}, others={})
    rules = threshold(finding, _LOSS_UNITS)
    if finding.rule == "loss_plateau":
        level = finding.observed
        rules = {} if level is None else {f"flat at {short(level)}": level}
    if finding.rule in _FROM_THE_START:
        level = _start(run, known)
        rules = {} if level is None else {f"{short(level)} at the start": level}
    broken = finding.rule == "nonfinite_loss" or finding.evidence.file.endswith("nonfinite.jsonl")
    lost = _lost(run, known) if broken else []
    marks = {"NaN or infinite": marked([*lost, *finding.evidence.steps])} if lost else {}
    log = is_wide(*panel.series.values())
    panel = replace(panel, rules=rules, marks=marks, log=log, height=HEIGHT)
    title = "Training and validation loss" if len(panel.series) > 1 else "Training loss"
    title = "Training loss" if finding.rule in _LEAPS else title
    grey = ("Grey: smallest and largest.",) * bool(panel.others)
    return Shown(title, [panel], (*grey, *filter(None, [_of_marks(panel)])))


def _start(run: "Run", known: Losses | None) -> float | None:
    first = first_loss(run.frame("collapse"))
    if first is not None or known is None:
        return first
    means = [mean for mean in known.means if math.isfinite(mean)]
    return means[0] if means else None


def _lost(run: "Run", known: Losses | None) -> list[float]:
    """The steps at which no loss was finite, by the rows that say so."""
    lost = [step for step, bad in numbers(run.frame("loss"), "nonfinite") if bad]
    pairs = [] if known is None else zip(known.steps, known.means, strict=True)
    return lost or [float(step) for step, mean in pairs if not math.isfinite(mean)]


def loss_panel(run: "Run", height: int = HEIGHT, *, validation: bool = False) -> Panel | None:
    """The training loss, and the validation loss if it is asked for; None where there is none.

    Args:
        run: The run.
        height: Of the plot, in pixels.
        validation: Whether the validation loss belongs to it.
    """
    metrics = run.frame("metrics")
    known = training_losses(run.frame("loss"), metrics)
    series: dict[str, Line] = {}
    if known is not None:
        series["training"] = list(zip(known.steps, known.means, strict=True))
    checked = validation_losses(metrics) if validation else None
    if checked:
        series["validation"] = list(zip(checked[0], checked[1], strict=True))
    if not series:
        return None
    others: dict[str, Line] = {}
    if known is not None and known.lows != known.highs and height >= HEIGHT:
        others = {
            "smallest": list(zip(known.steps, known.lows, strict=True)),
            "largest": list(zip(known.steps, known.highs, strict=True)),
        }
    lines = [*series.values(), *others.values()]
    return Panel("loss", series, log=is_wide(*lines), others=others, height=height)
