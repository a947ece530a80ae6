"""Charts reach the loggers at the end of training, harm nothing, and cost nothing before it."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag import GradientHealth, HealthAlerts, RunLogger
from lightning_diag.callbacks.health_charts import SECONDS_OF_DRAWING, are_wanted
from lightning_diag.report import logged_charts
from tests.callbacks.witness import fit, lightning, rows
from tests.conftest import Halving


def trained(path, charts, *loggers, module=None, checkpoint=False):
    """A short training; its trainer, the random state after it, and its notes."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    alerts = HealthAlerts(every_n_steps=10, console=False, charts=charts, on_error="warn")
    diagnostics = [GradientHealth(every_n_steps=1), alerts]
    if checkpoint:
        diagnostics.append(lightning("callbacks").ModelCheckpoint(path / "kept", save_last=True))
    loader = DataLoader(TensorDataset(torch.zeros(40, 1)), batch_size=1)
    trainer = fit(
        module or Halving(lr=1e-4),
        diagnostics,
        loader,
        path,
        logger=[RunLogger(path), *loggers],
        enable_checkpointing=checkpoint,
    )
    notes = [row for row in rows(path, "notes") if row["diagnostic"] == "HealthAlerts"]
    return trainer, notes


def board(path):
    return lightning("loggers").TensorBoardLogger(path, name="board")


def images(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "board/version_0"), {"images": 0})
    events.Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


def test_tensorboard_has_the_pictures_and_the_training_is_the_same(tmp_path):
    left = []
    for charts in (False, True):
        path = tmp_path / str(charts)
        trainer, notes = trained(path, charts, board(path))
        weights = trainer.lightning_module.state_dict()
        left.append((weights, torch.get_rng_state(), random.getstate(), np.random.get_state()[1]))
    (weights, mine, own, numbers), (others, drawn, after, later) = left
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert torch.equal(mine, drawn)
    assert own == after
    assert (numbers == later).all()
    assert images(tmp_path / "False") == {}
    pictures = images(tmp_path / "True")
    assert pictures["charts/gradient_flow"][0].step == 39
    (note,) = notes
    assert note["message"].startswith("TensorBoardLogger got the charts in ")
    assert note["severity"] == "info"


def test_nothing_is_drawn_where_nobody_takes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(logged_charts, "log_charts", None)
    csv = lightning("loggers").CSVLogger(tmp_path, name="csv")
    assert trained(tmp_path / "csv", True, csv)[1] == []
    # a training of a moment, though TensorBoard takes some
    assert trained(tmp_path / "auto", "auto", board(tmp_path))[1] == []
    assert trained(tmp_path / "off", False, board(tmp_path))[1] == []


def test_auto_keeps_to_the_budget():
    least = SECONDS_OF_DRAWING / 0.01
    assert not are_wanted("auto", 0.99 * least, 0.01)
    assert are_wanted("auto", 1.01 * least, 0.01)
    assert are_wanted("auto", 0.11 * least, 0.1)
    assert are_wanted(True, 0.0, 0.01)
    assert not are_wanted(False, 1e9, 0.01)


class Panic(BaseException):
    """Stands for what comes out of code in Rust, which is no `Exception`."""


@pytest.mark.parametrize("error", [OSError("no space left"), Panic("unreachable")])
def test_a_failure_is_a_warning_after_the_last_checkpoint(tmp_path, monkeypatch, error):
    there = []

    def broken(run):
        there.append(Path(tmp_path / "run/kept/last.ckpt").exists())
        raise error

    monkeypatch.setattr(logged_charts, "training", broken)
    monkeypatch.setattr(logged_charts, "gradient_flow", lambda run, findings: broken(run))
    with pytest.warns(match="HealthAlerts: The charts could not be drawn: "):
        trainer, notes = trained(tmp_path / "run", True, board(tmp_path), checkpoint=True)
    assert there == [True]
    assert trainer.state.status == "finished"
    assert [note["severity"] for note in notes] == ["warning"]


def test_without_pillow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(logged_charts, "find_spec", lambda name: None)
    with pytest.warns(match=r"need Pillow: pip install pillow\."):
        trained(tmp_path, True, board(tmp_path))


def test_names_that_no_picture_can_hold(tmp_path):
    class Odd(Halving):
        def __init__(self):
            super().__init__(lr=1e-4)
            self.add_module("odd\x1b[0m\x00", torch.nn.Linear(1, 1))

        def training_step(self, batch, batch_idx):
            odd = sum(
                weight.square().sum()
                for weight in self.get_submodule("odd\x1b[0m\x00").parameters()
            )
            return super().training_step(batch, batch_idx) + odd

    trained(tmp_path, True, board(tmp_path), module=Odd())
    assert "charts/gradient_flow" in images(tmp_path)


def test_a_bad_argument():
    message = r'`charts` must be true, false or "auto", got \'yes\'\.'
    with pytest.raises(ValueError, match=message):
        HealthAlerts(charts="yes")
