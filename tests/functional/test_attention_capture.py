"""Are entropy, peaks, sinks and drivers right, against an explicit softmax in double precision?"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_diag.functional import attention_capture
from lightning_diag.functional.attention_capture import (
    add_sums,
    attention_map,
    attention_sums,
    attention_verdict,
    head_similarity,
    nearest_head,
    top_keys,
)
from lightning_diag.functional.attention_graph import graph_sums
from lightning_diag.functional.attention_named import looks_like_weights
from lightning_diag.functional.attention_scores import (
    dot_product_scores,
    given_scores,
    weight_scores,
)

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def tensors(*shapes, size=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def explicit(logits, allowed):
    """Every number by its definition, of arrays (batch, heads, T, S), in double precision."""
    logits = np.asarray(logits, np.float64)
    allowed = np.broadcast_to(np.asarray(allowed), logits.shape)
    with np.errstate(all="ignore"):
        logits = np.where(allowed, logits, -np.inf)
        e = np.exp(logits - logits.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
        entropy = -np.where(p > 0, p * np.log(p), 0).sum(-1)
    keys = allowed.sum(-1)
    rows = keys > 0
    choice = keys > 1
    p = np.where(rows[..., None], p, 0)
    found = {
        "rows": rows,
        "choices": choice,
        "masked": ~rows,
        "nonfinite": np.zeros_like(rows),
        "entropy": np.where(rows, entropy, 0),
        "normalized": np.where(choice, entropy / np.log(np.maximum(keys, 2)), 0),
        "largest": p.max(-1),
        "peaked": p.max(-1) > 0.9,
        "sink": p[..., 0],
        "sink_choices": np.where(choice, p[..., 0], 0),
        "mean": np.where(rows, 1 / np.maximum(keys, 1), 0),
        "keys": keys,
    }
    return {name: x.sum((0, 2)) for name, x in found.items()}, p


def assert_means(sums, truth):
    """The means over rows, to 1e-5."""
    rows = np.maximum(truth["rows"], 1)
    for name, value in truth.items():
        got = getattr(sums, name).numpy()
        np.testing.assert_allclose(got / rows, value / rows, rtol=0, atol=1e-5, err_msg=name)


def logits_of(q, k, scale=None, bias=None):
    q, k = q.double(), k.double()
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, 1)
    s = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return s if bias is None else s + bias.double()


CAUSAL = torch.ones(9, 13, dtype=torch.bool).tril()
PADDING = torch.arange(13) < torch.tensor([13, 5, 1]).view(3, 1, 1, 1)
HOLES = torch.rand(3, 1, 9, 13, generator=torch.Generator().manual_seed(7)) > 0.6
HOLES[1, 0, 4] = False
HEADS = torch.rand(4, 9, 13, generator=torch.Generator().manual_seed(8)) > 0.3


class TestDotProduct:
    @pytest.mark.parametrize("size", [0.1, 1.0, 8.0])
    @pytest.mark.parametrize("key_heads", [1, 2, 4])
    @pytest.mark.parametrize(
        "mask", [None, CAUSAL, PADDING, HOLES, HEADS, CAUSAL & HOLES], ids=lambda m: str(m is None)
    )
    def test_boolean_masks_and_grouped_queries(self, size, key_heads, mask):
        q, k = tensors((3, 4, 9, 8), (3, key_heads, 13, 8), size=size)
        truth, p = explicit(logits_of(q, k), True if mask is None else mask)
        sums, mass, _ = attention_sums(dot_product_scores(q, k, mask))
        assert_means(sums, truth)
        np.testing.assert_allclose(mass.numpy(), p.sum((0, 2)), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e9])
    def test_a_mask_that_is_added_forbids_and_biases(self, low):
        q, k = tensors((3, 4, 9, 8), (3, 4, 13, 8))
        (bias,) = tensors((3, 1, 9, 13), seed=5)
        mask = bias.masked_fill(~HOLES, low)
        truth, _ = explicit(logits_of(q, k, bias=bias), HOLES)
        sums, _, _ = attention_sums(dot_product_scores(q, k, mask))
        assert_means(sums, truth)
        assert sums.masked.tolist() == [1.0] * 4

    @pytest.mark.parametrize("scale", [None, 0.25, 3.0, 0.0])
    def test_causal_and_scaled(self, scale):
        q, k = tensors((3, 4, 9, 8), (3, 4, 13, 8))
        truth, _ = explicit(logits_of(q, k, scale), CAUSAL)
        sums, _, _ = attention_sums(dot_product_scores(q, k, is_causal=True, scale=scale))
        assert_means(sums, truth)
        assert (sums.rows - sums.choices).tolist() == [3.0] * 4

    @pytest.mark.parametrize("queries", [((3, 1), (13,)), ((9, 1), (1, 5)), ((5, 1), (5,))])
    def test_causal_rows_that_are_longer_or_shorter(self, queries):
        (rows, _), keys = queries
        q, k = tensors((1, 2, rows, 4), (1, 2, keys[-1], 4))
        allowed = torch.ones(rows, keys[-1], dtype=torch.bool).tril()
        truth, _ = explicit(logits_of(q, k), allowed)
        assert_means(attention_sums(dot_product_scores(q, k, is_causal=True))[0], truth)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_every_type_is_computed_in_single_precision_or_better(self, dtype):
        q, k = tensors((2, 2, 9, 8), (2, 2, 13, 8), dtype=dtype)
        truth, _ = explicit(logits_of(q, k), True)
        assert_means(attention_sums(dot_product_scores(q, k))[0], truth)

    def test_weights_are_those_that_pytorch_multiplies_with(self):
        q, k = tensors((3, 4, 9, 8), (3, 2, 13, 8))
        mask = torch.zeros(3, 1, 9, 13).masked_fill(~HOLES, -torch.inf)
        eye = torch.eye(13).expand(3, 2, 13, 13)
        out = F.scaled_dot_product_attention(q, k, eye, mask, enable_gqa=True)
        _, mass, _ = attention_sums(dot_product_scores(q, k, mask))
        torch.testing.assert_close(mass, out.nan_to_num().double().sum((0, 2)), **TOLERANCE)

    @pytest.mark.parametrize(
        ("q_shape", "k_shape", "mask_shape"),
        [
            ((5, 8), (7, 8), (5, 7)),
            ((3, 5, 8), (3, 7, 8), (3, 5, 7)),
            ((3, 5, 8), (3, 7, 8), (5, 7)),
            ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (3, 1, 5, 7)),
            ((2, 3, 4, 5, 8), (3, 4, 7, 8), (2, 1, 4, 1, 7)),
            ((3, 1, 5, 8), (1, 4, 7, 8), (4, 5, 7)),
        ],
    )
    def test_shapes_broadcast_as_in_pytorch(self, q_shape, k_shape, mask_shape):
        q, k = tensors(q_shape, k_shape)
        mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) > 0.3
        s = (q.double() @ k.double().transpose(-1, -2)) / math.sqrt(8)
        allowed = mask.expand(s.shape)
        if s.dim() == 3:
            s, allowed = s.unsqueeze(1), allowed.unsqueeze(1)
        s = s.reshape(-1, *s.shape[-3:]) if s.dim() > 3 else s.view(1, 1, *s.shape)
        truth, _ = explicit(s, allowed.reshape(s.shape))
        sums, _, _ = attention_sums(dot_product_scores(q, k, mask, max_batch=9))
        assert_means(sums, truth)

    @pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
    def test_chunks_change_nothing(self, chunk, monkeypatch):
        q, k = tensors((3, 4, 9, 8), (3, 4, 13, 8))
        truth, p = explicit(logits_of(q, k), HOLES)
        monkeypatch.setattr(attention_capture, "_CPU_CHUNK", chunk)
        sums, _, groups = attention_sums(dot_product_scores(q, k, HOLES), groups=9)
        assert_means(sums, truth)
        np.testing.assert_allclose(groups.mass.numpy(), p.sum((0, 1)), rtol=0, atol=1e-5)

    def test_samples_are_evenly_spread(self):
        q, k = tensors((10, 2, 100, 4), (10, 2, 7, 4))
        scores = dot_product_scores(q, k, max_batch=2)
        sums, _, _ = attention_sums(scores, max_rows=5)
        rows, examples = [10, 30, 50, 70, 90], [2, 7]
        s = logits_of(q[examples], k[examples])[:, :, rows]
        assert_means(sums, explicit(s, True)[0])
        assert sums.rows.tolist() == [10.0, 10.0]

    def test_a_sampled_mask_is_that_of_the_sampled_rows(self):
        q, k = tensors((10, 2, 100, 4), (10, 2, 7, 4))
        mask = torch.rand(10, 1, 100, 7, generator=torch.Generator().manual_seed(3)) > 0.4
        sums, _, _ = attention_sums(dot_product_scores(q, k, mask, max_batch=2), max_rows=5)
        rows, examples = [10, 30, 50, 70, 90], [2, 7]
        s = logits_of(q[examples], k[examples])[:, :, rows]
        assert_means(sums, explicit(s, mask[examples][:, :, rows])[0])

    def test_rows_that_hold_something_that_is_no_number_are_counted_and_left_out(self):
        q, k = tensors((1, 2, 6, 4), (1, 2, 5, 4))
        q[0, 0, 2] = math.nan
        q[0, 1, 3] = math.inf
        sums, mass, _ = attention_sums(dot_product_scores(q, k))
        assert sums.nonfinite.tolist() == [1.0, 1.0]
        assert sums.rows.tolist() == [5.0, 5.0]
        assert sums.entropy.isfinite().all()
        torch.testing.assert_close(mass.sum(-1), sums.rows, **TOLERANCE)

    def test_a_mask_that_is_no_number_spoils_its_row_alone(self):
        q, k = tensors((1, 2, 6, 4), (1, 2, 5, 4))
        mask = torch.zeros(6, 5)
        mask[4, 1] = math.nan
        sums, _, _ = attention_sums(dot_product_scores(q, k, mask))
        assert sums.nonfinite.tolist() == [1.0, 1.0]
        assert sums.rows.tolist() == [5.0, 5.0]

    def test_inputs_are_left_as_they_are(self):
        q, k, mask = tensors((2, 2, 9, 8), (2, 2, 13, 8), (9, 13))
        before = [x.clone() for x in (q, k, mask)]
        attention_sums(dot_product_scores(q, k, mask))
        attention_map(dot_product_scores(q, k, mask))
        attention_sums(given_scores(mask))
        attention_sums(weight_scores(mask.softmax(-1)))
        for x, then in zip((q, k, mask), before, strict=True):
            assert torch.equal(x, then)

    @pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
    def test_nothing_gives_nothing(self, shape):
        sums, _, _ = attention_sums(dot_product_scores(torch.zeros(shape), torch.zeros(shape)))
        assert sum(field.sum() for field in sums) == 0

    def test_shapes_that_do_not_belong_together(self):
        with pytest.raises(ValueError, match="`query` and `key` must be equally wide, got 4 and 5"):
            dot_product_scores(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5))
        with pytest.raises(ValueError, match=r"Heads of `query` must be a multiple of 2, got 3\."):
            dot_product_scores(torch.zeros(1, 3, 3, 4), torch.zeros(1, 2, 3, 4))

    @given(st.integers(0, 999), st.floats(-3, 3))
    def test_a_shift_of_all_logits_and_an_order_of_keys_mean_nothing(self, seed, shift):
        (s,) = tensors((2, 3, 4, 6), size=4, seed=seed)
        sums, mass, _ = attention_sums(given_scores(s))
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        other, moved, _ = attention_sums(given_scores(s[..., order] + shift))
        torch.testing.assert_close(other.entropy, sums.entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moved, mass[:, order], rtol=1e-5, atol=1e-5)
        assert (sums.normalized <= sums.choices + 1e-5).all()
        torch.testing.assert_close(mass.sum(-1), sums.rows, rtol=1e-5, atol=1e-5)


class TestKnownAnswers:
    def test_worked_by_hand(self):
        weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0, 0, 0, 1.0]])
        sums, mass, _ = attention_sums(weight_scores(weights))
        want = math.log(2) + math.log(4)
        assert sums.entropy.tolist() == pytest.approx([want], abs=1e-6)
        assert sums.normalized.tolist() == pytest.approx([0.5 + 1], abs=1e-6)
        assert sums.largest.tolist() == pytest.approx([1.75])
        assert sums.peaked.tolist() == [1]
        assert mass[0].tolist() == pytest.approx([0.75, 0.75, 0.25, 1.25])

    def test_weights_that_do_not_sum_to_one_are_normalized(self):
        (x,) = tensors((2, 3, 4, 5))
        weights = x.softmax(-1)
        one, _, _ = attention_sums(weight_scores(weights))
        other, _, _ = attention_sums(weight_scores(weights * 1.25))
        torch.testing.assert_close(one.entropy, other.entropy, **TOLERANCE)

    def test_a_row_of_zeros_counts_as_masked(self):
        sums, _, _ = attention_sums(weight_scores(torch.tensor([[0.0, 0.0], [0.0, 1.0]])))
        assert sums.masked.tolist() == [1]
        assert sums.rows.tolist() == [1]

    @pytest.mark.parametrize("gap", [0.0, 30.0, 90.0, 1e5])
    def test_extremes(self, gap):
        sums, _, _ = attention_sums(given_scores(torch.tensor([[gap, 0.0, 0.0, 0.0]])))
        e = math.exp(-gap)
        p = [1 / (1 + 3 * e), e / (1 + 3 * e)]
        want = -p[0] * math.log(p[0]) - (3 * p[1] * math.log(p[1]) if p[1] else 0)
        assert sums.entropy.tolist() == pytest.approx([want], abs=1e-6)
        assert sums.sink.tolist() == pytest.approx([p[0]], abs=1e-6)

    def test_sums_of_parts_are_those_of_the_whole(self):
        (s,) = tensors((4, 2, 6, 5))
        whole, _, _ = attention_sums(given_scores(s))
        parts = [attention_sums(given_scores(part))[0] for part in s.split(1)]
        total = parts[0]
        for part in parts[1:]:
            total = add_sums(total, part)
        for one, other in zip(total, whole, strict=True):
            torch.testing.assert_close(one, other)

    def test_groups_of_queries(self):
        (s,) = tensors((2, 3, 6, 5), size=2)
        s[1, 0, 5] = -math.inf
        sums, _, groups = attention_sums(given_scores(s), groups=2)
        _, p = explicit(s, s.numpy() > -math.inf)
        np.testing.assert_allclose(groups.mass[0], p[:, :, :3].sum((0, 1, 2)), atol=1e-5)
        np.testing.assert_allclose(groups.mass[1], p[:, :, 3:].sum((0, 1, 2)), atol=1e-5)
        assert groups.rows.tolist() == [18, 17]
        for name in ("rows", "choices", "entropy", "normalized", "largest"):
            total = getattr(sums, name).sum()
            torch.testing.assert_close(getattr(groups, name).sum(), total)


class TestMapsAndHeads:
    def test_a_map_holds_the_weights_of_the_first_example(self):
        q, k = tensors((3, 4, 9, 8), (3, 4, 13, 8))
        weights, usable = attention_map(dot_product_scores(q, k, HOLES), 9)
        _, p = explicit(logits_of(q, k), HOLES)
        np.testing.assert_allclose(weights, p[0], atol=1e-6)
        assert usable.tolist() == (HOLES[0, 0].sum(-1) > 1).tolist()

    def test_a_causal_map(self):
        q, k = tensors((2, 2, 5, 8), (2, 2, 5, 8))
        weights, usable = attention_map(dot_product_scores(q, k, is_causal=True), 5)
        assert usable.tolist() == [False, True, True, True, True]
        np.testing.assert_allclose(weights.triu(1), 0, atol=1e-30)

    def test_similarity_is_the_mean_cosine(self):
        (x,) = tensors((3, 6, 5))
        weights, usable = x.softmax(-1), torch.tensor([True, True, False, True, True, False])
        a = weights.double().numpy()[:, usable.numpy()]
        unit = a / np.linalg.norm(a, axis=-1, keepdims=True)
        want = np.einsum("hrs,grs->rhg", unit, unit).mean(0)
        np.testing.assert_allclose(head_similarity(weights, usable), want, atol=1e-6)
        cosines, index = nearest_head(head_similarity(weights, usable))
        np.fill_diagonal(want, -1)
        assert index.tolist() == want.argmax(-1).tolist()
        np.testing.assert_allclose(cosines, want.max(-1), atol=1e-6)

    def test_without_a_row_there_is_no_similarity(self):
        found = head_similarity(torch.ones(2, 3, 4), torch.zeros(3, dtype=torch.bool))
        assert found.isnan().all()

    def test_top_keys(self):
        mass = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 0.0]])
        weights, index, std = top_keys(mass, torch.tensor([8.0, 4.0]), 2)
        assert index[0].tolist() == [1, 2]
        assert weights[0].tolist() == [0.625, 0.25]
        assert index[1][0] == 0
        np.testing.assert_allclose(std, np.std([[0.125, 0.625, 0.25], [1, 0, 0]], axis=1))
        assert top_keys(mass, torch.ones(2), 9)[0].shape == (2, 3)

    @pytest.mark.parametrize(
        ("numbers", "verdict"),
        [
            ({}, None),
            ({"sink": 0.6, "largest": 0.95}, "sink"),
            ({"sink": 0.6, "keys": 2}, None),
            ({"sink": math.nan, "largest": 0.95}, "peaked"),
            ({"normalized": 0.99, "similarity": 1.0}, "uniform"),
            ({"similarity": 0.995}, "duplicate"),
            ({"similarity": math.nan, "largest": math.nan}, None),
        ],
    )
    def test_verdict(self, numbers, verdict):
        usual = {"largest": 0.3, "normalized": 0.7, "sink": 0.1, "keys": 32, "similarity": 0.5}
        assert attention_verdict(**{**usual, **numbers}) == verdict


def graph(seed=0, nodes=9, edges=40, heads=3):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(edges, heads, generator=generator)
    index = torch.randint(nodes - 2, (edges,), generator=generator)
    index[0] = nodes - 1
    index[1:][index[1:] == nodes - 1] = 0
    return logits, index, nodes


def explicit_graph(logits, index, nodes):
    """The rows as dense maps with masks."""
    edges, heads = logits.shape
    dense = np.full((1, heads, nodes, edges), -np.inf)
    for edge, node in enumerate(index.tolist()):
        dense[0, :, node, edge] = logits[edge]
    return explicit(dense, dense > -np.inf)


class TestGraph:
    @pytest.mark.parametrize("known", [True, False])
    @pytest.mark.parametrize("seed", range(3))
    def test_against_a_dense_softmax(self, seed, known):
        logits, index, nodes = graph(seed)
        truth, p = explicit_graph(logits, index, nodes)
        sums, cosines = graph_sums(logits, index, nodes if known else None)
        for name in set(truth) - {"masked", "sink", "sink_choices"}:
            np.testing.assert_allclose(getattr(sums, name), truth[name], atol=1e-4, err_msg=name)
        assert sums.sink.isnan().all()
        choice = np.bincount(index, minlength=nodes) > 1
        rows = p[0][:, choice]
        unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        want = np.einsum("hrs,grs->hg", unit, unit) / choice.sum()
        np.testing.assert_allclose(cosines, want, atol=1e-5)

    def test_nodes_may_be_numbered_anyhow(self):
        logits, index, nodes = graph()
        one, cosines = graph_sums(logits, index, nodes)
        other, moved = graph_sums(logits, 1000 - 7 * index)
        torch.testing.assert_close(other.normalized, one.normalized)
        torch.testing.assert_close(moved, cosines)

    def test_one_head_without_a_dimension_of_heads(self):
        logits, index, nodes = graph(heads=1)
        one, _ = graph_sums(logits[:, 0], index, nodes)
        assert one.entropy.shape == (1,)
        torch.testing.assert_close(one.entropy, graph_sums(logits, index, nodes)[0].entropy)

    def test_a_node_that_is_no_number_is_counted_and_left_out(self):
        logits, index, nodes = graph()
        logits[0] = math.nan
        sums, _ = graph_sums(logits, index, nodes)
        assert sums.nonfinite.tolist() == [1.0] * 3
        assert sums.entropy.isfinite().all()

    def test_no_edge(self):
        sums, cosines = graph_sums(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 4)
        assert sums.rows.tolist() == [0.0, 0.0]
        assert cosines.isnan().all()


class TestLooksLikeWeights:
    @pytest.mark.parametrize("shape", [(5,), (4, 5), (9, 4, 5), (9, 2, 4, 5)])
    def test_a_softmax_does(self, shape):
        total, rows, wrong = looks_like_weights(tensors(shape)[0].softmax(-1)).tolist()
        assert total / rows == pytest.approx(1)
        assert wrong == 0

    def test_other_tensors_do_not(self):
        (x,) = tensors((3, 4, 5))
        assert looks_like_weights(x)[2] > 0
        total, rows, wrong = looks_like_weights(x.relu()).tolist()
        assert wrong == 0
        assert abs(total / rows - 1) > 0.2

    def test_masked_rows_are_left_out(self):
        x = torch.tensor([[math.nan, math.nan], [0.0, 0.0], [0.5, 0.5]])
        assert looks_like_weights(x).tolist() == [1, 1, 0]
        assert looks_like_weights(torch.tensor([[math.nan, 1.0]]))[2] == 1
