"""Does the chart beside a finding show the rows that it rests on, and where it began?"""

import math

import numpy as np
import pytest

from lightning_diag.report.evidence_chart import evidence_chart
from lightning_diag.report.write_report import chart_svg, svg_png
from lightning_diag.rules import RULES, Finding, diagnose
from lightning_diag.rules.finding import Evidence
from tests.report.conftest import HOSTILE
from tests.rules.insides import every, losses
from tests.rules.losses_made_up import loss_rows
from tests.rules.planted import MadeUpRun, noise, trace

ONSET = 100
STEPS = range(9, 300, 10)


def broken(before, after):
    return [before if step < ONSET else after for step in STEPS]


def planted():
    """Rows of every diagnostic, all of which change for the worse at step 100."""
    rng = np.random.default_rng(0)
    body = noise(rng, 30, 0.5)
    body[10:] = 0.0
    parts = {"body": 1e-3, "head": 2e-3, None: 1.5e-3}
    updates = [
        row | {"component": name}
        for name, ratio in parts.items()
        for row in every(
            STEPS, ratio=broken(ratio, 0.3), unchanged_share=broken(0.0, 0.99), weight_l2=1.0
        )
    ]
    heads = [
        row | {"component": "attention", "head": head}
        for head in range(6)
        for row in every(
            STEPS, entropy_normalized=broken(0.7, 0.001), sink_share=broken(0.1, 0.99), keys=16
        )
    ]
    checks = [
        {"step": step, "component": "body", "check": check, "state": state, "names": "body.0"}
        | {"rms": 1.0 if state == "ok" else 90.0, "abs_max": 3.0, "std": 0.5, "top_share": 0.4}
        for check in RULES
        for step, state in zip(STEPS, broken("ok", "wrong"), strict=True)
    ]
    units = {"function": "relu", "count": 6400, "units": 64, "zero_share": 0.5}
    relu = every(
        STEPS,
        **units,
        component="body.1",
        part="body",
        dead_now=broken(0.0, 0.9),
        dead_share=broken(0.0, 0.9),
    )
    gelu = every(STEPS, component="head.1", part="head", saturated_share=broken(0.0, 0.9))
    looks = every(
        STEPS, component="head", mean_cosine=broken(0.1, 0.999), effective_rank=broken(9.0, 1.0)
    )
    machine = every(STEPS, data_wait=broken(0.01, 0.9), gpu_percent=broken(90.0, 3.0))
    memory = [row | {"process_memory": 500.0 + i} for i, row in enumerate(machine)]
    values = np.where(np.arange(300) < ONSET, 1.0, 5.0) + 0.01 * rng.normal(size=300)
    loss = [row | {"variance": 0.25, "top_share": 0.5} for row in loss_rows(values)]
    return {
        "grad": trace({"body": body, "head": noise(rng, 30, 0.5)}, clip=0.1),
        "update": updates,
        "attention_head": heads,
        "wiring": checks,
        "activation": relu + gelu,
        "latent": looks,
        "hardware": memory,
        "loss": loss,
        "metrics": [{"step": step, "val_loss": 1.0 + step / 300} for step in STEPS],
    }


RUN = MadeUpRun(rows=planted())
FILES = {
    "vanishing_gradient": ("grad", "mean l2 norm", "body"),
    "exploding_gradient": ("grad", "l2 norm before clipping", "body"),
    "nonfinite_gradient": ("grad", "measured steps with NaN or infinity", "body"),
    "dead_component": ("grad", "l2 norm", "body"),
    "gradient_imbalance": ("grad", "times smaller than the typical component", "body"),
    "clipping_dominates": ("grad", "median clip coefficient", None),
    "update_too_large": ("update", "update over weight", "head"),
    "update_too_small": ("update", "share of elements that do not change", "head"),
    "frozen_weights": ("wiring", "steps without a change", "body"),
    "learning_rate_too_high": ("loss", "times its best level", None),
    "learning_rate_too_low": ("update", "update over weight", None),
    "scheduler_misuse": ("loss", "share of steps at about zero", None),
    "constant_prediction": ("wiring", "deviation over samples", None),
    "dead_relu": ("activation", "share of units", "body"),
    "saturated_activation": ("activation", "share of outputs at the ends", "head"),
    "representation_collapse": ("latent", "mean cosine between two samples", None),
    "attention_collapse": ("attention_head", "entropy over ln(keys)", "attention"),
    "attention_uniform": ("attention_head", "entropy over ln(keys)", "attention"),
    "attention_sink": ("attention_head", "mean weight of the first key", "attention"),
    "input_bound": ("hardware", "share of the time, waiting for data", None),
    "memory_growth": ("hardware", "MiB", None),
    "gpu_underused": ("hardware", "percent of the time", None),
    "overfitting": ("metrics", "validation loss", None),
}


def finding(rule, **more):
    one = RULES[rule]
    default = ("wiring", "share of all parameters", "body")
    default = ("loss", "mean loss", None) if one.family == "losses" else default
    file, unit, component = FILES.get(rule, default)
    known = {"component": component, "first_step": ONSET, "last_step": 299, "unit": unit}
    known |= {"observed": 0.9, "threshold": 0.5, "severity": "warning"}
    known |= {"evidence": Evidence(f"records/{file}.jsonl", (109, 119)), "message": "Seen."}
    return Finding(rule, **known | more)


def parts(node):
    """Every mapping inside a specification."""
    if isinstance(node, dict):
        yield node
    for below in node.values() if isinstance(node, dict) else node:
        if isinstance(below, dict | list):
            yield from parts(below)


def spec_of(run, one):
    chart = evidence_chart(run, one)
    return None if chart is None else chart.to_dict(validate=False)


def drawn(spec):
    """The rows of all lines, by name."""
    found = {}
    for rows in spec["datasets"].values():
        for row in rows:
            if "segment" in row:
                found.setdefault(row["name"], {})[row["x"]] = row["y"]
    return found


def onsets(spec):
    return [one for rows in spec["datasets"].values() for one in rows if "until" in one]


def lines_to_compare(spec):
    rows = [one for rows in spec["datasets"].values() for one in rows]
    return {one["label"]: one["y"] for one in rows if set(one) == {"label", "y"}}


def axis_titles(spec, axis):
    return {
        part[axis].get("title")
        for part in parts(spec)
        if isinstance(part.get(axis), dict) and "scale" in part[axis]
    }


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_has_a_chart_that_says_when_and_what(rule):
    spec = spec_of(RUN, finding(rule))
    assert spec is not None
    assert {(one["x"], one["label"]) for one in onsets(spec)} == {(ONSET, "began at step 100")}
    assert all(one["until"] >= 290 for one in onsets(spec))
    assert "optimizer step" in axis_titles(spec, "x")
    ups = axis_titles(spec, "y") - {None}
    assert ups
    assert all(title.strip() for title in ups)
    assert len(spec["description"]) > 40
    assert spec["description"].endswith("Began at step 100.")
    assert spec["title"]["text"]
    assert any(len(line) >= 10 for line in drawn(spec).values())


@pytest.mark.parametrize(
    ("rule", "rows", "line", "label"),
    [
        ("dead_relu", {"loss": losses(1.4, 1.39)}, "body.1", 0.9),
        ("input_bound", {}, "waiting for data", 90.0),
    ],
)
def test_the_line_is_that_of_the_rows_and_changes_where_the_mark_stands(rule, rows, line, label):
    run = MadeUpRun(rows=RUN.rows | rows)
    (one,) = [one for one in diagnose(run, on_error="raise") if one.rule == rule]
    spec = spec_of(run, one)
    seen = drawn(spec)[line]
    (mark,) = {row["x"] for row in onsets(spec)}
    assert mark == one.first_step
    assert all(value < label / 2 for step, value in seen.items() if step < mark)
    assert all(value == label for step, value in seen.items() if step >= mark)


def test_a_dead_component_lies_at_the_floor_and_the_others_behind_it():
    (one,) = [one for one in diagnose(RUN) if one.rule == "dead_component"]
    assert one.component == "body"
    spec = spec_of(RUN, one)
    assert max(drawn(spec)["body"]) < ONSET
    assert max(drawn(spec)["head"]) == 290
    zeros = [row["x"] for rows in spec["datasets"].values() for row in rows if "what" in row]
    assert zeros == list(range(100, 300, 10))
    assert "Triangles: exactly zero." in spec["title"]["subtitle"]


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("update_too_large", 0.5),
        ("attention_collapse", 0.5),
        ("representation_collapse", 0.5),
        ("input_bound", 50.0),  # drawn in percent
        ("divergence", 0.5),
        ("saturated_activation", 0.5),
    ],
)
def test_the_threshold_is_drawn_where_the_axis_has_its_unit(rule, value):
    assert value in lines_to_compare(spec_of(RUN, finding(rule))).values()
    if rule != "input_bound":
        assert "threshold 0.5" in lines_to_compare(spec_of(RUN, finding(rule)))


def test_a_threshold_in_another_unit_is_not_drawn():
    jump = finding("update_too_large", unit="times its own median", threshold=10.0)
    assert lines_to_compare(spec_of(RUN, jump)) == {}
    assert lines_to_compare(spec_of(RUN, finding("gradient_imbalance"))) == {}


def test_the_usual_range_is_shaded():
    for rule, band in (("vanishing_gradient", (1e-3, 1.0)), ("update_too_large", (1e-4, 1e-2))):
        spec = spec_of(RUN, finding(rule))
        bands = [one for rows in spec["datasets"].values() for one in rows if "top" in one]
        assert [(one["y"], one["top"]) for one in bands] == [band]
        assert "Green: the usual range." in spec["title"]["subtitle"]


def test_the_loss_that_is_lost_is_marked():
    values = np.where(np.arange(300) < ONSET, 1.0, math.nan)
    run = MadeUpRun(rows={"loss": loss_rows(values)})
    (one,) = [one for one in diagnose(run, on_error="raise") if one.rule == "nonfinite_loss"]
    spec = spec_of(run, one)
    crosses = [row["x"] for rows in spec["datasets"].values() for row in rows if "what" in row]
    assert min(crosses) >= ONSET
    assert len(crosses) >= 20
    assert chart_svg(spec).startswith(b"<svg")


def test_marks_alone_can_be_drawn():
    rows = trace({"body": [None] * 30})
    for row in rows:
        row["nonfinite"] = 5
    run = MadeUpRun(rows={"grad": rows})
    spec = spec_of(run, finding("nonfinite_gradient"))
    assert svg_png(chart_svg(spec)).startswith(b"\x89PNG")
    assert "NaN or infinite at 30 steps" in spec["description"]


@pytest.mark.parametrize("rule", ["dead_relu", "divergence", "input_bound", "dead_component"])
def test_without_rows_there_is_no_chart(rule):
    assert evidence_chart(MadeUpRun(), finding(rule)) is None
    odd = {prefix: [{"step": 1}] for prefix in RUN.rows}
    assert evidence_chart(MadeUpRun(rows=odd), finding(rule)) is None


def test_a_finding_without_steps_or_of_an_unknown_file_is_no_error():
    spec = spec_of(RUN, finding("divergence", first_step=None, last_step=None))
    assert onsets(spec) == []
    odd = finding("divergence", evidence=Evidence("records/of_somebody.jsonl"))
    assert evidence_chart(RUN, odd) is None


def test_from_the_start_is_said_and_no_shade_covers_all():
    spec = spec_of(RUN, finding("divergence", first_step=0))
    assert {one["label"] for one in onsets(spec)} == {"from the start"}
    assert not any(
        part.get("mark", {}).get("type") == "rect"
        for part in parts(spec)
        if isinstance(part.get("mark"), dict)
    )


def test_hostile_names_are_cut_and_can_be_drawn():
    name = f"{HOSTILE}\x00{'x' * 10_000}"
    rows = [row | {"component": name} for row in every(STEPS, ratio=broken(1e-3, 0.3))]
    run = MadeUpRun(rows={"update": rows})
    spec = spec_of(run, finding("update_too_large", component=name))
    assert len(spec["title"]["text"]) <= 60
    assert all(len(line) <= 60 for line in drawn(spec))
