"""What the tests of component learning rates run in processes of their own."""

import os
from pathlib import Path

import torch

from lightning_diag.lightning import Callback, LightningModule, Trainer
from tests.promises.networks import Classifier, batches
from tests.promises.trace import QUIET, plain, seed

FACTORS = {"embed": 0.1, "head": 2.0}


class ByComponent(Classifier):
    """The network of the promises with a learning rate for each part, and a schedule by step."""

    factors = FACTORS

    def configure_optimizers(self) -> object:
        from lightning_diag import param_groups

        groups = param_groups(self, self.factors, base_lr=0.01)
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Rates(Callback):
    """Keeps the learning rates that each step is made with, by group."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.steps.append({group["name"]: group["lr"] for group in optimizer.param_groups})


def train_ddp(folder: Path) -> None:
    """One of two processes that train together; its rates and weights go into the folder."""
    torch.set_num_threads(1)
    seed()
    module, rates = ByComponent(), Rates()
    options = {**QUIET, "devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    options |= {"max_epochs": 1, "limit_val_batches": 0, "default_root_dir": folder}
    trainer = Trainer(callbacks=[rates], **options)
    trainer.fit(module, batches(12))
    left = {"rates": rates.steps, "weights": plain(module.state_dict())}
    torch.save(left, folder / f"left_{os.environ['LOCAL_RANK']}.pt")
