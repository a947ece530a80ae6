"""The tensors inside a batch or a module's input, and which of them share their memory."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Memories", "attribute", "named_tensors"]

_DEPTH = 4


def named_tensors(value: object, name: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Every tensor in nested containers, with the path that leads to it.

    Args:
        value: A tensor, mapping, list, tuple, named tuple, dataclass, graph of PyTorch
            Geometric, or anything else, which holds none.
        name: Path of `value`.
        depth: How deep to look.

    Example:
        >>> import torch
        >>> [name for name, _ in named_tensors({"x": torch.ones(1), "y": [torch.ones(1)]})]
        ['x', 'y[0]']
    """
    if isinstance(value, Tensor):
        yield name or "batch", value
        return
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float)):
        return
    for key, member in _members(value):
        path = f"{name}.{key}" if isinstance(key, str) and name else f"{key}"
        path = path if isinstance(key, str) else f"{name or 'batch'}[{key}]"
        yield from named_tensors(member, path, depth - 1)


def attribute(owner: object, name: str, default: object = None) -> Any:
    """An attribute of something of the user's; the default where asking for it fails in any way."""
    try:
        return getattr(owner, name, default)
    except Exception:
        # a property may raise whatever it likes
        return default


def _members(value: object) -> list[tuple[str | int, object]]:
    if isinstance(value, Mapping):
        return [(str(key), member) for key, member in value.items()]
    names = attribute(value, "_fields")
    if isinstance(value, tuple) and names:
        return list(zip(names, value, strict=False))
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(one.name, attribute(value, one.name)) for one in fields(value)]
    stores = attribute(value, "stores")
    if not isinstance(stores, list):
        return []
    # a graph of PyTorch Geometric keeps its tensors in mappings, one for each kind of node or edge
    graph = [member for store in stores if isinstance(store, Mapping) for member in store.items()]
    return [(str(key), member) for key, member in graph]


class Memories:
    """Which memory has been seen, under what name.

    Weak references: what is remembered can be freed, but its place is not given to another tensor
    as long as it is remembered, so that no two are ever mistaken for each other.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._kept: list[StorageWeakRef] = []

    def add(self, tensor: Tensor, name: str) -> None:
        """Remember the memory of a tensor; the last name counts."""
        reference = _reference(tensor)
        if reference is not None:
            self._names[reference.cdata] = name
            self._kept.append(reference)

    def name_of(self, tensor: Tensor) -> str | None:
        """The name under which the memory of a tensor was seen; None where it was not."""
        reference = _reference(tensor)
        return None if reference is None else self._names.get(reference.cdata)

    def drop(self, tensor: Tensor) -> None:
        """Forget the memory of a tensor: something else stands there now."""
        reference = _reference(tensor)
        if reference is not None:
            self._names.pop(reference.cdata, None)


def _reference(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        # sparse and other tensors without one memory of their own
        return None
