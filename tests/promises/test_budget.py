"""Promise 8: a diagnostic says what it costs, and keeps to its budget when it may choose."""

import sys
import time
from itertools import pairwise

import pytest

from lightning_diag import RunLogger
from lightning_diag.lightning import Trainer
from lightning_diag.records import read_run
from tests.promises.cases import ALSO, BY_EPOCH, CLASSES, ONCE, build
from tests.promises.networks import Classifier, batches
from tests.promises.trace import QUIET, seed, train

STEP, COST = 0.01, 0.05
KINDS = {kind.__name__: name for kind, name in CLASSES.items()}


class Slow(Classifier):
    """A step that takes a known time, beside which the rest is small."""

    def training_step(self, batch, batch_idx):
        time.sleep(STEP)
        return super().training_step(batch, batch_idx)


@pytest.fixture
def dear(monkeypatch):
    """Every measurement takes a known time more."""
    module = sys.modules["lightning_diag.callbacks.gradient_health"]
    original = module.gradient_table

    def slow(*args, **kwargs):
        time.sleep(COST)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "gradient_table", slow)


def overhead(folder, epochs=2, **arguments):
    seed()
    run = RunLogger(folder)
    options = {**QUIET, "logger": run, "max_epochs": epochs}
    Trainer(callbacks=build("gradient_health", **arguments), **options).fit(Slow(), batches(20))
    return read_run(folder)


@pytest.mark.parametrize("name", KINDS)
def test_every_diagnostic_reports_its_cost(name, tmp_path):
    train("plain", tmp_path, build("all"), logger=RunLogger(tmp_path / "run"))
    rows = read_run(tmp_path / "run").overhead.filter(diagnostic=name).to_dicts()
    assert rows
    for row in rows:
        assert 0 < row["share"] < 1
        # 0 before the first step that was not measured
        assert 0 <= row["step_seconds"] < row["elapsed"]
        assert row["seconds"] > 0
        assert row["device_seconds"] is None
        assert row["every_n_steps"] == (None if name in BY_EPOCH | ONCE else 2)
    # two epochs of six steps, of which every second one is measured
    if name in BY_EPOCH | ONCE:
        assert rows[-1]["measured"] == (1 if name in ONCE else 2)
    else:
        assert 6 <= rows[-1]["measured"] <= 6 + len(ALSO.get(name, ()))


def test_the_cost_is_that_of_the_clock(dear, tmp_path):
    started = time.perf_counter()
    rows = overhead(tmp_path, every_n_steps=4).overhead.to_dicts()
    whole = time.perf_counter() - started
    last = rows[-1]
    assert last["measured"] == 10
    assert 10 * COST <= last["seconds"] <= last["elapsed"] <= whole
    assert last["elapsed"] >= 40 * STEP + 10 * COST
    assert 10 * COST / last["elapsed"] <= last["share"] <= last["seconds"] / last["elapsed"] + 1e-9
    # an ordinary step does not contain a measurement
    assert STEP <= last["step_seconds"] < COST
    for name in ("measured", "seconds", "elapsed"):
        values = [row[name] for row in rows]
        assert values == sorted(values)


def test_an_automatic_interval_keeps_to_the_budget(dear, tmp_path):
    budget = 0.2
    run = overhead(tmp_path, epochs=6, every_n_steps="auto", overhead_budget=budget)
    last = run.overhead.to_dicts()[-1]
    # 50 ms may be a fifth of n steps of 10 ms: 25 of them, and fewer where a busy machine is slow
    assert 8 <= last["every_n_steps"] <= 40
    assert last["share"] <= 1.5 * budget
    steps = sorted(set(run.grad["step"]))
    assert len(steps) >= 3
    assert min(b - a for a, b in pairwise(steps[1:])) >= 5


def test_a_smaller_budget_measures_less_often(dear, tmp_path):
    measured = [
        overhead(
            tmp_path / str(budget), epochs=3, every_n_steps="auto", overhead_budget=budget
        ).overhead["measured"][-1]
        for budget in (0.05, 0.8)
    ]
    assert measured[0] * 3 <= measured[1]


def test_a_number_is_kept_whatever_it_costs(dear, tmp_path):
    run = overhead(tmp_path, every_n_steps=2, overhead_budget=0.001)
    assert sorted(set(run.grad["step"])) == list(range(1, 40, 2))
    assert set(run.overhead["every_n_steps"]) == {2}
