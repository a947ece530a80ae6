"""How a loss is made of its terms: as a mean, or as a sum that nobody divides."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_diag.callbacks.base import Row
from lightning_diag.callbacks.segments import number
from lightning_diag.callbacks.wiring_forward import Guard
from lightning_diag.callbacks.wiring_rows import plain_row

__all__ = ["Reduction", "Reductions", "rows_of"]

_FEW_SAMPLES = 8
_UNDIVIDED = 0.5
_SLACK = 1e-3
_MOST_NODES = 64
_MOST_FOUND = 8
_LOSSES = {
    "NllLossBackward": "nll_loss",
    "NllLoss2DBackward": "nll_loss",
    "BinaryCrossEntropyBackward": "binary_cross_entropy",
    "BinaryCrossEntropyWithLogitsBackward": "binary_cross_entropy_with_logits",
    "MseLossBackward": "mse_loss",
    "SmoothL1LossBackward": "smooth_l1_loss",
    "HuberLossBackward": "huber_loss",
    "SoftMarginLossBackward": "soft_margin_loss",
}
_MODES = {1: "mean", 2: "sum"}


@dataclass
class Reduction:
    """One place at which many numbers become one, on the way to the loss.

    Attributes:
        at: Name of the loss function, ``"sum"`` or ``"mean"``.
        kind: ``"sum"`` or ``"mean"``.
        shape: Of what is reduced.
        weight: Derivative of the loss by the result, a tensor of one element, once it is known.
        value: The result, where it is known.
    """

    at: str
    kind: str
    shape: tuple[int, ...]
    weight: Tensor | None = None
    value: Tensor | None = None

    @property
    def terms(self) -> int:
        """How many numbers become one."""
        return int(torch.Size(self.shape).numel())


class Reductions:
    """Follows the graph of a loss back to where its terms were added up.

    What each sum, or mean, weighs in the loss is read from the backward pass that is made anyway: a
    mean weighs about 1, a sum over a batch of N that is divided 1 / N, one that is not about 1,
    and a mean that is multiplied by the size of the batch N.

    Args:
        guard: Isolates what is done here, as `Diagnostic.guarded` does.

    Attributes:
        found: What was found, the first few.
    """

    def __init__(self, guard: Guard) -> None:
        self.found: list[Reduction] = []
        self._scale: Tensor | None = None
        self._follow = guard(self._followed)

    def begins(self, loss: Tensor, scaler: Any | None, sums: Mapping[Node, Tensor]) -> None:
        """A backward pass begins.

        Args:
            loss: Where it begins.
            scaler: The gradient scaler whose scale the loss has been multiplied by.
            sums: What the sums of this step gave, by their node in the graph.
        """
        self._follow(loss, scaler, sums)

    def numbers(self) -> Tensor | None:
        """The weights of those that are known, without the scaler's scale, then their values.

        Returns:
            Shape ``(2, n)``; a value that is not known is NaN. None where nothing is known.
        """
        self.found = [one for one in self.found if one.weight is not None]
        weights = [one.weight.reshape(()).float() for one in self.found if one.weight is not None]
        if not weights:
            return None
        unknown = weights[0].new_full((), torch.nan)
        values = [
            unknown if one.value is None else one.value.reshape(()).float() for one in self.found
        ]
        scale = 1.0 if self._scale is None else self._scale
        return torch.stack([torch.stack(weights) / scale, torch.stack(values)])

    @torch.no_grad()
    def _followed(self, loss: Tensor, scaler: Any | None, sums: Mapping[Node, Tensor]) -> None:
        if loss.grad_fn is None or len(self.found) >= _MOST_FOUND:
            return
        if scaler is not None:
            self._scale = scaler.scale(torch.ones((), device=loss.device)).float()
        waiting, seen = [loss.grad_fn], {loss.grad_fn}
        while waiting and len(seen) < _MOST_NODES and len(self.found) < _MOST_FOUND:
            node = waiting.pop()
            given = [one for one, _ in node.next_functions if one is not None]
            reduction = _reduction(node, given[0]) if given else None
            if reduction is not None:
                reduction.value = sums.get(node)
                self.found.append(reduction)
                node.register_prehook(_keep(reduction))
                continue
            few = [one for one in given if one not in seen and _is_few(one)]
            seen.update(few)
            waiting += few


def rows_of(
    found: Sequence[Reduction], numbers: Sequence[float], samples: int, parts: int, optimizer: str
) -> list[Row]:
    """The rows of ``wrong_reduction``.

    Args:
        found: What was found.
        numbers: What `Reductions.numbers` gave, one behind the other.
        samples: The size of the batch.
        parts: How many batches are accumulated, each of which has been divided by their number.
        optimizer: Name of the optimizer.
    """
    rows: list[Row] = []
    if not found:
        what = "no sum or mean was seen on the way to the loss"
        return [plain_row("wrong_reduction", "unknown", what)]
    weights, values = numbers[: len(found)], numbers[len(found) :]
    together: dict[tuple[str, str, int], float] = {}
    for one, weight in zip(found, weights, strict=True):
        key = (one.at, one.kind, one.terms)
        together[key] = together.get(key, 0.0) + abs(weight) * parts
    for one, weight, value in zip(found, weights, values, strict=True):
        whole = abs(weight) * parts
        # the two halves of a contrastive loss make one mean
        both = together[one.at, one.kind, one.terms]
        wrong = _is_wrong(one, whole, samples) or _is_wrong(one, both, samples)
        # a sum over what a mask has taken out altogether is divided by something else
        state = "wrong" if wrong and value != 0 else "ok"
        row = plain_row("wrong_reduction", state, one.kind, at=one.at, algorithm=optimizer)
        row |= {"count": one.terms, "samples": samples}
        rows.append(row | {"value": number(whole)})
    return rows


def _is_wrong(one: Reduction, weight: float, samples: int) -> bool:
    if samples < _FEW_SAMPLES or not isfinite(weight):
        return False
    if one.kind == "sum":
        # the batch is the first dimension, or has been merged into it
        over_batch = bool(one.shape) and one.shape[0] % samples == 0
        return over_batch and _UNDIVIDED < weight < 1 / _UNDIVIDED
    counts = {samples, one.shape[0] if one.shape else 0, one.terms}
    return any(n >= _FEW_SAMPLES and abs(weight - n) <= _SLACK * n for n in counts)


def _keep(reduction: Reduction) -> Callable[[tuple[Tensor, ...]], None]:
    def keep(gradients: tuple[Tensor, ...]) -> None:
        if reduction.weight is None and gradients and isinstance(gradients[0], Tensor):
            reduction.weight = gradients[0].detach()

    return keep


def _reduction(node: Node, given: Node) -> Reduction | None:
    name = node.name().rstrip("0123456789")
    shape = _shape(given)
    if shape is None or torch.Size(shape).numel() < 2 or _is_weights(given):
        return None
    if given.name().startswith(("Stack", "Cat")) and _is_few(given):
        # losses side by side, each of which has been reduced before
        return None
    if name in ("SumBackward", "MeanBackward"):
        kind = name.removesuffix("Backward").lower()
        return Reduction(kind, kind, shape) if _is_few(node, most=1) else None
    at = _LOSSES.get(name)
    kind = _MODES.get(getattr(node, "_saved_reduction", 0), "")
    if at is None or not kind:
        return None
    if at == "nll_loss":
        soft = _behind_views(given).name().startswith("LogSoftmax")
        # a class is picked for each sample: its scores are no terms
        shape = (shape[0], *shape[2:])
        at = "cross_entropy" if soft else at
    return Reduction(at, kind, shape)


def _behind_views(node: Node) -> Node:
    while node.name().startswith(("View", "Reshape", "Unsqueeze")) and node.next_functions:
        before = node.next_functions[0][0]
        if before is None:
            break
        node = before
    return node


def _is_weights(node: Node) -> bool:
    """Whether it is made of parameters alone, as the size of weights is."""
    steps, waiting = 0, [node]
    while waiting and steps < _FEW_SAMPLES:
        one, steps = waiting.pop(), steps + 1
        given = [x for x, _ in one.next_functions if x is not None]
        if not given and not one.name().endswith("AccumulateGrad"):
            return False
        waiting += given
    return not waiting


def _shape(node: Node) -> tuple[int, ...] | None:
    about = getattr(node, "_input_metadata", None)
    return tuple(int(size) for size in about[0].shape) if about else None


def _is_few(node: Node, most: int = _FEW_SAMPLES - 1) -> bool:
    """Whether it gives a single number, or a few losses that stand side by side."""
    shape = _shape(node)
    return shape is not None and torch.Size(shape).numel() <= most
