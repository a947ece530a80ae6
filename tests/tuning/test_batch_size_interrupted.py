"""A user's script with the profile in it: Ctrl-C, a killed parent, a missing guard."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("batch_size_script.py")


def listens_to_ctrl_c():
    # a job in the background of a shell ignores it, and so would all that it starts
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path):
    """Start the script with these sizes; gives the process, and where the marks come."""
    started = []

    def start(sizes, guard="guarded"):
        marks, report = tmp_path / "marks", tmp_path / "profile.md"
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(sizes), str(marks), str(report), guard],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=listens_to_ctrl_c,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process, marks

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(true, seconds=120.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def pids(marks):
    return (
        [int(line.split()[0]) for line in marks.read_text().splitlines()] if marks.exists() else []
    )


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured_and_leaves_no_process(start, tmp_path):
    process, marks = start([8, 16, 32, 64])
    until(lambda: len(pids(marks)) == 3)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    failed, unfilled, *rest = json.loads(output)
    assert (failed["status"], failed["oom_error"]) == ("error", False)
    assert failed["error_message"] == "RuntimeError: the job was told to fail"
    assert (unfilled["status"], unfilled["epoch_samples"]) == ("ok", [12])
    assert unfilled["error_message"] == (
        "The largest batch held 12 samples: this size was not reached."
    )
    assert [row["status"] for row in rest] == ["interrupted", "skipped"]
    assert all(gone(pid) for pid in pids(marks))
    lines = (tmp_path / "profile.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    states = [line.split("|")[-2].strip() for line in table]
    assert states[2:] == ["ERROR", "OK", "INTERRUPTED", "SKIPPED"]


@pytest.mark.slow
def test_a_killed_parent_leaves_no_process(start):
    process, marks = start([32])
    until(lambda: len(pids(marks)) == 1)
    process.kill()
    process.communicate()
    until(lambda: all(gone(pid) for pid in pids(marks)), 30)


@pytest.mark.slow
def test_a_script_without_its_guard_is_told_the_rule(start):
    process, marks = start([32], "unguarded")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1].endswith("it was called by that import.")
    assert 'must call `profile_batch_sizes` under `if __name__ == "__main__":`' in errors
    assert pids(marks) == []
