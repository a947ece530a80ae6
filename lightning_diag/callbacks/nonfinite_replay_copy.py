"""A copy of the module that trains, on which a step can be made without consequences."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_diag.callbacks.wiring_tensors import named_tensors
from lightning_diag.lightning import (
    PACKAGE,
    Callback,
    LightningDataModule,
    LightningModule,
    Logger,
    Trainer,
)

__all__ = ["aside"]

_SHARED = (Callback, DataLoader, Dataset, LightningDataModule, Sampler)
_MUTED = ("log", "log_dict", "print", "clip_gradients")


def aside(
    trainer: Trainer,
    module: LightningModule,
    step: int,
    weights: Mapping[str, Tensor] | None = None,
) -> LightningModule:
    """The module once more: what it does there reaches neither the trainer nor a logger.

    Everything that the module holds is copied but data sets and loaders; its optimizers, where it
    asks for them, stand still.

    Args:
        trainer: The trainer that is running.
        module: The module that trains.
        step: The step that it shall believe to be in.
        weights: Parameters and buffers that the copy gets, by name; None for the module's own.

    Raises:
        Exception: If something in the module cannot be copied.
    """
    quiet = import_module(f"{PACKAGE}.loggers.logger").DummyLogger()
    stand_in = _Trainer(trainer, quiet)
    if module.automatic_optimization:
        vars(stand_in)["global_step"] = step
    memo: dict[int, Any] = {id(trainer): stand_in}
    for part in module.modules():
        _share(part, memo, quiet)
    copied = deepcopy(module, memo)
    _take_apart_from_compiler(module, copied)
    own = [part for part in copied.modules() if isinstance(part, LightningModule)]
    names = {id(p): q for p, q in zip(module.parameters(), copied.parameters(), strict=True)}
    stand_in.optimizers = [_Optimizer(one, names) for one in trainer.optimizers]
    for part in own:
        inside = vars(part)
        inside["_trainer"] = stand_in
        inside.update(dict.fromkeys(_MUTED, _nothing))
        _untoggle(part)
        inside["manual_backward"] = _backward(trainer)
        inside["optimizers"] = _one_or_all(stand_in.optimizers)
        schedulers = [_Still(config.scheduler) for config in trainer.lr_scheduler_configs]
        inside["lr_schedulers"] = _one_or_all(schedulers)
    if weights is not None:
        with torch.no_grad():
            for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
                if name in weights and weights[name].shape == tensor.shape:
                    tensor.copy_(weights[name])
    return copied


def _share(part: nn.Module, memo: dict[int, Any], quiet: Logger) -> None:
    """What is not to be copied with a module, and what cannot be copied as it is."""
    for value in list(vars(part).values()):
        if isinstance(value, Logger):
            memo[id(value)] = quiet
        elif isinstance(value, _SHARED):
            memo[id(value)] = value
        elif not isinstance(value, nn.Module):
            for _, tensor in named_tensors(value):
                if tensor.grad_fn is not None:
                    memo[id(tensor)] = tensor.detach().clone()


def _take_apart_from_compiler(module: LightningModule, copied: LightningModule) -> None:
    if getattr(module, "_compiler_ctx", None) is None:
        return
    # Lightning has put compiled methods into the module, which are those of the original
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        vars(copied).pop(name, None)
    vars(copied)["_compiler_ctx"] = None


class _Trainer:
    """The trainer to look at: what is set stays here, and its loggers take everything."""

    def __init__(self, trainer: Trainer, quiet: Logger) -> None:
        self._behind = trainer
        self.logger = quiet
        self.loggers = [quiet]
        self.optimizers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)


class _Still:
    """An optimizer or scheduler to look at, which does not move."""

    def __init__(self, behind: Any) -> None:
        self._behind = behind

    def step(self, *args: Any, **kwargs: Any) -> Any:
        closure = next((x for x in [*args, *kwargs.values()] if callable(x)), None)
        return None if closure is None else closure()

    def load_state_dict(self, state_dict: Any) -> None:
        """Nothing is loaded."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)


class _Optimizer(_Still):
    def __init__(self, behind: Any, copies: Mapping[int, Tensor]) -> None:
        super().__init__(behind)
        self.param_groups = [
            {**group, "params": [copies.get(id(p), p) for p in group["params"]]}
            for group in behind.param_groups
        ]
        self.state: dict[Any, Any] = {}
        self.optimizer = self

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        yield


def _backward(trainer: Trainer) -> Callable[..., None]:
    scaler = getattr(trainer.precision_plugin, "scaler", None)

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss = loss if scaler is None else scaler.scale(loss)
        loss.backward(*args, **kwargs)

    return backward


def _one_or_all(items: list[Any]) -> Callable[..., Any]:
    def give(*args: Any, **kwargs: Any) -> Any:
        return items[0] if len(items) == 1 else items or None

    return give


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _untoggle(part: LightningModule) -> None:
    """As at the start of a step, where no optimizer has the parameters for itself."""
    toggled = getattr(part, "_param_requires_grad_state", None) or {}
    for parameter, flag in toggled.items():
        parameter.requires_grad_(flag)
    toggled.clear()
