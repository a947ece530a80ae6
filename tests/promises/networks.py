"""Small networks with everything that a diagnostic could disturb, and their data."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.lightning import LightningModule

TOKENS, WIDTH = 16, 8


class Net(nn.Module):
    """Dropout draws random numbers, the normalization keeps buffers, one layer is never reached."""

    def __init__(self, *, sparse: bool = False, tied: bool = False, spectral: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH, sparse=sparse)
        self.attend = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)
        self.body = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.3), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS)
        self.unused = nn.Linear(2, 2)
        if tied:
            self.head.weight = self.embed.weight
        if spectral:
            # each look at its weight goes on with the power iteration
            nn.utils.parametrizations.spectral_norm(self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.embed(tokens)
        hidden = (words + self.attend(words, words, words, need_weights=False)[0]).mean(1)
        return self.head(self.norm(hidden + self.body(hidden)))


class Classifier(LightningModule):
    """One optimizer, a schedule by step, and random numbers from three generators."""

    def __init__(
        self,
        *,
        sparse: bool = False,
        tied: bool = False,
        spectral: bool = False,
        fused: bool = False,
        backend: str | None = None,
        spike_at: int | None = None,
        nothing_at: int | None = None,
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        net = Net(sparse=sparse, tied=tied, spectral=spectral)
        self.net = net if backend is None else torch.compile(net, backend=backend)
        self.sparse, self.fused = sparse, fused
        self.spike_at, self.nothing_at = spike_at, nothing_at
        self.prog_bar = prog_bar

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        loss = F.cross_entropy(self.net(tokens), labels)
        # beyond half precision once the scaler has multiplied it
        return loss * 1e8 if batch_idx == self.spike_at else loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx == self.nothing_at:
            return None
        loss = self.loss(batch, batch_idx) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        self.log("train_loss", loss, prog_bar=self.prog_bar)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch, -1), prog_bar=self.prog_bar)

    def configure_optimizers(self) -> object:
        if self.sparse:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Manual(Classifier):
    """One optimizer stepped by hand, its gradients clipped by hand."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        loss = self.loss(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()
        return loss.detach()


class TwoOptimizers(Classifier):
    """Two optimizers in turn, so that each sees old gradients of the other."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for optimizer in self.optimizers():
            loss = self.loss(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss.detach()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        head = list(self.net.head.parameters())
        parts = (self.net.embed, self.net.attend, self.net.body)
        rest = [parameter for part in parts for parameter in part.parameters()]
        return [torch.optim.AdamW(rest, lr=0.01), torch.optim.SGD(head, lr=0.1, momentum=0.9)]


class Sharded(Classifier):
    """The network cut into shards over all ranks; the plain network where there is one rank."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net.body, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def batches(count: int = 6, **options: object) -> DataLoader:
    """Batches of four sequences; a generator of their own leaves the global one alone."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(TOKENS, (4 * count, 5), generator=generator)
    labels = torch.randint(TOKENS, (4 * count,), generator=generator)
    return DataLoader(TensorDataset(tokens, labels), batch_size=4, **options)
