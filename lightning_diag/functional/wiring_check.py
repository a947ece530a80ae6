"""Wiring check: the numbers that tell data, targets, gradients and replicas that do not fit."""

from collections.abc import Sequence
from itertools import zip_longest
from math import prod

import torch
from torch import Tensor

from lightning_diag.functional.moments import gathered, moments

__all__ = [
    "DATA_FACTS",
    "PREDICTION_FACTS",
    "broadcast_grows",
    "data_facts",
    "magnitudes",
    "prediction_facts",
    "probability_facts",
    "replica_hash",
    "target_facts",
]

DATA_FACTS = ("count", "nonfinite", "mean", "std", "rms", "abs_max")
PREDICTION_FACTS = ("rows", "spread", "size", "top_share", "target_spread", "target_top_share")

_ROWS_LIMIT = 1 << 20
_BLOCK = 1 << 22
_COMPARED = 256
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x9E3779B97F4A7C1  # odd, so that no information is lost when it multiplies
_MASK = (1 << 48) - 1  # exact in double precision


def data_facts(tensors: Sequence[Tensor]) -> Tensor:
    """Size and scale of each tensor, over its finite elements.

    Args:
        tensors: ``n`` tensors of any shape and type; a complex one counts as pairs.

    Returns:
        Double precision, shape ``(n, 6)``, the columns of `DATA_FACTS`: ``nan`` where there is no
        finite element, as in an empty tensor.

    Example:
        >>> data_facts([torch.tensor([3.0, -4.0, torch.inf])])[0, [0, 1, 5]]
        tensor([3., 1., 4.], dtype=torch.float64)
    """
    if not tensors:
        return torch.zeros(0, len(DATA_FACTS), dtype=torch.float64)
    found = moments([torch.view_as_real(x) if x.is_complex() else x for x in tensors])
    largest = torch.where(found.finite > 0, found.abs_max, torch.nan)
    columns = (found.count, found.nonfinite, found.mean, found.std, found.rms, largest)
    return torch.stack(columns, dim=1)


def probability_facts(scores: Tensor, dim: int = 1) -> Tensor:
    r"""Whether scores are probabilities, or logarithms of probabilities, along a dimension.

    Args:
        scores: Shape ``(batch, ..)``; of a large one the first samples are looked at.
        dim: Dimension of the classes.

    Returns:
        Smallest and largest score, the largest :math:`|\sum_c x_c - 1|` and the largest
        :math:`|\log \sum_c e^{x_c}|`, shape ``(4,)``; ``nan`` for an empty tensor.

    Example:
        >>> probability_facts(torch.tensor([[0.25, 0.75]]))[:3]
        tensor([0.2500, 0.7500, 0.0000], dtype=torch.float64)
    """
    x = scores.detach()
    if x.numel() == 0:
        return torch.full((4,), torch.nan, dtype=_wide(x), device=x.device)
    if x.dim() and dim % x.dim() != 0:
        x = x[: max(1, _ROWS_LIMIT // max(1, x[0].numel()))]
    x = x if x.dtype == torch.float64 else x.float()
    off = (x.sum(dim) - 1).abs().amax()
    log_off = torch.logsumexp(x, dim).abs().amax()
    return torch.stack([x.amin(), x.amax(), off, log_off]).to(_wide(x))


def target_facts(target: Tensor, ignored: int | None = None) -> Tensor:
    """How many targets count, and the smallest and largest of them.

    Args:
        target: Any shape, integer or floating.
        ignored: Value of the targets that do not count.

    Returns:
        Shape ``(3,)``; the extremes are ``inf`` and ``-inf`` where no target counts.

    Example:
        >>> target_facts(torch.tensor([3, -100, 1]), ignored=-100)
        tensor([2., 1., 3.], dtype=torch.float64)
    """
    t = target.detach().to(_wide(target))
    # one more that does not count, so that an empty tensor has extremes too
    t = torch.cat([t.reshape(-1), t.new_full((1,), torch.nan)])
    out = t.isnan() if ignored is None else t.isnan() | (t == ignored)
    low, high = t.masked_fill(out, torch.inf).amin(), t.masked_fill(out, -torch.inf).amax()
    return torch.stack([(~out).sum(dtype=t.dtype), low, high])


def prediction_facts(
    scores: Tensor,
    target: Tensor,
    *,
    dim: int | None = None,
    threshold: float | None = None,
    ignored: int | None = None,
) -> Tensor:
    r"""Whether predictions differ from sample to sample, and whether their targets do.

    The spread is the standard deviation (divisor n) of each column over the rows, averaged over the
    columns: zero where every sample gets the same answer, however large it is.

    Args:
        scores: Shape ``(batch, ..)``; of a large one the first samples are looked at.
        target: Numbers of classes, or as many numbers as there are scores.
        dim: Dimension of the classes, whose other dimensions all count rows; None where a row is
            a sample.
        threshold: Score from which on a single column says yes; None where it says no class.
        ignored: Number of the class that does not count.

    Returns:
        The columns of `PREDICTION_FACTS`: rows; spread and largest magnitude of the scores; share
        of the most frequent class among the predictions, over at most 256 rows evenly spaced; the
        same spread of the targets, and the same share. ``nan`` where there is no such number.

    Example:
        >>> prediction_facts(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([0, 1]), dim=1)
        tensor([2.0000, 0.5000, 3.0000, 0.5000,    nan, 0.5000], dtype=torch.float64)
    """
    x, t = scores.detach(), target.detach()
    wide = _wide(x)
    nothing = torch.full((), torch.nan, dtype=wide, device=x.device)
    if x.numel() == 0 or x.dim() == 0:
        return torch.stack([nothing] * len(PREDICTION_FACTS))
    x = x[: max(1, _ROWS_LIMIT // max(1, x[0].numel()))]
    t = t[: len(x)] if t.dim() else t
    x = x if x.dtype == torch.float64 else x.float()
    if dim is None or x.dim() == 1:
        table = x.reshape(1, -1) if dim is not None else x.reshape(len(x), -1)
    else:
        table = x.movedim(dim, -1).flatten(0, -2)
    rows = torch.full_like(nothing, len(table))
    found = [rows, _spread(table), table.abs().amax().to(wide)]
    share = target_spread = target_share = nothing
    classes = dim is not None and not t.is_floating_point()
    if classes and t.numel() == len(table):
        target_share = _top_share(t.reshape(-1), ignored)
    elif t.is_floating_point() and t.shape == x.shape:
        target_spread = _spread(t.to(x.dtype).reshape(len(t), -1))
    if dim is not None and table.shape[1] > 1:
        share = _top_share(table.argmax(1), None)
    elif table.shape[1] == 1 and threshold is not None:
        share = _top_share((table[:, 0] > threshold).long(), None)
        if t.is_floating_point() and t.numel() == len(table):
            target_share = _top_share((t.reshape(-1) > 0.5).long(), None)
    return torch.stack([*found, share, target_spread, target_share]).to(wide)


def magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of each tensor: zero where it holds nothing but zeros.

    Args:
        tensors: ``n`` dense or sparse tensors.

    Returns:
        Double precision, shape ``(n,)``; ``nan`` where there is no element, or one is ``nan``.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    return gathered([_magnitude(x.detach()) for x in tensors])


def replica_hash(tensors: Sequence[Tensor]) -> Tensor:
    r"""A number for each tensor that copies share, and others do not.

    :math:`\sum_i b_i (2 i + 1) k \bmod 2^{64}`, folded to 48 bits, with :math:`b_i` the bits of
    element ``i`` and an odd constant ``k``. Integers add up exactly in any order, so every device
    comes to the same number; any change of a single element of up to 32 bits changes it.

    Args:
        tensors: ``n`` dense tensors.

    Returns:
        Whole numbers below :math:`2^{48}` in double precision, shape ``(n,)``.

    Example:
        >>> a = torch.arange(4.0)
        >>> one, same, other = replica_hash([a, a.clone(), a.flip(0)]).tolist()
        >>> one == same, one == other
        (True, False)
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    return gathered([_hash(x.detach()) for x in tensors])


def broadcast_grows(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two shapes broadcast to one with more elements than either has.

    Where that happens between predictions and targets, each is compared with the others' too.

    Example:
        >>> broadcast_grows((8, 1), (8,)), broadcast_grows((8, 3), (3,))
        (True, False)
    """
    both = list(zip_longest(reversed(first), reversed(second), fillvalue=1))
    if any(1 not in pair and pair[0] != pair[1] for pair in both):
        return False
    together = prod(0 if 0 in pair else max(pair) for pair in both)
    return together > max(prod(first), prod(second))


def _magnitude(x: Tensor) -> Tensor:
    if x.layout != torch.strided:
        x = x.coalesce().values() if x.layout == torch.sparse_coo else x.values()
    if x.numel() == 0:
        return torch.full((), torch.nan, dtype=_wide(x), device=x.device)
    largest: Tensor = torch.linalg.vector_norm(x, ord=torch.inf)
    return largest.to(_wide(x))


def _hash(x: Tensor) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    bits = x.contiguous().view(-1).view(_BITS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, bits.numel(), _BLOCK):
        block = bits[start : start + _BLOCK].to(torch.int64)
        place = torch.arange(start, start + block.numel(), device=x.device)
        total = total + (block * (2 * place + 1) * _ODD).sum()
    return ((total ^ (total >> 32)) & _MASK).to(_wide(x))


def _spread(table: Tensor) -> Tensor:
    return table.std(0, correction=0).mean().to(_wide(table))


def _top_share(classes: Tensor, ignored: int | None) -> Tensor:
    # each with each, since counting would wait for the device
    few = classes[:: max(1, -(-len(classes) // _COMPARED))]
    valid = torch.ones_like(few, dtype=torch.bool) if ignored is None else few != ignored
    same = (few[:, None] == few) & valid & valid[:, None]
    wide = _wide(few)
    return same.sum(1).amax().to(wide) / valid.sum().to(wide)


def _wide(x: Tensor) -> torch.dtype:
    # Apple's accelerator has no double precision
    return torch.float32 if x.device.type == "mps" else torch.float64
