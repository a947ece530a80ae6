"""What diagnostics ask of an optimizer and of the gradient scaler beside it."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_diag.functional.moments import completed
from lightning_diag.lightning import Trainer

__all__ = [
    "completed_gradients",
    "gradient_scaler",
    "optimizer_index",
    "own_parameters",
    "unscales_itself",
]


def own_parameters(optimizer: Optimizer) -> list[Parameter]:
    """The parameters of an optimizer, each once."""
    groups = optimizer.param_groups
    return list({id(p): p for group in groups for p in group["params"]}.values())


def completed_gradients(optimizer: Optimizer) -> list[Tensor | None]:
    """An optimizer's gradients without pending sums over ranks; every rank must ask for them."""
    return [
        completed(parameter.grad) if isinstance(parameter.grad, DTensor) else parameter.grad
        for parameter in own_parameters(optimizer)
    ]


def optimizer_index(trainer: Trainer, optimizer: Optimizer) -> int:
    """Place of `optimizer` among the Trainer's, -1 where it is none of them."""
    return next((i for i, known in enumerate(trainer.optimizers) if known is optimizer), -1)


def gradient_scaler(trainer: Trainer) -> Any | None:
    """The gradient scaler of mixed precision, where one is at work."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer takes scaled gradients and unscales them inside its step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
