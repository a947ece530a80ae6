"""One picture with its caption, and the split that it belongs to."""

import hashlib
from typing import NamedTuple

from torch import Tensor

__all__ = ["SPLITS", "Sample", "Source", "split_of"]

SPLITS = ("train", "val", "test")
_BUCKETS = 10


class Sample(NamedTuple):
    """A picture and what is said of it.

    Attributes:
        image: bytes 0 to 255, ``(channels, size, size)``.
        caption: as it was written.
        group: pictures that look alike share it, so that they share a split too.
    """

    image: Tensor
    caption: str
    group: str


class Source(NamedTuple):
    """All pictures of one origin.

    Attributes:
        name: of the origin.
        digest: SHA-256 of what identifies the data.
        samples: the pictures, in an order that does not change.
    """

    name: str
    digest: str
    samples: list[Sample]


def split_of(group: str) -> str:
    """The split of a group, by its SHA-1: about 80 % train, 10 % val, 10 % test.

    Args:
        group: any text.

    Returns:
        One of `SPLITS`.

    Example:
        >>> split_of("U+0041"), split_of("U+0042")
        ('train', 'train')
    """
    bucket = int(hashlib.sha1(group.encode()).hexdigest(), 16) % _BUCKETS
    return {8: "val", 9: "test"}.get(bucket, "train")
