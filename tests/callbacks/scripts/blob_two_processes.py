"""Trains with two processes, watched by BlobMetrics: `blob_two_processes.py MODE FOLDER`."""
# ruff: noqa: E402 (the import decides which of the two Lightning packages is meant)

import importlib
import os
import sys
import warnings
from pathlib import Path

importlib.import_module(os.environ.get("LIGHTNING_DIAG_TEST_PACKAGE", "pytorch_lightning"))

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag import RunLogger
from lightning_diag.callbacks import blob_metrics
from lightning_diag.lightning import PACKAGE, Trainer
from tests.callbacks.test_blob_metrics import D, Denoiser


class Sharded(Denoiser):
    """The same blobs; the first layer cut over two ranks, another left whole."""

    def __init__(self, shard: bool) -> None:
        super().__init__(lr=0.01)
        self.shard = shard

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.fc2(self.fc1(batch[0])).square().mean() + self.small(batch[0][:, :3]).sum()

    def configure_model(self) -> None:
        if self.shard:
            from torch.distributed.fsdp import fully_shard

            for part in (self.fc1, self.fc2):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def fail_later() -> None:
    """From its second measurement on, clustering fails on rank 0."""
    real, calls = blob_metrics.blob_summaries, []

    def summaries(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise ZeroDivisionError
        return real(*args, **kwargs)

    blob_metrics.blob_summaries = summaries


def train(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    arguments = {"strategy": "auto", "devices": 1}
    if mode != "single":
        arguments = {"strategy": "ddp_fork", "devices": 2}
    if mode in ("fsdp2", "broken"):
        kind = importlib.import_module(f"{PACKAGE}.strategies").ModelParallelStrategy
        arguments["strategy"] = kind(2, 1, process_group_backend="gloo")
    if mode == "broken":
        fail_later()
    diagnostic = blob_metrics.BlobMetrics(
        every_n_steps=3,
        sample_size=3000,
        on_error="warn" if mode == "broken" else "raise",
    )
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[diagnostic],
        logger=RunLogger(folder),
        max_epochs=4,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **arguments,
    )
    data = DataLoader(TensorDataset(torch.ones(16, D)), batch_size=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Sharded(mode in ("fsdp2", "broken")), data)
    if mode == "broken":
        told = [str(one.message) for one in caught if "BlobMetrics has ended" in str(one.message)]
        (folder / f"told_{trainer.global_rank}.txt").write_text("\n".join(told))
        assert trainer.global_step == 16


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
