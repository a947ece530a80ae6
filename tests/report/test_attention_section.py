"""Does the report say of attention what the rows say?"""

import math

import polars as pl
import pytest

from lightning_diag import read_run
from lightning_diag.report.sections.attention import attention_section, head_entropy
from tests.callbacks.attention_models import TOKENS, Dots
from tests.callbacks.test_attention_capture import capture, train

HEADS = {"heads": 4, "heads_peaked": 0, "heads_uniform": 0, "heads_sink": 0, "heads_duplicate": 0}


def module_row(step, name, entropy, **more):
    row = {"step": step, "component": name, "entropy": entropy, "max": 0.4, "sink_share": 0.1}
    return {**row, "entropy_normalized": entropy / 4, "peaked_share": 0.25, **HEADS, **more}


def run_of(write_run, entropies, **more):
    attention = []
    for step, entropy in enumerate(entropies):
        attention.append(module_row(100 * step, "fusion", entropy))
        attention.append(module_row(100 * step, "decoder", entropy + 1, heads_sink=2))
        whole = {"step": 100 * step, "component": None, "entropy": entropy + 0.5, "captured": 2}
        attention.append({**whole, "entropy_normalized": 0.5})
    return write_run({"attention": attention, **more})


class TestSection:
    def test_a_run_without_attention_has_none(self, write_run):
        assert attention_section(write_run({})) is None

    def test_numbers_are_those_of_the_rows(self, write_run):
        section = attention_section(run_of(write_run, [2.0, 2.0, 2.0, 1.0, 1.0, 1.0]))
        assert (
            section.lines[0]
            == "Mean entropy over 2 modules is 2 nats, 50% of the largest possible."
        )
        assert section.lines[1].startswith("It falls from 2.5 to 1.5 nats (-40%)")
        (table,) = section.tables
        assert table.rows == [
            ("fusion", "1.5", "0.375", "0.4", "25 %", "10 %", "4", "-"),
            ("decoder", "2.5", "0.625", "0.4", "25 %", "10 %", "4", "2 sink"),
        ]
        assert set(section.charts) == {"attention_entropy"}

    @pytest.mark.parametrize(
        ("entropies", "word"),
        [([1.0, 1.0, 2.0], "rises"), ([2.0, 1.5, 1.0], "falls"), ([1.0, 3.0, 1.0], "stays")],
    )
    def test_the_trend_is_of_thirds(self, write_run, entropies, word):
        assert attention_section(run_of(write_run, entropies)).lines[1].startswith(f"It {word}")

    @pytest.mark.parametrize("count", [1, 2])
    def test_few_rows_have_no_trend(self, write_run, count):
        lines = attention_section(run_of(write_run, [1.0] * count)).lines
        assert not any(line.startswith("It ") for line in lines)

    def test_drivers_of_each_target(self, write_run):
        def target(step, number, name, **drivers):
            row = {"step": step, "component": "fusion", "query": number, "name": name}
            return {**row, "entropy": 1.0 + step, "mean": 0.1, "std": 0.05, "max": 0.5, **drivers}

        targets = [
            target(0, 0, "open", key_1=3, mass_1=0.9, name_1="mars"),
            target(1, 0, "open", key_1=1, mass_1=0.5, name_1="moon", key_2=0, mass_2=0.25),
            target(1, 1, None, key_1=2, mass_1=0.125),
            target(1, 2, "close"),
        ]
        section = attention_section(run_of(write_run, [1.0], attention_query=targets))
        table = section.tables[1]
        assert table.rows == [
            ("fusion", "open", "1.5", "0.1", "0.05", "0.5", "moon 50 %, key 0 25 %"),
            ("fusion", "1", "2", "0.1", "0.05", "0.5", "key 2 12.5 %"),
            ("fusion", "close", "2", "0.1", "0.05", "0.5", "-"),
        ]

    def test_heads_by_verdict_at_the_end(self, write_run):
        heads = [
            {"step": step, "component": "fusion", "head": head, "verdict": verdict}
            for step in (0, 1)
            for head, verdict in enumerate(["uniform", None, "sink", "sink"])
            if step == 1 or verdict != "sink"
        ]
        section = attention_section(run_of(write_run, [1.0], attention_head=heads))
        assert [(row[0], row[2], row[3]) for row in section.tables[1].rows] == [
            ("sink", "fusion", "2, 3"),
            ("uniform", "fusion", "0"),
        ]

    def test_each_head_is_a_line_and_each_module_a_panel(self, write_run):
        heads = [
            {"step": step, "component": name, "head": head, "entropy_normalized": share}
            for name, low in (("fusion", 0.5), ("decoder", 0.25))
            for step in (0, 10)
            for head, share in enumerate([low, 1.0])
        ]
        section = attention_section(run_of(write_run, [1.0], attention_head=heads))
        spec = section.charts["attention_heads"].to_dict()
        assert [panel["title"]["text"] for panel in spec["concat"]] == ["fusion", "decoder"]
        points = [row for rows in spec["datasets"].values() for row in rows]
        assert {(row["name"], row["x"], row["y"]) for row in points} == {
            (name, step, share)
            for step in (0, 10)
            for name, share in (("head 0", 0.5), ("head 0", 0.25), ("head 1", 1.0))
        }
        assert "head 0 goes from 0.5 to 0.5" in spec["description"]

    def test_of_many_modules_and_heads_the_telling_ones_are_drawn(self):
        rows = [
            {"step": 0, "component": f"block {block}", "head": head, "entropy": 1 + block * head}
            for block in range(12)
            for head in range(16)
        ]
        spec = head_entropy(pl.DataFrame(rows)).to_dict()
        assert [panel["title"]["text"] for panel in spec["concat"]] == [
            f"block {block}" for block in range(4, 12)
        ]
        names = {row["name"] for rows in spec["datasets"].values() for row in rows}
        assert names == {f"head {head}" for head in (*range(5), *range(11, 16))}
        said = " ".join(spec["title"]["subtitle"])
        assert "8 of 12 modules" in said
        assert "10 heads" in said
        assert "entropy (nats)" in str(spec)

    @pytest.mark.parametrize(
        "frame",
        [
            {"step": [1]},
            {"step": [1], "component": [None], "head": [0], "entropy": [1.0]},
            {"step": [1], "component": ["a"], "head": [0], "entropy": [None]},
            {"step": [1], "component": ["a"], "head": [0], "entropy": [math.nan]},
        ],
    )
    def test_no_entropy_of_heads_is_no_chart(self, frame):
        assert head_entropy(pl.DataFrame(frame)) is None

    def test_many_modules_are_cut(self, write_run):
        rows = [module_row(0, f"layer {i}", 1.0) for i in range(40)]
        table = attention_section(write_run({"attention": rows})).tables[0]
        assert len(table.rows) == 30
        assert table.title.endswith("(first 30 of 40)")

    @pytest.mark.parametrize(
        "rows",
        [
            [{"step": 0}],
            [{"step": 0, "component": None, "captured": 0}],
            [{"step": 0, "component": "a"}],
            [{"step": 0, "component": "a", "entropy": None, "heads": None, "max": math.pi}],
        ],
    )
    def test_odd_rows(self, write_run, rows):
        section = attention_section(write_run({"attention": rows, "attention_query": rows}))
        assert section is not None
        for chart in section.charts.values():
            chart.to_dict()

    def test_nothing_seen_is_said(self, write_run):
        rows = [{"step": 0, "component": None, "captured": 0}]
        assert attention_section(write_run({"attention": rows})).lines == (
            "No attention was seen.",
        )


def test_of_a_real_run(tmp_path):
    names = {"part": [f"key {i}" for i in range(TOKENS)]}
    train(Dots(), tmp_path, [capture(key_names=names)])
    section = attention_section(read_run(tmp_path))
    assert len(section.tables[0].rows) == 1
    assert len(section.tables[1].rows) == TOKENS
    chart = section.charts["attention_entropy"].to_dict()
    assert "Entropy of attention" in chart["description"]
