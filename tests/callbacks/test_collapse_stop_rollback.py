"""Does a rollback bring back exactly the state that was kept, and do checkpoints stay finite?"""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.callbacks.collapse_rollback import (
    Snapshot,
    cut_learning_rates,
    nonfinite_entries,
)
from lightning_diag.callbacks.collapse_stop import CollapseStop
from lightning_diag.lightning import Callback, LightningModule
from lightning_diag.records import read_run
from tests.callbacks.collapse_plan import NAN, Delayed, events, notes
from tests.callbacks.witness import fit, lightning, rows


class Classifier(LightningModule):
    """Learns an easy task; the losses of some batches are made non-finite."""

    def __init__(self, broken=(), scheduler=None, optimizer=torch.optim.AdamW, lr=0.01):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.broken, self.scheduler, self.optimizer, self.lr = broken, scheduler, optimizer, lr
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        number = self.trainer.fit_loop.total_batch_idx
        self.seen.append(loss.item())
        return {"loss": loss * (NAN if number in self.broken else 1), "logits": logits, "target": y}

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=self.lr)
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


def loader(count=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * count, 3, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


class Keeper(Callback):
    """Copies of the whole state after each step; must come after the one that is tested."""

    def __init__(self):
        self.states = {}
        self.rates = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        # the first batch after a step: later ones accumulate, and move buffers
        done = trainer.global_step
        if done not in self.states:
            self.states[done] = state(trainer, module)
            self.rates[done] = [group["lr"] for group in trainer.optimizers[0].param_groups]


def state(trainer, module):
    states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
    return copy.deepcopy({"weights": dict(module.state_dict()), "optimizers": states})


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)) and torch.equal(
            one.isnan(), other.isnan()
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def train(module, path, keeper=None, **arguments):
    own = set(CollapseStop.__init__.__annotations__) - {"return"}
    settings = {"action": "rollback", "snapshot_every_n_steps": 5, "on_error": "raise"}
    settings |= {key: arguments.pop(key) for key in own & arguments.keys()}
    callbacks = [CollapseStop(**settings), *arguments.pop("callbacks", ()), *filter(None, [keeper])]
    return fit(module, callbacks, arguments.pop("loader", None) or loader(), path, **arguments)


def is_finite(weights):
    return all(x.isfinite().all() for name, x in weights.items() if name != "mask")


class TestRollback:
    @pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
    def test_heals_a_run_and_restores_every_bit(self, tmp_path, optimizer):
        keeper = Keeper()
        module = Classifier(broken=[12], optimizer=optimizer)
        weights = {name: id(p) for name, p in module.named_parameters()}
        trainer = train(module, tmp_path, keeper)
        # one batch breaks the weights: it and the two after it are the events
        assert list(events(tmp_path)) == [12, 13, 14]
        assert trainer.global_step == 40
        assert trainer.stop_reason is None
        assert not is_finite(keeper.states[14]["weights"])
        assert same(keeper.states[15], keeper.states[10])
        assert not same(keeper.states[10], keeper.states[9])
        assert {name: id(p) for name, p in module.named_parameters()} == weights
        assert is_finite(module.state_dict())
        assert sum(module.seen[-5:]) < sum(module.seen[:5])
        found = {row["step"]: row for row in rows(tmp_path, "collapse", action="rollback")}
        assert [(step, row["restored_step"]) for step, row in found.items()] == [(14, 10)]
        assert "the state after 10 steps is restored" in notes(tmp_path)[-1]

    def test_goes_on_like_a_run_that_begins_there(self, tmp_path):
        """After the rollback weights, optimizer and batches alone decide what comes."""
        keeper = Keeper()
        train(Classifier(broken=[12]), tmp_path, keeper, lr_factor=1.0)

        class Again(Classifier):
            def on_train_start(self):
                self.load_state_dict(keeper.states[10]["weights"])
                own = self.trainer.optimizers[0]
                groups = own.state_dict()["param_groups"]
                states = keeper.states[10]["optimizers"][0]
                own.load_state_dict({"state": states, "param_groups": groups})

        data = loader()
        rest = torch.utils.data.Subset(data.dataset, range(8 * 15, 8 * 40))
        other = Keeper()
        fit(Again(), other, DataLoader(rest, batch_size=8), tmp_path / "again")
        assert same(other.states[25], keeper.states[40])

    def test_cuts_the_learning_rate(self, tmp_path):
        keeper = Keeper()
        train(Classifier(broken=[12]), tmp_path, keeper, lr_factor=0.1)
        assert keeper.rates[14] == [0.01]
        assert keeper.rates[15] == keeper.rates[40] == [pytest.approx(0.001)]

    @pytest.mark.parametrize(
        "scheduler",
        [
            lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
            lambda o: lr_scheduler.StepLR(o, 7, 0.5),
            lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10),
            lambda o: lr_scheduler.ExponentialLR(o, 0.9),
            lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 30),
            lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=50),
            lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 5, cycle_momentum=False),
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.ExponentialLR(o, 0.9)], [20]
            ),
        ],
    )
    def test_the_schedule_does_not_undo_it(self, tmp_path, scheduler):
        plain, cut = Keeper(), Keeper()
        arguments = {"scheduler": scheduler, "optimizer": torch.optim.SGD}
        fit(Classifier(**arguments), plain, loader(), tmp_path / "plain")
        train(Classifier(broken=[12], **arguments), tmp_path / "cut", cut, lr_factor=0.25)
        for step in range(1, 41):
            factor = 0.25 if step >= 15 else 1
            want = [pytest.approx(rate * factor, rel=1e-6) for rate in plain.rates[step]]
            assert cut.rates[step] == want, step

    def test_at_most_so_often(self, tmp_path):
        broken = [12, 18, 24]
        module = Classifier(broken=broken)
        trainer = train(module, tmp_path, max_rollbacks=2)
        actions = {r["step"]: r["action"] for r in rows(tmp_path, "collapse") if r["action"]}
        assert actions == {14: "rollback", 20: "rollback", 26: "stop"}
        assert trainer.global_step == 27
        assert trainer.stop_reason["rollbacks"] == 2
        # what is left is the last finite state
        assert is_finite(module.state_dict())
        report = json.loads((tmp_path / "collapse_report.json").read_text())
        assert [one["restored_step"] for one in report["rollbacks"]] == [10, 16]
        assert report["stop_reason"]["step"] == 26
        assert report["collapsed"] is True

    def test_in_the_cool_down_only_what_is_not_finite_counts(self, tmp_path):
        class Steep(Classifier):
            def training_step(self, batch, batch_idx):
                outputs = super().training_step(batch, batch_idx)
                number = self.trainer.fit_loop.total_batch_idx
                return outputs | {"loss": outputs["loss"] * (1e5 if 16 <= number < 30 else 1)}

        train(Steep(broken=[12]), tmp_path, cooldown_steps=10, spike_factor=math.inf)
        found = events(tmp_path)
        assert list(found) == [12, 13, 14, 25, 26, 27]
        report = json.loads((tmp_path / "collapse_report.json").read_text())
        assert [one["restored_step"] for one in report["rollbacks"]] == [10, 16]
        assert report["collapsed"] is False

    def test_the_first_steps_have_the_initial_state(self, tmp_path):
        keeper = Keeper()
        module = Classifier(broken=[1])
        start = copy.deepcopy(dict(module.state_dict()))
        train(module, tmp_path, keeper, snapshot_every_n_steps=None)
        assert same(keeper.states[4]["weights"], start)
        assert keeper.states[4]["optimizers"] == [{}]

    def test_without_a_finite_state_the_run_is_stopped(self, tmp_path):
        module = Classifier()
        with torch.no_grad():
            module.net[0].weight.fill_(NAN)
        trainer = train(module, tmp_path)
        assert trainer.global_step == 3
        assert trainer.stop_reason["rollbacks"] == 0
        assert any("is not finite: no snapshot" in note for note in notes(tmp_path))

    def test_accumulation(self, tmp_path):
        keeper = Keeper()
        module = Classifier(broken=[25])
        train(module, tmp_path, keeper, accumulate_grad_batches=2)
        assert list(events(tmp_path)) == [12, 13, 14]
        assert same(keeper.states[15], keeper.states[10])
        assert is_finite(module.state_dict())

    def test_manual_optimization_that_accumulates(self, tmp_path):
        class Manual(Classifier):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                outputs = super().training_step(batch, batch_idx)
                self.manual_backward(outputs["loss"])
                if batch_idx % 2:
                    self.optimizers().step()
                    self.optimizers().zero_grad()
                return outputs

        module = Manual(broken=[12])
        train(module, tmp_path)
        # restored between the two halves of a step, of which the first was broken
        assert list(events(tmp_path)) == [12, 13, 14]
        assert is_finite(module.state_dict())
        assert all(math.isfinite(loss) for loss in module.seen[15:])

    def test_no_snapshot_in_a_row_of_events(self, tmp_path):
        class Steep(Classifier):
            def training_step(self, batch, batch_idx):
                outputs = super().training_step(batch, batch_idx)
                steep = 13 <= self.trainer.fit_loop.total_batch_idx < 16
                return outputs | {"loss": outputs["loss"] * (1e5 if steep else 1)}

        train(Steep(), tmp_path, spike_factor=math.inf)
        (row,) = rows(tmp_path, "collapse", action="rollback")
        # finite after step 15 too, but sick
        assert (row["step"], row["restored_step"]) == (15, 10)

    def test_a_verdict_that_arrives_one_step_late(self, tmp_path):
        keeper, module = Keeper(), Classifier(broken=[12])
        stop = Delayed(action="rollback", snapshot_every_n_steps=4, on_error="raise")
        trainer = fit(module, [stop, keeper], loader(), tmp_path)
        # the step in between was made with the broken weights, and is not judged
        assert list(events(tmp_path)) == [12, 13, 14]
        assert same(keeper.states[16], keeper.states[12])
        assert trainer.global_step == 40
        assert is_finite(module.state_dict())
        assert len(rows(tmp_path, "collapse", action="rollback")) == 1

    def test_a_late_verdict_within_an_accumulation(self, tmp_path):
        module = Classifier(broken=[25])
        stop = Delayed(action="rollback", snapshot_every_n_steps=5, on_error="raise")
        fit(module, stop, loader(), tmp_path, accumulate_grad_batches=2)
        assert list(events(tmp_path)) == [12, 13, 14]
        assert is_finite(module.state_dict())


class TestCheckpoints:
    def checkpoint(self, path, **arguments):
        return lightning("callbacks").ModelCheckpoint(
            path, every_n_train_steps=1, save_top_k=-1, filename="{step}", **arguments
        )

    def saved(self, path):
        return {
            int(file.stem.partition("=")[2]): torch.load(file, weights_only=False)
            for file in path.glob("step=*.ckpt")
        }

    def test_hold_finite_weights_only(self, tmp_path):
        keeper = Keeper()
        callbacks = [self.checkpoint(tmp_path / "saved")]
        options = {"callbacks": callbacks, "enable_checkpointing": True}
        train(Classifier(broken=[12]), tmp_path, keeper, **options)
        found = self.saved(tmp_path / "saved")
        assert len(found) == 40
        for step, checkpoint in found.items():
            assert is_finite(checkpoint["state_dict"]), step
            states = checkpoint["optimizer_states"][0]["state"]
            assert all(x.isfinite().all() for one in states.values() for x in one.values())
            if step in (13, 14):
                assert same(dict(checkpoint["state_dict"]), keeper.states[10]["weights"])
                assert checkpoint["lightning_diag_collapse"] == {
                    "instead_of_step": step,
                    "weights_after_steps": 10,
                }
            else:
                assert same(dict(checkpoint["state_dict"]), keeper.states[step]["weights"])
                assert "lightning_diag_collapse" not in checkpoint
        assert sum("the checkpoint holds the weights after 10" in n for n in notes(tmp_path)) == 2

    def test_training_can_go_on_from_one_that_was_mended(self, tmp_path):
        callbacks = [self.checkpoint(tmp_path / "saved")]
        options = {"callbacks": callbacks, "enable_checkpointing": True}
        train(Classifier(broken=[12]), tmp_path, max_steps=14, **options)
        module = Classifier()
        path = str(tmp_path / "saved" / "step=13.ckpt")
        trainer = train(module, tmp_path / "again", ckpt_path=path)
        assert trainer.global_step == 40
        assert is_finite(module.state_dict())

    def test_after_a_stop_the_last_one_is_finite(self, tmp_path):
        options = {"action": "stop", "snapshot_every_n_steps": 5, "enable_checkpointing": True}
        module = Classifier(broken=[12])
        trainer = train(module, tmp_path, **options)
        assert trainer.global_step == 15
        # stopping changes nothing in the training itself
        assert not is_finite(module.state_dict())
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        saved = torch.load(tmp_path / "end.ckpt", weights_only=False)
        assert is_finite(saved["state_dict"])
        assert saved["lightning_diag_collapse"]["weights_after_steps"] == 10

    def test_without_a_snapshot_it_is_said(self, tmp_path):
        options = {"action": "stop", "snapshot_every_n_steps": None, "enable_checkpointing": True}
        trainer = train(Classifier(broken=[12]), tmp_path, **options)
        with pytest.warns(UserWarning, match="do not go on from it"):
            trainer.save_checkpoint(tmp_path / "end.ckpt")
        assert "`net.0.weight` and" in notes(tmp_path)[-1]
        attempts = read_run(tmp_path).info["attempts"]
        assert [attempt["status"] for attempt in attempts] == ["finished"]

    def test_weights_alone_pass_unseen_and_it_is_said(self, tmp_path):
        callbacks = [self.checkpoint(tmp_path / "saved", save_weights_only=True)]
        options = {"callbacks": callbacks, "enable_checkpointing": True}
        with pytest.warns(UserWarning, match="save_weights_only"):
            train(Classifier(), tmp_path, **options)


class TestSnapshot:
    def test_of_lists_and_tied_weights(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

        def step():
            def closure():
                optimizer.zero_grad()
                loss = (net(x) - 1).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            return copy.deepcopy([dict(net.state_dict()), optimizer.state_dict()["state"]])

        before = step()
        snapshot = Snapshot(net, [optimizer], 1)
        assert snapshot.weights["0.weight"] is snapshot.weights["1.weight"]
        after = step()
        snapshot.restore(net, [optimizer])
        assert same([dict(net.state_dict()), optimizer.state_dict()["state"]], before)
        assert same(step(), after)

    def test_finite_but_for_what_never_was(self):
        net = nn.Linear(2, 2)
        net.register_buffer("mask", torch.tensor([math.inf]))
        snapshot = Snapshot(net, [], 0)
        assert not snapshot.is_finite(frozenset())
        assert snapshot.is_finite(frozenset({"mask"}))

    def test_entries_that_are_not_finite(self):
        weights = {"a": torch.ones(3), "b": torch.tensor([NAN]), "n": torch.tensor(3), "x": "text"}
        assert nonfinite_entries(weights).tolist() == [False, True, False, False]
        assert nonfinite_entries({}).tolist() == []

    def test_a_rate_that_is_a_tensor(self):
        weight = nn.Parameter(torch.zeros(2))
        rate = torch.tensor(0.5)
        optimizer = torch.optim.Adam([weight], lr=rate, capturable=False)
        group = optimizer.param_groups[0]
        kept = group["lr"]
        cut_learning_rates([optimizer], [], 0.5)
        assert group["lr"] is kept
        assert float(kept) == 0.25


class Half(Classifier):
    """Holds a part that no forward reaches, so that its parameters have no shape yet."""

    def __init__(self):
        super().__init__()
        self.later = nn.LazyLinear(2)


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_parameters_without_a_shape_end_nothing(tmp_path, action):
    keep = lightning("callbacks").ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4)
    stop = CollapseStop(action=action, on_error="raise")
    fit(Half(), [stop, keep], loader(12), tmp_path, enable_checkpointing=True)
    kept = torch.load(next((tmp_path / "kept").glob("*.ckpt")), weights_only=False)
    assert isinstance(kept["state_dict"]["later.weight"], nn.UninitializedParameter)
    assert nonfinite_entries(kept["state_dict"]).tolist().count(True) == 1  # the mask
    assert Snapshot(Half(), [], 0).weights.keys() == Snapshot(Classifier(), [], 0).weights.keys()
