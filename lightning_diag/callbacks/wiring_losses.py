"""The loss functions that one training step calls: what they are fed, and how they reduce."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_diag.callbacks.forward import Passing, Scope
from lightning_diag.callbacks.transforms import inside_transform
from lightning_diag.callbacks.wiring_forward import Guard
from lightning_diag.callbacks.wiring_severed import Severed
from lightning_diag.callbacks.wiring_tensors import Memories
from lightning_diag.functional.wiring_check import (
    PREDICTION_FACTS,
    broadcast_grows,
    prediction_facts,
    probability_facts,
    target_facts,
)

__all__ = ["DIFFERENCES", "FACTS", "LossCall", "LossWatch"]

FACTS = (
    *("low", "high", "sum_off", "log_off", "valid", "target_low", "target_high"),
    *PREDICTION_FACTS,
    "result",
)

_CALLS = 4
DIFFERENCES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
_KINDS = (
    *("cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
    *("kl_div", "poisson_nll_loss"),
)
# scores from which on the answer is yes
_THRESHOLDS = {"binary_cross_entropy": 0.5, "binary_cross_entropy_with_logits": 0.0}
_SIGNATURES: dict[Callable[..., Any], inspect.Signature] = {
    getattr(F, name): inspect.signature(getattr(F, name)) for name in (*_KINDS, *DIFFERENCES)
}
_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.KLDivLoss: F.kl_div,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
}
# what makes a target of a tensor of the batch
_CASTS = (
    "to",
    "long",
    "float",
    "int",
    "double",
    "half",
    "bfloat16",
    "type",
    "type_as",
    "bool",
    "cuda",
)
_VIEWS = ("squeeze", "unsqueeze", "view", "view_as", "reshape", "flatten", "ravel", "contiguous")
_MOVES = ("clone", "detach", "permute", "transpose", "expand", "argmax", "__getitem__", "__get__")
_SHIFTS = ("masked_fill", "where", "sub", "__rsub__", "add", "mul", "div")
_CONVERSIONS = frozenset((*_CASTS, *_VIEWS, *_MOVES, *_SHIFTS))
_SHAPES = (
    *("View", "Reshape", "UnsafeView", "Squeeze", "Unsqueeze", "Slice", "Select", "Transpose"),
    *("Permute", "TBackward", "Expand", "ToCopy", "Clone", "Alias"),
)
_SUBTRACTIONS = frozenset(("sub", "__sub__", "__rsub__", "rsub", "subtract"))


@dataclass
class LossCall:
    """One call of a loss function on something that needs a gradient.

    Attributes:
        kind: Name of the function, or ``"subtraction"``.
        shape: Of the predictions.
        target_shape: Of the targets.
        classes: Whether the targets are numbers of classes.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        from_batch: Whether the targets are a tensor of the batch, or made from one.
        single: Whether the predictions have single precision at least.
        made_by: Name of autograd's node that made the predictions, behind views and casts.
        facts: The numbers of `FACTS`, shape ``(14,)``.
    """

    kind: str
    shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    classes: bool
    reduction: str
    from_batch: bool
    single: bool
    made_by: str
    facts: Tensor

    @property
    def grows(self) -> bool:
        """Whether each prediction is compared with the targets of others."""
        differs = self.kind in (*DIFFERENCES, "subtraction")
        return differs and broadcast_grows(self.shape, self.target_shape)


class LossWatch:
    """Sees the loss functions of one training step.

    Eager code is seen by a function mode. Where the model has compiled parts, which a mode would
    have compiled once more, or attention whose fast path a mode would switch off, only the loss
    modules that run eagerly are seen.

    Args:
        guard: Isolates what is done here, as `Diagnostic.guarded` does.
        batch: Memories of the tensors of the batch.
        severed: Told of operations through which no gradient comes; None where nothing is amiss.

    Attributes:
        calls: What was seen, the first few.
        everywhere: Whether every call could be seen.
        sums: What sums to a single number gave, by their node in the graph.
        passed_by: Whether a loss function was called inside a transform of `torch.func`.
    """

    def __init__(self, guard: Guard, batch: Memories, severed: Severed | None = None) -> None:
        self.calls: list[LossCall] = []
        self.everywhere = False
        self.sums: dict[Node, Tensor] = {}
        self.passed_by = False
        self._batch = batch
        self._begin = guard(self._called)
        self._finish = guard(self._returned)
        self._convert = guard(self._converted)
        self._sever = guard(severed.saw) if severed is not None else None

    @contextmanager
    def inside(self, scope: Scope) -> Iterator[None]:
        """Watch the loss functions that are called in a scope."""
        self.everywhere = not scope.compiled and not scope.fast_path
        with ExitStack() as stack:
            if self.everywhere:
                stack.enter_context(_Mode(self, scope))
            else:
                for module in scope.modules.values():
                    self._hook(stack, scope, module)
            yield

    def before(self, func: Any, args: Any, kwargs: Any) -> LossCall | None:
        """Look at a call that the mode has met, before it is carried out."""
        return self._begin(func, args, kwargs) if func in _SIGNATURES else None

    def after(self, call: LossCall | None, func: Any, args: Any, result: Any) -> None:
        """Look at what came of it."""
        if self._sever is not None and not inside_transform():
            self._sever(getattr(func, "__name__", ""), args, result)
        if call is not None:
            self._finish(call, result)
        elif isinstance(result, Tensor):
            name = getattr(func, "__name__", "")
            if name == "sum" and result.grad_fn is not None and result.numel() == 1:
                self.sums[result.grad_fn] = result.detach()
            if name in _CONVERSIONS or name in _SUBTRACTIONS:
                self._convert(name, args, result)

    def _hook(self, stack: ExitStack, scope: Scope, module: nn.Module) -> None:
        func = _MODULES.get(type(module))
        if func is None:
            return
        own: Any = module
        begun: list[LossCall | None] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if scope.live:
                names = ("reduction", "ignore_index", "weight")
                settings = {name: getattr(own, name) for name in names if hasattr(own, name)}
                known = {
                    key: settings[key] for key in settings if key in _SIGNATURES[func].parameters
                }
                begun.append(self._begin(func, args, {**known, **kwargs}))

        def after(_: nn.Module, args: Any, result: Any) -> None:
            call = begun.pop() if begun else None
            if call is not None:
                self._finish(call, result)

        stack.callback(module.register_forward_pre_hook(Passing(before), with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(Passing(after)).remove)

    @torch.no_grad()
    def _called(self, func: Any, args: Any, kwargs: Any) -> LossCall | None:
        if inside_transform():
            self.passed_by = True
            return None
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        x, target, kind = given["input"], given["target"], func.__name__
        plain = isinstance(x, Tensor) and isinstance(target, Tensor)
        if not plain or not x.requires_grad or len(self.calls) == _CALLS:
            return None
        classes = kind in ("cross_entropy", "nll_loss") and not target.is_floating_point()
        ignored = given.get("ignore_index") if classes else None
        dim = 0 if x.dim() == 1 else 1
        where = dim if kind in ("cross_entropy", "nll_loss") else -1
        scores = x if x.dim() else x.reshape(1)
        call = LossCall(
            kind=kind,
            shape=tuple(x.shape),
            target_shape=tuple(target.shape),
            classes=classes,
            reduction=_reduction(given),
            from_batch=self._batch.name_of(target) is not None,
            single=x.dtype in (torch.float32, torch.float64),
            made_by=_made_by(x),
            facts=torch.cat(
                [
                    probability_facts(scores, where),
                    target_facts(target, ignored),
                    prediction_facts(
                        scores,
                        target,
                        dim=where if kind in ("cross_entropy", "nll_loss") else None,
                        threshold=_THRESHOLDS.get(kind),
                        ignored=ignored,
                    ),
                    torch.full((1,), torch.nan, device=x.device),
                ]
            ),
        )
        self.calls.append(call)
        return call

    @torch.no_grad()
    def _returned(self, call: LossCall, result: object) -> None:
        if isinstance(result, Tensor) and result.numel() == 1:
            value = result.detach().reshape(1).to(call.facts)
            call.facts = torch.cat([call.facts[:-1], value])

    def _converted(self, name: str, args: Any, result: Tensor) -> None:
        if inside_transform():
            return
        given = [x for x in args if isinstance(x, Tensor)]
        if not result.requires_grad:
            if name in _CONVERSIONS and any(self._batch.name_of(x) is not None for x in given):
                self._batch.add(result, "made from the batch")
            return
        if name in _SUBTRACTIONS and len(given) == 2:
            self._subtracted(*given)

    def _subtracted(self, first: Tensor, second: Tensor) -> None:
        x, target = (first, second) if first.requires_grad else (second, first)
        across = x.dim() != target.dim() and {x.dim(), target.dim()} == {1, 2}
        if target.requires_grad or not across or len(self.calls) == _CALLS:
            return
        shape, target_shape = tuple(x.shape), tuple(target.shape)
        wide = shape if len(shape) == 2 else target_shape
        if wide[0] != (target_shape if wide is shape else shape)[0]:
            return
        if broadcast_grows(shape, target_shape) and self._batch.name_of(target) is not None:
            facts = torch.full((len(FACTS),), torch.nan, device=x.device)
            made = LossCall(
                "subtraction", shape, target_shape, False, "none", True, True, "", facts
            )
            self.calls.append(made)


class _Mode(TorchFunctionMode):
    def __init__(self, watch: LossWatch, scope: Scope) -> None:
        super().__init__()
        self._watch = watch
        self._scope = scope

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Dynamo, which may trace this, leaves the rest out
        if torch.compiler.is_compiling() or not self._scope.live:
            return func(*args, **(kwargs or {}))
        call = self._watch.before(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        self._watch.after(call, func, args, result)
        return result


def _made_by(x: Tensor) -> str:
    """The node of the graph that computed a tensor; empty where there is none."""
    node = x.grad_fn
    while node is not None and node.name().startswith(_SHAPES) and node.next_functions:
        node = node.next_functions[0][0]
    return "" if node is None else str(node.name())


def _reduction(given: dict[str, Any]) -> str:
    # the old arguments, which decide where they are given
    if given.get("reduce") is False:
        return "none"
    if given.get("size_average") is False:
        return "sum"
    return str(given["reduction"])
