"""What the tests of replicas that come apart run in two processes."""

import os
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lightning_diag import RunLogger, WiringCheck
from lightning_diag.lightning import Trainer
from tests.faults import data
from tests.faults.case import DEFAULTS, Config, merged
from tests.faults.networks import CNN, MLP, Learner

STEPS = 60
ONSET = 30


class NewHead(Learner):
    """Makes its head when training starts, each process by random numbers of its own."""

    def on_train_start(self) -> None:
        torch.manual_seed(100 + int(os.environ["LOCAL_RANK"]))
        nn.init.xavier_uniform_(self.net.head.weight)


class ClippedByOne(Learner):
    """Limits the weights of the features from a step on, in the first process alone."""

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        if self.global_step >= ONSET and self.trainer.is_global_zero:
            with torch.no_grad():
                for parameter in self.net.features.parameters():
                    parameter.clamp_(-0.05, 0.05)


def job(kind: str, config: Config) -> tuple[Learner, object]:
    """The module and its batches: ``healthy``, ``start`` or ``clipped``."""
    torch.manual_seed(11)
    if kind == "clipped":
        x, y = data.images(2048)
        return ClippedByOne(CNN(1, 4, batch_norm=False), F.cross_entropy, config), (x, y)
    x, y = data.blobs(2048)
    module = NewHead if kind == "start" else Learner
    return module(MLP([16, 64, 64, 4]), F.cross_entropy, config), (x, y)


def train_apart(kind: str, folder: Path) -> None:
    """One process of two: trains, and leaves its weights in the folder."""
    torch.set_num_threads(1)
    config = merged(DEFAULTS, {"trainer": {"max_steps": STEPS}})
    module, tensors = job(kind, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_steps=STEPS,
            logger=RunLogger(folder / "run"),
            callbacks=[WiringCheck(every_n_steps=10, on_error="raise")],
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, data.loader(*tensors))
    weights = {name: x.detach().clone() for name, x in module.state_dict().items()}
    torch.save(weights, folder / f"weights_{os.environ['LOCAL_RANK']}.pt")
