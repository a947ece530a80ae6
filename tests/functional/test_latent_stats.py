"""Are the numbers about representations right, and does a collapse show in them?"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag.functional.latent_stats import (
    COLUMNS,
    effective_rank,
    gram_matrix,
    latent_rows,
    latent_values,
    mean_cosine,
    participation,
    relative_std,
    spectrum,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def named(z: torch.Tensor) -> dict[str, float]:
    return dict(zip(COLUMNS, latent_values(z).tolist(), strict=True))


def shape_of(z: torch.Tensor, rows: int = 10_000):
    moment = latent_values(z)[COLUMNS.index("second_moment")]
    return spectrum(gram_matrix(z, rows), moment)


def reference(z: np.ndarray) -> dict[str, float]:
    """All numbers by brute force, pair by pair."""
    z = z.astype(np.float64)
    norms = np.linalg.norm(z, axis=1)
    units = np.divide(z, norms[:, None], where=norms[:, None] > 0, out=np.zeros_like(z))
    there = units[norms > 0]
    cosines = [a @ b for i, a in enumerate(there) for j, b in enumerate(there) if i != j]
    std, spread = units.std(0), z.std(0)
    values = np.linalg.svd(z - z.mean(0), compute_uv=False) ** 2
    p = values / values.sum()
    p = p[p > 1e-12]
    return {
        "norm": norms.mean(),
        "std_min": std.min(),
        "std_mean": std.mean(),
        "mean_cosine": np.mean(cosines),
        "dead_dimensions": (spread <= 0.01 * sorted(spread)[int(0.9 * (len(spread) - 1))]).sum(),
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "participation": 1 / (p**2).sum(),
        "top_share": p.max(),
    }


class TestAgainstBruteForce:
    @pytest.mark.parametrize("shape", [(40, 8), (8, 40), (2, 3), (30, 1)])
    @pytest.mark.parametrize("shift", [0.0, 5.0])
    def test_every_number(self, shape, shift):
        z = normal(*shape) * torch.linspace(0.1, 3, shape[1]) + shift
        if shape[0] == 40:
            z[:, 2] = 0
            z[5] = 0
        want = reference(z.numpy())
        found = named(z) | dict(zip(*_names(shape_of(z)), strict=True))
        for key, value in want.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        assert found["rows"] == shape[0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_types(self, dtype):
        x = normal(50, 6).to(dtype)
        z = latent_rows(x, 100)
        assert named(z)["mean_cosine"] == pytest.approx(
            reference(x.double().numpy())["mean_cosine"], abs=1e-6
        )


def _names(found):
    return found._fields, [number.item() for number in found]


class TestCollapse:
    """What the global deviation does not see."""

    def healthy(self):
        return normal(256, 64)

    def collapsed(self):
        return normal(1, 64, seed=1).expand(256, 64).contiguous()

    def rank_one(self):
        return normal(256, 1, seed=2) * normal(1, 64, seed=3).sign()

    def test_the_global_deviation_is_the_same(self):
        for z in (self.collapsed(), self.rank_one()):
            assert z.std().item() == pytest.approx(self.healthy().std().item(), rel=0.2)

    def test_healthy(self):
        found = named(self.healthy())
        assert relative_std(torch.tensor(found["std_mean"]), 64) == pytest.approx(1, abs=0.05)
        assert abs(found["mean_cosine"]) < 0.02
        assert found["dead_dimensions"] == 0
        assert shape_of(self.healthy()).effective_rank > 50

    def test_the_same_for_every_sample(self):
        found = named(self.collapsed())
        assert found["std_mean"] < 1e-6
        assert found["mean_cosine"] == pytest.approx(1)
        assert found["dead_dimensions"] == 64
        assert shape_of(self.collapsed()).effective_rank == 0

    def test_the_same_up_to_rounding(self):
        z = self.collapsed() * (1 + 1e-7 * normal(256, 64, seed=5))
        assert shape_of(z).effective_rank == 0

    def test_one_direction(self):
        found = shape_of(self.rank_one())
        assert found.effective_rank == pytest.approx(1, abs=1e-3)
        assert found.participation == pytest.approx(1, abs=1e-3)
        assert found.top_share == pytest.approx(1, abs=1e-4)

    def test_some_dimensions_dead(self):
        z = self.healthy()
        z[:, :16] = 0.3
        assert named(z)["dead_dimensions"] == 16
        z[:, 60:] *= 1000
        assert named(z)["dead_dimensions"] == 16
        z[:, :16] = 0
        assert named(z)["dead_dimensions"] == 16
        assert named(z)["std_min"] == 0
        assert shape_of(z).effective_rank < 48


class TestRanks:
    def test_by_hand(self):
        values = torch.tensor([0.5, 0.25, 0.25, 0.0])
        assert effective_rank(values) == pytest.approx(2**1.5)
        assert participation(values) == pytest.approx(1 / 0.375)
        assert effective_rank(torch.zeros(3)) == participation(torch.zeros(3)) == 0

    @given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
    def test_bounds(self, values):
        x = torch.tensor(values, dtype=torch.float64)
        assert 1 - 1e-9 <= participation(x) <= effective_rank(x) + 1e-9
        assert effective_rank(x) <= len(values) + 1e-9

    @given(st.floats(1e-3, 1e3))
    def test_scale_does_not_matter(self, scale):
        z = normal(20, 5).double()
        for a, b in zip(shape_of(z), shape_of(z * scale), strict=True):
            torch.testing.assert_close(a, b)

    def test_rotation_does_not_matter(self):
        z = normal(60, 6).double()
        turn, _ = torch.linalg.qr(normal(6, 6, seed=9).double())
        for a, b in zip(shape_of(z), shape_of(z @ turn), strict=True):
            torch.testing.assert_close(a, b)

    def test_both_forms_of_the_matrix_agree(self):
        z = normal(9, 9).double()
        tall, wide = torch.cat([z, z]), torch.cat([z, z * 0], dim=1)
        assert gram_matrix(tall, 100).shape == (9, 9)
        assert gram_matrix(wide, 100).shape == (9, 9)
        assert gram_matrix(z.repeat(1, 3), 100).shape == (9, 9)
        torch.testing.assert_close(shape_of(tall), shape_of(wide))


class TestMeanCosine:
    def test_by_hand(self):
        z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        assert mean_cosine(z) == pytest.approx(-1 / 3)

    def test_rows_of_zeros_have_no_direction(self):
        z = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
        assert mean_cosine(z) == pytest.approx(1)

    @pytest.mark.parametrize("z", [torch.ones(1, 3), torch.zeros(4, 3)], ids=["one", "zeros"])
    def test_without_a_pair_it_is_unknown(self, z):
        assert mean_cosine(z).isnan()


class TestOddities:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_rows_that_are_not_finite_are_left_out(self, bad):
        z = normal(20, 4)
        broken = torch.cat([z, torch.full((1, 4), 1.0)])
        broken[-1, 2] = bad
        found, want = named(broken), named(z)
        assert found["nonfinite"] == 1
        assert found["rows"] == 20
        for key in ("norm", "std_min", "std_mean", "mean_cosine", "second_moment"):
            assert found[key] == pytest.approx(want[key], rel=1e-6)
        assert not math.isfinite(found["sum"])
        torch.testing.assert_close(gram_matrix(broken, 50), gram_matrix(z, 50))

    def test_nothing_finite(self):
        z = torch.full((3, 2), math.nan)
        found = named(z)
        assert found["rows"] == 0
        assert all(math.isnan(found[key]) for key in ("norm", "std_mean", "mean_cosine"))
        assert all(x.isnan() for x in shape_of(z))

    def test_one_row(self):
        found = named(normal(1, 4))
        assert found["std_mean"] == 0
        assert math.isnan(found["mean_cosine"])
        assert shape_of(normal(1, 4)).effective_rank == 0

    def test_inputs_stay(self):
        z = normal(5, 4)
        kept = z.clone()
        shape_of(z)
        assert torch.equal(z, kept)


class TestRows:
    @pytest.mark.parametrize(
        ("shape", "pooling", "want"),
        [
            ((7,), "none", (7, 1)),
            ((), "none", (1, 1)),
            ((7, 3), "none", (7, 3)),
            ((7, 5, 3), "none", (35, 3)),
            ((7, 5, 3), "mean", (7, 3)),
            ((7, 5, 3, 2), "none", (7, 5)),
            ((7, 5, 3, 2, 2), "mean", (7, 5)),
        ],
    )
    def test_shapes(self, shape, pooling, want):
        assert latent_rows(torch.zeros(shape), 100, pooling).shape == want

    def test_means(self):
        x = normal(4, 5, 3)
        torch.testing.assert_close(latent_rows(x, 9, "mean"), x.mean(1))
        torch.testing.assert_close(latent_rows(x, 99), x.reshape(-1, 3))
        maps = normal(4, 5, 3, 2)
        torch.testing.assert_close(latent_rows(maps, 9), maps.mean((2, 3)))

    @given(st.integers(1, 40), st.integers(1, 16), st.integers(2, 64))
    def test_no_more_than_asked_for_and_all_positions(self, batch, positions, most):
        x = torch.arange(positions).expand(batch, positions).float().unsqueeze(-1)
        rows = latent_rows(x, most)
        assert len(rows) == min(batch * positions, most)
        assert len(rows.unique()) == min(positions, len(rows))

    def test_errors(self):
        with pytest.raises(ValueError, match='`pooling` must be "none" or "mean", got \'max\''):
            latent_rows(torch.zeros(2, 2), 10, "max")
        with pytest.raises(ValueError, match=r"`max_rows` must be at least 2, got 1\."):
            latent_rows(torch.zeros(2, 2), 1)
