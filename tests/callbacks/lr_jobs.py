"""A network whose learning rate is searched, and trainings of it in processes of their own."""

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import BinaryAccuracy

from lightning_diag import LRCache, RunLogger
from lightning_diag.lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning_diag.tuning.lr_search import range_test

ROWS, BATCH = 330, 32


class Rows(Dataset):
    """Separable rows, with noise that the data set draws itself and a count of its readings."""

    def __init__(self, noisy: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.noisy = noisy
        self.x = torch.randn(ROWS, 20, generator=generator)
        self.y = (self.x[:, :2].sum(1) > 0).long()
        self.noise, self.readings = np.random.default_rng(3), 0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        self.readings += 1
        noise = torch.from_numpy(self.noise.standard_normal(20)).float()
        return self.x[place] + 0.01 * self.noisy * noise, self.y[place]


def loader(noisy: bool = True, **options: Any) -> DataLoader:
    return DataLoader(Rows(noisy), **{"batch_size": BATCH, "shuffle": True, **options})


class Network(LightningModule):
    """Two learning rates, a norm with buffers, dropout, a metric, and a memory of its own."""

    def __init__(self, lr: float = 1e-3, schedule: str | None = "warmup", wait: float = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.schedule, self.wait = lr, schedule, wait
        self.encoder = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 2))
        self.accuracy = BinaryAccuracy()
        self.calls, self.seen = 0, []

    def on_train_epoch_start(self) -> None:
        self.seen.append("epoch")

    def loss(self, batch: Any) -> Tensor:
        self.calls += 1
        self.seen.append(float(batch[0].sum()))
        if self.wait:
            time.sleep(self.wait)
        logits = self.head(self.encoder(batch[0]))
        self.accuracy.update(logits.argmax(1), batch[1])
        return F.cross_entropy(logits, batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True, on_step=True)
        self.log_dict({"train_twice": 2 * loss})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.encoder.parameters(), "lr": self.lr * 0.1, "name": "encoder"},
            {"params": self.head.parameters(), "name": "head"},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        if self.schedule is None:
            return optimizer
        made = {
            "warmup": lambda: LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / 7)),
            "cosine": lambda: CosineAnnealingLR(optimizer, 40),
        }[self.schedule]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}


class Manual(Network):
    """Two optimizers by hand, and a loss that is only logged."""

    def __init__(self, lr: float = 1e-3, schedule: str | None = None, wait: float = 0) -> None:
        super().__init__(lr, schedule, wait)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        first, second = self.optimizers()
        first.zero_grad(), second.zero_grad()
        self.manual_backward(loss)
        first.step(), second.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        made = [
            torch.optim.Adam(self.encoder.parameters(), lr=1e-4),
            torch.optim.Adam(self.head.parameters(), lr=self.lr),
        ]
        return made, [CosineAnnealingLR(one, 50) for one in made]


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]


class Finds(Callback):
    """Counts what a callback is told of."""

    def __init__(self) -> None:
        self.batches = self.steps = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.steps += 1


class Straight(Network):
    """One layer, and steps as long as the gradient: what scales it is seen."""

    def __init__(self, lr: float = 1e-3, schedule: str | None = None, wait: float = 0) -> None:
        super().__init__(lr, schedule, wait)
        generator = torch.Generator().manual_seed(0)
        self.encoder, self.head = nn.Identity(), nn.Linear(20, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(2, 20, generator=generator))
            self.head.bias.zero_()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def seed(number: int = 1) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def quiet(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "logger": RunLogger(folder / "run"),
        **options,
    }


def left(module: LightningModule, trainer: Trainer) -> dict[str, Any]:
    """Everything that two trainings may differ in."""
    sets = trainer.train_dataloader
    sets = list(sets.values()) if isinstance(sets, dict) else [sets]
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
        "optimizers": repr([one.state_dict() for one in trainer.optimizers]),
        "schedulers": repr([one.scheduler.state_dict() for one in trainer.lr_scheduler_configs]),
        "scaler": repr(scaler.state_dict()) if scaler else None,
        "memory": (module.calls, module.seen, float(module.accuracy.compute())),
        "lr": (module.lr, module.hparams.lr),
        "logged": {
            name: float(value)
            for name, value in trainer.logged_metrics.items()
            if not name.startswith("lr_finder")
        },
        "random": (torch.get_rng_state().tolist(), random.random(), np.random.rand()),
        "data": [
            str(one.dataset.noise.bit_generator.state)
            for one in sets
            if hasattr(getattr(one, "dataset", None), "noise")
        ],
        "readings": [
            one.dataset.readings
            for one in sets
            if hasattr(getattr(one, "dataset", None), "readings")
        ],
        "steps": trainer.global_step,
    }


def search_on_rank(folder: Path, strategy: str) -> None:
    """One rank: a search, and its trace; then the same with that rate set by hand."""
    torch.set_num_threads(1)
    options = {"devices": 2, "strategy": strategy, "use_distributed_sampler": True}
    rank, found = os.environ["LOCAL_RANK"], {}
    for name in ("searched", "kept", "by_hand"):
        seed()
        callback = LRCache(folder / "cache", num_steps=40, on_error="raise")
        lr = found["searched"]["lr"][0] if name == "by_hand" else 1e-3
        module = Network(lr)
        options["logger"] = RunLogger(folder / name)
        callbacks = [] if name == "by_hand" else [callback]
        trainer = Trainer(**quiet(folder, **options), callbacks=callbacks)
        trainer.fit(module, loader())
        found[name] = left(module, trainer)
    torch.save(found, folder / f"rank_{rank}.pt")


def search_slowly(folder: Path, started: Path, wait: float, number: int) -> None:
    """A training that searches, in a folder of its own and a cache that is shared."""
    torch.set_num_threads(1)
    os.chdir(folder)
    seed(number)
    callback = LRCache(folder / "cache", num_steps=40, on_error="raise")
    started.touch()
    options = quiet(folder / f"root_{number}", max_epochs=1, logger=RunLogger(folder / f"{number}"))
    Trainer(**options, callbacks=[callback]).fit(Network(wait=wait), loader())


def losses_on_rank(folder: Path, batch: int, ranks: int) -> None:
    """The losses of a search on one rank of several, or on the only one."""
    torch.set_num_threads(1)
    found: list[float] = []

    class Search(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            test = range_test(trainer, pl_module, trainer.optimizers[0], [0.01, 0.1, 0.3, 1.0, 3.0])
            found.extend([*test.found, *test.before])

    options = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "logger": False}
    options["use_distributed_sampler"] = False
    trainer = Trainer(**quiet(folder, **options, max_epochs=1), callbacks=[Search()])
    rows = Rows(noisy=False)
    # Lightning would shuffle a training loader that has no sampler of its own
    rank = int(os.environ.get("LOCAL_RANK", 0)) if ranks > 1 else 0
    mine = range(rank, ROWS, ranks)
    trainer.fit(Straight(), DataLoader(rows, batch, sampler=list(mine)))
    torch.save(found, folder / f"losses_{ranks}_{trainer.global_rank}.pt")
