"""Models that break at a planned step, each in one known place."""

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag import RunLogger
from lightning_diag.callbacks.collapse_stop import CollapseStop
from lightning_diag.lightning import LightningModule, Trainer
from tests.promises.modes import MODES as PROMISE_MODES
from tests.promises.trace import QUIET, seed, snapshot

ODD, STEPS = 5, 8
NAN, INF = float("nan"), float("inf")


class Fault(nn.Module):
    """Passes on what it is given, until it is told to be odd."""

    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.spoil = spoil
        self.odd = False

    def forward(self, x: Tensor) -> Tensor:
        return self.spoil(x) if self.odd else x


class Broken(LightningModule):
    """Dropout, running statistics, a counter, and a `Fault` deep inside.

    What it draws, counts and logs must be as if nobody had made a step again.
    """

    def __init__(self, spoil: Callable[[Tensor], Tensor] = lambda x: x, **options: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first = nn.Linear(3, 8)
            self.body = nn.Sequential(
                nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Sequential(nn.Tanh(), Fault(spoil))
            )
            self.head = nn.Linear(8, 2)
        self.options = options
        self.calls, self.seen = 0, []

    @property
    def fault(self) -> Fault:
        return next(part for part in self.modules() if isinstance(part, Fault))

    def loss(self, batch: list[Tensor]) -> Tensor:
        hidden = self.body(self.first(batch[0]) * self.options.get("gain", 1))
        return F.mse_loss(self.head(hidden), batch[1])

    def prepare(self, batch_idx: int) -> bool:
        """Count, draw and log; whether this step is odd."""
        self.calls += 1
        self.seen.append(self.calls)
        odd = batch_idx == self.options.get("odd", ODD)
        self.fault.odd = odd
        if self.options.get("draws"):
            self.log("drawn", random.random() + np.random.rand())
        return odd

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        odd = self.prepare(batch_idx)
        batch.append(torch.zeros(1))
        loss = self.loss(batch)
        if self.options.get("draws"):
            loss = loss * (1 + random.random() + np.random.rand())
        spoil = self.options.get("at_end")
        loss = spoil(loss) if spoil and odd else loss
        self.log("train_loss", loss)
        self.logger.log_metrics({"own": 1.0}, step=self.calls)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class BrokenByHand(Broken):
    """The same under manual optimization, with two optimizers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.prepare(batch_idx)
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        lower = [*self.first.parameters(), *self.body.parameters()]
        return [
            torch.optim.SGD(lower, lr=0.01),
            torch.optim.Adam(self.head.parameters(), lr=0.01),
        ]


class BrokenTransformer(Broken):
    """One row of the attention is masked as a whole at the odd step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
            self.cross = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def loss(self, batch: list[Tensor]) -> Tensor:
        words = self.first(batch[0]).unsqueeze(1).expand(-1, 4, -1)
        mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -INF)
        if self.fault.odd:
            mask[2] = -INF
        seen = self.encoder(words)
        # with its weights asked for, no fused kernel makes zeros of what has no valid place
        mixed, _ = self.cross(seen, words, words, attn_mask=mask)
        return F.mse_loss(self.head(mixed.mean(1)), batch[1])


def data(rows: int = 8 * STEPS, *, spoil: Callable[[Tensor], None] | None = None) -> DataLoader:
    """Eight rows a batch."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(rows, size, generator=generator) for size in (3, 2))
    if spoil is not None:
        spoil(x)
    return DataLoader(TensorDataset(x, y), batch_size=8)


class Ranked(Broken):
    """On the second rank alone something is odd, or the step talks to the other rank."""

    def __init__(self, kind: str) -> None:
        def spoil(x: Tensor) -> Tensor:
            odd = x[:, :1] * 0
            return torch.cat([odd.sqrt() if kind == "gradient" else odd.log(), x[:, 1:]], 1)

        super().__init__(spoil)
        self.kind = kind

    def prepare(self, batch_idx: int) -> bool:
        super().prepare(batch_idx)
        rank = int(os.environ["LOCAL_RANK"])
        self.fault.odd = batch_idx == ODD and rank == 1
        return False

    def loss(self, batch: list[Tensor]) -> Tensor:
        if self.kind == "talks":
            everyone = [torch.zeros(8, 3) for _ in range(2)]
            torch.distributed.all_gather(everyone, batch[0])
        return super().loss(batch)


def train_ranked(kind: str, find: bool, folder: Path) -> None:
    """One rank; what it says and has learned goes into the folder."""
    torch.set_num_threads(1)
    rank = os.environ["LOCAL_RANK"]
    stop = CollapseStop(action="warn", find_nonfinite=find, on_error="raise")
    settings = {**QUIET, **PROMISE_MODES["ddp"].trainer(), "max_epochs": 1}
    settings |= {"default_root_dir": folder, "logger": RunLogger(folder / "run")}
    seed()
    module = Ranked(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(callbacks=[stop], **settings)
        trainer.fit(module, data(16 * STEPS))
    told = [str(one.message) for one in caught if "not finite. " in str(one.message)]
    left = {"told": told, "state": snapshot(trainer, module), "calls": module.calls}
    torch.save(left, folder / f"left_{rank}.pt")
