"""Where activation functions are called in a forward pass, by modules and by plain functions."""

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_diag.callbacks.forward import Passing, Scope
from lightning_diag.callbacks.transforms import inside_transform
from lightning_diag.functional.activation_health import (
    Activity,
    Flatness,
    activation_bounds,
    activity,
    flatness,
)

__all__ = ["Fate", "Sink", "activation_calls"]


@dataclass(eq=False)
class Fate:
    """What becomes of the output of one call.

    Attributes:
        order: Names of the modules that ran and learn by weights of their own, of the whole
            forward; it grows as the forward goes on.
        place: How many of them had run before the call.
        gate: Whether the output was multiplied with another tensor; None where that is not seen.
    """

    order: list[str]
    place: int
    gate: bool | None = None

    @property
    def followers(self) -> list[str]:
        """The modules that ran after the call."""
        return self.order[self.place :]


Sink = Callable[[str, str, Activity, Fate], None]
Guard = Callable[[Callable[..., Any]], Callable[..., Any]]
Timed = Callable[[torch.device], AbstractContextManager[None]]

OUTSIDE = "training_step"

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.RReLU: "rrelu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.Softplus: "softplus",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Hardtanh: "hardtanh",
    nn.Hardsigmoid: "hardsigmoid",
}
_GATES = frozenset({"sigmoid", "hardsigmoid"})
_PRODUCTS = frozenset(
    {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "matmul", "__matmul__", "bmm"}
)
_VIEWS = frozenset(
    {"view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "flatten", "__getitem__"}
) | frozenset({"transpose", "permute", "unflatten", "to", "type_as", "sub", "__rsub__", "rsub"})
# classes of others that compute these out of tanh and sigmoid
_NAMED = ((re.compile(r"gelu", re.IGNORECASE), "gelu"), (re.compile(r"silu|swish", re.I), "silu"))
_KINDS: dict[type[nn.Module], str | None] = {}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_), "relu"),
    **dict.fromkeys((Tensor.relu, Tensor.relu_), "relu"),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_), "tanh"),
    **dict.fromkeys((Tensor.tanh, Tensor.tanh_), "tanh"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_), "sigmoid"),
    **dict.fromkeys((Tensor.sigmoid, Tensor.sigmoid_), "sigmoid"),
    torch.special.expit: "sigmoid",
    F.relu6: "relu6",
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((F.prelu, torch.prelu), "prelu"),
    **dict.fromkeys((F.rrelu, torch.rrelu), "rrelu"),
    F.gelu: "gelu",
    F.silu: "silu",
    F.mish: "mish",
    F.hardswish: "hardswish",
    **dict.fromkeys((F.elu, F.elu_), "elu"),
    **dict.fromkeys((F.selu, torch.selu), "selu"),
    **dict.fromkeys((F.celu, torch.celu), "celu"),
    F.softplus: "softplus",
    **dict.fromkeys((F.hardtanh, F.hardtanh_), "hardtanh"),
    F.hardsigmoid: "hardsigmoid",
}
_CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase)


@contextmanager
def activation_calls(
    scope: Scope,
    sink: Sink,
    saturation: float,
    *,
    guard: Guard,
    timed: Timed,
    passed_by: Callable[[], None],
) -> Iterator[None]:
    """While entered, hand every call of an activation function to `sink`.

    Modules are seen by hooks. Plain functions are seen by a function mode, except where that would
    disturb: outside the compiled parts of a model, or where modules choose a fused kernel only if
    nobody looks. A function belongs to the innermost module that is running.

    Args:
        scope: The modules, by name.
        sink: Called with the name of the module, the name of the function, what it did, and what
            becomes of its output (known when the forward has ended).
        saturation: See `activation_bounds`.
        guard: Isolates what is done here from the training.
        timed: Makes a context that times what is done on a device.
        passed_by: Called where a call inside a transform of `torch.func` is not looked at.
    """
    seen = not scope.fast_path and (scope.shadow or not scope.compiled)
    watch = _Calls(scope, sink, saturation, timed, passed_by, functions_seen=seen)
    entered, left = guard(watch.module_entered), guard(watch.module_left)
    with ExitStack() as stack:
        for module in scope.modules.values():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            pre = module.register_forward_pre_hook(Passing(entered), with_kwargs=True)
            stack.callback(pre.remove)
            stack.callback(module.register_forward_hook(Passing(left), always_call=True).remove)
        if seen:
            stack.enter_context(_Functions(watch, guard))
        yield


@dataclass
class _Running:
    """One module whose forward is under way."""

    place: str
    function: str | None
    flat: Flatness | None = None


class _Calls:
    """Which modules are running, and what their activation functions were given."""

    def __init__(
        self,
        scope: Scope,
        sink: Sink,
        saturation: float,
        timed: Timed,
        passed_by: Callable[[], None],
        *,
        functions_seen: bool,
    ) -> None:
        self._scope = scope
        self._names = {id(module): name or OUTSIDE for name, module in scope.modules.items()}
        self._sink = sink
        self._saturation = saturation
        self._timed = timed
        self._passed_by = passed_by
        self._running: list[_Running] = []
        self._channels_first: bool | None = None
        self._functions_seen = functions_seen
        self._order: list[str] = []
        self._gates: dict[int, tuple[weakref.ref[Tensor], Fate]] = {}

    @property
    def place(self) -> str:
        """The innermost module that is running."""
        return self._running[-1].place if self._running else OUTSIDE

    def function_may_be_seen(self) -> bool:
        """Whether a function that is called now is not part of an activation module."""
        return self._scope.live and all(one.function is None for one in self._running)

    def module_entered(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        ends = _ends_of(module)
        function = _floored(_function_of(module), ends)
        running = _Running(self._names.get(id(module), OUTSIDE), function)
        if function is not None and self.function_may_be_seen():
            running.flat = self.before(function, _first(args, kwargs), **ends)
        elif function is None and self._scope.live and _learns(module):
            self._order.append(running.place)
        self._running.append(running)

    def module_left(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        running = self._running.pop() if self._running else _Running(OUTSIDE, None)
        if isinstance(module, _CHANNELS_FIRST):
            self._channels_first = True
        elif isinstance(module, _FEATURES_LAST):
            self._channels_first = False
        if running.function is not None:
            self.after(running.function, running.flat, output, running.place)

    def before(self, function: str, x: object, **ends: float) -> Flatness | None:
        """Look at the input, which the call may overwrite."""
        if inside_transform():
            self._passed_by()
            return None
        x = _usable(x)
        if x is None or not self._scope.live:
            return None
        # no mode, this one's or the user's, is to see what is computed here
        with torch._C.DisableTorchFunction(), self._timed(x.device):
            bounds = activation_bounds(function, self._saturation, **ends)
            return flatness(x, bounds, self._unit_dim(x))

    def after(self, function: str, flat: Flatness | None, y: object, place: str) -> None:
        """Look at the output."""
        y = _usable(y)
        if flat is not None and y is not None:
            with torch._C.DisableTorchFunction(), self._timed(y.device):
                gate = False if self._functions_seen and function in _GATES else None
                fate = Fate(self._order, len(self._order), gate)
                if gate is not None:
                    self._gates[id(y)] = (weakref.ref(y), fate)
                self._sink(place, function, activity(y, flat), fate)

    def product_or_view(self, name: str, args: tuple[Any, ...], result: object) -> None:
        """Follow the outputs that may be gates through one function."""
        given = [(x, self._fate(x)) for x in args if isinstance(x, Tensor)]
        fates = [fate for _, fate in given if fate is not None]
        if not fates:
            return
        if name in _PRODUCTS:
            if any(fate is None and x.numel() > 1 for x, fate in given) or len(fates) > 1:
                for fate in fates:
                    fate.gate = True
        elif isinstance(result, Tensor):
            self._gates[id(result)] = (weakref.ref(result), fates[0])

    def _fate(self, x: Tensor) -> Fate | None:
        found = self._gates.get(id(x))
        return found[1] if found is not None and found[0]() is x else None

    def has_gates(self) -> bool:
        """Whether there is an output to follow."""
        return bool(self._gates)

    def _unit_dim(self, x: Tensor) -> int:
        first = self._channels_first
        if first is None:
            # a feature map, where nothing that has run before says otherwise
            first = x.dim() >= 4
        return 1 if first and x.dim() > 2 else -1


def _learns(module: nn.Module) -> bool:
    """Whether the module computes with weights of its own that learn, as a layer does."""
    own = any(one.requires_grad for one in module.parameters(recurse=False))
    return own and torch.is_grad_enabled()


def _function_of(module: nn.Module) -> str | None:
    kind = type(module)
    if kind not in _KINDS:
        _KINDS[kind] = _function_of_kind(kind)
    function = _KINDS[kind]
    if function is None or isinstance(module, tuple(_MODULES)):
        return function
    # one that is only named so may be more than a function
    plain = next(module.children(), None) is None and next(module.parameters(), None) is None
    return function if plain else None


def _function_of_kind(kind: type[nn.Module]) -> str | None:
    for known, function in _MODULES.items():
        if issubclass(kind, known):
            # a ReLU6 is a Hardtanh, and stands before it
            return function
    return next((found for pattern, found in _NAMED if pattern.search(kind.__name__)), None)


def _floored(function: str | None, ends: dict[str, float]) -> str | None:
    """A hardtanh from zero upwards is a ReLU with a ceiling."""
    return "relu6" if function == "hardtanh" and ends.get("low") == 0 else function


def _ends_of(module: nn.Module) -> dict[str, float]:
    if not isinstance(module, nn.Hardtanh):
        return {}
    return {"low": float(module.min_val), "high": float(module.max_val)}


class _Functions(TorchFunctionMode):
    """Sees the functions; inside its handler it is switched off, so each is seen once."""

    def __init__(self, watch: _Calls, guard: Guard) -> None:
        super().__init__()
        self._watch = watch
        self._before = guard(watch.before)
        self._after = guard(watch.after)
        self._follow = guard(watch.product_or_view)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Dynamo, which may trace this, leaves the rest out
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        function = _FUNCTIONS.get(func)
        if function is None or not self._watch.function_may_be_seen():
            result = func(*args, **kwargs)
            name = getattr(func, "__name__", "")
            if self._watch.has_gates() and (name in _PRODUCTS or name in _VIEWS):
                self._follow(name, args, result)
            return result
        place = self._watch.place
        ends = _ends_given(args, kwargs) if function == "hardtanh" else {}
        function = _floored(function, ends) or function
        flat = self._before(function, _first(args, kwargs), **ends)
        y = func(*args, **kwargs)
        self._after(function, flat, y, place)
        return y


def _ends_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    names = ("input", "min_val", "max_val")
    given = dict(zip(names, args, strict=False)) | kwargs
    ends = {"low": given.get("min_val", -1.0), "high": given.get("max_val", 1.0)}
    return {end: float(value) for end, value in ends.items() if isinstance(value, int | float)}


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    return args[0] if args else next(iter(kwargs.values()), None)


def _usable(x: object) -> Tensor | None:
    """A plain tensor of real numbers; of a distributed one, this rank's part."""
    if isinstance(x, DTensor):
        x = x.to_local()
    if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
        return None
    return x if x.is_floating_point() and x.numel() else None
