"""One batch, measured part by part: its marks in time and what ran between them."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_diag.callbacks.forward import Scope
from lightning_diag.callbacks.profile_graph import borders, graph_position
from lightning_diag.callbacks.profile_operators import OperatorCount
from lightning_diag.callbacks.profile_timeline import Mark, Timeline
from lightning_diag.functional.batches import tensors_in
from lightning_diag.functional.component_profiler import exclusive_seconds

__all__ = ["WHOLE", "Cost", "Measurement"]

WHOLE = "whole"
_ASIDE = ("aside", True)
"""Whose time is nobody's: eager copies of compiled parts, and backward passes inside the step."""

Owner = tuple[int | str, bool]
"""A component's number or `WHOLE`, and whether it ran in an eager copy."""


@dataclass
class Cost:
    """What one component, or the whole model, cost in one batch.

    Attributes:
        calls: Calls of its outermost modules.
        forward_seconds: Time of its forward.
        backward_seconds: Time of its backward.
        forward_flops: Floating point operations of its forward; None where nobody counted.
        saved_bytes: Memory made in its forward that was there when the forward was over.
        peak_bytes: Most memory beyond what was in use when it began, on a CUDA device.
        eager: Whether it was seen in an eager copy of a compiled part.
    """

    calls: int = 0
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    forward_flops: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    eager: bool = False


@dataclass
class _Call:
    """One call of a component's module, and its stretch of each backward pass."""

    owner: Owner
    began: Mark
    position: int
    memory: int
    counted: bool
    passes: dict[int, list[Mark | None]] = field(default_factory=dict)


class Measurement:
    """Watches one batch from inside; gives the costs when all marks have been passed.

    Args:
        device: Where the model computes.
        members: Name of each outermost module of a component, to the component's number.
        guard: Isolates what is given to PyTorch as a hook, as `Diagnostic.guarded` does.
        counting: Whether operators and memory are counted too, which slows the forward down.
        automatic: Whether the backward pass comes after ``training_step`` and not inside it.
    """

    def __init__(
        self,
        device: torch.device,
        members: Mapping[str, int],
        guard: Callable[[Callable[..., Any]], Callable[..., Any]],
        *,
        counting: bool,
        automatic: bool,
    ) -> None:
        self.counting = counting
        self.compiled = False
        self._device = device
        self._members = members
        self._guard = guard
        self._automatic = automatic
        self._closed = False
        self._timeline = Timeline(device)
        self._began = self._ended = self._timeline.mark()
        self._forward: list[tuple[Owner, Mark, Mark]] = []
        self._backward: list[tuple[Mark, Mark]] = []
        self._backward_began: Mark | None = None
        self._passes = 0
        self._watched: list[_Call] = []
        self._calls: Counter[Owner] = Counter()
        self._stack: list[_Call] = []
        self._memory = self._allocated()
        allocated = self._allocated if device.type == "cuda" else None
        self._count = OperatorCount(self._owner, guard, allocated) if counting else None
        self._entered = False
        self._held: Counter[Hashable] | None = None

    # ---- while the batch runs ----

    @contextmanager
    def inside(self, scope: Scope) -> Iterator[None]:
        """The context of one scope of `Diagnostic.watch_forward`."""
        self.compiled = self.compiled or scope.compiled
        count = self._count if scope.shadow or not scope.compiled else None
        # a dispatch mode must not see a backward pass, so there only the components are counted
        throughout = count is not None and (scope.shadow or self._automatic)
        began = self._timeline.mark()
        handles = self._hang(scope, count is not None and not throughout)
        if throughout:
            self._enter()
        try:
            yield
        finally:
            if throughout or self._entered:
                self._leave()
            for handle in handles:
                handle.remove()
            owner: Owner = _ASIDE if scope.shadow else (WHOLE, False)
            self._forward.append((owner, began, self._timeline.mark()))
            if not scope.shadow:
                self._forward_over()

    def backward_begins(self) -> None:
        """A backward pass begins."""
        self._forward_over()
        self._passes += 1
        self._backward_began = self._timeline.mark()

    def backward_ends(self) -> None:
        """The backward pass is over."""
        if self._backward_began is not None:
            self._backward.append((self._backward_began, self._timeline.mark()))
        self._backward_began = None

    def ends(self) -> None:
        """The batch is over; what still hangs in an old graph counts no more."""
        self._ended = self._timeline.mark()
        self.close()

    def close(self) -> None:
        """Take note of nothing more."""
        self._closed = True

    # ---- afterwards ----

    @property
    def uncounted(self) -> set[str]:
        """Operators whose floating point operations could not be told."""
        return self._count.uncounted if self._count is not None else set()

    def step_seconds(self) -> float:
        """Time of the whole batch."""
        return self._timeline.seconds(self._ended) - self._timeline.seconds(self._began)

    def costs(self, size: int) -> tuple[list[Cost], Cost]:
        """The costs of each of so many components, and of the whole model."""
        forward, backward = self._forward_seconds(), self._backward_seconds()
        parts = []
        for part in range(size):
            owners: list[Owner] = [(part, False), (part, True)]
            times = [forward[owner] for owner in owners if owner in forward]
            cost = Cost(
                calls=sum(self._calls[owner] for owner in owners),
                forward_seconds=sum(times) if times else None,
                backward_seconds=backward.get(part),
                eager=self._calls[part, True] > 0,
            )
            self._add_counts(cost, owners)
            parts.append(cost)
        own = [time for owner, time in forward.items() if not owner[1]]
        spans = [self._span(began, ended) for began, ended in self._backward]
        whole = Cost(
            calls=1,
            forward_seconds=sum(own) if own else None,
            backward_seconds=sum(end - begin for begin, end in spans) if spans else None,
        )
        self._add_counts(whole, None)
        return parts, whole

    # ---- private ----

    def _hang(self, scope: Scope, each: bool) -> list[Any]:
        handles = []
        for name, module in scope.modules.items():
            part = self._members.get(name)
            if part is None:
                continue

            def before(_: nn.Module, __: object, part: int = part) -> None:
                if scope.live:
                    self._before((part, scope.shadow), each)

            def after(_: nn.Module, __: object, output: object) -> None:
                if scope.live:
                    self._after(output, each, watch=not scope.shadow)

            handles += [
                module.register_forward_pre_hook(self._guard(before)),
                module.register_forward_hook(self._guard(after), always_call=True),
            ]
        return handles

    def _before(self, owner: Owner, each: bool) -> None:
        counted = each and not self._entered
        self._calls[owner] += 1
        began, memory = self._timeline.mark(), self._allocated()
        self._stack.append(_Call(owner, began, graph_position(), memory, counted))
        if counted:
            self._enter()

    def _after(self, output: object, each: bool, *, watch: bool) -> None:
        call = self._stack.pop()
        if call.counted:
            self._leave()
        self._forward.append((call.owner, call.began, self._timeline.mark()))
        if watch and torch.is_grad_enabled():
            self._watch_backward(call, output)

    def _watch_backward(self, call: _Call, output: object) -> None:
        first, last = borders(tensors_in(output), call.position)
        if not first:
            return

        def begins(*_: object) -> None:
            if not self._closed and self._passes not in call.passes:
                call.passes[self._passes] = [self._timeline.mark(), None]

        def ends(*_: object) -> None:
            if not self._closed and self._passes in call.passes:
                call.passes[self._passes][1] = self._timeline.mark()

        self._watched.append(call)
        for node in first:
            node.register_prehook(self._guard(begins))
        for node in last:
            node.register_hook(self._guard(ends))

    def _owner(self) -> tuple[Owner, int]:
        if self._stack:
            return self._stack[-1].owner, self._stack[-1].memory
        return (WHOLE, False), self._memory

    def _allocated(self) -> int:
        if self._device.type != "cuda" or not self.counting:
            return 0
        return torch.cuda.memory_allocated(self._device)

    def _enter(self) -> None:
        if self._count is not None:
            self._count.__enter__()  # type: ignore[no-untyped-call]
            self._entered = True

    def _leave(self) -> None:
        if self._count is not None and self._entered:
            self._entered = False
            self._count.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _forward_over(self) -> None:
        if self._count is not None and self._held is None:
            self._held = self._count.held()

    def _forward_seconds(self) -> dict[Owner, float]:
        aside = [(_ASIDE, began, ended) for began, ended in self._backward]
        # inner ones end first; of those that begin at the same tick the outer must come first
        spans = [*reversed(self._forward), *aside]
        return exclusive_seconds((owner, *self._span(*marks)) for owner, *marks in spans)

    def _backward_seconds(self) -> dict[int | str, float]:
        return exclusive_seconds(
            (call.owner[0], *self._span(began, ended))
            for call in self._watched
            for began, ended in call.passes.values()
            if began is not None and ended is not None
        )

    def _span(self, began: Mark, ended: Mark) -> tuple[float, float]:
        return self._timeline.seconds(began), self._timeline.seconds(ended)

    def _add_counts(self, cost: Cost, owners: list[Owner] | None) -> None:
        count, held = self._count, self._held
        if count is None or not cost.calls:
            return
        if self.compiled:
            # what is compiled was counted in its eager copy, the rest not at all
            if owners is not None and all(owner[1] for owner in owners if self._calls[owner]):
                cost.forward_flops = sum(count.flops[owner] for owner in owners)
            return
        chosen = list(count.flops | (held or {}) | count.peaks) if owners is None else owners
        cost.forward_flops = sum(count.flops[owner] for owner in chosen)
        if held is not None:
            cost.saved_bytes = sum(held[owner] for owner in chosen)
        if self._device.type == "cuda":
            cost.peak_bytes = max((count.peaks.get(owner, 0) for owner in chosen), default=0)
