"""Gradient health: the numbers about gradients that are not moments."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diag.functional.moments import (
    Moments,
    gathered,
    local_shard,
    merge,
    merge_by,
    moments,
    neutral,
    quick_moments,
)

__all__ = [
    "GradientSummary",
    "clip_coefficient",
    "gradient_summary",
    "gradient_table",
    "magnitude_histogram",
    "merge_tables",
    "nan_counts",
    "norm_shares",
    "zero_counts",
]

_FIELDS = len(Moments._fields)


class GradientSummary(NamedTuple):
    """The gradients of a model, by parameter, by component and as a whole.

    Attributes:
        parameters: Moments of each parameter's gradient, shape ``(n,)``.
        parts: Moments of each component, shape ``(c,)``.
        whole: Moments of all gradients, shape ``(1,)``.
        norms: Largest, smallest and mean L2 norm of a single gradient, shape ``(3,)``; ``nan``
            where there is none.
        present: Whether each parameter has a gradient, 0 or 1, shape ``(n,)``.
        tensors: Number of gradients of each component, shape ``(c,)``.
        nans: Number of ``nan`` elements over all gradients, shape ``(1,)``.
    """

    parameters: Moments
    parts: Moments
    whole: Moments
    norms: Tensor
    present: Tensor
    tensors: Tensor
    nans: Tensor


def gradient_table(
    gradients: Sequence[Tensor | None], *, quick: bool = False
) -> tuple[Tensor, Tensor]:
    """All that one measurement reads from the gradients, as one table.

    Args:
        gradients: Gradients of ``n`` parameters; None where there is none.
        quick: Take `quick_moments`, and mark the rows that `moments` must do again.

    Returns:
        Double precision table ``(n, 9)`` (the fields of `Moments`, the number of ``nan`` elements,
        whether there is a gradient), and the doubtful rows as booleans ``(n,)``.
    """
    found = [gradient for gradient in gradients if gradient is not None]
    if quick:
        stats, doubtful = quick_moments(found)
        nans = torch.zeros_like(stats.count)
    else:
        stats, nans = moments(found), nan_counts(found)
        doubtful = torch.zeros_like(nans, dtype=torch.bool)
    table = torch.stack([*stats, nans, torch.ones_like(nans)], dim=1)
    if len(found) == len(gradients):
        return table, doubtful
    nothing = neutral(1, like=stats.count)
    blank = torch.cat([*nothing, *nothing[:2]])
    # stacked, not indexed: an index would have to travel to the device, which waits for it
    rows, marks = iter(table.unbind()), iter(doubtful.unbind())
    present = [gradient is not None for gradient in gradients]
    full = torch.stack([next(rows) if here else blank for here in present])
    calm = torch.zeros_like(blank[0], dtype=torch.bool)
    return full, torch.stack([next(marks) if here else calm for here in present])


def merge_tables(tables: Tensor) -> Tensor:
    """The table of the whole from the tables of the ranks that hold its shards.

    Args:
        tables: Shape ``(ranks, n, 9)``, see `gradient_table`.

    Returns:
        Shape ``(n, 9)``; a parameter has a gradient if any rank has a part of it.
    """
    total = Moments(*tables[0, :, :_FIELDS].unbind(1))
    for table in tables[1:]:
        total = merge(total, Moments(*table[:, :_FIELDS].unbind(1)))
    nans, present = tables[:, :, _FIELDS].sum(0), tables[:, :, _FIELDS + 1].amax(0)
    return torch.stack([*total, nans, present], dim=1)


def gradient_summary(table: Tensor, index: Tensor, size: int, scale: Tensor) -> GradientSummary:
    """Merge a table into components and the whole.

    Args:
        table: Shape ``(n, 9)``, see `gradient_table`.
        index: Component of each parameter, integers of shape ``(n,)``.
        size: Number of components.
        scale: What the gradients are still multiplied by, shape ``()``; 1 where they are true.

    Returns:
        The summary of the true gradients.
    """
    stats = Moments(*table[:, :_FIELDS].unbind(1)).divided(scale)
    nans, present = table[:, _FIELDS:].unbind(1)
    return GradientSummary(
        parameters=stats,
        parts=merge_by(stats, index, size),
        whole=merge_by(stats, torch.zeros_like(index), 1),
        norms=_norms(stats.l2, present),
        present=present,
        tensors=present.new_zeros(size).index_add(0, index, present),
        nans=nans.sum().view(1),
    )


def clip_coefficient(size: Tensor, limit: float) -> Tensor:
    r"""Factor by which clipping will shrink the gradient, :math:`\min(1, c / (s + 10^{-6}))`.

    The small constant is the one that `torch.nn.utils.clip_grad_norm_` adds.

    Args:
        size: What is limited, shape ``(*)``: the norm when clipping by norm, the largest magnitude
            when clipping by value (where the factor is that of the most shrunken element).
        limit: The clip value ``c``.

    Returns:
        Factors in [0, 1] of shape ``(*)``; ``nan`` where the size is not finite.

    Example:
        >>> clip_coefficient(torch.tensor([0.5, 4.0]), 1.0)
        tensor([1.0000, 0.2500])
    """
    factor = (limit / (size + 1e-6)).clamp(max=1)
    return torch.where(size.isfinite(), factor, torch.nan)


def _norms(l2: Tensor, present: Tensor) -> Tensor:
    # without a boolean mask, whose size would have to be read
    padded = torch.cat([l2, l2.new_zeros(1)])
    here = torch.cat([present > 0, present.new_zeros(1, dtype=torch.bool)])
    largest = torch.where(here, padded, -torch.inf).amax()
    smallest = torch.where(here, padded, torch.inf).amin()
    found = torch.stack([largest, smallest, torch.where(here, padded, 0).sum() / here.sum()])
    return torch.where(here.any(), found, torch.nan)


def norm_shares(sum_sq: Tensor) -> Tensor:
    r"""Share of each part in the squared norm of the whole, :math:`\|g_i\|^2 / \sum_j \|g_j\|^2`.

    Args:
        sum_sq: Sums of squares of the parts, shape ``(n,)``.

    Returns:
        Shares of shape ``(n,)`` that add up to 1; ``nan`` where every part is zero.

    Example:
        >>> norm_shares(torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    return sum_sq / sum_sq.sum()


def nan_counts(tensors: Sequence[Tensor]) -> Tensor:
    """Number of ``nan`` elements of each tensor: what is non-finite beyond them is infinite.

    Args:
        tensors: ``n`` real tensors; of a distributed one, this rank's part is counted.

    Returns:
        Counts in double precision (single where the device has no double), shape ``(n,)``.
    """
    return _together([_stored(local_shard(x.detach())).isnan().sum() for x in tensors])


def zero_counts(tensors: Sequence[Tensor]) -> Tensor:
    """Number of elements of each tensor that are zero, those that a sparse one does not store too.

    Args:
        tensors: ``n`` real tensors; of a distributed one, this rank's part is counted.

    Returns:
        Counts in double precision (single where the device has no double), shape ``(n,)``.
    """
    parts = [local_shard(tensor.detach()) for tensor in tensors]
    return _together([part.numel() - torch.count_nonzero(_stored(part)) for part in parts])


def magnitude_histogram(tensors: Sequence[Tensor], low: int = -12, high: int = 3) -> Tensor:
    r"""How many elements have a magnitude of each power of ten, over all tensors together.

    Bin ``k`` counts the finite non-zero elements with
    :math:`\lfloor \log_{10} |x| \rfloor = low + k`; the outermost bins take what lies beyond them.

    Args:
        tensors: Real tensors; of a distributed one, this rank's part is counted.
        low: Exponent of the first bin.
        high: Exponent of the last bin.

    Returns:
        Counts in double precision, shape ``(high - low + 1,)``.

    Raises:
        ValueError: If there is no bin.

    Example:
        >>> magnitude_histogram([torch.tensor([0.5, 0.02, 0.03, 0.0])], low=-2, high=0)
        tensor([2., 1., 0.], dtype=torch.float64)
    """
    if high < low:
        raise ValueError(f"`high` must be at least `low` ({low}), got {high}.")
    device = tensors[0].device if tensors else torch.device("cpu")
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(high - low + 1, dtype=wide, device=device)
    for tensor in tensors:
        x = _stored(local_shard(tensor.detach())).reshape(-1).abs()
        x = x if x.dtype == torch.float64 else x.float()
        inside = x.isfinite() & (x > 0)
        place = x.log10().floor().nan_to_num(posinf=high, neginf=low).clamp(low, high) - low
        total = total.scatter_add(0, place.long(), inside.to(wide))
    return total


def _together(counts: Sequence[Tensor]) -> Tensor:
    if not counts:
        return torch.zeros(0, dtype=torch.float64)
    together = gathered(counts)
    return together.float() if together.device.type == "mps" else together.double()


def _stored(x: Tensor) -> Tensor:
    if x.layout == torch.strided:
        return x
    return x.coalesce().values() if x.layout == torch.sparse_coo else x.values()
