import re

import altair as alt
import pytest
import vl_convert

from lightning_diag.report import gradient_flow, training
from lightning_diag.report.flow_data import flow_data
from lightning_diag.rules import Finding
from tests.rules.planted import component_row, noise, run_of, trace, whole_row

PNG = b"\x89PNG\r\n\x1a\n"


def picture(chart):
    return vl_convert.vegalite_to_png(chart.to_dict(), scale=0.5)


def flow(rows):
    return flow_data(run_of(rows).frame("grad"))


def metrics_run(rows):
    run = run_of([])
    run.rows["metrics"] = rows
    return run


GRADIENTS = {
    "no rows": [],
    "one row": trace({"a": [0.1], "b": [0.0]}),
    "one zero": trace({"a": [0.0]}),
    "no numbers": [component_row(i, "a", None) for i in range(3)],
    "not a number": [component_row(i, "a", float("nan"), nonfinite=9) for i in range(3)],
    "far apart": trace({"a": [1e-150, 1.0], "b": [1e150, 1e-9]}),
    "many": trace({f"block{i}": [0.1 * i] * 2 for i in range(300)}),
    "markup": trace({"<b>.[x]'\"\\": [1.0, 2.0], "": [1.0, 2.0]}),
    "whole only": [whole_row(0, [component_row(0, "a", 1.0)])],
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_flow_draws_edge_cases(name):
    chart = gradient_flow(run_of(GRADIENTS[name]))
    assert picture(chart).startswith(PNG)
    assert chart.to_dict()["description"]


def test_gradient_flow_is_a_valid_chart_with_titles_and_words():
    rows = trace({"encoder": [1.0, 2.0, 0.0], "head": [0.1, 0.2, 0.3]}, clip=1.0)
    spec = gradient_flow(run_of(rows)).to_dict()  # checked against the schema of Vega-Lite
    lines = spec["layer"][1]
    assert lines["encoding"]["x"]["title"] == "optimizer step"
    assert lines["encoding"]["y"]["title"] == "l2 norm of the gradient"
    assert lines["encoding"]["y"]["scale"]["type"] == "log"
    assert "encoder, head" in spec["description"]
    assert "1 marks: zero or none, drawn at the floor" in spec["description"]
    drawn = {(row["component"], row["step"]): row["l2"] for row in spec["datasets"]["lines"]}
    assert drawn == {
        ("encoder", 0): 1.0,
        ("encoder", 10): 2.0,
        ("head", 0): 0.1,
        ("head", 10): 0.2,
        ("head", 20): 0.3,
    }


def test_zeros_stand_at_the_floor_below_all_norms():
    data = flow(trace({"a": [1.0, 0.0, 0.5], "b": [0.02, 0.02, 0.02]}))
    (mark,) = data.marks
    assert mark == {
        "step": 10,
        "component": "a",
        "l2": data.domain[0],
        "what": "zero or none, drawn at the floor",
    }
    assert data.domain[0] < 0.02
    assert [row["segment"] for row in data.points if row["component"] == "a"] == [0, 1]


def test_missing_gradients_are_marked_and_frozen_parts_are_not():
    rows = trace({"a": [1.0, 1.0]})
    nothing = {"count": 0, "tensors": 0}
    for step in (0, 10):
        rows.append(component_row(step, "detached", None, **nothing, missing=2))
        rows.append(component_row(step, "frozen", 0.0, **nothing, frozen=2))
    assert {mark["component"] for mark in flow(rows).marks} == {"detached"}


def test_nonfinite_and_skipped_steps_are_marked_and_not_drawn():
    rows = trace({"a": [1.0] * 4, "b": [0.5] * 4})
    for row in rows:
        if row["step"] == 10 and row["component"] == "a":
            row.update(nonfinite=4)
        if row["step"] == 20:
            row.update(nonfinite=4, skipped=1)
    data = flow(rows)
    marked = {(mark["step"], mark["component"]): mark["what"] for mark in data.marks}
    assert marked == {
        (10, "a"): "NaN or infinity",
        (20, "whole model"): "step skipped by the scaler",
    }
    assert [row["step"] for row in data.points if row["component"] == "a"] == [0, 30]


def test_ten_largest_of_many_are_drawn_and_it_is_said():
    data = flow(trace({f"block{i}": [float(i + 1)] * 3 for i in range(40)}))
    assert data.names == [f"block{i}" for i in range(39, 29, -1)]
    assert any("10 components with the largest norms of 40" in line for line in data.said)


def test_a_hidden_component_that_turns_nan_is_still_marked():
    rows = trace({f"block{i}": [float(i + 1)] * 3 for i in range(40)})
    for row in rows:
        if row["component"] == "block0" and row["step"] == 20:
            row.update(nonfinite=1)
    assert ("block0", 20) in {(mark["component"], mark["step"]) for mark in flow(rows).marks}


def test_long_series_are_thinned_said_so_and_keep_their_peak(rng):
    norms = noise(rng, 20_000, 0.5)
    norms[12_345] = 77.0
    data = flow(trace({"a": norms}, every=1))
    assert len(data.points) <= 5000
    assert {"step": 12_345, "component": "a", "l2": 77.0, "segment": 0} in data.points
    assert any("from 20000 to 5000" in line for line in data.said)


def test_first_steps_of_findings_are_numbered():
    rows = trace({"a": [1.0] * 9})
    findings = [
        Finding("dead_component", "critical", component="a", first_step=30),
        Finding("gradient_imbalance", "info", component="a", first_step=40),
        Finding("exploding_gradient", "warning", first_step=30),
    ]
    spec = gradient_flow(run_of(rows), findings).to_dict()
    said = spec["title"]["subtitle"][1]
    assert said == (
        "Numbered: 1 dead component in a, step 30; 3 exploding gradient in the whole model, "
        "step 30."
    )
    assert "1, 3" in str(spec["layer"][-1]) or "1, 3" in str(spec["datasets"])


TRAINING = {
    "nothing": [],
    "no loss": [{"step": 0, "acc": 0.5}],
    "one row": [{"step": 0, "train_loss": 1.0}],
    "lost": [{"step": i, "train_loss": None, "train_loss_nonfinite": 1} for i in range(3)],
    "rates only": [{"step": i, "lr-Adam": 0.1 * i} for i in range(3)],
    "negative": [{"step": i, "loss": -float(i)} for i in range(3)],
    "names": [{"step": i, "a.b[0]'loss\\": float(i)} for i in range(3)],
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_draws_edge_cases(name):
    chart = training(metrics_run(TRAINING[name]))
    assert picture(chart).startswith(PNG)
    assert chart.to_dict()["description"]


def test_training_picks_losses_and_rates_and_marks_what_was_lost():
    rows = [{"step": i, "train_loss": 3.0 - i, "lr-Adam": 0.1, "acc": 0.5} for i in range(3)]
    rows += [{"step": 3, "train_loss": None, "train_loss_nonfinite": 1}]
    rows += [{"step": 2, "val_loss": 2.5}]
    spec = training(metrics_run(rows)).to_dict()
    drawn = {(row["metric"], row["step"], row["value"]) for row in spec["datasets"]["loss"]}
    assert drawn == {
        ("train_loss", 0, 3.0),
        ("train_loss", 1, 2.0),
        ("train_loss", 2, 1.0),
        ("val_loss", 2, 2.5),
    }
    assert {row["metric"] for row in spec["datasets"]["learning rate"]} == {"lr-Adam"}
    assert "NaN or infinity" in spec["title"]["subtitle"][0]
    assert [panel["layer"][0]["encoding"]["y"]["title"] for panel in spec["vconcat"]] == [
        "loss",
        "learning rate",
    ]


def test_training_draws_the_whole_loss_first_and_no_shares():
    names = [f"loss_{i}" for i in range(9)]
    names += ["loss_share/image", "loss_share_text", "val_loss_on", "val_loss", "train_loss"]
    spec = training(
        metrics_run([dict.fromkeys(names, 1.0) | {"step": i} for i in (0, 1)])
    ).to_dict()
    drawn = list(dict.fromkeys(row["metric"] for row in spec["datasets"]["loss"]))
    assert drawn == ["train_loss", "val_loss", "loss_0", "loss_1", "loss_2", "loss_3"]
    line = spec["vconcat"][0]["layer"][0]["encoding"]
    assert line["color"]["scale"]["domain"] == drawn  # the first colour is that of training
    assert spec["title"]["subtitle"] == ["The first 6 of 12 losses are drawn."]


@pytest.mark.parametrize("steps", [[9], [8, 9], [0, 2], [0, 3], [0, 8], [100, 5000]])
def test_each_tick_of_the_steps_is_another_number(steps):
    spec = training(metrics_run([{"step": step, "loss": 1.0} for step in steps])).to_dict()
    svg = vl_convert.vegalite_to_svg(spec)
    axis = svg.split("X-axis titled 'optimizer step'")[1].split("optimizer step</text>")[0]
    ticks = [int(text.replace(",", "")) for text in re.findall(r">([\d,]+)</text>", axis)]
    assert len(ticks) == len(set(ticks)) > 1
    assert ticks == sorted(ticks)


def test_training_uses_a_log_axis_for_losses_over_two_decades():
    rows = [{"step": i, "train_loss": 10.0**-i} for i in range(5)]
    spec = training(metrics_run(rows)).to_dict()
    axis = spec["vconcat"][0]["layer"][0]["encoding"]["y"]
    assert (axis["scale"]["type"], axis["title"]) == ("log", "loss, log scale")


def test_charts_are_altair_charts_for_notebooks():
    assert isinstance(gradient_flow(run_of(trace({"a": [1.0]}))), alt.TopLevelMixin)
    assert isinstance(training(metrics_run([{"step": 0, "loss": 1.0}])), alt.TopLevelMixin)
