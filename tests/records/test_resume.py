import importlib
import json
from contextlib import nullcontext

import pytest
import torch

from lightning_diag.lightning import PACKAGE, Callback, LightningModule, Trainer
from lightning_diag.records import RunLogger, read_run


@pytest.fixture
def plant(tmp_path):
    """Write rows, given as (step, attempt, own values), and run.json, and open the run."""

    def planted(attempts, **files):
        (tmp_path / "records").mkdir(exist_ok=True)
        for prefix, rows in files.items():
            text = "".join(row(*one) for one in rows)
            (tmp_path / "records" / f"{prefix}.jsonl").write_text(text)
        if attempts is not None:
            (tmp_path / "run.json").write_text(json.dumps({"attempts": attempts}))
        return read_run(tmp_path)

    return planted


def row(step, attempt, own=None):
    common = {"step": step, "epoch": 0, "time": 0.0, "attempt": attempt, "component": None}
    return json.dumps({**common, **(own or {})}) + "\n"


def attempt(number, first_step, resumed_at=None, began_at=None, supersedes=True):
    return {
        "attempt": number,
        "first_step": first_step,
        "resumed_at": resumed_at,
        "began_at": began_at,
        "supersedes": supersedes,
    }


def pairs(frame):
    return list(zip(frame["step"], frame["attempt"], strict=True))


def test_one_attempt_keeps_everything(plant):
    run = plant([attempt(1, 0)], grad=[(0, 1), (0, 1), (1, 1)])
    assert pairs(run.grad) == [(0, 1), (0, 1), (1, 1)]


def test_without_positions_rows_from_the_first_step_on_are_replaced(plant):
    run = plant(
        [attempt(1, 0), attempt(2, 2)],
        grad=[(0, 1), (1, 1), (2, 1), (3, 1), (2, 2)],
        other=[(1, 1), (2, 1)],
    )
    assert pairs(run.grad) == [(0, 1), (1, 1), (2, 2)]
    assert pairs(run.other) == [(1, 1)]


def test_metrics_at_the_first_step_stay_unless_reported_again(plant):
    a, b, c = {"val_loss": 1.0}, {"train_loss": 2.0}, {"val_loss": None, "val_loss_nonfinite": 1}
    run = plant(
        [attempt(1, 0), attempt(2, 4)],
        metrics=[(3, 1, b), (4, 1, a), (4, 1, b), (5, 1, a), (4, 2, b)],
        grad=[(4, 1)],
    )
    assert pairs(run.metrics) == [(3, 1), (4, 1), (4, 2)]
    assert run.metrics["val_loss"].to_list() == [None, 1.0, None]
    assert run.grad.is_empty()
    run = plant([attempt(1, 0), attempt(2, 4)], metrics=[(4, 1, c), (4, 2, a)])
    assert pairs(run.metrics) == [(4, 2)]
    run = plant([attempt(1, 0), attempt(2, 4)], metrics=[(4, 1, a), (4, 2, c)])
    assert pairs(run.metrics) == [(4, 2)]


def test_a_restart_from_scratch_replaces_everything(plant):
    run = plant(
        [attempt(1, 0), attempt(2, 0)],
        grad=[(0, 1), (1, 1), (0, 2)],
        metrics=[(0, 1, {"a": 1.0}), (0, 2, {"b": 1.0})],
        notes=[(0, 1), (3, 1)],
    )
    assert pairs(run.grad) == [(0, 2)]
    assert pairs(run.metrics) == [(0, 2)]
    assert run.notes.is_empty()


def test_positions_keep_what_stood_before_the_checkpoint(plant):
    # the second row carries an axis of its own, the fourth was logged just after the save
    kept = [(0, 1), (900, 1)]
    position = sum(len(row(*one)) for one in kept)
    run = plant(
        [attempt(1, 0), attempt(2, 2, {"grad": position}, {"grad": position + 9})],
        grad=[*kept, (2, 1), (1, 1), (3, 1), (2, 2)],
    )
    assert pairs(run.grad) == [(0, 1), (900, 1), (1, 1), (2, 2)]


def test_a_file_that_the_checkpoint_does_not_know_came_after_it(plant):
    run = plant([attempt(1, 0), attempt(2, 2, {"grad": 0}, {})], late=[(1, 1), (5, 1), (3, 2)])
    assert pairs(run.late) == [(1, 1), (3, 2)]


def test_going_back_to_an_older_attempt_drops_the_one_between(plant):
    first = [(0, 1), (1, 1), (2, 1), (3, 1)]
    size = len(row(0, 1))
    second = [(1, 2), (2, 2)]
    run = plant(
        [
            attempt(1, 0, None, {}),
            attempt(2, 1, {"grad": size}, {"grad": 4 * size}),
            attempt(3, 3, {"grad": 3 * size}, {"grad": 6 * size}),
        ],
        grad=[*first, *second, (3, 3)],
    )
    assert pairs(run.grad) == [(0, 1), (1, 1), (2, 1), (3, 3)]


def test_going_on_from_the_second_attempt_keeps_it(plant):
    size = len(row(0, 1))
    run = plant(
        [
            attempt(1, 0, None, {}),
            attempt(2, 1, {"grad": size}, {"grad": 3 * size}),
            attempt(3, 2, {"grad": 4 * size}, {"grad": 5 * size}),
        ],
        grad=[(0, 1), (1, 1), (2, 1), (1, 2), (2, 2), (2, 3)],
    )
    assert pairs(run.grad) == [(0, 1), (1, 2), (2, 3)]


def test_torn_and_empty_lines_do_not_move_the_positions(plant, tmp_path):
    size = len(row(0, 1))
    records = tmp_path / "records"
    records.mkdir()
    text = row(0, 1) + "\n" + row(5, 1) + '{"step":\n' + row(6, 1)
    (records / "grad.jsonl").write_text(text + row(5, 2))
    (records / "clean.jsonl").write_text(text.replace('{"step":\n', "\n") + row(5, 2))
    run = plant([attempt(1, 0), attempt(2, 5, {"grad": 2 * size + 1, "clean": 2 * size + 1})])
    assert pairs(run.grad) == [(0, 1), (5, 2)]
    assert pairs(run.clean) == [(0, 1), (5, 2)]
    run = plant([attempt(1, 0), attempt(2, 6, {"grad": 2 * size + 1, "clean": 2 * size + 1})])
    assert pairs(run.grad) == [(0, 1), (5, 2)]
    assert run.torn == {"grad": 1}


def test_without_run_json_the_last_attempt_of_each_thing_counts(plant):
    encoder, head = {"component": "encoder"}, {"component": "head"}
    run = plant(
        None,
        grad=[
            (0, 1, encoder),
            (0, 1, head),
            (1, 1, {"optimizer": 0}),
            (1, 1, {"optimizer": 1}),
            (7, 1, head),
            (0, 2, head),
            (1, 2, {"optimizer": 1}),
        ],
        metrics=[(3, 1, {"a": 1.0}), (3, 1, {"b": 1.0}), (3, 2, {"b": 2.0})],
    )
    assert pairs(run.grad) == [(0, 1), (1, 1), (7, 1), (0, 2), (1, 2)]
    assert run.grad["component"].to_list() == ["encoder", None, "head", "head", None]
    assert pairs(run.metrics) == [(3, 1), (3, 2)]


def test_rows_without_an_attempt_are_kept(plant, tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "grad.jsonl").write_text('{"step":0,"l2":1}\n' + row(0, 2))
    run = plant([attempt(1, 0), attempt(2, 0)])
    assert run.grad["attempt"].to_list() == [None, 2]


def test_a_lone_test_replaces_nothing_but_itself(plant):
    run = plant(
        [attempt(1, 0), attempt(2, 0, supersedes=False), attempt(3, 0, supersedes=False)],
        metrics=[(0, 1, {"a": 1.0}), (9, 1, {"a": 1.0}), (0, 2, {"t": 1.0}), (0, 3, {"t": 2.0})],
        grad=[(0, 1), (9, 1)],
    )
    assert pairs(run.metrics) == [(0, 1), (9, 1), (0, 3)]
    assert pairs(run.grad) == [(0, 1), (9, 1)]


def write(path, steps, begin=None, prefix="grad"):
    logger = RunLogger(path)
    if begin is not None:
        logger.begin(**begin)
    for step in steps:
        logger.log_rows(prefix, [{"l2": 0.5}], step=step, epoch=0)
    return logger


def test_the_logger_resumes_with_positions(tmp_path):
    first = write(tmp_path, range(4), {"step": 0})
    positions = first.positions()
    for step in (4, 5):
        first.log_rows("grad", [{}], step=step, epoch=0)
    write(tmp_path, range(4, 6), {"step": 4, "positions": positions})
    run = read_run(tmp_path)
    assert pairs(run.grad) == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert run.info["attempts"][1]["resumed_at"] == positions


def test_the_logger_resumes_without_positions(tmp_path):
    write(tmp_path, range(6), {"step": 0})
    write(tmp_path, range(4, 5), {"step": 4})
    assert pairs(read_run(tmp_path).grad) == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2)]


def test_the_logger_restarts(tmp_path):
    write(tmp_path, range(6), {"step": 0})
    write(tmp_path, range(2), {"step": 0})
    assert pairs(read_run(tmp_path).grad) == [(0, 2), (1, 2)]
    assert len((tmp_path / "records" / "grad.jsonl").read_text().splitlines()) == 8


def test_the_logger_without_run_json(tmp_path):
    write(tmp_path, range(4), {"step": 0})
    (tmp_path / "run.json").unlink()
    write(tmp_path, range(2, 3), {"step": 2})
    (tmp_path / "run.json").unlink()
    assert pairs(read_run(tmp_path).grad) == [(0, 1), (1, 1), (3, 1), (2, 2)]


def test_rows_without_begin_replace_later_steps_once_they_move_on(tmp_path):
    write(tmp_path, range(6))
    logger = write(tmp_path, [2])
    assert pairs(read_run(tmp_path).grad) == [(0, 1), (1, 1), (3, 1), (4, 1), (5, 1), (2, 2)]
    logger.log_rows("grad", [{}], step=3, epoch=0)
    assert pairs(read_run(tmp_path).grad) == [(0, 1), (1, 1), (2, 2), (3, 2)]


def test_begin_after_a_first_row_takes_over(tmp_path):
    write(tmp_path, range(6), {"step": 0})
    logger = write(tmp_path, [3])
    logger.begin(step=3)
    run = read_run(tmp_path)
    assert len(run.info["attempts"]) == 2
    assert pairs(run.grad) == [(0, 1), (1, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize("positions", [{"grad": 10**6}, {"grad": 7}, {"nothing": 5}])
def test_positions_of_another_run_are_not_believed(tmp_path, positions):
    write(tmp_path, range(6), {"step": 0})
    write(tmp_path, [4], {"step": 4, "positions": positions})
    run = read_run(tmp_path)
    assert run.info["attempts"][1]["resumed_at"] is None
    assert pairs(run.grad) == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2)]


class Watch(Callback):
    """What a diagnostic does with the logger: begin, rows before each step, positions kept."""

    def __init__(self, remembers):
        self.remembers = remembers
        self.positions = None

    def on_train_start(self, trainer, pl_module):
        self.logger = trainer.logger
        positions = self.positions if self.remembers else None
        trainer.logger.begin(step=trainer.global_step, positions=positions)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        l2 = pl_module.w.grad.norm()
        rows = [{"component": "w", "l2": l2}, {"l2": l2}]
        step, epoch = trainer.global_step, trainer.current_epoch
        trainer.logger.log_rows("grad", rows, step=step, epoch=epoch)

    def state_dict(self):
        return {"positions": self.logger.positions()}

    def load_state_dict(self, state):
        self.positions = state["positions"]


class Net(LightningModule):
    def __init__(self, dies_at=None):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))
        self.dies_at = dies_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.dies_at:
            raise RuntimeError("power cut")
        loss = self.w.square().sum() / 2
        self.log("train_loss", loss)
        return loss

    def on_train_epoch_end(self):
        self.log("w_at_end", self.w.sum())

    def validation_step(self, batch, batch_idx):
        self.log("val_w", self.w.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fit(quiet):
    checkpoint = importlib.import_module(f"{PACKAGE}.callbacks").ModelCheckpoint

    def trained(path, callbacks=(), dies_at=None, ckpt_path=None, **checkpoints):
        data = torch.utils.data.DataLoader(torch.zeros(8, 1), batch_size=1)
        arguments = {**quiet, "max_epochs": 3, "enable_checkpointing": True}
        save = checkpoint(save_last=True, **checkpoints)
        trainer = Trainer(
            logger=RunLogger(path),
            callbacks=[*callbacks, save],
            log_every_n_steps=1,
            **arguments,
        )
        death = pytest.raises(RuntimeError, match="power cut") if dies_at else nullcontext()
        with death:
            trainer.fit(Net(dies_at), data, data, ckpt_path=ckpt_path)
        return read_run(path)

    return trained


def said(frame):
    """Rows without when and by which attempt they were written."""
    rows = frame.drop("time", "attempt").to_dicts()
    return sorted(str({key: x for key, x in sorted(row.items()) if x is not None}) for row in rows)


@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize("dies_at", [4, 8, 17])
@pytest.mark.parametrize(
    "checkpoints",
    [{"every_n_train_steps": 3}, {"save_on_train_epoch_end": True}, {"every_n_epochs": 1}],
    ids=["steps", "epoch", "validation"],
)
def test_a_resumed_run_has_no_gap_and_no_double(tmp_path, fit, dies_at, remembers, checkpoints):
    whole = fit(tmp_path / "whole", [Watch(remembers)])
    path = tmp_path / "broken"
    fit(path, [Watch(remembers)], dies_at, **checkpoints)
    last = path / "checkpoints" / "last.ckpt"
    if last.exists():
        # a second death, on the way from the same checkpoint
        fit(path, [Watch(remembers)], dies_at, last, **checkpoints)
    ckpt_path = last if last.exists() else None
    run = fit(path, [Watch(remembers)], None, ckpt_path, **checkpoints)
    assert said(run.grad) == said(whole.grad)
    assert said(run.metrics) == said(whole.metrics)
    assert run.info["status"] == "finished"
