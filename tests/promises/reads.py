"""Counts what a training step reads from tensors, and who asked for it."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_diag
from lightning_diag.lightning import Callback, LightningModule, Trainer

_PACKAGE = str(Path(lightning_diag.__file__).parent)
_OPTIMIZERS = str(Path(torch.optim.__file__).parent)

# operators that must know values before they go on
_OPERATORS = {
    *("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"),
    *("unique_dim", "unique_consecutive", "nonzero_numpy", "argwhere"),
}
# ways to values that dispatch nothing on a CPU
_FUNCTIONS = {
    *("item", "tolist", "numpy", "cpu", "__array__", "__format__", "__repr__"),
    *("__bool__", "__float__", "__int__", "__index__", "__complex__"),
}
# functions of ours that call what the user would have called
_PASSAGES = {"carry_out", "paused", "__torch_function__", "__torch_dispatch__"}
# what asks on a CPU alone, where nothing is copied and nobody waits; on a device it asks nothing
_AT_HAND = {"odd_on_host"}
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_post_accumulate_grad_hooks", "_state_dict_hooks"),
)


@dataclass
class Step:
    """What happened from the start of one batch to the start of the next.

    Attributes:
        reads: How often values were asked for, by the place in the code that asked.
        own_operations: Names of the tensor operations that diagnostics caused.
        own_reads: The reads that diagnostics caused.
        measured: How often each class of diagnostic said that it measured.
        hooks: What hung on modules, parameters and interpreter between forward and backward.
    """

    reads: Counter[str] = field(default_factory=Counter)
    own_operations: list[str] = field(default_factory=list)
    own_reads: list[str] = field(default_factory=list)
    measured: Counter[str] = field(default_factory=Counter)
    hooks: list[dict[str, object]] = field(default_factory=list)


class Watch:
    """Counts while it is entered."""

    def __init__(self) -> None:
        self.step = Step()
        self._inside = False
        self._modes = (_Operators(self), _Functions(self))

    def __enter__(self) -> "Watch":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)

    def saw(self, name: str, *, is_read: bool, is_operation: bool) -> None:
        """Write down one event with the place that it comes from."""
        place, own, optimizer, at_hand = _origin()
        if own and is_operation:
            self.step.own_operations.append(name)
        if is_read and not self._inside and not optimizer and not at_hand:
            self.step.reads[f"{name} at {place}"] += 1
            if own:
                self.step.own_reads.append(f"{name} at {place}")


class _Operators(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self._watch.saw(name, is_read=masked or name in _OPERATORS, is_operation=True)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _FUNCTIONS and not (name == "to" and _moves(args[1:], kwargs)):
            return func(*args, **kwargs)
        watch, before = self._watch, self._watch._inside
        watch.saw(name, is_read=True, is_operation=False)
        # `item` dispatches an operator of its own: one read all the same
        watch._inside = True
        try:
            return func(*args, **kwargs)
        finally:
            watch._inside = before


class WatchSteps(Callback):
    """Puts a `Watch` around every training batch; must come first among the callbacks.

    Attributes:
        steps: One entry for each batch.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._watch: Watch | None = None

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._close()
        self._watch = Watch().__enter__()
        self.steps.append(self._watch.step)

    def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, _: Any) -> None:
        # forward is over, backward comes: whatever watches the step hangs there now
        self.steps[-1].hooks.append(census(module))

    def saw_measuring(self, kind: str) -> None:
        """A diagnostic of this class says that it measures."""
        self.steps[-1].measured[kind] += 1

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.__exit__()
            self._watch = None


def census(module: nn.Module) -> dict[str, object]:
    """Every hook and replaced function that could take part in a forward or backward pass."""
    owners = [*module.modules(), *module.parameters()]
    hanging = Counter(
        name for owner in owners for name in _HOOKS for _ in getattr(owner, name, None) or ()
    )
    everywhere = nn.modules.module
    return {
        **hanging,
        "global": sum(
            len(getattr(everywhere, name)) for name in vars(everywhere) if name.endswith("_hooks")
        ),
        "functions": [id(F.scaled_dot_product_attention), id(F.softmax)],
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
    }


def _moves(args: Any, kwargs: Any) -> bool:
    """Whether a call of `Tensor.to` names a device, and is not torch's own."""
    named = any(isinstance(target, str | torch.device) for target in [*args, *kwargs.values()])
    return named and "/torch/" not in sys._getframe(2).f_code.co_filename


def _origin() -> tuple[str, bool, bool, bool]:
    """The innermost place outside torch and this file; and who asks: we, an optimizer, at hand?"""
    place, own, optimizer, passed, at_hand = "", False, False, False, False
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        ours = code.co_filename.startswith(_PACKAGE)
        if ours and code.co_name in _PASSAGES:
            # we stand around the user's own code there
            passed = True
        elif not passed:
            own = own or ours
        at_hand = at_hand or (ours and code.co_name in _AT_HAND)
        optimizer = optimizer or (not own and code.co_filename.startswith(_OPTIMIZERS))
        inside = "/torch/" in code.co_filename or code.co_filename == __file__
        if not place and not inside and not (ours and code.co_name in _PASSAGES):
            place = f"{Path(code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return place, own, optimizer, at_hand
