"""The command as a user types it: what it does, says, and returns to the shell."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from lightning_diag import read_run
from lightning_diag.cli import UsageError, app

APP = Path(__file__).parent / "tiny_app"
COMMAND = [sys.executable, "-m", "lightning_diag.cli"]


@pytest.fixture
def project(tmp_path):
    return Path(shutil.copytree(APP, tmp_path / "project"))


def run(project, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def train(project, *arguments):
    return run(project, "train", "--config-dir", "conf", *arguments)


@pytest.fixture
def refused(project, monkeypatch):
    """What `train` says about arguments that it refuses, without starting a process."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["lightning-diag"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def refused(*arguments):
        result = CliRunner().invoke(app, ["train", "--config-dir", "conf", *arguments])
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        return result.stderr

    return refused


@pytest.mark.slow
def test_arguments_for_a_callback_that_is_not_chosen_name_nothing_to_build(project):
    """The experiment sets `callbacks.gradient_health.every_n_steps`."""
    done = train(project, "experiment=tiny", "callbacks=[wiring_check]", "run_dir=out")
    assert done.returncode == 0, done.stderr
    assert (project / "out/records/wiring.jsonl").exists()
    assert not (project / "out/records/grad.jsonl").exists()


def test_train_then_report_then_resume_to_where_an_unbroken_run_ends(project):
    first = train(project, "experiment=tiny", "seed=7", "run_dir=runs/mine")
    assert first.returncode == 0, first.stderr
    assert "lightning-diag report runs/mine" in first.stdout
    record = read_run(project / "runs/mine")
    assert record.info["seed"] == 7
    assert record.info["data"] == "sha256:of-the-sums"
    assert record.info["status"] == "finished"
    assert record.config["optimizer"]["lr"] == 0.01
    assert record.config["hardware"]["batch_size"] == 4
    assert record.grad["step"].unique().sort().to_list() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert {path.name for path in (project / "runs/mine/checkpoints").iterdir()} == {
        "best.ckpt",
        "last.ckpt",
    }

    reported = run(project, "report", "runs/mine", "--no-fail")
    assert reported.returncode == 0, reported.stderr
    assert "runs/mine/analysis/report.html" in reported.stdout.replace("\n", "")
    assert (project / "runs/mine/analysis/report.html").stat().st_size > 10_000

    checkpoint = "ckpt_path=runs/mine/checkpoints/last.ckpt"
    second = train(project, "experiment=tiny", "seed=7", checkpoint, "trainer.max_epochs=3")
    assert second.returncode == 0, second.stderr
    record = read_run(project / "runs/mine")
    assert [attempt["first_step"] for attempt in record.info["attempts"]] == [0, 16]
    assert record.grad["step"].unique().sort().to_list() == list(range(1, 24, 2))
    assert list((project / "runs").iterdir()) == [project / "runs/mine"]

    chosen = ["experiment=tiny", "seed=7", "run_dir=runs/whole", "trainer.max_epochs=3"]
    shown = train(project, *chosen, "trainer.enable_progress_bar=true")
    assert shown.returncode == 0
    assert "Epoch 1" in shown.stdout  # also where no terminal is
    resumed, whole = (
        torch.load(project / f"runs/{name}/checkpoints/last.ckpt", weights_only=False)
        for name in ("mine", "whole")
    )
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)


@pytest.mark.slow
def test_a_sweep_gives_every_run_its_own_folder_and_returns_the_metric(project):
    swept = train(project, "experiment=tiny", "-m", "seed=42,7", "trainer.max_epochs=1")
    assert swept.returncode == 0, swept.stderr
    (sweep,) = (project / "runs/tiny").iterdir()
    runs = [read_run(sweep / str(number)) for number in (0, 1)]
    assert [record.info["seed"] for record in runs] == [42, 7]
    assert [record.config["data"]["seed"] for record in runs] == [42, 7]
    assert all(record.info["status"] == "finished" for record in runs)
    assert runs[0].grad["l2"].to_list() != runs[1].grad["l2"].to_list()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sweep_over_two_processes_starts_each_job_afresh(project):
    swept = train(
        project,
        "experiment=tiny",
        "-m",
        "seed=42,7",
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.max_epochs=1",
    )
    assert swept.returncode == 0, swept.stderr
    (sweep,) = (project / "runs/tiny").iterdir()
    runs = [read_run(sweep / str(number)) for number in (0, 1)]
    assert [record.info["seed"] for record in runs] == [42, 7]
    assert [record.grad["step"].max() for record in runs] == [3, 3]


@pytest.mark.slow
def test_a_failing_training_says_its_own_message_and_the_run_remembers_it(project):
    failed = train(project, "experiment=tiny", "model.fail_at=3", "run_dir=runs/bad")
    assert failed.returncode == 1
    assert "error: RuntimeError: the tiny model was told to fail\n" in failed.stderr
    assert "tiny.py:" in failed.stderr
    assert "Traceback" not in failed.stderr
    info = json.loads((project / "runs/bad/run.json").read_text())
    assert info["status"] == "failed"
    assert "told to fail" in info["stop_reason"]


@pytest.mark.slow
def test_a_terminated_training_returns_that_to_the_shell(project):
    options = ["experiment=tiny", "run_dir=runs/long", "trainer.max_epochs=100000"]
    command = [*COMMAND, "train", "--config-dir", "conf", *options]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL) as process:
        rows = project / "runs/long/records/grad.jsonl"
        while process.poll() is None and not rows.exists():
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 143
    assert read_run(project / "runs/long").info["status"] == "interrupted"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimiser.lr=1"], "no key `optimiser.lr`; did you mean `optimizer.lr`?"),
        (["lr=1"], "no key `lr`; did you mean `optimizer.lr`?"),
        (["trainer.max_epoch=1"], "no key `trainer.max_epoch`; did you mean `trainer.max_epochs`?"),
        (["trainer.detect_anomaly=true"], "write `+trainer.detect_anomaly=`."),
        (["trainer.nonsense=1"], "no key `trainer.nonsense`; `--cfg job` shows them all."),
        (["hardware.batchsize=3"], "did you mean `hardware.batch_size`?"),
        (
            ["callbacks=[gradient_helth,lr_monitor]"],
            "`callbacks` has no option `gradient_helth`; did you mean `gradient_health`?",
        ),
        (["logger=tensorbord"], "`logger` has no option `tensorbord`; did you mean `tensorboard`?"),
        (["experiment=tinny"], "`experiment` has no option `tinny`; did you mean `tiny`?"),
        (["-m", "experiment=tiny,tinny"], "has no option `tinny`; did you mean `tiny`?"),
        (["experimnt=tiny"], "no key `experimnt`; did you mean `experiment`?"),
        (
            ["+callbacks.gradient_health.evry_n_steps=3"],
            "`callbacks.gradient_health.evry_n_steps` is no argument of "
            "`lightning_diag.GradientHealth`; did you mean `every_n_steps`?",
        ),
        (["model._target_=tiny.Tinny"], "`tiny` has no `Tinny`; did you mean `tiny.Tiny`?"),
        (
            ["callbacks.gradient_health.every_n_steps=0"],
            "`callbacks.gradient_health` cannot be built: `every_n_steps` must be at least 1",
        ),
        (["model.width=0"], "`model` cannot be built: `width` must be at least 1, got 0."),
        (["trainer.strategy=dpp"], "`trainer` cannot be built: You selected an invalid strategy"),
        (["+hardware.color=red"], "`hardware` has no field `color`; there are"),
        (["ckpt_path=no.ckpt"], "`ckpt_path` must name a checkpoint that exists, got `no.ckpt`."),
        (["name=???"], "Missing mandatory value: name"),
        (["tiny"], "An override must be written KEY=VALUE, got `tiny`."),
        (["callbacks=[a"], "`callbacks=[a` cannot be read as an override: no viable"),
        (["--multirn"], "`train` has no option `--multirn`; did you mean `--multirun`?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_with_the_right_name(refused, overrides, message):
    named = any("experim" in override for override in overrides)
    assert message in refused(*([] if named else ["experiment=tiny"]), *overrides)


def test_without_an_experiment_those_that_exist_are_named(refused):
    said = refused()
    assert "An experiment must be named" in said
    assert "tiny" in said


def test_debug_lets_the_exception_out(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["lightning-diag"])
    result = CliRunner().invoke(app, ["train", "--debug", "--multirn"])
    assert isinstance(result.exception, UsageError)
    assert "Traceback" not in result.output


def test_hydras_flags_are_passed_on(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["lightning-diag"])
    arguments = ["train", "--config-dir", "conf", "--cfg", "job", "experiment=tiny", "seed=3"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    assert "seed: 3\n" in shown.output
    assert "_target_: tiny.Tiny" in shown.output
    assert not (project / "runs").exists()


def test_help_teaches():
    shown = CliRunner().invoke(app, ["--help"], prog_name="lightning-diag", terminal_width=80)
    assert shown.exit_code == 0
    listed = shown.output.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    lines = dict(line.split(maxsplit=1) for line in listed)
    assert list(lines)[:4] == ["train", "report", "compare", "monitor"]
    assert {"doctor", "lr-cache", "batch-size", "version"} <= set(lines)
    assert all(line.endswith(".") and "..." not in line for line in lines.values())
    _, _, taught = shown.output.partition("Examples:\n")
    examples = re.findall(r"^    lightning-diag (\S+)", taught, re.MULTILINE)
    assert examples == ["train", "report", "train"]
    assert re.findall(r"\b([0-4]) [a-z]", taught) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_a_shell_that_is_named(shell):
    shown = run(".", "--show-completion", shell)
    assert shown.returncode == 0, shown.stderr
    assert f"_LIGHTNING_DIAG_COMPLETE=complete_{shell}" in shown.stdout
    if shell == "bash":
        wrong = run(".", "--show-completion", "tcsh")
        assert wrong.returncode == 2
        assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in wrong.stderr


def test_completion_completes():
    words = {"COMP_WORDS": "lightning-diag re", "COMP_CWORD": "1"}
    asked = {**os.environ, **words, "_LIGHTNING_DIAG_COMPLETE": "complete_bash"}
    done = subprocess.run(COMMAND, env=asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["report"], done.stderr


def every_command(command, before=()):
    commands = getattr(command, "commands", None)
    if commands is None:
        yield before, command
    for name, one in (commands or {}).items():
        yield from every_command(one, (*before, name))


def test_every_command_takes_debug():
    found = dict(every_command(get_command(app)))
    assert len(found) > 10
    for words, command in found.items():
        assert "--debug" in {text for one in command.params for text in one.opts}, words


@pytest.mark.parametrize("words", [["report", "no_run"], ["lr-cache", "show", "zz"]], ids=" ".join)
def test_debug_may_stand_before_the_command(words):
    for given in (["--debug", *words], [*words, "--debug"]):
        assert isinstance(CliRunner().invoke(app, given).exception, UsageError)
    plain = CliRunner().invoke(app, words)
    assert plain.exit_code == 2
    assert plain.stderr.startswith("error: ")


def test_the_doctor_is_in():
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code in (0, 3)
    assert "trains on: " in shown.output


def test_version_names_what_it_stands_on():
    shown = CliRunner().invoke(app, ["version"])
    assert shown.exit_code == 0
    assert f"torch {metadata.version('torch')}" in shown.output


def test_reading_a_run_needs_no_hydra_and_no_torch():
    code = "import sys, lightning_diag.cli; print({'hydra', 'torch', 'polars'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def written_run(folder, norms):
    """A run with these gradient norms, one a step; None stands for NaN everywhere."""
    rows = [
        {"step": step, "epoch": 0, "time": 0.0, "attempt": 1, "component": component, "l2": norm}
        | {"count": 10, "nonfinite": 10 if norm is None else 0, "tensors": 1, "missing": 0}
        | {"frozen": 0, "share": None if norm is None else 1.0}
        | ({} if component else {"global_norm": norm, "has_nan": int(norm is None), "has_inf": 0})
        for step, norm in enumerate(norms)
        for component in (None, "encoder")
    ]
    (folder / "records").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "records" / "grad.jsonl").write_text(lines)
    attempts = [{"attempt": 1, "first_step": 0, "status": "finished", "supersedes": True}]
    (folder / "run.json").write_text(json.dumps({"status": "finished", "attempts": attempts}))


@pytest.mark.parametrize(
    ("norms", "status"),
    [
        ([1.0 + 0.1 * (step % 3) for step in range(60)], 0),
        ([], 3),
        ([1.0] * 30 + [None] * 30, 4),
    ],
    ids=["healthy", "not measured", "not finite"],
)
def test_report_returns_the_verdict_to_the_shell(tmp_path, norms, status):
    written_run(tmp_path / "run", norms)
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert shown.exit_code == status, shown.output
    assert CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--no-fail"]).exit_code == 0


def test_report_of_what_is_no_run_helps_to_find_one(tmp_path):
    written_run(tmp_path / "runs" / "mine", [1.0])
    for given, hint in [
        ("runs/mien", f"did you mean `{tmp_path}/runs/mine`?"),
        ("runs", f"The newest run in it is `{tmp_path}/runs/mine`."),
    ]:
        shown = CliRunner().invoke(app, ["report", str(tmp_path / given)])
        assert shown.exit_code == 2
        assert hint in shown.stderr
    assert CliRunner().invoke(app, ["report"]).exit_code == 2
