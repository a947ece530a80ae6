"""Sees a run with its own eyes: plain numbers by plain means, to show what a case claims."""

import copy
from typing import Any

import torch
from torch import Tensor

from lightning_diag.lightning import Callback, LightningModule, Trainer


class Witness(Callback):
    """Records every step by brute force; shares no code with the diagnostics.

    Attributes:
        losses: Loss of every batch, as ``training_step`` returned it (times the accumulation).
        norms: L2 norm of the whole gradient before every optimizer step, in float64.
        norms_by_name: The same by parameter; None where it had no gradient.
        rates: Largest learning rate at every optimizer step.
        moves: L2 norm of the change of all weights at every optimizer step.
        val_losses: ``val_loss`` after every validation: ``(step, value)``.
        first: All weights and buffers before the first step.
        last: The same after the last.
        batch: The first batch.
        model: The module, after training.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.norms_by_name: list[dict[str, float | None]] = []
        self.rates: list[float] = []
        self.moves: list[float] = []
        self.val_losses: list[tuple[int, float]] = []
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.batch: Any = None
        self.model: LightningModule | None = None
        self._before: dict[str, Tensor] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = copy.deepcopy(pl_module.state_dict())
        self.model = pl_module

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.batch is None:
            self.batch = copy.deepcopy(batch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        found = {
            name: None if p.grad is None else float(p.grad.detach().double().norm())
            for name, p in pl_module.named_parameters()
        }
        scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "get_scale", None)
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        divisor = scale() if scale is not None and fused else 1.0
        found = {name: None if n is None else n / divisor for name, n in found.items()}
        self.norms_by_name.append(found)
        self.norms.append(sum(n**2 for n in found.values() if n is not None) ** 0.5)
        self.rates.append(max(float(g["lr"]) for o in trainer.optimizers for g in o.param_groups))
        if self._before is None:
            self._before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            times = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self.losses.append(float(loss.detach()) * times)
        if self._before is not None:
            squares = [
                (p.detach().double() - self._before[n].double()).square().sum()
                for n, p in pl_module.named_parameters()
            ]
            self.moves.append(float(torch.stack(squares).sum().sqrt()))
            self._before = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get("val_loss")
        if value is not None and not trainer.sanity_checking:
            self.val_losses.append((trainer.global_step, float(value)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last = copy.deepcopy(pl_module.state_dict())

    # ---- what verifications ask most ----

    def mean_loss(self, start: int, stop: int | None = None) -> float:
        """Mean loss of the batches from `start` to before `stop`; negative counts from the end."""
        part = self.losses[start:stop]
        return sum(part) / len(part)

    def fell(self, factor: float = 0.7) -> bool:
        """Whether the loss of the last fifth is below `factor` times that of the first batches."""
        fifth = max(5, len(self.losses) // 5)
        return self.mean_loss(-fifth) < factor * self.mean_loss(0, 5)

    def changed(self, name: str) -> bool:
        """Whether a parameter has other values than at the start."""
        return not torch.equal(self.first[name], self.last[name])
