"""Does LatentStats look at the right tensor, and show a collapse that the deviation hides?"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.callbacks.latent_stats import LatentStats
from lightning_diag.lightning import LightningModule
from tests.callbacks.witness import Witness, fit, rows, scaler_plugin
from tests.promises.reads import census

SEED_KEYS = ("latent_mean", "latent_std", "latent_min", "latent_max", "latent_norm")


def every_step(module: str | None = None, **arguments: object) -> LatentStats:
    return LatentStats(module, **({"every_n_steps": 1, "on_error": "raise"} | arguments))


@pytest.fixture
def wide():
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(96, 16, generator=generator)), batch_size=32)


class Auto(LightningModule):
    """Encoder and two heads, of which the second runs last; keeps what LatentStats should see."""

    def __init__(self, encoder: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.encoder = encoder or nn.Linear(16, 16)
            self.last = nn.Linear(16, 2)
            self.other = nn.Linear(16, 3)
            self.unused = nn.Linear(2, 2)
        self.kept = []

    def latent(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        z = self.latent(batch[0].to(self.last.weight.dtype))
        self.kept.append(z.detach().double().clone())
        return self.other(z).square().mean() + self.last(F.relu(z)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def assert_truth(row, z):
    assert row["rows"], row["features"] == z.shape
    for key, want in {
        "latent_mean": z.mean(),
        "latent_std": z.std(correction=0),
        "latent_min": z.min(),
        "latent_max": z.max(),
        "latent_norm": z.norm(dim=1).mean(),
        "std_mean": F.normalize(z).std(0, correction=0).mean(),
        "std_min": F.normalize(z).std(0, correction=0).min(),
    }.items():
        assert row[key] == pytest.approx(want.item(), rel=1e-5, abs=1e-6), key
    cosines = F.normalize(z) @ F.normalize(z).T
    want = (cosines.sum() - len(z)) / (len(z) * (len(z) - 1))
    assert row["mean_cosine"] == pytest.approx(want.item(), abs=1e-6)
    p = torch.linalg.svdvals(z - z.mean(0)).square()
    p = p / p.sum()
    want = (-(p * p.log()).nan_to_num()).sum().exp()
    assert row["effective_rank"] == pytest.approx(want.item(), rel=1e-4)


class TestWhatIsSeen:
    def test_by_default_the_input_of_the_last_linear_layer(self, wide, tmp_path):
        module = Auto()
        fit(module, every_step(), wide, tmp_path)
        found = rows(tmp_path, "latent")
        assert [row["step"] for row in found] == [0, 1, 2]
        for row, z in zip(found, module.kept, strict=True):
            assert (row["component"], row["side"]) == ("last", "input")
            assert_truth(row, z.relu())

    def test_the_output_of_the_named_module(self, wide, tmp_path):
        module = Auto()
        trainer = fit(module, every_step("encoder"), wide, tmp_path)
        for row, z in zip(rows(tmp_path, "latent"), module.kept, strict=True):
            assert (row["component"], row["side"]) == ("encoder", "output")
            assert_truth(row, z)
            assert row["std_ratio"] == pytest.approx(row["std_mean"] * 4)
        for key in SEED_KEYS:
            assert f"latent/encoder/{key}" in trainer.callback_metrics

    def test_an_output_that_is_written_into_later(self, wide, tmp_path):
        class Later(Auto):
            def latent(self, x):
                z = self.encoder(x)
                self.before = z.detach().double().clone()
                return z.mul_(100)

        module = Later()
        fit(module, every_step("encoder"), wide, tmp_path, limit_train_batches=1)
        assert_truth(rows(tmp_path, "latent")[0], module.before)

    @pytest.mark.parametrize("kind", ["tuple", "dict", "named", "nested"])
    def test_the_first_floating_tensor_of_what_a_module_gives(self, wide, tmp_path, kind):
        class Named(NamedTuple):
            index: torch.Tensor
            latent: torch.Tensor

        class Encoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(16, 16)

            def forward(self, x):
                z, index = self.inner(x), torch.arange(len(x))
                return {
                    "tuple": (index, z, z * 0),
                    "dict": {"index": index, "z": z},
                    "named": Named(index, z),
                    "nested": [None, (index, {"z": z})],
                }[kind]

        class Module(Auto):
            def latent(self, x):
                z = self.encoder(x)
                picked = {"tuple": lambda: z[1], "dict": lambda: z["z"], "named": lambda: z.latent}
                return (picked | {"nested": lambda: z[1][1]["z"]})[kind]()

        module = Module(Encoder())
        fit(module, every_step("encoder"), wide, tmp_path)
        assert_truth(rows(tmp_path, "latent")[0], module.kept[0])

    @pytest.mark.parametrize(("pooling", "count"), [("none", 64), ("mean", 32)])
    def test_sequences(self, wide, tmp_path, pooling, count):
        class Sequence(nn.Module):
            def forward(self, x):
                return torch.stack([x, 2 * x], dim=1)

        class Module(Auto):
            def latent(self, x):
                return self.encoder(x).mean(1)

        fit(Module(Sequence()), every_step("encoder", pooling=pooling), wide, tmp_path)
        assert {row["rows"] for row in rows(tmp_path, "latent")} == {count}

    def test_most_rows(self, wide, tmp_path):
        fit(Auto(), every_step(max_rows=20, rank_rows=5), wide, tmp_path)
        row = rows(tmp_path, "latent")[0]
        assert row["rows"] == 20
        assert row["rank_limit"] == 4
        assert row["effective_rank"] <= 4
        assert row["rank_share"] == pytest.approx(row["effective_rank"] / 4)

    def test_a_name_that_is_not_there_is_said_with_the_nearest(self, wide, tmp_path):
        with pytest.warns(UserWarning, match=r"no module `encodr`; .*`encoder`"):
            fit(Auto(), every_step("encodr"), wide, tmp_path)
        assert not rows(tmp_path, "latent")

    def test_a_module_that_does_not_run_is_said_once(self, wide, tmp_path):
        with pytest.warns(UserWarning, match="`unused` did not run in the training step"):
            fit(Auto(), every_step("unused"), wide, tmp_path)
        said = [row["message"] for row in rows(tmp_path, "notes")]
        assert sum("did not run" in message for message in said) == 1

    def test_no_linear_layer_is_said(self, wide, tmp_path):
        class Bare(Auto):
            def training_step(self, batch, batch_idx):
                return self.last.weight.square().sum()

        with pytest.warns(UserWarning, match="no linear layer ran"):
            fit(Bare(), every_step(), wide, tmp_path)

    def test_whole_numbers_are_said(self, wide, tmp_path):
        class Codes(nn.Module):
            def forward(self, x):
                return x.long()

        class Module(Auto):
            def latent(self, x):
                return self.encoder(x).float()

        with pytest.warns(UserWarning, match="`encoder` gives Tensor without"):
            fit(Module(Codes()), every_step("encoder"), wide, tmp_path)


class Collapsed(nn.Module):
    """The same vector for every sample, or one direction; both as large as a healthy output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        vector = torch.randn(16, generator=torch.Generator().manual_seed(4))
        self.vector = nn.Parameter(vector / vector.std())

    def forward(self, x):
        if self.kind == "healthy":
            return x + 0 * self.vector
        if self.kind == "constant":
            return self.vector.expand(len(x), -1) + 0 * x
        return x[:, :1] * self.vector


class TestCollapse:
    def test_the_deviation_does_not_see_what_the_others_see(self, wide, tmp_path):
        found = {}
        for kind in ("healthy", "constant", "line"):
            fit(Auto(Collapsed(kind)), every_step("encoder"), wide, tmp_path / kind)
            found[kind] = rows(tmp_path / kind, "latent")[0]
        deviations = [row["latent_std"] for row in found.values()]
        assert max(deviations) / min(deviations) < 1.3
        assert [row["std_ratio"] > 0.7 for row in found.values()] == [True, False, True]
        assert found["constant"]["std_ratio"] < 1e-5
        assert found["constant"]["mean_cosine"] == pytest.approx(1)
        assert abs(found["healthy"]["mean_cosine"]) < 0.05
        assert found["healthy"]["effective_rank"] > 10
        assert found["constant"]["effective_rank"] == 0
        assert found["constant"]["dead_dimensions"] == 16
        assert found["line"]["effective_rank"] == pytest.approx(1, abs=1e-3)
        assert found["line"]["top_share"] == pytest.approx(1, abs=1e-4)

    def test_not_finite(self, wide, tmp_path):
        class Broken(Auto):
            def latent(self, x):
                return self.encoder(x) + torch.tensor([[math.nan] + [0.0] * 15] + [[0.0] * 16] * 31)

        fit(Broken(), every_step(), wide, tmp_path, limit_train_batches=1)
        row = rows(tmp_path, "latent")[0]
        assert row["nonfinite"] == 1
        assert row["rows"] == 31
        assert row["latent_std"] is None
        assert row["effective_rank"] > 1


class Mapped(nn.Module):
    """Runs its part on each sample by itself, in one go, and once more as usual."""

    def __init__(self, part, plain=True):
        super().__init__()
        self.part = part
        self.plain = plain

    def forward(self, x):
        y = torch.func.vmap(self.part, randomness="different")(x)
        return y + self.part(x) if self.plain else y


class TestModes:
    @pytest.mark.parametrize("name", ["encoder.part", None])
    @pytest.mark.parametrize("plain", [True, False])
    def test_a_transform_is_passed_by(self, wide, tmp_path, name, plain):
        class One(Auto):
            def training_step(self, batch, batch_idx):
                return self.encoder(batch[0]).square().mean()

        ends = []
        for callbacks in ([], [every_step(name)]):
            module = One(Mapped(nn.Linear(16, 16), plain))
            with torch.no_grad():
                module.encoder.part.weight.fill_(0.1)
                module.encoder.part.bias.fill_(0.1)
            fit(module, callbacks, wide, tmp_path)
            ends.append(list(module.encoder.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        assert {row["component"] for row in rows(tmp_path, "latent")} == (
            {"encoder.part"} if plain else set()
        )
        said = [row for row in rows(tmp_path, "notes") if "transform" in row["message"]]
        assert [row["severity"] for row in said] == ["info"] + ["warning"] * (not plain)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_precision(self, wide, tmp_path, precision):
        module = Auto()
        fit(module, every_step("encoder"), wide, tmp_path, precision=precision)
        assert_truth(rows(tmp_path, "latent")[0], module.kept[0])

    def test_accumulation_looks_at_the_first_batch_of_a_step(self, loader, tmp_path):
        fit(Witness(), every_step(every_n_steps=2), loader, tmp_path, accumulate_grad_batches=3)
        assert [row["step"] for row in rows(tmp_path, "latent")] == [1]

    def test_scaler_and_interval(self, loader, tmp_path):
        plugins = [scaler_plugin()]
        fit(Witness(), every_step(every_n_steps=3), loader, tmp_path, plugins=plugins)
        assert [row["step"] for row in rows(tmp_path, "latent")] == [2, 5]

    @pytest.mark.parametrize("name", ["encoder", None])
    def test_compiled(self, wide, tmp_path, name):
        module = Auto()
        module.encoder = torch.compile(module.encoder, backend="eager")
        fit(module, every_step(name), wide, tmp_path)
        row, z = rows(tmp_path, "latent")[0], module.kept[0]
        assert row["component"] == name or "last"
        assert_truth(row, z if name else z.relu())

    def test_training_is_the_same(self, wide, tmp_path):
        ends = []
        for callbacks in ([], [every_step(), every_step("encoder")]):
            torch.manual_seed(3)
            module = Auto(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)))
            before = census(module)
            fit(module, callbacks, wide, tmp_path / str(len(callbacks)))
            assert census(module) == before
            ends.append([*(p.detach().clone() for p in module.parameters()), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"module": 3}, TypeError, "`module` must be the name of a module, got 3"),
            ({"pooling": "max"}, ValueError, '`pooling` must be "none" or "mean", got \'max\''),
            ({"max_rows": 1}, ValueError, r"`max_rows` must be at least 2, got 1\."),
            ({"rank_rows": 0}, ValueError, r"`rank_rows` must be at least 2, got 0\."),
        ],
    )
    def test_errors(self, arguments, error, message):
        with pytest.raises(error, match=message):
            LatentStats(**arguments)

    def test_an_error_ends_it_alone(self, wide, tmp_path, monkeypatch):
        home = "lightning_diag.callbacks.latent_stats.latent_values"
        monkeypatch.setattr(home, lambda *_: 1 / 0)
        with pytest.warns(RuntimeWarning, match="LatentStats has ended and training goes on"):
            trainer = fit(Auto(), LatentStats(every_n_steps=1), wide, tmp_path)
        assert trainer.global_step == 3


class TestOutput:
    def test_the_cosine_of_what_the_last_layer_gives(self, wide, tmp_path):
        class Known(Auto):
            def training_step(self, batch, batch_idx):
                y = self.last(self.encoder(batch[0]))
                self.kept.append(y.detach().double())
                return y.square().mean()

        module = Known()
        fit(module, every_step(), wide, tmp_path)
        row, y = rows(tmp_path, "latent")[0], module.kept[0]
        cosines = F.normalize(y, dim=1) @ F.normalize(y, dim=1).T
        off = cosines[~torch.eye(len(y), dtype=torch.bool)]
        assert row["output_features"] == 2
        assert row["output_cosine"] == pytest.approx(float(off.mean()), abs=1e-6)

    def test_what_is_written_over_is_not_known(self, wide, tmp_path):
        class Overwrites(Auto):
            def training_step(self, batch, batch_idx):
                return self.last(self.encoder(batch[0])).mul_(2.0).square().mean()

        fit(Overwrites(), every_step(), wide, tmp_path)
        assert "output_cosine" not in rows(tmp_path, "latent")[0]

    def test_a_named_module_has_none(self, wide, tmp_path):
        fit(Auto(), every_step("encoder"), wide, tmp_path)
        assert "output_cosine" not in rows(tmp_path, "latent")[0]
