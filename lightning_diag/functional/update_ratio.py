"""Update ratio: how far an optimizer step moves weights, in proportion to their size."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diag.functional.moments import (
    Moments,
    gathered,
    merge,
    merge_by,
    moments,
    neutral,
    quick_moments,
)

__all__ = [
    "UpdateSummary",
    "gradient_sizes",
    "merge_updates",
    "update_ratio",
    "update_summary",
    "update_table",
]

_FIELDS = len(Moments._fields)
_AT_ONCE = 1 << 23


class UpdateSummary(NamedTuple):
    """The updates of one optimizer step, by parameter, by component and as a whole.

    Attributes:
        updates: Moments of the update of each parameter, shape ``(n,)``.
        weights: Moments of each parameter before the step, shape ``(n,)``.
        part_updates: Moments of the update of each component, shape ``(c,)``.
        part_weights: Moments of each component before the step, shape ``(c,)``.
        whole_update: Moments of all updates, shape ``(1,)``.
        whole_weight: Moments of all weights before the step, shape ``(1,)``.
        gradients: Largest magnitude in each parameter's gradient, shape ``(n,)``.
    """

    updates: Moments
    weights: Moments
    part_updates: Moments
    part_weights: Moments
    whole_update: Moments
    whole_weight: Moments
    gradients: Tensor


def update_ratio(update: Moments, weight: Moments) -> Tensor:
    r"""Norm of the update over the norm of the weight, :math:`\|\Delta w\|_2 / \|w\|_2`.

    About 1e-3 for networks that learn well with Adam or SGD: far below, weights hardly move; far
    above, a step overwrites what was learned. A rule of thumb and not a law: weights that
    normalization makes scale-free, embeddings and the first steps lie elsewhere.

    Args:
        update: Moments of the updates, fields of shape ``(*)``.
        weight: Moments of the weights before the step, fields of shape ``(*)``.

    Returns:
        Ratios of shape ``(*)``; ``nan`` where the weight is zero, so that there is no ratio.

    Example:
        >>> dw, w = moments([torch.tensor([0.3, 0.4])]), moments([torch.tensor([30.0, 40.0])])
        >>> update_ratio(dw, w)
        tensor([0.0100], dtype=torch.float64)
    """
    return torch.where(weight.l2 > 0, update.l2 / weight.l2, torch.nan)


def update_table(
    before: Sequence[Tensor | None], after: Sequence[Tensor | None], *, quick: bool = False
) -> tuple[Tensor, Tensor]:
    """Moments of the update and of the weight of every parameter, as one table.

    Differences are taken in single precision at least, a few tensors at a time.

    Args:
        before: The weights of ``n`` parameters before the step, plain dense tensors; None for a
            parameter that is not looked at.
        after: The same after the step, of the same shapes.
        quick: Take `quick_moments`, and mark the rows that `moments` must do again.

    Returns:
        Double precision table ``(n, 14)``: the fields of `Moments` of the update, then those of the
        weight before; a row of None is neutral. And the doubtful rows as booleans ``(n,)``.
    """
    pairs = [
        (_real(w), _real(new))
        for w, new in zip(before, after, strict=True)
        if w is not None and new is not None
    ]
    tables, marks = [], []
    for some in _few_at_a_time(pairs):
        weights = [w for w, _ in some]
        updates = [_wide(new) - _wide(w) for w, new in some]
        if quick:
            update, vague = quick_moments(updates)
            zeros = [x.numel() - torch.count_nonzero(x) for x in updates]
            update = update._replace(zeros=gathered(zeros).to(update.sum))
            weight, doubtful = quick_moments(weights)
            doubtful = doubtful | vague
        else:
            update, weight = moments(updates), moments(weights)
            doubtful = torch.zeros_like(update.sum, dtype=torch.bool)
        tables.append(torch.stack([*update, *weight], dim=1))
        marks.append(doubtful)
    like = tables[0] if tables else torch.zeros(0, dtype=torch.float64)
    blank = torch.cat([*neutral(1, like=like)] * 2)
    calm = blank.new_zeros((), dtype=torch.bool)
    if not before:
        return blank.new_zeros(0, 2 * _FIELDS), calm.new_zeros(0)
    # stacked, not indexed: an index would have to travel to the device, which waits for it
    rows = iter([row for table in tables for row in _at(table, like).unbind()])
    flags = iter([flag for mark in marks for flag in _at(mark, like).unbind()])
    present = [w is not None for w in before]
    table = torch.stack([next(rows) if here else blank for here in present])
    return table, torch.stack([next(flags) if here else calm for here in present])


def gradient_sizes(gradients: Sequence[Tensor | None]) -> Tensor:
    """Largest magnitude in each gradient: 0 where nothing arrives, not finite where it is broken.

    Args:
        gradients: ``n`` dense or sparse real tensors; None, or an empty one, gives 0.

    Returns:
        Shape ``(n,)``, double precision (single where the device has no double).
    """
    found = [_largest(gradient) for gradient in gradients if gradient is not None]
    if not gradients:
        return torch.zeros(0, dtype=torch.float64)
    if not found:
        return torch.zeros(len(gradients), dtype=torch.float64)
    together = gathered(found)
    rows = iter(together.unbind())
    zero = together.new_zeros(())
    return torch.stack([zero if gradient is None else next(rows) for gradient in gradients])


def merge_updates(tables: Tensor) -> Tensor:
    """The table of the whole from those of the ranks that hold its shards.

    Args:
        tables: Shape ``(ranks, n, 15)``: `update_table`, then `gradient_sizes`.

    Returns:
        Shape ``(n, 15)``.
    """
    update, weight = _both(tables[0])
    for table in tables[1:]:
        more, own = _both(table)
        update, weight = merge(update, more), merge(weight, own)
    return torch.stack([*update, *weight, tables[:, :, -1].amax(0)], dim=1)


def update_summary(table: Tensor, index: Tensor, size: int) -> UpdateSummary:
    """Merge a table into components and the whole.

    Args:
        table: Shape ``(n, 15)``: `update_table`, then `gradient_sizes`.
        index: Component of each parameter, integers of shape ``(n,)``.
        size: Number of components.
    """
    update, weight = _both(table)
    everything = torch.zeros_like(index)
    return UpdateSummary(
        updates=update,
        weights=weight,
        part_updates=merge_by(update, index, size),
        part_weights=merge_by(weight, index, size),
        whole_update=merge_by(update, everything, 1),
        whole_weight=merge_by(weight, everything, 1),
        gradients=table[:, -1],
    )


def _both(table: Tensor) -> tuple[Moments, Moments]:
    columns = table.unbind(1)
    return Moments(*columns[:_FIELDS]), Moments(*columns[_FIELDS : 2 * _FIELDS])


def _real(x: Tensor) -> Tensor:
    x = x.detach()
    return torch.view_as_real(x) if x.is_complex() else x


def _wide(x: Tensor) -> Tensor:
    # the difference of two half precision numbers need not be one
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _at(x: Tensor, like: Tensor) -> Tensor:
    return x if x.device == like.device else x.to(like.device)


def _largest(gradient: Tensor) -> Tensor:
    x = gradient.detach()
    if x.layout != torch.strided:
        x = x.coalesce().values() if x.layout == torch.sparse_coo else x.values()
    x = _real(x)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    if x.numel() == 0:
        return torch.zeros((), dtype=wide, device=x.device)
    low, high = torch.aminmax(x)
    return torch.maximum(high, -low).to(wide)


def _few_at_a_time(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Groups whose differences together take no more than some tens of megabytes."""
    group: list[tuple[Tensor, Tensor]] = []
    total = 0
    for pair in pairs:
        size = pair[0].numel()
        if group and total + size > _AT_ONCE:
            yield group
            group, total = [], 0
        group.append(pair)
        total += size
    if group:
        yield group
