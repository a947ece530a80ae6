"""A callback that measures training alone, an epoch at a time."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_diag.functional.batches import batch_size
from lightning_diag.lightning import Callback, LightningModule, Trainer
from lightning_diag.tuning.batch_size_memory import peak_memory

__all__ = ["BatchSizeMeter", "logged_loss"]

_TRAIN = ("train", "training")
_TEST = ("val", "valid", "validation", "test")


class BatchSizeMeter(Callback):
    """Time, samples, losses and memory of each epoch, handed on as the epoch ends.

    The clock runs from the start of an epoch to the end of its last batch, waiting for data
    included; the device has finished at both ends. Validation comes after it. The losses are
    summed on the device and read once an epoch.

    Args:
        write: Gets a mapping with the values of an epoch.
    """

    def __init__(self, write: Callable[[Mapping[str, Any]], None]) -> None:
        self.write = write
        self.largest_batch: int | None = None
        self._began = 0.0
        self._seconds: float | None = None
        self._samples: int | None = 0
        self._train, self._test = _Mean(), _Mean()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._samples, self._seconds = 0, None
        self._train, self._test = _Mean(), _Mean()
        _synchronize(pl_module.device)
        self._began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        count = batch_size(batch)
        known = count is not None and self._samples is not None
        self._samples = (self._samples or 0) + (count or 0) if known else None
        if count is not None:
            self.largest_batch = max(self.largest_batch or 0, count)
        # Lightning divides what it hands on by the batches of one step
        factor = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self._train.add(outputs, count, factor)
        if batch_idx + 1 >= trainer.num_training_batches:
            self._stop(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._test.add(outputs, batch_size(batch))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(pl_module)
        test = logged_loss(trainer.callback_metrics, _TEST)
        self.write(
            {
                "epoch": trainer.current_epoch,
                "seconds": self._seconds,
                "samples": self._samples,
                "largest_batch": self.largest_batch,
                "train_loss": self._train.value(),
                "test_loss": self._test.value() if test is None else test,
                **peak_memory(pl_module.device),
            }
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        train = logged_loss(trainer.callback_metrics, _TRAIN)
        if self._train.value() is None and train is not None:
            self.write({"train_loss": train})

    def _stop(self, pl_module: LightningModule) -> None:
        if self._seconds is None:
            _synchronize(pl_module.device)
            self._seconds = time.perf_counter() - self._began


class _Mean:
    """Mean loss over samples, or over batches where nobody knows how many samples they hold."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight = 0

    def add(self, outputs: object, count: int | None, factor: float = 1.0) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        weight = 1 if count is None else count
        part = loss.detach().float().reshape(()) * (factor * weight)
        self._sum = part if self._sum is None else self._sum + part
        self._weight += weight

    def value(self) -> float | None:
        return None if self._sum is None or not self._weight else float(self._sum) / self._weight


def logged_loss(metrics: Mapping[str, Tensor], stages: tuple[str, ...] = _TEST) -> float | None:
    """The loss of a stage among what was logged: `val_loss`, `val/loss` and the like.

    Args:
        metrics: Name to value.
        stages: Names of the stage, the likeliest first.

    Returns:
        The value, or None where nothing has such a name.

    Example:
        >>> logged_loss({"val_loss": torch.tensor(0.5), "train_loss": torch.tensor(0.25)})
        0.5
    """
    for stage in stages:
        for mark in ("_", "/", "."):
            for end in ("loss_epoch", "loss"):
                value = metrics.get(f"{stage}{mark}{end}")
                if value is not None:
                    return float(value)
    return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
