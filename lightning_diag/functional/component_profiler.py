"""Component profile: what the parts of a model are made of, and whose a stretch of time is."""

import heapq
from collections.abc import Hashable, Iterable
from itertools import pairwise
from typing import NamedTuple, TypeVar

from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["Breakdown", "breakdown", "exclusive_seconds"]

_Owner = TypeVar("_Owner", bound=Hashable)


class Breakdown(NamedTuple):
    """What one part of a model is made of.

    Attributes:
        parameters: Elements of all parameters.
        trainable: Elements of the parameters that require gradients.
        frozen: Elements of the other parameters.
        buffers: Elements of all buffers.
        bytes: Memory of parameters and buffers, in bytes.
    """

    parameters: int
    trainable: int
    frozen: int
    buffers: int
    bytes: int


def breakdown(parameters: Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> Breakdown:
    """Count the elements and bytes of parameters and buffers, the same tensor only once.

    Of a tensor that is spread over devices the whole is counted; of one whose shape is not known
    yet (a lazy module's), nothing.

    Args:
        parameters: Parameters of one part; only shapes and types are looked at.
        buffers: Its buffers.

    Example:
        >>> import torch
        >>> breakdown([torch.zeros(2, 3)], [torch.zeros(4)])
        Breakdown(parameters=6, trainable=0, frozen=6, buffers=4, bytes=40)
    """
    seen: set[int] = set()
    own = [p for p in parameters if not is_lazy(p) and _is_new(p, seen)]
    kept = [b for b in buffers if not is_lazy(b) and _is_new(b, seen)]
    trainable = sum(p.numel() for p in own if p.requires_grad)
    count = sum(p.numel() for p in own)
    size = sum(x.numel() * x.element_size() for x in [*own, *kept])
    return Breakdown(count, trainable, count - trainable, sum(b.numel() for b in kept), size)


def _is_new(tensor: Tensor, seen: set[int]) -> bool:
    new = id(tensor) not in seen
    seen.add(id(tensor))
    return new


def exclusive_seconds(spans: Iterable[tuple[_Owner, float, float]]) -> dict[_Owner, float]:
    """Time of each owner, every moment given to one alone: to the span that began last.

    Where one part calls another, the inner one's time is so taken off the outer one's, and the
    times of all owners add up to the time that is covered at all.

    Args:
        spans: Owner, begin and end of each span, in seconds; a span that ends before it begins is
            empty. Of spans with the same begin the later one is the inner one.

    Returns:
        Seconds by owner, 0 for one whose spans are all covered.

    Example:
        >>> exclusive_seconds([("outer", 0.0, 10.0), ("inner", 2.0, 5.0)])
        {'outer': 7.0, 'inner': 3.0}
    """
    listed = list(spans)
    seconds: dict[_Owner, float] = dict.fromkeys((owner for owner, _, _ in listed), 0.0)
    # sorting is stable: of those that begin together the later comes later, and so on top
    waiting = sorted((span for span in listed if span[2] > span[1]), key=lambda span: span[1])
    edges = sorted({edge for _, begin, end in waiting for edge in (begin, end)})
    active: list[tuple[int, float, _Owner]] = []
    place = 0
    for begin, end in pairwise(edges):
        while place < len(waiting) and waiting[place][1] <= begin:
            owner, _, until = waiting[place]
            heapq.heappush(active, (-place, until, owner))
            place += 1
        while active and active[0][1] <= begin:
            heapq.heappop(active)
        if active:
            seconds[active[0][2]] += end - begin
    return seconds
