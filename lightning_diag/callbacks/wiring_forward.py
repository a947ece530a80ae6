"""One training step seen from its modules: who ran, where the graph is cut, what enters first."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_diag.callbacks.forward import Passing, Scope
from lightning_diag.callbacks.transforms import inside_transform
from lightning_diag.callbacks.wiring_modes import NORMS
from lightning_diag.callbacks.wiring_tensors import Memories, named_tensors
from lightning_diag.functional.wiring_check import data_facts

__all__ = ["Cuts", "Entry", "ForwardWatch", "Guard"]

Guard = Callable[[Callable[..., Any]], Callable[..., Any]]

_ENTRIES = 4
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED = (nn.Linear, nn.Bilinear, nn.RNNBase, *_CONVOLUTIONS, *_TRANSPOSED)


@dataclass
class Entry:
    """A module with weights whose input comes from outside the graph.

    Attributes:
        facts: `data_facts` of the input, shape ``(1, 6)``.
        normalized: Whether a normalization comes next, which takes the scale away again.
    """

    facts: Tensor
    normalized: bool = False


@dataclass
class Cuts:
    """Where modules ran, and where the graph of gradients is cut.

    Attributes:
        watched: Modules that could be seen: neither compiled nor on a fast path.
        ran: Modules that ran, by name, with their place in the order.
        without_graph: Modules with trainable weights whose output never needs a gradient.
        detached: A module whose output needs a gradient, to the module that it enters without one.
        severed: Where the effect of a parameter without a gradient ends, in words, by its name.
    """

    watched: set[str] = field(default_factory=set)
    ran: dict[str, int] = field(default_factory=dict)
    without_graph: set[str] = field(default_factory=set)
    detached: dict[str, str] = field(default_factory=dict)
    severed: dict[str, str] = field(default_factory=dict)

    def kind(self, module: str) -> str:
        """Whether a module ran, in words."""
        if module in self.ran:
            return "ran"
        # a module's own parameters may be used without calling it
        return "never ran" if module and module in self.watched else "not seen"

    def place(self, module: str, parameter: str = "") -> str | None:
        """Where the gradient on its way to a module is cut, in words; None where nothing is.

        Args:
            module: Name of the module.
            parameter: Name of its parameter that has no gradient.
        """
        if module in self.without_graph:
            return f"`{module}` runs without a graph"
        if module not in self.ran:
            return None
        for source, target in self.detached.items():
            if self.ran.get(source, -1) >= self.ran[module] or module.startswith(f"{source}."):
                return f"between `{source}` and `{target}`"
        return self.severed.get(parameter)


class ForwardWatch:
    """Hooks on all modules during one training step; nothing is read from the device.

    Args:
        guard: Isolates the hooks, as `Diagnostic.guarded` does.

    Attributes:
        cuts: What is known of the graph.
        entries: Where data enter, by module.
        passed_by: Whether a module ran inside a transform of `torch.func`.
    """

    def __init__(self, guard: Guard) -> None:
        self.cuts = Cuts()
        self.entries: dict[str, Entry] = {}
        self.passed_by = False
        self._guard = guard
        self._outputs = Memories()
        self._with_graph: set[str] = set()
        self._awaiting: Entry | None = None

    @contextmanager
    def inside(self, scope: Scope) -> Iterator[None]:
        """Watch the modules of a scope."""
        self.cuts.watched.update(scope.modules)
        # two functions for all modules: a pair for each would set off the garbage collector
        names = {id(module): name for name, module in scope.modules.items()}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if scope.live:
                self._enters(names[id(module)], module, [args, kwargs])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if scope.live:
                self._leaves(names[id(module)], module, output)

        first, last = self._guard(before), self._guard(after)
        with ExitStack() as stack:
            for name, module in scope.modules.items():
                if name:
                    stack.callback(
                        module.register_forward_pre_hook(Passing(first), with_kwargs=True).remove
                    )
                    stack.callback(module.register_forward_hook(Passing(last)).remove)
            yield

    def _enters(self, name: str, module: nn.Module, inputs: object) -> None:
        self.cuts.ran[name] = len(self.cuts.ran)
        if isinstance(module, nn.MultiheadAttention):
            # its parameters take part without it being called
            self.cuts.ran[f"{name}.out_proj"] = len(self.cuts.ran)
        if inside_transform():
            self.passed_by = True
            return
        if self._awaiting is not None and next(module.children(), None) is None:
            self._awaiting.normalized = isinstance(module, NORMS)
            self._awaiting = None
        for _, x in named_tensors(inputs):
            if not x.is_floating_point() or x.requires_grad:
                continue
            source = self._outputs.name_of(x)
            if source is None:
                self._data_enter(name, module, x)
            elif source != name and torch.is_grad_enabled():
                self.cuts.detached.setdefault(source, name)

    def _data_enter(self, name: str, module: nn.Module, x: Tensor) -> None:
        known = name in self.entries or len(self.entries) == _ENTRIES
        if known or not isinstance(module, _WEIGHTED) or not _learns(module):
            return
        with torch.no_grad():
            self._awaiting = self.entries[name] = Entry(data_facts([x]))

    def _leaves(self, name: str, module: nn.Module, output: object) -> None:
        if inside_transform():
            return
        found = [x for _, x in named_tensors(output) if x.is_floating_point()]
        for x in found:
            if x.requires_grad:
                self._outputs.add(x, name)
                self._with_graph.add(name)
        if found and _learns(module):
            self.cuts.without_graph.add(name)
        self.cuts.without_graph -= self._with_graph


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))
