"""Is every number of GradientHealth's rows true, in every way in which Lightning can train?"""

import math

import pytest
import torch
from torch import nn

from lightning_diag import GradientHealth
from tests.callbacks.witness import (
    PARTS,
    NoAutocast,
    Witness,
    assert_rows,
    fit,
    rows,
    scaler_plugin,
)
from tests.conftest import Halving


def every_step(**arguments: object) -> GradientHealth:
    return GradientHealth(every_n_steps=1, on_error="raise", **arguments)


class Fused(NoAutocast):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=True)


class TestKnownAnswer:
    def test_the_gradient_of_halving_is_its_weight(self, loader, tmp_path):
        module = Halving(lr=0.1)
        start = {name: p.detach().double().clone() for name, p in module.named_parameters()}
        fit(module, every_step(), loader, tmp_path)
        squares = {
            part: sum(p.square().sum().item() for n, p in start.items() if n.startswith(part))
            for part in ("encoder", "head")
        }
        for row in rows(tmp_path, component=None):
            # each step multiplies every weight, and so every gradient, by 0.9
            factor = 0.9 ** row["step"]
            assert row["global_norm"] == pytest.approx(
                factor * math.sqrt(sum(squares.values())), rel=1e-5
            )
        for part, square in squares.items():
            for row in rows(tmp_path, component=part):
                factor = 0.9 ** row["step"]
                assert row["l2"] == pytest.approx(factor * math.sqrt(square), rel=1e-5)
                assert row["share"] == pytest.approx(square / sum(squares.values()), rel=1e-5)


class TestModes:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"precision": "bf16-mixed"},
            {"precision": "bf16-true"},
            {"precision": "64-true"},
            {"gradient_clip_val": 0.1},
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
            {"plugins": "scaler"},
            {"plugins": "scaler", "gradient_clip_val": 0.1},
        ],
        ids=str,
    )
    def test_every_number_is_that_of_the_gradients(self, loader, tmp_path, arguments):
        if "plugins" in arguments:
            arguments = arguments | {"plugins": [scaler_plugin()]}
        witness = Witness()
        fit(witness, every_step(zeros_every=1), loader, tmp_path, **arguments)
        assert len(witness.seen) == 8
        assert_rows(tmp_path, witness, list(range(8)))
        assert all("zeros" in row for row in rows(tmp_path) if row["count"])

    def test_accumulation_with_a_short_last_window(self, loader, tmp_path):
        witness = Witness()
        fit(witness, every_step(), loader, tmp_path, accumulate_grad_batches=3)
        assert len(witness.seen) == 3
        assert_rows(tmp_path, witness, [0, 1, 2])

    def test_accumulation_over_two_epochs_with_a_scaler(self, loader, tmp_path):
        witness = Witness()
        arguments = {"accumulate_grad_batches": 3, "max_epochs": 2, "plugins": [scaler_plugin()]}
        fit(
            witness,
            GradientHealth(every_n_steps=2, on_error="raise"),
            loader,
            tmp_path,
            **arguments,
        )
        assert_rows(tmp_path, witness, [1, 3, 5])
        assert [row["epoch"] for row in rows(tmp_path, component=None)] == [0, 1, 1]

    def test_compiled_inner_net(self, loader, tmp_path):
        witness = Witness()
        witness.encoder = torch.compile(witness.encoder, backend="aot_eager")
        fit(witness, every_step(), loader, tmp_path)
        for seen in witness.seen:
            seen["gradients"] = {
                name.replace("_orig_mod.", ""): g for name, g in seen["gradients"].items()
            }
            seen["trainable"] |= dict.fromkeys(seen["gradients"], True)
            seen["trainable"] |= {"still.weight": False, "still.bias": False}
        assert_rows(tmp_path, witness, list(range(8)))

    def test_lbfgs_is_measured_once_a_step(self, loader, tmp_path):
        class Curved(Witness):
            def configure_optimizers(self):
                parameters = [*self.encoder.parameters(), *self.head.parameters()]
                return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)

        witness = Curved()
        fit(witness, every_step(), loader, tmp_path)
        assert len(witness.seen) > 8
        first = {seen["step"]: seen for seen in reversed(witness.seen)}
        witness.seen = list(first.values())
        assert_rows(tmp_path, witness, list(range(8)))

    def test_frozen_left_out_of_the_optimizer_are_counted_all_the_same(self, loader, tmp_path):
        class Chosen(Witness):
            def configure_optimizers(self):
                return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)

        fit(Chosen(), every_step(), loader, tmp_path)
        fit(Witness(lr=0.1), every_step(), loader, tmp_path / "all")
        for folder in (tmp_path, tmp_path / "all"):
            frozen = {row["component"]: row["frozen"] for row in rows(folder, step=0)}
            assert frozen == {"encoder": 0, "head": 0, "still": 2, "idle": 0, None: 2}
            missing = {row["component"]: row["missing"] for row in rows(folder, step=0)}
            assert missing == {"encoder": 0, "head": 0, "still": 0, "idle": 2, None: 2}

    def test_tied_weights_count_once(self, loader, tmp_path):
        class Tied(Witness):
            def __init__(self):
                super().__init__()
                self.again = nn.Linear(4, 4)
                self.again.weight = self.encoder[2].weight

            def loss(self, x):
                return super().loss(x) + self.again(self.encoder(x)).square().mean()

        witness = Tied()
        fit(witness, every_step(), loader, tmp_path)
        assert_rows(tmp_path, witness, list(range(8)), PARTS | {"again": "again"})
        whole = rows(tmp_path, step=0, component=None)[0]
        assert whole["count"] == sum(p.numel() for p in witness.parameters()) - 6 - 9
        assert any("tied" in note["message"] for note in rows(tmp_path, "notes"))

    def test_sparse_embedding(self, loader, tmp_path):
        class Sparse(Witness):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(20, 4, sparse=True)

            def loss(self, x):
                index = (x[:, 0].abs() * 3).long().clamp(max=19)
                return self.head(self.encoder(x) + self.table(index)).square().mean()

        witness = Sparse()
        fit(witness, every_step(zeros_every=1), loader, tmp_path)
        assert_rows(tmp_path, witness, list(range(8)), PARTS | {"table": "table"})
        assert all(row["zeros"] > 0.5 for row in rows(tmp_path, component="table"))

    def test_no_gradient_at_all_when_training_step_gives_none(self, loader, tmp_path):
        class Pausing(Witness):
            def training_step(self, batch, batch_idx):
                return None if batch_idx in (2, 5) else super().training_step(batch, batch_idx)

        witness = Pausing()
        fit(witness, every_step(), loader, tmp_path)
        assert_rows(tmp_path, witness, list(range(8)))
        pause = rows(tmp_path, step=2, component=None)[0]
        assert pause["count"] == pause["tensors"] == 0
        assert pause["missing"] == 8
        assert pause["dominant"] is None


class TestScaler:
    def test_rows_equal_those_of_the_unscaled_run(self, loader, tmp_path):
        fit(NoAutocast(), every_step(), loader, tmp_path / "plain")
        fit(NoAutocast(), every_step(), loader, tmp_path / "scaled", plugins=[scaler_plugin()])
        same_rows(tmp_path / "plain", tmp_path / "scaled")
        whole = rows(tmp_path / "scaled", component=None)
        assert {(row["scale"], row["skipped"], row["skipped_total"]) for row in whole} == {
            (1024.0, 0, 0)
        }
        assert "scale" not in rows(tmp_path / "plain", component=None)[0]

    def test_fused_optimizer_that_unscales_itself(self, loader, tmp_path):
        witness = Fused()
        fit(Fused(), every_step(histogram=True), loader, tmp_path / "plain")
        arguments = {"plugins": [scaler_plugin()]}
        fit(witness, every_step(histogram=True), loader, tmp_path / "scaled", **arguments)
        assert_rows(tmp_path / "scaled", witness, list(range(8)))
        assert witness.seen[0]["divisor"] == 1024.0
        same_rows(tmp_path / "plain", tmp_path / "scaled")
        same_rows(tmp_path / "plain", tmp_path / "scaled", "grad_histogram")

    @pytest.mark.parametrize("kind", [NoAutocast, Fused])
    @pytest.mark.parametrize("every", [1, 3])
    def test_an_overflow_is_a_skipped_step(self, loader, tmp_path, kind, every):
        witness = kind(loss_scales={2: 1e37, 4: 1e37})
        health = GradientHealth(every_n_steps=every, on_error="raise")
        fit(witness, health, loader, tmp_path, plugins=[scaler_plugin()])
        assert_rows(tmp_path, witness, list(range(every - 1, 8, every)))
        whole = {row["step"]: row for row in rows(tmp_path, component=None)}
        skipped = {step: int(step in (2, 4)) for step in whole}
        assert {step: row["skipped"] for step, row in whole.items()} == skipped
        scales = {step: 1024 / 2 ** sum(bad < step for bad in (2, 4)) for step in whole}
        assert {step: row["scale"] for step, row in whole.items()} == scales
        assert whole[2]["nonfinite"] > 0
        assert whole[2]["has_inf"] or whole[2]["has_nan"]
        # counted from the steps that were really made, where the optimizer lets that be seen
        seen = [bad for bad in (2, 4) if kind is NoAutocast or bad in whole]
        totals = {step: sum(bad <= step for bad in seen) for step in whole}
        assert {step: row["skipped_total"] for step, row in whole.items()} == totals

    def test_a_pause_is_not_a_skipped_step(self, loader, tmp_path):
        class Pausing(NoAutocast):
            def training_step(self, batch, batch_idx):
                return None if batch_idx == 2 else super().training_step(batch, batch_idx)

        fit(Pausing(), every_step(), loader, tmp_path, plugins=[scaler_plugin()])
        assert {row["skipped_total"] for row in rows(tmp_path, component=None)} == {0}


def same_rows(first, second, prefix="grad"):
    one, other = rows(first, prefix), rows(second, prefix)
    assert len(one) == len(other) > 0
    for row, match in zip(one, other, strict=True):
        for key in row.keys() - {"time", "attempt"}:
            want = row[key]
            if isinstance(want, float):
                # the scale is a power of two: only the rounding of each step's own may differ
                want = pytest.approx(want, rel=1e-5, abs=1e-9)
            assert match[key] == want, (row["step"], key)


class TestNonFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
    def test_is_counted_named_and_kept_out_of_the_norm(self, loader, tmp_path, bad, precision):
        class Broken(Witness):
            def on_after_backward(self):
                if self.trainer.global_step == 3:
                    self.encoder[2].weight.grad[1, 2] = bad
                    self.encoder[2].bias.grad[0] = bad

        witness = Broken()
        fit(witness, every_step(), loader, tmp_path, precision=precision, max_steps=4)
        assert_rows(tmp_path, witness, [0, 1, 2, 3])
        whole = rows(tmp_path, step=3, component=None)[0]
        assert whole["nonfinite"] == 2
        assert math.isfinite(whole["global_norm"])
        assert whole["global_norm"] > 0
        assert (whole["has_nan"], whole["has_inf"]) == ((1, 0) if math.isnan(bad) else (0, 1))
        assert whole["first_nonfinite"] == "encoder.2.weight"
        assert rows(tmp_path, step=3, component="head")[0]["nonfinite"] == 0
        assert "first_nonfinite" not in rows(tmp_path, step=2, component=None)[0]

    def test_huge_and_tiny_gradients_are_measured_exactly(self, loader, tmp_path):
        witness = Witness(lr=0.0, loss_scales={0: 1e-22, 1: 1e25, 2: 1e-36})
        fit(witness, every_step(), loader, tmp_path)
        assert_rows(tmp_path, witness, list(range(8)))
        norms = [row["global_norm"] for row in rows(tmp_path, component=None)]
        assert norms[0] < 1e-20
        assert norms[1] > 1e24
        assert 0 < norms[2] < 1e-33


class TestClipping:
    @pytest.mark.parametrize("limit", [0.05, 1.0, 100.0])
    @pytest.mark.parametrize("algorithm", ["norm", "value"])
    def test_coefficient_is_the_factor_that_was_applied(self, loader, tmp_path, limit, algorithm):
        witness = Witness()
        arguments = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
        fit(witness, every_step(), loader, tmp_path, **arguments)
        hits = 0
        steps = zip(
            rows(tmp_path, component=None), witness.seen, witness.after_clipping, strict=True
        )
        for number, (row, seen, after) in enumerate(steps, start=1):
            before = torch.cat([g.flatten() for g in seen["gradients"].values() if g is not None])
            clipped = torch.cat(
                [after[n].flatten() for n, g in seen["gradients"].items() if g is not None]
            )
            largest = before.abs().argmax()
            factor = (clipped[largest] / before[largest]).item()
            hits += factor < 1 - 1e-6
            assert row["clip_coefficient"] == pytest.approx(factor, rel=1e-5)
            assert row["clipped"] == int(factor < 1 - 1e-6)
            assert row["clipped_share"] == pytest.approx(hits / number)
            assert (row["clip_algorithm"], row["clip_value"]) == (algorithm, limit)
        assert hits > 0 or limit > 0.05
        assert hits == 0 or limit < 100

    def test_without_clipping_there_is_no_coefficient(self, loader, tmp_path):
        fit(Witness(), every_step(), loader, tmp_path)
        assert not any("clip" in key for row in rows(tmp_path) for key in row)

    def test_a_broken_gradient_has_no_coefficient(self, loader, tmp_path):
        witness = Witness(loss_scales={0: math.nan})
        fit(witness, every_step(), loader, tmp_path, gradient_clip_val=1.0, max_steps=1)
        row = rows(tmp_path, component=None)[0]
        assert row["clip_coefficient"] is None
        assert row["clipped"] == 0
        assert row["clipped_share"] is None
