"""Fewer points for a chart, without losing a peak."""

import math
from collections.abc import Sequence

__all__ = ["thin"]


def thin(values: Sequence[float], limit: int) -> list[int]:
    """Indices of at most `limit` values that draw the same picture.

    The series is cut into buckets, and each keeps its lowest and its highest value, so that a
    single spike among a million points is still drawn. NaN is kept only where a bucket has
    nothing else.

    Args:
        values: The series, in order.
        limit: Number of points to stay within, 2 or more.

    Raises:
        ValueError: `limit` is below 2.

    Example:
        >>> thin([0, 1, 9, 1, 0, 1, 0, 0], 4)
        [0, 2, 4, 5]
    """
    if limit < 2:
        raise ValueError(f"`limit` must be at least 2, got {limit}.")
    if len(values) <= limit:
        return list(range(len(values)))
    buckets = limit // 2
    kept: list[int] = []
    for bucket in range(buckets):
        start, stop = bucket * len(values) // buckets, (bucket + 1) * len(values) // buckets
        finite = [index for index in range(start, stop) if not math.isnan(values[index])]
        finite = finite or [start]
        low, high = min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)
        kept += sorted({low, high})
    return kept
