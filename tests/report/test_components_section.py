"""Does the report say what each part is and costs, whatever the rows hold?"""

import pytest
import vl_convert

from lightning_diag.report.sections.components import components_section
from tests.report.conftest import HOSTILE


def size(step, component, parameters, share, **more):
    row = {"step": step, "component": component, "parameters": parameters, "share": share}
    row |= {"trainable": parameters, "frozen": 0, "buffers": 0, "bytes": 4 * parameters}
    return row | more


def timed(step, component, parameters, share, seconds, *, counting=0, **more):
    row = size(step, component, parameters, share, counting=counting, eager=0, calls=1)
    row |= {"forward_seconds": seconds, "backward_seconds": 2 * seconds}
    row |= {"step_share": 3 * seconds / 0.1}
    counts = {"forward_flops": 2_000_000, "saved_bytes": 3 << 20, "peak_bytes": 5 << 30}
    return row | (counts if counting else {}) | more


def spec_of(section):
    spec = section.charts["components"].to_dict()
    assert vl_convert.vegalite_to_png(spec)
    assert spec["description"]
    return spec


SEED = [
    size(0, "fusion_cross_attention", 264_192, 264_192 / 2_145_280),
    size(0, "celestial_to_target_attention", 131_328, 131_328 / 2_145_280, trainable=0),
    size(0, None, 2_145_280, 1.0, trainable=2_013_952, frozen=131_328),
]


def test_none_without_rows(write_run):
    assert components_section(write_run({})) is None
    assert components_section(write_run({"component": [{"step": 1}]}, name="other")) is None


def test_sizes_with_their_share_of_the_whole(write_run):
    section = components_section(write_run({"component": SEED}))
    (table,) = section.tables
    assert table.rows[0] == (
        *("fusion_cross_attention", "264,192", "12.32 %", "264,192", "0", "0", "1.0 MiB"),
    )
    assert table.rows[1][1:4] == ("131,328", "6.12 %", "0")
    assert table.rows[2][:4] == ("whole model", "2,145,280", "100.00 %", "2,013,952")
    assert section.lines == ("2,013,952 of 2,145,280 parameters are trainable.",)
    assert len(spec_of(section)["vconcat"]) == 1


def test_times_are_medians_of_the_steps_that_nobody_slowed(write_run):
    rows = [*SEED]
    for step, seconds, counting in (
        (499, 5.0, 1),
        (999, 0.01, 0),
        (1499, 0.03, 0),
        (1999, 0.02, 0),
    ):
        rows += [timed(step, "fusion_cross_attention", 264_192, 0.1231, seconds, counting=counting)]
        rows += [timed(step, None, 2_145_280, 1.0, 2 * seconds, counting=counting)]
    section = components_section(write_run({"component": rows}))
    cost = section.tables[1]
    assert cost.rows[0] == (
        *("fusion_cross_attention", "20 ms", "40 ms", "60.00 %", "2e+06", "3.0 MiB", "5.0 GiB"),
    )
    assert [row[0] for row in cost.rows] == ["fusion_cross_attention", "whole model"]
    assert "`fusion_cross_attention` takes the largest part of a step, 60.00 %" in section.lines[1]
    bars = [row for rows in spec_of(section)["datasets"].values() for row in rows]
    times = {row["what"]: row["value"] for row in bars if row["what"] != "parameters"}
    assert times == {"forward": 20, "backward": 40}


def test_slowed_times_are_better_than_none_and_say_so(write_run):
    rows = [timed(499, "a", 10, 0.5, 0.01, counting=1), timed(499, None, 20, 1.0, 0.02, counting=1)]
    section = components_section(write_run({"component": rows}))
    assert section.tables[1].rows[0][1] == "10 ms"
    assert "counted while these times were taken" in section.lines[-1]


def test_eager_copies_are_named(write_run):
    row = timed(499, "a", 10, 1.0, 0.01, eager=1)
    row |= {"backward_seconds": None, "step_share": None}
    section = components_section(write_run({"component": [row]}))
    assert section.tables[1].rows[0][:4] == ("a (eager copy)", "10 ms", "-", "-")
    assert "eager copy" in section.lines[-1]


def test_what_modules_said(write_run):
    said = [
        {"step": 1, "component": "a", "module": "a.gate", "name": "open", "value": 0.1},
        {
            "step": 2,
            "component": "a",
            "module": "a.gate",
            "name": "open",
            "value": 0.25,
            "min": 0.0,
        },
        {"step": 2, "component": None, "module": "", "name": "heat", "value": None},
    ]
    section = components_section(write_run({"component_internal": said}))
    (table,) = section.tables
    assert table.rows == [
        ("a.gate", "open", "0.25", "0", "-"),
        ("whole model", "heat", "-", "-", "-"),
    ]
    many = [{"step": 1, "module": f"m{i}", "name": "x", "value": 1.0} for i in range(100)]
    section = components_section(write_run({"component_internal": many}, name="many"))
    assert len(section.tables[0].rows) == 40
    assert "40 of 100" in section.tables[0].title


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0, "component": "a", "parameters": 3}],
        [{"step": None, "component": "a", "parameters": 3, "forward_seconds": 0.1}],
        [{"step": 0, "component": None, "parameters": 0, "share": None}],
        [size(0, "a", 1, None), {"step": 1, "component": "b", "parameters": None}],
        [size(0, "a", 1, 0.5, forward_seconds="odd", bytes="odd")],
    ],
    ids=["nothing but a count", "no step", "no parameters", "nulls", "words"],
)
def test_odd_rows_are_survived(rows, write_run):
    section = components_section(write_run({"component": rows}))
    if section.charts:
        spec_of(section)


def test_names_are_what_they_are_and_many_are_cut(write_run):
    rows = [size(0, f"{HOSTILE}`{i}", 100 - i, (100 - i) / 5000) for i in range(50)]
    rows += [timed(1, f"{HOSTILE}`0", 100, 0.02, 0.01)]
    section = components_section(write_run({"component": rows}))
    assert len(section.tables[0].rows) == 50
    assert section.lines[-1].count("`") == 2
    spec = spec_of(section)
    assert len({row["name"] for rows in spec["datasets"].values() for row in rows}) == 20
    assert "30 more components" in spec["title"]["subtitle"][0]
