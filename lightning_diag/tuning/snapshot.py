"""What objects hold, kept in memory so that a trial can be undone to the last bit."""

import random
import sys
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_diag.lightning import Callback, LightningDataModule, Logger, Trainer

__all__ = ["Snapshot", "same_random_numbers"]

_OBJECTS = 2_000_000
_MANY = 4096  # elements of a container of data that are looked into
# their objects hold threads, files and devices; what of them is state has a line below
_CLOSED = ("torch", "numpy", "pytorch_lightning", "lightning", "lightning_fabric", "lightning_diag")
_OPEN: tuple[type, ...] = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler)
_OPEN += (SimpleNamespace, Namespace, UserDict, UserList)
_DATA = (DataLoader, Sampler, Dataset)
_NOT_OURS = (Trainer, Callback, Logger, LightningDataModule)
_OPAQUE = (bool, int, float, str, bytes, type, FunctionType, MethodType, ModuleType)

_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

_Restore = Callable[[], None]


class Snapshot:
    """The state of some objects and of all that they hold, to be put back by `restore`.

    Attributes, containers, tensors (their gradients, flags and hooks too), arrays and random
    generators are followed from object to object; each container and tensor is restored in place,
    so that who else refers to it sees the old content. What is not followed is what belongs to
    Lightning, to devices or to the operating system.

    Args:
        objects: Where to begin.
        largest: None for everything but data sets. Else for data: bytes of the largest tensor or
            array whose content is kept; large containers get their elements back, and these are
            left as they are.

    Attributes:
        data: Data sets, loaders and samplers that were met and not followed.

    Raises:
        ValueError: If something cannot be put back: a parameter without values (a lazy module
            before its first forward), a bare iterator, more than two million objects.
    """

    def __init__(self, *objects: object, largest: int | None = None) -> None:
        self._largest = largest
        self._restores: list[_Restore] = []
        self._seen: dict[int, object] = {}
        self._waiting: list[object] = []
        self.data: list[object] = []
        for one in objects:
            if one is not None and not isinstance(one, _OPAQUE):
                self._keep(one, root=True)
        while self._waiting:
            self._keep(self._waiting.pop())

    def restore(self) -> None:
        """Put everything back.

        Raises:
            RuntimeError: If some of it resists; all else is back then.
        """
        failed: list[Exception] = []
        for restore in self._restores:
            try:
                restore()
            except Exception as error:
                failed.append(error)
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {len(self._restores)} pieces of state could not be put back"
            ) from failed[0]

    def _follow(self, value: object) -> None:
        if value is not None and not isinstance(value, _OPAQUE) and id(value) not in self._seen:
            self._waiting.append(value)

    def _keep(self, value: object, *, root: bool = False) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value  # held, so that its id stays its own
        if len(self._seen) > _OBJECTS:
            raise ValueError(f"What is to be undone must hold at most {_OBJECTS:,} objects.")
        if isinstance(value, Tensor):
            self._restores += _tensor(value, self._largest)
        elif isinstance(value, dict | list | set | deque | bytearray | tuple):
            self._keep_container(value)
            self._keep_attributes(value)
        elif (generator := _generator(value)) is not None:
            self._restores.append(generator)
        elif type(value).__module__ == "numpy":
            self._restores += _array(value, self._largest)
        elif isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
            raise ValueError(
                f"What is to be undone must be able to begin again, got a {type(value).__name__}."
            )
        elif root or self._is_followed(value):
            self._keep_attributes(value)

    def _is_followed(self, value: object) -> bool:
        if isinstance(value, _NOT_OURS):
            return False
        if isinstance(value, _DATA) and self._largest is None:
            self.data.append(value)
            return False
        return isinstance(value, (*_OPEN, *_DATA)) or not _closed(value)

    def _keep_container(self, value: Any) -> None:  # noqa: ANN401
        if isinstance(value, dict):
            kept = _copied(value)
            self._restores.append(lambda: _refill_dict(value, kept))
            inside = list(kept.values())
        else:
            inside = list(value)
            if isinstance(value, list | bytearray):
                self._restores.append(lambda: value.__setitem__(slice(None), inside))
            elif isinstance(value, set | deque):
                self._restores.append(lambda: _refill(value, inside))
        if self._largest is None or len(inside) <= _MANY:
            for one in inside:
                self._follow(one)

    def _keep_attributes(self, value: object) -> None:
        for name in _slots(value):
            with suppress(AttributeError):
                slot = getattr(value, name)
                self._restores.append(partial(object.__setattr__, value, name, slot))
                self._follow(slot)
        if isinstance(value, nn.Module):
            # a scripted one keeps them elsewhere
            for one in (*value.parameters(recurse=False), *value.buffers(recurse=False)):
                self._follow(one)
            for child in value.children():
                self._follow(child)
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            kept = dict(attributes)
            self._restores.append(lambda: _refill_dict(attributes, kept))
            for one in kept.values():
                self._follow(one)


def _slots(value: object) -> Iterator[str]:
    if _closed(value):
        return
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__"):
                yield name


def _closed(value: object) -> bool:
    top = type(value).__module__.partition(".")[0]
    return top in _CLOSED or top in sys.stdlib_module_names


def _copied(value: dict[Any, Any]) -> dict[Any, Any]:
    return dict(list(_dict_kind(value).items(value)))


def _dict_kind(value: dict[Any, Any]) -> Any:  # noqa: ANN401
    """Whose methods to use: a subclass's own may react, OrderedDict keeps a second list of keys."""
    return OrderedDict if isinstance(value, OrderedDict) else dict


def _refill_dict(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
    # in the old order too
    kind = _dict_kind(value)
    kind.clear(value)
    for key, one in kept.items():
        kind.__setitem__(value, key, one)


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
    place = value.detach()  # where it is, in its shape

    def restore() -> None:
        with torch.no_grad():
            if plain and (value.shape != place.shape or value.data_ptr() != place.data_ptr()):
                value.data = place
            place.copy_(kept)

    yield restore


def _layout(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if value.layout != torch.strided:
        return (), ()
    return value.stride(), tuple(value.shape)


def _flags(value: Tensor) -> _Restore:
    requires_grad, grad = value.requires_grad, value.grad
    kept = None if grad is None else grad.detach().clone()
    hooks = {name: dict(getattr(value, name, None) or {}) for name in _TENSOR_HOOKS}

    def restore() -> None:
        for name, before in hooks.items():
            now = getattr(value, name, None)
            if now is not None:
                _refill_dict(now, before)
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
    if isinstance(value, random.SystemRandom):
        return lambda: None  # it has no state
    if isinstance(value, random.Random):
        inner = value.getstate()
        return lambda: value.setstate(inner)
    if type(value).__module__.startswith("numpy.random"):
        if hasattr(value, "get_state"):
            # a RandomState, which also keeps every second normal number
            whole = value.get_state()
            return lambda: value.set_state(whole)
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
