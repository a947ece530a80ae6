import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag.functional.wiring_check import (
    broadcast_grows,
    data_facts,
    magnitudes,
    prediction_facts,
    probability_facts,
    replica_hash,
    target_facts,
)

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class TestDataFacts:
    @pytest.mark.parametrize("dtype", TYPES)
    def test_against_numpy(self, dtype):
        x = (3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(1)) + 2).to(dtype)
        y = x.double().numpy()
        truth = (35, 0, y.mean(), y.std(), np.sqrt((y * y).mean()), np.abs(y).max())
        assert data_facts([x])[0].tolist() == pytest.approx(truth)

    def test_what_is_not_finite_is_counted_and_left_out(self):
        x = torch.tensor([1.0, math.nan, -3.0, math.inf, -math.inf])
        found = data_facts([x])[0].tolist()
        assert found == pytest.approx([5, 3, -1, 2, math.sqrt(5), 3])

    def test_several_kinds_at_once(self):
        tensors = [torch.zeros(0), torch.arange(4), torch.tensor([3 + 4j]), torch.ones(2).bool()]
        facts = data_facts(tensors)
        assert facts.shape == (4, 6)
        assert facts[:, 0].tolist() == [0, 4, 2, 2]
        assert facts[0, 2:].isnan().all()
        assert facts[1, 2] == 1.5
        assert facts[2, 5] == 4
        assert data_facts([]).shape == (0, 6)

    @given(st.floats(0.125, 8), st.integers(1, 20))
    def test_scales_with_its_input(self, factor, count):
        x = torch.linspace(-1, 2, count, dtype=torch.float64)
        torch.testing.assert_close(data_facts([x * factor])[0, 2:], data_facts([x])[0, 2:] * factor)


class TestProbabilityFacts:
    @pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (2, 4, 3, 3)])
    def test_softmax_and_its_logarithm(self, shape):
        scores = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
        low, high, off, _ = probability_facts(scores.softmax(1)).tolist()
        assert 0 <= low < high <= 1
        assert off < 1e-5
        assert probability_facts(scores.log_softmax(1))[3] < 1e-5

    def test_by_hand(self):
        facts = probability_facts(torch.tensor([[0.5, 0.5], [2.0, 1.0]])).tolist()
        assert facts == pytest.approx([0.5, 2, 2, math.log(math.exp(2) + math.exp(1))])

    def test_one_dimension_and_none(self):
        assert probability_facts(torch.tensor([0.25, 0.75]), 0)[2] == 0
        assert probability_facts(torch.zeros(0, 3)).isnan().all()

    def test_a_large_one_is_looked_at_in_its_first_samples(self):
        x = torch.full((40, 1 << 16), 1 / (1 << 16))
        x[30:] = 5
        assert probability_facts(x)[2] < 1e-4

    @given(st.floats(-5, 5))
    def test_a_shift_changes_no_softmax(self, shift):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double()
        first, second = (probability_facts(y.softmax(1)) for y in (x, x + shift))
        torch.testing.assert_close(first, second)


class TestTargetFacts:
    def test_by_hand(self):
        assert target_facts(torch.tensor([[2, 7], [-100, 3]]), -100).tolist() == [3, 2, 7]
        assert target_facts(torch.tensor([0.5, math.nan])).tolist() == [1, 0.5, 0.5]
        assert target_facts(torch.tensor([True, False])).tolist() == [2, 0, 1]

    def test_none(self):
        nothing = [0, math.inf, -math.inf]
        assert target_facts(torch.zeros(0)).tolist() == nothing
        assert target_facts(torch.tensor([-100]), -100).tolist() == nothing


class TestMagnitudes:
    @pytest.mark.parametrize("dtype", TYPES)
    def test_against_numpy(self, dtype):
        tensors = [torch.randn(5, 3).to(dtype), torch.zeros(4).to(dtype)]
        truth = [np.abs(x.double().numpy()).max() for x in tensors]
        assert magnitudes(tensors).tolist() == pytest.approx(truth)

    def test_sparse_empty_and_not_finite(self):
        sparse = torch.sparse_coo_tensor([[0, 0]], [1.0, -3.0], (5,))
        found = magnitudes([sparse, torch.zeros(0), torch.tensor([math.nan]), torch.tensor(2.0)])
        assert found[0] == 2
        assert found[1:3].isnan().all()
        assert found[3] == 2
        assert magnitudes([]).shape == (0,)


class TestReplicaHash:
    @staticmethod
    def brute_force(x):
        raw = x.contiguous().numpy().tobytes()
        kind = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[x.element_size()]
        total = 0
        for place, bits in enumerate(np.frombuffer(raw, kind).tolist()):
            total += bits * (2 * place + 1) * 0x9E3779B97F4A7C1
        total %= 1 << 64
        signed = total - (1 << 64) if total >> 63 else total
        return (signed ^ (signed >> 32)) & ((1 << 48) - 1)

    @pytest.mark.parametrize(
        "x",
        [
            torch.randn(37),
            torch.randn(5, 7).double(),
            torch.randn(9).half(),
            torch.arange(11),
            torch.tensor([True, False]),
            torch.randn(4, 6).t(),
            torch.zeros(0),
        ],
        ids=lambda x: f"{x.dtype} {tuple(x.shape)}",
    )
    def test_against_brute_force(self, x):
        assert replica_hash([x]).tolist() == [self.brute_force(x)]

    @given(st.integers(0, 29), st.integers(0, 31))
    def test_any_bit_changes_it(self, place, bit):
        x = torch.randn(30, generator=torch.Generator().manual_seed(1))
        y = x.clone()
        y.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(1 << 31)
        one, other = replica_hash([x, y]).tolist()
        assert one != other

    def test_order_counts_and_signs_of_zero_too(self):
        x = torch.tensor([1.0, 2.0, 0.0])
        found = replica_hash([x, x.flip(0), torch.tensor([1.0, 2.0, -0.0]), x.clone()])
        assert len(set(found.tolist())) == 3
        assert found[0] == found[3]

    def test_blocks_are_one_sum(self, monkeypatch):
        x = torch.randn(100)
        whole = replica_hash([x])
        monkeypatch.setattr("lightning_diag.functional.wiring_check._BLOCK", 7)
        assert replica_hash([x]).tolist() == whole.tolist()

    def test_the_input_stays(self):
        x = torch.randn(10)
        before = x.clone()
        replica_hash([x])
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("first", "second", "grows"),
    [
        ((8, 1), (8,), True),
        ((8,), (8, 1), True),
        ((8, 1), (1, 8), True),
        ((8, 3), (3,), False),
        ((8, 3), (8, 3), False),
        ((8, 3), (), False),
        ((8, 1), (8, 3), False),
        ((8, 3), (4,), False),
        ((1, 1), (1,), False),
        ((0, 1), (3,), False),
        ((4, 8, 1), (8,), True),
        ((4, 8, 1), (4, 8), False),
    ],
)
def test_broadcast_grows(first, second, grows):
    assert broadcast_grows(first, second) is grows


@given(st.lists(st.integers(1, 3), max_size=3), st.lists(st.integers(1, 3), max_size=3))
def test_broadcast_grows_as_torch_broadcasts(first, second):
    try:
        together = math.prod(torch.broadcast_shapes(first, second))
    except RuntimeError:
        together = 0
    assert broadcast_grows(first, second) is (together > max(math.prod(first), math.prod(second)))


class TestPredictionFacts:
    def test_classes_against_numpy(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(40, 3, generator=generator)
        y = torch.randint(3, (40,), generator=generator)
        found = prediction_facts(x, y, dim=1).tolist()
        top = np.bincount(x.numpy().argmax(1)).max() / 40
        labels = np.bincount(y.numpy()).max() / 40
        truth = [40, x.numpy().std(0).mean(), np.abs(x.numpy()).max(), top, math.nan, labels]
        assert found == pytest.approx(truth, nan_ok=True)

    def test_every_position_is_a_row(self):
        x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(3))
        y = torch.zeros(4, 5, dtype=torch.long)
        found = prediction_facts(x, y, dim=1)
        flat = prediction_facts(x.movedim(1, -1).reshape(20, 3), y.reshape(20), dim=1)
        assert found.tolist() == pytest.approx(flat.tolist(), nan_ok=True)
        assert found[0] == 20

    def test_ignored_labels_do_not_count(self):
        y = torch.tensor([0, 0, 1, -100, -100, -100])
        assert prediction_facts(torch.randn(6, 2), y, dim=1, ignored=-100)[5] == pytest.approx(
            2 / 3
        )

    def test_numbers(self):
        x, y = torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[0.0, 0.0], [4.0, 8.0]])
        found = prediction_facts(x, y).tolist()
        assert found == pytest.approx([2, 0.5, 5, math.nan, 3, math.nan], nan_ok=True)

    def test_yes_or_no(self):
        x, y = torch.tensor([2.0, 3.0, -1.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
        found = prediction_facts(x, y, threshold=0.0).tolist()
        assert [found[3], found[5]] == [0.75, 0.75]

    @pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.tensor(1.0)])
    def test_nothing_to_compare(self, x):
        assert prediction_facts(x, torch.zeros(x.shape[:1], dtype=torch.long), dim=0).isnan().all()

    def test_one_sample_of_classes(self):
        assert prediction_facts(torch.randn(5), torch.tensor(2), dim=0)[:2].tolist() == [1, 0]
