"""Are parts counted right, and is every moment given to exactly one owner?"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_diag.functional.component_profiler import breakdown, exclusive_seconds

ITEM = {torch.bfloat16: 2, torch.float32: 4, torch.float64: 8, torch.int8: 1}


class TestBreakdown:
    def test_worked_by_hand(self):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        net[0].bias.requires_grad_(False)
        found = breakdown(net.parameters(), net.buffers())
        # 12 + 4 + 4 + 4 parameters, mean and variance of 4, one counter of 8 bytes
        assert found == (24, 20, 4, 9, 4 * (24 + 8) + 8)

    @pytest.mark.parametrize("dtype", ITEM)
    @pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3, 5, 2)])
    def test_sizes_are_those_of_numpy(self, dtype, shape):
        found = breakdown([torch.zeros(shape, dtype=dtype)])
        assert found.parameters == np.prod(shape, dtype=int)
        assert found.bytes == found.parameters * ITEM[dtype]

    def test_the_same_tensor_counts_once(self):
        weight = nn.Parameter(torch.zeros(5))
        assert breakdown([weight, weight]).parameters == 5
        assert breakdown([], [weight, weight]).buffers == 5

    def test_nothing_is_zero(self):
        assert breakdown([]) == (0, 0, 0, 0, 0)

    def test_what_has_no_shape_yet_counts_nothing(self):
        lazy = nn.LazyLinear(3)
        assert breakdown(lazy.parameters()) == (0, 0, 0, 0, 0)

    def test_inputs_are_left_alone(self):
        weight = nn.Parameter(torch.ones(3))
        breakdown([weight])
        assert weight.equal(torch.ones(3))
        assert weight.grad is None


SPANS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.integers(0, 20)), max_size=12
)


def by_counting(spans):
    """Cell by cell: the owner of a cell is the span over it that began last."""
    seconds = dict.fromkeys((owner for owner, _, _ in spans), 0.0)
    for cell in range(20):
        over = [
            (begin, place) for place, (_, begin, end) in enumerate(spans) if begin <= cell < end
        ]
        if over:
            seconds[spans[max(over)[1]][0]] += 1
    return seconds


class TestExclusiveSeconds:
    def test_worked_by_hand(self):
        spans = [("outer", 0, 10), ("inner", 2, 5), ("innermost", 3, 4), ("later", 12, 13)]
        assert exclusive_seconds(spans) == {"outer": 7, "inner": 2, "innermost": 1, "later": 1}

    @given(SPANS)
    def test_is_what_counting_every_cell_gives(self, spans):
        assert exclusive_seconds(spans) == by_counting(spans)

    @given(SPANS)
    def test_all_owners_together_have_all_the_time_there_is(self, spans):
        covered = {cell for _, begin, end in spans for cell in range(begin, end)}
        assert sum(exclusive_seconds(spans).values()) == len(covered)

    @given(SPANS, st.floats(0.125, 8), st.integers(-5, 5))
    def test_scales_and_does_not_care_when_the_clock_began(self, spans, scale, shift):
        moved = [(o, scale * begin + shift, scale * end + shift) for o, begin, end in spans]
        found, known = exclusive_seconds(moved), exclusive_seconds(spans)
        assert found == {o: pytest.approx(scale * t, abs=1e-9) for o, t in known.items()}

    def test_siblings_and_repeated_calls_add_up(self):
        assert exclusive_seconds([("a", 0, 1), ("b", 1, 3), ("a", 3, 4)]) == {"a": 2, "b": 2}

    def test_overlap_goes_to_the_one_that_began_last(self):
        assert exclusive_seconds([("a", 0, 4), ("b", 3, 6)]) == {"a": 3, "b": 3}

    def test_of_those_that_begin_together_the_later_is_inside(self):
        assert exclusive_seconds([("a", 0, 4), ("b", 0, 1)]) == {"a": 3, "b": 1}

    def test_nothing_and_backward_spans(self):
        assert exclusive_seconds([]) == {}
        assert exclusive_seconds([("a", 3, 1)]) == {"a": 0}
