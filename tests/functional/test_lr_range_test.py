"""The suggestion of a range test: against planted curves, noise and an independent reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_diag.functional.lr_range_test import (
    diverged,
    learning_rates,
    lr_suggestion,
    smoothed_both_ways,
    smoothed_losses,
)

LRS = torch.tensor(learning_rates(1e-8, 1.0, 100), dtype=torch.float64)


def curve(centre=1e-3, leaves=0.3, height=1.5):
    """A loss that falls around `centre` and leaves around `leaves`."""
    return 2 - height / (1 + centre / LRS) + (LRS / leaves) ** 2


def noise(seed, size=100):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rates_are_those_of_numpy():
    assert_close(LRS.numpy(), np.geomspace(1e-8, 1.0, 100), rtol=1e-10, atol=0)
    assert learning_rates(1e-8, 1.0, 100)[0] == 1e-8
    assert learning_rates(1e-8, 1.0, 100)[-1] == 1.0


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.98])
def test_smoothing_is_the_recursion_of_adam(beta):
    losses, average, expected = noise(1, 40), 0.0, []
    for t, loss in enumerate(losses.tolist(), start=1):
        average = beta * average + (1 - beta) * loss
        expected.append(average / (1 - beta**t))
    assert_close(smoothed_losses(losses, beta).tolist(), expected)


@given(st.floats(-1e6, 1e6), st.integers(1, 60))
def test_a_constant_stays_itself(value, size):
    same = torch.full((size,), value, dtype=torch.float64)
    assert_close(smoothed_losses(same), same)
    assert_close(smoothed_both_ways(same), same)


@given(st.integers(0, 50))
def test_smoothing_both_ways_knows_no_direction(seed):
    losses = noise(seed, 30)
    assert_close(smoothed_both_ways(losses).flip(0), smoothed_both_ways(losses.flip(0)))


def test_a_one_sided_average_lags_and_a_two_sided_does_not():
    step = torch.cat([torch.ones(50), torch.zeros(50)])
    half_one = int((smoothed_losses(step) < 0.5).int().argmax())
    half_both = int((smoothed_both_ways(step) < 0.5).int().argmax())
    assert half_one >= 55
    assert abs(half_both - 50) <= 1


@pytest.mark.parametrize("centre", [1e-6, 1e-4, 1e-3, 1e-2])
def test_the_steepest_place_is_found(centre):
    found = lr_suggestion(LRS, curve(centre, leaves=max(0.3, 30 * centre)))
    assert found.confidence == "high"
    assert 0.4 * centre < found.lr < 2.5 * centre
    assert found.slope < 0


def test_where_it_leaves_does_not_pull_the_suggestion_down():
    near = lr_suggestion(LRS, curve(1e-3, leaves=1e-1)).lr
    far = lr_suggestion(LRS, curve(1e-3, leaves=1e6)).lr
    assert 0.4 < near / far <= 1


@pytest.mark.parametrize("shift", [-100.0, 0.0, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_scale_and_shift_change_nothing(shift, scale):
    plain = lr_suggestion(LRS, curve() + 0.02 * noise(3))
    moved = lr_suggestion(LRS, scale * (curve() + 0.02 * noise(3)) + shift)
    assert moved.lr == plain.lr
    assert moved.confidence == plain.confidence
    assert moved.slope == pytest.approx(scale * plain.slope)
    assert moved.noise == pytest.approx(scale * plain.noise)


def test_noise_of_the_losses_is_estimated():
    values = [lr_suggestion(LRS, curve() + 0.05 * noise(seed)).noise for seed in range(30)]
    assert np.median(values) == pytest.approx(0.05, rel=0.25)


@pytest.mark.parametrize("kind", ["normal", "heavy", "lognormal"])
def test_pure_noise_gives_no_suggestion(kind):
    """Of 300 curves not more than 6 may, which is four times what was measured."""
    draw = {
        "normal": lambda rng: rng.normal(size=100),
        "heavy": lambda rng: rng.standard_t(3, size=100),
        "lognormal": lambda rng: np.exp(rng.normal(size=100)),
    }[kind]
    found = [
        lr_suggestion(LRS, torch.from_numpy(draw(np.random.default_rng(seed))))
        for seed in range(300)
    ]
    wrong = [one for one in found if one.lr is not None]
    assert len(wrong) <= 6
    assert all(one.reason for one in found if one.lr is None)


def test_a_loss_that_only_rises_gives_none():
    found = lr_suggestion(LRS, 1 + LRS)
    assert found.lr is None
    assert found.confidence == "none"
    assert "does not fall" in found.reason


def test_real_noise_hardly_moves_it():
    found = [lr_suggestion(LRS, curve() + 0.1 * noise(seed)).lr for seed in range(100)]
    assert all(lr is not None for lr in found)
    assert 0.2e-3 < np.quantile(found, 0.1) < np.quantile(found, 0.9) < 4e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_ends_the_curve(bad):
    whole, cut = curve(), curve()
    cut[85:] = bad
    assert lr_suggestion(LRS, cut).lr == lr_suggestion(LRS[:85], whole[:85]).lr
    cut[15:] = bad
    found = lr_suggestion(LRS, cut)
    assert (found.lr, found.reason) == (None, "the curve has 15 finite points, and needs 20")


def test_empty():
    empty = torch.empty(0)
    assert lr_suggestion(empty, empty).lr is None
    assert not diverged(empty)
    assert smoothed_losses(empty).shape == (0,)


def test_bounds():
    free = lr_suggestion(LRS, curve())
    inside = lr_suggestion(LRS, curve(), bounds=(1e-5, 1e-2))
    assert inside == free
    above = lr_suggestion(LRS, curve(), bounds=(1e-6, 1e-5))
    assert (above.lr, above.confidence) == (1e-5, "medium")
    assert "outside of the bounds" in above.reason


def test_a_loss_that_still_falls_is_told():
    found = lr_suggestion(LRS, 2 - 0.1 * LRS.log10())
    assert "still falls" in found.reason
    assert found.confidence == "medium"


def test_the_suggestion_has_two_digits():
    lr = lr_suggestion(LRS, curve()).lr
    assert lr == float(f"{lr:.2g}")


# ---- the stop ----


def stops_at(losses):
    return next((n for n in range(1, len(losses) + 1) if diverged(losses[:n])), None)


def test_stops_soon_after_the_loss_has_left():
    where = stops_at(curve(leaves=0.1))
    assert curve(leaves=0.1)[where - 1] > 2
    assert where > 85


@pytest.mark.parametrize("first", [0.01, 30.0])
def test_one_odd_first_loss_stops_nothing(first):
    losses = curve(leaves=1e6) + 0.05 * noise(2)
    losses[0] = first
    assert stops_at(losses) is None


def test_noise_stops_nothing():
    stopped = [seed for seed in range(200) if stops_at(5 + noise(seed)) is not None]
    assert len(stopped) <= 2


def test_negative_losses():
    assert stops_at(curve(leaves=1e6) - 50) is None
    assert stops_at(curve(leaves=0.1) - 50) == stops_at(curve(leaves=0.1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_at_once(bad):
    losses = curve()
    losses[3] = bad
    assert stops_at(losses) == 4


def test_gradient_descent_on_a_parabola_stays_below_its_limit():
    """Steps above ``2 / curvature`` diverge; so no more than that may be suggested."""
    for curvature in (0.1, 1.0, 30.0):
        w, losses = torch.tensor(3.0, dtype=torch.float64), []
        for lr in LRS * 100:
            losses.append(float(curvature * w**2 / 2))
            if diverged(torch.tensor(losses)):
                break
            w = w - float(lr) * curvature * w
        lrs = (LRS * 100)[: len(losses)]
        found = lr_suggestion(lrs, torch.tensor(losses, dtype=torch.float64))
        assert 0.01 / curvature < found.lr < 2 / curvature


# ---- losses that are compared batch by batch ----


def compared(fall, seed):
    """Batches of very different difficulty, of which what is learnt is a small part."""
    difficulty = noise(seed)
    learnt = fall * (curve(1e-3) - 2) / 1.5 * (1 + 0.1 * noise(seed + 1000))
    return difficulty + 5, learnt


@pytest.mark.parametrize("seed", range(10))
def test_what_batches_differ_by_is_no_noise(seed):
    difficulty, learnt = compared(0.3, seed)
    assert lr_suggestion(LRS, difficulty + learnt).confidence != "high"
    found = lr_suggestion(LRS, learnt, spread=float(difficulty.std()))
    assert found.confidence == "high"
    assert 1e-4 < found.lr < 1e-2


def test_a_fall_that_is_nothing_to_what_batches_differ_by_supports_none():
    difficulty, learnt = compared(0.03, 1)
    assert lr_suggestion(LRS, learnt, spread=float(difficulty.std())).lr is None
    assert lr_suggestion(LRS, learnt, spread=0.1).lr is not None


def test_rounding_at_the_start_stops_nothing():
    """At the smallest rates the compared losses differ by rounding alone."""
    losses = 5 + 1e-7 * noise(4) + torch.where(LRS > 1e-4, -0.1, 0.0)
    assert all(not diverged(losses[:n], spread=1.0) for n in range(101))
    assert all(not diverged(losses[:n], spread=0.0) for n in range(101))


def test_compared_losses_that_leave_stop():
    losses = 5 + 1e-7 * noise(4) + (LRS / 0.1) ** 2
    stopped = next(n for n in range(1, 101) if diverged(losses[:n], spread=0.5))
    assert 5.5 < losses[stopped - 1] < 50
