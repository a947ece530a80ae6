"""Does the section on activations put the worst first, and survive odd rows?"""

import pytest

from lightning_diag.report.sections.activations import activations_section
from tests.report.conftest import HOSTILE


def activation(step, component, dead=0.0, saturated=None, **more):
    return {
        "step": step,
        "component": component,
        "function": "relu",
        "units": 100,
        "dead_units": None if dead is None else int(100 * dead),
        "dead_share": dead,
        "dead_now": dead,
        "saturated_share": saturated,
        "zero_share": 0.5,
        "mean": 0.4,
        "std": 0.6,
        "nonfinite": 0,
        **more,
    }


def test_nothing_without_rows(write_run):
    assert activations_section(write_run({"grad": []})) is None


def test_table_and_sentences(write_run):
    rows = [
        *(activation(99, "a", 0.1), activation(99, "b", None, 0.2), activation(99, None)),
        *(activation(199, "a", 0.4), activation(199, "b", None, 0.7), activation(199, None)),
        activation(199, "fine"),
    ]
    section = activations_section(write_run({"activation": rows}))
    assert "3 activation functions, measured at 2 steps. 40 of 200 units are dead." in section.lines
    assert any(
        "`a` has the largest share of dead units: 40.0 % (10.0 %" in x for x in section.lines
    )
    assert any("`b` has the largest share of saturated" in x for x in section.lines)
    (table,) = section.tables
    assert [row[0] for row in table.rows] == ["b", "a", "fine"]
    assert table.rows[1][2:6] == ("40.0 %", "40.0 %", "-", "50.0 %")
    section.charts["activations"].to_dict()


def test_of_many_the_worst_are_shown(write_run):
    rows = [activation(99, f"m{i}", i / 1000) for i in range(300)]
    (table,) = activations_section(write_run({"activation": rows})).tables
    assert len(table.rows) == 20
    assert table.rows[0][0] == "m299"
    assert table.title == "The 20 worst of 300, at the last step"


@pytest.mark.parametrize(
    "row",
    [
        {"step": 3, "component": "a"},
        {"step": 3, "component": HOSTILE, "dead_share": None, "function": None},
        {"step": 3, "component": "a", "dead_share": "odd", "nonfinite": 4},
        {"step": 3, "component": None},
        {"step": None, "component": "a"},
    ],
)
def test_odd_rows(write_run, row):
    section = activations_section(write_run({"activation": [row]}))
    for chart in section.charts.values() if section else ():
        chart.to_dict()
