"""Do two processes see the blobs that one process sees, and end together?"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_diag.lightning import PACKAGE
from tests.callbacks.scripts.blob_two_processes import train
from tests.callbacks.test_blob_metrics import results
from tests.callbacks.witness import rows

SCRIPT = Path(__file__).parent / "scripts" / "blob_two_processes.py"
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the runs by mode; a run that hangs is killed, and fails the tests."""
    folder = tmp_path_factory.mktemp("runs")
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = os.environ | {"PYTHONPATH": paths, "LIGHTNING_DIAG_TEST_PACKAGE": PACKAGE}
    started = {}
    for mode in ("ddp", "fsdp2", "broken"):
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
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, f"{mode}: {output[-3000:]}"
    return {mode: folder / mode for mode in ("single", *started)}


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_every_number_is_that_of_one_process(runs, mode):
    alone, together = rows(runs["single"], "blob"), rows(runs[mode], "blob")
    assert [row["step"] for row in alone] == [2, 3, 5, 7, 8, 11, 14, 15]
    for one, both in zip(alone, together, strict=True):
        for key in one.keys() - {"time", "attempt", "computation_time_ms"}:
            # gradients of shards are added up in another order
            same = both[key] == one[key] or np.allclose(both[key], one[key], rtol=1e-5, atol=1e-7)
            assert same, (one["step"], key)
    entries = results(runs[mode])["training_history"]
    assert [entry["epoch"] for entry in entries] == [1, 2, 3, 4]
    assert all("diagnostics" in entry for entry in entries)


def test_ranks_end_together(runs):
    assert [row["step"] for row in rows(runs["broken"], "blob")] == [2]
    told = [(runs["broken"] / f"told_{rank}.txt").read_text() for rank in range(2)]
    assert "ZeroDivisionError" in told[0]
    assert "it failed on rank 0" in told[1]
