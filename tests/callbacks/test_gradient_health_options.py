"""Several optimizers, rows by parameter, histograms, zeros, arguments: what a user may ask for."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_diag import Components, GradientHealth
from tests.callbacks.witness import (
    NoAutocast,
    Witness,
    assert_rows,
    fit,
    lightning,
    rows,
    scaler_plugin,
    statistics,
)


def every(steps: int, **arguments: object) -> GradientHealth:
    return GradientHealth(every_n_steps=steps, on_error="raise", **arguments)


class Manual(NoAutocast):
    """Two optimizers; each backward reaches the parameters of both, so the others' are stale."""

    def __init__(self, alternate: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.alternate = alternate

    def training_step(self, batch, batch_idx):
        for place, optimizer in enumerate(self.optimizers()):
            if self.alternate and batch_idx % 2 != place:
                continue
            optimizer.zero_grad()
            loss = self.loss(batch[0])
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss.detach())

    def configure_optimizers(self):
        encoder = torch.optim.SGD(self.encoder.parameters(), lr=0.05)
        return encoder, torch.optim.Adam([*self.head.parameters(), *self.idle.parameters()])


class TestSeveralOptimizers:
    @pytest.mark.parametrize("plugins", [None, "scaler"])
    def test_each_sees_only_its_own_parameters(self, loader, tmp_path, plugins):
        witness = Manual()
        plugins = plugins and [scaler_plugin()]
        fit(witness, every(1), loader, tmp_path, plugins=plugins)
        assert len(witness.seen) == 16
        assert_rows(tmp_path, witness, list(range(8)))
        assert {(row["optimizer"], row["component"]) for row in rows(tmp_path)} == {
            (0, "encoder"),
            (0, None),
            (1, "head"),
            (1, "idle"),
            (1, None),
        }
        for row in rows(tmp_path, component=None):
            assert row["count"] == (36 if row["optimizer"] == 0 else 5)

    def test_every_second_step_measures_all_of_them(self, loader, tmp_path):
        fit(Manual(), every(2), loader, tmp_path)
        found = [(row["step"], row["optimizer"]) for row in rows(tmp_path, component=None)]
        assert found == [(step, index) for step in (1, 3, 5, 7) for index in (0, 1)]

    def test_alternating_optimizers_are_both_measured(self, loader, tmp_path):
        witness = Manual(alternate=True)
        fit(witness, every(2), loader, tmp_path)
        # each one's own second and fourth step: batches 2 and 6 of one, 3 and 7 of the other
        found = [(row["step"], row["optimizer"]) for row in rows(tmp_path, component=None)]
        assert found == [(2, 0), (3, 1), (6, 0), (7, 1)]
        assert_rows(tmp_path, witness, [2, 3, 6, 7])

    @pytest.mark.parametrize("alternate", [False, True])
    def test_steps_are_those_of_lightnings_own_metrics(self, loader, tmp_path, alternate):
        class Exact(Manual):
            def training_step(self, batch, batch_idx):
                super().training_step(batch, batch_idx)
                self.log("batch", float(batch_idx))

        fit(Exact(alternate), every(1), loader, tmp_path)
        logged = {row["step"]: row["batch"] for row in rows(tmp_path, "metrics") if "batch" in row}
        measured = {row["step"] for row in rows(tmp_path, component=None)}
        assert logged == {step: step for step in range(8)}
        assert measured == set(logged)

    def test_scalars_carry_the_number_of_the_optimizer(self, loader, tmp_path):
        trainer = fit(Manual(), every(1), loader, tmp_path)
        keys = set(trainer.callback_metrics)
        assert {"grad/optimizer_0/global_norm", "grad/optimizer_1/global_norm"} <= keys
        assert "grad/global_norm" not in keys
        assert {"grad/encoder/l2", "grad/head/l2"} <= keys
        for row in rows(tmp_path, step=7, component=None):
            key = f"grad/optimizer_{row['optimizer']}/global_norm"
            assert trainer.callback_metrics[key].item() == pytest.approx(row["global_norm"])

    def test_a_component_of_two_optimizers_has_a_row_of_each(self, loader, tmp_path):
        witness = Manual()
        fit(witness, every(1, components={"all": "*"}), loader, tmp_path)
        assert_rows(tmp_path, witness, list(range(8)), {"": "all"})

    def test_toggled_parameters_are_not_frozen(self, loader, tmp_path):
        class Toggling(Manual):
            def training_step(self, batch, batch_idx):
                for optimizer in self.optimizers():
                    self.toggle_optimizer(optimizer)
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch[0]))
                    optimizer.step()
                    self.untoggle_optimizer(optimizer)

        witness = Toggling()
        fit(witness, every(1), loader, tmp_path)
        assert_rows(tmp_path, witness, list(range(8)))
        assert {row["frozen"] for row in rows(tmp_path)} <= {0, 2}

    def test_zeros_are_counted_for_each(self, loader, tmp_path):
        fit(Manual(), every(1, zeros_every=2), loader, tmp_path)
        counted = [
            (row["step"], row["optimizer"])
            for row in rows(tmp_path, component=None)
            if "zeros" in row
        ]
        assert counted == [(step, index) for step in (0, 2, 4, 6) for index in (0, 1)]

    def test_overflow_of_one_skips_only_its_own(self, loader, tmp_path):
        class Half(Manual):
            def on_after_backward(self):
                if self.trainer.fit_loop.total_batch_idx == 1:
                    self.head.weight.grad.fill_(torch.inf)

        fit(Half(), every(1), loader, tmp_path, plugins=[scaler_plugin()])
        skipped = [
            (row["step"], row["optimizer"])
            for row in rows(tmp_path, component=None)
            if row["skipped"]
        ]
        assert skipped == [(1, 1)]
        assert {row["skipped_total"] for row in rows(tmp_path, step=7, component=None)} == {1}


class TestParameterRows:
    def test_stand_for_each_parameter(self, loader, tmp_path):
        witness = Witness()
        trainer = fit(witness, every(4, per_parameter=True), loader, tmp_path)
        found = rows(tmp_path, "grad_parameter")
        assert len(found) == 2 * len(list(witness.parameters()))
        for seen in (witness.seen[3], witness.seen[7]):
            for name, gradient in seen["gradients"].items():
                (row,) = rows(tmp_path, "grad_parameter", step=seen["step"], parameter=name)
                assert row["component"] == name.partition(".")[0]
                assert row["missing"] == int(gradient is None and seen["trainable"][name])
                if gradient is not None:
                    assert row["l2"] == pytest.approx(statistics([gradient])["l2"], rel=1e-9)
                    assert row["count"] == gradient.numel()
        logged = [
            *trainer.callback_metrics,
            *(key for row in rows(tmp_path, "metrics") for key in row),
        ]
        assert not any("weight" in key for key in logged)

    def test_are_not_written_unless_asked_for(self, loader, tmp_path):
        fit(Witness(), every(1), loader, tmp_path)
        assert not rows(tmp_path, "grad_parameter")
        assert not rows(tmp_path, "grad_histogram")


class TestHistogramRows:
    def test_count_every_element_that_is_not_zero(self, loader, tmp_path):
        witness = Witness()
        fit(witness, every(1, histogram=True), loader, tmp_path)
        for seen in witness.seen:
            for part in ("encoder", "head"):
                x = np.concatenate(
                    [g.numpy().ravel() for n, g in seen["gradients"].items() if n.startswith(part)]
                )
                exponents = np.floor(np.log10(np.abs(x[x != 0]))).clip(-12, 3).astype(int)
                want = {f"1e{e}": int((exponents == e).sum()) for e in range(-12, 4)}
                (row,) = rows(tmp_path, "grad_histogram", step=seen["step"], component=part)
                assert {key: row[key] for key in want} == want
        (row,) = rows(tmp_path, "grad_histogram", step=0, component="idle")
        assert not any(value for key, value in row.items() if key.startswith("1e"))


class TestZeros:
    @pytest.mark.parametrize(("zeros_every", "counted"), [(1, [0, 1, 2, 3]), (3, [0, 3])])
    def test_are_counted_at_each_nth_measurement(self, loader, tmp_path, zeros_every, counted):
        class Relu(Witness):
            def __init__(self):
                super().__init__()
                self.encoder[1] = nn.ReLU()
                # a unit that never fires: its weights get zeros
                self.encoder[0].bias.data[0] = -100.0

        witness = Relu()
        fit(witness, every(2, zeros_every=zeros_every), loader, tmp_path)
        assert_rows(tmp_path, witness, [1, 3, 5, 7])
        for number, row in enumerate(rows(tmp_path, component="encoder")):
            assert ("zeros" in row) == (number in counted)
        assert any(row.get("zeros", 0) > 0 for row in rows(tmp_path, component="encoder"))


class TestComponents:
    def test_patterns_name_the_rows(self, loader, tmp_path):
        witness = Witness()
        parts = {"biases": "*.bias", "first": ["encoder.0"]}
        fit(witness, every(4, components=parts), loader, tmp_path)
        names = {row["component"] for row in rows(tmp_path)}
        assert names == {"biases", "first", "other", None}
        seen = witness.seen[3]["gradients"]
        want = statistics([g for n, g in seen.items() if n.endswith("bias") and g is not None])
        assert rows(tmp_path, step=3, component="biases")[0]["l2"] == pytest.approx(want["l2"])
        want = statistics([seen["encoder.0.weight"]])
        assert rows(tmp_path, step=3, component="first")[0]["l2"] == pytest.approx(want["l2"])

    def test_a_pattern_that_matches_nothing_is_said_at_the_start(self, loader, tmp_path):
        with pytest.warns(UserWarning, match="Pattern `encodr` of component `enc` matches nothing"):
            fit(Witness(), every(4, components={"enc": "encodr"}), loader, tmp_path)
        (note,) = rows(tmp_path, "notes")
        assert note["diagnostic"] == "GradientHealth"
        assert note["severity"] == "warning"
        assert "`encoder`" in note["message"]
        assert note["step"] == 0

    def test_components_object_and_mapping_are_the_same(self):
        patterns = {"a": "encoder"}
        assert GradientHealth(patterns).components.patterns == {"a": ["encoder"]}
        assert GradientHealth(Components(patterns)).components.patterns == {"a": ["encoder"]}


class TestArguments:
    @pytest.mark.parametrize("bad", [0, -1, 1.5, True, "often", None])
    def test_every_n_steps(self, bad):
        with pytest.raises(ValueError, match='`every_n_steps` must be at least 1 or "auto", got'):
            GradientHealth(every_n_steps=bad)

    @pytest.mark.parametrize("bad", ["ignore", "", None])
    def test_on_error(self, bad):
        with pytest.raises(ValueError, match='`on_error` must be "warn" or "raise", got'):
            GradientHealth(on_error=bad)

    @pytest.mark.parametrize("bad", [0, -0.1, 1.01, float("nan")])
    def test_overhead_budget(self, bad):
        with pytest.raises(ValueError, match=r"`overhead_budget` must lie in \(0, 1\], got"):
            GradientHealth(overhead_budget=bad)

    @pytest.mark.parametrize("bad", [0, -3])
    def test_zeros_every(self, bad):
        with pytest.raises(ValueError, match=f"`zeros_every` must be at least 1, got {bad}."):
            GradientHealth(zeros_every=bad)

    @pytest.mark.parametrize("bad", ["encoder", 3, ["encoder"]])
    def test_components(self, bad):
        with pytest.raises(TypeError, match="`components` must be a mapping of names to globs"):
            GradientHealth(bad)

    def test_are_kept_under_their_names(self):
        health = GradientHealth({"a": "b"}, 7, 3, True, True, "raise", 0.5)
        assert (health.every_n_steps, health.zeros_every, health.per_parameter) == (7, 3, True)
        assert (health.histogram, health.on_error, health.overhead_budget) == (True, "raise", 0.5)


def test_state_survives_a_resume(loader, tmp_path):
    plugins = {"plugins": [scaler_plugin()], "gradient_clip_val": 0.05}
    checkpoint = lightning("callbacks").ModelCheckpoint(tmp_path, filename="x", save_last=False)
    scales = {1: 1e37}
    fit(
        NoAutocast(loss_scales=scales),
        [every(1), checkpoint],
        loader,
        tmp_path,
        enable_checkpointing=True,
        **plugins,
    )
    plugins["plugins"] = [scaler_plugin()]
    fit(
        NoAutocast(loss_scales=scales),
        every(2),
        loader,
        tmp_path,
        max_epochs=2,
        ckpt_path=str(tmp_path / "x.ckpt"),
        **plugins,
    )
    whole = rows(tmp_path, component=None)
    assert [row["step"] for row in whole] == [*range(8), 9, 11, 13, 15]
    assert [row["skipped_total"] for row in whole] == [0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    seen = [row for row in whole if row["clip_coefficient"] is not None]
    shares = [sum(row["clipped"] for row in seen[:n]) / n for n in range(1, len(seen) + 1)]
    assert [row["clipped_share"] for row in seen] == pytest.approx(shares)


def test_a_parameter_that_comes_later_has_its_name(tmp_path, loader):
    class Grows(Witness):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.late = nn.Parameter(torch.ones(2))
                self.optimizers().add_param_group({"params": [self.late]})

    fit(Grows(), every(1, per_parameter=True), loader, tmp_path)
    seen = {row["parameter"] for row in rows(tmp_path, "grad_parameter", step=2)}
    assert "late" in seen
    assert "?" not in seen
