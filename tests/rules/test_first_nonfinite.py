"""Do the findings name the operation that a replay has found, and what to do about it?"""

import numpy as np
import polars as pl
import pytest

from lightning_diag.rules import diagnose
from lightning_diag.rules.first_nonfinite import advice, first_nonfinite, sentence
from tests.rules.planted import MadeUpRun, noise, trace

ROW = {
    "step": 307,
    "epoch": 0,
    "component": None,
    "kinds": "nonfinite_gradient",
    "reason": "op",
    "module": "encoder.0",
    "op": "aten.div",
    "call": "torch.sqrt",
    "node": "SqrtBackward0",
    "direction": "backward",
    "line": "model.py:12: return torch.sqrt(x)",
    "outputs": "float32[4] no finite value, 4 infinite",
    "output_nan": 0,
    "output_inf": 4,
    "weights": "same",
    "message": "The first infinity was made in the backward pass of `torch.sqrt`.",
}


def frame(*rows):
    return pl.DataFrame(list(rows), infer_schema_length=None)


def gradients(bad=()):
    rng = np.random.default_rng(3)
    rows = trace({"encoder": noise(rng, 60, 1.0), "head": noise(rng, 60, 0.5)})
    for row in rows:
        if row["step"] in bad:
            row.update(nonfinite=7, first_nonfinite="encoder.0.weight")
    return rows


def only(rows):
    found = [one for one in diagnose(MadeUpRun(rows)) if one.rule == "nonfinite_gradient"]
    assert len(found) == 1
    return found[0]


def test_gradients_name_the_operation_and_the_step_where_it_began():
    finding = only({"grad": gradients(range(310, 600, 10)), "nonfinite": [ROW]})
    assert (finding.first_step, finding.severity) == (307, "critical")
    assert finding.message.endswith(f"Step 307 was made again: {ROW['message']}")
    assert finding.suggestion.startswith("Begin at model.py:12: return torch.sqrt(x). Add a small")


def test_a_step_between_the_rows_of_gradients_is_found():
    finding = only({"grad": gradients(), "nonfinite": [ROW]})
    assert (finding.first_step, finding.last_step, finding.severity) == (307, 307, "warning")
    assert finding.evidence.file == "records/nonfinite.jsonl"


def test_a_later_step_is_no_reason():
    finding = only({"grad": gradients([300]), "nonfinite": [{**ROW, "step": 400}]})
    assert finding.first_step == 300
    assert "made again" not in finding.message


def test_a_loss_is_left_to_its_own_rule():
    rows = {"grad": gradients(), "nonfinite": [{**ROW, "kinds": "nonfinite_loss"}]}
    assert not [one for one in diagnose(MadeUpRun(rows)) if one.rule == "nonfinite_gradient"]


@pytest.mark.parametrize("reason", ["finite", "weights_lost", "failed", "sharded", "collective"])
def test_what_has_found_nothing_is_not_cited(reason):
    rows = frame({**ROW, "reason": reason})
    assert first_nonfinite(rows) == {}
    assert sentence({}) == advice({}) == ""


def test_the_first_that_has_found_something():
    rows = frame({**ROW, "step": 9}, {**ROW, "step": 3, "reason": "finite"}, {**ROW, "step": 5})
    assert first_nonfinite(rows)["step"] == 5
    assert first_nonfinite(rows, 4) == {}
    assert first_nonfinite(frame()) == {}


def test_after_a_rollback_the_row_before_the_gradient_is_cited():
    rolled_back = {**ROW, "step": 20, "message": "It was another one."}
    finding = only({"grad": gradients([300]), "nonfinite": [rolled_back, {**ROW, "step": 290}]})
    assert finding.first_step == 290
    assert "another one" not in finding.message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"op": "aten._softmax", "call": "torch.softmax", "node": None}, "Let no row"),
        ({"op": "aten.log", "call": "torch.log", "node": None}, "Keep the argument"),
        ({"op": "aten._log_softmax", "call": "torch.log_softmax", "node": None}, "Let no row"),
        ({"op": "aten.exp", "call": "torch.exp", "node": None}, "Bound what"),
        ({"op": "aten.div", "call": "torch.Tensor.div", "node": None}, "Keep the divisor"),
        ({"op": "aten.mm", "call": "torch.matmul", "node": None}, ""),
        ({"outputs": "float16[4] no finite value"}, "The number does not fit into 16 bits"),
    ],
)
def test_advice_is_about_the_operation(change, text):
    assert advice({**ROW, **change}).startswith(f"Begin at {ROW['line']}. {text}")


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("data", "Look at the data"),
        ("parameter", "An earlier step"),
        ("buffer", "This buffer"),
        ("constant", "Look at where"),
        ("uninitialised", "Fill this"),
    ],
)
def test_advice_is_about_the_reason(reason, text):
    assert advice({**ROW, "reason": reason}).startswith(text)


@pytest.mark.parametrize(
    ("weights", "text"),
    [("later", "with the weights after it"), ("snapshot", "of the last snapshot")],
)
def test_other_weights_are_said(weights, text):
    assert text in sentence({**ROW, "weights": weights})
