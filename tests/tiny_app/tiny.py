"""Somebody's own project, as small as it gets: the target is the sum of three numbers."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.lightning import LightningDataModule, LightningModule


class Sums(LightningDataModule):
    fingerprint = "sha256:of-the-sums"

    def __init__(self, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(seed))
        self.rows = TensorDataset(x, x.sum(1, keepdim=True))
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, self.batch_size)

    val_dataloader = train_dataloader


class Tiny(LightningModule):
    def __init__(self, optimizer, width: int = 4, fail_at: int | None = None) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"`width` must be at least 1, got {width}.")
        self.encoder, self.head = nn.Linear(3, width), nn.Linear(width, 1)
        self.optimizer, self.fail_at = optimizer, fail_at

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self.head(self.encoder(batch[0])) - batch[1]).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("the tiny model was told to fail")
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())
