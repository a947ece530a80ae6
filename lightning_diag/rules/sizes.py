"""How large a component's gradient is, in two measures that hold each other in check.

The norm grows with the number of elements and the rms shrinks with those that got nothing: a
temperature of one element has a huge rms, an embedding of a million a tiny one, and both are
healthy. A component counts as smaller than another only if both measures say so.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from lightning_diag.rules.traces import Trace

__all__ = ["Size", "is_tiny", "largest", "ratio", "sizes", "sizes_by_step", "typical_others"]


class Size(NamedTuple):
    """Norm of a gradient, and its root mean square over the elements that are not zero."""

    l2: float
    rms: float


def sizes(trace: Trace) -> list[Size]:
    """The size at every row; NaN where nothing was measured or where an element is not finite."""
    known = [share for share in trace.numbers("zeros") if share < 1.0]
    filled = 1.0 - median(known) if known else 1.0
    found = []
    columns = (trace.numbers(name) for name in ("l2", "count", "nonfinite"))
    for l2, count, nonfinite in zip(*columns, strict=True):
        if nonfinite > 0:
            l2 = math.nan
        found.append(Size(l2, l2 / math.sqrt(count * filled) if count > 0 else math.nan))
    return found


def is_tiny(trace: Trace, least: float) -> bool:
    """Whether a component has fewer than `least` elements, so that its share says little."""
    known = [count for count in trace.numbers("count") if count > 0]
    return bool(known) and median(known) < least


def sizes_by_step(traces: Iterable[Trace]) -> dict[int, dict[str, Size]]:
    """``{step: {component: size}}`` of every component that got a gradient there."""
    table: dict[int, dict[str, Size]] = {}
    for trace in traces:
        for step, size in zip(trace.steps, sizes(trace), strict=True):
            if size.l2 > 0 and size.rms > 0:
                table.setdefault(step, {})[str(trace.component)] = size
    return table


def ratio(large: Size, small: Size) -> float:
    """How many times larger the first is, by the measure that says less; 1 at least."""
    return max(1.0, min(large.l2 / small.l2, large.rms / small.rms))


def largest(sizes: Iterable[Size]) -> list[Size]:
    """The sizes that no other exceeds in both measures, of which there are seldom many.

    The largest `ratio` to a size is that of one of these, so not all pairs need be compared.
    """
    front: list[Size] = []
    for size in sorted(set(sizes), reverse=True):
        if not front or size.rms > front[-1].rms:
            front.append(size)
    return front


def typical_others(sizes: Mapping[str, Size]) -> dict[str, Size]:
    """For each component the median size of the others.

    Example:
        >>> typical_others({"a": Size(1, 1), "b": Size(2, 2), "c": Size(4, 4)})["a"]
        Size(l2=3.0, rms=3.0)
    """
    norms = sorted(one.l2 for one in sizes.values())
    means = sorted(one.rms for one in sizes.values())
    return {
        name: Size(_median_without(norms, one.l2), _median_without(means, one.rms))
        for name, one in sizes.items()
    }


def _median_without(ordered: Sequence[float], value: float) -> float:
    gap, left = bisect_left(ordered, value), len(ordered) - 1
    middle = [index + (index >= gap) for index in ((left - 1) // 2, left // 2)]
    return (ordered[middle[0]] + ordered[middle[1]]) / 2
