"""Follows NaN and infinity back through every operation to where they came from."""

import linecache
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_diag.callbacks.attention_mode import modules_followed
from lightning_diag.callbacks.nonfinite_replay_numbers import (
    Range,
    all_tensors,
    is_finite,
    range_of,
)
from lightning_diag.lightning import PACKAGE

__all__ = [
    "Culprit",
    "Deadline",
    "Origin",
    "Place",
    "TalksToRanksError",
    "TookTooLong",
    "TouchesTrainingError",
    "Trace",
]

_TALKS = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
# what they give is not meant to be read before it is written
_UNWRITTEN = frozenset(
    {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
)
_BACKWARD = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_WIDTH = 100
_RANKS = {"buffer": 1, "mask": 2}
_OURS = tuple(
    str(Path(sys.modules[name].__file__ or "").parent)
    for name in ("torch", PACKAGE, "lightning_diag")
)


class TalksToRanksError(Exception):
    """The step wants to talk to the other ranks, which do not listen."""


class TouchesTrainingError(Exception):
    """The step wants to read or write what the training itself uses, and not the copy."""


class TookTooLong(BaseException):
    """The step ends here, whatever the step itself does about errors."""


@dataclass
class Deadline:
    """When a step has to be over.

    Attributes:
        seconds: How long it may take.
        at: When it ends, on the clock of `perf_counter`; may be brought forward by another thread.
    """

    seconds: float
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.at = perf_counter() + self.seconds


class Culprit(BaseException):
    """The step is not finite; it ends here.

    It is no `Exception`, so that no ``except`` in the step keeps it.

    Args:
        origin: Where that comes from; None where it cannot be said.
        what: What was found to be non-finite.
    """

    def __init__(self, origin: "Origin | None", what: str) -> None:
        super().__init__(what)
        self.origin = origin
        self.what = what


@dataclass
class Place:
    """One operation.

    Attributes:
        op: Its name in ATen, as in ``aten.log``.
        call: What was called in Python, as in ``torch.Tensor.log``; None where that is not known.
        module: The innermost module that ran, by name; empty in the step itself.
        line: The line in the user's code.
        node: In a backward pass, the node of the graph, as in ``LogBackward0``.
        inputs: What went in; in a backward pass, what went into the operation forward.
        outputs: What came out.
    """

    op: str
    call: str | None
    module: str
    line: str | None
    node: str | None
    inputs: list[Range]
    outputs: list[Range]

    @property
    def backward(self) -> bool:
        """Whether it is part of a backward pass."""
        return self.node is not None


@dataclass
class Origin:
    """Where non-finite values come from.

    Attributes:
        kind: ``"op"``, ``"data"``, ``"parameter"``, ``"buffer"``, ``"constant"``, ``"mask"`` (an
            infinity that is written as such) or ``"uninitialised"``.
        order: How early it was.
        name: Name of the tensor, where it is none that the step has made.
        place: The operation: that made it or, of a tensor from outside, that first took it in.
        turned: The operation that made NaN of infinity.
    """

    kind: str
    order: int
    name: str | None = None
    place: Place | None = None
    turned: Place | None = None


@dataclass
class _Call:
    name: str
    module: str
    line: str | None
    inputs: list[Range] = field(default_factory=list)


class Trace:
    """Everything that happens while it is entered.

    Args:
        model: The model that runs; it must be one that nobody else uses.
        modules: Its modules by name.
        deadline: When it has to be over.
        untouched: What no operation may read or write.

    Attributes:
        before_backward: Called with what a backward pass begins from.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        deadline: Deadline,
        untouched: Iterable[Tensor] = (),
    ) -> None:
        self._model = model
        self._modules = modules
        self._deadline = deadline
        self._untouched = {_place_of(tensor) for tensor in untouched} - {None}
        self._stack: list[str] = []
        self._call: _Call | None = None
        self._calls: dict[Node, _Call] = {}
        self._node: Node | None = None
        self._in_backward = False
        self._quiet = False
        self._origins: dict[int, Origin] = {}
        self._count = 0
        # stands in where values go through memory that has no place, as that of sparse gradients
        self._first: Origin | None = None
        # of a number that has left its tensor
        self._number: Origin | None = None
        self.before_backward: Callable[[Tensor], object] | None = None

    def given(self, kind: str, name: str, tensor: Tensor) -> bool:
        """Take note of a tensor that is there before; whether it is finite."""
        if is_finite(tensor):
            return True
        self._remember(tensor, Origin(kind, -1, name))
        return False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """See all operations."""
        with ExitStack() as stack:
            stack.enter_context(modules_followed(self._modules, self._stack.append, self._left))
            stack.enter_context(_Operations(self))
            stack.enter_context(_Functions(self))
            yield

    def judge(self, tensor: Tensor, what: str) -> None:
        """End the step if a tensor is not finite.

        Raises:
            Culprit: It is not.
        """
        with self._silent():
            if not is_finite(tensor):
                raise Culprit(self._origins.get(_place_of(tensor) or 0) or self._first, what)

    # ---- operations ----

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry out one operation and look at what comes out."""
        if self._quiet:
            return func(*args, **kwargs)
        if func.namespace in _TALKS:
            raise TalksToRanksError(f"{func.namespace}.{func.overloadpacket.__name__}")
        if perf_counter() > self._deadline.at:
            raise TookTooLong(f"it took longer than {self._deadline.seconds:g} s")
        name = func.overloadpacket.__name__
        if any(_place_of(x) in self._untouched for x in all_tensors((args, kwargs))):
            raise TouchesTrainingError(f"`aten.{name}` takes a tensor that trains, not its copy")
        inputs = list(_inputs(name, args, kwargs))
        # what is written in place must be looked at before
        before = [range_of(x) for x in inputs] if func._schema.is_mutable else None
        result = func(*args, **kwargs)
        if name == "_local_scalar_dense" and not is_finite(inputs[0]):
            self._number = self._origins.get(_place_of(inputs[0]) or 0)
        odd = [x for x in all_tensors(result) if not is_finite(x)]
        if odd and name in _UNWRITTEN:
            for tensor in odd:
                self._remember(tensor, self._new("uninitialised", self._place(name, [], odd)))
        elif odd:
            ranges = [range_of(x) for x in inputs] if before is None else before
            pairs = [(x, r) for x, r in zip(inputs, ranges, strict=True) if r is not None]
            origin = self._origin(name, pairs, odd, (args, kwargs))
            for tensor in odd:
                self._remember(tensor, origin)
        return result

    def _origin(
        self, name: str, inputs: list[tuple[Tensor, Range]], odd: list[Tensor], given: object
    ) -> Origin:
        place = self._place(name, [found for _, found in inputs], odd)
        has_nan = any(found.nan for found in place.outputs)
        bad = [(x, found) for x, found in inputs if found.nan or found.inf]
        if not bad:
            numbers = list(_odd_numbers(given))
            if numbers and self._number is not None:
                self._number.place = self._number.place or place
                return self._number
            kind = "op" if not numbers else "constant" if any(x != x for x in numbers) else "mask"
            return self._new(kind, place)
        with_nan = [pair for pair in bad if pair[1].nan]
        origins = [self._known(x, found, place) for x, found in with_nan or bad]
        first = min(origins, key=lambda one: (_RANKS.get(one.kind, 0), one.order))
        if has_nan and not with_nan:
            if first.kind == "mask":
                return self._new("op", place)
            first.turned = first.turned or place
        first.place = first.place or place
        return first

    def _known(self, tensor: Tensor, found: Range, place: Place) -> Origin:
        origin = self._origins.get(_place_of(tensor) or 0)
        if origin is None:
            origin = self._new("constant" if found.nan else "mask", place)
            self._remember(tensor, origin)
        return origin

    def _place(self, name: str, inputs: list[Range], outputs: list[Tensor]) -> Place:
        found = [one for one in map(range_of, outputs) if one is not None]
        op = f"aten.{name}"
        if not self._in_backward:
            call = self._call
            module = self._stack[-1] if self._stack else ""
            name_of_call = None if call is None else call.name
            return Place(op, name_of_call, module, _line(), None, inputs, found)
        node = "" if self._node is None else self._node.name()
        call = None if self._node is None else self._calls.get(self._node)
        if call is None:
            return Place(op, None, "", None, node, inputs, found)
        return Place(op, call.name, call.module, call.line, node, call.inputs, found)

    def _new(self, kind: str, place: Place) -> Origin:
        self._count += 1
        origin = Origin(kind, self._count, place=place)
        if kind == "op" and self._first is None:
            self._first = origin
        return origin

    def _remember(self, tensor: Tensor, origin: Origin) -> None:
        key = _place_of(tensor)
        if key is not None:
            self._origins[key] = origin

    # ---- calls, and the graph that they leave ----

    def function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry out one call in Python, and take note of the graph that it makes."""
        if func in _BACKWARD:
            return self._backward(func, args, kwargs)
        if self._call is not None or self._quiet or self._in_backward:
            return func(*args, **kwargs)
        name = resolve_name(func) or getattr(func, "__name__", "")
        if name.endswith("__get__"):
            return func(*args, **kwargs)
        in_place = name.endswith("_") and not name.endswith("__")
        before = self._ranges(args, kwargs) if in_place else None
        call = _Call(name, self._stack[-1] if self._stack else "", None)
        self._call = call
        try:
            result = func(*args, **kwargs)
        finally:
            self._call = None
        nodes = [x.grad_fn for x in all_tensors(result) if x.grad_fn is not None]
        if any(node not in self._calls for node in nodes):
            call.line = _line()
            call.inputs = self._ranges(args, kwargs) if before is None else before
            for node in _nodes(nodes, self._calls):
                self._calls[node] = call
        return result

    def _ranges(self, args: Any, kwargs: Any) -> list[Range]:
        with self._silent():
            found = [range_of(x) for x in all_tensors((args, kwargs))]
        return [one for one in found if one is not None]

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        roots = list(all_tensors(args[:1] or kwargs.get("tensors", kwargs.get("outputs"))))
        keeps = func is not torch.autograd.grad
        for root in roots if keeps else ():
            if self.before_backward is not None:
                self.before_backward(root.detach())
            self.judge(root, "loss")
        graph = list(_nodes([x.grad_fn for x in roots if x.grad_fn is not None], {}))
        with ExitStack() as stack:
            for node in graph:
                stack.callback(node.register_prehook(_arrival(self, node)).remove)
            self._in_backward = True
            try:
                result = func(*args, **kwargs)
            finally:
                self._in_backward, self._node = False, None
        if keeps:
            for name, parameter in self._model.named_parameters():
                if parameter.grad is not None:
                    self.judge(parameter.grad, f"gradient of {name}")
        return result

    def arrive(self, node: Node) -> None:
        """The backward pass begins with a node."""
        self._node = node

    def _left(self, name: str, output: Any) -> None:
        while self._stack and self._stack.pop() != name:
            pass

    @contextmanager
    def _silent(self) -> Iterator[None]:
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._trace.operation(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._trace.function(func, args, kwargs or {})


def _arrival(trace: Trace, node: Node) -> Any:
    def arrive(gradients: Any) -> None:
        trace.arrive(node)

    return arrive


def _inputs(name: str, args: Any, kwargs: Any) -> Iterator[Tensor]:
    if "batch_norm" in name and "backward" not in name and (True in args[5:6] or "update" in name):
        # the running statistics, after weight and bias, are only written to in training
        args = args[:3]
    yield from all_tensors((args, kwargs))


def _odd_numbers(value: object) -> Iterator[float]:
    """NaN and infinities that stand among the arguments as plain numbers."""
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _odd_numbers(one)
    elif isinstance(value, Mapping):
        yield from _odd_numbers(list(value.values()))


def _nodes(roots: list[Node], known: Mapping[Node, object]) -> Iterator[Node]:
    """The nodes of the graph below, but for those that are known and what is below them."""
    waiting, seen = list(roots), set(known)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [below for below, _ in node.next_functions if below is not None]


def _place_of(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        # sparse and other tensors without one memory of their own
        return None


def _line() -> str | None:
    """The innermost line that belongs neither to PyTorch, nor to Lightning, nor to us."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((*_OURS, "<")):
            text = linecache.getline(path, frame.f_lineno).strip()
            where = Path(path)
            where = where.relative_to(Path.cwd()) if where.is_relative_to(Path.cwd()) else where
            shown = text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
            return f"{where}:{frame.f_lineno}" + (f": {shown}" if shown else "")
        frame = frame.f_back
    return None
