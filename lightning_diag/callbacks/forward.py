"""One batch's forward, watched from inside; what is compiled is watched in an eager copy of it."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_diag.components import module_names
from lightning_diag.lightning import LightningModule

__all__ = ["Inside", "Passing", "Scope", "Watch", "watch_training_step"]


@dataclass
class Scope:
    """What a context may look at while it is entered.

    Attributes:
        modules: The modules that run eagerly, by name without wrapper prefixes; without those that
            a hook would make compute in another way (`fast_path`), and without scripted ones, which
            take no hooks.
        shadow: Whether this is the second, eager forward of a compiled part.
        compiled: Whether the model has compiled parts.
        fast_path: Whether the model has attention or encoder layers of PyTorch in evaluation mode.
            They compute in a fused way, which a hook inside or a function mode around them
            switches off: the last bits of the result would change.
        live: False while a backward pass runs, in which checkpointing may run modules again: what
            is seen then has been seen before.
    """

    modules: dict[str, nn.Module]
    shadow: bool
    compiled: bool
    fast_path: bool = False
    live: bool = True


_P = ParamSpec("_P")
_T = TypeVar("_T")
Inside = Callable[[Scope], AbstractContextManager[object]]
Guard = Callable[[Callable[..., Any]], Callable[..., Any]]


class Watch:
    """One wish to be inside the next training step.

    Args:
        inside: Makes the context of one scope.
        guard: Isolates the code of the diagnostic that asks, as `Diagnostic.guarded` does.
        shadows: Whether compiled parts may be run a second time.
    """

    def __init__(self, inside: Inside, guard: Guard, shadows: bool) -> None:
        self.inside = inside
        self.shadows = shadows
        self.guard = guard
        self.removed = False
        self.step: _WatchedStep | None = None

    def remove(self) -> None:
        """Wish no more."""
        self.removed = True
        if self.step is not None:
            self.step.give_back_unwanted()


class Passing(Generic[_P, _T]):
    """A function that hangs on a module for one step: copies of the module get one without effect.

    Args:
        function: What is called.
    """

    def __init__(self, function: Callable[_P, _T]) -> None:
        self._function = function

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        # what Dynamo traces stays in the compiled code: it must be as without us
        return None if torch.compiler.is_compiling() else self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return without_effect

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (without_effect,)


def without_effect(*args: object, **kwargs: object) -> None:
    """What hangs on a copy of a module where one of our hooks hung on the module itself."""


def watch_training_step(
    module: LightningModule, inside: Inside, guard: Guard, *, shadows: bool = True
) -> Watch:
    """Enter a context around the next call of ``module.training_step``, once.

    Args:
        module: The module that trains.
        inside: Makes the context of one scope.
        guard: Isolates the code of the diagnostic that asks.
        shadows: Whether compiled parts may be run a second time.

    Raises:
        TypeError: If the module's class makes ``training_step`` a property, in whose place nothing
            can stand.
    """
    own = inspect.getattr_static(type(module), "training_step", None)
    if inspect.isdatadescriptor(own):
        raise TypeError(
            f"`training_step` must be a method to be watched, got {type(own).__name__}."
        )
    step = _steps.get(module)
    if step is None:
        step = _steps[module] = _WatchedStep(module)
    watch = Watch(inside, guard, shadows)
    watch.step = step
    step.watches.append(watch)
    return watch


class _StandIn:
    """In the place of ``training_step``; a copy of the module gets the method of its own class."""

    def __init__(self, step: "_WatchedStep", original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        # Lightning looks one level below decorators to know what to pass: there must stand the same
        self.__wrapped__ = getattr(original, "__wrapped__", original)
        self._step = step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step.carry_out(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        module = self._step.module
        copied = memo.get(id(module))
        if copied is None:
            return self._step.original
        return functools.partial(type(module).training_step, copied)

    def __reduce__(self) -> tuple[Any, ...]:
        module = self._step.module
        return functools.partial, (type(module).training_step, module)


class _WatchedStep:
    """What happens around ``training_step`` when it is called next, once."""

    def __init__(self, module: LightningModule) -> None:
        self.watches: list[Watch] = []
        self.module = module
        self.original = module.training_step
        self._own = vars(module).get("training_step")
        # not `setattr`, which a module may have made its own
        vars(module)["training_step"] = _StandIn(self, self.original)

    def carry_out(self, *args: Any, **kwargs: Any) -> Any:
        """Call the step within all contexts."""
        self._give_back()
        watches = [watch for watch in self.watches if not watch.removed]
        roots = _compiled_roots(self.module)
        below = {id(part) for root in roots.values() for part in root.modules()}
        names = module_names(self.module)
        fast = _fast_path(self.module)
        left_out = below | fast | _scripted(self.module)
        eager = {name: part for name, part in names.items() if id(part) not in left_out}
        scope = Scope(eager, shadow=False, compiled=bool(roots), fast_path=bool(fast))
        with ExitStack() as stack:
            stack.enter_context(_paused_in_backward(self.module, scope))
            for root in roots.values():
                own = {id(part) for part in root.modules()} - _scripted(root)
                inside = {name: part for name, part in names.items() if id(part) in own}
                shadow = Scope(inside, shadow=True, compiled=True)
                stack.enter_context(_paused_in_backward(self.module, shadow))
                stack.enter_context(_shadowed(root, shadow, watches))
            for watch in watches:
                stack.enter_context(_Isolated(watch, scope))
            return self.original(*args, **kwargs)

    def give_back_unwanted(self) -> None:
        """Stand in no longer where nobody wishes to watch."""
        if _steps.get(self.module) is self and all(watch.removed for watch in self.watches):
            self._give_back()

    def _give_back(self) -> None:
        _steps.pop(self.module, None)
        if self._own is None:
            vars(self.module).pop("training_step", None)
        else:
            vars(self.module)["training_step"] = self._own


def _fast_path(model: nn.Module) -> set[int]:
    """The ids of PyTorch's fused layers in evaluation mode, and of what is inside them."""
    kinds = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
    found = [part for part in model.modules() if isinstance(part, kinds) and not part.training]
    return {id(below) for part in found for below in part.modules()}


def _scripted(model: nn.Module) -> set[int]:
    """The ids of modules that TorchScript runs."""
    found = [part for part in model.modules() if isinstance(part, torch.jit.ScriptModule)]
    return {id(below) for part in found for below in part.modules()}


_steps: "WeakKeyDictionary[LightningModule, _WatchedStep]" = WeakKeyDictionary()


class _Isolated:
    """A context whose own exceptions end the diagnostic alone, and which is left in any case."""

    def __init__(self, watch: Watch, scope: Scope) -> None:
        self._watch = watch
        self._scope = scope
        self._entered: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        def enter() -> AbstractContextManager[object]:
            context = self._watch.inside(self._scope)
            context.__enter__()
            return context

        self._entered = self._watch.guard(enter)()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._entered is None:
            return
        try:
            self._entered.__exit__(kind, error, trace)
        except Exception as own:
            if own is not error:
                self._watch.guard(_raise)(own)


def _raise(error: Exception) -> None:
    raise error


@contextmanager
def _paused_in_backward(module: LightningModule, scope: Scope) -> Iterator[None]:
    """Under manual optimization the backward pass runs inside ``training_step``."""
    if module.automatic_optimization:
        yield
        return
    own, backward = vars(module).get("manual_backward"), module.manual_backward

    def paused(*args: Any, **kwargs: Any) -> None:
        scope.live = False
        try:
            backward(*args, **kwargs)
        finally:
            scope.live = True

    vars(module)["manual_backward"] = Passing(paused)
    try:
        yield
    finally:
        if own is None:
            vars(module).pop("manual_backward", None)
        else:
            vars(module)["manual_backward"] = own


def _compiled_roots(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost compiled modules, by name."""
    roots: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{root}.") or not root for root in roots)
        if not inside and (_is_wrapper(module) or _compiled_call(module) is not None):
            roots[name] = module
    return roots


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule)


def _compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module.compile()`` put in place of the module's call."""
    call: Callable[..., Any] | None = getattr(module, "_compiled_call_impl", None)
    return call


@contextmanager
def _shadowed(root: nn.Module, scope: Scope, watches: list[Watch]) -> Iterator[None]:
    """Before each call of a compiled module, watch an eager one with the same input."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for watch in watches if scope.live else ():
            if not watch.shadows:
                continue
            # one forward for each, which is then its own cost and its own risk
            watch.guard(_watch_shadow)(watch, scope, root, args, kwargs)

    if _is_wrapper(root):
        handle = root.register_forward_pre_hook(Passing(before), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return
    compiled: Any = _compiled_call(root)

    def call(*args: Any, **kwargs: Any) -> Any:
        before(root, args, kwargs)
        return compiled(*args, **kwargs)

    _set_compiled_call(root, call)
    try:
        yield
    finally:
        _set_compiled_call(root, compiled)


def _watch_shadow(
    watch: Watch, scope: Scope, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    call: Any = root._orig_mod if _is_wrapper(root) else root._call_impl
    devices = {tensor.device.index for tensor in root.parameters() if tensor.is_cuda}
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        _buffers_kept(root),
        watch.inside(scope),
    ):
        call(*args, **kwargs)


@contextmanager
def _buffers_kept(root: nn.Module) -> Iterator[None]:
    """Put back what a forward changes in buffers, such as running statistics."""
    kept = [
        (part, name, buffer, buffer.detach().clone())
        for part in root.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for part, name, buffer, before in kept:
            part._buffers[name] = buffer
            # past autograd, which may have saved the buffer: it gets its own values back
            buffer.data.copy_(before)


def _set_compiled_call(module: nn.Module, call: Callable[..., Any]) -> None:
    # not `setattr`, which a module may have made its own
    vars(module)["_compiled_call_impl"] = call
