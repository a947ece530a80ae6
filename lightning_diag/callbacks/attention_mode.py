"""Sees calls of attention while a forward runs, whoever makes them, and changes none of them."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_diag.callbacks.forward import Passing

__all__ = [
    "AttentionMode",
    "among_compiled",
    "apart_from_counters",
    "fast_path_kept",
    "graph_softmax_seen",
    "modules_followed",
]

Saw = Callable[..., object]
Guard = Callable[[Callable[..., Any]], Callable[..., Any]]

_DOT_PRODUCT = F.scaled_dot_product_attention
_SOFTMAX = F.softmax
_FAST = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class AttentionMode(TorchFunctionMode):
    """Tells of each call of PyTorch's attention functions, after it was made as it is.

    `F.multi_head_attention_forward` calls what it needs where no mode is asked; for the time of
    such a call, its two names for attention are replaced.

    Args:
        dot_product: Called with the arguments of `F.scaled_dot_product_attention`.
        softmax: Called with what enters a softmax of `nn.MultiheadAttention`, shape
            ``(batch, heads, T, S)``.
        other: Called with the name of an attention function that cannot be looked into.
    """

    def __init__(self, dot_product: Saw, softmax: Saw, other: Saw) -> None:
        super().__init__()
        self._dot_product = dot_product
        self._softmax = softmax
        self._other = other

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Dynamo, which may trace this, leaves the rest out
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            heads = args[4] if len(args) > 4 else kwargs["num_heads"]
            with self._replaced(int(heads)):
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is _DOT_PRODUCT:
            self._dot_product(*args, **kwargs)
        elif getattr(func, "__name__", "") == "flex_attention":
            self._other("flex_attention")
        return result

    @contextmanager
    def _replaced(self, heads: int) -> Iterator[None]:
        before = F.scaled_dot_product_attention, F.softmax

        def dot_product(*args: Any, **kwargs: Any) -> Tensor:
            result = before[0](*args, **kwargs)
            self._dot_product(*args, **kwargs)
            return result

        def softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = before[1](scores, *args, **kwargs)
            self._softmax(scores, heads)
            return result

        F.scaled_dot_product_attention, F.softmax = dot_product, softmax  # type: ignore[assignment]
        try:
            yield
        finally:
            F.scaled_dot_product_attention, F.softmax = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Out of the way, where this mode is the one that is asked first."""
        first = torch.overrides._get_current_function_mode()  # type: ignore[no-untyped-call]
        if first is not self:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()


@contextmanager
def modules_followed(
    modules: Mapping[str, nn.Module],
    entered: Callable[[str], object],
    left: Callable[[str, Any], object],
) -> Iterator[None]:
    """Tells when each module's forward begins and ends, by exceptions too.

    Args:
        modules: The modules, by name.
        entered: Called with the name.
        left: Called with the name and the output, None after an exception.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue

            def before(_: nn.Module, args: Any, name: str = name) -> None:
                entered(name)

            def after(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                left(name, output)

            stack.callback(module.register_forward_pre_hook(Passing(before)).remove)
            hook = module.register_forward_hook(Passing(after), always_call=True)
            stack.callback(hook.remove)
        yield


@contextmanager
def fast_path_kept(
    mode: AttentionMode,
    modules: Mapping[str, nn.Module],
    follow: Callable[[Mapping[str, nn.Module]], Any],
    passed: Callable[[str], object],
) -> Iterator[None]:
    """Follows modules, but leaves alone those that would compute other bits if they were followed.

    In evaluation mode and without gradients, PyTorch's transformer layers take another path, which
    a hook or a mode closes. Whether they take it is known when they are called.

    Args:
        mode: What is to be out of the way.
        modules: All modules, by name.
        follow: Makes the context in which modules are followed, of their names.
        passed: Called with the name of a module that could not be looked at.
    """
    layers: dict[str, nn.Module] = {}
    below: set[int] = set()
    for name, module in modules.items():
        if _evaluates(module) and id(module) not in below:
            layers[name] = module
            below |= {id(part) for part in module.modules()}
    with ExitStack() as stack:
        others = {name: part for name, part in modules.items() if id(part) not in below}
        stack.enter_context(follow(others))
        for name, layer in layers.items():
            own = {id(part) for part in layer.modules()}
            inside = {n: part for n, part in modules.items() if id(part) in own}
            stack.enter_context(_forward_replaced(layer, name, inside, mode, follow, passed))
        yield


@contextmanager
def among_compiled(
    mode: AttentionMode,
    modules: Mapping[str, nn.Module],
    also: Mapping[str, nn.Module],
    follow: Callable[[Mapping[str, nn.Module]], Any],
    passed: Callable[[str], object],
) -> Iterator[None]:
    """Follows what runs eagerly beside compiled parts, and is in force nowhere else.

    A mode that is in force around a compiled call is traced into it, and it is compiled again. So
    it is entered with each outermost module that has no compiled part inside.

    Args:
        mode: What to enter.
        modules: All modules that run eagerly, by name.
        also: Modules to follow even where compiled parts are inside.
        follow: Makes the context in which modules are followed, of their names.
        passed: Called with the name of a module that could not be looked at.
    """
    eager = {id(module) for module in modules.values()}
    pure = {
        name: module
        for name, module in modules.items()
        if all(id(part) in eager for part in module.modules()) and not _evaluates(module)
    }
    inside = {id(part) for module in pure.values() for part in module.children()}
    outermost = {name: module for name, module in pure.items() if id(module) not in inside}

    def enter(name: str) -> None:
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(name: str, output: Any) -> None:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    others = {name: module for name, module in also.items() if name in modules.keys() - pure.keys()}
    with (
        follow(others),
        fast_path_kept(mode, pure, follow, passed),
        modules_followed(outermost, enter, leave),
    ):
        yield


def _evaluates(module: nn.Module) -> bool:
    """Whether a layer may take the fast path."""
    return isinstance(module, _FAST) and not all(part.training for part in module.modules())


@contextmanager
def _forward_replaced(
    layer: nn.Module,
    name: str,
    inside: Mapping[str, nn.Module],
    mode: AttentionMode,
    follow: Callable[[Mapping[str, nn.Module]], Any],
    passed: Callable[[str], object],
) -> Iterator[None]:
    own, forward = vars(layer).get("forward"), layer.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        if _takes_gradients(layer):
            # the layer's own hooks were asked for before this call, so it is followed by hand
            with follow({n: part for n, part in inside.items() if part is not layer}):
                return _followed_by_hand(layer, name, follow, forward, args, kwargs)
        passed(name)
        with mode.paused():
            return forward(*args, **kwargs)

    layer.forward = watched
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _followed_by_hand(
    layer: nn.Module,
    name: str,
    follow: Callable[[Mapping[str, nn.Module]], Any],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    stand_in = _Called(forward)
    with follow({name: stand_in}):
        return stand_in(*args, **kwargs)


class _Called(nn.Module):
    """Calls a function as a module, so that hooks see it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _takes_gradients(layer: nn.Module) -> bool:
    """Whether no part of the layer can take the fast path."""
    return torch.is_grad_enabled() and all(p.requires_grad for p in layer.parameters())


@contextmanager
def graph_softmax_seen(modules: Mapping[str, nn.Module], saw: Saw) -> Iterator[None]:
    """Tells of each softmax over the edges of a graph that the modules' files import by name.

    Args:
        modules: The modules, by name; only of PyTorch Geometric's convolutions and of classes
            outside that package.
        saw: Called with the arguments of `torch_geometric.utils.softmax`.
    """
    utils = sys.modules.get("torch_geometric.utils")
    if utils is None:
        yield
        return
    original = utils.softmax

    def softmax(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = original(*args, **kwargs)
        saw(*args, **kwargs)
        return result

    homes = {kind.__module__ for module in modules.values() for kind in type(module).__mro__}
    files = [sys.modules.get(home) for home in sorted(homes) if _is_attention(home)]
    users = [file for file in files if vars(file or utils).get("softmax") is original and file]
    for file in users:
        file.softmax = softmax  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for file in users:
            file.softmax = original  # type: ignore[attr-defined]


def _is_attention(home: str) -> bool:
    return home.startswith("torch_geometric.nn.conv") or not home.startswith("torch_geometric")


@contextmanager
def apart_from_counters() -> Iterator[None]:
    """Unseen by PyTorch's own modes that keep account of what the model does.

    Selective checkpointing finds the operations of a forward again by their number, and the counter
    of operations would count what is not the model's.
    """
    dispatch = torch.utils._python_dispatch
    modes = dispatch._get_current_dispatch_mode_stack()
    if not any(type(mode).__module__.startswith("torch.") for mode in modes):
        yield
        return
    with dispatch._disable_current_modes():
        yield
