"""Do shards on two ranks give the updates that the whole weights give?"""

import json
import math
import os
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from lightning_diag import RunLogger
from lightning_diag.callbacks.update_ratio import UpdateRatio
from lightning_diag.lightning import Callback, Trainer
from tests.callbacks.witness import rows
from tests.promises.modes import MODES
from tests.promises.networks import batches
from tests.promises.processes import needs_fork, run_ranks
from tests.promises.trace import QUIET, seed

pytestmark = [pytest.mark.distributed, needs_fork]
BROKEN = 5


class Norms(Callback):
    """The norms of whole weights and of their updates, worked out apart."""

    def __init__(self) -> None:
        self.kept: list[list[torch.Tensor]] = []
        self.found: dict[int, tuple[float, float]] = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.before = {name: _whole(p) for name, p in module.named_parameters()}
        self.there = {name for name, p in module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, module, *_):
        after = {name: _whole(p) for name, p in module.named_parameters()}
        update = sum((after[n] - self.before[n]).square().sum().item() for n in self.there)
        weight = sum(self.before[n].square().sum().item() for n in self.there)
        self.found[trainer.global_step - 1] = (math.sqrt(update), math.sqrt(weight))


def _whole(parameter):
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).double().clone()


def train_rank(mode: str, fails: str, folder: Path) -> None:
    """One rank of two; measuring may fail on the second."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = os.environ["LOCAL_RANK"]
    seed()
    norms = Norms()

    class Breaks(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if fails and rank == "1" and trainer.global_step == BROKEN:
                home = import_module("lightning_diag.callbacks.update_ratio_rows")
                setattr(home, fails, lambda *_, **__: 1 / 0)

    options = {**QUIET, **MODES[mode].trainer(), "default_root_dir": folder, "max_epochs": 4}
    options["logger"] = RunLogger(folder / "run")
    diagnostic = UpdateRatio({"body": "*body*"}, every_n_steps=2)
    trainer = Trainer(callbacks=[Breaks(), diagnostic, norms], **options)
    trainer.fit(MODES[mode].module(), batches())
    assert trainer.global_step == 12
    Path(folder, f"norms_{rank}.json").write_text(json.dumps(norms.found))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_numbers_are_those_of_the_whole_weights(mode, tmp_path):
    run_ranks(train_rank, mode, "", tmp_path)
    truth = json.loads(Path(tmp_path, "norms_0.json").read_text())
    found = rows(tmp_path / "run", "update", component=None)
    assert [row["step"] for row in found] == [1, 3, 5, 7, 9, 11]
    for row in found:
        update, weight = truth[str(row["step"])]
        assert row["update_l2"] == pytest.approx(update, rel=1e-6)
        assert row["weight_l2"] == pytest.approx(weight, rel=1e-6)
        assert row["skipped"] == row["unchanged"] == 0
        assert row["lr"] == pytest.approx(0.01 * 0.9 ** (row["step"] // 3))
    # the row of a part holds that part alone
    parts = rows(tmp_path / "run", "update", component="body")
    assert [row["count"] for row in parts] == [2 * 8 * 16 + 16 + 8] * 6


@pytest.mark.parametrize("fails", ["gradient_sizes", "update_table"])
def test_a_rank_that_fails_keeps_nobody_waiting(fails, tmp_path):
    run_ranks(train_rank, "fsdp2", fails, tmp_path, timeout=90)
    found = rows(tmp_path / "run", "update", component=None)
    assert [row["step"] for row in found] == [1, 3]
