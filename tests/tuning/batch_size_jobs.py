"""What the processes of the batch-size tests train; each `make` is found by its name."""

import os
import signal
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.lightning import LightningModule

SAMPLES = 64
WARM = 1.5
BATCH = 0.02
MIB = 2**20


class Job(LightningModule):
    """Predicts twice its input; `eats` MiB of memory a sample, sleeps, fails where told to."""

    def __init__(self, *, sleeps=False, eats=0, dies_in=None, fails_in=None, poisons=False):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.sleeps, self.eats = sleeps, eats
        self.dies_in, self.fails_in, self.poisons = dies_in, fails_in, poisons
        nn.init.ones_(self.layer.weight)

    def training_step(self, batch, batch_idx):
        if self.current_epoch == self.dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.current_epoch == self.fails_in:
            raise RuntimeError("the job was told to fail\nin two lines")
        if self.sleeps:
            first = self.current_epoch == 0 and batch_idx == 0
            time.sleep(WARM if first else BATCH)
        if self.eats:
            torch.ones(len(batch[0]) * self.eats * MIB, dtype=torch.uint8, device=self.device)
        return (self.layer(batch[0]) - 2 * batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        if self.sleeps and batch_idx == 0:
            time.sleep(WARM)
        self.log("val_loss", (self.layer(batch[0]) - 2 * batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader(batch_size, samples=SAMPLES):
    return DataLoader(TensorDataset(torch.ones(samples, 1)), batch_size)


def make(batch_size, accelerator="cpu", accumulate=1, samples=SAMPLES, marks=None, **module):
    if marks is not None:
        with open(marks, "a") as file:
            file.write(f"{os.getpid()} {os.getppid()}\n")
    trainer = {
        "accelerator": accelerator,
        "accumulate_grad_batches": accumulate,
        "max_epochs": 1000,
        "callbacks": [Refused()],
        "devices": 2,
    }
    data = (loader(batch_size, samples), loader(batch_size, samples))
    return trainer, Job(**module), data


class Refused:
    """No callback at all: a Trainer that takes it fails."""


def hangs(batch_size):
    time.sleep(1000)
