"""What the tests of CollapseStop on several ranks run, in processes of their own."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag import RunLogger
from lightning_diag.callbacks import collapse_window
from lightning_diag.callbacks.collapse_stop import CollapseStop
from lightning_diag.lightning import LightningModule, Trainer
from tests.promises.modes import MODES
from tests.promises.trace import QUIET, plain

STEPS, ODD_STEP = 14, 6


class Ranked(LightningModule):
    """Two ranks, the second of which may be odd from one step on."""

    def __init__(self, kind: str, *, shard: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.kind, self.shard = kind, shard
        self.rank = int(os.environ["LOCAL_RANK"])
        self.norms: dict[int, float] = {}

    def configure_model(self) -> None:
        if self.shard:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        odd = self.rank == 1 and self.global_step >= ODD_STEP
        seen = logits.detach()
        if self.kind == "loss" and odd:
            # the gradient stays as it was: the loss alone tells
            loss = loss + torch.nan * loss.detach()
        if self.kind == "data" and odd and self.global_step == ODD_STEP:
            loss = loss * torch.nan
        if self.kind == "classes" or (self.kind == "classes_of_one" and self.rank == 1):
            seen = seen + torch.tensor([0.0, 100.0])
        elif self.kind == "classes_of_one":
            seen = seen + 100 * nn.functional.one_hot(torch.arange(8) % 2, 2)
        return {"loss": loss, "logits": seen, "target": y}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        total = torch.zeros((), dtype=torch.float64)
        for parameter in self.parameters():
            grad = parameter.grad
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            total += whole.double().square().sum()
        self.norms[self.global_step] = float(total.sqrt())

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def break_something(kind: str) -> None:
    """From now on something that CollapseStop computes fails in this process."""

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("planted on one rank")

    name = "gradient_squares" if kind == "gradient_error" else "prediction_numbers"
    setattr(collapse_window, name, broken)


class Breaks(CollapseStop):
    """Fails on the second rank, at some place and step."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_start(trainer, *args)
        if os.environ["LOCAL_RANK"] == "1" and trainer.global_step == ODD_STEP:
            break_something(trainer.lightning_module.kind)


def train_ranked(mode: str, kind: str, options: dict[str, Any], folder: Path) -> None:
    """One rank; what it saw goes into the folder."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8 * 2 * STEPS, 3, generator=generator)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    module = Ranked(kind, shard=mode == "fsdp2")
    stop = (Breaks if kind.endswith("error") else CollapseStop)(**options)
    settings = {**QUIET, **MODES[mode].trainer(), "default_root_dir": folder, "max_epochs": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(callbacks=[stop], **settings | {"logger": RunLogger(folder / "run")})
        trainer.fit(module, loader)
    told = [str(warning.message) for warning in caught if "has ended" in str(warning.message)]
    left = {
        "step": trainer.global_step,
        "reason": trainer.stop_reason,
        "told": told,
        "norms": module.norms,
        "weights": plain(module.state_dict()),
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
    }
    torch.save(left, folder / f"left_{rank}.pt")
