"""Which parameters never got a gradient, and whether gradients are zeroed between steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_diag.callbacks.optimizers import own_parameters
from lightning_diag.callbacks.wiring_parameters import Subject
from lightning_diag.functional.wiring_check import magnitudes

__all__ = ["Leftovers", "SilentParameters"]

_PATIENCE = 1000
_SAMPLES = 8


@dataclass
class _Silent:
    """One parameter without a gradient so far, and the count of steps when it was first seen."""

    subject: Subject
    born: int


class SilentParameters:
    """Trainable parameters of the optimizers that got no gradient at any step so far.

    At first all of them. Each step strikes out those that have one, so that a model where every
    parameter learns costs nothing from the second step on; a part that is used now and then is
    struck out when its turn comes. A look at ``parameter.grad is None`` asks the host alone.

    Attributes:
        steps: Steps that were watched, by optimizer: those at which it had any gradient.
    """

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}
        self._silent: dict[int, list[_Silent]] = {}
        self._known: dict[int, set[int]] = {}
        self._taught: set[int] = set()
        self._resumed: dict[int, dict[str, int]] = {}

    def step(
        self, index: int, optimizer: Optimizer, who: Callable[[Parameter], Subject], anew: bool
    ) -> None:
        """An optimizer is about to make a step; `anew` looks for parameters that came to it."""
        silent = self._silent.get(index)
        if silent is None or anew:
            silent = self._meet(index, optimizer, who)
        watched = self.steps.get(index, 0)
        if not silent or (watched >= _PATIENCE and not anew):
            return
        groups = optimizer.param_groups
        empty = all(p.grad is None for group in groups for p in group["params"])
        others = any(one != index and not left for one, left in self._silent.items())
        if empty and not others:
            # no backward pass at all, as where `training_step` gave None; an optimizer that is
            # stepped without any gradient while others have theirs is another matter
            return
        self.steps[index] = watched + 1
        still = [one for one in silent if one.subject.parameter.grad is None]
        if len(still) < len(silent):
            left = {id(one) for one in still}
            self._taught |= {id(x.subject.parameter) for x in silent if id(x) not in left}
            self._silent[index] = still

    def found(self) -> list[tuple[Subject, int]]:
        """Who is silent, and for how many watched steps."""
        return [
            (one.subject, self.steps.get(index, 0) - one.born)
            for index, silent in self._silent.items()
            for one in silent
            if one.subject.parameter.requires_grad
            and one.subject.parameter.numel()
            # another optimizer may hold it as well, and have its gradient
            and id(one.subject.parameter) not in self._taught
        ]

    @property
    def watched(self) -> bool:
        """Whether any step has been watched."""
        return any(self.steps.values())

    def _meet(
        self, index: int, optimizer: Optimizer, who: Callable[[Parameter], Subject]
    ) -> list[_Silent]:
        known = self._known.setdefault(index, set())
        silent = self._silent.setdefault(index, [])
        new = [p for p in own_parameters(optimizer) if p.requires_grad and id(p) not in known]
        known.update(id(parameter) for parameter in new)
        resumed = self._resumed.pop(index, None)
        for subject in map(who, new):
            if resumed is None:
                silent.append(_Silent(subject, self.steps.get(index, 0)))
            elif subject.name in resumed:
                silent.append(_Silent(subject, resumed[subject.name]))
        return silent

    def state_dict(self) -> dict[str, Any]:
        """The names of the silent, by optimizer."""
        silent = {
            index: {one.subject.name: one.born for one in members}
            for index, members in self._silent.items()
        }
        return {"steps": dict(self.steps), "silent": self._resumed | silent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.steps = dict(state["steps"])
        self._resumed = {index: dict(names) for index, names in state["silent"].items()}
        self._silent, self._known = {}, {}


class Leftovers:
    """Whether an optimizer's gradients were zeroed since its last step.

    Looked at when a backward pass begins: in the window between two steps of an optimizer there
    must be one such moment at which its gradients are absent or zero. Backward passes for another
    optimizer may add to them before they are zeroed, so a single moment does not decide where
    there are several. Of moments outside the looks, the host alone is asked, about one parameter.

    Attributes:
        clean: Optimizers whose gradients were zeroed in the window of this look.
        values: The largest of the gradients that were left, by optimizer, shape ``()``.
        closed: Optimizers whose window was seen whole.
    """

    def __init__(self) -> None:
        self._since: dict[int, int] = {}
        self._marks: dict[int, tuple[Parameter, int]] = {}
        self._unsure: set[int] = set()
        self._zeroed: set[int] = set()
        self._open: set[int] = set()
        self.clean: set[int] = set()
        self.values: dict[int, Tensor] = {}
        self.closed: set[int] = set()

    def begin(self) -> None:
        """A look begins."""
        self._open = set(self._since)
        self.clean, self.values, self.closed = set(), {}, set()

    def backward(self, looking: bool, optimizers: list[Optimizer], automatic: bool) -> None:
        """A backward pass begins."""
        for index in self._since:
            if not looking and not automatic:
                self._ask_host(index)
            self._since[index] += 1
        for index in list(self._open) if looking else ():
            self._look(index, optimizers[index])
            if automatic:
                self._close(index)

    def step(self, index: int, optimizer: Optimizer) -> None:
        """An optimizer is about to make a step."""
        if index < 0:
            return
        if index in self._open:
            self._close(index)
        self._since[index] = 0
        self._unsure.discard(index)
        self._zeroed.discard(index)
        marked = next((p for p in own_parameters(optimizer) if p.grad is not None), None)
        if marked is None or marked.grad is None:
            self._unsure.add(index)
        else:
            self._marks[index] = (marked, marked.grad._version)

    def end(self) -> None:
        """The look ends: a window that is still open is not known, unless it is clean."""
        for index in self._open:
            self.values.pop(index, None)
        self._open = set()

    def release(self) -> None:
        """Give the parameters back."""
        self._marks = {}
        self._since = {}

    def _ask_host(self, index: int) -> None:
        if index not in self._marks:
            return
        parameter, version = self._marks[index]
        if parameter.grad is None:
            self._zeroed.add(index)
        elif parameter.grad._version != version:
            # zeroed in place, or added to: that cannot be told without reading
            self._unsure.add(index)

    def _close(self, index: int) -> None:
        self._open.discard(index)
        if index in self._zeroed:
            self.clean.add(index)
        if index in self._unsure and index not in self.clean:
            self.values.pop(index, None)
        else:
            self.closed.add(index)

    def _look(self, index: int, optimizer: Optimizer) -> None:
        if index in self.clean:
            return
        found = [p.grad for p in own_parameters(optimizer) if p.requires_grad]
        left = [_local(gradient) for gradient in found if gradient is not None]
        if not left:
            self.clean.add(index)
            self.closed.add(index)
        parts = sorted((x for x in left if x.numel()), key=Tensor.numel)[:_SAMPLES]
        if not parts:
            return
        with torch.no_grad():
            largest = magnitudes(parts).nan_to_num(nan=1.0).amax()
        before = self.values.get(index)
        self.values[index] = largest if before is None else torch.minimum(before, largest)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
