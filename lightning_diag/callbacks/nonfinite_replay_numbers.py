"""What a tensor of the replayed step holds, in words and numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_diag.callbacks.wiring_tensors import named_tensors

__all__ = ["Range", "all_tensors", "described", "is_finite", "range_of", "together"]

_SHOWN = 6


@dataclass(frozen=True)
class Range:
    """The values of one tensor.

    Attributes:
        dtype: Its type, without ``torch.``.
        shape: Its shape.
        low: Smallest finite value; None where there is none.
        high: Largest finite value; None where there is none.
        zeros: How many are zero.
        nan: How many are NaN.
        inf: How many are infinite.
    """

    dtype: str
    shape: tuple[int, ...]
    low: float | None
    high: float | None
    zeros: int
    nan: int
    inf: int

    def __str__(self) -> str:
        kind = f"{self.dtype}{list(self.shape)}"
        if self.low is None or self.high is None:
            parts = ["no finite value"]
        elif self.low == self.high:
            parts = [f"all {self.low:.4g}"]
        else:
            parts = [f"{self.low:.4g} to {self.high:.4g}"]
        counts = {"zero": self.zeros, "NaN": self.nan, "infinite": self.inf}
        parts += [f"{count} {word}" for word, count in counts.items() if count]
        return f"{kind} {', '.join(parts)}"


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one without fractions does not."""
    values = _values(tensor)
    return values is None or bool(torch.isfinite(values).all())


def range_of(tensor: Tensor) -> Range | None:
    """What a tensor holds; None where that cannot be said, as of integers or of nothing."""
    values = _values(tensor)
    if values is None or values.numel() == 0:
        return None
    values = values.abs() if values.is_complex() else values
    finite, nan = torch.isfinite(values), torch.isnan(values)
    infinity = torch.full((), torch.inf, dtype=values.dtype, device=values.device)
    numbers = torch.stack(
        [
            torch.where(finite, values, infinity).amin().double(),
            torch.where(finite, values, -infinity).amax().double(),
            (values == 0).sum().double(),
            nan.sum().double(),
            (~finite & ~nan).sum().double(),
        ]
    ).tolist()
    low, high, *counts = [x + 0.0 for x in numbers]  # no minus zero
    some = low <= high
    return Range(
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        low if some else None,
        high if some else None,
        *map(int, counts),
    )


def together(ranges: list[Range]) -> dict[str, float | None]:
    """Smallest and largest finite value, and counts, over several tensors."""
    lows = [one.low for one in ranges if one.low is not None]
    highs = [one.high for one in ranges if one.high is not None]
    return {
        "min": min(lows, default=None),
        "max": max(highs, default=None),
        **{key: sum(getattr(one, key) for one in ranges) for key in ("zeros", "nan", "inf")},
    }


def described(batch: object) -> str:
    """The tensors of a batch by name, with their shapes and ranges."""
    texts = []
    for name, tensor in named_tensors(batch):
        found = range_of(tensor) or _of_integers(tensor)
        texts.append(f"{name}: {found}")
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more


def all_tensors(value: object) -> Iterator[Tensor]:
    """Every tensor among the arguments or results of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from all_tensors(one)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from all_tensors(one)


def _of_integers(tensor: Any) -> str:
    kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.is_floating_point():
        return kind
    if tensor.dtype == torch.bool:
        return f"{kind} {int(tensor.sum())} true"
    return f"{kind} {int(tensor.min())} to {int(tensor.max())}"


def _values(tensor: Tensor) -> Tensor | None:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return None
    if tensor.is_quantized or tensor.is_nested:
        return None
    if tensor.layout == torch.sparse_coo:
        return tensor.detach().coalesce().values()
    return tensor.detach() if tensor.layout == torch.strided else None
