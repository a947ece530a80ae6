"""Does the section on updates say what the rows say, and survive odd rows?"""

import pytest

from lightning_diag.report.sections.updates import updates_section
from tests.report.conftest import HOSTILE


def update(step, component=None, ratio=1e-3, **more):
    return {
        "step": step,
        "component": component,
        "ratio": ratio,
        "update_l2": 0.01,
        "weight_l2": 10.0,
        "unchanged_share": 0.25,
        "never_changed": 0,
        "lr": 1e-3,
        **more,
    }


def test_nothing_without_rows(write_run):
    assert updates_section(write_run({"grad": []})) is None
    assert updates_section(write_run({"update": []}, name="empty")) is None


def test_table_and_sentences(write_run):
    rows = []
    for step in (49, 99, 149):
        jump = {"jump": 30.0, "jumped": 1} if step == 99 else {"jump": 1.0, "jumped": 0}
        names = {"never_changed": 2, "first_never_changed": "head.weight, head.bias"}
        rows += [
            update(step, "encoder", ratio=step * 1e-5, **jump),
            update(step, "head", ratio=0.0, **names),
            update(step, skipped=0),
        ]
    rows.append({"step": 199, "component": None, "skipped": 1, "lr": 1e-3})
    section = updates_section(write_run({"update": rows}))
    assert section.title == "Updates"
    first, head, encoder = section.lines[0], *sorted(section.lines[1:], reverse=True)
    assert "4 steps were measured, the last 199. 1 of them was skipped" in first
    assert "2 parameters got a gradient and never changed" in head
    assert "`head.weight, head.bias`" in head
    assert "jumped at step 99, to at most 30 times" in encoder
    (table,) = section.tables
    cells = {row[0]: row[1:] for row in table.rows}
    assert list(cells) == ["encoder", "head", "whole model"]
    assert cells["encoder"][:4] == ("0.00099", "0.00049", "0.00149", "0.00149")
    assert cells["encoder"][4:] == ("0.01", "10", "25.0 %", "0", "1")
    assert cells["head"][0] == "0"
    spec = section.charts["update_ratio"].to_dict()
    assert "rule of thumb" in str(spec)


def test_norms_of_what_is_not_finite_are_no_numbers(write_run):
    lost = update(99, "head", ratio=None, update_l2=0.0, weight_l2=0.0, nonfinite=7)
    (table,) = updates_section(write_run({"update": [update(49, "head"), lost]})).tables
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert (cells["last"], cells["update norm"]) == ("0.001", "not finite")
    assert cells["weight norm"] == "not finite"


def test_several_optimizers_are_kept_apart(write_run):
    rows = [update(49, optimizer=i, ratio=10.0**-i) for i in (0, 1)]
    (table,) = updates_section(write_run({"update": rows})).tables
    assert [row[0] for row in table.rows] == [f"whole model, optimizer {i}" for i in (0, 1)]


@pytest.mark.parametrize(
    "row",
    [
        {"step": 3},
        {"step": 3, "component": HOSTILE, "ratio": None, "never_changed": 1},
        {"step": 3, "component": "a", "ratio": "odd", "jumped": 1},
        {"step": 3, "component": None, "skipped": 1},
        {"step": None, "component": "a"},
    ],
)
def test_odd_rows(write_run, row):
    section = updates_section(write_run({"update": [row]}))
    assert section is None or section.title == "Updates"
    for chart in section.charts.values() if section else ():
        chart.to_dict()
