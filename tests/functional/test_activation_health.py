"""Are dead and saturated shares right, for every family and layout?"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_diag.functional.activation_health import (
    COLUMNS,
    FUNCTIONS,
    Bounds,
    activation_bounds,
    activity,
    activity_table,
    flatness,
    idle_update,
    merge_activity,
)

RELU = Bounds(off=0.0)
TANH = activation_bounds("tanh", 0.97)


def some(*shape: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 3 + shift


def call(function: str, x: torch.Tensor) -> torch.Tensor:
    if function == "prelu":
        return F.prelu(x, torch.full((1,), 0.25, dtype=x.dtype))
    if function in ("tanh", "sigmoid"):
        return getattr(torch, function)(x)
    return getattr(F, function)(x)


class TestBounds:
    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_the_slope_is_small_where_a_function_is_said_to_be_flat(self, function):
        bounds = activation_bounds(function, 0.97)
        x = torch.linspace(-40, 40, 80_001, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(call(function, x).sum(), x)
        inside = (x > bounds.off) & (x > bounds.low) & (x < bounds.high)
        off, ends = slope[x <= bounds.off], slope[(x <= bounds.low) | (x >= bounds.high)]
        assert not len(off) or off.abs().max() < 0.02
        assert not len(ends) or ends.abs().max() < 0.06
        # and elsewhere there is some
        assert slope[inside].abs().max() > 0.15

    @pytest.mark.parametrize("s", [0.6, 0.9, 0.97, 0.999])
    def test_saturation_is_a_bound_of_the_output(self, s):
        low, high = activation_bounds("tanh", s)[1:]
        assert (math.tanh(low), math.tanh(high)) == pytest.approx((-s, s))
        low, high = (torch.tensor(x).sigmoid().item() for x in activation_bounds("sigmoid", s)[1:])
        assert (low, high) == pytest.approx((1 - s, s), rel=1e-5)

    def test_ends_of_hardtanh(self):
        assert activation_bounds("hardtanh") == Bounds(low=-1, high=1)
        assert activation_bounds("hardtanh", low=-2.0, high=3.0) == Bounds(low=-2, high=3)
        assert activation_bounds("relu6") == Bounds(off=0, high=6)
        assert activation_bounds("relu6", low=0.0, high=2.0) == Bounds(off=0, high=2)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"`saturation` must lie between 0.5 and 1, got 1"):
            activation_bounds("tanh", 1.0)
        with pytest.raises(ValueError, match=r"`function` must be one of relu, .*, got sine"):
            activation_bounds("sine")


class TestFlatness:
    def test_by_hand(self):
        x = torch.tensor([[-1.0, 0.0, 2.0], [-3.0, -1.0, -1.0]])
        found = flatness(x, RELU, -1)
        assert found.flat == 5
        assert found.dead_units.tolist() == [True, True, False]
        assert found.saturated == 0
        assert not found.saturated_units.any()

    @pytest.mark.parametrize("function", ["relu", "relu6"])
    def test_flat_is_where_the_output_is_zero(self, function):
        x = some(50, 20)
        found = flatness(x, activation_bounds(function), -1)
        y = call(function, x).numpy()
        assert found.flat == (y == 0).sum()
        np.testing.assert_array_equal(found.dead_units.numpy(), (y == 0).all(0))

    @pytest.mark.parametrize(
        ("shape", "unit_dim", "others"),
        [
            ((7, 5), -1, (0,)),
            ((7, 3, 5), -1, (0, 1)),
            ((7, 5, 3), 1, (0, 2)),
            ((4, 5, 3, 2), 1, (0, 2, 3)),
            ((4, 3, 2, 5), -1, (0, 1, 2)),
            ((2, 5, 2, 2, 2), 1, (0, 2, 3, 4)),
        ],
    )
    @pytest.mark.parametrize("function", ["relu", "tanh"])
    def test_units_of_every_layout(self, function, shape, unit_dim, others):
        x = some(*shape)
        moved = x.movedim(unit_dim, 0)
        moved[1] = -9.0
        moved[3] = -moved[3].abs() - 5 * (-1) ** torch.arange(moved[3].numel()).view_as(moved[3])
        y = call(function, x).double().numpy()
        found = flatness(x, activation_bounds(function), unit_dim)
        flat = y == 0 if function == "relu" else np.abs(y) >= 0.97
        units = found.dead_units if function == "relu" else found.saturated_units
        np.testing.assert_array_equal(units.numpy(), flat.all(others))
        assert (found.flat if function == "relu" else found.saturated) == flat.sum()
        assert units[1]

    def test_channels_that_do_not_lie_together(self):
        x = some(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
        x[:, 2] = -1
        assert flatness(x, RELU, 1).dead_units.tolist() == [i == 2 for i in range(6)]

    @pytest.mark.parametrize("shape", [(), (5,)])
    def test_without_a_dimension_of_units_there_is_one(self, shape):
        found = flatness(torch.full(shape, -2.0), RELU, -1)
        assert found.dead_units.tolist() == [True]
        found = flatness(torch.full(shape, 9.0), TANH, -1)
        assert found.saturated_units.tolist() == [True]

    def test_what_is_not_a_number_is_not_flat(self):
        x = torch.tensor([[math.nan, -1.0, math.inf], [-1.0, -1.0, -math.inf]])
        assert flatness(x, RELU, -1).dead_units.tolist() == [False, True, False]
        assert flatness(x, TANH, -1).saturated == 2

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_types(self, dtype):
        found = flatness(torch.tensor([[-1.0, 2.0], [-2.0, 1.0]]).to(dtype), RELU, -1)
        assert found.dead_units.tolist() == [True, False]
        assert found.flat.dtype == torch.float64

    def test_never_flat(self):
        found = flatness(torch.full((3, 2), -50.0), activation_bounds("leaky_relu"), -1)
        assert not found.dead_units.any()
        assert found.flat == found.saturated == 0

    @given(st.permutations(range(6)))
    def test_order_of_samples_does_not_matter(self, order):
        x = some(6, 4, shift=-3)
        one, other = flatness(x, RELU, -1), flatness(x[order], RELU, -1)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def test_inputs_stay_and_nothing_is_recorded(self):
        x = some(3, 4).requires_grad_()
        kept = x.detach().clone()
        found = flatness(x, TANH, -1)
        assert torch.equal(x, kept)
        assert not found.flat.requires_grad


class TestActivity:
    def test_moments_of_the_output(self):
        x = some(30, 8)
        found = activity(x.relu(), flatness(x, RELU, -1)).moments
        y = x.relu().double().numpy()
        assert found.mean.item() == pytest.approx(y.mean())
        assert found.std.item() == pytest.approx(y.std())
        assert found.max.item() == y.max()
        assert found.nonfinite == 0

    def test_of_channels_that_do_not_lie_together(self):
        x = some(4, 6, 3, 2)
        apart = x.contiguous(memory_format=torch.channels_last)
        one, other = (activity(y, flatness(y, RELU, 1)).output for y in (x, apart))
        torch.testing.assert_close(one, other, equal_nan=True)

    def test_not_finite_is_counted(self):
        y = torch.tensor([[1.0, math.nan], [math.inf, -math.inf]])
        assert activity(y, flatness(y, RELU, -1)).moments.nonfinite == 3

    @given(st.integers(1, 9))
    def test_two_calls_are_one(self, cut):
        x = some(10, 4, shift=-4)

        def of(piece):
            return activity(piece.relu(), flatness(piece, RELU, -1))

        both, whole = merge_activity(of(x[:cut]), of(x[cut:])), of(x)
        assert both.flatness.flat == whole.flatness.flat
        assert torch.equal(both.flatness.dead_units, whole.flatness.dead_units)
        torch.testing.assert_close(both.output[:5], whole.output[:5])


class TestIdle:
    @given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8))
    def test_counts_the_last_run_of_dead_measurements(self, history):
        idle = None
        for dead in history:
            idle = idle_update(idle, torch.tensor(dead))
        for unit in range(3):
            run = 0
            for dead in history:
                run = run + 1 if dead[unit] else 0
            assert idle[unit] == run


class TestTable:
    def test_by_hand(self):
        x = torch.tensor([[-1.0, 2.0, -1.0], [-3.0, 1.0, -1.0]])
        one = activity(x.relu(), flatness(x, RELU, -1))
        table = activity_table([(one, torch.tensor([1, 0, 3]))], window=2)
        row = dict(zip(COLUMNS, table[0].tolist(), strict=True))
        assert row["count"] == 6
        assert row["sum"] == 3
        assert row["flat"] == 4
        assert (row["units"], row["dead_now"], row["dead"]) == (3, 2, 1)
        assert (row["saturated"], row["saturated_units"]) == (0, 0)

    def test_nothing(self):
        assert activity_table([], 3).shape == (0, len(COLUMNS))
