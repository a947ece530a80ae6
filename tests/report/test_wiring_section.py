import pytest

from lightning_diag.records.read_run import read_run
from lightning_diag.report.sections.wiring import wiring_section
from tests.callbacks.wiring_cases import Plain, check, data
from tests.callbacks.witness import fit


def look(step, **states):
    base = {"step": step, "component": None}
    return [{**base, "check": name, **more} for name, more in states.items()]


OK = {"state": "ok"}
CUT = {"state": "wrong", "kind": "cut", "names": "encoder.weight", "at": "between `a` and `b`"}


def test_a_run_without_rows_has_no_section(write_run):
    assert wiring_section(write_run({})) is None


def test_states_and_subjects(write_run):
    rows = [
        *look(0, detached_graph=OK, missing_zero_grad={"state": "unknown", "kind": "no window"}),
        *look(1, detached_graph={**CUT, "component": "encoder", "share": 0.25}, input_scale=OK),
        *look(2, detached_graph={**CUT, "component": "encoder", "share": 0.25}, input_scale=OK),
    ]
    section = wiring_section(write_run({"wiring": rows}))
    assert section.lines == (
        "3 looks, the last at step 2: 1 check found something.",
        "As it should be: input is scaled.",
    )
    cells = {row[0]: row[1:] for row in section.tables[0].rows}
    state, where, what, since = cells["graph from loss to weights"]
    assert (state, where, since) == ("wrong", "encoder", "1")
    assert what == "cut; encoder.weight; between `a` and `b`; 25.0% of all parameters"
    assert cells["gradients zeroed between steps"][:3] == ("unknown", "", "no window")
    assert "input is scaled" not in cells


def test_of_a_real_run(tmp_path):
    fit(Plain(), check(), data(), tmp_path)
    section = wiring_section(read_run(tmp_path))
    assert section.tables == ()
    assert len(section.lines[1].split(", ")) == 13
    assert "nothing is wrong" in section.lines[0]


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1}],
        [{"step": 1, "check": None, "state": None}],
        [{"step": 1, "check": "input_scale", "state": None}],
        [{"step": 1, "check": "input_scale", "state": "wrong", "rms": None}],
        [{"step": 1, "check": "something new", "state": "wrong"}],
    ],
)
def test_odd_rows_are_survived(write_run, rows):
    wiring_section(write_run({"wiring": rows}))
