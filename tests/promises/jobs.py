"""What tests run in processes of their own."""

import os
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from lightning_diag import GradientHealth, RunLogger
from lightning_diag.lightning import PACKAGE, Callback, LightningModule, Trainer
from tests.promises.cases import DIAGNOSTICS, build
from tests.promises.modes import MODES
from tests.promises.networks import TOKENS, Classifier, batches
from tests.promises.trace import QUIET, plain, seed, train

STEPS, IN_EPOCH = 40, 16
ODD_STEP = 5


def train_rank(mode: str, case: str | None, folder: Path) -> None:
    """One rank of a training; its trace goes into the folder."""
    torch.set_num_threads(1)
    trace, _ = train(mode, folder, build(case) if case else ())
    torch.save(trace, folder / f"trace_{os.environ['LOCAL_RANK']}.pt")


def train_on_small_disk(folder: Path, limit: int | None) -> None:
    """A training in which no file can grow beyond so many bytes."""
    import resource

    torch.set_num_threads(1)
    folder.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    callbacks = build("all", every_n_steps=1, on_error="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace, _ = train("plain", folder, callbacks, logger=RunLogger(folder / "run"))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = [str(warning.message) for warning in caught]
    torch.save({"trace": trace, "told": told}, folder / "left.pt")


class Stepwise(Classifier):
    """Trains on data that the step alone decides, so that a resumed run goes the same way."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(self.global_step)
        tokens = torch.randint(TOKENS, (8, 5))
        loss = self.loss([tokens, tokens[:, 0]], batch_idx)
        self.log("train_loss", loss)
        time.sleep(0.004)
        return loss


def train_for_long(folder: Path, resume: bool, steps: int = STEPS, own_logger: bool = True) -> None:
    """A training that is there to be killed, or goes on from the last checkpoint there is."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed()
    checkpoint = import_module(f"{PACKAGE}.callbacks").ModelCheckpoint(
        folder / "checkpoints", every_n_train_steps=7, save_last=True, save_top_k=-1
    )
    options = {
        **QUIET,
        "max_epochs": -1,
        "max_steps": steps,
        "log_every_n_steps": 1,
        "enable_checkpointing": True,
        "logger": RunLogger(folder / "run") if own_logger else False,
        "default_root_dir": folder,
    }
    names = [name for name in DIAGNOSTICS if name != "gradient_health_parts"]
    diagnostics = [one for name in names for one in build(name, every_n_steps=1)]
    trainer = Trainer(callbacks=[*diagnostics, checkpoint], **options)
    last = folder / "checkpoints" / "last.ckpt"
    module = Stepwise()
    trainer.fit(
        module,
        batches(IN_EPOCH),
        ckpt_path=str(last) if resume and last.exists() else None,
    )
    torch.save(plain(module.state_dict()), folder / "weights.pt")


class Odd(Callback):
    """Makes one rank odd at one step: its gradient, or the measuring itself."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.norms: dict[int, float] = {}
        self.kept: DTensor | None = None
        self.rank = int(os.environ["LOCAL_RANK"])

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Any
    ) -> None:
        step = trainer.global_step
        if self.kind == "gradient" and self.rank == 1 and step == ODD_STEP:
            gradient = module.net.head.weight.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local[0, 0] = torch.nan
        if self.kind.startswith("pending"):
            self.kept = module.net.head.weight.grad
            module.net.head.weight.grad = pending(self.kept)
        if self.kind.endswith("error") and self.rank == 1 and step == ODD_STEP:
            break_measuring()
        if self.kind == "slow" and self.rank == 1:
            time.sleep(0.01)
        total = torch.zeros((), dtype=torch.float64)
        for parameter in module.parameters():
            gradient = parameter.grad
            if gradient is not None:
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                total += whole.double().square().sum()
        self.norms[step] = float(total.sqrt())


class Restored(Callback):
    """After the measuring, gives back the gradient that `Odd` has turned into a pending sum."""

    def __init__(self, odd: Odd) -> None:
        self.odd = odd

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Any
    ) -> None:
        if self.odd.kept is not None:
            module.net.head.weight.grad = self.odd.kept


class OddData(Classifier):
    """One row of the data of rank 1 makes a loss that is not a number."""

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().loss(batch, batch_idx)
        odd = os.environ["LOCAL_RANK"] == "1" and self.global_step == ODD_STEP
        return loss * (torch.nan if odd else 1)


def pending(gradient: DTensor) -> DTensor:
    """The same gradient as a sum over ranks that nobody has carried out yet."""
    share = gradient.full_tensor() / gradient.device_mesh.size()
    return DTensor.from_local(share, gradient.device_mesh, [Partial()])


def break_measuring() -> None:
    """From now on, whatever a diagnostic computes from gradients fails in this process."""

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("planted on one rank")

    import_module("lightning_diag.callbacks.gradient_health").gradient_table = broken


def train_odd_rank(mode: str, kind: str, interval: int | str, epochs: int, folder: Path) -> None:
    """One rank of two, of which the second is odd; what it saw goes into the folder."""
    torch.set_num_threads(1)
    rank = os.environ["LOCAL_RANK"]
    seed()
    chosen, odd = MODES[mode], Odd(kind)
    base = chosen.module
    module = type("Odd", (OddData, base), {})() if kind == "data" else base()
    diagnostic = GradientHealth(every_n_steps=interval, overhead_budget=0.2)
    options = {**QUIET, **chosen.trainer(), "default_root_dir": folder, "max_epochs": epochs}
    options["logger"] = RunLogger(folder / "run")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(callbacks=[odd, diagnostic, Restored(odd)], **options)
        trainer.fit(module, batches())
    told = [str(warning.message) for warning in caught if "has ended" in str(warning.message)]
    left = {"step": trainer.global_step, "told": told, "norms": odd.norms}
    torch.save(left, folder / f"left_{rank}.pt")
