"""Are the numbers that decide about a collapse right, and do they add up over batches and ranks?"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_diag.functional.collapse_stop import (
    BINS,
    PREDICTION_FIELDS,
    STEP_FIELDS,
    gradient_squares,
    merge_predictions,
    merge_steps,
    no_predictions,
    prediction_numbers,
    step_numbers,
)

LIKE = torch.zeros(())


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def named(numbers):
    found = dict(zip(PREDICTION_FIELDS, numbers.tolist(), strict=False))
    found["lowest"], found["lowest_label"] = -found["lowest"], -found["lowest_label"]
    return found | {"bins": numbers[len(PREDICTION_FIELDS) :].tolist()}


def step_named(values):
    return dict(zip(STEP_FIELDS, values.tolist(), strict=False))


class TestGradientSquares:
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
    )
    @pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4)])
    def test_is_that_of_numpy(self, dtype, shape):
        x = normal(*shape, dtype=dtype)
        wide = x.to(torch.complex128 if dtype.is_complex else torch.float64).numpy()
        want = (np.abs(wide) ** 2).sum()
        assert gradient_squares([x]).tolist() == [pytest.approx(want, rel=1e-5)]

    def test_none_empty_and_strided(self):
        x = normal(6, 4)
        found = gradient_squares([None, torch.zeros(0), x.T, x[:, ::2], None])
        want = [-1, 0, (x.double() ** 2).sum().item(), (x[:, ::2].double() ** 2).sum().item(), -1]
        assert found.tolist() == pytest.approx(want, rel=1e-6)

    def test_nothing_at_all(self):
        assert gradient_squares([None, None]).tolist() == [-1, -1]
        assert gradient_squares([]).shape == (0,)

    @pytest.mark.parametrize("layout", ["coo", "csr"])
    def test_sparse_counts_what_is_stored_twice_once(self, layout):
        index, values = torch.tensor([[1, 1, 3], [0, 0, 2]]), torch.tensor([1.0, 2.0, 4.0])
        x = torch.sparse_coo_tensor(index, values, (5, 3))
        x = x if layout == "coo" else x.coalesce().to_sparse_csr()
        assert gradient_squares([x]).tolist() == [25]

    def test_what_is_not_finite_shows(self):
        nan, inf = torch.tensor([1.0, math.nan]), torch.tensor([-math.inf, 1.0])
        found = gradient_squares([nan, inf, torch.tensor([1.0])]).tolist()
        assert math.isnan(found[0])
        assert found[1:] == [math.inf, 1]

    @pytest.mark.parametrize("value", [1e29, -1e36, 1e-30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_what_single_precision_cannot_square(self, dtype, value):
        x = torch.full((3, 50), value, dtype=dtype)
        want = (x.double().numpy() ** 2).sum()
        found = gradient_squares([None, x, torch.ones(4)]).tolist()
        if dtype == torch.float64:
            assert found[1] == pytest.approx(want, rel=1e-9)
        elif abs(value) > 1:
            # beyond every threshold, and finite
            assert found[1] == torch.finfo(torch.float32).max
        else:
            assert 0 <= found[1] <= want
        assert (found[0], found[2]) == (-1, 4)

    def test_half_precision_is_not_squared_in_itself(self):
        x = torch.full((1000,), 6e4, dtype=torch.float16)
        want = (x.double().numpy() ** 2).sum()
        # norms are taken in single precision
        assert gradient_squares([x]).tolist() == [pytest.approx(want, rel=1e-5)]

    def test_what_double_precision_cannot_square_is_the_largest_number(self):
        x = torch.tensor([1e200, 1e300], dtype=torch.float64)
        broken = torch.tensor([1e300, math.inf], dtype=torch.float64)
        nan = torch.tensor([1e300, math.nan], dtype=torch.float64)
        found = gradient_squares([x, broken, torch.zeros(0).double(), nan]).tolist()
        assert found[:3] == [torch.finfo(torch.float64).max, math.inf, 0]
        assert math.isnan(found[3])
        for ranks in (1, 2):
            numbers = step_numbers(gradient_squares([x, x]), torch.ones(()), [], [])
            found = step_named(merge_steps(torch.stack([numbers] * ranks)))
            assert found["sum_sq"] > 1e308
            assert (found["inf"], found["nan"]) == (0, 0)

    def test_divisor(self):
        assert gradient_squares([torch.tensor([8.0])], torch.tensor(4.0)).tolist() == [4]

    @given(st.floats(-100, 100), st.integers(1, 20))
    def test_scales_with_the_square(self, factor, size):
        x = normal(size, dtype=torch.float64)
        one, other = gradient_squares([x]), gradient_squares([x * factor])
        torch.testing.assert_close(other, one * factor**2)

    def test_does_not_write_to_its_input(self):
        x = normal(5)
        before = x.clone()
        gradient_squares([x], 3.0)
        assert torch.equal(x, before)


class TestClasses:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_of_rows(self, dtype):
        logits, labels = normal(40, 5, dtype=dtype), torch.arange(40) % 3
        found = named(prediction_numbers(logits, labels))
        classes = logits.double().numpy().argmax(1)
        assert found["bins"][:5] == np.bincount(classes, minlength=5).tolist()
        assert (found["lowest"], found["highest"]) == (classes.min(), classes.max())
        assert (found["lowest_label"], found["highest_label"]) == (0, 2)
        assert (found["predictions"], found["labels"], found["odd_labels"]) == (40, 40, 0)
        assert found["misses"] == (classes != labels.numpy()).sum()

    @pytest.mark.parametrize(
        ("logits", "labels"),
        [
            ((4, 7, 6, 5), (4, 6, 5)),  # classes second, as in torch
            ((4, 6, 5, 7), (4, 6, 5)),  # classes last, as in transformers
            ((120, 7), (120,)),
        ],
    )
    def test_shapes(self, logits, labels):
        classes = torch.arange(120) % 7
        spread = nn.functional.one_hot(classes, 7).float()
        if logits[1] == 7 and len(logits) > 2:
            spread = spread.view(4, 6, 5, 7).movedim(-1, 1)
        found = named(prediction_numbers(spread.reshape(logits), classes.view(labels) % 2))
        assert found["bins"][:8] == [18, 17, 17, 17, 17, 17, 17, 0]
        assert (found["lowest_label"], found["highest_label"], found["labels"]) == (0, 1, 120)

    @pytest.mark.parametrize("shape", [(6,), (6, 1)])
    @pytest.mark.parametrize("labels", [(6,), (6, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
    def test_one_logit_has_a_threshold_at_zero(self, shape, labels, dtype):
        # rounding would make three classes of these, and 0.3 the same as -0.3
        logits = torch.tensor([-1.2, -0.3, 0.3, 0.4, 1.6, 2.2]).view(shape)
        targets = torch.tensor([0, 0, 1, 1, 1, 1]).view(labels).to(dtype)
        found = named(prediction_numbers(logits, targets))
        assert found["bins"][:3] == [2, 4, 0]
        assert (found["lowest_label"], found["highest_label"]) == (0, 1)
        assert (found["labels"], found["odd_labels"]) == (6, 0)

    def test_regression_has_no_classes(self):
        found = named(prediction_numbers(normal(20), normal(20, seed=1)))
        assert (found["odd_labels"], found["labels"]) == (20, 0)
        found = named(prediction_numbers(normal(20, 3), normal(20, 3, seed=1)))
        assert (found["odd_labels"], found["labels"]) == (20, 0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
    def test_several_labels_a_row(self, dtype):
        targets = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1]]).to(dtype)
        found = named(prediction_numbers(torch.eye(3), targets))
        assert (found["lowest_label"], found["highest_label"], found["labels"]) == (0, 2, 3)
        assert found["bins"][:3] == [1, 1, 1]

    def test_ignored_labels_and_broken_rows_are_left_out(self):
        logits = torch.eye(4)
        logits[3] = math.nan
        found = named(prediction_numbers(logits, torch.tensor([-100, 1, 0, 2])))
        assert (found["predictions"], found["labels"]) == (2, 2)
        assert (found["lowest"], found["highest"]) == (1, 2)
        assert (found["lowest_label"], found["highest_label"]) == (0, 1)

    def test_ignored_labels_of_one_logit(self):
        found = named(prediction_numbers(torch.ones(3), torch.tensor([-100, 1, 0])))
        assert (found["predictions"], found["labels"], found["misses"]) == (2, 2, 1)
        # minus one is a class of its own where others say so
        found = named(prediction_numbers(torch.ones(2), torch.tensor([-1, 1])))
        assert (found["labels"], found["lowest_label"], found["highest_label"]) == (2, 0, 1)

    def test_labels_of_another_shape_are_unknown(self):
        found = named(prediction_numbers(normal(6, 3), torch.zeros(5, dtype=torch.long)))
        assert (found["labels"], found["predictions"]) == (0, 6)
        assert found["highest_label"] == -math.inf

    def test_more_classes_than_bins(self):
        logits = nn.functional.one_hot(torch.tensor([3, 3 + BINS]), 200).float()
        found = named(prediction_numbers(logits))
        assert found["bins"][3] == 2
        assert (found["lowest"], found["highest"]) == (3, 3 + BINS)

    def test_masked_classes(self):
        logits = torch.eye(3)
        logits[:, 2] = -math.inf
        found = named(prediction_numbers(logits))
        assert found["predictions"] == 3
        assert found["deviations"] > 0

    @pytest.mark.parametrize("shape", [(1000,), (1000, 3), (2, 500, 3), (10, 3, 20, 20), (3, 2000)])
    def test_looks_at_so_many_rows_at_most(self, shape):
        found = named(prediction_numbers(normal(*shape), None, most=100))
        assert 3 <= found["predictions"] <= 100
        assert found["predictions"] > 30 or shape[0] == 3

    def test_rows_are_spread_and_keep_their_labels(self):
        labels = torch.arange(1000) // 500
        logits = nn.functional.one_hot(labels, 2).float()
        found = named(prediction_numbers(logits, labels, most=10))
        assert found["bins"][:2] == [5, 5]
        assert (found["lowest_label"], found["highest_label"]) == (0, 1)


class TestVariance:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_is_that_of_numpy(self, dtype):
        x = normal(30, 4, dtype=dtype)
        found = named(prediction_numbers(x))
        want = x.double().numpy().var(axis=0, ddof=1).mean()
        assert found["freedom"] == 29
        assert found["deviations"] / 29 == pytest.approx(want, rel=1e-9)

    def test_is_over_the_rows_only(self):
        # constant rows that differ between columns do not vary
        assert named(prediction_numbers(torch.tensor([[3.0, -3.0]] * 8)))["deviations"] == 0

    def test_one_row_has_none(self):
        found = named(prediction_numbers(normal(1, 4)))
        assert (found["deviations"], found["freedom"], found["predictions"]) == (0, 0, 1)

    def test_a_broken_column_is_left_out(self):
        x = normal(10, 2)
        whole = named(prediction_numbers(x[:, :1]))["deviations"]
        x[:, 1] = math.inf
        x[0, 1] = math.nan
        assert named(prediction_numbers(x))["deviations"] == whole
        broken = named(prediction_numbers(torch.full((4, 2), math.nan)))
        assert (broken["deviations"], broken["freedom"]) == (0, 0)

    @given(st.floats(-1000, 1000), st.floats(0.1, 10))
    def test_does_not_move_and_scales_with_the_square(self, shift, factor):
        x = normal(16, 3, dtype=torch.float64)
        one = named(prediction_numbers(x))["deviations"]
        other = named(prediction_numbers(x * factor + shift))["deviations"]
        assert other == pytest.approx(one * factor**2, rel=1e-6)


class TestMerging:
    def test_nothing_is_neutral(self):
        numbers = prediction_numbers(normal(9, 3), torch.arange(9) % 3)
        merged = merge_predictions(torch.stack([numbers, no_predictions(LIKE)]))
        torch.testing.assert_close(merged, numbers)
        torch.testing.assert_close(prediction_numbers(torch.zeros(0, 3)), no_predictions(LIKE))

    def test_batches_add_up(self):
        logits, labels = normal(60, 4), torch.arange(60) % 4
        parts = [
            prediction_numbers(logits[i : i + 20], labels[i : i + 20]) for i in range(0, 60, 20)
        ]
        merged, whole = merge_predictions(torch.stack(parts)), prediction_numbers(logits, labels)
        torch.testing.assert_close(merged[2:], whole[2:])
        within = sum(logits[i : i + 20].double().var(0).mean() * 19 for i in range(0, 60, 20))
        assert merged[0].item() == pytest.approx(within.item(), rel=1e-6)
        assert merged[1] == 57

    def test_one_step(self):
        squares = torch.tensor([4.0, -1, 0, math.nan, math.inf], dtype=torch.float64)
        losses = [torch.tensor(1.0), torch.tensor([2.0, 4.0])]
        numbers = step_numbers(squares, torch.tensor(8.0), losses, [], divided_by=3)
        found = step_named(merge_steps(numbers.view(1, -1)))
        assert math.isnan(found["sum_sq"])
        assert [found[key] for key in ("tensors", "zero", "nan", "inf")] == [4, 1, 1, 1]
        assert (found["scale"], found["losses"], found["loss"]) == (8, 2, 6)

    def test_without_loss_or_gradient(self):
        numbers = step_numbers(torch.tensor([-1.0, -1.0]).double(), torch.ones(()), [], [])
        found = step_named(merge_steps(numbers.view(1, -1)))
        assert [found[key] for key in ("sum_sq", "tensors", "losses", "predictions")] == [0] * 4
        assert math.isnan(found["loss"])

    def test_shards_and_losses_of_ranks(self):
        one = step_numbers(
            torch.tensor([9.0, 0, -1]).double(), torch.ones(()), [torch.tensor(1.0)], []
        )
        two = step_numbers(
            torch.tensor([16.0, 0, -1]).double(), torch.ones(()), [torch.tensor(math.nan)], []
        )
        found = step_named(merge_steps(torch.stack([one, two])))
        assert (found["sum_sq"], found["tensors"], found["zero"]) == (25, 2, 1)
        assert math.isnan(found["loss"])
        assert found["losses"] == 2

    def test_predictions_of_ranks(self):
        parts = [prediction_numbers(normal(8, 3, seed=i)) for i in range(2)]
        squares = torch.ones(1).double()
        ranks = [step_numbers(squares, torch.ones(()), [], [part]) for part in parts]
        merged = merge_steps(torch.stack(ranks))[len(STEP_FIELDS) - len(PREDICTION_FIELDS) :]
        torch.testing.assert_close(merged, merge_predictions(torch.stack(parts)))
