"""Where the effect of parameters without a gradient ends: in an operation that passes none on."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_diag.callbacks.wiring_tensors import named_tensors

__all__ = ["Severed"]

_MOST_NODES = 20_000
_NUMBERS = ("tolist", "numpy", "item", "__array__", "__float__", "__int__")


class Severed:
    """Operations that take a tensor with a graph and give something without one.

    A choice (`argmax`), a conversion (`tolist`, `long`) or `detach` stands between a part and the
    loss, where the part has no gradient and the graph of what it was given leads back to it.

    Args:
        suspects: Names of the parameters without a gradient, by ``id``.

    Attributes:
        places: Where the effect of each ends, in words, by name; filled as the step goes.
    """

    def __init__(self, suspects: Mapping[int, str]) -> None:
        self.places: dict[str, str] = {}
        self._suspects = suspects
        self._seen: set[Any] = set()

    def saw(self, name: str, args: object, result: object) -> None:
        """An operation was carried out.

        Args:
            name: Its name.
            args: What it was given.
            result: What it gave.
        """
        if len(self.places) >= len(self._suspects) or not torch.is_grad_enabled():
            return
        if isinstance(result, Tensor):
            # what takes the shape of a tensor alone, or looks whether it is finite, ends nothing
            shapes = name.endswith("_like") or name.startswith(("new_", "is"))
            if result.requires_grad or shapes:
                return
        elif name not in _NUMBERS:
            return
        self._follow(name, [x for _, x in named_tensors(args) if x.requires_grad])

    def _follow(self, name: str, tensors: Iterable[Tensor]) -> None:
        waiting = [x.grad_fn for x in tensors if x.grad_fn is not None]
        while waiting and len(self._seen) < _MOST_NODES:
            node = waiting.pop()
            if node in self._seen:
                continue
            self._seen.add(node)
            known = self._suspects.get(id(getattr(node, "variable", None)))
            if known is not None:
                operation = "data" if name == "__get__" else name
                self.places.setdefault(known, f"at `{operation}`, which passes no gradient on")
            waiting += [one for one, _ in node.next_functions if one is not None]
