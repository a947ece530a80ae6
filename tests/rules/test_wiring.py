"""The wiring rules on rows made up by hand: what they judge, when, and how gravely."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from lightning_diag.rules import RULES, diagnose
from tests.rules.planted import MadeUpRun, component_row, whole_row

YAML = Path(__file__).parents[2] / "conf" / "rules" / "wiring.yaml"
IDS = [
    *("unoptimized_parameter", "frozen_in_optimizer", "unused_parameter", "detached_graph"),
    *("missing_zero_grad", "eval_mode_in_training", "tied_weight_broken", "replica_drift"),
    *("input_scale", "nonfinite_data", "loss_target_mismatch", "wrong_reduction"),
    "double_softmax",
]
# judged by a step that is far from the start, and tested for itself
LATE = "frozen_weights"


def row(check, step, state="wrong", **more):
    return {"step": step, "component": None, "check": check, "state": state, **more}


def run(rows, **others):
    return MadeUpRun(rows={"wiring": rows, **others})


def judge(*rows, thresholds=None):
    return diagnose(run(list(rows)), thresholds, on_error="raise")


def looks(check, times=3, **more):
    return [row(check, step, **more) for step in range(times)]


def test_yaml_repeats_the_python_defaults():
    written = yaml.safe_load(YAML.read_text())
    python = {
        id: dataclasses.asdict(one.thresholds)
        for id, one in RULES.items()
        if one.family == "wiring"
    }
    assert written == python
    assert set(written) == {*IDS, LATE}
    lines = [line for line in YAML.read_text().splitlines() if line.startswith("  ")]
    assert all("#" in line for line in lines)


PARAMETERS = {"count": 2, "parameters": 500, "share": 0.2, "component_share": 1.0, "names": "a, b"}
CASES = {
    "unoptimized_parameter": [
        ({"kind": "gradient", **PARAMETERS}, "warning"),
        ({"kind": "no gradient", **PARAMETERS}, "info"),
    ],
    "frozen_in_optimizer": [
        ({"kind": "gradient left", **PARAMETERS}, "warning"),
        ({"kind": "no gradient", **PARAMETERS}, "info"),
    ],
    "unused_parameter": [
        ({"kind": "never ran", "steps": 10, **PARAMETERS}, "warning"),
        ({"kind": "never ran", "steps": 9, **PARAMETERS}, "info"),
        ({"kind": "ran", "steps": 10, **PARAMETERS, "share": 0.5}, "critical"),
        ({"kind": "ran", "steps": 10, **PARAMETERS, "share": 0.009}, "warning"),
        (
            {"kind": "ran", "steps": 10, **PARAMETERS, "share": 0.009, "component_share": 0.5},
            "info",
        ),
        ({"kind": "zero", "looks": 5, **PARAMETERS, "share": 0.9}, "warning"),
        ({"kind": "zero", "looks": 4, **PARAMETERS}, "info"),
    ],
    "detached_graph": [
        ({"kind": "whole loss"}, "critical"),
        ({"kind": "cut", "steps": 10, "at": "x", **PARAMETERS}, "warning"),
        ({"kind": "cut", "steps": 9, "at": "x", **PARAMETERS}, "info"),
        ({"kind": "cut", "steps": 10, "at": "x", **PARAMETERS, "share": 0.6}, "critical"),
        ({"kind": "constant loss", "looks": 3, "loss": 0.7}, "warning"),
        ({"kind": "constant loss", "looks": 3, "loss": 0.0}, "info"),
    ],
    "missing_zero_grad": [({"optimizer": 1, "value": 0.3}, "warning")],
    "eval_mode_in_training": [
        ({"kind": "container", "count": 1, "names": "encoder"}, "warning"),
        ({"kind": "layer", "count": 1, "names": "encoder.norm"}, "info"),
    ],
    "tied_weight_broken": [
        ({"kind": "came apart", "names": "a and b"}, "warning"),
        ({"kind": "not tied", "names": "a and b"}, "warning"),
        ({"kind": "drifted", "names": "a and b"}, "warning"),
    ],
    "replica_drift": [({"kind": "weights", **PARAMETERS}, "critical")],
    "nonfinite_data": [
        ({"count": 3, "value": 0.1, "names": "x", "loss_finite": 0}, "critical"),
        ({"count": 3, "value": 0.1, "names": "x", "loss_finite": 1}, "info"),
        ({"count": 3, "value": 0.1, "names": "x", "loss_finite": None}, "warning"),
    ],
    "input_scale": [
        ({"names": "conv", "rms": 130.0, "mean": 110.0, "std": 70.0, "normalized": 0}, "warning"),
        ({"names": "conv", "rms": 130.0, "mean": 110.0, "std": 70.0, "normalized": 1}, "info"),
        ({"names": "conv", "rms": 30.0, "mean": 30.0, "std": 1.0}, "info"),
        ({"names": "conv", "rms": 30.0, "mean": 30.0, "std": 0.0}, None),
        ({"names": "conv", "rms": 1.0, "mean": 0.1, "std": 1.0}, None),
    ],
    "loss_target_mismatch": [
        ({"kind": "shape", "at": "mse_loss", "input_shape": "8x1"}, "warning"),
        ({"kind": "out of range", "at": "cross_entropy", "classes": 4, "high": 4.0}, "critical"),
        ({"kind": "out of range", "at": "binary_cross_entropy", "high": 4.0}, "warning"),
        ({"kind": "one class", "at": "cross_entropy"}, "warning"),
        ({"kind": "no target", "at": "cross_entropy"}, "warning"),
        ({"kind": "not log-probabilities", "at": "nll_loss"}, "warning"),
        ({"kind": "constant", "at": "f", "low": 2.0, "high": 2.0, "count": 50}, "warning"),
        ({"kind": "constant", "at": "f", "low": 2.0, "high": 2.0, "count": 33}, None),
    ],
    "wrong_reduction": [
        ({"kind": "sum", "at": "f", "algorithm": "SGD", "value": 1.0}, "warning"),
        ({"kind": "sum", "at": "f", "algorithm": "AdamW", "value": 1.0}, "info"),
    ],
    "double_softmax": [
        ({"kind": "softmax", "at": "cross_entropy", "value": 1e-7, "count": 8}, "warning"),
        ({"kind": "sigmoid", "at": "f", "high": 0.9, "count": 22}, "warning"),
        ({"kind": "sigmoid", "at": "f", "high": 0.9, "count": 21}, None),
    ],
}


def test_every_rule_has_a_case():
    assert set(CASES) == set(IDS)


@pytest.mark.parametrize(
    ("id", "more", "severity"), [(id, *one) for id, cases in CASES.items() for one in cases]
)
def test_severity(id, more, severity):
    found = judge(*looks(id, **more))
    assert [(one.rule, one.severity) for one in found] == ([(id, severity)] if severity else [])
    for one in found:
        assert (one.first_step, one.last_step) == (0, 2)
        assert one.evidence.file == "records/wiring.jsonl"
        assert one.evidence.steps == (0, 1, 2)
        assert one.message.endswith(".")
        assert one.suggestion.endswith(".")


@pytest.mark.parametrize("id", sorted(set(IDS) - {"nonfinite_data"}))
def test_what_was_healed_is_no_finding(id):
    more = CASES[id][0][0]
    healed = row(id, 3, "ok", at=more.get("at"), names=more.get("names"), rms=1.0, mean=0.0)
    rows = looks(id, 2, **more)
    assert judge(*rows, healed, row(id, 4, "ok", rms=1.0, names=more.get("names"))) == []


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("state", ["ok", "unknown"])
def test_nothing_wrong_is_no_finding(id, state):
    assert judge(*looks(id, state=state, kind="x", count=4)) == []


def test_what_is_unknown_later_heals_nothing():
    rows = looks("missing_zero_grad", optimizer=0, value=1.0)
    assert len(judge(*rows, row("missing_zero_grad", 3, "unknown"))) == 1


@pytest.mark.parametrize(
    "id", ["unoptimized_parameter", "missing_zero_grad", "eval_mode_in_training", "input_scale"]
)
def test_one_look_is_not_enough(id):
    assert judge(*looks(id, 1, **CASES[id][0][0])) == []


def test_thresholds_can_be_changed():
    rows = looks("unused_parameter", kind="ran", steps=10, **PARAMETERS)
    changed = judge(*rows, thresholds={"unused_parameter": {"critical_share": 0.1}})
    assert changed[0].severity == "critical"


def test_an_infinity_that_the_loss_hides_at_first():
    more = {"count": 1, "value": 0.1, "names": "x"}
    rows = [row("nonfinite_data", 0, loss_finite=1, **more)]
    rows.append(row("nonfinite_data", 1, "ok", loss_finite=0))
    assert judge(*rows)[0].severity == "critical"


def test_labels_that_change_between_looks_are_not_constant():
    more = {"kind": "constant", "at": "f", "count": 500}
    rows = [row("loss_target_mismatch", i, low=float(i), high=float(i), **more) for i in range(4)]
    assert judge(*rows) == []


def test_scores_that_were_logits_once_are_no_probabilities():
    rows = looks("double_softmax", kind="sigmoid", at="f", count=100)
    rows.append(row("double_softmax", 3, "ok", at="f"))
    rows.append(row("double_softmax", 4, kind="sigmoid", at="f", count=100))
    assert judge(*rows) == []


def test_components_are_judged_by_themselves():
    rows = [
        row("unused_parameter", step, kind="ran", steps=20, **PARAMETERS) | {"component": part}
        for step in range(3)
        for part in ("encoder", "decoder")
    ]
    assert {one.component for one in judge(*rows)} == {"encoder", "decoder"}


def test_unused_explains_a_dead_component():
    rows = [
        row("unused_parameter", step, kind="never ran", steps=20, **PARAMETERS)
        | {"component": "decoder"}
        for step in (0, 1, 2)
    ]
    grad = []
    for step in range(10, 60, 10):
        parts = [component_row(step, "encoder", 1.0)]
        parts.append(component_row(step, "decoder", None, count=0, tensors=0, missing=4))
        grad += [*parts, whole_row(step, parts)]
    found = diagnose(run(rows, grad=grad), on_error="raise")
    assert [one.rule for one in found[:2]] == ["unused_parameter", "dead_component"]
    assert found[1].caused_by == "unused_parameter"


def test_odd_rows_are_survived():
    assert judge({"step": None, "check": "unused_parameter", "state": "wrong"}) == []
    assert judge({"step": 1, "component": None}) == []
    for id in IDS:
        for kind in (None, "?"):
            judge(*looks(id, kind=kind))


@pytest.mark.parametrize(("last", "found"), [(2, 0), (99, 0), (100, 1), (499, 1)])
def test_weights_that_never_moved(last, found):
    more = {"kind": "same values", "looks": 3, **PARAMETERS}
    rows = [row(LATE, step, **more) for step in (1, 2, last)]
    said = judge(*rows)
    assert len(said) == found
    if found:
        assert said[0].severity == "warning"
        assert f"the same values at step {last} as at the start" in said[0].message
        assert "`a`, `b`" in said[0].message
        assert judge(*rows, row(LATE, last + 500, "ok", count=0)) == []


def test_names_that_are_not_listed_stand_outside_of_the_marks():
    (found,) = judge(
        *looks(
            "unused_parameter", times=40, **{**PARAMETERS, "steps": 40, "names": "a, b and 22 more"}
        )
    )
    assert "`a`, `b` and 22 more" in found.message


def test_a_loss_that_is_constant_to_the_last_bit_is_no_cause_of_tiny_gradients():
    """Gradients arrive and are tiny: that is why the loss stays the same, and not the other way."""
    rows = []
    for step in range(4, 180, 5):
        parts = [component_row(step, name, 4e-6) for name in ("one", "two")]
        rows += [*parts, whole_row(step, parts)]
    wiring = [row("detached_graph", 3, kind="constant loss", looks=3, loss=4.852)]
    findings = diagnose(run(wiring, grad=rows), on_error="raise")
    tiny = next(one for one in findings if one.rule == "vanishing_gradient")
    assert tiny.caused_by is None
    assert "detached_graph" in {one.rule for one in findings}


def test_bad_data_between_two_looks_are_told_by_the_replay():
    replay = {
        "step": 120,
        "reason": "data",
        "tensor": "batch[0]",
        "input_nan": 144,
        "component": None,
    }
    run = MadeUpRun({"nonfinite": [replay], "loss": [], "wiring": [_ok("nonfinite_data", 99)]})
    (found,) = diagnose(run, on_error="raise")
    assert (found.rule, found.severity, found.first_step) == ("nonfinite_data", "critical", 120)
    assert "144 elements" in found.message
    other = MadeUpRun({"nonfinite": [{**replay, "reason": "op"}]})
    assert not diagnose(other, on_error="raise")


def _ok(check, step):
    return {"step": step, "component": None, "check": check, "state": "ok"}


@pytest.mark.parametrize(
    ("algorithm", "more", "severity"),
    [
        ("SGD", {}, "warning"),
        ("Adam", {}, "info"),
        ("Adam", {"clip": 0.01}, "warning"),
        ("Adam", {"late": True}, "warning"),
    ],
)
def test_a_sum_under_adam_counts_where_it_does_harm(algorithm, more, severity):
    row = {"check": "wrong_reduction", "state": "wrong", "kind": "sum", "at": "mse_loss"}
    row |= {"component": None, "algorithm": algorithm, "samples": 32, "count": 512, "value": 1.0}
    steps = (60, 80) if more.get("late") else (0, 20, 40, 60, 80)
    rows = [_ok("wrong_reduction", step) for step in (0, 20, 40) if step not in steps]
    rows += [{**row, "step": step} for step in steps]
    grad = [
        {"step": step, "component": None, "l2": 1.0, "clip_coefficient": more.get("clip", 1.0)}
        for step in range(0, 90, 10)
    ]
    found = diagnose(MadeUpRun({"wiring": rows, "grad": grad}), on_error="raise")
    (finding,) = [one for one in found if one.rule == "wrong_reduction"]
    assert (finding.severity, finding.first_step) == (severity, steps[0])
