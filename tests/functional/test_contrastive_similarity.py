"""Similarities of n views: identities, sizes, and normalization with gradients that are finite."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag.functional.contrastive import (
    SIMILARITIES,
    context_similarity,
    contrastive_loss,
    mip_length,
    safe_normalize,
    tuple_similarity,
)

HALF = [torch.float16, torch.bfloat16]
ALL = [*HALF, torch.float32, torch.float64]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(normal(*shape, seed=seed), dim=-1)


class TestSafeNormalize:
    @pytest.mark.parametrize("dtype", ALL, ids=str)
    def test_lengths_are_one(self, dtype):
        x = (10 * normal(20, 16)).to(dtype)
        found = safe_normalize(x)
        assert found.dtype == dtype
        exact = x.double().numpy()
        want = torch.from_numpy(exact / np.linalg.norm(exact, axis=-1, keepdims=True))
        torch.testing.assert_close(found, want.to(dtype))

    @pytest.mark.parametrize("dtype", ALL, ids=str)
    @pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-10, 1e-5, 1e-3, 1.0, 6e4, 1e30, 3e38])
    def test_values_and_gradients_are_finite(self, dtype, size):
        x = torch.full((3, 64), size, dtype=torch.float64).to(dtype)
        if not x.isfinite().all():
            pytest.skip("not a number of this type")
        x = (x * normal(3, 64).sign().to(dtype)).requires_grad_()
        found = safe_normalize(x)
        assert found.isfinite().all()
        found.backward(normal(3, 64).clamp(-1, 1).to(dtype))
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert x.grad.isfinite().all()

    @pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e10, 1e30, 3e38])
    def test_extreme_lengths_in_single_precision(self, size):
        x = (torch.tensor([[3.0, 4.0]]) * (size / 5)).requires_grad_()
        found = safe_normalize(x, eps=1e-35)
        torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]]))
        (gradient,) = torch.autograd.grad(found[0, 0], x)
        # (1 - u u^T) / length
        want = torch.tensor([[1 - 0.36, -0.48]], dtype=torch.float64) / size
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=0)

    def test_zero_stays_zero_with_the_steepest_gradient(self):
        x = torch.zeros(2, 3, requires_grad=True)
        found = safe_normalize(x, eps=0.01)
        assert found.tolist() == [[0, 0, 0]] * 2
        found[0, 1].backward()
        assert x.grad.tolist() == [[0, pytest.approx(100), 0], [0, 0, 0]]

    def test_below_the_epsilon_it_is_linear(self):
        x = torch.tensor([[3e-4, 4e-4]], dtype=torch.float64)
        torch.testing.assert_close(safe_normalize(x, eps=1e-2), x * 100)

    @given(st.floats(1e-4, 1e30))
    def test_length_does_not_matter(self, factor):
        x = normal(4, 6, dtype=torch.float32)
        torch.testing.assert_close(safe_normalize(factor * x), safe_normalize(x))

    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_dimensions_and_gradcheck(self, dim):
        x = normal(4, 5).requires_grad_()
        torch.testing.assert_close(safe_normalize(x, dim=dim), F.normalize(x, dim=dim))
        assert torch.autograd.gradcheck(lambda one: safe_normalize(one, dim=dim), x)

    def test_faults_are_not_hidden(self):
        x = torch.tensor([[math.inf, 1.0], [math.nan, 1.0], [3.0, 4.0]])
        assert safe_normalize(x).isnan().any(-1).tolist() == [True, True, False]

    def test_nothing_is_written_to_the_input(self):
        x = normal(3, 4)
        before = x.clone()
        safe_normalize(x)
        assert torch.equal(x, before)

    @pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
    def test_eps(self, eps):
        with pytest.raises(ValueError, match="`eps` must be above 0, got"):
            safe_normalize(torch.ones(2), eps=eps)


class TestIdentities:
    """Of unit vectors, section by section of the literature."""

    def test_the_norm_is_the_sum_of_cosines(self):
        views = units(6, 10, 16)
        s = views.sum(0)
        cosines = sum((a * b).sum(-1) for a, b in itertools.combinations(views, 2))
        found = tuple_similarity(list(views), "norm", eps=0)
        torch.testing.assert_close(found, (6 + 2 * cosines).sqrt())
        # three more ways to write it
        direction = s / s.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(found, (direction * s).sum(-1))
        torch.testing.assert_close(found, (s.square() / s.norm(dim=-1, keepdim=True)).sum(-1))
        torch.testing.assert_close(found, sum((direction * x).sum(-1) for x in views))
        # a spread that falls as the norm rises
        spread = (views.square().sum(0) - s.square() / 6).sum(-1)
        torch.testing.assert_close(spread, 6 - found.square() / 6)

    def test_two_views(self):
        a, b = units(2, 9, 5)
        cosine = (a * b).sum(-1)
        torch.testing.assert_close(tuple_similarity([a, b], "mip"), cosine)
        volume = tuple_similarity([a, b], "gram", eps=0)
        torch.testing.assert_close(volume, -(1 - cosine.square()).sqrt())
        torch.testing.assert_close(tuple_similarity([a, -b], "gram", eps=0), volume)
        torch.testing.assert_close(tuple_similarity([a, b], "leave_one_out", eps=0), 2 * cosine)

    @pytest.mark.parametrize(
        ("similarity", "best"), [("norm", 4.0), ("leave_one_out", 4.0), ("gram", 0.0)]
    )
    def test_agreement_is_best(self, similarity, best):
        x = units(1, 8)[0]
        same = tuple_similarity([x] * 4, similarity)
        assert same.tolist() == pytest.approx(best, abs=2e-4)
        apart = tuple_similarity(list(units(4, 50, 8)), similarity)
        assert (apart < same).all()

    def test_orthogonal_views_span_one(self):
        assert tuple_similarity(list(torch.eye(5)), "gram").tolist() == pytest.approx(-1)

    @pytest.mark.parametrize(("features", "reference"), [(64, 3.35e-3), (512, 5.66e-5)])
    def test_the_product_of_six_unit_vectors_vanishes(self, features, reference):
        x = units(4000, features)
        found = tuple_similarity([x] * 6, "mip").mean()
        assert found.tolist() == pytest.approx(reference, rel=0.05)
        # (n - 1)!! / F^(n/2 - 1), up to the fourth moments of a sphere
        assert found.tolist() == pytest.approx(15 / features**2, rel=0.1)
        longer = mip_length(6, features) * x
        assert tuple_similarity([longer] * 6, "mip").mean().tolist() == pytest.approx(15, rel=0.1)

    def test_the_product_of_different_unit_vectors_is_smaller_still(self):
        views = list(units(6, 1000, 512))
        found = tuple_similarity(views, "mip").std()
        assert found.tolist() == pytest.approx(512**-2.5, rel=0.1)

    def test_it_starves_the_gradient_and_the_length_feeds_it(self):
        norms = {}
        for similarity, length in (("mip", 1.0), ("mip", mip_length(6, 512)), ("norm", 1.0)):
            views = [(length * x).requires_grad_() for x in units(6, 64, 512)]
            found = contrastive_loss(views, similarity=similarity, logit_scale=1 / 0.07)
            gradients = torch.autograd.grad(found.loss, views)
            norms[similarity, length] = math.sqrt(sum(g.square().sum() for g in gradients))
        starved, fed, norm = norms.values()
        assert starved < 1e-4
        assert fed > 1e3 * starved
        assert norm > 1e3 * starved

    @given(st.floats(0.1, 10.0), st.integers(2, 6))
    def test_scale(self, factor, n):
        views = list(normal(n, 3, 7))
        longer = [factor * x for x in views]
        for similarity, power in (("mip", n), ("norm", 1), ("leave_one_out", 1), ("gram", n)):
            found = tuple_similarity(longer, similarity, eps=0)
            want = factor**power * tuple_similarity(views, similarity, eps=0)
            torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)

    def test_mip_length(self):
        assert mip_length(2, 300) == 1
        assert mip_length(6, 512) == pytest.approx(8)


class TestContexts:
    @pytest.mark.parametrize("similarity", SIMILARITIES)
    @pytest.mark.parametrize("others", [1, 2, 5])
    def test_as_many_candidates_as_one_likes(self, similarity, others):
        xs, y = list(units(others, 4, 9)), units(7, 9, seed=1)
        found = context_similarity(xs, y, similarity)
        want = tuple_similarity([*(x[:, None] for x in xs), y], similarity)
        torch.testing.assert_close(found, want)

    def test_gradients_of_a_singular_context(self):
        """Two parallel views span nothing, whatever the third is: its own gradient is zero."""
        x = units(1, 4, 6)[0].requires_grad_()
        y = units(5, 6, seed=1).requires_grad_()
        found = context_similarity([x, x], y, "gram", eps=1e-6)
        torch.testing.assert_close(found, torch.full_like(found, -1e-3))
        for gradient in torch.autograd.grad(found.sum(), (x, y)):
            assert gradient.isfinite().all()
            assert gradient.abs().max() < 1e-6

    def test_errors(self):
        with pytest.raises(ValueError, match="`similarity` must be one of"):
            context_similarity([torch.ones(1, 2)], torch.ones(1, 2), "dot")
        with pytest.raises(ValueError, match="`similarity` must be one of"):
            tuple_similarity([torch.ones(2)] * 2, "dot")
        with pytest.raises(ValueError, match=r"`views` must be at least 2 tensors, got 1\."):
            tuple_similarity([torch.ones(2)], "mip")
