"""Evidence in outputs, activations, representations, attention, the machine and the wiring."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_diag.report.evidence import (
    HEIGHT,
    LOW,
    Line,
    Shown,
    by_component,
    is_wide,
    marked,
    named_in,
    numbers,
    split,
    threshold,
)
from lightning_diag.report.evidence_training import loss_panel
from lightning_diag.report.sections.wiring import CHECKS
from lightning_diag.report.series import Panel
from lightning_diag.rules.attention_heads import looks_by_module
from lightning_diag.rules.finding import Finding

if TYPE_CHECKING:
    import polars as pl

    from lightning_diag.records.read_run import Run

__all__ = ["activations", "attention", "machine", "outputs", "representation", "wiring"]

_FEW_HEADS = 4
_LOOKS = 56  # pixels
_FINE, _WRONG = 0.0, 1.0
_SCALES = {
    "root mean square of the input": ("rms", "root mean square"),
    "largest element of the input": ("abs_max", "largest element"),
}
_MACHINE = {
    "input_bound": ("data_wait", "waiting for data", "% of the time", 100.0),
    "gpu_underused": ("gpu_percent", "GPU in use", "% of the time", 1.0),
}
_MEMORY = {
    "gpu_memory_allocated": "GPU memory in use",
    "gpu_memory_used": "GPU memory in use",
    "process_memory": "memory of this process",
}


def outputs(run: "Run", finding: Finding) -> Shown:
    """How much predictions differ from sample to sample, or the share of the commonest class."""
    loss, share = run.frame("loss"), "class" in finding.unit
    own = _checked(run.frame("wiring"), "constant_prediction")
    in_loss = finding.evidence.file.endswith("loss.jsonl") or own.is_empty()
    if share:
        line = numbers(loss if in_loss else own, "top_share")
        panel = Panel(
            "share of samples",
            {"most frequent class": line},
            domain=(0.0, 1.0),
            rules=threshold(finding, (finding.unit,)),
            height=HEIGHT,
        )
        return Shown("Share of the most frequent predicted class", [panel])
    line = numbers(own, "std")
    if in_loss:
        line = [(s, None if v is None or v < 0 else v**0.5) for s, v in numbers(loss, "variance")]
    zeros = marked(step for step, value in line if value == 0)
    panel = Panel(
        "deviation over samples",
        {"predictions": line},
        log=True,
        rules={k: v for k, v in threshold(finding, (finding.unit,)).items() if v > 0},
        marks={"zero": zeros} if zeros else {},
        height=HEIGHT,
    )
    said = ("At zero the model gives every sample the same answer.",)
    return Shown("How much predictions differ between samples", [panel], said)


def activations(run: "Run", finding: Finding) -> Shown:
    """The share of dead units, or of outputs at the ends, of the function that is meant."""
    dead = finding.rule == "dead_relu"
    column, words = ("dead_share", "dead units") if dead else ("saturated_share", "stuck outputs")
    frame = run.frame("activation")
    lines = by_component(frame, column)
    if dead:
        # a unit counts as dead once it was off for a while; before, what is off in the batch
        at_once = by_component(frame, "dead_now")
        lines = {name: _filled(lines.get(name, []), line) for name, line in at_once.items()}
    lines.pop(None, None)
    within = _part_of(frame, finding.component)
    own = {name: line for name, line in lines.items() if name in within}
    name = named_in(finding, [str(one) for one in lines]) or _highest(own or lines)
    focus, line, others = split(lines, name)
    panel = Panel(
        f"share of {words}",
        {focus: line},
        domain=(0.0, 1.0),
        rules=threshold(finding, (finding.unit,)),
        others=others,
        height=HEIGHT,
    )
    grey = ("Grey: other activations.",) * bool(others)
    return Shown(f"Share of {words}: {focus}", [panel], grey)


def _filled(line: Line, otherwise: Line) -> Line:
    known = {step: value for step, value in line if value is not None}
    return [(step, known.get(step, value)) for step, value in otherwise]


def _part_of(frame: "pl.DataFrame", component: str | None) -> set[str]:
    if component is None or not {"component", "part"} <= set(frame.columns):
        return set()
    pairs = zip(frame["component"], frame["part"], strict=True)
    return {name for name, part in pairs if component in (name, part)}


def _highest(lines: Mapping[str, Line] | Mapping[str | None, Line]) -> str | None:
    last = {name: line[-1][1] or 0.0 for name, line in lines.items() if line}
    return max(last, key=lambda name: last[name], default=None)


def representation(run: "Run", finding: Finding) -> Shown:
    """How alike the representations of two samples are."""
    frame = run.frame("latent")
    lines = by_component(frame, "mean_cosine")
    focus, line, others = split(lines, named_in(finding, [str(one) for one in lines]))
    lowest = min((v for _, v in line if v is not None and math.isfinite(v)), default=0.0)
    panel = Panel(
        "mean cosine",
        {focus: line},
        domain=(min(0.0, lowest), 1.0),
        rules=threshold(finding, ("mean cosine between two samples",)),
        others=others,
        height=HEIGHT,
    )
    ranks = by_component(frame, "effective_rank")
    below = Panel("effective rank", {focus: ranks.get(focus, [])}, height=LOW)
    said = ("1: all samples look the same.", "Below: how many directions they differ in.")
    return Shown(f"Likeness of two samples inside: {focus}", [panel, below], said)


def attention(run: "Run", finding: Finding) -> Shown:
    """Entropy, or the weight of the first key, of the heads of the module that is meant."""
    sink, module = "first key" in finding.unit, finding.component
    lines = _heads(run, module, sink)
    few = len(lines) <= _FEW_HEADS
    panel = Panel(
        "weight of the first key" if sink else "entropy / largest entropy",
        lines if few else {"mean of all heads": _mean(list(lines.values()))},
        domain=(0.0, 1.0),
        rules=threshold(finding, (finding.unit,)),
        others={} if few else lines,
        height=HEIGHT,
    )
    said = "1: all weight on the first key." if sink else "0: a single key; 1: all keys alike."
    grey = ("Grey: each head.",) * (not few)
    what = "Attention to the first key" if sink else "Spread of attention"
    return Shown(f"{what}: {module}" if module else what, [panel], (said, *grey))


def _heads(run: "Run", module: str | None, sink: bool) -> dict[str, Line]:
    """A line for each head, as the rules see them: the mean of all where no head was written."""
    looks = looks_by_module(run.frame("attention_head"), run.frame("attention"))
    own = [seen for (name, _), seen in looks.items() if module in (None, name)]
    lines: dict[str, Line] = {}
    for look in own[0] if own else []:
        for number, head in enumerate(look.heads):
            value = head.sink if sink else head.entropy
            shown = value if math.isfinite(value) else None
            lines.setdefault(f"head {number}", []).append((look.step, shown))
    return lines


def _mean(lines: list[Line]) -> Line:
    found: dict[float, list[float]] = {}
    for line in lines:
        for step, value in line:
            if value is not None and math.isfinite(value):
                found.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(found.items())]


def machine(run: "Run", finding: Finding) -> Shown:
    """What the machine did: waiting, memory or use of the GPU."""
    frame = run.frame("hardware")
    if finding.rule == "memory_growth":
        known = [key for key in _MEMORY if numbers(frame, key)]
        on_gpu = [key for key in known if key.startswith("gpu") and "GPU" in finding.message]
        key = next(iter(on_gpu or [one for one in known if not one.startswith("gpu")]), None)
        words = _MEMORY[key] if key else "memory"
        line = numbers(frame, key) if key else []
        return Shown(words.capitalize(), [Panel("memory, MiB", {words: line}, height=HEIGHT)])
    key, words, unit, factor = _MACHINE[finding.rule]
    points = numbers(frame, key)
    line = [(step, None if value is None else factor * value) for step, value in points]
    panel = Panel(
        f"{words}, {unit}",
        {words: line},
        domain=(0.0, 100.0),
        rules=threshold(finding, (finding.unit,), factor),
        height=HEIGHT,
    )
    return Shown(f"{words[:1].upper()}{words[1:]}", [panel])


def wiring(run: "Run", finding: Finding) -> Shown:
    """What each look found, or the size of the input; below it the loss."""
    rows = _checked(run.frame("wiring"), finding.rule)
    if finding.rule == "input_scale" and finding.unit in _SCALES:
        column, words = _SCALES[finding.unit]
        named = named_in(finding, rows["names"].to_list()) if "names" in rows.columns else None
        line = numbers(rows, column, {"names": named} if named else None)
        panel = Panel(
            f"{words} of the input",
            {words: line},
            log=is_wide(line, [(0, value) for value in threshold(finding, _SCALES).values()]),
            rules=threshold(finding, _SCALES),
            height=HEIGHT,
        )
        return Shown(f"Size of the input: {named or finding.component or 'model'}", [panel])
    looks = Panel(
        "result",
        {"look": _looks(rows, finding)},
        domain=(_FINE - 0.4, _WRONG + 0.4),
        words={_FINE: "fine", _WRONG: "wrong"},
        height=_LOOKS,
    )
    meanwhile = loss_panel(run, LOW)
    below = [] if meanwhile is None else [meanwhile]
    said = ("Each point is a look.", *("Below: the training loss meanwhile.",) * bool(below))
    return Shown(f"Check: {CHECKS.get(finding.rule, finding.issue)}", [looks, *below], said)


def _checked(frame: "pl.DataFrame", check: str) -> "pl.DataFrame":
    if not {"check", "step"} <= set(frame.columns):
        return frame.clear()
    return frame.filter(frame["check"] == check)


def _looks(rows: "pl.DataFrame", finding: Finding) -> Line:
    """Wrong where the component was found so, fine where only others were, or none."""
    found: dict[float, float] = {}
    for row in rows.to_dicts():
        if row.get("state") not in ("ok", "wrong") or row["step"] is None:
            continue
        own = finding.component in (None, row.get("component"))
        wrong = _WRONG if row["state"] == "wrong" and own else _FINE
        found[row["step"]] = max(found.get(row["step"], _FINE), wrong)
    return sorted((step, value) for step, value in found.items())
