"""A copy of the module that trains, on which a step can be made without consequences."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
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

__all__ = ["aside", "tensors_in_use"]

_SHARED = (Callback, DataLoader, Dataset, LightningDataModule, Sampler)
_MUTED = ("log", "log_dict", "print", "clip_gradients")
# a data set with one of these is a memory that the step may write to, as in reinforcement learning
_GROWS = ("add", "append", "extend", "insert", "push", "put", "store", "update")
_CONTAINER = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_READS = ("get_last_lr", "get_lr", "state_dict")


def aside(
    trainer: Trainer,
    module: LightningModule,
    step: int,
    weights: Mapping[str, Tensor] | None = None,
) -> LightningModule:
    """The module once more: what it does there reaches neither the trainer nor a logger.

    Everything that the module holds is copied but loaders, and data sets that cannot grow; its
    optimizers, where it asks for them, stand still.

    Args:
        trainer: The trainer that is running.
        module: The module that trains.
        step: The step that it shall believe to be in.
        weights: Parameters and buffers that the copy gets, by name; None for the module's own.

    Raises:
        MemoryError: If there is no room for a copy and its gradients.
        RuntimeError: If a part gives itself for its copy.
        Exception: If something in the module cannot be copied.
    """
    _check_room(module)
    quiet = import_module(f"{PACKAGE}.loggers.logger").DummyLogger()
    stand_in = _Trainer(trainer, quiet)
    if module.automatic_optimization:
        vars(stand_in)["global_step"] = step
    memo: dict[int, Any] = {id(trainer): stand_in}
    for part in module.modules():
        _share(part, memo, quiet)
    copied = deepcopy(module, memo)
    _check_apart(module, copied)
    _rebind_functions(copied, memo)
    vars(stand_in).update(lightning_module=copied, model=copied)
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
        schedulers = [
            _Scheduler(config.scheduler, trainer.optimizers, stand_in.optimizers)
            for config in trainer.lr_scheduler_configs
        ]
        inside["lr_schedulers"] = _one_or_all(schedulers)
    if weights is not None:
        with torch.no_grad():
            for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
                if name in weights and weights[name].shape == tensor.shape:
                    tensor.copy_(weights[name])
    return copied


def tensors_in_use(trainer: Trainer, module: LightningModule) -> Iterator[Tensor]:
    """What the training itself reads and writes: weights, gradients and optimizer states."""
    groups = [group for one in trainer.optimizers for group in one.param_groups]
    own = [p for group in groups for p in group["params"]]
    for tensor in [*module.parameters(), *module.buffers(), *own]:
        if is_lazy(tensor):
            continue
        yield tensor
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor.grad
    for optimizer in trainer.optimizers:
        for _, tensor in named_tensors(list(optimizer.state.values())):
            yield tensor


def _check_room(module: LightningModule) -> None:
    device = module.device
    tensors = [x for x in (*module.parameters(), *module.buffers()) if not is_lazy(x)]
    # the weights and their gradients
    needed = 2 * sum(x.numel() * x.element_size() for x in tensors)
    free = _free_bytes(device)
    if needed > free:
        raise MemoryError(f"a copy needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    free = int(psutil.virtual_memory().available)
    limits = [file.read_text().strip() for file in _CONTAINER if file.exists()]
    used = int(psutil.Process().memory_info().rss)
    return min([free, *(int(text) - used for text in limits if text.isdigit())])


def _check_apart(module: LightningModule, copied: LightningModule) -> None:
    own = {id(x) for x in (*module.modules(), *module.parameters(), *module.buffers())}
    for name, part in copied.named_modules():
        inside = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if any(id(x) in own for x in (part, *inside)):
            raise RuntimeError(f"`{name or type(part).__name__}` gives itself for its copy")


def _share(part: nn.Module, memo: dict[int, Any], quiet: Logger) -> None:
    """What is not to be copied with a module, and what cannot be copied as it is."""
    for value in list(vars(part).values()):
        if isinstance(value, Logger):
            memo[id(value)] = quiet
        elif isinstance(value, _SHARED) and not any(hasattr(value, name) for name in _GROWS):
            memo[id(value)] = value
        elif not isinstance(value, nn.Module):
            for _, tensor in named_tensors(value):
                if tensor.grad_fn is not None:
                    memo[id(tensor)] = tensor.detach().clone()


def _rebind_functions(copied: LightningModule, memo: Mapping[int, Any]) -> None:
    """Functions are not copied with what they enclose: a ``lambda`` would use the original."""
    for part in copied.modules():
        # hooks are in dictionaries
        for holder in [vars(part), *(x for x in vars(part).values() if isinstance(x, dict))]:
            for key, value in holder.items():
                if isinstance(value, FunctionType):
                    holder[key] = _rebound(value, memo)


def _rebound(function: FunctionType, memo: Mapping[int, Any]) -> FunctionType:
    cells = [
        CellType(memo[id(cell.cell_contents)]) if _is_known(cell, memo) else cell
        for cell in function.__closure__ or ()
    ]
    if all(cell is old for cell, old in zip(cells, function.__closure__ or (), strict=True)):
        return function
    again = FunctionType(
        *(function.__code__, function.__globals__, function.__name__),
        argdefs=function.__defaults__,
        closure=tuple(cells),
    )
    again.__kwdefaults__ = function.__kwdefaults__
    again.__dict__.update(function.__dict__)
    return again


def _is_known(cell: CellType, memo: Mapping[int, Any]) -> bool:
    try:
        return id(cell.cell_contents) in memo
    except ValueError:
        # nothing has been put into it
        return False


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
        value = getattr(self._behind, name)
        if not callable(value) or name in _READS:
            return value
        what = f"{type(self._behind).__name__}.{name}"

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f"the step calls `{what}`, which acts on what trains")

        return refuse


class _Scheduler(_Still):
    def __init__(self, behind: Any, optimizers: list[Any], copies: list[Any]) -> None:
        super().__init__(behind)
        own = getattr(behind, "optimizer", None)
        pairs = zip(optimizers, copies, strict=True)
        self.optimizer = next((copied for one, copied in pairs if one is own), None)


class _Optimizer(_Still):
    def __init__(self, behind: Any, copies: Mapping[int, Tensor]) -> None:
        super().__init__(behind)
        # those that belong to no module are left out: they are the ones that train
        self.param_groups = [
            {**group, "params": [copies[id(p)] for p in group["params"] if id(p) in copies]}
            for group in behind.param_groups
        ]
        self.state: dict[Any, Any] = {}

    @property
    def optimizer(self) -> "_Optimizer":
        return self

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
