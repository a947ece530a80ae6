"""A sweep under each launcher: every job once, in a folder of its own, whatever the others do."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightning_diag import read_run
from lightning_diag.cli import app
from lightning_diag.commands.errors import UsageError
from lightning_diag.commands.jobs import claim, command

APP = Path(__file__).parent / "tiny_app"
SWEEP = [sys.executable, "-m", "lightning_diag.cli", "train", "--config-dir", "conf", "-m"]
GRID = """# @package _global_
defaults:
  - tiny
hydra:
  sweeper:
    params:
      seed: 42,7
      model.width: 5
"""
DDP = ["trainer.strategy=ddp", "trainer.devices=2"]


@pytest.fixture
def project(tmp_path):
    return Path(shutil.copytree(APP, tmp_path / "project"))


@pytest.fixture
def start(project):
    """Starts a sweep of the tiny experiment, and leaves none behind."""
    started = []

    def start(*overrides):
        process = subprocess.Popen(
            [*SWEEP, *overrides],
            cwd=project,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def swept(process):
    """What it said, and what it returned."""
    out, err = process.communicate(timeout=240)
    return out + err, process.returncode


def folders(project):
    return sorted(path.parent for path in project.glob("runs/**/run.json"))


def infos(project):
    return [json.loads((folder / "run.json").read_text()) for folder in folders(project)]


@pytest.mark.slow
def test_sweeps_that_start_together_share_no_folder_and_a_failing_job_stops_no_other(
    project, start
):
    (project / "conf" / "experiment" / "grid.yaml").write_text(GRID)
    chosen = "callbacks=[gradient_health],[gradient_health,update_ratio]"
    first = start("experiment=tiny", "model.fail_at=3,null", chosen, "trainer.max_epochs=1")
    second = start("experiment=grid", "trainer.max_epochs=1")
    said, status = swept(first)
    assert status == 1, said
    assert said.count("\nfailed: runs/tiny/multirun_") == 2
    assert "error: RuntimeError: the tiny model was told to fail" in said
    said, status = swept(second)
    assert status == 0, said
    ends = [info["status"] for info in infos(project)]
    assert sorted(ends) == ["failed"] * 2 + ["finished"] * 4
    assert all(len(info["attempts"]) == 1 for info in infos(project))
    runs = [read_run(folder) for folder in folders(project)]
    assert sum("update_ratio" in run.config["callbacks"] for run in runs) == 2
    assert sorted(run.info["seed"] for run in runs) == [7, 42, 42, 42, 42, 42]
    assert len(list(project.glob("runs/tiny/*"))) == 2

    done = folders(project)[ends.index("finished")]
    reported = CliRunner().invoke(app, ["report", str(done), "--no-fail"])
    assert reported.exit_code == 0, reported.output
    assert (done / "analysis" / "report.html").exists()


@pytest.mark.slow
def test_one_folder_for_two_jobs_is_refused_and_the_first_keeps_its_run(project, start):
    same = ["hydra.sweep.dir=runs/mine", "hydra.sweep.subdir=same", "trainer.max_epochs=1"]
    said, status = swept(start("experiment=tiny", "seed=42,7", *same))
    assert status == 2, said
    assert "`runs/mine/same` was taken by the job `#0 experiment=tiny seed=42" in said
    (info,) = infos(project)
    assert (info["seed"], info["status"], len(info["attempts"])) == (42, "finished", 1)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_failed_ddp_job_does_not_take_the_sweep_with_it(project, start):
    # Lightning looks after its processes every five seconds: the second job must outlast that
    said, status = swept(
        start("experiment=tiny", "model.fail_at=3,null", *DDP, "trainer.max_epochs=40")
    )
    assert status == 1, said
    assert [info["status"] for info in infos(project)] == ["failed", "finished"]
    assert [info["world_size"] for info in infos(project)] == [2, 2]


@pytest.mark.slow
@pytest.mark.distributed
def test_ddp_under_joblib_starts_each_job_once(project, start):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    given = ["experiment=tiny", "seed=1,2", *launcher, *DDP, "trainer.max_epochs=1"]
    said, status = swept(start(*given))
    if status and "EADDRINUSE" in said:
        # between the choice of a free port and its use, another process has taken it
        shutil.rmtree(project / "runs")
        said, status = swept(start(*given))
    assert status == 0, said
    assert said.count("training into") == 2
    (sweep,) = (project / "runs/tiny").iterdir()
    assert folders(project) == [sweep / "0", sweep / "1"]
    assert [info["seed"] for info in infos(project)] == [1, 2]
    for folder, info in zip(folders(project), infos(project), strict=True):
        assert (info["status"], info["world_size"], len(info["attempts"])) == ("finished", 2, 1)
        assert read_run(folder).grad["step"].unique().sort().to_list() == [1, 3]


def task_of(job):
    """The process that trains, below submitit's own one."""
    with Path(f"/proc/{job}/task/{job}/children").open() as children:
        return int(children.read().split()[0])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_that_submitit_requeues_goes_on_from_its_last_checkpoint(project, start):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    given = ["hydra/launcher=submitit_local", "ckpt_path=last", "trainer.max_epochs=100"]
    process = start("experiment=tiny", "seed=42,7", *given)
    deadline = time.monotonic() + 120
    while not (saved := list(project.glob("runs/tiny/*/0/checkpoints/last.ckpt"))):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    (config,) = project.glob("runs/tiny/*/0/.hydra/hydra.yaml")
    job = re.search(r"^ {4}id: '(\d+)'$", config.read_text(), re.MULTILINE)[1]
    os.kill(task_of(job), signal.SIGUSR2)
    said, status = swept(process)
    assert status == 0, said
    folder = saved[0].parent.parent
    assert folders(project) == [folder, folder.parent / "1"]
    assert [len(info["attempts"]) for info in infos(project)] == [2, 1]
    begun, resumed = infos(project)[0]["attempts"]
    assert (begun["status"], resumed["status"]) == ("interrupted", "finished")
    assert resumed["first_step"] >= 8
    assert read_run(folder).grad["step"].unique().sort().to_list() == list(range(1, 800, 2))


@pytest.mark.parametrize("key", ["run_dir", "hydra.run.dir"])
def test_the_folder_of_one_run_is_refused_for_a_sweep(project, monkeypatch, key):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["lightning-diag"])
    given = ["train", "--config-dir", "conf", "experiment=tiny", "-m", "seed=1,2", f"{key}=runs/a"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert f"`{key}` is the folder of one run" in result.stderr
    assert "write `hydra.sweep.dir=runs/a`." in result.stderr
    assert not (project / "runs").exists()


def test_a_job_comes_back_to_its_own_folder_and_no_other_does(tmp_path):
    claim(tmp_path / "0", 0, ["seed=1", "model=a"])
    claim(tmp_path / "0", 0, ["model=a", "seed=1"])
    for number, overrides in [(0, ["seed=2", "model=a"]), (1, ["seed=1", "model=a"])]:
        with pytest.raises(UsageError, match="was taken by the job `#0 model=a seed=1`"):
            claim(tmp_path / "0", number, overrides)


def test_a_worker_names_the_command_for_the_time_of_a_job(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["worker", "--pipe", "3"])
    main = sys.modules["__main__"]
    before = main.__spec__
    with command(["train", "seed=1"], "lightning_diag.cli"):
        assert sys.argv == ["worker", "train", "seed=1"]
        assert main.__spec__.name == "lightning_diag.cli"
    assert sys.argv == ["worker", "--pipe", "3"]
    assert main.__spec__ is before
