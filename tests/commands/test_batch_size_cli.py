"""`lightning-diag batch-size` as a user types it, over an experiment of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightning_diag.cli import app

APP = Path(__file__).parents[1] / "tiny_app"
COMMAND = [sys.executable, "-m", "lightning_diag.cli", "batch-size", "--config-dir", "conf"]


@pytest.fixture
def project(tmp_path):
    return Path(shutil.copytree(APP, tmp_path / "project"))


def listens_to_ctrl_c():
    # a job in the background of a shell ignores it, and so would all that it starts
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(project, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listens_to_ctrl_c,
    )


@pytest.mark.slow
def test_an_experiment_is_trained_with_each_batch_size(project):
    chosen = ["experiment=tiny", "batch_sizes=[4]", "epochs=1", "output=out/profile.md"]
    with start(project, *chosen, "hardware.accumulate=2") as process:
        output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "optimal batch size: 4" in output
    (row,) = json.loads((project / "out/profile.json").read_text())["profiles"]
    assert (row["status"], row["epoch_samples"], row["largest_batch"]) == ("ok", [32], 4)
    assert row["final_train_loss"] > 0
    assert row["final_test_loss"] > 0
    assert {path.name for path in (project / "out").iterdir()} == {
        "profile.md",
        "profile.png",
        "profile.json",
    }
    assert not (project / "runs").exists()  # no run, no checkpoint, no log


@pytest.mark.slow
def test_ctrl_c_writes_what_there_is(project):
    chosen = ["experiment=tiny", "batch_sizes=[4,8]", "epochs=100000", "output=out/profile.md"]
    with start(project, *chosen) as process:
        assert any("batch size 4 ..." in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "batch size 8: skipped" in output
    rows = json.loads((project / "out/profile.json").read_text())["profiles"]
    assert [row["status"] for row in rows] == ["interrupted", "skipped"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimiser.lr=1", "batch_sizes=[4]"], "did you mean `optimizer.lr`?"),
        (["batch_size=4"], "`batch_sizes` must be a list of whole numbers"),
        (["batch_sizes=[4]", "model.widht=3"], "did you mean `model.width`?"),
        (["batch_sizes=[4]", "--cfg", "job"], "`batch-size` takes `--config-dir` alone, got "),
        (["batch_sizes=[4]", "--cgf"], "`batch-size` has no option `--cgf`; did you mean `--cfg`?"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_answered_before_anything_is_measured(
    project, monkeypatch, arguments, message
):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ["batch-size", "--config-dir", "conf", "experiment=tiny", *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (project / "runs").exists()
