"""Does the report tell a collapse, and say so where there was none, whatever the rows hold?"""

import math

import pytest
import torch

from lightning_diag.callbacks.collapse_stop import CollapseStop
from lightning_diag.records import read_run
from lightning_diag.report.sections.collapse import collapse_section
from tests.callbacks.collapse_plan import NAN, Planned, batches
from tests.callbacks.witness import fit
from tests.report.conftest import HOSTILE


def row(step, event=0, streak=0, **more):
    common = {"step": step, "event": event, "streak": streak, "kinds": None, "action": None}
    numbers = {"loss": 1.0 + step, "gradient_norm": 0.5, "variance": 0.1, "events_total": 0}
    return common | numbers | more


def event(step, streak, kinds="nonfinite_loss", **more):
    return row(step, 1, streak, kinds=kinds, **more)


def of(write_run, *rows, **more):
    return collapse_section(write_run({"collapse": list(rows)}, **more))


def test_nothing_was_watched(write_run):
    assert collapse_section(write_run({"metrics": [{"step": 0, "loss": 1.0}]})) is None


def test_nothing_happened(write_run):
    section = of(write_run, row(0), row(1), row(100))
    assert section.lines == ("No step was an event, up to step 100.",)
    assert not section.tables
    assert set(section.charts) == {"collapse"}


def test_rows_of_events_and_what_was_done(write_run):
    section = of(
        write_run,
        row(0),
        event(3, 1, loss=None, loss_nonfinite=1, events_total=1),
        row(4, events_total=1),
        event(6, 1, "exploding_gradient", gradient_norm=250.0, events_total=2),
        event(7, 2, "exploding_gradient,loss_spike", gradient_norm=350.0, events_total=3),
        event(8, 3, action="rollback", restored_step=5, events_total=4, variance=None),
        event(9, 1, events_total=5),
        event(10, 2, events_total=6),
        event(11, 3, action="stop", events_total=7),
        info={"stop_reason": {"diagnostic": "CollapseStop", "message": "the run has collapsed."}},
    )
    assert section.lines == (
        "7 steps were events, the first at step 3, at most 3 in a row, up to step 11.",
        "The run has collapsed.",
    )
    (table,) = section.tables
    assert table.rows == [
        ("step 3", "loss not finite", "-", "1", "not finite", "0.5", "0.1"),
        (
            "steps 6 to 8",
            "gradient explodes, loss spike, loss not finite",
            "back to the state after 5 steps",
            "3",
            "9",
            "0.5",
            "-",
        ),
        ("steps 9 to 11", "loss not finite", "stopped", "3", "12", "0.5", "0.1"),
    ]


def test_a_skipped_step_does_not_cut_a_row_of_events(write_run):
    section = of(write_run, event(3, 1), row(4, streak=1), event(5, 2), row(6), event(7, 1))
    assert [cells[0] for cells in section.tables[0].rows] == ["steps 3 to 5", "step 7"]


def test_what_a_stop_had_to_wait_for(write_run):
    reason = {"diagnostic": "CollapseStop", "message": "dead.", "delayed_by": "min_steps=9"}
    section = of(write_run, event(3, 1), info={"stop_reason": reason})
    assert section.lines[1] == "Dead. The stop had to wait for `min_steps=9`."


@pytest.mark.parametrize("reason", [None, "dead", {"diagnostic": "Other"}, {"rule": 3}])
def test_another_reason_is_not_told(write_run, reason):
    assert len(of(write_run, row(0), info={"stop_reason": reason}).lines) == 1


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 3, "event": 1}],
        [{"step": 3, "event": None, "streak": None}],
        [{"step": 3, "event": 1, "streak": None, "kinds": None, "loss": None}],
        [{"step": 3, "event": 1, "streak": 2, "kinds": HOSTILE, "loss": "text"}],
        [event(3, 1, action=HOSTILE, restored_step=None)],
        [event(2, 1), event(1, 1), event(1, 1)],
        [row(step) for step in range(5000)],
    ],
)
def test_odd_rows(write_run, rows):
    section = of(write_run, *rows)
    assert section.lines
    section.charts["collapse"].to_dict()


@pytest.mark.parametrize("odd", [{"step": 1, "loss": 2.0}, {"step": None, "event": 1}])
def test_no_usable_row(write_run, odd):
    assert of(write_run, odd) is None


def test_many_rows_of_events(write_run):
    rows = [one for step in range(0, 100, 2) for one in (event(step, 1), row(step + 1))]
    (table,) = of(write_run, *rows).tables
    assert len(table.rows) == 20
    assert "the last 20" in table.title


def test_the_chart_says_what_it_shows(write_run):
    chart = of(write_run, row(0), row(1), row(2, gradient_norm=1e6)).charts["collapse"].to_dict()
    assert "Signs of collapse" in chart["description"]
    assert "gradient norm" in chart["description"]


def test_a_true_run(tmp_path):
    torch.manual_seed(0)
    plan = {"losses": dict.fromkeys(range(4, 20), NAN), "norms": {2: math.inf}}
    fit(Planned(**plan), CollapseStop(on_error="raise"), batches(), tmp_path)
    section = collapse_section(read_run(tmp_path))
    assert section.lines[0].startswith("4 steps were events, the first at step 2, at most 3")
    assert "3 judged steps in a row up to step 6" in section.lines[1]
    assert [cells[0] for cells in section.tables[0].rows] == ["step 2", "steps 4 to 6"]
    assert section.tables[0].rows[1][2] == "stopped"
