"""Healthy losses of many shapes, noises, lengths and windows: no finding above info."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diag.rules import RULES, diagnose
from tests.rules.losses_made_up import loss_run, metric_rows
from tests.rules.planted import MadeUpRun, whole_row

LOSSES = {id for id, one in RULES.items() if one.family == "losses"}


def assert_quiet(run):
    found = diagnose(run, on_error="raise")
    said = [(one.rule, one.message) for one in found if one.rank > 0 and one.rule in LOSSES]
    assert not said


def exponential(steps, floor):
    return floor + (1 - floor) * np.exp(-np.arange(steps) / (0.1 * steps))


def power(steps, floor):
    return floor + (1 - floor) * (1 + np.arange(steps) / (0.05 * steps)) ** -0.7


def late(steps, floor):
    middle, width = 0.45 * steps, 0.06 * steps
    return floor + (1 - floor) / (1 + np.exp((np.arange(steps) - middle) / width))


def even(steps, floor):
    return 1 - (1 - floor) * np.arange(steps) / steps


def additive(rng, curve, size):
    return np.abs(curve + size * rng.normal(size=len(curve)))


def proportional(rng, curve, size):
    return curve * np.abs(1 + size * rng.normal(size=len(curve)))


def skewed(rng, curve, size):
    return curve * np.exp(size * rng.normal(size=len(curve)) - size**2 / 2)


def single_samples(rng, curve, size):
    return curve * rng.chisquare(1, size=len(curve))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([exponential, power, late, even]),
    st.sampled_from([additive, proportional, skewed, single_samples]),
    st.integers(120, 4000),
    st.floats(0.003, 0.3),
    st.floats(0.0, 0.6),
    st.sampled_from([1e-4, 1.0, 300.0]),
    st.sampled_from([10, 10, 25, 100]),
    st.integers(0, 99),
)
def test_learning_of_any_shape_is_quiet(shape, noise, steps, size, floor, level, window, seed):
    rng = np.random.default_rng(seed)
    losses = level * noise(rng, shape(steps, floor), size)
    norms = np.sqrt(losses / level) * np.exp(0.3 * rng.normal(size=steps))
    assert_quiet(loss_run(losses, size=window, norms=norms))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([exponential, power, even]),
    st.sampled_from([additive, proportional, skewed]),
    st.integers(400, 20_000),
    st.floats(0.003, 0.2),
    st.sampled_from([10, 50]),
    st.integers(0, 99),
)
def test_learning_that_only_metrics_saw_is_quiet(shape, noise, steps, size, every, seed):
    rng = np.random.default_rng(seed)
    losses = noise(rng, shape(steps, 0.2), size)[every - 1 :: every]
    assert_quiet(MadeUpRun(rows={"metrics": metric_rows(losses, every=every, start=every - 1)}))


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def learned(rng, steps=400, floor=0.1, size=0.1):
    return 2.0 * skewed(rng, exponential(steps, floor), size)


def test_losses_below_zero(rng):
    losses = 8.0 * exponential(400, 0.0) - 5.0 + 0.2 * rng.normal(size=400)
    assert_quiet(loss_run(losses, norms=2.0 * exponential(400, 0.2)))


def test_a_policy_whose_advantages_fade(rng):
    losses = -0.3 * exponential(400, 0.03) * np.abs(rng.normal(size=400))
    assert_quiet(loss_run(losses, norms=exponential(400, 0.1)))


def test_warm_up_from_zero_then_cosine_to_zero(rng):
    t = np.arange(400)
    rates = 1e-3 * np.where(t < 60, t / 60, 0.5 * (1 + np.cos(np.pi * (t - 60) / 340)))
    moved = np.cumsum(rates) / rates.sum()
    losses = 2.0 * np.exp(-4 * moved) * (1 + 0.1 * rng.normal(size=400))
    assert_quiet(loss_run(losses, rates=rates))


def test_step_decay_ten_times(rng):
    t = np.arange(600)
    rates = 1e-1 * 0.1 ** (t // 200)
    drops = 0.5 + 0.5 * np.exp(-t / 20)
    drops -= np.where(t >= 200, 0.2 * (1 - np.exp(-(t - 200) / 5.0)), 0)
    drops -= np.where(t >= 400, 0.05 * (1 - np.exp(-(t - 400) / 5.0)), 0)
    assert_quiet(loss_run(drops * (1 + 0.05 * rng.normal(size=600)), rates=rates))


def test_an_early_plateau_then_progress(rng):
    losses = 0.69 * np.where(np.arange(400) < 150, 1.0, 0.0)
    losses[150:] = 0.69 * exponential(250, 0.1)
    assert_quiet(loss_run(losses * (1 + 0.05 * rng.normal(size=400))))


def test_learned_before_the_run_began(rng):
    assert_quiet(loss_run(0.01 * np.exp(rng.normal(size=300)), norms=np.full(300, 0.01)))


def test_a_lone_spike(rng):
    losses = learned(rng)
    losses[300] *= 25
    assert_quiet(loss_run(losses))


def test_a_second_loss_that_sets_in_late(rng):
    losses = learned(rng, floor=0.02)
    losses[150:] += 2.0 * exponential(250, 0.05)
    assert_quiet(loss_run(losses))


def test_a_lone_infinite_loss_that_the_scaler_skipped(rng):
    losses = learned(rng)
    losses[3] = np.inf
    run = loss_run(losses)
    run.rows["loss"][0] |= {"skipped": 1, "gradient_nonfinite": 1}
    assert_quiet(run)


def test_a_burst_that_calms_down(rng):
    losses = learned(rng)
    losses[150:185] *= 6
    assert_quiet(loss_run(losses))


def test_a_gan_whose_losses_rise_and_swing(rng):
    losses = np.linspace(0.7, 4.0, 400) * np.abs(1 + 0.5 * np.sin(np.arange(400) * 1.3))
    run = loss_run(losses)
    parts = [{"l2": 1.0, "nonfinite": 0, "count": 5, "component": "net"}]
    run.rows["grad"] = [whole_row(step, parts, optimizer=step % 2) for step in range(400)]
    assert_quiet(run)


@pytest.mark.parametrize("gap", [0.05, 0.5, 2.0])
def test_a_gap_to_the_validation_loss_that_stays(rng, gap):
    curve = 2.0 * exponential(800, 0.1)
    validation = [(s, curve[s] + gap * (1 + 0.03 * rng.normal())) for s in range(49, 800, 50)]
    assert_quiet(loss_run(curve * (1 + 0.1 * rng.normal(size=800)), validation=validation))


def test_every_prefix_of_a_healthy_run_is_quiet(rng):
    losses = learned(rng, 300)
    for steps in range(1, 300, 7):
        assert_quiet(loss_run(losses[:steps]))
