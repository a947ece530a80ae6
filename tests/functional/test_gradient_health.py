"""Are the numbers about gradients right: clipping, shares, counts, histograms, tables?"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_diag.functional.gradient_health import (
    clip_coefficient,
    gradient_summary,
    gradient_table,
    magnitude_histogram,
    merge_tables,
    nan_counts,
    norm_shares,
    zero_counts,
)
from lightning_diag.functional.moments import Moments, moments

ONE = torch.ones(())


def parameters_with(gradients: list[Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def some_gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(3, 4, generator=generator), torch.randn(7, generator=generator) * 5]


class TestClipCoefficient:
    @pytest.mark.parametrize("scale", [1e-8, 1e-3, 0.3, 1.0, 50.0])
    @pytest.mark.parametrize("limit", [1e-3, 0.5, 1.0, 10.0])
    def test_is_what_clipping_by_norm_does(self, scale, limit):
        gradients = [gradient * scale for gradient in some_gradients()]
        parameters = parameters_with(gradients)
        nn.utils.clip_grad_norm_(parameters, limit)
        coefficient = clip_coefficient(
            moments([torch.cat([g.flatten() for g in gradients])]).l2, limit
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(
                parameter.grad, gradient * coefficient.float(), rtol=1e-5, atol=0
            )

    @pytest.mark.parametrize("limit", [0.01, 1.0, 100.0])
    def test_is_what_clipping_by_value_does_to_the_largest_element(self, limit):
        gradients = some_gradients()
        parameters = parameters_with(gradients)
        nn.utils.clip_grad_value_(parameters, limit)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        clipped = torch.cat([parameter.grad.flatten() for parameter in parameters])
        largest = flat.abs().argmax()
        found = clip_coefficient(moments([flat]).abs_max, limit)
        torch.testing.assert_close(
            found[0].float(), clipped[largest] / flat[largest], rtol=1e-5, atol=0
        )

    def test_of_a_size_that_is_not_finite_is_unknown(self):
        found = clip_coefficient(torch.tensor([math.nan, math.inf, -math.inf, 0.0]), 1.0)
        assert found[:3].isnan().all()
        assert found[3] == 1

    @given(st.floats(0, 1e30), st.floats(1e-6, 1e6))
    def test_lies_between_0_and_1_and_never_grows_with_the_size(self, size, limit):
        small, large = clip_coefficient(torch.tensor([size, 2 * size]).double(), limit).tolist()
        assert 0 <= large <= small <= 1


class TestNormShares:
    def test_by_hand(self):
        assert norm_shares(torch.tensor([9.0, 16.0, 0.0])).tolist() == pytest.approx(
            [0.36, 0.64, 0]
        )

    @given(
        st.lists(st.just(0.0) | st.floats(1e-20, 1e20), min_size=1, max_size=10),
        st.floats(1e-5, 1e5),
    )
    def test_add_up_to_one_and_ignore_the_scale(self, squares, scale):
        x = torch.tensor(squares, dtype=torch.float64)
        shares = norm_shares(x)
        if x.sum() == 0:
            assert shares.isnan().all()
            return
        assert shares.sum().item() == pytest.approx(1)
        torch.testing.assert_close(norm_shares(x * scale), shares, rtol=1e-9, atol=1e-300)


class TestCounts:
    def test_by_hand(self):
        tensors = [
            torch.tensor([math.nan, 0.0, -0.0, math.inf, 1.0]),
            torch.empty(0),
            torch.tensor(0.0),
            torch.tensor([[0, 2.0], [math.nan, 0]]).to_sparse(),
        ]
        assert nan_counts(tensors).tolist() == [1, 0, 0, 1]
        assert zero_counts(tensors).tolist() == [2, 0, 1, 2]

    def test_of_nothing(self):
        assert nan_counts([]).shape == zero_counts([]).shape == (0,)

    @given(st.lists(st.floats(width=32) | st.just(0.0), max_size=20))
    def test_agree_with_numpy_and_moments(self, values):
        x = torch.tensor(values, dtype=torch.float32)
        assert nan_counts([x]).item() == np.isnan(x.numpy()).sum()
        assert zero_counts([x]).item() == (x.numpy() == 0).sum() == moments([x]).zeros.item()

    def test_of_an_uncoalesced_sparse_gradient(self):
        x = torch.sparse_coo_tensor([[0, 0, 1]], [1.0, -1.0, 2.0], (4,), check_invariants=True)
        assert zero_counts([x]).tolist() == [(x.to_dense() == 0).sum()] == [3]


class TestMagnitudeHistogram:
    @given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), max_size=40))
    def test_agrees_with_numpy(self, values):
        x = np.array(values, dtype=np.float32)
        magnitude = np.abs(x[x != 0])
        exponents = np.floor(np.log10(magnitude)).clip(-12, 3)
        want = np.histogram(exponents, bins=np.arange(-12, 5))[0]
        found = magnitude_histogram([torch.from_numpy(x)]).numpy()
        # a magnitude within rounding of a power of ten may fall on either side of it
        edges = np.abs(np.log10(magnitude) - np.round(np.log10(magnitude))) < 1e-6
        if edges.any():
            assert found.sum() == want.sum()
            return
        np.testing.assert_array_equal(found, want)

    def test_takes_what_lies_beyond_into_the_outermost_bins(self):
        x = torch.tensor([1e-30, 1e-42, 1e30, 5.0, 0.0, math.nan, math.inf, -math.inf])
        assert magnitude_histogram([x], -1, 2).tolist() == [2, 1, 0, 1]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_of_other_types(self, dtype):
        x = torch.tensor([0.5, -0.25, 30.0, 0.0], dtype=dtype)
        assert magnitude_histogram([x, x], -1, 1).tolist() == [4, 0, 2]

    def test_of_double_precision_beyond_single(self):
        x = torch.tensor([1e-50, 1e50, -1e-300], dtype=torch.float64)
        assert magnitude_histogram([x], -1, 1).tolist() == [2, 0, 1]

    def test_of_sparse_empty_and_scalar(self):
        tensors = [torch.tensor([[0, 2.0]]).to_sparse(), torch.empty(0), torch.tensor(20.0)]
        assert magnitude_histogram(tensors, 0, 1).tolist() == [1, 1]
        assert magnitude_histogram([], 0, 1).tolist() == [0, 0]

    def test_refuses_no_bins(self):
        with pytest.raises(ValueError, match=r"`high` must be at least `low` \(3\), got 2\."):
            magnitude_histogram([], 3, 2)


class TestTables:
    def table(self, *gradients: Tensor | None, quick: bool = False) -> Tensor:
        return gradient_table(gradients, quick=quick)[0]

    def test_a_parameter_without_gradient_is_neutral_and_absent(self):
        table = self.table(None, torch.tensor([3.0, 0.0]), None)
        nothing = [0, 0, 0, math.inf, -math.inf, 0, 0, 0, 0]
        assert table.tolist() == [nothing, [2, 3, 9, 0, 3, 1, 0, 0, 1], nothing]

    @pytest.mark.parametrize("quick", [False, True])
    def test_without_any_gradient(self, quick):
        table, doubtful = gradient_table([None, None], quick=quick)
        assert table[:, 0].tolist() == table[:, -1].tolist() == [0, 0]
        assert doubtful.tolist() == [False, False]
        summary = gradient_summary(table, torch.tensor([0, 1]), 2, ONE)
        assert summary.whole.count == summary.whole.l2 == 0
        assert summary.tensors.tolist() == [0, 0]

    def test_no_parameters_at_all(self):
        table, doubtful = gradient_table([])
        assert table.shape == (0, 9)
        assert doubtful.shape == (0,)
        assert gradient_summary(table, torch.zeros(0).long(), 1, ONE).whole.count == 0

    def test_doubts_stand_at_the_place_of_their_parameter(self):
        broken = torch.tensor([math.nan, 1.0])
        table, doubtful = gradient_table([None, torch.ones(2), None, broken], quick=True)
        assert doubtful.tolist() == [False, False, False, True]
        assert table[:, -1].tolist() == [0, 1, 0, 1]

    @given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**20))
    def test_of_shards_merge_into_the_table_of_the_whole(self, first, second, seed):
        generator = torch.Generator().manual_seed(seed)
        # whole numbers, so that sums are exact in any order
        whole = [torch.randint(-9, 9, (size,), generator=generator).double() for size in (6, 9)]
        whole[0][whole[0] == 5], whole[1][whole[1] == 3] = math.nan, math.inf
        shards = [[x[:first], x[first : first + second], x[first + second :]] for x in whole]
        ranks = [self.table(*(parts[rank] for parts in shards), None) for rank in range(3)]
        torch.testing.assert_close(
            merge_tables(torch.stack(ranks)), self.table(*whole, None), rtol=0, atol=0
        )

    def test_a_gradient_on_one_rank_is_a_gradient(self):
        ranks = [self.table(None, None), self.table(torch.ones(2), None)]
        assert merge_tables(torch.stack(ranks))[:, -1].tolist() == [1, 0]


class TestSummary:
    @pytest.mark.parametrize("scale", [1.0, 1024.0, 3.0])
    def test_is_that_of_the_unscaled_concatenation(self, scale):
        a, b, c = torch.randn(3, 4), torch.randn(5), torch.randn(2)
        c[0] = math.inf
        table, _ = gradient_table([a * scale, b * scale, None, c * scale])
        found = gradient_summary(table, torch.tensor([0, 2, 2, 0]), 3, torch.tensor(scale))
        wants = {
            0: torch.cat([a.flatten(), c]),
            1: torch.empty(0),
            2: b,
        }
        everything = torch.cat([a.flatten(), b, c])
        for one, want in [
            (Moments(*(f[part] for f in found.parts)), x) for part, x in wants.items()
        ] + [(found.whole, everything)]:
            truth = moments([want.double()])
            for name in Moments._fields:
                torch.testing.assert_close(
                    getattr(one, name).view(1), getattr(truth, name), rtol=1e-6, atol=1e-6
                )
        assert found.present.tolist() == [1, 1, 0, 1]
        assert found.tensors.tolist() == [2, 0, 1]
        assert found.nans.tolist() == [0]

    def test_counts_nan_apart_from_infinite(self):
        table, _ = gradient_table([torch.tensor([math.nan, math.inf, 1.0]), torch.tensor(math.nan)])
        found = gradient_summary(table, torch.tensor([0, 0]), 1, ONE)
        assert found.whole.nonfinite == 3
        assert found.nans == 2
