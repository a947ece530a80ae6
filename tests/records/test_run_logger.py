import copy
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from lightning_diag.lightning import LightningModule, Trainer, rank_zero_only
from lightning_diag.records import RunLogger, read_run


@pytest.fixture
def logger(tmp_path):
    return RunLogger(tmp_path / "run")


def lines(logger, prefix):
    return [json.loads(x) for x in (logger.path / "records" / f"{prefix}.jsonl").open()]


def info(logger):
    return json.loads((logger.path / "run.json").read_text())


def test_nothing_is_made_before_the_first_write(logger):
    assert not logger.path.exists()
    assert (logger.name, logger.version) == ("", "")
    assert logger.save_dir == logger.root_dir == logger.log_dir == str(logger.path)
    assert logger.positions() == {}
    logger.finalize("success")
    assert not logger.path.exists()


def test_a_row_has_its_columns_in_order(logger):
    logger.begin(step=4)
    before = time.time()
    logger.log_rows("grad", [{"l2": 1.5, "component": "head", "count": 3}], step=4, epoch=1)
    (row,) = lines(logger, "grad")
    assert list(row) == ["step", "epoch", "time", "attempt", "component", "l2", "count"]
    assert before - 1 < row.pop("time") < before + 60
    assert row == {
        "step": 4,
        "epoch": 1,
        "attempt": 1,
        "component": "head",
        "l2": 1.5,
        "count": 3,
    }


def test_what_is_not_finite_is_null_with_a_count_beside_it(logger):
    rows = [
        {"l2": math.nan, "bins": [1.0, math.inf, math.nan], "max": 2.0},
        {"l2": math.inf, "nonfinite": 0},
        {"l2": math.inf, "nonfinite": 7},
    ]
    logger.log_rows("grad", rows, step=0, epoch=0)
    own = [
        {k: v for k, v in row.items() if k not in {"step", "epoch", "time", "attempt"}}
        for row in lines(logger, "grad")
    ]
    assert own == [
        {
            "component": None,
            "l2": None,
            "l2_nonfinite": 1,
            "bins": [1.0, None, None],
            "bins_nonfinite": 2,
            "max": 2.0,
        },
        {"component": None, "l2": None, "l2_nonfinite": 1, "nonfinite": 0},
        {"component": None, "l2": None, "nonfinite": 7},
    ]


def test_rows_are_all_written_or_none(logger):
    with pytest.raises(TypeError, match=r"`odd` must be a number.*got object"):
        logger.log_rows("grad", [{"l2": 1.0}, {"odd": object()}], step=0, epoch=0)
    assert not (logger.path / "records").exists()
    with pytest.raises(ValueError, match="must leave `time` to RunLogger, got 3"):
        logger.log_rows("grad", [{"time": 3}], step=0, epoch=0)
    for prefix in ("../grad", "Grad", "", "a b"):
        with pytest.raises(ValueError, match="`prefix` must be a word in lower case, got"):
            logger.log_rows(prefix, [], step=0, epoch=0)


def test_metrics(logger):
    metrics = {
        "epoch": 2,
        "loss": torch.tensor(0.5),
        "lr": np.float32(0.25),
        "bad": math.nan,
        "time": 3.0,
        "component": 1.0,
    }
    logger.log_metrics(metrics, step=9)
    logger.log_metrics({"loss": 1.0})
    logger.log_metrics({"half_epoch": 1.0, "epoch": torch.tensor(1.5)}, step=10)
    first, second, third = lines(logger, "metrics")
    assert {k: v for k, v in first.items() if k != "time"} == {
        "step": 9,
        "epoch": 2,
        "attempt": 1,
        "component": None,
        "loss": 0.5,
        "lr": 0.25,
        "bad": None,
        "bad_nonfinite": 1,
        "metrics/time": 3.0,
        "metrics/component": 1.0,
    }
    assert (second["step"], second["epoch"]) == (9, None)
    assert third["epoch"] == 1


def test_metrics_never_raise(logger):
    with pytest.warns(UserWarning, match=r"`odd` must be a number.*got object"):
        logger.log_metrics({"loss": 1.0, "odd": object(), "nested": {"a": 1}, 3: 4.0}, step=0)
    (row,) = lines(logger, "metrics")
    assert row["loss"] == 1.0
    assert row["3"] == 4.0
    assert "odd" not in row


def test_notes(logger):
    logger.note("a pattern matched nothing", diagnostic="GradientHealth", severity="warning")
    logger.begin(step=30)
    logger.note("again", diagnostic="X", step=31, component="head")
    first, second = lines(logger, "notes")
    assert (first["step"], first["attempt"], first["severity"]) == (0, 1, "warning")
    assert (second["component"], second["message"], second["diagnostic"]) == ("head", "again", "X")
    assert [attempt["first_step"] for attempt in info(logger)["attempts"]] == [30]


def test_run_json(logger, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")
    logger.begin(step=0, info={"devices": ["cuda:0"], "path": logger.path, "api_key": "x"})
    logger.begin(step=7, info={"data": "sha256:ab"})
    written = info(logger)
    assert written["seed"] == 42
    assert written["devices"] == ["cuda:0"]
    assert written["data"] == "sha256:ab"
    assert written["api_key"] == "***"
    assert written["versions"]["torch"] == torch.__version__
    assert written["versions"]["lightning"].startswith("2.")
    assert written["status"] == "running"
    (attempt,) = written["attempts"]
    assert (attempt["attempt"], attempt["first_step"], attempt["ended"]) == (1, 0, None)
    logger.update_info(stop_reason="dead", extra={"a": math.inf})
    logger.finalize("success")
    written = info(logger)
    assert (written["status"], written["stop_reason"]) == ("finished", "dead")
    assert written["extra"] == {"a": None}
    (attempt,) = written["attempts"]
    assert attempt["status"] == "finished"
    assert attempt["started"] <= attempt["ended"]


def test_run_json_refuses_what_is_not_its_business(logger):
    with pytest.raises(TypeError, match=r"`value.model` must be .*, got object"):
        logger.begin(step=0, info={"model": object()})
    with pytest.raises(ValueError, match="`attempts` must be left to RunLogger"):
        logger.update_info(attempts=[])


def test_attempts_count_on_over_processes(tmp_path):
    for number in (1, 2):
        logger = RunLogger(tmp_path)
        logger.begin(step=number)
        logger.log_rows("grad", [{}], step=number, epoch=0)
        logger.finalize("success")
    logger = RunLogger(tmp_path)
    logger.begin(step=3)
    assert [one["attempt"] for one in info(logger)["attempts"]] == [1, 2, 3]
    ids = info(logger)["id"]
    RunLogger(tmp_path).begin(step=4)
    written = info(logger)
    assert [one["status"] for one in written["attempts"]] == [
        "finished",
        "finished",
        "interrupted",
        "running",
    ]
    assert written["id"] == ids


@pytest.mark.parametrize("content", [None, '{"id": "x", "att', "[]"])
def test_a_lost_run_json_costs_no_attempt(tmp_path, content):
    logger = RunLogger(tmp_path)
    for _ in range(3):
        logger.begin(step=0)
        logger.log_rows("grad", [{}], step=0, epoch=0)
        logger.finalize("success")
    (tmp_path / "records" / "grad.jsonl").open("a").write('{"step":1,"attempt":9')
    if content is None:
        (tmp_path / "run.json").unlink()
    else:
        (tmp_path / "run.json").write_text(content)
    logger = RunLogger(tmp_path)
    logger.log_rows("other", [{}], step=0, epoch=0)
    assert lines(logger, "other")[0]["attempt"] == 4


class Odd:
    pass


def test_hyper_parameters(logger):
    logger.log_hyperparams(
        {
            "lr": 0.1,
            "clip": math.inf,
            "net": torch.nn.ReLU,
            "act": torch.nn.ReLU(),
            "odd": [Odd()],
            "build": partial(torch.optim.AdamW, lr=0.1),
            "fn": len,
            "password": "hunter2",
            "wandb": {"api_key": "k", "token": "t", "project": "p"},
            "openAiToken": "abc",
            "AWS_SECRET_ACCESS_KEY": "abc",
            "url": "postgres://me:hunter2@host/db",
            "credentials": {"user": "u"},
            "logins": [{"secret": 5}],
            "tokenizer": "bpe",
            "max_tokens": 512,
            "pad_token": "<pad>",
            "num_tokens": [1, 2],
            "key": "id",
            "monkey": "x",
            "secretary": "y",
        }
    )
    text = (logger.path / "config.yaml").read_text()
    assert "hunter2" not in text
    assert "!!python" not in text
    assert yaml.safe_load(text) == {
        "lr": 0.1,
        "clip": math.inf,
        "net": "torch.nn.modules.activation.ReLU",
        "act": "torch.nn.modules.activation.ReLU",
        "odd": [f"{Odd.__module__}.Odd"],
        "build": {"_target_": "torch.optim.adamw.AdamW", "_partial_": True, "lr": 0.1},
        "fn": "len",
        "password": "***",
        "wandb": {"api_key": "***", "token": "***", "project": "p"},
        "openAiToken": "***",
        "AWS_SECRET_ACCESS_KEY": "***",
        "url": "postgres://me:***@host/db",
        "credentials": "***",
        "logins": [{"secret": "***"}],
        "tokenizer": "bpe",
        "max_tokens": 512,
        "pad_token": "<pad>",
        "num_tokens": "***",
        "key": "id",
        "monkey": "x",
        "secretary": "y",
    }


def test_hyper_parameters_are_merged(logger):
    config = OmegaConf.create({"seed": 1, "optimizer": {"lr": 0.1, "name": "adam"}, "lr": 3})
    logger.log_hyperparams(config)
    logger.log_hyperparams(Namespace(lr=4, optimizer="Adam object"))
    logger.log_hyperparams({"optimizer": {"lr": 0.2}})
    logger.log_hyperparams({})
    logger.update_info()
    assert read_run(logger.path).config == {
        "seed": 1,
        "optimizer": {"lr": 0.2, "name": "adam"},
        "lr": 4,
    }


def test_hyper_parameters_never_raise(logger):
    loop = {}
    loop["loop"] = loop
    with pytest.warns(UserWarning, match="hyper-parameters were not recorded.*contain itself"):
        logger.log_hyperparams(loop)
    with pytest.warns(UserWarning, match="hyper-parameters were not recorded"):
        logger.log_hyperparams(3)
    logger.path.mkdir()
    (logger.path / "config.yaml").write_text("a: [")
    with pytest.warns(UserWarning, match="config.yaml` must be YAML"):
        logger.log_hyperparams({"a": 1})
    assert (logger.path / "config.yaml").read_text() == "a: ["


def test_other_ranks_write_nothing(logger, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.begin(step=0)
    logger.log_rows("grad", [{}], step=0, epoch=0)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_hyperparams({"a": 1})
    logger.note("x", diagnostic="y")
    logger.update_info(a=1)
    logger.finalize("success")
    assert logger.positions() == {}
    assert not logger.path.exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_with_the_attempt(logger, copied):
    logger.begin(step=0)
    logger.log_rows("grad", [{"who": 1}], step=0, epoch=0)
    other = copied(logger)
    other.log_rows("grad", [{"who": 2}], step=1, epoch=0)
    logger.log_rows("grad", [{"who": 1}], step=2, epoch=0)
    rows = lines(logger, "grad")
    assert [row["who"] for row in rows] == [1, 2, 1]
    assert {row["attempt"] for row in rows} == {1}


def test_a_forked_process_opens_the_files_itself(logger):
    logger.log_rows("grad", [{}], step=0, epoch=0)
    child = os.fork()
    if child == 0:
        logger.log_rows("grad", [{}], step=1, epoch=0)
        os._exit(0)
    os.waitpid(child, 0)
    logger.log_rows("grad", [{}], step=2, epoch=0)
    assert [row["step"] for row in lines(logger, "grad")] == [0, 1, 2]


def test_positions_are_the_sizes_of_the_files(logger):
    logger.log_rows("grad", [{}], step=0, epoch=0)
    logger.log_metrics({"a": 1.0}, step=0)
    folder = logger.path / "records"
    assert logger.positions() == {
        "grad": (folder / "grad.jsonl").stat().st_size,
        "metrics": (folder / "metrics.jsonl").stat().st_size,
    }
    assert RunLogger(logger.path).positions() == logger.positions()


class Line(LightningModule):
    """One weight; the loss of step k is known: w is multiplied by 0.9 each step."""

    def __init__(self, width=1, api_key="abc", fails=None):
        super().__init__()
        self.save_hyperparameters(ignore=["fails"])
        self.w = torch.nn.Parameter(torch.ones(width))
        self.fails = fails

    def training_step(self, batch, batch_idx):
        if self.fails and self.global_step == 5:
            raise self.fails
        loss = self.w.square().sum() / 2
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_w", self.w.sum())

    def test_step(self, batch, batch_idx):
        self.log("test_w", self.w.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def batches():
    return torch.utils.data.DataLoader(torch.zeros(8, 1), batch_size=1)


@pytest.fixture
def train(quiet, batches):
    def trained(logger, module=None, ckpt_path=None, **arguments):
        trainer = Trainer(logger=logger, **{**quiet, "log_every_n_steps": 2, **arguments})
        trainer.fit(module or Line(), batches, batches, ckpt_path=ckpt_path)
        return trainer

    return trained


def test_a_trainer_with_no_other_logger(logger, train, batches):
    trainer = train(logger, max_epochs=2, enable_checkpointing=True)
    run = read_run(logger.path)
    rows = run.metrics.filter(run.metrics["train_loss"].is_not_null())
    assert rows["step"].to_list() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert rows["epoch"].to_list() == [0] * 4 + [1] * 4
    expected = [0.9 ** (2 * step) / 2 for step in rows["step"]]
    assert rows["train_loss"].to_list() == pytest.approx(expected, rel=1e-5)
    values = run.metrics.filter(run.metrics["val_w"].is_not_null())
    assert values["step"].to_list() == [7, 15]
    assert values["val_w"].to_list() == pytest.approx([0.9**8, 0.9**16], rel=1e-5)
    assert run.config == {"width": 1, "api_key": "***"}
    assert (run.info["status"], run.info["stop_reason"]) == ("finished", None)
    assert list((logger.path / "checkpoints").glob("*.ckpt"))
    assert trainer.log_dir == str(logger.path)
    assert not list(logger.path.rglob("*.pkl"))
    trainer.test(Line(), batches, verbose=False)
    trainer = Trainer(logger=RunLogger(logger.path), accelerator="cpu", enable_progress_bar=False)
    trainer.test(Line(), batches, verbose=False)
    run = read_run(logger.path)
    assert run.metrics["train_loss"].count() == 8
    assert run.metrics["test_w"].to_list()[-2:] == pytest.approx([1.0, 1.0])
    assert run.info["status"] == "finished"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("boom"), "failed", "RuntimeError: boom"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (SystemExit(3), "interrupted", "SystemExit: 3"),
    ],
)
def test_how_a_training_ended_is_written(logger, train, error, status, reason):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((RuntimeError, SystemExit)):
        train(logger, Line(fails=error))
    signal.signal(signal.SIGINT, handler)
    written = info(logger)
    assert (written["status"], written["stop_reason"]) == (status, reason)
    (attempt,) = written["attempts"]
    assert (attempt["status"], attempt["stop_reason"]) == (status, reason)
    assert attempt["ended"] is not None
    assert read_run(logger.path).metrics["train_loss"].count() == 2


def test_a_training_that_fails_before_its_first_row_is_written_too(logger, train):
    class Broken(Line):
        def configure_optimizers(self):
            raise ValueError("no optimizer")

    with pytest.raises(ValueError, match="no optimizer"):
        train(logger, Broken())
    assert info(logger)["stop_reason"] == "ValueError: no optimizer"


@pytest.mark.distributed
def test_a_strategy_that_spawns(logger, batches, quiet):
    arguments = {**quiet, "devices": 2, "strategy": "ddp_fork", "log_every_n_steps": 2}
    Trainer(logger=logger, **arguments).fit(Line(), batches)
    assert read_run(logger.path).metrics["step"].to_list() == [1, 3]
    assert info(logger)["status"] == "finished"
    # the exception stays in the other process, and this one says how it ended
    with pytest.raises(Exception, match=r"(?s)boom|terminated"):
        Trainer(logger=logger, **{**arguments, "max_epochs": 2}).fit(
            Line(fails=RuntimeError("boom")), batches
        )
    written = info(logger)
    assert [one["status"] for one in written["attempts"]] == ["finished", "failed"]
    assert written["stop_reason"] == "RuntimeError: boom"


def test_every_row_written_survives_kill_minus_nine(tmp_path):
    code = """
        import sys
        from lightning_diag.records import RunLogger
        logger = RunLogger(sys.argv[1])
        logger.begin(step=0)
        step = 0
        while True:
            rows = [{"component": name, "l2": 0.5, "pad": "x" * 300} for name in "abc"]
            logger.log_rows("grad", rows, step=step, epoch=0)
            sys.stdout.write(f"{step}\\n")
            sys.stdout.flush()
            step += 1
    """
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(200):
            said = int(process.stdout.readline())
        process.kill()
        rest = process.stdout.read().splitlines()
        process.wait()
        said = max([said, *(int(word) for word in rest if word)])
        run = read_run(tmp_path)
        assert run.torn == {}
        steps = run.grad["step"].to_list()
        assert steps[: 3 * said + 3] == [step for step in range(said + 1) for _ in "abc"]
        assert steps == sorted(steps)
    assert run.info["status"] == "running"
    assert [one["status"] for one in run.info["attempts"]] == ["interrupted", "running"]
