"""Mergeable moments: the one summary that gradients, updates, activations and latents share."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

__all__ = [
    "Moments",
    "completed",
    "gathered",
    "local_shard",
    "merge",
    "merge_by",
    "moments",
    "neutral",
    "quick_moments",
]

# a block and its temporaries fit into a core's cache; on a device, launches are dearer than memory
_CPU_BLOCK = 1 << 16
_DEVICE_BLOCK = 1 << 24
_SMALL = 1 << 14


class Moments(NamedTuple):
    """Count, sums and extremes of the elements of one or many tensors.

    Every field has the same shape ``(*)``, one entry a tensor (or component, rank, step), in double
    precision. `merge` is associative and commutative, and `neutral` is its neutral element.

    Attributes:
        count: Number of elements, the non-finite ones among them.
        sum: Sum of the finite elements.
        sum_sq: Sum of their squares.
        min: Smallest finite element; ``inf`` where there is none.
        max: Largest finite element; ``-inf`` where there is none.
        zeros: Number of elements equal to zero; ``nan`` where it was not measured.
        nonfinite: Number of ``nan`` and infinite elements.
    """

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which nobody needs here
    sum: Tensor
    sum_sq: Tensor
    min: Tensor
    max: Tensor
    zeros: Tensor
    nonfinite: Tensor

    @property
    def finite(self) -> Tensor:
        """Number of finite elements."""
        return self.count - self.nonfinite

    @property
    def mean(self) -> Tensor:
        """Mean of the finite elements; ``nan`` where there is none."""
        return self.sum / self.finite

    @property
    def std(self) -> Tensor:
        """Standard deviation of the finite elements around their mean (divisor n)."""
        return (self.sum_sq / self.finite - self.mean.square()).clamp(min=0).sqrt()

    @property
    def rms(self) -> Tensor:
        """Root of the mean square of the finite elements; ``nan`` where there is none."""
        return (self.sum_sq / self.finite).sqrt()

    @property
    def l2(self) -> Tensor:
        """Euclidean norm of the finite elements; 0 where there is none."""
        return self.sum_sq.sqrt()

    @property
    def abs_max(self) -> Tensor:
        """Largest magnitude among the finite elements; ``-inf`` where there is none."""
        return torch.maximum(self.max, -self.min)

    def divided(self, divisor: Tensor | float) -> "Moments":
        """The moments of the elements divided by a positive number."""
        return self._replace(
            sum=self.sum / divisor,
            sum_sq=self.sum_sq / divisor / divisor,
            min=self.min / divisor,
            max=self.max / divisor,
        )


def moments(tensors: Sequence[Tensor]) -> Moments:
    r"""Moments of each tensor, exact in every field whatever the tensor holds.

    Sums run in double precision over the finite elements, in blocks, so that temporaries
    stay small. Nothing is read from the device.

    Args:
        tensors: ``n`` real tensors of any shape and floating type: dense, sparse (absent elements
            count as zeros) or distributed (this rank's share, see `local_shard`). An empty tensor
            gives the neutral element.

    Returns:
        Fields of shape ``(n,)`` on the device of the first tensor.

    Raises:
        TypeError: If a tensor is complex.

    Example:
        >>> m = moments([torch.tensor([3.0, 4.0, float("nan"), 0.0])])
        >>> m.l2, m.nonfinite, m.zeros
        (tensor([5.], dtype=torch.float64), tensor([1.], ...), tensor([1.], ...))
    """
    if not tensors:
        return neutral(0)
    return Moments(*gathered([_exact(*_values(tensor)) for tensor in tensors]).unbind(1))


def quick_moments(tensors: Sequence[Tensor]) -> tuple[Moments, Tensor]:
    r"""Moments of each tensor in few passes over memory, and where they must not be believed.

    Three reductions a tensor (sum, dot product with itself, smallest and largest) in the tensor's
    own precision, single at least. They do not look for non-finite elements or for squares that
    leave the range of the type; both show in the results, and such tensors are marked as doubtful,
    for `moments` to do again. Zeros are not counted (``nan``). In single precision the standard
    deviation of many elements that are nearly equal is exact to about 5e-4 of their size.

    Args:
        tensors: As for `moments`.

    Returns:
        Fields of shape ``(n,)``, and a boolean tensor ``(n,)``, true where they are doubtful.

    Raises:
        TypeError: If a tensor is complex.
    """
    if not tensors:
        return neutral(0), torch.zeros(0, dtype=torch.bool)
    singles: list[tuple[int, tuple[Tensor, ...]]] = []
    doubles: list[tuple[int, tuple[Tensor, ...]]] = []
    counts = []
    for place, tensor in enumerate(tensors):
        x, absent = _values(tensor)
        counts.append(float(x.numel() + absent))
        if absent or x.numel() == 0 or x.dtype not in (torch.float32, torch.float64):
            total, square, low, high, _, nonfinite = _exact(x, absent)[1:].unbind()
            total = torch.where(nonfinite > 0, torch.nan, total)
            doubles.append((place, (total, square, low, high)))
            continue
        x = _flat(x)
        wide = x.double() if x.numel() <= _SMALL and x.device.type != "mps" else x
        low, high = torch.aminmax(wide)
        target = singles if wide.dtype == torch.float32 else doubles
        target.append((place, (wide.sum(), torch.dot(wide, wide), low, high)))
    groups = [group for group in (singles, doubles) if group]
    rows = [torch.stack([x for _, row in group for x in row]).view(-1, 4) for group in groups]
    order = [place for group in groups for place, _ in group]
    wide_type = _wide(rows[0])
    stacked = torch.cat([row.to(wide_type) for row in rows])
    back = torch.tensor(order, device=stacked.device).argsort()
    total, square, low, high = stacked[back].unbind(1)
    count = torch.tensor(counts, dtype=wide_type, device=stacked.device)
    nan = torch.full_like(count, torch.nan)
    found = Moments(count, total, square, low, high, nan, torch.zeros_like(count))
    return found, _doubtful(found)


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of two disjoint sets of elements taken together.

    Args:
        first: Fields of shape ``(*)``.
        second: Fields of a shape that broadcasts with it.

    Returns:
        Fields of the common shape.
    """
    return Moments(
        first.count + second.count,
        first.sum + second.sum,
        first.sum_sq + second.sum_sq,
        torch.minimum(first.min, second.min),
        torch.maximum(first.max, second.max),
        first.zeros + second.zeros,
        first.nonfinite + second.nonfinite,
    )


def merge_by(parts: Moments, index: Tensor, size: int) -> Moments:
    """Merge the entries that carry the same index: parameters into components, ranks into one.

    Args:
        parts: Fields of shape ``(n,)``.
        index: Integer tensor ``(n,)`` with values from 0 to ``size - 1``.
        size: Number of groups.

    Returns:
        Fields of shape ``(size,)``; a group without entries is neutral.
    """
    empty = neutral(size, like=parts.sum)

    def add(start: Tensor, values: Tensor) -> Tensor:
        return start.index_add(0, index, values)

    return Moments(
        add(empty.count, parts.count),
        add(empty.sum, parts.sum),
        add(empty.sum_sq, parts.sum_sq),
        empty.min.scatter_reduce(0, index, parts.min, "amin"),
        empty.max.scatter_reduce(0, index, parts.max, "amax"),
        add(empty.zeros, parts.zeros),
        add(empty.nonfinite, parts.nonfinite),
    )


def neutral(size: int, *, like: Tensor | None = None) -> Moments:
    """The moments of no elements at all.

    Args:
        size: Number of entries.
        like: Tensor that gives type and device; double precision on the CPU without it.

    Returns:
        Fields of shape ``(size,)``: zeros, and ``inf`` and ``-inf`` as the extremes.
    """
    zero = torch.zeros(size, dtype=torch.float64) if like is None else like.new_zeros(size)
    return Moments(zero, zero, zero, zero + torch.inf, zero - torch.inf, zero, zero)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's own part of a tensor, so that the parts of all ranks make the whole once.

    Args:
        tensor: A plain tensor, returned as it is, or a `DTensor`. A pending sum (partial placement)
            is completed first, by a collective that every rank must enter.

    Returns:
        The local part; empty where another rank counts the same elements: where the mesh repeats a
        shard, and on a mesh that is itself a copy of the one that rank 0 belongs to.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    tensor = completed(tensor)
    place = tensor.device_mesh.get_coordinate()
    repeated = not _is_first(tensor.device_mesh) or any(
        placement.is_replicate() and coordinate > 0
        for placement, coordinate in zip(tensor.placements, place or (), strict=True)
    )
    part = tensor.to_local()
    return part.new_empty(0) if repeated else part


def completed(tensor: DTensor) -> DTensor:
    """The tensor without a pending sum over ranks (partial placement).

    Args:
        tensor: Any distributed tensor.

    Returns:
        The tensor itself, or its completion, made by a collective that every rank must enter.
    """
    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    whole = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=whole)


@functools.lru_cache(maxsize=64)
def _is_first(mesh: DeviceMesh) -> bool:
    # a mesh is a table of rank numbers on the host; each is asked once, and no data are read
    return mesh.get_coordinate() is not None and 0 in mesh.mesh.flatten().tolist()


def gathered(results: Sequence[Tensor]) -> Tensor:
    """Stack small results of tensors that may lie on several devices.

    Args:
        results: At least one tensor, all of one shape ``(*)``.

    Returns:
        Shape ``(n, *)``, on the device of the first.
    """
    home = results[0].device
    return torch.stack([x if x.device == home else x.to(home) for x in results])


def _values(tensor: Tensor) -> tuple[Tensor, int]:
    """The stored elements of a tensor, and the number of zeros that it does not store."""
    x = local_shard(tensor.detach())
    if x.is_complex():
        raise TypeError(f"`tensors` must be real, got {x.dtype}.")
    if x.layout == torch.strided:
        return x, 0
    stored = x.coalesce().values() if x.layout == torch.sparse_coo else x.values()
    return stored, x.numel() - stored.numel()


def _exact(x: Tensor, absent: int) -> Tensor:
    """The seven fields of one tensor, shape ``(7,)``."""
    found = [_exact_block(block) for block in _blocks(_flat(x))]
    if len(found) == 1 and not absent:
        return found[0]
    blocks = torch.stack(found)
    count, total, square, low, high, zeros, nonfinite = blocks.unbind(1)
    low, high = low.amin(), high.amax()
    if absent:
        low, high = low.clamp(max=0), high.clamp(min=0)
    sums = torch.stack([total.sum(), square.sum(), low, high])
    counts = (count.sum() + absent, zeros.sum() + absent, nonfinite.sum())
    return torch.cat([counts[0].view(1), sums, torch.stack(counts[1:])])


def _exact_block(x: Tensor) -> Tensor:
    x = x.to(_wide(x))
    if x.numel() == 0:
        return torch.stack([field.squeeze(0) for field in neutral(1, like=x)])
    # few launches: on a device they, and not the memory, are what small tensors cost
    bad = x - x != 0
    kept = x.masked_fill(bad, 0)
    return torch.stack(
        [
            x.new_full((), x.numel()),
            kept.sum(),
            torch.dot(kept, kept),
            x.masked_fill(bad, torch.inf).amin(),
            x.masked_fill(bad, -torch.inf).amax(),
            (x == 0).sum(dtype=x.dtype),
            bad.sum(dtype=x.dtype),
        ]
    )


def _blocks(x: Tensor) -> Iterator[Tensor]:
    size = _CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK
    yield from torch.split(x, size) if x.numel() else (x,)


def _flat(x: Tensor) -> Tensor:
    """One dimension, without a copy wherever the elements lie densely, in whatever order."""
    if x.is_contiguous():
        return x.view(-1)
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        return x.as_strided((x.numel(),), (1,))
    return x.reshape(-1)


def _wide(x: Tensor) -> torch.dtype:
    # Apple's accelerator has no double precision
    return torch.float32 if x.device.type == "mps" else torch.float64


def _doubtful(found: Moments) -> Tensor:
    """Where a sum is not finite, or squares may have left the range of single precision."""
    mean_square = found.sum_sq / found.count.clamp(min=1)
    vanished = (mean_square < 1e-30) & (found.abs_max > 0)
    return ~(found.sum.isfinite() & found.sum_sq.isfinite()) | vanished
