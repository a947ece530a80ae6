"""Are UpdateRatio's rows what the optimizer really did, and does it see what does not move?"""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from lightning_diag.callbacks.update_ratio import UpdateRatio
from lightning_diag.lightning import Callback, LightningModule
from tests.callbacks.witness import NoAutocast, Witness, fit, lightning, rows, scaler_plugin
from tests.conftest import Halving

PARTS = ("encoder", "head", "still", "idle")


def every_step(**arguments: object) -> UpdateRatio:
    return UpdateRatio(every_n_steps=1, on_error="raise", **arguments)


class Weights(Callback):
    """Keeps the weights after each batch: between two of them lies what the optimizer did."""

    def __init__(self) -> None:
        self.kept = []

    def on_train_start(self, trainer, module):
        self.kept.append({n: p.detach().clone() for n, p in module.named_parameters()})
        self.gradients = []

    def on_train_batch_end(self, trainer, module, *_):
        self.kept.append({n: p.detach().clone() for n, p in module.named_parameters()})
        self.gradients.append({n for n, p in module.named_parameters() if p.grad is not None})


def l2(tensors):
    return math.sqrt(sum(x.double().square().sum().item() for x in tensors))


def assert_truth(path, weights, batches):
    """Every row says what the weights before and after these batches say."""
    for step, batch in enumerate(batches):
        before, after = weights.kept[batch], weights.kept[batch + 1]
        for part in (*PARTS, None):
            own = [
                name
                for name in before
                if name in weights.gradients[batch] and (part is None or name.startswith(part))
            ]
            (row,) = rows(path, "update", step=step, component=part)
            dw = [(after[n].double() - before[n].double()).flatten() for n in own]
            assert row["tensors"] == len(own)
            assert row["count"] == sum(x.numel() for x in dw)
            if not own:
                assert row["ratio"] is None
                continue
            together = torch.cat(dw)
            size = l2(before[n] for n in own)
            assert row["update_l2"] == pytest.approx(l2(dw), rel=1e-5)
            assert row["weight_l2"] == pytest.approx(size, rel=1e-5)
            assert row["ratio"] == pytest.approx(l2(dw) / size, rel=1e-5)
            assert row["update_max"] == pytest.approx(together.abs().max().item(), rel=1e-5)
            assert row["update_rms"] == pytest.approx(l2(dw) / math.sqrt(len(together)), rel=1e-5)
            assert row["unchanged_share"] == (together == 0).double().mean().item()
            assert row["nonfinite"] == 0
            assert row["unchanged"] == 0


class TestKnownAnswer:
    def test_gradient_descent_on_halving_moves_every_weight_by_the_rate(self, loader, tmp_path):
        fit(Halving(lr=0.1), every_step(), loader, tmp_path)
        found = rows(tmp_path, "update")
        assert len(found) == 8 * 3
        for row in found:
            assert row["ratio"] == pytest.approx(0.1, rel=1e-5)
            assert row["lr"] == 0.1
            assert row["never_changed"] == 0
            assert row.get("skipped", 0) == 0

    def test_scalars_reach_the_trainer(self, loader, tmp_path):
        trainer = fit(Halving(lr=0.1), every_step(), loader, tmp_path)
        assert trainer.callback_metrics["update/encoder/ratio"] == pytest.approx(0.1)
        assert trainer.callback_metrics["update/ratio"] == pytest.approx(0.1)


class Adam(Witness):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class Fused(NoAutocast):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=True)


class TestModes:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"precision": "bf16-mixed"},
            {"precision": "64-true"},
            {"gradient_clip_val": 0.01},
            {"plugins": "scaler"},
        ],
        ids=str,
    )
    def test_every_number_is_that_of_the_weights(self, loader, tmp_path, arguments):
        if "plugins" in arguments:
            arguments = {"plugins": [scaler_plugin()]}
        weights = Weights()
        fit(Adam(), [every_step(), weights], loader, tmp_path, **arguments)
        assert_truth(tmp_path, weights, range(8))

    def test_accumulation(self, loader, tmp_path):
        weights = Weights()
        fit(Adam(), [every_step(), weights], loader, tmp_path, accumulate_grad_batches=3)
        assert_truth(tmp_path, weights, [2, 5, 7])

    def test_interval(self, loader, tmp_path):
        fit(Adam(), UpdateRatio(every_n_steps=3, on_error="raise"), loader, tmp_path)
        assert sorted({row["step"] for row in rows(tmp_path, "update")}) == [2, 5]

    def test_line_search_is_one_step(self, loader, tmp_path):
        class Search(Witness):
            def configure_optimizers(self):
                used = [*self.encoder.parameters(), *self.head.parameters()]
                return torch.optim.LBFGS(used, lr=0.1, max_iter=4)

        weights = Weights()
        fit(Search(), [every_step(), weights], loader, tmp_path)
        for step in range(8):
            (row,) = rows(tmp_path, "update", step=step, component=None)
            before, after = weights.kept[step], weights.kept[step + 1]
            assert row["update_l2"] == pytest.approx(
                l2(after[n] - before[n] for n in before), rel=1e-4
            )

    def test_several_optimizers(self, loader, tmp_path):
        class Two(Witness):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                for optimizer in self.optimizers():
                    for _ in range(2):
                        optimizer.zero_grad()
                        self.manual_backward(self.loss(batch[0]))
                        optimizer.step()

            def configure_optimizers(self):
                return [
                    torch.optim.SGD(self.encoder.parameters(), lr=0.05),
                    torch.optim.SGD(self.head.parameters(), lr=0.01),
                ]

        trainer = fit(Two(), every_step(), loader, tmp_path, max_steps=32)
        found = rows(tmp_path, "update")
        assert {(row["optimizer"], row["component"]) for row in found} == {
            *((0, "encoder"), (0, None), (1, "head"), (1, None))
        }
        assert {row["lr"] for row in found if row["optimizer"] == 1} == {0.01}
        assert not any(row.get("skipped") for row in found)
        assert all(not optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)

    def test_rate_in_a_tensor(self, loader, tmp_path):
        class Tensors(Witness):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=torch.tensor(0.25))

        fit(Tensors(), every_step(), loader, tmp_path)
        assert {row["lr"] for row in rows(tmp_path, "update", component="head")} == {0.25}


class Overflowing:
    """Gradients that are not finite at the third batch, for the scaler to throw away."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (math.inf if batch_idx == 2 else 1)


class TestSkipped:
    @pytest.mark.parametrize("base", [NoAutocast, Fused])
    def test_a_step_that_the_scaler_skipped_has_no_ratio(self, loader, tmp_path, base):
        module = type("Module", (Overflowing, base), {})()
        fit(module, every_step(), loader, tmp_path, plugins=[scaler_plugin()])
        whole = rows(tmp_path, "update", component=None)
        assert [row["skipped"] for row in whole] == [int(i == 2) for i in range(8)]
        skipped = next(row for row in whole if row["skipped"])
        assert "ratio" not in skipped
        assert skipped["lr"] == 0.05
        assert all(row["never_changed"] == 0 for row in whole if not row["skipped"])
        assert {row["step"] for row in rows(tmp_path, "update", component="head")} == {
            *(0, 1, 3, 4, 5, 6, 7)
        }

    def test_no_loss_no_step(self, loader, tmp_path):
        class Sometimes(Witness):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                return None if batch_idx == 0 else loss

        fit(Sometimes(), every_step(), loader, tmp_path)
        first, *others = rows(tmp_path, "update", component=None)
        assert first["tensors"] == 0
        assert first["ratio"] is None
        assert all(row["ratio"] for row in others)

    @pytest.mark.parametrize("optimizer", [None, "empty"])
    def test_nothing_to_learn(self, loader, tmp_path, optimizer):
        class Bare(Witness):
            def training_step(self, batch, batch_idx):
                return None

            def configure_optimizers(self):
                return optimizer and torch.optim.SGD([{"params": []}], lr=0.1)

        fit(Bare(), every_step(), loader, tmp_path)
        assert rows(tmp_path, "update") == []
        said = [row for row in rows(tmp_path, "notes") if "no parameters" in row["message"]]
        assert [row["severity"] for row in said] == ["info"]

    def test_weights_that_become_nan_are_no_skipped_step(self, loader, tmp_path):
        fit(Witness(loss_scales={2: math.nan}), every_step(), loader, tmp_path)
        row = rows(tmp_path, "update", component=None, step=2)[0]
        assert row["skipped"] == 0
        assert row["nonfinite"] == row["count"]


class Fine(LightningModule):
    """One weight that moves, and one whose updates are lost in its own rounding."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.moves = nn.ParameterList([nn.Parameter(torch.zeros(3))])
        self.stays = nn.ParameterList([nn.Parameter(torch.full((4,), 100.0))])
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return self.moves[0].sum() + 0.01 * self.stays[0].sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class TestUnchanged:
    def test_updates_lost_in_half_precision(self, loader, tmp_path):
        diagnostic = every_step(per_parameter=True)
        fit(Fine(), diagnostic, loader, tmp_path, precision="bf16-true")
        for row in rows(tmp_path, "update", component="stays"):
            assert row["unchanged"] == row["never_changed"] == 1
            assert row["first_never_changed"] == row["first_unchanged"] == "stays.0"
            assert row["unchanged_share"] == 1
            assert row["ratio"] == 0
        for row in rows(tmp_path, "update", component="moves"):
            assert row["unchanged"] == row["never_changed"] == 0
        assert rows(tmp_path, "update", component=None)[-1]["never_changed"] == 1
        parameters = rows(tmp_path, "update_parameter", step=7)
        assert [row["parameter"] for row in parameters] == ["moves.0", "stays.0"]
        assert parameters[1]["update_l2"] == 0

    def test_single_precision_does_not_lose_them(self, loader, tmp_path):
        fit(Fine(), every_step(), loader, tmp_path)
        assert all(row["unchanged"] == 0 for row in rows(tmp_path, "update"))

    def test_a_rate_of_zero_excuses(self, loader, tmp_path):
        fit(Fine(lr=0.0), every_step(), loader, tmp_path)
        for row in rows(tmp_path, "update"):
            assert row["unchanged"] == row["never_changed"] == 0
            assert row["ratio"] in (0, None)

    def test_weights_of_zero_have_no_ratio(self, loader, tmp_path):
        fit(Fine(), every_step(), loader, tmp_path)
        first = rows(tmp_path, "update", component="moves", step=0)[0]
        assert first["ratio"] is None
        assert first["update_l2"] == pytest.approx(0.1 * math.sqrt(3))

    def test_no_gradient_is_no_illness_of_the_update(self, loader, tmp_path):
        class Half(Fine):
            def training_step(self, batch, batch_idx):
                return self.moves[0].sum() + 0 * self.stays[0].sum()

        fit(Half(), every_step(), loader, tmp_path)
        assert all(row["never_changed"] == 0 for row in rows(tmp_path, "update"))

    def test_weight_decay_is_a_change(self, loader, tmp_path):
        class Decay(Fine):
            def training_step(self, batch, batch_idx):
                return self.moves[0].sum() + 1e-30 * self.stays[0].sum()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)

        fit(Decay(), every_step(), loader, tmp_path)
        assert all(row["unchanged"] == 0 for row in rows(tmp_path, "update"))

    def test_one_that_changes_later_is_taken_off(self, loader, tmp_path):
        class Later(Fine):
            def training_step(self, batch, batch_idx):
                return self.moves[0].sum() + (100 if batch_idx > 3 else 0.01) * self.stays[0].sum()

        fit(Later(), every_step(), loader, tmp_path, precision="bf16-true")
        found = rows(tmp_path, "update", component="stays")
        assert [row["never_changed"] for row in found] == [1] * 4 + [0] * 4


class Spike(Halving):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (50 if batch_idx > 5 else 1)


class TestJump:
    def test_a_jump_is_marked_and_noted_once(self, loader, tmp_path):
        fit(Spike(lr=0.01), every_step(), loader, tmp_path)
        whole = rows(tmp_path, "update", component=None)
        assert ["jumped" in row for row in whole] == [False] * 5 + [True] * 3
        assert [row["jumped"] for row in whole[5:]] == [0, 1, 1]
        assert whole[6]["jump"] == pytest.approx(50, rel=0.1)
        said = [row["message"] for row in rows(tmp_path, "notes")]
        assert sum("running median" in message for message in said) == 3
        assert any("of the whole model" in message for message in said)

    def test_the_threshold_is_the_argument(self, loader, tmp_path):
        fit(Spike(lr=0.01), every_step(jump=100), loader, tmp_path)
        assert not any(row.get("jumped") for row in rows(tmp_path, "update"))


class TestMemory:
    def test_it_goes_on_after_resuming(self, loader, tmp_path):
        saver = lightning("callbacks").ModelCheckpoint(tmp_path, filename="it", save_top_k=-1)
        first = every_step()
        arguments = {"precision": "bf16-true", "enable_checkpointing": True}
        fit(Fine(), [first, saver], loader, tmp_path / "a", **arguments)
        second = every_step()
        kept = {}

        class Look(Callback):
            def on_train_start(self, trainer, module):
                kept.update(deepcopy(second.state_dict()))

        path = str(next(tmp_path.glob("*.ckpt")))
        arguments |= {"max_epochs": 2, "ckpt_path": path}
        fit(Fine(), [second, Look()], loader, tmp_path / "b", **arguments)
        assert kept["never"] == {"stays.0": 8}
        assert kept["ever"] == ["moves.0"]
        assert [[*place] for *place, _ in kept["norms"]] == [
            *([None, "moves"], [None, "stays"], [None, None])
        ]
        assert second.state_dict()["never"] == {"stays.0": 16}

    def test_copies_are_given_back(self, loader, tmp_path):
        diagnostic = every_step()
        trainer = fit(Adam(), diagnostic, loader, tmp_path)
        assert not diagnostic._open
        assert not trainer.optimizers[0]._optimizer_step_post_hooks

    def test_no_hook_outlives_its_batch(self, loader, tmp_path):
        hooks = []

        class Look(Callback):
            def on_train_batch_start(self, trainer, *_):
                hooks.append(len(trainer.optimizers[0]._optimizer_step_post_hooks))

        fit(Adam(), [every_step(), Look()], loader, tmp_path)
        assert hooks == [0] * 8

    def test_training_is_the_same(self, loader, tmp_path):
        ends = []
        for callbacks in ([], [every_step(per_parameter=True)]):
            module = Adam()
            fit(module, callbacks, loader, tmp_path / str(len(callbacks)))
            ends.append([p.clone() for p in module.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class TestArguments:
    @pytest.mark.parametrize("jump", [1, 0.5, math.nan])
    def test_jump(self, jump):
        with pytest.raises(ValueError, match="`jump` must be greater than 1, got"):
            UpdateRatio(jump=jump)

    def test_an_error_ends_it_alone(self, loader, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "lightning_diag.callbacks.update_ratio_rows.update_table",
            lambda *_, **__: 1 / 0,
        )
        diagnostic = UpdateRatio(every_n_steps=1)
        with pytest.warns(RuntimeWarning, match="UpdateRatio has ended and training goes on"):
            trainer = fit(Witness(), diagnostic, loader, tmp_path)
        assert trainer.global_step == 8
        assert not diagnostic._open
        assert not trainer.optimizers[0]._optimizer_step_post_hooks
