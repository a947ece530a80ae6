"""Each rule on losses finds its planted fault: the right rule, severity and first step."""

import math

import numpy as np
import polars as pl
import pytest

from lightning_diag.rules import RULES, diagnose
from lightning_diag.rules.loss_series import (
    by_fives,
    first_loss,
    has_several_optimizers,
    standard_error,
    starting_level,
    training_losses,
    validation_losses,
    window_noise,
    without_warmup,
)
from tests.rules.losses_made_up import loss_rows, loss_run, metric_rows
from tests.rules.planted import MadeUpRun, whole_row

LOSSES = {id for id, one in RULES.items() if one.family == "losses"}


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def falling(rng, steps=200, *, first=2.0, floor=0.2, pace=40.0, noise=0.05):
    curve = floor + (first - floor) * np.exp(-np.arange(steps) / pace)
    return curve * (1 + noise * rng.normal(size=steps))


def alarms(run):
    return {one.rule for one in diagnose(run) if one.rank > 0 and one.rule in LOSSES}


def only(run, rule):
    found = [one for one in diagnose(run, on_error="raise") if one.rule == rule]
    assert len(found) == 1, found
    assert found[0].message.endswith(".")
    assert found[0].suggestion.endswith(".")
    return found[0]


# ---- nonfinite_loss ----


def test_nonfinite_from_a_step_on_is_critical_and_exact(rng):
    losses = falling(rng)
    losses[57:] = math.nan
    found = only(loss_run(losses), "nonfinite_loss")
    assert (found.severity, found.first_step, found.last_step) == ("critical", 57, 199)
    assert found.observed == 143
    assert found.evidence.file == "records/loss.jsonl"
    assert "At step 57" in found.message
    assert "not been finite since" in found.message


def test_one_nonfinite_loss_that_recovered_is_a_warning(rng):
    losses = falling(rng)
    losses[57] = math.inf
    found = only(loss_run(losses), "nonfinite_loss")
    assert (found.severity, found.first_step, found.observed) == ("warning", 57, 1)
    assert "finite again" in found.message


def test_nonfinite_losses_that_the_scaler_skipped_are_noted(rng):
    losses = falling(rng)
    losses[50:53] = math.inf
    run = loss_run(losses)
    run.rows["loss"][5] |= {"skipped": 3, "gradient_nonfinite": 3}
    found = only(run, "nonfinite_loss")
    assert found.severity == "info"
    assert "scaler skipped them" in found.message


def test_a_scaler_that_skipped_some_of_them_excuses_none(rng):
    losses = falling(rng)
    losses[[50, 70]] = math.inf
    run = loss_run(losses)
    run.rows["loss"][5] |= {"skipped": 1, "gradient_nonfinite": 1}
    assert only(run, "nonfinite_loss").severity == "warning"


def test_a_scaler_that_skips_to_the_end_is_critical(rng):
    losses = falling(rng)
    losses[100:] = math.nan
    run = loss_run(losses)
    for row in run.rows["loss"][10:]:
        row |= {"skipped": 10, "gradient_nonfinite": 10}
    assert only(run, "nonfinite_loss").severity == "critical"


def test_a_gradient_that_broke_before_the_loss_is_told(rng):
    losses = falling(rng)
    losses[57:] = math.nan
    run = loss_run(losses)
    run.rows["loss"][5]["gradient_nonfinite"] = 4
    assert "gradient broke before" in only(run, "nonfinite_loss").message
    run.rows["loss"][5]["gradient_nonfinite"] = 3
    assert "gradient broke before" not in only(run, "nonfinite_loss").message


def test_nonfinite_is_read_from_collapse_and_from_metrics(rng):
    row = {"step": 3, "component": None, "kinds": "nonfinite_loss,nonfinite_gradient", "loss": None}
    found = only(MadeUpRun(rows={"collapse": [row]}), "nonfinite_loss")
    assert (found.severity, found.first_step) == ("critical", 3)
    assert found.evidence.file == "records/collapse.jsonl"
    values = [1.0, 0.9, math.nan, math.nan]
    found = only(MadeUpRun(rows={"metrics": metric_rows(values)}), "nonfinite_loss")
    assert (found.severity, found.first_step, found.observed) == ("critical", 29, 2)
    validation = MadeUpRun(rows={"metrics": metric_rows(values, "val_loss")})
    assert not alarms(validation)


# ---- divergence ----


def test_divergence_above_the_start_is_critical_within_thirty_steps(rng):
    losses = falling(rng)
    losses[100:] = 3.0 + 0.3 * rng.normal(size=100)
    found = only(loss_run(losses), "divergence")
    assert (found.severity, found.first_step) == ("critical", 100)
    assert found.observed == pytest.approx(3.0, rel=0.05)
    assert "higher than at the beginning" in found.message
    assert alarms(loss_run(losses[:130])) >= {"divergence"}
    assert not alarms(loss_run(losses[:100]))


def test_divergence_far_out_needs_two_windows(rng):
    losses = falling(rng, 120)
    losses[100:] = 50.0
    assert only(loss_run(losses), "divergence").severity == "critical"


def test_divergence_that_loses_most_progress_is_a_warning(rng):
    losses = falling(rng)
    losses[120:] = 1.5 + 0.05 * rng.normal(size=80)
    found = only(loss_run(losses), "divergence")
    assert (found.severity, found.first_step) == ("warning", 120)
    assert "much of what was learned" in found.message


def test_divergence_from_the_first_steps(rng):
    losses = 2.0 * 1.15 ** np.arange(60) * (1 + 0.1 * rng.normal(size=60))
    found = only(loss_run(losses), "divergence")
    assert found.severity == "critical"
    assert found.first_step <= 20


def test_divergence_that_came_back_is_none(rng):
    losses = falling(rng, 300)
    losses[100:140] = 3.0
    assert "divergence" in alarms(loss_run(losses[:140]))
    assert "divergence" not in alarms(loss_run(losses[:150]))
    assert not [one for one in diagnose(loss_run(losses)) if one.rule == "divergence"]


def test_divergence_among_several_optimizers_is_noted(rng):
    losses = falling(rng)
    losses[100:] = 3.0 + 0.3 * rng.normal(size=100)
    run = loss_run(losses)
    parts = [{"l2": 1.0, "nonfinite": 0, "count": 5, "component": "net"}]
    run.rows["grad"] = [whole_row(step, parts, optimizer=step % 2) for step in range(200)]
    assert only(run, "divergence").severity == "info"


def test_divergence_explains_the_swings_it_brings(rng):
    losses = falling(rng, 260)
    losses[200:] = np.abs(4.0 + 3.0 * rng.normal(size=60))
    found = {one.rule: one for one in diagnose(loss_run(losses))}
    assert found["loss_oscillation"].caused_by == "divergence"


# ---- loss_spike ----


def test_a_lone_spike_that_comes_back_is_noted(rng):
    losses = falling(rng, 300)
    losses[250] = 3.0
    found = only(loss_run(losses), "loss_spike")
    assert (found.severity, found.first_step, found.observed) == ("info", 250, 3.0)


def test_a_lone_spike_that_towers_over_the_start_is_a_warning(rng):
    losses = falling(rng, 300)
    losses[250] = 60.0
    found = only(loss_run(losses), "loss_spike")
    assert (found.severity, found.first_step) == ("warning", 250)
    assert "once" in found.message
    assert "came back" in found.message


def test_several_spikes_are_a_warning(rng):
    losses = falling(rng, 400)
    losses[[200, 260, 333]] = 4.0
    found = only(loss_run(losses), "loss_spike")
    assert (found.severity, found.first_step) == ("warning", 200)
    assert "3 times" in found.message


def test_a_spike_from_which_the_loss_does_not_come_back(rng):
    losses = falling(rng, 400)
    losses[300:] += 1.2
    losses[300] = 4.0
    found = only(loss_run(losses), "loss_spike")
    assert (found.severity, found.first_step) == ("warning", 300)
    assert "has not come back" in found.message


def test_spikes_of_a_tiny_loss_are_noted(rng):
    losses = falling(rng, 400, floor=1e-3)
    losses[[300, 340, 380]] = 0.1
    assert only(loss_run(losses), "loss_spike").severity == "info"


def test_spikes_of_a_negative_loss_are_told_by_their_spread(rng):
    losses = -5.0 + falling(rng, 400)
    losses[[200, 260, 333]] = 40.0
    assert only(loss_run(losses), "loss_spike").severity == "warning"


# ---- loss_oscillation ----


def test_swings_since_mid_run(rng):
    losses = falling(rng, 300)
    losses[200:] = 1.0 + 0.7 * np.sin(np.arange(100) * 2.5)
    found = only(loss_run(losses), "loss_oscillation")
    assert (found.severity, found.first_step) == ("warning", 200)
    assert "It goes on." in found.message


def test_swings_that_calmed_down_are_noted(rng):
    losses = falling(rng, 300, pace=20.0)
    losses[80:200] = 1.0 + 0.7 * np.sin(np.arange(120) * 2.5)
    found = only(loss_run(losses), "loss_oscillation")
    assert (found.severity, found.first_step) == ("info", 80)


def test_a_leap_at_once_and_nothing_learned(rng):
    losses = np.abs(1.4 + 0.05 * rng.normal(size=200))
    losses[3:60] += 30 * np.abs(np.sin(np.arange(57) * 2.5)) * np.exp(-np.arange(57) / 30)
    norms = np.where(losses > 1.6, 30.0, 0.2)
    found = only(loss_run(losses, norms=norms), "loss_oscillation")
    assert (found.severity, found.first_step) == ("warning", 0)


# ---- not_learning, slow_convergence ----


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("steps", [100, 400])
def test_a_flat_loss_is_not_learning(rng, noise, steps):
    losses = 1.386 * (1 + noise * rng.normal(size=steps))
    found = only(loss_run(losses), "not_learning")
    assert (found.severity, found.first_step) == ("warning", 0)
    assert alarms(loss_run(losses)) == {"not_learning"}
    assert not alarms(loss_run(losses[:90]))


def test_chance_is_found_at_once_and_nothing_after_it(rng):
    losses = math.log(4) + 0.25 * np.exp(-np.arange(200) / 10) + 0.02 * rng.normal(size=200)
    assert only(loss_run(losses), "not_learning").severity == "warning"
    # the same fall to a level that is no logarithm of a number of classes
    assert "not_learning" not in alarms(loss_run(losses + 0.1))


def test_not_learning_after_a_warm_up(rng):
    rates = np.minimum(1.0, np.arange(300) / 150) * 1e-3
    losses = falling(rng, 300, pace=60.0)
    losses[:100] = 2.0 * (1 + 0.05 * rng.normal(size=100))
    flat = 2.0 * (1 + 0.05 * rng.normal(size=300))
    assert only(loss_run(flat, rates=rates), "not_learning").severity == "warning"
    # of 105 steps the first ten have hardly any learning rate
    assert not alarms(loss_run(flat[:105], rates=rates[:105]))


def test_a_flat_tiny_loss_had_been_learned_before(rng):
    losses = 0.004 * np.abs(1 + 0.8 * rng.normal(size=200))
    assert only(loss_run(losses), "not_learning").severity == "info"


def test_a_window_into_a_long_run_tells_nothing_of_its_start(rng):
    losses = 1.386 * (1 + 0.01 * rng.normal(size=400))
    assert not alarms(loss_run(losses, start=5000))


def test_noise_too_large_to_tell_is_noted(rng):
    losses = np.abs(1 + 3 * rng.normal(size=110))
    found = [one for one in diagnose(loss_run(losses)) if one.rule == "not_learning"]
    assert all(one.severity == "info" for one in found)


def test_an_even_slow_fall(rng):
    losses = 2.0 * (1 - 0.1 * np.arange(300) / 300) * (1 + 0.005 * rng.normal(size=300))
    run = loss_run(losses)
    found = only(run, "slow_convergence")
    assert (found.severity, found.first_step) == ("info", 0)
    assert found.observed == pytest.approx(0.1, abs=0.02)
    tiny = [{"step": step, "component": None, "ratio": 2e-6} for step in range(0, 300, 10)]
    run.rows["update"] = tiny
    assert only(run, "slow_convergence").severity == "warning"
    assert "2.0e-06" in only(run, "slow_convergence").message


# ---- loss_plateau ----


def test_a_fall_that_breaks_off_with_the_learning_rate(rng):
    losses = np.maximum(2.0 - 0.01 * np.arange(300), 1.2) * (1 + 0.01 * rng.normal(size=300))
    rates = np.where(np.arange(300) < 80, 1e-3, 1e-6)
    found = only(loss_run(losses, rates=rates), "loss_plateau")
    assert (found.severity, found.first_step) == ("warning", 80)
    assert "learning rate is far lower" in found.message
    assert only(loss_run(losses), "loss_plateau").severity == "info"


def test_a_flat_second_half_is_noted(rng):
    found = only(loss_run(falling(rng, 400, floor=0.8, pace=20.0)), "loss_plateau")
    assert found.severity == "info"
    assert found.first_step == 200


# ---- overfitting ----


def validations(values, every=50):
    return [((index + 1) * every - 1, value) for index, value in enumerate(values)]


def test_a_validation_loss_that_rises(rng):
    losses = falling(rng, 500, pace=100.0)
    run = loss_run(losses, validation=validations([1.2, 0.8, 0.7, 0.75, 0.85, 0.95, 1.1]))
    found = only(run, "overfitting")
    assert (found.severity, found.first_step, found.observed) == ("warning", 149, 0.95)
    assert "`val_loss` was lowest at step 149" in found.message


@pytest.mark.parametrize(
    "values",
    [
        [1.2, 1.0, 0.9, 0.85, 0.83, 0.82, 0.82],  # a gap, but it does not grow
        [1.2, 0.8, 0.7, 1.4, 0.7, 1.3, 0.8, 1.4, 0.9],  # noise
        [1.2, 0.8, 0.7, 1.2, 1.3],  # too few to tell
    ],
)
def test_no_overfitting(rng, values):
    losses = falling(rng, 500, pace=100.0)
    assert "overfitting" not in alarms(loss_run(losses, validation=validations(values)))


def test_no_overfitting_where_all_diverges(rng):
    losses = falling(rng, 500)
    losses[150:] = np.linspace(0.3, 6.0, 350)
    run = loss_run(losses, validation=validations([1.2, 0.8, 0.7, 1.2, 2.0, 3.0, 4.0, 5.0]))
    assert alarms(run) == {"divergence"}


# ---- the series ----


def test_a_run_without_collapse_stop_is_judged_by_its_metrics(rng):
    losses = falling(rng, 400)
    losses[250:] = 5.0 + 0.3 * rng.normal(size=150)
    run = MadeUpRun(rows={"metrics": metric_rows(losses[9::10])})
    found = only(run, "divergence")
    assert found.severity == "critical"
    assert found.evidence.file == "records/metrics.jsonl"


def test_nothing_is_said_of_runs_without_losses():
    null = loss_rows(np.ones(100))
    for row in null:
        row |= dict.fromkeys(("loss", "loss_std", "loss_min", "loss_max", "loss_max_step"))
    for rows in (null, [{"step": 3, "component": None}]):
        assert not diagnose(MadeUpRun(rows={"loss": rows}), on_error="raise")
    assert not diagnose(MadeUpRun(rows={"metrics": [{"step": 3, "lr": 0.1}]}), on_error="raise")


def test_the_series_against_numpy(rng):
    losses = falling(rng, 205)
    series = training_losses(pl.DataFrame(loss_rows(losses)), pl.DataFrame())
    assert series.counts == [10] * 20 + [5]
    assert series.mean() == pytest.approx(losses.mean())
    assert series.part(3, 7).mean() == pytest.approx(losses[30:70].mean())
    flat = rng.normal(size=10_000)
    series = training_losses(pl.DataFrame(loss_rows(flat)), pl.DataFrame())
    assert standard_error(series) == pytest.approx(0.01, rel=0.15)


def test_window_noise_does_not_see_trends_or_jumps(rng):
    values = 3.0 * rng.normal(size=5000)
    assert window_noise(values) == pytest.approx(3.0, rel=0.05)
    values += np.linspace(0, 500, 5000) + 900 * (np.arange(5000) > 2000)
    assert window_noise(values) == pytest.approx(3.0, rel=0.05)
    assert window_noise([1.0, 2.0]) == 0.0


def test_warm_up_is_left_out():
    rates = [1e-6, 5e-5, 1e-4, 1e-3, 1e-5]
    series = training_losses(
        pl.DataFrame(loss_rows(np.ones(50), rates=np.repeat(rates, 10))), pl.DataFrame()
    )
    assert without_warmup(series).firsts == [20, 30, 40]


def test_first_loss_is_that_of_the_first_step_alone():
    rows = pl.DataFrame({"step": [7, 0], "loss": [0.5, 2.0]})
    assert first_loss(rows) == 2.0
    assert first_loss(rows.filter(pl.col("step") > 0)) is None
    assert first_loss(pl.DataFrame()) is None


def test_single_losses_are_joined_by_fives():
    series = training_losses(pl.DataFrame(), pl.DataFrame(metric_rows(np.arange(42.0))))
    joined = by_fives(series)
    assert joined.means == [4.0 + 5 * i for i in range(8)]
    assert joined.counts == [5] * 8
    assert (joined.firsts[0], joined.steps[0]) == (29, 69)


def test_starting_level_looks_behind_a_leap():
    noise = np.random.default_rng(0).normal(size=100)
    losses = np.abs(50 + noise)
    losses[0] = 2.0
    series = training_losses(pl.DataFrame(loss_rows(losses)), pl.DataFrame())
    assert starting_level(series) == 2.0
    losses = np.abs(1 + noise)
    series = training_losses(pl.DataFrame(loss_rows(losses)), pl.DataFrame())
    assert starting_level(series, losses[0]) == pytest.approx(losses[:10].mean())


def test_validation_losses_by_name():
    frame = pl.DataFrame({"step": [1, 2], "val_loss_extra": [1.0, 2.0], "val_loss": [3.0, None]})
    assert validation_losses(frame) == ([1], [3.0], "val_loss")
    assert validation_losses(pl.DataFrame({"step": [1], "loss": [1.0]})) is None


def test_several_optimizers_are_seen():
    assert has_several_optimizers(pl.DataFrame({"optimizer": [0, 1, None]}))
    assert not has_several_optimizers(pl.DataFrame({"optimizer": [0, 0]}))
    assert not has_several_optimizers(pl.DataFrame())


@pytest.mark.parametrize(("growth", "found"), [(1.08, True), (1.0, False)])
def test_a_loss_without_a_lower_end(growth, found):
    steps = np.arange(300)
    losses, norms = -(growth**steps), growth**steps
    run = MadeUpRun({"loss": loss_rows(losses, norms=norms)})
    rules = {one.rule for one in diagnose(run, on_error="raise") if one.rank > 0}
    assert ("divergence" in rules) == found
