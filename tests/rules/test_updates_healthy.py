"""Healthy runs of many shapes: no update rule says anything above info."""

import math

import numpy as np
import pytest
from torch.optim import lr_scheduler as schedulers

from lightning_diag.rules import RULES, diagnose
from tests.rules.planted import MadeUpRun
from tests.rules.test_updates_planted import falling, scheduled, start, updates, windows

IDS = [id for id, one in RULES.items() if one.family == "updates"]


def accusations(run):
    found = diagnose(run, on_error="raise")
    return [one for one in found if one.rank > 0 and one.rule in IDS]


def one_cycle(o):
    return schedulers.OneCycleLR(o, 1.0, total_steps=210)


def warm_cosine(o):
    warm = schedulers.LinearLR(o, 1e-3, 1.0, 30)
    return schedulers.SequentialLR(o, [warm, schedulers.CosineAnnealingLR(o, 170)], [30])


SCHEDULES = {
    "constant": lambda o: schedulers.ConstantLR(o, 1.0),
    "cosine to zero": lambda o: schedulers.CosineAnnealingLR(o, 200),
    "cosine that is on its way": lambda o: schedulers.CosineAnnealingLR(o, 2000),
    "cosine and a tail": lambda o: schedulers.LambdaLR(
        o, lambda k: max(0.01, 0.5 * (1 + math.cos(math.pi * min(1.0, k / 160))))
    ),
    "linear to zero": lambda o: schedulers.LinearLR(o, 1.0, 0.0, 200),
    "three steps down": lambda o: schedulers.MultiStepLR(o, [60, 120, 160], 0.1),
    "halved ten times": lambda o: schedulers.StepLR(o, 29, 0.5),
    "exponential over the run": lambda o: schedulers.ExponentialLR(o, 0.98),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 40),
    "growing warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 25, 2),
    "triangles": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 25, cycle_momentum=False),
    "one cycle": one_cycle,
    "warm-up and cosine": warm_cosine,
    "long warm-up": lambda o: schedulers.LinearLR(o, 1e-3, 1.0, 150),
    "square root": lambda o: schedulers.LambdaLR(
        o, lambda k: min((k + 1) / 40, (40 / (k + 1)) ** 0.5)
    ),
}


@pytest.mark.parametrize("upto", [30, 60, 100, 150, 200])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_as_they_are_meant(name, upto):
    rates = scheduled(SCHEDULES[name], 200)[:upto]
    ratios = {"body": 5e-3 * rates[4::5] / rates.max() + 1e-9}
    losses = falling(200)[:upto]
    rows = {"loss": windows(losses, rates=rates), "update": updates(ratios, rates=rates)}
    assert accusations(MadeUpRun(rows)) == []


def test_reduced_on_plateaus():
    rates = 1e-2 * 0.1 ** np.repeat([0, 1, 2, 3], 50)
    rows = {"loss": windows(falling(), rates=rates)}
    assert accusations(MadeUpRun(rows)) == []


def test_zero_at_the_first_step_of_a_warm_up():
    rates = np.minimum(1.0, np.arange(200) / 60)
    assert accusations(MadeUpRun({"loss": windows(falling(), rates=rates)})) == []


def test_large_first_steps_of_adam():
    ratios = {"body": 0.08 * 0.8 ** np.arange(40) + 8e-3, "head": 0.2 * 0.7 ** np.arange(40) + 5e-3}
    rows = {"loss": windows(falling()), "update": updates(ratios), "collapse": start(1.4)}
    assert accusations(MadeUpRun(rows)) == []


def test_kick_at_the_start_from_which_it_recovers():
    losses = falling(200, 1.4, 0.05, 20)
    losses[1:6] = [4.0, 9.0, 5.0, 3.0, 2.0]
    ratios = {"body": [0.2, 0.1] + [0.03] * 38}
    rows = {"loss": windows(losses), "update": updates(ratios), "collapse": start(1.4)}
    assert accusations(MadeUpRun(rows)) == []


def test_spike_that_passes():
    losses = falling()
    losses[100:104] = 8.0
    ratios = {"body": [3e-3] * 40}
    rows = {"loss": windows(losses), "update": updates(ratios), "collapse": start(1.4)}
    assert accusations(MadeUpRun(rows)) == []


def test_small_batches_make_noise():
    rng = np.random.default_rng(5)
    losses = 0.5 * np.exp(rng.normal(0, 0.8, 300))
    ratios = {"body": [0.02] * 60, "head": [0.035] * 60}
    rows = {"loss": windows(losses), "update": updates(ratios), "collapse": start(0.3)}
    assert accusations(MadeUpRun(rows)) == []


def test_plateau_at_ordinary_steps_is_not_a_rate():
    losses = falling(200, 0.7, 0.69)
    rows = {"loss": windows(losses), "update": updates({"body": [5e-3] * 40})}
    assert accusations(MadeUpRun(rows)) == []


def test_tiny_parts_and_such_that_begin_at_zero():
    ratios = {"body": [2e-3] * 40, "scale": [0.9] * 40, "adapter": 1.0 / np.arange(1, 41)}
    counts = {"body": 5000, "scale": 4, "adapter": 5000}
    rows = updates(ratios, counts=counts)
    for row in rows:
        if row["component"] == "adapter":
            row["weight_rms"] = 1e-4 * row["step"]
    rows = {"update": rows, "loss": windows(falling(200, 1.0, 0.9))}
    assert accusations(MadeUpRun(rows)) == []


def test_converged_model_moves_little():
    ratios = {"body": 1e-2 * 0.7 ** np.arange(40)}
    rows = {"loss": windows(falling(200, 1.4, 1e-3, 15)), "update": updates(ratios)}
    assert accusations(MadeUpRun(rows)) == []


def test_fine_tuning_with_a_small_rate():
    losses = falling(200, 0.31, 0.3)
    rows = {"loss": windows(losses, rates=1e-5), "update": updates({"body": [4e-4] * 40})}
    assert accusations(MadeUpRun(rows)) == []


def test_embedding_whose_rows_are_seldom_met():
    rows = updates({"embedding": [1e-3] * 40}, unchanged_share=[0.99] * 40)
    grad = [
        {"step": 4 + 5 * i, "component": "embedding", "l2": 0.1, "zeros": 0.99} for i in range(40)
    ]
    run = {"update": rows, "grad": grad, "loss": windows(falling(200, 1.0, 0.9))}
    assert accusations(MadeUpRun(run)) == []


def test_losses_below_zero():
    losses = -2.0 + falling(200)
    rows = {"loss": windows(losses), "update": updates({"body": [5e-3] * 40})}
    assert accusations(MadeUpRun(rows)) == []


@pytest.mark.parametrize("prefix", ["loss", "metrics", "update"])
def test_rows_without_numbers(prefix):
    assert accusations(MadeUpRun({prefix: [{"step": 0, "epoch": 0, "component": None}]})) == []


def test_skipped_steps():
    rows = [{"step": 5 * i, "component": None, "skipped": 1, "lr": 1e-3} for i in range(40)]
    assert accusations(MadeUpRun({"update": rows})) == []
