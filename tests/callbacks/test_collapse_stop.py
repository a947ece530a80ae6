"""Does CollapseStop end what is dead, at the right step, and leave alone what lives?"""

import json
import math

import pytest
import torch

from lightning_diag.callbacks.collapse_stop import CollapseStop
from lightning_diag.lightning import Trainer
from lightning_diag.records import read_run
from tests.callbacks.collapse_plan import (
    INF,
    NAN,
    Delayed,
    Planned,
    batches,
    both,
    events,
    mixed,
    notes,
    train,
)
from tests.callbacks.witness import NoAutocast, Witness, fit, lightning, rows, scaler_plugin

BAD = range(6, 40)
PLAN = {"losses": dict.fromkeys(range(2, 40), NAN)}


def constant(batch, size=8):
    return torch.tensor([[1.0, 3.0]]).repeat(size, 1)


def one_class(batch, size=8):
    return mixed(batch, size) + torch.tensor([0.0, 9.0])


def since(step, after, before=mixed):
    return lambda batch: after(batch) if batch >= step else before(batch)


def report(path):
    return json.loads((path / "collapse_report.json").read_text())


class TestChecks:
    @pytest.mark.parametrize(
        ("plan", "kinds"),
        [
            ({"losses": dict.fromkeys(BAD, NAN)}, "nonfinite_loss"),
            ({"losses": dict.fromkeys(BAD, -INF)}, "nonfinite_loss"),
            ({"norms": dict.fromkeys(BAD, NAN)}, "nonfinite_gradient"),
            ({"norms": dict.fromkeys(BAD, INF)}, "nonfinite_gradient,exploding_gradient"),
            ({"norms": dict.fromkeys(BAD, 101.0)}, "exploding_gradient"),
            ({"norms": dict.fromkeys(BAD, 0.0)}, "vanishing_gradient"),
            ({"norms": dict.fromkeys(BAD, 9e-8)}, "vanishing_gradient"),
            ({"losses": {i: 20.0 ** (i - 5) for i in BAD}}, "loss_spike"),
        ],
        ids=str,
    )
    def test_the_third_event_ends_the_run(self, tmp_path, plan, kinds):
        trainer = train(Planned(**plan), tmp_path)
        assert events(tmp_path) == dict.fromkeys([6, 7, 8], kinds)
        assert trainer.global_step == 9
        assert trainer.stop_reason["rule"] == kinds.partition(",")[0]
        assert (trainer.stop_reason["first_step"], trainer.stop_reason["step"]) == (6, 8)

    @pytest.mark.parametrize(
        "plan",
        [
            {"norms": dict.fromkeys(BAD, 100.0)},
            {"norms": dict.fromkeys(BAD, 2e-7)},
            {"losses": dict.fromkeys(BAD, 9.9)},
            # a jump to a level that then lasts is one event
            {"losses": dict.fromkeys(BAD, 1000.0)},
            {"losses": {i: -(20.0 ** (i - 5)) for i in BAD}},
            {"losses": dict.fromkeys(range(6), -1.0) | {6: -0.01, 7: 5.0}},
            {"losses": {6: NAN, 7: NAN, 9: NAN, 10: NAN}},
        ],
        ids=str,
    )
    def test_no_event_or_too_few(self, tmp_path, plan):
        trainer = train(Planned(**plan), tmp_path)
        assert trainer.global_step == 12
        assert trainer.stop_reason is None
        assert not (tmp_path / "collapse_report.json").exists()
        assert read_run(tmp_path).info["stop_reason"] is None

    def test_constant_predictions(self, tmp_path):
        # eight rows a step: 32 are in the last four
        trainer = train(Planned(logits=since(4, constant)), tmp_path, class_patience_steps=0)
        whole = "constant_prediction,one_class"
        assert events(tmp_path) == {7: "constant_prediction", 8: whole, 9: whole}
        assert trainer.global_step == 10
        assert trainer.stop_reason["observed"] == 0

    def test_one_class(self, tmp_path):
        trainer = train(Planned(logits=since(3, one_class)), tmp_path, class_patience_steps=0)
        # the window of five steps is of one class from step 7 on
        assert events(tmp_path) == dict.fromkeys([7, 8, 9], "one_class")
        assert trainer.global_step == 10
        last = rows(tmp_path, "collapse", step=9)[0]
        assert (last["unique_predictions"], last["top_share"], last["predictions"]) == (1, 1, 40)

    def test_classes_of_one_logit_and_of_a_function(self, tmp_path):
        class Odd(Planned):
            def training_step(self, batch, batch_idx):
                outputs = super().training_step(batch, batch_idx)
                return {"loss": outputs["loss"], "deep": [outputs["logits"][:, 1] - 1.5]}

        trainer = train(
            Odd(logits=one_class),
            tmp_path,
            class_patience_steps=0,
            predictions=lambda outputs, batch: (outputs["deep"][0], both(0).float()),
        )
        assert events(tmp_path) == dict.fromkeys([4, 5, 6], "one_class")
        assert trainer.global_step == 7

    def test_labels_may_be_in_the_batch(self, tmp_path):
        class Pairs(Planned):
            def training_step(self, batch, batch_idx):
                outputs = super().training_step(batch, batch_idx)
                return {"loss": outputs["loss"], "logits": outputs["logits"]}

        labels = torch.arange(96) % 2
        data = torch.utils.data.TensorDataset(torch.zeros(96, 1), labels)
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        train(Pairs(logits=one_class), tmp_path, loader=loader, class_patience_steps=0)
        assert list(events(tmp_path)) == [4, 5, 6]

    def test_gradients_are_seen_before_clipping(self, tmp_path):
        plan = {"norms": dict.fromkeys(BAD, 101.0)}
        trainer = train(Planned(**plan), tmp_path, gradient_clip_val=1.0)
        assert trainer.global_step == 9

    def test_every_number_of_a_row(self, tmp_path):
        train(Planned(losses={0: 2.0}, norms={1: 3.0}), tmp_path, warmup_steps=100)
        found = {row["step"]: row for row in rows(tmp_path, "collapse")}
        assert list(found) == [0, 1, 3, 7]
        assert (found[0]["loss"], found[0]["loss_before"]) == (2, None)
        assert (found[3]["loss"], found[3]["loss_before"]) == (1, pytest.approx(4 / 3))
        assert [found[step]["gradient_norm"] for step in found] == [1, 3, 1, 1]
        variances = [mixed(i).double().var(0).mean() for i in range(4, 8)]
        assert found[7]["variance"] == pytest.approx(float(sum(variances) / 4), rel=1e-6)
        assert found[1]["variance"] is None
        assert (found[7]["top_share"], found[7]["unique_predictions"]) == (0.5, 2)
        assert not any(row["event"] or row["skipped"] for row in found.values())

    def test_every_second_step(self, tmp_path):
        plan = {"losses": dict.fromkeys(range(4, 20), NAN)}
        trainer = train(Planned(**plan), tmp_path, every_n_steps=2)
        assert list(events(tmp_path)) == [5, 7, 9]
        assert trainer.global_step == 10


class TestTraps:
    def test_small_batches_of_one_class(self, tmp_path):
        def four(batch):
            return mixed(batch, 4) + torch.tensor([0.0, 9.0]) * (batch % 5 > 0)

        labels = both(0, 4)
        trainer = train(Planned(logits=four, labels=lambda batch: labels), tmp_path)
        assert not events(tmp_path)
        assert trainer.global_step == 12

    def test_labels_of_one_class(self, tmp_path):
        module = Planned(logits=one_class, labels=lambda batch: torch.zeros(8).long())
        train(module, tmp_path, class_patience_steps=0)
        assert not events(tmp_path)

    @pytest.mark.parametrize("logits", [constant, one_class])
    def test_batches_of_one(self, tmp_path, logits):
        module = Planned(logits=lambda batch: logits(batch, 1), labels=lambda batch: both(0, 1))
        train(module, tmp_path, loader=batches(40), min_predictions=5, class_patience_steps=0)
        assert not events(tmp_path)

    def test_regression(self, tmp_path):
        # some targets look like classes, the others do not
        targets = torch.tensor([0, 1, 0, 1, 0.5, 2, -3, 0.1])
        module = Planned(logits=lambda batch: mixed(batch)[:, 0], labels=lambda batch: targets)
        train(module, tmp_path, class_patience_steps=0)
        assert not events(tmp_path)

    def test_a_model_that_begins_with_one_class(self, tmp_path):
        module = Planned(logits=one_class)
        trainer = train(module, tmp_path, loader=batches(30), class_patience_steps=20)
        assert list(events(tmp_path)) == [20, 21, 22]
        assert trainer.global_step == 23

    def test_a_model_that_leaves_several_classes_for_a_while(self, tmp_path):
        """As in a warm-up: the random network predicts both, then the majority, then it learns."""

        def majority(batch):
            return one_class(batch) if 3 <= batch < 20 else mixed(batch)

        module = Planned(logits=majority)
        trainer = train(module, tmp_path, loader=batches(40), class_patience_steps=20)
        assert not events(tmp_path)
        assert trainer.global_step == 40

    @pytest.mark.parametrize(("rare", "ends"), [(3, 40), (5, 7)])
    def test_labels_of_which_few_are_missed(self, tmp_path, rare, ends):
        # forty predictions are in the window, and four are a tenth
        def few(batch):
            return (torch.arange(40) < rare).long()

        module = Planned(logits=lambda batch: -one_class(batch, 40), labels=few)
        trainer = train(module, tmp_path, loader=batches(40), class_patience_steps=0)
        assert trainer.global_step == ends

    def test_a_spike_after_what_is_not_finite(self, tmp_path):
        losses = {4: NAN, 5: INF, 7: 50.0}
        train(Planned(losses), tmp_path)
        assert events(tmp_path) == {4: "nonfinite_loss", 5: "nonfinite_loss", 7: "loss_spike"}

    def test_losses_of_both_signs_have_no_spikes(self, tmp_path):
        losses = {batch: (-1.0) ** batch * (1 + 0.05 * batch) for batch in range(12)}
        trainer = train(Planned(losses | {7: 30.0, 8: 30.0, 9: 30.0}), tmp_path)
        assert not events(tmp_path)
        assert trainer.global_step == 12

    def test_a_loss_of_zero_has_nothing_left_to_teach(self, tmp_path):
        done = dict.fromkeys(range(4, 12), 0.0)
        trainer = train(Planned(done, done), tmp_path)
        assert not events(tmp_path)
        assert trainer.global_step == 12

    def test_an_overflow_of_the_scaler(self, tmp_path):
        witness = NoAutocast(loss_scales=dict.fromkeys(range(2, 6), 1e37))
        health = CollapseStop(on_error="raise", spike_factor=INF)
        loader = batches_of_rows()
        trainer = fit(witness, health, loader, tmp_path, plugins=[scaler_plugin()])
        assert trainer.global_step == 8
        assert not events(tmp_path)
        assert [row["skipped"] for row in rows(tmp_path, "collapse")] == [0, 0, 1, 0]

    def test_an_overflow_that_the_scale_does_not_explain(self, tmp_path):
        class Broken(NoAutocast):
            def on_after_backward(self):
                if self.trainer.global_step >= 1:
                    self.head.weight.grad.fill_(math.inf)

        plugins = [scaler_plugin(2.0)]
        health = CollapseStop(on_error="raise")
        trainer = fit(Broken(), health, batches_of_rows(), tmp_path, plugins=plugins)
        # skipped at a scale of 2; at 1 and less it is the gradient itself
        found = "nonfinite_gradient,exploding_gradient"
        assert events(tmp_path) == dict.fromkeys([2, 3, 4], found)
        assert trainer.global_step == 5

    def test_a_loss_that_is_not_finite_is_an_event_with_a_scaler_too(self, tmp_path):
        witness = NoAutocast(loss_scales=dict.fromkeys(range(2, 8), NAN))
        health = CollapseStop(on_error="raise")
        trainer = fit(witness, health, batches_of_rows(), tmp_path, plugins=[scaler_plugin()])
        assert events(tmp_path) == dict.fromkeys([2, 3, 4], "nonfinite_loss")
        assert trainer.global_step == 5

    def test_a_skipped_step_neither_ends_nor_extends_a_row_of_events(self, tmp_path):
        witness = NoAutocast(loss_scales={2: NAN, 3: 1e37, 4: NAN, 5: 1e37, 6: NAN})
        health = CollapseStop(on_error="raise", spike_factor=INF)
        trainer = fit(witness, health, batches_of_rows(), tmp_path, plugins=[scaler_plugin()])
        assert list(events(tmp_path)) == [2, 4, 6]
        assert [row["streak"] for row in rows(tmp_path, "collapse", event=1)] == [1, 2, 3]
        assert trainer.global_step == 7

    def test_a_fused_optimizer_that_unscales_itself(self, tmp_path):
        class Fused(NoAutocast):
            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)

        witness = Fused()
        health = CollapseStop(on_error="raise")
        fit(witness, health, batches_of_rows(), tmp_path, plugins=[scaler_plugin(2.0**16)])
        assert not events(tmp_path)
        assert_norms(tmp_path, witness)

    def test_a_step_without_loss(self, tmp_path):
        class Pausing(Witness):
            def training_step(self, batch, batch_idx):
                return None if batch_idx in (1, 2, 3, 4) else super().training_step(batch, 0)

        trainer = fit(Pausing(), CollapseStop(on_error="raise"), batches_of_rows(), tmp_path)
        assert trainer.global_step == 8
        pause = rows(tmp_path, "collapse", step=3)[0]
        assert (pause["loss"], pause["gradient_norm"], pause["event"]) == (None, None, 0)


def batches_of_rows(count=8):
    generator = torch.Generator().manual_seed(5)
    data = torch.utils.data.TensorDataset(torch.randn(4 * count, 3, generator=generator))
    return torch.utils.data.DataLoader(data, batch_size=4)


def assert_norms(path, witness, accumulate=1):
    """Each recorded norm is that of the gradients which the model itself has seen."""
    seen = {one["step"]: one for one in witness.seen}
    found = rows(path, "collapse")
    assert found
    for row in found:
        one = seen[row["step"]]
        squares = [
            (g / one["divisor"]).square().sum() for g in one["gradients"].values() if g is not None
        ]
        assert row["gradient_norm"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)


class TestModes:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"precision": "bf16-mixed"},
            {"precision": "bf16-true"},
            {"precision": "64-true"},
            {"gradient_clip_val": 0.01},
            {"accumulate_grad_batches": 3},
        ],
        ids=str,
    )
    def test_norms_are_those_of_the_gradients(self, tmp_path, arguments):
        witness = Witness()
        fit(witness, CollapseStop(on_error="raise"), batches_of_rows(), tmp_path, **arguments)
        assert_norms(tmp_path, witness)

    def test_the_loss_of_a_step_is_the_mean_of_its_micro_batches(self, tmp_path):
        losses = {i: float(i) for i in range(12)}
        trainer = train(Planned(losses), tmp_path, accumulate_grad_batches=5, spike_factor=INF)
        found = {row["step"]: row["loss"] for row in rows(tmp_path, "collapse")}
        assert found == pytest.approx({0: 2.0, 1: 7.0})
        assert trainer.global_step == 3

    def test_a_micro_batch_that_is_not_finite(self, tmp_path):
        trainer = train(Planned({1: NAN, 2: NAN, 4: NAN}), tmp_path, accumulate_grad_batches=2)
        assert list(events(tmp_path)) == [0, 1, 2]
        assert trainer.global_step == 3

    def test_predictions_of_all_micro_batches_count(self, tmp_path):
        train(Planned(), tmp_path, accumulate_grad_batches=4)
        assert [row["predictions"] for row in rows(tmp_path, "collapse")] == [32, 64]

    def test_manual_optimization_with_two_optimizers(self, tmp_path):
        class Two(Planned):
            def __init__(self, **plan):
                super().__init__(**plan)
                self.automatic_optimization = False
                self.other = torch.nn.Parameter(torch.zeros(2))

            def training_step(self, batch, batch_idx):
                outputs = super().training_step(batch, batch_idx)
                for optimizer, extra in zip(self.optimizers(), (0, 1), strict=True):
                    optimizer.zero_grad()
                    loss = outputs["loss"] if not extra else 4 * self.other[0]
                    self.manual_backward(loss)
                    optimizer.step()
                return outputs | {"loss": outputs["loss"].detach()}

            def configure_optimizers(self):
                return [torch.optim.SGD([p], lr=0.0) for p in (self.weight, self.other)]

        norms = {0: 3.0} | dict.fromkeys(range(5, 12), 200.0)
        train(Two(norms=norms), tmp_path)
        assert list(events(tmp_path)) == [5, 6, 7]
        first = rows(tmp_path, "collapse", step=0)[0]
        assert first["gradient_norm"] == 5
        assert {row["step"] for row in rows(tmp_path, "collapse")} == {0, 1, 3, 5, 6, 7}

    def test_sparse_gradients(self, tmp_path):
        class Sparse(Witness):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(20, 4, sparse=True)

            def loss(self, x):
                index = (x[:, 0].abs() * 3).long().clamp(max=19)
                return self.head(self.encoder(x) + self.table(index)).square().mean()

        witness = Sparse()
        fit(witness, CollapseStop(on_error="raise"), batches_of_rows(), tmp_path)
        assert_norms(tmp_path, witness)


class TestStopping:
    @pytest.mark.parametrize(
        ("arguments", "ends", "reason"),
        [
            ({"min_steps": 14}, 14, "min_epochs=1 and min_steps=14"),
            ({"min_epochs": 1, "max_epochs": 3}, 12, "min_epochs=1"),
            ({"min_steps": 4, "min_epochs": 0}, 5, None),
        ],
    )
    def test_what_delays_the_end_is_said(self, tmp_path, arguments, ends, reason):
        trainer = train(Planned(**PLAN), tmp_path, **{"max_epochs": 3} | arguments)
        assert trainer.global_step == ends
        assert trainer.stop_reason["delayed_by"] == reason
        assert trainer.stop_reason["step"] == 4
        (note,) = [text for text in notes(tmp_path) if "collapsed" in text]
        assert (f"once {reason} is reached" in note) == (reason is not None)
        assert len([row for row in rows(tmp_path, "collapse") if row["action"] == "stop"]) == 1

    def test_the_reason_is_data(self, tmp_path):
        trainer = train(Planned(**PLAN), tmp_path)
        info = read_run(tmp_path).info
        for found in (info["stop_reason"], info["attempts"][-1]["stop_reason"]):
            assert found == {**trainer.stop_reason, "observed": None}
        assert found["kinds"] == ["nonfinite_loss"]
        assert found["diagnostic"] == "CollapseStop"
        assert "3 judged steps in a row" in found["message"]
        assert trainer.callback_metrics["collapse/streak"] == 3

    def test_warm_up(self, tmp_path):
        plan = {"norms": dict.fromkeys(range(12), 200.0), "losses": {1: NAN}}
        trainer = train(Planned(**plan), tmp_path, warmup_steps=6)
        assert trainer.global_step == 9
        assert events(tmp_path) == {1: "nonfinite_loss"} | dict.fromkeys(
            [6, 7, 8], "exploding_gradient"
        )

    def test_warn(self, tmp_path):
        plan = {"losses": dict.fromkeys([*range(1, 6), *range(8, 12)], NAN)}
        with pytest.warns(UserWarning, match="has collapsed"):
            trainer = train(Planned(**plan), tmp_path, action="warn")
        assert trainer.global_step == 12
        assert trainer.stop_reason is None
        actions = {r["step"]: r["action"] for r in rows(tmp_path, "collapse") if r["action"]}
        assert actions == {3: "warn", 10: "warn"}
        found = report(tmp_path)
        assert found["collapsed"] is True
        assert found["statistics"]["total_collapse_events"] == 9
        assert found["statistics"]["max_consecutive_collapses"] == 5

    def test_a_new_fit_starts_anew(self, tmp_path):
        stop = CollapseStop(on_error="raise")
        first = fit(Planned(**PLAN), stop, batches(), tmp_path / "one")
        assert stop.stop_reason == first.stop_reason
        second = fit(Planned(), stop, batches(), tmp_path / "two")
        assert second.stop_reason is None
        assert second.global_step == 12


class TestLateReads:
    def test_the_run_ends_one_step_after_the_third_event(self, tmp_path):
        stop = Delayed(on_error="raise")
        trainer = fit(Planned(losses=dict.fromkeys(BAD, NAN)), stop, batches(), tmp_path)
        # the step that was made in between is told too
        assert list(events(tmp_path)) == [6, 7, 8, 9]
        assert trainer.stop_reason["step"] == 8
        assert trainer.global_step == 10

    def test_events_of_the_last_steps_are_told_at_the_end(self, tmp_path):
        stop = Delayed(on_error="raise")
        trainer = fit(Planned(losses=dict.fromkeys(range(9, 12), NAN)), stop, batches(), tmp_path)
        assert list(events(tmp_path)) == [9, 10, 11]
        assert trainer.stop_reason["step"] == 11
        assert report(tmp_path)["collapsed"] is True

    def test_every_step_is_judged_as_if_at_once(self, tmp_path):
        plan = {"losses": {2: NAN, 3: NAN, 7: 50.0}, "logits": since(4, constant)}
        for kind in (CollapseStop, Delayed):
            stop = kind(action="warn", on_error="raise")
            fit(Planned(**plan), stop, batches(), tmp_path / kind.__name__)
        one, other = (rows(tmp_path / k.__name__, "collapse") for k in (CollapseStop, Delayed))
        assert len(one) > 5
        for row, late in zip(one, other, strict=True):
            assert {**row, "time": 0} == {**late, "time": 0}


class TestReport:
    def test_has_the_keys_of_the_schema(self, tmp_path):
        plan = {"norms": dict.fromkeys(range(5, 12), NAN), "losses": {2: NAN}}
        train(Planned(**plan), tmp_path)
        found = report(tmp_path)
        assert {"timestamp", "collapsed", "total_steps", "collapse_events"} <= found.keys()
        assert (found["collapsed"], found["total_steps"]) == (True, 8)
        assert [event["step"] for event in found["collapse_events"]] == [2, 5, 6, 7]
        keys = {"step", "timestamp", "loss", "gradient_check", "prediction_check", "loss_check"}
        event = found["collapse_events"][-1]
        assert event.keys() == keys
        assert event["gradient_check"] == {
            "total_norm": None,
            "num_params": 1,
            "zero_grad_params": 0,
            "nan_grad_params": 1,
            "inf_grad_params": 0,
            "is_zero_grad": False,
            "is_exploding_grad": False,
            "has_nan_inf": True,
            "skipped_by_scaler": False,
            "collapse_detected": True,
        }
        assert event["loss_check"] == {
            "loss": 1.0,
            "is_nan": False,
            "is_inf": False,
            "is_spike": False,
            "collapse_detected": False,
        }
        assert {"variance", "unique_predictions", "is_constant", "is_mode_collapse"} <= event[
            "prediction_check"
        ].keys()
        config = found["config"]
        assert (config["window_size"], config["collapse_threshold"]) == (5, 3)
        assert (config["grad_norm_epsilon"], config["grad_norm_max"]) == (1e-7, 100)
        assert config["prediction_variance_min"] == 1e-6
        statistics = found["statistics"]
        assert statistics["total_collapse_events"] == 4
        assert statistics["max_consecutive_collapses"] == 3
        assert statistics["recent_grad_norms"] == [1, 1, None, None, None]
        assert statistics["recent_losses"] == [1] * 5
        assert len(statistics["recent_prediction_variances"]) == 5

    def test_stands_beside_the_run_that_lightning_makes(self, tmp_path):
        plan = {"losses": dict.fromkeys(range(20), NAN)}
        train(Planned(**plan), tmp_path, logger=False)
        (found,) = tmp_path.rglob("collapse_report.json")
        assert (found.parent / "records" / "collapse.jsonl").exists()

    def test_the_list_of_events_is_capped(self, tmp_path):
        plan = {"losses": dict.fromkeys(range(400), NAN)}
        train(Planned(**plan), tmp_path, action="warn", loader=batches(260))
        found = report(tmp_path)
        steps = [event["step"] for event in found["collapse_events"]]
        assert steps == [*range(100), *range(160, 260)]
        assert found["statistics"]["events_left_out"] == 60
        assert found["statistics"]["total_collapse_events"] == 260
        # of a long row of events not every row is written
        assert len(rows(tmp_path, "collapse")) < 30

    def test_a_disk_that_does_not_take_it(self, tmp_path, recwarn):
        (tmp_path / "collapse_report.json").mkdir()
        trainer = train(Planned(losses=dict.fromkeys(range(20), NAN)), tmp_path)
        assert trainer.global_step == 3
        assert any("collapse_report.json` cannot be written" in str(w.message) for w in recwarn)


class TestNotes:
    def test_what_is_not_returned(self, tmp_path):
        train(Planned(logits=lambda batch: None), tmp_path)
        (note,) = notes(tmp_path)
        assert "returns no `logits`" in note

    def test_no_labels(self, tmp_path):
        train(Planned(labels=lambda batch: None), tmp_path)
        (note,) = notes(tmp_path)
        assert "there are no labels" in note

    def test_no_loss(self, tmp_path):
        class Silent(Planned):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                super().training_step(batch, batch_idx)

        train(Silent(), tmp_path)
        assert any("returns no loss" in note for note in notes(tmp_path))

    def test_nothing_is_missing(self, tmp_path):
        train(Planned(), tmp_path)
        assert not notes(tmp_path)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"action": "stpo"}, "`action` must be one of stop, rollback, warn, got 'stpo'; did"),
            ({"events_in_a_row": 0}, "`events_in_a_row` must be at least 1, got 0."),
            ({"window_steps": 1}, "`window_steps` must be at least 2, got 1."),
            ({"gradient_norm_min": -1.0}, "`gradient_norm_min` must be at least 0, got -1.0."),
            ({"gradient_norm_max": 0.0}, "`gradient_norm_max` must be more than 0, got 0.0."),
            ({"variance_min": NAN}, "`variance_min` must be at least 0, got nan."),
            ({"spike_factor": 1.0}, "`spike_factor` must be more than 1, got 1.0."),
            ({"min_predictions": 0}, "`min_predictions` must be at least 1, got 0."),
            ({"warmup_steps": -1}, "`warmup_steps` must be at least 0, got -1."),
            ({"class_patience_steps": -1}, "`class_patience_steps` must be at least 0, got -1."),
            ({"max_predictions": 1}, "`max_predictions` must be at least 2, got 1."),
            ({"max_rollbacks": -1}, "`max_rollbacks` must be at least 0, got -1."),
            ({"cooldown_steps": -1}, "`cooldown_steps` must be at least 0, got -1."),
            ({"lr_factor": 0.0}, r"`lr_factor` must lie in \(0, 1\], got 0.0."),
            ({"snapshot_every_n_steps": 0}, "`snapshot_every_n_steps` must be at least 1, got 0."),
            ({"every_n_steps": 0}, '`every_n_steps` must be at least 1 or "auto", got 0.'),
        ],
        ids=str,
    )
    def test_out_of_range(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            CollapseStop(**arguments)

    def test_a_function_is_one(self):
        with pytest.raises(TypeError, match="`predictions` must be a function or None, got 3"):
            CollapseStop(predictions=3)


class TestResuming:
    @pytest.mark.parametrize("at", [5, 6, 7])
    def test_goes_on_as_if_never_interrupted(self, tmp_path, at):
        plan = {
            "losses": {3: 30.0} | dict.fromkeys([6, 7, 8], NAN),
            "logits": since(3, one_class),
        }
        checkpoint = lightning("callbacks").ModelCheckpoint(
            tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}"
        )
        options = {"after": [checkpoint], "enable_checkpointing": True}
        whole = train(Planned(**plan), tmp_path / "run", **options)
        parts = tmp_path / "parts"
        train(Planned(**plan), parts, max_steps=at)
        saved = str(tmp_path / "saved" / f"step={at}.ckpt")
        resumed = train(Planned(**plan), parts, ckpt_path=saved)
        assert resumed.global_step == whole.global_step == 9
        assert resumed.stop_reason | {"observed": 0} == whole.stop_reason | {"observed": 0}
        for key in ("collapse_events", "statistics", "total_steps"):
            assert without_times(report(parts)[key]) == without_times(report(tmp_path / "run")[key])

    def test_state_is_of_primitives(self, tmp_path):
        stop = CollapseStop(on_error="raise")
        fit(Planned(losses={2: NAN}), stop, batches(), tmp_path)
        json.dumps(stop.state_dict(), allow_nan=True)


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "timestamp"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


class TestHarmless:
    @pytest.mark.parametrize("action", ["stop", "rollback"])
    @pytest.mark.parametrize("mode", ["plain", "accumulated", "scaler_overflow", "two_optimizers"])
    def test_bits_are_the_same(self, tmp_path, mode, action):
        from tests.promises import trace

        without, _ = trace.train(mode, tmp_path / "without")
        stop = CollapseStop(action=action, snapshot_every_n_steps=2, on_error="raise")
        found, _ = trace.train(mode, tmp_path / "with", [stop])
        assert not trace.differences(without, found)
        assert (tmp_path / "with").rglob("collapse.jsonl")

    @pytest.mark.parametrize("logits", [mixed, None])
    def test_one_read_a_step_and_none_else(self, tmp_path, logits):
        from tests.promises.reads import WatchSteps

        watch = WatchSteps()
        module = Planned(logits=logits or (lambda batch: None))
        train(module, tmp_path, before=[watch], every_n_steps=3)
        for number, step in enumerate(watch.steps):
            due = number % 3 == 2
            assert len(step.own_reads) == due, (number, step.own_reads)
            assert bool(step.own_operations) == due, number

    def test_an_error_of_ones_own_ends_only_the_diagnostic(self, tmp_path):
        def broken(outputs, batch):
            raise ZeroDivisionError("planted")

        with pytest.warns(RuntimeWarning, match="CollapseStop has ended and training goes on"):
            trainer = train(Planned(), tmp_path, predictions=broken, on_error="warn")
        assert trainer.global_step == 12

    def test_nothing_is_held_after_the_fit(self, tmp_path):
        stop = CollapseStop(action="rollback", on_error="raise")
        fit(Planned(), stop, batches(), tmp_path)
        assert stop._snapshot is None
        assert stop._window is None

    def test_trainer_has_no_such_attribute_of_its_own(self):
        assert not hasattr(Trainer, "stop_reason")
