"""Is the contrastive loss the cross-entropy that it says, and do gradients survive in it?"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_diag.functional.contrastive import (
    SIMILARITIES,
    contrastive_loss,
    full_lines,
    full_logits,
    line_logits,
    pairwise_loss,
    recall_at,
    shuffle_logits,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def units(n: int, batch: int, features: int, seed: int = 0) -> list[torch.Tensor]:
    return list(F.normalize(normal(n, batch, features, seed=seed), dim=-1))


def similarity_by_hand(xs: list[np.ndarray], similarity: str) -> float:
    """One tuple, in NumPy, by the formula."""
    s = sum(xs)
    if similarity == "mip":
        return float(np.prod(np.stack(xs), axis=0).sum())
    if similarity == "norm":
        return float(np.linalg.norm(s))
    if similarity == "leave_one_out":
        return float(sum(x @ (s - x) / np.linalg.norm(s - x) for x in xs))
    return -math.sqrt(abs(np.linalg.det(np.array([[a @ b for b in xs] for a in xs]))))


def full_by_hand(views: list[torch.Tensor], similarity: str) -> torch.Tensor:
    arrays = [x.numpy() for x in views]
    size = len(arrays[0])
    full = np.empty((size,) * len(arrays))
    for index in itertools.product(range(size), repeat=len(arrays)):
        full[index] = similarity_by_hand(
            [x[i] for x, i in zip(arrays, index, strict=True)], similarity
        )
    return torch.from_numpy(full)


def rotated_cross_entropy(full: torch.Tensor) -> torch.Tensor:
    """The loss of the reference: probability targets on the diagonal, for each turn of the axes."""
    n, size = full.dim(), len(full)
    target = torch.zeros_like(full)
    target[(torch.arange(size),) * n] = 1
    losses = []
    for k in range(n):
        turn = [(axis + k) % n for axis in range(n)]
        # the class axis of torch is the second
        losses.append(F.cross_entropy(full.permute(turn), target, reduction="sum") / size)
    return torch.stack(losses).mean()


SHAPES = [(2, 5), (3, 4), (4, 4), (5, 3)]


class TestLinesAreTheFullForm:
    @pytest.mark.parametrize(("n", "batch"), SHAPES)
    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_every_tuple_by_hand(self, similarity, n, batch):
        views = units(n, batch, 7)
        want = full_by_hand(views, similarity)
        found = full_logits(views, similarity, eps=0)
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
        lines = line_logits(views, similarity, eps=0)
        torch.testing.assert_close(lines, full_lines(want), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(("n", "batch"), SHAPES)
    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_the_loss_is_that_of_all_turns_of_the_tensor(self, similarity, n, batch):
        views = units(n, batch, 7)
        scale = 5.0
        want = rotated_cross_entropy(scale * full_by_hand(views, similarity))
        for negatives in ("lines", "full"):
            found = contrastive_loss(
                views, similarity=similarity, negatives=negatives, logit_scale=scale
            )
            # the root's epsilon moves the values by less than it
            torch.testing.assert_close(found.loss, want, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_single_precision_and_views_of_any_length(self, similarity):
        views = [3 * x for x in normal(4, 5, 6)]
        want = full_lines(full_by_hand(views, similarity))
        found = line_logits([x.float() for x in views], similarity)
        torch.testing.assert_close(found, want.float(), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_gradients_of_both_forms_agree(self, similarity):
        gradients = []
        for negatives in ("lines", "full"):
            views = [x.requires_grad_() for x in units(4, 3, 6)]
            found = contrastive_loss(
                views, similarity=similarity, negatives=negatives, logit_scale=3.0
            )
            gradients.append(torch.autograd.grad(found.loss, views))
        torch.testing.assert_close(*gradients)

    def test_lines_by_hand(self):
        lines = full_lines(torch.arange(8.0).view(2, 2, 2))
        # [k][b][j]: the tuple (b, b, b) with j in place k
        assert lines.tolist() == [[[0, 4], [3, 7]], [[0, 2], [5, 7]], [[0, 1], [6, 7]]]

    def test_the_full_form_has_a_limit(self):
        with pytest.raises(ValueError, match=r"must not need more than 16777216 elements .* 32\^6"):
            full_logits([torch.zeros(32, 8)] * 6, "mip")
        with pytest.raises(ValueError, match="got 2\\^3 x 4 = 32"):
            full_logits([torch.zeros(2, 4)] * 3, "mip", max_elements=31)


class TestLoss:
    @pytest.mark.parametrize("similarity", SIMILARITIES)
    @pytest.mark.parametrize("negatives", ["lines", "shuffle", "full"])
    def test_chance_is_the_logarithm_of_the_batch(self, similarity, negatives):
        same = [torch.ones(6, 3)] * 3
        found = contrastive_loss(
            same,
            similarity=similarity,
            negatives=negatives,
            logit_scale=20.0,
            generator=torch.Generator(),
        )
        assert found.loss.tolist() == pytest.approx(math.log(6), abs=1e-5)
        assert found.losses.tolist() == pytest.approx([math.log(6)] * 3, abs=1e-5)
        # a collapsed model finds nothing, whatever stands first
        assert found.accuracy.tolist() == pytest.approx([1 / 6] * 3)
        assert found.spread.tolist() == pytest.approx([0] * 3, abs=1e-4)
        assert pairwise_loss(same).loss.tolist() == pytest.approx(math.log(6))

    def test_what_is_reported_beside_it(self):
        views = units(3, 5, 8)
        found = contrastive_loss(views, similarity="norm", logit_scale=4.0)
        lines = full_lines(full_by_hand(views, "norm"))
        own = torch.eye(5, dtype=torch.bool).expand_as(lines)
        assert found.positive.tolist() == pytest.approx(lines[own].mean().tolist())
        assert found.negative.tolist() == pytest.approx(lines[~own].mean().tolist())
        spread = (4 * lines).numpy().std(axis=-1).mean(axis=-1)
        assert found.spread.tolist() == pytest.approx(spread.tolist())
        target = torch.arange(5)
        for k in range(3):
            assert found.losses[k].tolist() == pytest.approx(
                F.cross_entropy(4 * lines[k], target).tolist()
            )
            best = lines[k].argmax(-1) == target
            assert found.accuracy[k].tolist() == pytest.approx(best.double().mean().tolist())

    def test_numbers_beside_it_have_no_graph(self):
        scale = torch.tensor(2.0, requires_grad=True)
        found = contrastive_loss([normal(4, 3).requires_grad_()] * 3, logit_scale=scale)
        graphs = [field.requires_grad for field in found]
        assert graphs == [True, True, False, False, False, False]
        assert torch.autograd.grad(found.loss, scale)[0].isfinite()

    @given(st.permutations(range(5)), st.sampled_from(SIMILARITIES))
    def test_the_order_of_the_batch_does_not_matter(self, order, similarity):
        views = units(3, 5, 6)
        first = contrastive_loss(views, similarity=similarity, logit_scale=3.0)
        second = contrastive_loss(
            [x[list(order)] for x in views], similarity=similarity, logit_scale=3.0
        )
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other)

    @given(st.permutations(range(4)), st.sampled_from(SIMILARITIES))
    def test_views_change_places_and_their_losses_with_them(self, order, similarity):
        views = units(4, 4, 6)
        first = contrastive_loss(views, similarity=similarity, logit_scale=3.0)
        second = contrastive_loss([views[k] for k in order], similarity=similarity, logit_scale=3.0)
        torch.testing.assert_close(second.loss, first.loss)
        torch.testing.assert_close(second.losses, first.losses[list(order)])

    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_gradcheck(self, similarity):
        views = [x.requires_grad_() for x in units(3, 3, 5)]
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

        def lines(scale, *xs):
            return contrastive_loss(xs, similarity=similarity, logit_scale=scale).loss

        def shuffled(*xs):
            generator = torch.Generator().manual_seed(1)
            return contrastive_loss(
                xs, similarity=similarity, negatives="shuffle", generator=generator
            ).loss

        assert torch.autograd.gradcheck(lines, (scale, *views))
        assert torch.autograd.gradcheck(shuffled, views)
        assert torch.autograd.gradcheck(lambda *xs: pairwise_loss(xs).loss, views)

    @pytest.mark.parametrize("similarity", SIMILARITIES)
    @pytest.mark.parametrize("start", ["zeros", "aligned", "opposite"])
    @pytest.mark.parametrize("negatives", ["lines", "shuffle"])
    def test_gradients_are_finite_where_roots_are_steep(self, similarity, start, negatives):
        x = F.normalize(normal(6, 8, dtype=torch.float32), dim=-1)
        views = {"zeros": [0 * x] * 4, "aligned": [x] * 4, "opposite": [x, -x] * 2}[start]
        views = [one.clone().requires_grad_() for one in views]
        found = contrastive_loss(
            views,
            similarity=similarity,
            negatives=negatives,
            logit_scale=100.0,
            generator=torch.Generator(),
        )
        assert found.loss.isfinite()
        for gradient in torch.autograd.grad(found.loss, views):
            assert gradient.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_half_precision_goes_through_single(self, similarity, dtype):
        views = [x.to(dtype) for x in units(6, 8, 32)]
        want = contrastive_loss([x.float() for x in views], similarity=similarity, logit_scale=14.3)
        with torch.autocast("cpu", dtype=dtype):
            found = contrastive_loss(views, similarity=similarity, logit_scale=14.3)
        assert found.loss.dtype == torch.float32
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_the_pairwise_loss_is_that_of_clip(self):
        views = units(3, 6, 8)
        target = torch.arange(6)
        pairs = []
        for a, b in itertools.combinations(views, 2):
            logits = 7 * a @ b.T
            pairs.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
        found = pairwise_loss(views, logit_scale=7.0)
        torch.testing.assert_close(found.loss, torch.stack(pairs).mean())
        two = contrastive_loss(views[:2], similarity="mip", logit_scale=7.0)
        torch.testing.assert_close(pairwise_loss(views[:2], logit_scale=7.0).loss, two.loss)

    def test_a_batch_of_one_has_nothing_to_tell_apart(self):
        found = contrastive_loss([torch.ones(1, 3)] * 3)
        assert found.loss == 0
        assert found.negative.isnan()


class TestShuffled:
    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_the_diagonal_holds_the_true_tuples(self, similarity):
        views = units(4, 6, 8)
        found = shuffle_logits(views, similarity, generator=torch.Generator(), eps=0)
        true = [similarity_by_hand([x[b].numpy() for x in views], similarity) for b in range(6)]
        for k in range(4):
            assert found[k].diagonal().tolist() == pytest.approx(true)

    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_columns_are_tuples_of_the_others_none_of_them_true(self, similarity):
        views = units(3, 5, 7)
        found = shuffle_logits(views, similarity, generator=torch.Generator().manual_seed(3), eps=0)
        full = full_by_hand(views, similarity)
        for k in range(3):
            lead, mixed = (k + 1) % 3, (k + 2) % 3
            orders = []
            for j in range(5):
                # which entry of the mixed view stands in column j, told from two other rows
                rows = [b for b in range(5) if b != j]
                match = []
                for m in range(5):
                    index = {k: None, lead: j, mixed: m}
                    want = torch.stack(
                        [
                            full[tuple(b if index[a] is None else index[a] for a in range(3))]
                            for b in rows
                        ]
                    )
                    if torch.allclose(want, found[k][rows, j]):
                        match.append(m)
                assert len(match) == 1
                orders.append(match[0])
            assert sorted(orders) == list(range(5))

    def test_two_views_are_clip(self):
        views = units(2, 6, 8)
        found = shuffle_logits(views, "mip", generator=torch.Generator())
        torch.testing.assert_close(
            found, torch.stack([views[0] @ views[1].T, views[1] @ views[0].T])
        )

    def test_the_generator_alone_decides(self):
        views = units(3, 8, 8)
        state = torch.get_rng_state()
        first, again, other = (
            shuffle_logits(views, "mip", generator=torch.Generator().manual_seed(seed))
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), state)


class TestRecall:
    def test_against_numpy(self):
        logits = normal(3, 7, 7)
        for k in (1, 3, 7, 9):
            rank = (-logits.numpy()).argsort(-1).argsort(-1)[:, range(7), range(7)]
            assert recall_at(logits, k).tolist() == pytest.approx((rank < k).mean(-1).tolist())

    def test_ties_are_chance(self):
        assert recall_at(torch.zeros(1, 10, 10), 1).tolist() == pytest.approx([0.1])
        assert recall_at(torch.zeros(1, 10, 10), 5).tolist() == pytest.approx([0.5])

    def test_nan_finds_nothing(self):
        assert recall_at(torch.full((1, 3, 3), math.nan), 1).tolist() == [0]

    def test_k(self):
        with pytest.raises(ValueError, match=r"`k` must be at least 1, got 0\."):
            recall_at(torch.zeros(1, 2, 2), 0)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                # of the storage: an expanded view takes nothing
                self.largest = max(self.largest, one.untyped_storage().nbytes() // one.itemsize)
        return out


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_no_tensor_is_larger_than_the_lines(similarity):
    n, batch, features = 6, 512, 96
    views = [x.float().requires_grad_() for x in units(n, batch, features)]
    with Sizes() as sizes:
        found = contrastive_loss(views, similarity=similarity, logit_scale=10.0)
        torch.autograd.grad(found.loss, views)
    # (batch, batch, features) would be 16 times as much, and the full tensor 10^10 times
    assert sizes.largest <= n * batch * batch
    assert found.loss.isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity": "cosine"}, r"`similarity` must be one of \('mip', .*, got 'cosine'\."),
        ({"negatives": "all"}, r"`negatives` must be one of \('lines', .*, got 'all'\."),
        ({"negatives": "shuffle"}, '`generator` must be given for negatives "shuffle", got None'),
    ],
)
def test_unknown_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss([torch.zeros(2, 3)] * 2, **arguments)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([torch.zeros(2, 3)], "`views` must be at least 2 tensors, got 1."),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], r"one shape .*, got \[\(2, 3\), \(3, 3\)\]\."),
        ([torch.zeros(3), torch.zeros(3)], r"`views` must all have one shape \(batch, features\)"),
    ],
)
def test_views_that_do_not_fit(views, message):
    for call in (contrastive_loss, pairwise_loss):
        with pytest.raises(ValueError, match=message):
            call(views)
