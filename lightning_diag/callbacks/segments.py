"""Many small tensors read at once, and their numbers as rows hold them."""

from collections.abc import Mapping
from math import isnan

import torch
from torch import Tensor

__all__ = ["number", "read_segments"]


def read_segments(segments: Mapping[str, Tensor], like: Tensor) -> dict[str, list[float]]:
    """The elements of each tensor, by one reading for all of them.

    Args:
        segments: Tensors of any shape, by name.
        like: Gives the precision and the device.
    """
    flat = torch.cat([segment.reshape(-1).to(like) for segment in segments.values()]).tolist()
    found: dict[str, list[float]] = {}
    for name, segment in segments.items():
        found[name], flat = flat[: segment.numel()], flat[segment.numel() :]
    return found


def number(value: float) -> float | None:
    """None in place of what was not measured."""
    return None if isnan(value) else value
