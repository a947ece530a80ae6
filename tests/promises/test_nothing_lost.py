"""Promise 6: a killed run keeps every row that it has measured, and a resumed one goes on."""

import random
import time

import pytest
import torch

from lightning_diag.records import read_run
from tests.promises.jobs import STEPS, train_for_long
from tests.promises.processes import kill, needs_fork, run, start
from tests.promises.trace import differences

pytestmark = [pytest.mark.distributed, needs_fork]

_OF_THE_RUN = ("time", "attempt")
# what is measured in seconds or bytes, or is about the machine, is never the same twice; and
# the first look at the wiring after a resume says of some checks that it does not know yet
REPEATABLE = (
    *("grad", "grad_parameter", "grad_histogram", "update", "update_parameter", "activation"),
    *("latent", "attention", "attention_head", "collapse", "health", "health_alert"),
)


def rows(folder, prefix="grad"):
    frame = read_run(folder / "run").frame(prefix)
    return frame.drop([name for name in _OF_THE_RUN if name in frame.columns]).to_dicts()


def filled(row):
    return {key: value for key, value in row.items() if value is not None}


def lines(folder):
    file = folder / "run" / "records" / "grad.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_after(folder, count, resume):
    """Train in a process that is killed once so many lines are on disk."""
    process, deadline = start(train_for_long, folder, resume), time.monotonic() + 60
    target = lines(folder) + count
    while lines(folder) < target and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(random.Random(count).random() * 0.01)
    kill(process)
    assert process.exitcode == -9, "the training ended before it could be killed"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(train_for_long, folder, False)
    return folder


def test_an_uninterrupted_run_has_every_row(whole):
    found = rows(whole)
    parts = {row["component"] for row in found}
    assert len(parts) == 7
    expected = [(step, part) for step in range(STEPS) for part in parts]
    assert sorted(map(str, ((row["step"], row["component"]) for row in found))) == sorted(
        map(str, expected)
    )


@pytest.mark.parametrize("number", range(3))
def test_killed_twice_and_resumed(number, whole, tmp_path):
    # seven rows a step and seven steps a checkpoint: before the first one, and after the second
    draw = random.Random(number)
    reference = {name: [filled(row) for row in rows(whole, name)] for name in REPEATABLE}
    assert all(reference.values())
    for time_killed, resume in enumerate((False, True), start=1):
        kill_after(tmp_path, draw.randint(10, 100), resume)
        torn = number == 1
        if torn:
            tear(tmp_path)
        assert rows(tmp_path)
        for name, wanted in reference.items():
            found = [filled(row) for row in rows(tmp_path, name)]
            assert found == wanted[: len(found)], name
        assert read_run(tmp_path / "run").torn.get("grad", 0) == torn * time_killed
    run(train_for_long, tmp_path, True)
    for name, wanted in reference.items():
        assert [filled(row) for row in rows(tmp_path, name)] == wanted, name
    weights = [torch.load(folder / "weights.pt") for folder in (whole, tmp_path)]
    assert not differences(*weights)


@pytest.mark.parametrize("number", [0, 2])
def test_losses_and_attempts_after_a_kill(number, whole, tmp_path):
    kill_after(tmp_path, 60 + 40 * number, False)
    run(train_for_long, tmp_path, True)
    losses = [
        {row["step"]: row["train_loss"] for row in rows(folder, "metrics") if row["train_loss"]}
        for folder in (whole, tmp_path)
    ]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    steps = [row["step"] for row in rows(tmp_path, "metrics") if row["train_loss"]]
    assert len(steps) == len(set(steps))
    attempts = read_run(tmp_path / "run").info["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["interrupted", "finished"]
    # a checkpoint was there to resume from, and it was not the end
    assert 0 < attempts[1]["first_step"] < STEPS


def test_state_goes_on_where_it_stopped(whole, tmp_path):
    """The counters that a diagnostic remembers are those of the uninterrupted run."""
    kill_after(tmp_path, 120, False)
    run(train_for_long, tmp_path, True)
    measured = [max(read_run(f / "run").overhead["measured"]) for f in (whole, tmp_path)]
    assert measured == [STEPS, STEPS]


def test_without_a_logger_of_ones_own_the_same_run_goes_on(whole, tmp_path):
    for steps in (STEPS // 2, STEPS):
        run(train_for_long, tmp_path, True, steps, False)
    (found,) = tmp_path.glob("diagnostics/*")
    found.rename(tmp_path / "run")
    assert [filled(row) for row in rows(tmp_path)] == [filled(row) for row in rows(whole)]


def tear(folder):
    """Leave half a line, as a system that breaks down may."""
    for file in (folder / "run" / "records").glob("*.jsonl"):
        with file.open("a") as stream:
            stream.write('{"step":3,"epoch":0,"time":17')
