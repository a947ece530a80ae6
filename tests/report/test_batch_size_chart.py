"""The chart over batch sizes: what is drawn, and that every edge case is drawable."""

import subprocess
import sys

import pytest

from lightning_diag.report.batch_size import batch_size_chart, batch_size_picture


def one(size, rate=None, memory=None, status="ok", **fields):
    return {
        "batch_size": size,
        "status": status,
        "samples_per_second": rate,
        "peak_memory_gb": memory,
        "memory_kind": "gpu reserved" if memory else None,
        **fields,
    }


FAILED = [one(256, status="out of memory"), one(512, status="skipped")]
ROWS = [
    one(16, 100.0, 2.0, epoch_seconds=[9.0, 10.0, 12.5], epoch_samples=[1000, 1000, 1000]),
    one(64, 300.0, 7.0, epoch_seconds=[3.0], epoch_samples=[900]),
    *FAILED,
]
CASES = {
    "all": ROWS,
    "none": [],
    "failed": FAILED,
    "one": ROWS[:1],
    "no memory": [one(1, 3.0), one(2, 5.0)],
    "no samples": [one(8, None, 2.0, epoch_seconds=[1.0, 2.0], epoch_samples=[None, None])],
}


@pytest.mark.parametrize("name", CASES)
def test_edge_cases_are_drawn(name):
    chart = batch_size_chart(CASES[name], chosen=64, most_memory_gb=8.0)
    picture = batch_size_picture(chart)
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5_000


def test_a_title_that_no_picture_can_hold():
    # what cannot be drawn ends the whole process
    code = "from lightning_diag.report.batch_size import *"
    code += "; print(batch_size_picture(batch_size_chart([], title='a\\x1bb'))[1:4])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "b'PNG'"), done.stderr


def test_what_is_drawn():
    chart = batch_size_chart(ROWS, title="Batch sizes: tiny", chosen=64, most_memory_gb=8.0)
    spec = chart.to_dict()  # checked against the schema of Vega-Lite
    assert spec["title"]["text"] == "Batch sizes: tiny"
    assert spec["title"]["subtitle"][0] == "Dashed: 64 is recommended."
    assert "16: 100 samples per second, 2 GB; 64: 300 samples" in spec["description"]
    assert spec["description"].endswith("256: out of memory; 512: skipped.")
    rate, memory = spec["vconcat"]
    assert points(spec, rate, "rate") == [(16, 100.0), (64, 300.0)]
    assert points(spec, memory, "memory") == [(16, 2.0), (64, 7.0)]
    assert drawn(memory)["y"]["title"] == "GPU memory (GB)"
    assert drawn(rate)["x"]["scale"]["type"] == "log"
    (bar,) = values(spec, rate["layer"][1])  # one epoch has no spread
    assert (bar["size"], bar["low"], bar["high"]) == (16, 80.0, pytest.approx(1000 / 9))
    assert [row["size"] for row in values(spec, rate["layer"][2])] == [256, 512]
    assert [row["y"] for row in values(spec, memory["layer"][-1])] == [8.0]


def test_a_limit_far_above_the_points_is_said_and_not_drawn():
    chart = batch_size_chart(ROWS, most_memory_gb=140.0)
    spec = chart.to_dict()
    assert len(spec["vconcat"][1]["layer"]) == 2
    assert "140.0 GB" in spec["title"]["subtitle"][-1]


def points(spec, panel, field):
    return [(row["size"], row[field]) for row in values(spec, panel["layer"][0])]


def values(spec, layer):
    return spec["datasets"][layer["data"]["name"]]


def drawn(panel):
    return panel["layer"][0]["encoding"]
