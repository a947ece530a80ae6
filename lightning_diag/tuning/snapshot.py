"""What objects hold, kept in memory so that a trial can be undone to the last bit."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_diag.lightning import Callback, LightningDataModule, Logger, Trainer

__all__ = ["Snapshot", "same_random_numbers"]

_DEPTH = 12
_OBJECTS = 200_000
# their objects hold threads, files and devices; what of them is state has a line below
_CLOSED = ("torch", "numpy", "pytorch_lightning", "lightning", "lightning_fabric", "lightning_diag")
_OPEN = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler)
_DATA = (DataLoader, Sampler, Dataset)
_NOT_OURS = (Trainer, Callback, Logger, LightningDataModule)
_OPAQUE = (bool, int, float, str, bytes, type, FunctionType, MethodType, ModuleType)

_Restore = Callable[[], None]


class Snapshot:
    """The state of some objects and of all that they hold, to be put back by `restore`.

    Attributes, containers, tensors (their gradients and flags too), arrays and random generators
    are followed from object to object; each container and tensor is restored in place, so that who
    else refers to it sees the old content. What is not followed is what belongs to Lightning,
    to devices or to the operating system.

    Args:
        objects: Where to begin.
        largest: Bytes of the largest tensor or array whose content is kept, and elements of the
            largest container; None for all.

    Raises:
        ValueError: If a parameter has no values yet (a lazy module before its first forward).
    """

    def __init__(self, *objects: object, largest: int | None = None) -> None:
        self._largest = largest
        self._restores: list[_Restore] = []
        self._seen: dict[int, object] = {}
        for one in objects:
            self._keep(one, 0, root=True)

    def restore(self) -> None:
        """Put everything back."""
        for restore in self._restores:
            restore()

    def _keep(self, value: object, depth: int, *, root: bool = False) -> None:
        if value is None or isinstance(value, _OPAQUE):
            return
        if id(value) in self._seen or depth > _DEPTH or len(self._seen) > _OBJECTS:
            return
        self._seen[id(value)] = value  # held, so that its id stays its own
        if isinstance(value, Tensor):
            self._restores += _tensor(value, self._largest)
        elif isinstance(value, dict | list | set | deque | bytearray | tuple):
            self._keep_container(value, depth)
        elif (generator := _generator(value)) is not None:
            self._restores.append(generator)
        elif type(value).__module__ == "numpy":
            self._restores += _array(value, self._largest)
        elif root or self._is_followed(value):
            self._keep_attributes(value, depth)

    def _is_followed(self, value: object) -> bool:
        if isinstance(value, _NOT_OURS):
            return False
        if isinstance(value, _DATA):
            # data is kept only within limits
            return self._largest is not None
        return isinstance(value, _OPEN) or not _closed(value)

    def _keep_container(self, value: Any, depth: int) -> None:  # noqa: ANN401
        if self._largest is not None and len(value) > self._largest:
            return
        if isinstance(value, dict):
            kept = dict(value)
            self._restores.append(lambda: _refill_dict(value, kept))
            inside = list(kept.values())
        else:
            inside = list(value)
            if isinstance(value, list | bytearray):
                self._restores.append(lambda: value.__setitem__(slice(None), inside))
            elif isinstance(value, set | deque):
                self._restores.append(lambda: _refill(value, inside))
        if not isinstance(value, bytearray):
            for one in inside:
                self._keep(one, depth + 1)

    def _keep_attributes(self, value: object, depth: int) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            kept = dict(attributes)
            self._restores.append(lambda: _refill_dict(attributes, kept))
            for one in kept.values():
                self._keep(one, depth + 1)


def _closed(value: object) -> bool:
    top = type(value).__module__.partition(".")[0]
    return top in _CLOSED or top in sys.stdlib_module_names


def _refill_dict(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
    # in the old order too; by dict's own methods, since a subclass may react to them
    dict.clear(value)
    dict.update(value, kept)


def _refill(value: Any, kept: list[Any]) -> None:  # noqa: ANN401
    value.clear()
    value.update(kept) if isinstance(value, set) else value.extend(kept)


def _tensor(value: Tensor, largest: int | None) -> Iterator[_Restore]:
    if nn.parameter.is_lazy(value):
        raise ValueError("A parameter must have values before they can be kept; one has none yet.")
    if value.is_leaf:
        yield _flags(value)
    shared = any(step == 0 and size > 1 for step, size in zip(*_layout(value), strict=True))
    if shared or (largest is not None and value.numel() * value.element_size() > largest):
        return
    plain = type(value) in (Tensor, nn.Parameter)
    # on the host, where there is room for it
    kept = value.detach().cpu() if plain and value.is_cuda else value.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            value.detach().copy_(kept)

    yield restore


def _layout(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if value.layout != torch.strided:
        return (), ()
    return value.stride(), tuple(value.shape)


def _flags(value: Tensor) -> _Restore:
    requires_grad, grad = value.requires_grad, value.grad
    kept = None if grad is None else grad.detach().clone()

    def restore() -> None:
        if value.requires_grad != requires_grad:
            value.requires_grad_(requires_grad)
        if grad is not None and kept is not None:
            grad.detach().copy_(kept)
        if value.grad is not grad:
            value.grad = grad

    return restore


def _generator(value: Any) -> _Restore | None:  # noqa: ANN401
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: _nothing(value.set_state(state))
    if isinstance(value, random.Random):
        inner = value.getstate()
        return lambda: value.setstate(inner)
    if type(value).__module__.startswith("numpy.random"):
        bits = getattr(value, "bit_generator", getattr(value, "_bit_generator", value))
        if isinstance(getattr(bits, "state", None), dict):
            kept = bits.state
            return lambda: setattr(bits, "state", kept)
    return None


def _nothing(_: object) -> None:
    return None


def _array(value: Any, largest: int | None) -> Iterator[_Restore]:  # noqa: ANN401
    size = getattr(value, "nbytes", None)
    if size is None or not hasattr(value, "flags") or not value.flags.writeable:
        return
    if largest is None or size <= largest:
        kept = value.copy()
        yield lambda: value.__setitem__(..., kept)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Leave every global generator (torch on all devices, NumPy, Python) as it was before.

    Also after an exception.
    """
    numpy = sys.modules.get("numpy")
    host, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    array = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        torch.set_rng_state(host)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        if numpy is not None and array is not None:
            numpy.random.set_state(array)
