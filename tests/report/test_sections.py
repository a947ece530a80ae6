"""What a diagnostic adds to the report reaches the page, the text, the terminal and the folder."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from lightning_diag.report import print_summary, write_report
from lightning_diag.report import sections as registry
from lightning_diag.report.section import Section, Table
from lightning_diag.report.series import Panel, line_chart, points_by
from tests.report.conftest import HOSTILE

TABLE = Table(("module", "kind", "share"), [(HOSTILE, "a|b", "12 %")], title="Heads", left=2)


def series(values, **panel):
    return Panel("entropy, nats", {"a": list(enumerate(values))}, **panel)


@pytest.fixture
def registered(monkeypatch):
    """Register functions as sections."""

    def register(**makers):
        modules = {
            f"{registry.__name__}.{name}": SimpleNamespace(**{f"{name}_section": make})
            for name, make in makers.items()
        }
        monkeypatch.setattr(registry, "SECTIONS", tuple(makers))
        monkeypatch.setattr(registry.importlib, "import_module", modules.__getitem__)

    return register


def test_a_section_is_in_every_form(write_run, healthy_rows, registered):
    chart = line_chart("Entropy", [series([1.0, 2.0, None, 3.0])], said=["Per head."])
    section = Section(
        "Attention & co", ("Mean of `head` is 2.",), (TABLE,), {"entropy": chart}, {"a.csv": "x\n"}
    )
    registered(attention=lambda run: section)
    report = write_report(write_run(healthy_rows))
    page = report.files["report.html"].read_text()
    assert "<h2" in page
    assert "Attention &amp; co</h2>" in page
    assert "Mean of <code>head</code> is 2." in page
    assert "Per head." in page
    assert page.count('data-chart="entropy"') == 1
    assert 'id="spec-entropy"' in page
    assert HOSTILE not in page
    assert "12 %" in page
    text = report.files["report.md"].read_text()
    assert "## Attention \\& co" in text
    assert "Mean of `head` is 2\\." in text or "Mean of `head` is 2." in text
    assert "![Attention \\& co](entropy.png)" in text
    assert "| --- | --- | ---: |" in text
    assert HOSTILE not in text
    assert "a\\|b" in text
    assert report.files["entropy.png"].read_bytes().startswith(b"\x89PNG")
    assert report.files["a.csv"].read_text() == "x\n"
    stream = io.StringIO()
    print_summary(report, Console(file=stream, width=200))
    assert "Attention & co" in stream.getvalue()
    assert HOSTILE in stream.getvalue()


def test_a_broken_section_or_chart_costs_only_itself(write_run, healthy_rows, registered):
    def broken(run):
        raise KeyError("entropy")

    odd = Section("Odd", charts={"odd": SimpleNamespace()})
    registered(broken=broken, odd=lambda run: odd, none=lambda run: None)
    report = write_report(write_run(healthy_rows))
    assert [section.title for section in report.sections] == ["Broken", "Odd"]
    assert "KeyError: 'entropy'" in report.sections[0].lines[0]
    assert report.sections[1].lines == ("The chart odd could not be drawn: AttributeError.",)
    assert "odd.png" not in report.files


def test_a_row_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"A row must have 2 cells, got 1\."):
        Table(("a", "b"), [("x",)])


def rows_drawn(node):
    """All points of a chart, wherever Altair has put them."""
    if not isinstance(node, dict | list):
        node = node.to_dict(validate=False)
    if isinstance(node, dict) and {"x", "y", "segment"} <= node.keys():
        return [node]
    below = node.values() if isinstance(node, dict) else node
    return [row for one in below if isinstance(one, dict | list) for row in rows_drawn(one)]


def test_lines_break_at_what_is_not_finite_and_logarithms_leave_out_zero():
    rows = rows_drawn(line_chart("t", [series([1.0, float("nan"), 2.0, None, 3.0])]))
    assert [(row["x"], row["y"]) for row in rows] == [(0, 1.0), (2, 2.0), (4, 3.0)]
    assert len({row["segment"] for row in rows}) == 3
    rows = rows_drawn(line_chart("t", [series([0.0, 1.0, 10.0], log=True)]))
    assert [row["y"] for row in rows] == [1.0, 10.0]


def test_many_points_and_many_lines_are_thinned_and_said():
    many = Panel("x", {f"n{i}": [(0, float(i)), (1, float(i))] for i in range(14)})
    spec = line_chart("t", [many]).to_dict(validate=False)
    assert spec["title"]["subtitle"] == ["x: 10 of 14 are drawn."]
    assert {row["name"] for row in rows_drawn(line_chart("t", [many]))} == {
        f"n{i}" for i in range(4, 14)
    }
    long = [0.0] * 30_000
    long[12_345] = 9.0
    rows = rows_drawn(line_chart("t", [series(long)]))
    assert len(rows) <= 2000
    assert max(row["y"] for row in rows) == 9.0


def test_nothing_to_draw_is_said():
    spec = line_chart("Title", [series([None])]).to_dict(validate=False)
    assert spec["description"] == "Title: nothing was measured."


def test_points_by_component(write_run):
    rows = [
        {"step": 3, "component": "a", "x": 1.0},
        {"step": 1, "component": "a", "x": None},
        {"step": 1, "x": 2.0},
    ]
    frame = write_run({"latent": rows}).frame("latent")
    assert points_by(frame, "x") == {"a": [(1, None), (3, 1.0)], "whole model": [(1, 2.0)]}
    assert points_by(frame, "y") == {}


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_table_fits_the_terminal_without_breaking_a_cell(
    write_run, healthy_rows, registered, width
):
    names = [f"model.encoder.layers.{i}.feed_forward.activation" for i in range(25)]
    columns = ("module", *(f"some number {i}" for i in range(9)))
    rows = [(name, *("123.45 %",) * 9) for name in names]
    registered(odd=lambda run: Section("Odd", tables=(Table(columns, rows),)))
    stream = io.StringIO()
    report = write_report(write_run(healthy_rows))
    print_summary(report, Console(file=stream, width=width))
    text = stream.getvalue().partition("Odd")[2].partition("Verdict")[0]
    lines = [line for line in text.splitlines() if "activation" in line]
    assert len(lines) == 20
    assert all(len(line) <= width for line in text.splitlines())
    assert all("feed_forward.activation"[-8:] in line and "123.45 %" in line for line in lines)
    assert "5 more rows" in text
    assert ("columns in the report" in text) == (width < 140)
