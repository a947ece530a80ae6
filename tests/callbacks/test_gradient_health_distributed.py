"""Do two processes see the gradients that one process sees?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_diag.lightning import PACKAGE
from tests.callbacks.scripts.two_processes import train
from tests.callbacks.witness import rows

SCRIPT = Path(__file__).parent / "scripts" / "two_processes.py"
ROOT = Path(__file__).resolve().parents[2]
MODES = ["ddp", "fsdp2"]
BROKEN = 5

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the runs by mode; a run that hangs is killed, and fails the tests."""
    folder = tmp_path_factory.mktemp("runs")
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = os.environ | {"PYTHONPATH": paths, "LIGHTNING_DIAG_TEST_PACKAGE": PACKAGE}
    started = {}
    for mode in MODES:
        (folder / mode).mkdir()
        started[mode] = subprocess.Popen(
            [sys.executable, str(SCRIPT), mode, str(folder / mode)],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    (folder / "single").mkdir()
    train("single", folder / "single")
    for mode, process in started.items():
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
        assert process.returncode == 0, f"{mode}: {output[-3000:]}"
    return {mode: folder / mode for mode in ["single", *MODES]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix", ["grad", "grad_parameter", "grad_histogram"])
def test_every_number_is_that_of_one_process(runs, mode, prefix):
    alone, together = rows(runs["single"], prefix), rows(runs[mode], prefix)
    assert len(alone) == len(together) > 0
    for one, both in zip(alone, together, strict=True):
        for key in one.keys() - {"time", "attempt"}:
            if one["step"] >= BROKEN and key not in ("step", "component", "parameter", "tensors"):
                continue
            want = one[key]
            if isinstance(want, float):
                # the order of summation differs; one mean of eight, or two of four
                want = pytest.approx(want, rel=1e-4, abs=1e-6)
            assert both[key] == want, (one["step"], one["component"], key)


@pytest.mark.parametrize("mode", MODES)
def test_rows_stand_once_whatever_the_number_of_processes(runs, mode):
    assert [row["step"] for row in rows(runs[mode], component=None)] == [1, 3, 5, 7]


@pytest.mark.parametrize("mode", MODES)
def test_what_breaks_on_the_last_rank_is_seen_by_the_first(runs, mode):
    before, broken = (rows(runs[mode], step=step, component=None)[0] for step in (3, BROKEN))
    assert before["nonfinite"] == 0
    assert broken["nonfinite"] == 49
    assert broken["first_nonfinite"] == "encoder.0.weight"


def test_callback_metrics_are_there_on_every_rank(runs):
    assert {file.name for file in runs["fsdp2"].glob("rank-*")} == {"rank-0", "rank-1"}
    assert (runs["ddp"] / "rank-0").read_text() == "0.0"
