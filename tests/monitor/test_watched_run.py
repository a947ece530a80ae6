"""Does a watched run say in which state it is, and how far it has come?"""

import json
import shutil
import subprocess
import sys
import time

import pytest

from lightning_diag.monitor.live_charts import CHARTS
from lightning_diag.monitor.watched_run import WatchedRun
from lightning_diag.monitor.watched_runs import WatchedRuns


def look(path, now=1100.0):
    run = WatchedRun(path, lambda: now)
    run.look()
    return run


def test_a_run_that_has_not_begun_waits(folder):
    assert look(folder.path).summary().state == "waiting"


def test_a_run_whose_process_lives_is_running(folder):
    folder.begin().train(9, 50)
    summary = look(folder.path).summary()
    assert summary.state == "running"
    assert summary.step == 49
    assert summary.progress == 0.5
    # 49 seconds for half of the steps
    assert summary.elapsed_seconds == pytest.approx(49)
    assert summary.remaining_seconds == pytest.approx(49)
    assert summary.loss == pytest.approx(2.0 / (1 + 49 / 20))
    assert summary.learning_rate == 0.1


def test_no_time_is_left_where_only_the_start_was_seen(folder):
    folder.begin().train(0, 9)
    summary = look(folder.path).summary()
    assert (summary.state, summary.elapsed_seconds < 10) == ("running", True)
    assert summary.remaining_seconds is None


def test_a_run_whose_process_is_gone_was_killed(folder):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder.begin(pid=dead.pid).train(9, 20)
    assert look(folder.path).summary().state == "killed"


def test_a_run_of_another_machine_that_writes_nothing_is_silent(folder):
    folder.begin().train(9, 20)
    info = json.loads((folder.path / "run.json").read_text())
    info["attempts"][0]["process"]["host"] = "elsewhere"
    (folder.path / "run.json").write_text(json.dumps(info))
    assert look(folder.path, now=1060.0).summary().state == "running"
    assert look(folder.path, now=5000.0).summary().state == "silent"


@pytest.mark.parametrize(
    ("status", "state"),
    [("finished", "ended"), ("failed", "failed"), ("interrupted", "interrupted")],
)
def test_a_run_says_how_it_ended(folder, status, state):
    folder.begin(status=status, stop_reason="because").train(9, 20)
    summary = look(folder.path).summary()
    assert (summary.state, summary.reason) == (state, "because")
    assert summary.remaining_seconds is None


def test_a_run_that_is_deleted_meanwhile_is_gone(folder):
    folder.begin().train(9, 20)
    run = look(folder.path)
    shutil.rmtree(folder.path)
    run.look()
    assert run.summary().state == "gone"
    assert all(run.chart(name) is None or run.chart(name) for name in CHARTS)


def test_a_torn_line_and_a_broken_run_json_are_no_end(folder):
    folder.begin().train(9, 20)
    with (folder.path / "records" / "grad.jsonl").open("a") as stream:
        stream.write('{"step": 29, "comp')
    run = look(folder.path)
    assert run.summary().step == 19
    (folder.path / "run.json").write_text('{"status": "runn')
    run.look()
    assert run.summary().step == 19


def test_charts_are_drawn_anew_where_rows_came(folder):
    folder.begin().train(9, 20)
    run = look(folder.path)
    before = dict(run.versions)
    first = run.chart("gradient_flow")
    assert run.chart("gradient_flow") is first
    folder.write("hardware", {"step": 29, "time": 1029.0, "samples_per_second": 5.0})
    run.look()
    assert run.chart("gradient_flow") is first
    assert run.versions["gradient_flow"] == before["gradient_flow"]
    assert run.chart("hardware") is not None
    folder.train(29, 40)
    run.look()
    assert run.versions["gradient_flow"] > before["gradient_flow"]
    assert run.chart("gradient_flow") is not first


def test_findings_are_those_of_diagnose(folder):
    from lightning_diag import diagnose

    folder.begin().train(9, 100)
    for step in range(109, 200, 10):
        row = {"step": step, "time": 1000.0 + step, "count": 100, "tensors": 2, "missing": 0}
        folder.write("grad", row | {"component": "encoder", "l2": 0.5, "nonfinite": 0})
        folder.write(
            "grad", row | {"component": "head", "l2": None, "count": 0, "tensors": 0, "missing": 2}
        )
    run = look(folder.path)
    assert [one.rule for one in run.findings][:1] == ["dead_component"]
    assert run.findings == diagnose(folder.path)


def test_a_sweep_shows_its_runs_in_the_order_of_their_numbers(folders):
    for name in ("10", "2", "0"):
        folders(name).begin().train(9, 20)
    runs = WatchedRuns(folders("0").path.parent)
    state = runs.state()
    assert [one["summary"]["name"] for one in state["runs"]] == ["0", "2", "10"]
    assert runs.together()["title"]
    folders("3").begin()
    runs.look(at_once=True)
    # those that were there keep their places
    assert [run.path.name for run in runs.runs] == ["0", "2", "10", "3"]


def test_a_sweep_that_has_not_begun_becomes_one(folders):
    runs = WatchedRuns(folders("0").path.parent)
    assert runs.state()["runs"][0]["summary"]["state"] == "waiting"
    folders("0").begin().train(9, 20)
    folders("1").begin().train(9, 20)
    runs.look(at_once=True)
    assert {"0", "1"} <= {run.path.name for run in runs.runs}


def test_files_are_not_read_more_often_than_wanted(folder):
    now = [0.0]
    runs = WatchedRuns(folder.begin().train(9, 20).path, interval=5, clock=lambda: now[0])
    assert runs.look()
    folder.train(29, 40)
    now[0] = 4.9
    assert not runs.look()
    now[0] = 5.0
    assert runs.look()


def test_an_interval_must_be_positive(folder):
    with pytest.raises(ValueError, match="`interval` must be positive, got 0"):
        WatchedRuns(folder.path, interval=0)


def test_many_threads_may_ask(folder):
    from concurrent.futures import ThreadPoolExecutor

    runs = WatchedRuns(folder.begin().train(9, 50).path, interval=1e-9)
    with ThreadPoolExecutor(4) as pool:
        states = [pool.submit(runs.state) for _ in range(20)]
        charts = [pool.submit(runs.chart, 0, "gradient_flow") for _ in range(5)]
        time.sleep(0)
    assert all(one.result()["runs"][0]["summary"]["step"] == 49 for one in states)
    assert all(one.result() for one in charts)


def test_what_did_not_change_is_not_opened(folders, monkeypatch):
    for number in range(5):
        folders(str(number)).begin(status="finished").train(9, 50)
    runs = WatchedRuns(folders("0").path.parent, interval=1e-9)
    runs.state()
    opened = []
    monkeypatch.setattr(
        "lightning_diag.records.followed_run.read_info",
        lambda path: opened.append(path.name) or {"status": "running"},
    )
    assert not runs.look()
    assert opened == []
    folders("3").train(59, 60)
    assert runs.look()
    assert opened == ["3"]


def test_many_runs_are_read_bit_by_bit(folders, monkeypatch):
    for number in range(6):
        folders(str(number)).begin(status="finished").train(9, 50)
    runs = WatchedRuns(folders("0").path.parent)
    monkeypatch.setattr("lightning_diag.monitor.watched_runs._READING", -1.0)
    first = runs.state([4])
    assert first["behind"]
    # the one that is looked at comes first, then the others in their order
    assert [one["summary"]["step"] for one in first["runs"]] == [49, None, None, None, 49, None]
    assert first["runs"][4]["charts"]
    second = runs.state([4])
    assert [one["summary"]["step"] for one in second["runs"]] == [49, 49, None, None, 49, None]
    monkeypatch.setattr("lightning_diag.monitor.watched_runs._READING", 10.0)
    last = runs.state([4])
    assert not last["behind"]
    assert {one["summary"]["step"] for one in last["runs"]} == {49}


def test_the_time_left_is_that_of_this_attempt(folder):
    folder.begin(planned=200).train(9, 150)
    info = json.loads((folder.path / "run.json").read_text())
    info["attempts"][0] |= {"first_step": 100, "started": 1100.0}
    (folder.path / "run.json").write_text(json.dumps(info))
    summary = look(folder.path).summary()
    # 50 steps in 49 seconds, and 50 are left
    assert (summary.step, summary.progress) == (149, 0.75)
    assert summary.remaining_seconds == pytest.approx(49)


def test_the_losses_of_the_best_runs_are_in_colour(folders):
    for number in range(12):
        folder = folders(str(number)).begin(status="finished")
        for step in (9, 19):
            row = {"step": step, "time": 1000.0 + step}
            folder.write("metrics", row | {"train_loss": 10.0 - number})
    runs = WatchedRuns(folders("0").path.parent)
    runs.look(at_once=True)

    def coloured(spec):
        (names,) = {
            tuple(layer["encoding"]["color"]["scale"]["domain"])
            for panel in spec["vconcat"]
            for layer in panel["layer"]
            if "color" in layer.get("encoding", {})
        }
        return set(names)

    assert coloured(runs.together()) == {"7", "8", "9", "10", "11"}
    picked = runs.together([0, 3])
    assert coloured(picked) == {"0", "3"}
    # the others are there still
    drawn = {row["name"] for rows in picked["datasets"].values() for row in rows}
    assert drawn == {str(number) for number in range(12)}
    with pytest.raises(LookupError, match="There are 12 runs, got number 12"):
        runs.together([12])


def test_rules_that_take_long_are_run_more_seldom(folder, monkeypatch):
    clock, took, judged = [0.0], [1.0], []

    def slow(run):
        judged.append(run.frame("metrics")["step"].max())
        clock[0] += took[0]
        return []

    monkeypatch.setattr("lightning_diag.monitor.watched_run.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("lightning_diag.monitor.watched_run.diagnose", slow)
    run = look(folder.begin().train(9, 20).path)
    assert judged == [19]
    folder.train(29, 30)
    run.look()
    assert judged == [19]
    clock[0] = 10.0
    # though nothing was written since
    assert run.look()
    assert judged == [19, 29]


def test_of_long_runs_some_steps_are_shown(folder):
    rows = [{"step": s, "time": 1e3 + s, "train_loss": 1.0, "lr": 0.1} for s in range(5000)]
    folder.begin().write("metrics", *rows)
    run = look(folder.path)
    steps = run.losses()[0].steps
    assert 500 <= len(steps) <= 1000
    assert steps[0] == 0
    assert steps[-250:] == list(range(4750, 5000))
    assert run.summary().step == 4999
