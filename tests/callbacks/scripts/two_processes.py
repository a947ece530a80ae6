"""Trains with two processes, watched by GradientHealth: `two_processes.py ddp|fsdp2 FOLDER`."""
# ruff: noqa: E402 (the import decides which of the two Lightning packages is meant)

import importlib
import os
import sys
from pathlib import Path

importlib.import_module(os.environ.get("LIGHTNING_DIAG_TEST_PACKAGE", "pytorch_lightning"))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_diag import GradientHealth, RunLogger
from lightning_diag.lightning import PACKAGE, LightningModule, Trainer


class Regression(LightningModule):
    """Odd sizes, so that the shards of two processes differ and some are empty."""

    def __init__(self, shard: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.encoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
            self.head = nn.Linear(4, 1)
            self.still = nn.Linear(2, 3).requires_grad_(False)
        self.shard = shard

    def configure_model(self) -> None:
        if self.shard:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for part in (self.encoder, self.head, self.still):
                fully_shard(part, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        loss = (self.head(self.encoder(x)) - x.sum(1, keepdim=True)).square().mean()
        # one gradient that is not finite, though only on the last rank's own data
        if batch_idx == 5 and self.trainer.global_rank == self.trainer.world_size - 1:
            loss = loss * torch.inf
        return loss

    def train_dataloader(self) -> DataLoader:
        # the same rows make up each step, whatever the number of processes
        data = TensorDataset(torch.randn(64, 3, generator=torch.Generator().manual_seed(5)))
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data, ranks, rank, shuffle=False)
        return DataLoader(data, batch_size=8 // ranks, sampler=sampler)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def strategy(mode: str) -> object:
    if mode == "single":
        return "auto"
    if mode == "ddp":
        return "ddp_fork"
    kind = importlib.import_module(f"{PACKAGE}.strategies").ModelParallelStrategy
    return kind(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def train(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    health = GradientHealth(
        every_n_steps=2, zeros_every=1, per_parameter=True, histogram=True, on_error="raise"
    )
    trainer = Trainer(
        callbacks=[health],
        logger=RunLogger(folder),
        accelerator="cpu",
        devices=1 if mode == "single" else 2,
        strategy=strategy(mode),
        max_epochs=1,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Regression(shard=mode == "fsdp2"))
    rank = folder / f"rank-{trainer.global_rank}"
    rank.write_text(str(trainer.callback_metrics["grad/encoder/missing"].item()))


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
