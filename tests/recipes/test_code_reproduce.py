import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from lightning_diag import read_run
from recipes.code import reproduce as module
from recipes.code.reproduce import ROOT, jobs, main, reproduce

TINY = (
    "data.samples=300",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=2",
    "trainer.enable_model_summary=false",
)


def titles(made) -> list[str]:
    return [job.title for job in made]


def test_the_nine_runs_in_an_order_in_which_each_finds_what_it_needs(tmp_path):
    made = jobs(tmp_path, (42, 2025, 7), [], full=False)
    assert titles(made)[:4] == [
        *["transformer, seed 42", "gnn, seed 42", "fusion, seed 42", "transformer, seed 2025"]
    ]
    assert len({job.folder for job in made}) == 9
    done = set()
    for job in made:
        needed = [text.partition("_run=")[2] for text in job.overrides if "_run=" in text]
        assert {path.strip("'") for path in needed} <= done
        assert bool(needed) == (job.model == "fusion")
        done.add(str(job.folder))
        assert f"seed={job.seed}" in job.overrides
        assert f"experiment=code_{job.model}" in job.overrides
        assert job.folder == tmp_path / job.model / f"seed_{job.seed}"


def test_settings_are_for_all_or_for_one_model(tmp_path):
    given = ["trainer.max_epochs=3", "gnn:model.width=8", "data.cache_dir=a:b"]
    for job in jobs(tmp_path, (1,), given, full=True):
        assert "trainer.max_epochs=3" in job.overrides
        assert "data.cache_dir=a:b" in job.overrides
        assert ("model.width=8" in job.overrides) == (job.model == "gnn")
        assert f"experiment=code_{job.model}_full" in job.overrides


def test_a_second_instance_is_refused(tmp_path, capsys):
    with FileLock(tmp_path / ".lock"):
        assert reproduce(tmp_path, (42,), [], full=False) == 2
    assert "Another instance is at work" in capsys.readouterr().err


def test_a_folder_keeps_its_settings(tmp_path, capsys):
    (tmp_path / "reproduce.json").write_text('{"settings": ["a=1"], "full": false}')
    assert reproduce(tmp_path, (42,), ["a=2"], full=False) == 2
    assert "`--set` must be what" in capsys.readouterr().err
    assert reproduce(tmp_path, (42,), ["a=1"], full=True) == 2
    assert "`--full` must be what" in capsys.readouterr().err
    assert reproduce(tmp_path, (42,), ["a=1"], full=False) == 2
    assert "What this command fixes must be what" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1,x"], "`--seeds` must be whole numbers with commas between, got 1,x."),
        (["--set", "trainer"], "`--set` must be written KEY=VALUE, got trainer."),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def fake_training(folder: Path) -> list[str]:
    """In place of the command: a training that only leaves its traces, and may be told to fail."""
    script = folder / "training.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "log = pathlib.Path(__file__).with_name('calls.jsonl').open('a')\n"
        "log.write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "if sys.argv[1] == 'train':\n"
        "    run = pathlib.Path(sys.argv[2].partition('=')[2].strip(\"'\").replace(chr(92), ''))\n"
        "    broken = 'gnn/seed_1' in str(run) and 'broken' in str(run)\n"
        "    status = 'failed' if broken else 'finished'\n"
        "    (run / 'run.json').write_text(json.dumps({'status': status}))\n"
        "    if 'sick' in str(run) and 'transformer/seed_1' in str(run):\n"
        "        (run / 'collapse_report.json').write_text('{\"collapsed\": true}')\n"
        "    sys.exit(broken)\n"
    )
    return [sys.executable, str(script)]


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "sick"), [("broken", "gnn"), ("sick", "transformer")])
def test_other_seeds_go_on_where_one_fails_or_collapses(name, sick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_COMMAND", fake_training(tmp_path))
    monkeypatch.setattr(module, "_LOOK_EVERY", 0.02)
    out = tmp_path / name
    assert reproduce(out, (1, 2), [], full=False) == 1
    said = capsys.readouterr().out
    assert f"3/6 fusion, seed 1: left out, since there is no sound {sick}, seed 1" in said
    assert "4 of 6 runs are finished and sound" in said
    trained = [call[1] for call in calls(tmp_path) if call[0] == "train"]
    assert len(trained) == 5
    assert calls(tmp_path)[-1] == ["aggregate", str(out)]
    reproduce(out, (1, 2), [], full=False)
    again = [call[1] for call in calls(tmp_path) if call[0] == "train"][5:]
    # what failed is tried again, what collapsed would only collapse again
    assert len(again) == (1 if name == "broken" else 0)


def test_a_training_that_outlived_the_command_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_COMMAND", fake_training(tmp_path))
    monkeypatch.setattr(module, "_LOOK_EVERY", 0.02)
    out = tmp_path / "it's here"
    (made, *_) = jobs(out, (1,), [], full=False)
    made.folder.mkdir(parents=True)
    path = str(made.folder).replace("'", "\\'")
    code = f"""
import pathlib, sys, time
time.sleep(1)
pathlib.Path({str(made.folder)!r}, "run.json").write_text('{{"status": "finished"}}')
"""
    subprocess.Popen([sys.executable, "-c", code, f"run_dir='{path}'"])
    assert reproduce(out, (1,), [], full=False) == 0
    said = capsys.readouterr().out
    assert "1/3 transformer, seed 1: still trains from before" in said
    assert "1/3 transformer, seed 1: was finished before" in said
    assert len([call for call in calls(tmp_path) if call[0] == "train"]) == 2


@pytest.mark.slow
def test_a_command_that_is_told_to_end_takes_its_training_along(tmp_path):
    script = tmp_path / "sleep.py"
    script.write_text("import time; print('on', flush=True); time.sleep(100)")
    code = (
        "import sys; from recipes.code import reproduce;"
        f"reproduce._COMMAND = (sys.executable, {str(script)!r});"
        f"sys.exit(reproduce.main(['--out', {str(tmp_path / 'out')!r}]))"
    )
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    log = tmp_path / "out" / "transformer" / "seed_42" / "train.log"
    wait_until(lambda: log.exists() and log.read_text() == "on\n")
    (training,) = psutil.Process(command.pid).children()
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=60) == 128 + signal.SIGTERM
    psutil.wait_procs([training], timeout=60)
    assert not training.is_running()


def start(out: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "recipes.code.reproduce", "--out", str(out), "--seeds", "42"]
    command += [text for setting in TINY for text in ("--set", setting)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE
    )


def wait_until(condition, seconds: float = 600.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "took too long"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_and_started_again_it_comes_to_the_same_end(tmp_path):
    out = tmp_path / "runs with spaces"
    last = out / "transformer" / "seed_42" / "checkpoints" / "last.ckpt"
    first = start(out)
    wait_until(last.exists)
    # the training as well, in the middle of its second epoch or of a file
    trainings = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    for training in trainings:
        training.kill()
    first.wait()
    psutil.wait_procs(trainings)
    second = start(out)
    said = second.communicate(timeout=1200)[0].decode()
    assert second.returncode == 0, said
    assert "1/3 transformer, seed 42: resumes" in said or "was finished before" in said
    for model in ("transformer", "gnn", "fusion"):
        run = read_run(out / model / "seed_42")
        assert run.info["status"] == "finished"
        validated = run.metrics.filter(run.metrics["val_auc"].is_not_null())
        assert validated["epoch"].to_list() == [0, 1]
    summary = json.loads((out / "production_summary" / "production_summary.json").read_text())
    assert set(summary["models"]) == {"transformer", "gnn", "fusion"}
    assert [found["n"] for found in summary["models"].values()] == [1, 1, 1]
    third = start(out)
    said = third.communicate(timeout=600)[0].decode()
    assert said.count("was finished before") == 3
    assert len(read_run(out / "fusion" / "seed_42").info["attempts"]) == 1
