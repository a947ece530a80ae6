"""Does BlobMetrics measure the pairs it was asked for, when it was asked to?"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_diag import read_run
from lightning_diag.callbacks.blob_metrics import BlobMetrics
from lightning_diag.functional.blob_metrics import blob_metrics
from lightning_diag.lightning import Callback, LightningModule
from tests.callbacks.witness import fit, rows, scaler_plugin

H, D = 60, 100
SEED_KEYS = {
    *("weight_correlation", "encoder_std", "decoder_std", "encoder_mean", "decoder_mean"),
    *("n_clusters_dbscan", "silhouette_score", "cluster_centers", "n_noise_points"),
    *("computation_time_ms", "n_pairs_analyzed"),
}


class Denoiser(LightningModule):
    """Three blobs of 2 % in its pairs, which shrink by a tenth at each step."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        kind = rng.choice([0, 1, -1], (H, D), p=[0.96, 0.02, 0.02])
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.fc1 = nn.Linear(D, H)
            self.fc2 = nn.Linear(H, D)
            self.small = nn.Linear(3, 2)
        encoder = 1.42 * kind + rng.normal(0, 0.09, (H, D))
        decoder = 0.11 * kind + rng.normal(0, 0.012, (H, D))
        self.fc1.weight.data = torch.from_numpy(encoder).float()
        self.fc2.weight.data = torch.from_numpy(decoder.T.copy()).float()
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            loss = sum(p.float().square().sum() / 2 for p in self.parameters())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train/scaled_loss", 2 * loss.detach(), on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def pairs(self) -> Tensor:
        return torch.stack([self.fc1.weight.flatten(), self.fc2.weight.t().flatten()], 1).detach()


class Keeper(Callback):
    """The pairs after each epoch and each step."""

    def __init__(self) -> None:
        self.epochs: list[Tensor] = []
        self.steps: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer, module, *_: object) -> None:
        self.steps[trainer.global_step - 1] = module.pairs().clone()

    def on_train_epoch_end(self, trainer, module) -> None:
        self.epochs.append(module.pairs().clone())


def blobs(**arguments: object) -> BlobMetrics:
    return BlobMetrics(**{"on_error": "raise", "sample_size": H * D, **arguments})


def results(path: Path) -> dict:
    return json.loads((path / "results.json").read_text())


def notes(path: Path) -> list[str]:
    return [one["message"] for one in rows(path, "notes") if one["diagnostic"] == "BlobMetrics"]


class TestEpochs:
    def test_every_number_of_all_pairs(self, loader, tmp_path):
        keeper = Keeper()
        diagnostic = blobs(pairs={"net": ["fc1.weight", "fc2.weight"]})
        fit(Denoiser(), [keeper, diagnostic], loader, tmp_path, max_epochs=2)
        found = rows(tmp_path, "blob")
        assert [(row["step"], row["epoch"]) for row in found] == [(7, 0), (15, 1)]
        for row, pairs in zip(found, keeper.epochs, strict=True):
            want = blob_metrics(pairs)
            assert row["component"] == "net"
            assert (row["encoder"], row["decoder"]) == ("fc1.weight", "fc2.weight")
            assert row["weight_correlation"] == pytest.approx(np.corrcoef(pairs.T)[0, 1], rel=1e-5)
            means, stds = pairs.double().mean(0), pairs.double().std(0, correction=0)
            assert row["encoder_mean"] == pytest.approx(means[0].item())
            assert row["decoder_std"] == pytest.approx(stds[1].item())
            assert row["n_clusters_dbscan"] == 3
            assert row["silhouette_score"] == want.silhouette > 0.8
            assert row["cluster_centers"] == want.centers
            assert row["cluster_stds"] == want.stds
            assert row["cluster_shares"] == [size / (H * D) for size in want.sizes]
            assert row["n_noise_points"] == want.noise == round(row["noise_share"] * H * D)
            assert row["n_pairs_analyzed"] == row["n_pairs"] == H * D
            assert row["nonfinite"] == 0
            assert row["computation_time_ms"] > 0
            assert row["min_samples"] == round(0.0045 * H * D)
        # the factor of 0.9 a step, eight times
        ratio = found[1]["encoder_std"] / found[0]["encoder_std"]
        assert ratio == pytest.approx(0.9**8, rel=1e-5)

    def test_a_pair_is_found_and_said(self, loader, tmp_path):
        fit(Denoiser(), blobs(), loader, tmp_path)
        assert [row["component"] for row in rows(tmp_path, "blob")] == ["encoder_decoder"]
        assert notes(tmp_path) == ["pairs `fc1.weight` with `fc2.weight`."]

    def test_a_sample_is_drawn_anew_and_the_same_again(self, loader, tmp_path):
        for name in ("one", "again", "other"):
            diagnostic = blobs(sample_size=500, seed=1 + (name == "other"))
            fit(Denoiser(lr=0.0), diagnostic, loader, tmp_path / name, max_epochs=2)
        one, again, other = (
            [row["encoder_mean"] for row in rows(tmp_path / name, "blob")]
            for name in ("one", "again", "other")
        )
        assert one == again
        assert len({*one, *other}) == 4
        assert rows(tmp_path / "one", "blob")[0]["n_pairs_analyzed"] == 500

    def test_every_second_epoch_and_the_progress(self, loader, tmp_path):
        diagnostic = blobs(every_n_epochs=2, adaptive=True, sample_size=2500)
        fit(Denoiser(), diagnostic, loader, tmp_path, max_epochs=10)
        found = rows(tmp_path, "blob")
        assert [row["epoch"] for row in found] == [1, 3, 5, 7, 9]
        assert [row["n_pairs_analyzed"] for row in found] == [2000, 2500, 2500, 2500, 5000]
        history = results(tmp_path)["training_history"]
        assert ["diagnostics" in entry for entry in history] == [False, True] * 5

    def test_nonfinite_weights(self, loader, tmp_path):
        module = Denoiser(lr=0.0)
        module.fc1.weight.data[3, 4], module.fc2.weight.data[5, 6] = math.nan, math.inf
        fit(module, blobs(), loader, tmp_path)
        (row,) = rows(tmp_path, "blob")
        assert (row["nonfinite"], row["n_pairs_analyzed"]) == (2, H * D - 2)
        assert row["n_clusters_dbscan"] == 3

    @pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
    def test_precisions(self, loader, tmp_path, precision):
        fit(Denoiser(), blobs(), loader, tmp_path, precision=precision)
        assert rows(tmp_path, "blob")[0]["n_clusters_dbscan"] == 3

    def test_compiled_parts_have_their_own_names(self, loader, tmp_path):
        module = Denoiser()
        module.fc1 = torch.compile(module.fc1, backend="eager")
        fit(module, blobs(pairs={"net": ["fc1.weight", "fc2.weight"]}), loader, tmp_path)
        assert rows(tmp_path, "blob")[0]["encoder"] == "fc1.weight"

    def test_presets_and_methods(self, loader, tmp_path):
        for name, arguments in {"seed": {"preset": "seed"}, "h": {"method": "hdbscan"}}.items():
            fit(Denoiser(lr=0.0), blobs(**arguments), loader, tmp_path / name)
        (seed,), (hierarchy,) = (rows(tmp_path / name, "blob") for name in ("seed", "h"))
        assert (seed["scale"], seed["eps"], seed["min_samples"]) == ("none", 0.1, 50)
        assert (hierarchy["method"], hierarchy["eps"]) == ("hdbscan", None)
        assert hierarchy["n_clusters_dbscan"] == 3


class TestSteps:
    def test_also_after_every_third_step(self, loader, tmp_path):
        keeper = Keeper()
        fit(Denoiser(), [keeper, blobs(every_n_steps=3)], loader, tmp_path, max_epochs=2)
        found = {row["step"]: row for row in rows(tmp_path, "blob")}
        assert list(found) == [2, 5, 7, 8, 11, 14, 15]
        for step, row in found.items():
            want = keeper.steps[step].double().std(0, correction=0)
            assert row["encoder_std"] == pytest.approx(want[0].item())

    def test_a_step_at_the_end_of_an_epoch_is_measured_once(self, loader, tmp_path):
        fit(Denoiser(), blobs(every_n_steps=4), loader, tmp_path)
        assert [row["step"] for row in rows(tmp_path, "blob")] == [3, 7]
        assert results(tmp_path)["training_history"][0]["diagnostics"]["n_clusters_dbscan"] == 3

    @pytest.mark.parametrize(
        "arguments", [{"accumulate_grad_batches": 3}, {"plugins": "scaler"}], ids=str
    )
    def test_accumulation_and_scaler(self, loader, tmp_path, arguments):
        if "plugins" in arguments:
            arguments = {"plugins": [scaler_plugin()]}
        diagnostic = blobs(every_n_steps=2, every_n_epochs=None)
        fit(Denoiser(lr=0.01), diagnostic, loader, tmp_path, **arguments)
        steps = [1] if "accumulate_grad_batches" in arguments else [1, 3, 5, 7]
        assert [row["step"] for row in rows(tmp_path, "blob")] == steps

    def test_manual_optimization(self, loader, tmp_path):
        class Manual(Denoiser):
            automatic_optimization = False

            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(self.fc1.weight.square().sum())
                    optimizer.step()

            def configure_optimizers(self):
                return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(2)]

        fit(Manual(), blobs(every_n_steps=4), loader, tmp_path, max_epochs=2)
        assert [row["step"] for row in rows(tmp_path, "blob")] == [3, 7, 11, 15]


class TestPoints:
    def test_of_powers_of_two_and_the_last(self, loader, tmp_path):
        module = Denoiser()
        fit(module, blobs(keep_points=90), loader, tmp_path, max_epochs=7)
        found = rows(tmp_path, "blob_sample")
        assert [row["epoch"] for row in found] == [0, 1, 3, 6]
        last = found[-1]
        assert last["component"] == "encoder_decoder"
        assert len(last["encoder"]) == len(last["decoder"]) == len(last["cluster"]) <= 90
        assert {0, 1, 2} <= set(last["cluster"])
        there = module.pairs().double()
        for x, y in zip(last["encoder"], last["decoder"], strict=True):
            apart = (there - torch.tensor([x, y])).abs().amax(1).min()
            assert apart < 1e-4

    def test_none(self, loader, tmp_path):
        fit(Denoiser(), blobs(keep_points=0), loader, tmp_path)
        assert "blob_sample" not in read_run(tmp_path).prefixes


class TestSilence:
    def test_an_unknown_name_has_its_nearest(self, loader, tmp_path):
        pairs = {"net": ["fc1.wieght", "fc2.weight"], "good": ["fc1.weight", "fc2.weight"]}
        with pytest.warns(UserWarning, match="did you mean `fc1.weight`"):
            fit(Denoiser(), BlobMetrics(pairs), loader, tmp_path)
        (note,) = notes(tmp_path)
        assert note == (
            "Pair `net` names `fc1.wieght`, which is no parameter; did you mean `fc1.weight`?"
        )
        assert [row["component"] for row in rows(tmp_path, "blob")] == ["good"]

    def test_raised_if_asked_for(self, loader, tmp_path):
        with pytest.raises(ValueError, match=r"which is no parameter; did you mean `fc1\.weight`"):
            fit(Denoiser(), blobs(pairs={"net": ["fc1.wieght", "fc2.weight"]}), loader, tmp_path)

    def test_shapes_that_do_not_fit(self, loader, tmp_path):
        with pytest.warns(UserWarning, match=r"must be \(h, d\) and \(d, h\), got \(60, 100\)"):
            fit(Denoiser(), BlobMetrics({"n": ["fc1.weight", "small.bias"]}), loader, tmp_path)
        assert "blob" not in read_run(tmp_path).prefixes

    def test_no_pair_at_all(self, loader, tmp_path):
        class Lone(Denoiser):
            def __init__(self):
                super().__init__()
                self.fc2 = self.small

        with pytest.warns(UserWarning, match="no two linear layers fit one another"):
            fit(Lone(), BlobMetrics(), loader, tmp_path)
        assert any("no two linear layers" in note for note in notes(tmp_path))
        # the history goes on without
        assert "diagnostics" not in results(tmp_path)["training_history"][0]


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"pairs": {}}, "`pairs` must name at least one pair, or be None to find one."),
            ({"pairs": {"a": ["x"]}}, r"Pair `a` must be the names of an encoder and a decoder"),
            ({"pairs": {"a": "xy"}}, r"weight, got 'xy'\."),
            ({"pairs": {"": ["x", "y"]}}, "A pair must have a name, got ''."),
            ({"every_n_epochs": 0}, "`every_n_epochs` must be at least 1 or None, got 0."),
            ({"every_n_epochs": None}, "`every_n_steps` must be given where `every_n_epochs`"),
            ({"every_n_steps": 0}, '`every_n_steps` must be at least 1 or "auto", got 0.'),
            ({"sample_size": 1}, "`sample_size` must be at least 2, got 1."),
            ({"keep_points": -1}, "`keep_points` must be at least 0, got -1."),
            ({"preset": "best"}, "`preset` must be one of robust, seed, got 'best'."),
            ({"eps": -1}, "`eps` must be above 0, got -1."),
        ],
    )
    def test_bad_values(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            BlobMetrics(**arguments)

    def test_pairs_of_another_kind(self):
        with pytest.raises(TypeError, match=r"`pairs` must map names to two parameters, got \['a"):
            BlobMetrics(["a", "b"])


class TestHarmless:
    def test_training_is_the_same_to_the_last_bit(self, loader, tmp_path):
        class Noisy(Denoiser):
            def training_step(self, batch, batch_idx):
                # every generator that a diagnostic could have moved
                factor = 1 + torch.rand(()) + float(np.random.rand())
                return factor * super().training_step(batch, batch_idx)

        ends = []
        for callbacks in ([], [blobs(every_n_steps=2, sample_size=300, method="hdbscan")]):
            torch.manual_seed(3)
            np.random.seed(3)
            module = Noisy(lr=0.01)
            fit(module, callbacks, loader, tmp_path / str(len(callbacks)), max_epochs=2)
            ends.append([*module.parameters(), torch.get_rng_state()])
        assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))

    def test_a_full_disk_costs_the_file_alone(self, loader, tmp_path):
        (tmp_path / "results.json").mkdir()
        with pytest.warns(UserWarning, match=r"results\.json cannot be written"):
            fit(Denoiser(), blobs(), loader, tmp_path, max_epochs=3)
        assert len(rows(tmp_path, "blob")) == 3
        assert sum("results.json" in note for note in notes(tmp_path)) == 1

    def test_without_a_run_to_write_to(self, loader, tmp_path):
        trainer = fit(Denoiser(), blobs(), loader, tmp_path, logger=[], fast_dev_run=2)
        assert trainer.callback_metrics["blob/encoder_decoder/n_clusters_dbscan"] == 3

    def test_scalars(self, loader, tmp_path):
        trainer = fit(Denoiser(), blobs(), loader, tmp_path, max_epochs=2)
        names = {name for name in trainer.callback_metrics if name.startswith("blob/")}
        start = "blob/encoder_decoder/"
        assert names == {start + key for key in BlobMetrics.logged}
