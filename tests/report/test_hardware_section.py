"""Does the report say how busy the machine was, whatever the rows hold?"""

import pytest
import vl_convert

from lightning_diag.report.sections.hardware import hardware_section


def row(step, **numbers):
    return {"step": step, "component": None, **numbers}


def spec_of(section):
    spec = section.charts["hardware"].to_dict()
    assert vl_convert.vegalite_to_png(spec)
    assert spec["description"]
    return spec


def test_none_without_rows(write_run):
    assert hardware_section(write_run({})) is None
    assert hardware_section(write_run({"hardware": [row(1, batches=3)]}, name="other")) is None


def test_what_is_said(write_run):
    rows = [
        row(9, samples_per_second=100.0, data_wait=0.5, step_seconds=0.02, cpu_percent=20.0),
        row(29, samples_per_second=300.0, data_wait=0.3, step_seconds=0.03, cpu_percent=40.0),
        row(19, samples_per_second=200.0, data_wait=0.4, step_seconds=0.04, cpu_percent=90.0),
    ]
    section = hardware_section(write_run({"hardware": rows}))
    assert section.lines[0] == "200 samples per second (median)."
    assert section.lines[1].startswith("40.0 % of the time went between batches")
    assert "`num_workers`" in section.lines[1]
    assert section.lines[2] == "No numbers of a GPU were recorded."
    (table,) = section.tables
    cells = {(line[0], line[1]): line[2:] for line in table.rows}
    assert cells["throughput", "samples/s"] == ("200", "100", "300", "300")
    assert cells["waiting for data", "% of the time"] == ("40", "30", "50", "30")
    assert cells["time of a batch", "ms"] == ("30", "20", "40", "30")
    spec = spec_of(section)
    assert len(spec["vconcat"]) == 2


def test_a_gpu(write_run):
    numbers = {"gpu_percent": 97.0, "gpu_memory_percent": 80.0, "gpu_memory_used": 65_000.0}
    rows = [row(i, **numbers, gpu_power=600.0, data_wait=0.01, mfu=0.41) for i in range(3)]
    section = hardware_section(write_run({"hardware": rows}))
    assert section.lines == ("1.0 % of the time went between batches, mostly in waiting for data.",)
    cells = {(line[0], line[1]): line[2] for line in section.tables[0].rows}
    assert cells["GPU in use", "% of the time"] == "97"
    assert cells["share of the peak", "%"] == "41"
    spec_of(section)


@pytest.mark.parametrize(
    "rows",
    [
        [row(0, data_wait=0.5)],
        [row(0, cpu_percent=None, data_wait=0.5), row(1, cpu_percent=3.0)],
        [row(None, data_wait=0.5), row(1, data_wait=0.5)],
        [row(0, data_wait="odd", cpu_percent=2.0)],
        [row(0, data_wait=None, samples_per_second=None, cpu_percent=1.0)],
    ],
    ids=["one", "nulls", "no step", "words", "only nulls"],
)
def test_odd_rows_are_survived(rows, write_run):
    section = hardware_section(write_run({"hardware": rows}))
    assert section is not None
    spec_of(section)
