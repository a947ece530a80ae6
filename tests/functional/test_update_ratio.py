"""Are the numbers about updates right: ratios, tables, merged shards?"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_diag.functional.moments import Moments, moments
from lightning_diag.functional.update_ratio import (
    gradient_sizes,
    merge_updates,
    update_ratio,
    update_summary,
    update_table,
)

UPDATE, WEIGHT = slice(0, 7), slice(7, 14)


def pair(dtype: torch.dtype = torch.float32, step: float = 1e-3) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(3, 4), (7,), (1,), (2, 3, 2)]
    before = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    after = [
        (w.double() + step * torch.randn(w.shape, generator=generator).double()).to(dtype)
        for w in before
    ]
    return before, after


def reference(w: Tensor, new: Tensor) -> list[float]:
    dw = new.double().numpy().ravel() - w.double().numpy().ravel()
    old = w.double().numpy().ravel()
    return [
        *(dw.size, dw.sum(), (dw * dw).sum(), dw.min(), dw.max(), (dw == 0).sum(), 0),
        *(old.size, old.sum(), (old * old).sum(), old.min(), old.max()),
    ]


class TestUpdateRatio:
    def test_by_hand(self):
        dw, w = moments([torch.tensor([0.03, 0.04])]), moments([torch.tensor([3.0, 4.0])])
        assert update_ratio(dw, w).tolist() == pytest.approx([0.01])

    def test_of_weights_that_are_zero_is_unknown(self):
        some = moments([torch.ones(2), torch.ones(2), torch.ones(0)])
        none = moments([torch.zeros(2), torch.ones(2), torch.ones(0)])
        found = update_ratio(some, none)
        assert found[0].isnan()
        assert found[1] == 1
        assert found[2].isnan()

    @given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
    def test_grows_with_the_update_and_falls_with_the_weight(self, a, b):
        dw, w = moments([torch.tensor([0.3, -0.2])]), moments([torch.tensor([5.0, 1.0])])
        base = update_ratio(dw, w)
        torch.testing.assert_close(update_ratio(dw.divided(1 / a), w.divided(1 / b)), base * a / b)


class TestUpdateTable:
    @pytest.mark.parametrize("quick", [False, True])
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
    )
    def test_is_what_numpy_says(self, dtype, quick):
        before, after = pair(dtype)
        after[1] = before[1].clone()
        table, doubtful = update_table(before, after, quick=quick)
        assert not doubtful.any()
        want = [reference(w, new) for w, new in zip(before, after, strict=True)]
        # single precision differences, summed in single precision where it is quick
        np.testing.assert_allclose(table[:, :12].numpy(), want, rtol=2e-6, atol=1e-9)

    def test_half_precision_differences_are_not_rounded_to_half(self):
        # 1 + 2^-7 - 2^-9 needs more digits than a bfloat16 has
        before = [torch.tensor([2**-9], dtype=torch.bfloat16)]
        after = [torch.tensor([1 + 2**-7], dtype=torch.bfloat16)]
        table, _ = update_table(before, after)
        assert table[0, 4].item() == 1 + 2**-7 - 2**-9

    def test_a_parameter_that_is_not_looked_at_is_neutral(self):
        before, after = pair()
        before[1] = None
        table, doubtful = update_table(before, after)
        assert table[1].tolist() == [0, 0, 0, math.inf, -math.inf, 0, 0] * 2
        assert len(doubtful) == len(table) == 4
        kept, _ = update_table([before[0], *before[2:]], [after[0], *after[2:]])
        torch.testing.assert_close(table[[0, 2, 3]], kept)

    def test_nothing_at_all(self):
        table, doubtful = update_table([], [])
        assert table.shape == (0, 14)
        assert doubtful.shape == (0,)
        assert update_table([None, None], [None, None])[0].shape == (2, 14)

    def test_empty_parameter(self):
        table, _ = update_table([torch.zeros(0)], [torch.zeros(0)], quick=True)
        assert table[0, 0] == 0

    def test_complex_parameters_count_as_pairs(self):
        w, new = torch.tensor([1 + 2j, 3 - 1j]), torch.tensor([1 + 3j, 3 - 1j])
        table, _ = update_table([w], [new])
        assert table[0, 0] == 4
        assert table[0, 2] == 1
        assert table[0, 9] == 15

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite_is_counted_and_marked(self, bad):
        before, after = [torch.ones(3)], [torch.tensor([1.0, bad, 2.0])]
        table, _ = update_table(before, after)
        assert table[0, 6] == 1
        assert table[0, 2] == 1
        assert update_table(before, after, quick=True)[1].tolist() == [True]

    def test_tiny_updates_are_marked_as_doubtful(self):
        before, after = [torch.zeros(20_000)], [torch.full((20_000,), 1e-25)]
        assert update_table(before, after, quick=True)[1].tolist() == [True]
        table, _ = update_table(before, after)
        assert table[0, 2].sqrt().item() == pytest.approx(1e-25 * math.sqrt(20_000), rel=1e-5)

    def test_inputs_stay(self):
        before, after = pair()
        kept = [x.clone() for x in (*before, *after)]
        update_table(before, after, quick=True)
        for x, old in zip((*before, *after), kept, strict=True):
            assert torch.equal(x, old)

    def test_many_tensors_are_taken_in_groups(self, monkeypatch):
        before, after = pair()
        together, _ = update_table(before, after)
        monkeypatch.setattr("lightning_diag.functional.update_ratio._AT_ONCE", 5)
        torch.testing.assert_close(update_table(before, after)[0], together)


class TestGradientSizes:
    def test_by_hand(self):
        sparse = torch.sparse_coo_tensor([[1, 1]], [2.0, -5.0], (4,), check_invariants=True)
        gradients = [torch.tensor([1.0, -3.0]), None, torch.zeros(2), sparse, torch.zeros(0)]
        assert gradient_sizes(gradients).tolist() == [3, 0, 0, 3, 0]

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_broken_ones_are_not_finite(self, bad):
        assert not gradient_sizes([torch.tensor([1.0, bad])]).isfinite().any()

    def test_none(self):
        assert gradient_sizes([]).shape == (0,)
        assert gradient_sizes([None]).tolist() == [0]

    def test_complex(self):
        assert gradient_sizes([torch.tensor([1 - 4j])]).tolist() == [4]


class TestMerging:
    @given(st.integers(1, 11))
    def test_shards_make_the_whole(self, cut):
        before, after = [torch.linspace(-1, 1, 12)], [torch.linspace(-1, 2, 12)]
        sizes = torch.tensor([[2.0]], dtype=torch.float64)

        def table(piece: slice) -> Tensor:
            found, _ = update_table([before[0][piece]], [after[0][piece]])
            return torch.cat([found, sizes], dim=1)

        parts = torch.stack([table(slice(0, cut)), table(slice(cut, 12))])
        torch.testing.assert_close(merge_updates(parts), table(slice(0, 12)))

    def test_the_largest_gradient_of_any_rank_counts(self):
        tables = torch.zeros(2, 1, 15)
        tables[1, 0, -1] = 4
        assert merge_updates(tables)[0, -1] == 4

    def test_components_are_the_sums_of_their_parameters(self):
        before, after = pair()
        table, _ = update_table(before, after)
        table = torch.cat([table, torch.ones(4, 1).double()], dim=1)
        found = update_summary(table, torch.tensor([0, 2, 0, 2]), 3)
        for part, members in enumerate([(0, 2), (), (1, 3)]):
            dw = [(after[i] - before[i]).flatten() for i in members] or [torch.zeros(0)]
            w = [before[i].flatten() for i in members] or [torch.zeros(0)]
            for mine, tensors in ((found.part_updates, dw), (found.part_weights, w)):
                want = moments([torch.cat(tensors)])
                torch.testing.assert_close(Moments(*(x[part : part + 1] for x in mine)), want)
        assert found.whole_update.count.tolist() == [32]
        assert found.whole_weight.l2.item() == pytest.approx(
            math.sqrt(sum(w.double().square().sum().item() for w in before))
        )
