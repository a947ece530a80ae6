"""What the tests of WiringCheck run in two processes."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_diag import RunLogger
from lightning_diag.callbacks.wiring_check import WiringCheck
from lightning_diag.lightning import Callback, LightningModule, Trainer
from tests.promises.modes import MODES
from tests.promises.networks import batches
from tests.promises.trace import QUIET, seed

ODD_STEP = 4


class Odd(Callback):
    """Makes one rank odd: a weight of its own, or a diagnostic that fails there alone."""

    def __init__(self, kind: str, check: WiringCheck) -> None:
        self.kind = kind
        self.check = check
        self.rank = int(os.environ["LOCAL_RANK"])

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Any
    ) -> None:
        if self.rank != 1 or trainer.global_step != ODD_STEP:
            return
        if self.kind == "drift":
            with torch.no_grad():
                module.net.body[0].weight[0, 0] += 1e-3

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.rank != 1 or trainer.global_step != ODD_STEP:
            return
        if self.kind == "error":
            self.check._begin = self.fail
        if self.kind == "error inside":
            self.check.parts = self.fail
            self.check._known_book = None

    def fail(self, *args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("planted on one rank")


def train_odd(mode: str, kind: str, interval: int | str, folder: Path) -> None:
    """One rank of two; what it saw goes into the folder."""
    torch.set_num_threads(1)
    seed()
    chosen = MODES[mode]
    check = WiringCheck(every_n_steps=interval)
    options = {**QUIET, **chosen.trainer(), "default_root_dir": folder, "max_epochs": 4}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(
            callbacks=[Odd(kind, check), check],
            logger=RunLogger(folder / "run"),
            **{key: value for key, value in options.items() if key != "logger"},
        )
        module = chosen.module()
        trainer.fit(module, batches())
    told = [str(warning.message) for warning in caught if "has ended" in str(warning.message)]
    weights = {name: x.detach().clone() for name, x in module.state_dict().items()}
    left = {"step": trainer.global_step, "told": told}
    if mode == "ddp":
        left["weights"] = weights
    torch.save(left, folder / f"left_{os.environ['LOCAL_RANK']}.pt")
