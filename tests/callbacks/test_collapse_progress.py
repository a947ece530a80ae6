"""Do the rows of loss.jsonl say what the steps were, each of them once?"""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_diag.callbacks.collapse_judge import Judge, Limits, Numbers
from lightning_diag.callbacks.collapse_progress import Progress, learning_rate
from lightning_diag.callbacks.collapse_stop import CollapseStop
from lightning_diag.functional.collapse_stop import BINS, STEP_FIELDS
from lightning_diag.lightning import Callback
from lightning_diag.records import read_run
from tests.callbacks.collapse_plan import INF, NAN, Delayed, Planned, batches, train
from tests.callbacks.witness import Witness, fit, lightning, rows, scaler_plugin

COLUMNS = (
    *("first_step", "steps", "loss", "loss_std", "loss_min", "loss_max", "loss_max_step"),
    *("nonfinite", "gradient_norm", "gradient_norm_max", "gradient_nonfinite", "skipped"),
    *("lr", "lr_min", "lr_max", "variance", "top_share", "predictions"),
)


class Recorder(Witness):
    """Keeps the loss and learning rate of each step, in double precision, by its own means."""

    def __init__(self, count=1, **options):
        super().__init__(**options)
        self.losses, self.rates, self.count = [], [], count

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach().double().item())
        return loss

    def optimizer_step(self, *args, **kwargs):
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        super().optimizer_step(*args, **kwargs)

    def configure_optimizers(self):
        groups = [
            {"params": self.encoder.parameters(), "lr": 0.02},
            {"params": self.head.parameters(), "lr": 0.05},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def truth(self, first, last):
        """What a row must say of the steps from the first to the last."""
        losses = np.array(self.losses).reshape(-1, self.count).mean(1)[first : last + 1]
        norms = np.array(
            [
                math.sqrt(
                    math.fsum(
                        (g**2).sum().item() for g in seen["gradients"].values() if g is not None
                    )
                )
                / seen["divisor"]
                for seen in self.seen[first : last + 1]
            ]
        )
        rates = np.array(self.rates)[first : last + 1].max(1)
        return {
            "first_step": first,
            "steps": last - first + 1,
            "loss": losses.mean(),
            "loss_std": losses.std(),
            "loss_min": losses.min(),
            "loss_max": losses.max(),
            "loss_max_step": first + int(losses.argmax()),
            "nonfinite": 0,
            "gradient_norm": norms.mean(),
            "gradient_norm_max": norms.max(),
            "gradient_nonfinite": 0,
            "skipped": 0,
            "lr": rates[-1],
            "lr_min": rates.min(),
            "lr_max": rates.max(),
        }


def told(path):
    return rows(path, "loss")


def covered(path):
    """Steps that the rows speak of, as the run is read back."""
    found = read_run(path).frame("loss").to_dicts()
    return [step for row in found for step in range(row["first_step"], row["step"] + 1)]


def inputs(count, size=4):
    x = torch.randn(count * size, 3, generator=torch.Generator().manual_seed(2))
    dataset = torch.utils.data.TensorDataset(x)
    return torch.utils.data.DataLoader(dataset, batch_size=size)


@pytest.mark.parametrize("kind", [CollapseStop, Delayed])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.01}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulated", "clipped", "bf16"],
)
def test_values_against_a_recorder(tmp_path, options, kind):
    count = options.get("accumulate_grad_batches", 1)
    module = Recorder(count)
    fit(module, kind(on_error="raise"), inputs(23 * count), tmp_path, **options)
    found = told(tmp_path)
    assert [row["step"] for row in found] == [9, 19, 22]
    for row, first in zip(found, (0, 10, 20), strict=True):
        assert set(COLUMNS) <= row.keys()
        for key, want in module.truth(first, row["step"]).items():
            assert row[key] == pytest.approx(want, rel=2e-6), (row["step"], key)
        assert row["component"] is None


def test_steps_that_the_scaler_skips(tmp_path):
    norms = {3: INF, 7: NAN}
    train(Planned(norms=norms), tmp_path, plugins=[scaler_plugin()], loader=batches(10))
    (row,) = told(tmp_path)
    assert (row["skipped"], row["gradient_nonfinite"], row["nonfinite"]) == (2, 2, 0)


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_a_loss_that_breaks_is_told_at_once(tmp_path, number):
    at = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            at.append(len(told(tmp_path)))

    losses = {step: 1.0 + step for step in range(40)} | {13: number}
    train(Planned(losses), tmp_path, after=[Looks()], loader=batches(26))
    first, broken, *after = told(tmp_path)
    assert (first["step"], broken["step"], broken["first_step"]) == (9, 13, 10)
    assert (broken["nonfinite"], broken["first_nonfinite"], broken["steps"]) == (1, 13, 4)
    assert broken["loss"] == pytest.approx(12)
    assert (broken["loss_max"], broken["loss_max_step"]) == (13, 12)
    assert at[12:14] == [1, 2]
    assert [(row["step"], row["steps"]) for row in after] == [(23, 10), (25, 2)]
    assert "first_nonfinite" not in after[0]


def test_a_loss_that_stays_broken_is_not_told_at_each_step(tmp_path):
    losses = dict.fromkeys(range(3, 60), NAN)
    train(Planned(losses), tmp_path, action="warn", loader=batches(33))
    found = [(row["step"], row["nonfinite"]) for row in told(tmp_path)]
    assert found == [(3, 1), (13, 10), (23, 10), (32, 9)]
    assert all(row["loss"] is None for row in told(tmp_path)[1:])


def test_a_loss_that_breaks_again_is_told_again(tmp_path):
    train(Planned({3: NAN, 5: NAN}), tmp_path, loader=batches(8))
    assert [row["step"] for row in told(tmp_path)] == [3, 5, 7]


def test_ten_judged_steps_where_not_all_are(tmp_path):
    train(Planned(), tmp_path, every_n_steps=3, loader=batches(40))
    found = [(row["first_step"], row["step"], row["steps"]) for row in told(tmp_path)]
    assert found == [(2, 29, 10), (32, 38, 3)]


def test_several_optimizers_and_no_loss(tmp_path):
    class Two(Planned):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Parameter(torch.zeros(2))

        def training_step(self, batch, batch_idx):
            for which, optimizer in enumerate(self.optimizers()):
                optimizer.zero_grad()
                size = (batch_idx + 1) * (3.0, 4.0)[which]
                self.manual_backward((self.weight, self.other)[which][0] * size)
                optimizer.step()

        def configure_optimizers(self):
            return [
                torch.optim.SGD([self.weight], lr=1e-3),
                torch.optim.SGD([self.other], lr=2e-3),
            ]

    train(Two(), tmp_path, gradient_norm_max=1e6, loader=batches(10))
    (row,) = told(tmp_path)
    assert (row["loss"], row["loss_max_step"], row["nonfinite"]) == (None, None, 0)
    assert row["gradient_norm"] == pytest.approx(5 * 5.5)
    assert row["gradient_norm_max"] == pytest.approx(50)
    assert row["lr"] == 2e-3


def test_what_predictions_say(tmp_path):
    train(Planned(), tmp_path, loader=batches(10))
    (row,), last = told(tmp_path), rows(tmp_path, "collapse")[-1]
    assert last["step"] == 7
    assert row["predictions"] == 40
    assert row["top_share"] == 0.5
    assert row["variance"] == pytest.approx(last["variance"], rel=0.2)


# ---- nothing lost, nothing twice ----


def checkpoints(path, every):
    kind = lightning("callbacks").ModelCheckpoint
    return kind(path / "checkpoints", "{step}", every_n_train_steps=every, save_top_k=-1)


class Stops(Callback):
    """A process that is killed, or a run that is interrupted."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise self.error


class KilledError(Exception):
    pass


class Killed(CollapseStop):
    """It has no time to write anything when the process is killed."""

    def on_exception(self, *_):
        pass


class KilledDelayed(Killed, Delayed):
    pass


@pytest.mark.parametrize("kind", [Killed, KilledDelayed, CollapseStop])
@pytest.mark.parametrize("killed", [14, 20, 27])
@pytest.mark.parametrize("every", [7, 10])
def test_a_resumed_run_has_no_gap_and_no_double(tmp_path, every, killed, kind):
    def go(path, *more, **options):
        stop = kind(on_error="raise")
        return fit(
            Recorder(),
            [stop, checkpoints(path, every), *more],
            inputs(34),
            path,
            enable_checkpointing=True,
            **options,
        )

    with pytest.raises(KilledError):
        go(tmp_path, Stops(killed, KilledError()))
    last = killed // every * every
    go(tmp_path, ckpt_path=tmp_path / "checkpoints" / f"step={last}.ckpt")
    assert covered(tmp_path) == list(range(34))
    whole = tmp_path / "whole"
    go(whole)
    # Lightning begins the data anew, so that losses differ
    keys = ("first_step", "step", "steps", "lr", "lr_min", "lr_max")
    one, other = (
        read_run(path).frame("loss").select(keys).to_dicts() for path in (tmp_path, whole)
    )
    assert one == other


def test_a_run_that_goes_on_after_its_end(tmp_path):
    for epochs in (1, 2):
        stop, keep = CollapseStop(on_error="raise"), checkpoints(tmp_path, 13)
        path = tmp_path / "checkpoints" / "step=13.ckpt" if epochs == 2 else None
        fit(
            Recorder(),
            [stop, keep],
            inputs(13),
            tmp_path,
            max_epochs=epochs,
            enable_checkpointing=True,
            ckpt_path=path,
        )
    assert covered(tmp_path) == list(range(26))


def test_after_an_exception_the_rest_is_there(tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(Planned(), tmp_path, before=[Stops(14, ZeroDivisionError())], loader=batches(20))
    assert [row["step"] for row in told(tmp_path)] == [9, 13]


def test_over_a_rollback(tmp_path):
    losses = {5: NAN, 6: NAN}
    own = {"action": "rollback", "events_in_a_row": 2, "snapshot_every_n_steps": 1}
    train(Planned(losses), tmp_path, **own, loader=batches(20))
    assert covered(tmp_path) == list(range(20))
    assert sum(row["nonfinite"] for row in told(tmp_path)) == 2


def test_a_checkpoint_holds_plain_values(tmp_path):
    train(Planned(), tmp_path, before=[checkpoints(tmp_path, 5)], enable_checkpointing=True)
    saved = torch.load(tmp_path / "checkpoints" / "step=5.ckpt", weights_only=True)
    (state,) = [one for key, one in saved["callbacks"].items() if key.startswith("CollapseStop")]
    json.dumps(state)


# ---- its parts ----


LIMITS = Limits(3, 5, 0.0, 1e300, 0.0, 1e9, 32, 0, 100)


def numbers(step, loss=1.0, norm=2.0, **more):
    values = dict.fromkeys(STEP_FIELDS, 0.0)
    values |= {"loss": loss, "losses": 1, "sum_sq": norm**2, "tensors": 1, "scale": 1, **more}
    return Numbers(step, values, [0] * BINS, False)


def seen(steps, loss=lambda step: 1.0):
    judge, progress = Judge(LIMITS), Progress()
    for step in steps:
        one = numbers(step, loss(step))
        progress.see(one, judge.see(one), 0.1)
    return [(row["first_step"], step, row["steps"]) for step, row in progress.take()]


def test_rows_become_longer_in_a_long_run():
    assert seen(range(19_980, 20_210)) == [
        (19_980, 19_989, 10),
        (19_990, 19_999, 10),
        (20_000, 20_099, 100),
        (20_100, 20_199, 100),
    ]


def test_a_long_run_still_tells_of_a_break_at_once():
    assert seen(range(30_000, 30_110), lambda s: NAN if s >= 30_004 else 1.0) == [
        (30_000, 30_004, 5),
        (30_005, 30_104, 100),
    ]


def test_numbers_near_the_largest_there_are():
    judge, progress = Judge(LIMITS), Progress()
    for step in range(10):
        one = numbers(step, 1.7e308, 1e154)
        progress.see(one, judge.see(one), 0.1)
    ((_, row),) = progress.take()
    assert row["loss"] == pytest.approx(1.7e308)
    assert row["loss_std"] == pytest.approx(0, abs=1e295)


def test_nothing_makes_no_row():
    progress = Progress()
    progress.end()
    assert progress.take() == []


@pytest.mark.parametrize(
    ("rates", "want"),
    [([0.1, 0.3], 0.3), ([torch.tensor(0.5), 0.1], 0.5), ([torch.empty((), device="meta")], None)],
)
def test_learning_rate(rates, want):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-9)
    for group in groups:
        optimizer.param_groups.append({**optimizer.param_groups[0], **group})
    assert learning_rate([optimizer]) == want


def test_learning_rate_of_nothing():
    assert learning_rate([]) is None
