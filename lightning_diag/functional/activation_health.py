"""Activation health: how much of an activation function's output is flat, and for which units."""

from collections.abc import Callable
from math import atanh, inf, log
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diag.functional.moments import Moments, gathered, merge

__all__ = [
    "COLUMNS",
    "FUNCTIONS",
    "Activity",
    "Bounds",
    "Flatness",
    "activation_bounds",
    "activity",
    "activity_table",
    "flatness",
    "idle_update",
    "merge_activity",
]

COLUMNS = (*Moments._fields, "flat", "saturated", "dead_now", "saturated_units", "dead", "units")

# inputs at or below which the slope stays under 2 %, on the side where the function switches off
_OFF = {
    "relu": 0.0,
    "relu6": 0.0,
    "gelu": -3.0,
    "silu": -6.0,
    "mish": -6.0,
    "hardswish": -3.0,
    "elu": -4.0,
    "selu": -4.5,
    "celu": -4.0,
    "softplus": -4.0,
}
_SATURATING = ("tanh", "sigmoid", "hardtanh", "hardsigmoid")
_NEVER_FLAT = ("leaky_relu", "prelu", "rrelu")
FUNCTIONS = (*_OFF, *_SATURATING, *_NEVER_FLAT)


_SMALL = 1 << 14


class Bounds(NamedTuple):
    """Where an activation function is flat, on the axis of its input.

    Attributes:
        off: At or below it the unit is switched off; ``-inf`` for a function that has no such side.
        low: At or below it the function is saturated.
        high: At or above it the function is saturated.
    """

    off: float = -inf
    low: float = -inf
    high: float = inf


class Flatness(NamedTuple):
    """Where the input of an activation function lies on its flat sides.

    Attributes:
        flat: Number of elements that are switched off, shape ``()``.
        saturated: Number of elements that are saturated, shape ``()``.
        dead_units: Units that are switched off for every sample and position, shape ``(units,)``.
        saturated_units: Units that are saturated for every one, shape ``(units,)``.
    """

    flat: Tensor
    saturated: Tensor
    dead_units: Tensor
    saturated_units: Tensor


class Activity(NamedTuple):
    """What one or several calls of an activation function did.

    Attributes:
        output: Fields of the `Moments` of the output, shape ``(7,)``; sums and extremes are not
            finite where an element is not, and zeros are not counted.
        flatness: Of the input.
    """

    output: Tensor
    flatness: Flatness

    @property
    def moments(self) -> Moments:
        """The moments of the output, fields of shape ``()``."""
        return Moments(*self.output.unbind())


def activation_bounds(
    function: str, saturation: float = 0.97, low: float = -1.0, high: float | None = None
) -> Bounds:
    r"""Inputs at which an activation function becomes flat.

    ReLU is off where its output is exactly zero. A smooth relative of it (GELU, SiLU, Mish, ELU,
    softplus and their like) is off in its negative tail, where the slope stays below 2 %, so that
    hardly any gradient comes back. Tanh is saturated where :math:`|y| \ge s`, the sigmoid where
    :math:`y \ge s` or :math:`y \le 1 - s`, the piecewise linear ones at their ends. Leaky ones are
    never flat.

    Args:
        function: One of `FUNCTIONS`.
        saturation: The output ``s``, between 0.5 and 1.
        low: Lower end of hardtanh.
        high: Upper end of hardtanh (by default 1) or relu6 (6).

    Returns:
        The bounds, in single numbers.

    Raises:
        ValueError: If the function is not known or `saturation` is out of range.

    Example:
        >>> activation_bounds("relu")
        Bounds(off=0.0, low=-inf, high=inf)
    """
    if not 0.5 < saturation < 1:
        raise ValueError(f"`saturation` must lie between 0.5 and 1, got {saturation}.")
    if function == "relu6":
        return Bounds(off=0.0, high=6.0 if high is None else high)
    if function in _OFF:
        return Bounds(off=_OFF[function])
    if function == "tanh":
        return Bounds(low=-atanh(saturation), high=atanh(saturation))
    if function == "sigmoid":
        edge = log(saturation / (1 - saturation))
        return Bounds(low=-edge, high=edge)
    if function == "hardtanh":
        return Bounds(low=low, high=1.0 if high is None else high)
    if function == "hardsigmoid":
        return Bounds(low=-3.0, high=3.0)
    if function in _NEVER_FLAT:
        return Bounds()
    raise ValueError(f"`function` must be one of {', '.join(FUNCTIONS)}, got {function}.")


def flatness(x: Tensor, bounds: Bounds, unit_dim: int) -> Flatness:
    """Where the input of an activation function lies on its flat sides.

    Args:
        x: The input, real, not empty; what is ``nan`` is not flat.
        bounds: Where the function is flat.
        unit_dim: The dimension that counts units (features or channels); all others count samples
            and positions. Without dimensions, or with a single one, there is one unit.

    Returns:
        Counts in double precision (single where the device has no double), and booleans by unit.
    """
    x = x.detach()
    units = x.shape[unit_dim] if x.dim() > 1 else 1
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    nothing = torch.zeros((), dtype=wide, device=x.device)
    none = torch.zeros(units, dtype=torch.bool, device=x.device)
    flat, dead = nothing, none
    if bounds.off > -inf:
        flat = torch.count_nonzero(x <= bounds.off).to(wide)
        # the largest input of a unit says it all; a nan is not below the bound
        dead = _over_others(x, unit_dim, torch.amax) <= bounds.off
    saturated, stuck = nothing, none
    if bounds.high < inf or bounds.low > -inf:
        beyond = x >= bounds.high
        if bounds.low > -inf:
            beyond |= x <= bounds.low
        saturated = torch.count_nonzero(beyond).to(wide)
        stuck = _over_others(beyond.to(torch.uint8), unit_dim, torch.amin).bool()
    return Flatness(flat, saturated, dead, stuck)


def activity(y: Tensor, flat: Flatness) -> Activity:
    """What one call did: moments of its output, beside what is known of its input.

    Sums run in the output's own precision, single at least. `quick_moments` does the same for many
    tensors at once; outputs come one by one, and must not be kept until all are there.

    Args:
        y: The output, real, not empty.
        flat: What `flatness` said of the input.
    """
    y = y.detach()
    if y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last):
        # in the order of memory, where it is no copy
        y = y.permute(0, 2, 3, 1)
    y = y.reshape(-1)
    wide = y if y.dtype in (torch.float32, torch.float64) else y.float()
    wide = wide.to(flat.flat) if wide.numel() <= _SMALL else wide
    low, high = torch.aminmax(wide)
    # what is not finite differs from itself
    bad = torch.count_nonzero(wide - wide)
    like = flat.flat
    numbers = [
        torch.full_like(like, y.numel()),
        *(x.to(like) for x in (wide.sum(), torch.dot(wide, wide), low, high)),
        torch.full_like(like, torch.nan),
        bad.to(like),
    ]
    return Activity(torch.stack(numbers), flat)


def merge_activity(first: Activity, second: Activity) -> Activity:
    """What two calls of the same function did together.

    Args:
        first: One call, or several.
        second: Others, of as many units.

    Returns:
        Moments and counts of both; a unit is dead or saturated only if it is so in both.
    """
    one, other = first.flatness, second.flatness
    return Activity(
        torch.stack(merge(first.moments, second.moments)),
        Flatness(
            one.flat + other.flat,
            one.saturated + other.saturated,
            one.dead_units & other.dead_units,
            one.saturated_units & other.saturated_units,
        ),
    )


def idle_update(idle: Tensor | None, dead_units: Tensor) -> Tensor:
    """For how many measurements in a row each unit has been dead.

    Args:
        idle: The numbers before, integers of shape ``(units,)``; None at the first measurement.
        dead_units: Which are dead in this one, booleans of shape ``(units,)``.

    Returns:
        Integers of shape ``(units,)``.

    Example:
        >>> idle_update(torch.tensor([4, 4]), torch.tensor([True, False]))
        tensor([5, 0])
    """
    if idle is None:
        return dead_units.to(torch.int32)
    return torch.where(dead_units, idle + 1, 0)


def activity_table(found: list[tuple[Activity, Tensor]], window: int) -> Tensor:
    """All that one measurement reads, as one table.

    Args:
        found: ``n`` activities, each with the number of measurements for which its units have been
            dead, see `idle_update`.
        window: For how many a unit must be dead to count as dead.

    Returns:
        Shape ``(n, 13)``, the columns of `COLUMNS`: the fields of `Moments`; elements that are
        flat, and saturated; units that are dead now, saturated, dead for `window` measurements, and
        all there are.
    """
    rows = []
    for one, idle in found:
        flat = one.flatness
        like = flat.flat
        units = [
            torch.count_nonzero(flat.dead_units),
            torch.count_nonzero(flat.saturated_units),
            torch.count_nonzero(idle >= window),
        ]
        total = torch.full((), idle.numel(), dtype=like.dtype, device=like.device)
        counts = [flat.flat, flat.saturated, *(x.to(like) for x in units), total]
        rows.append(torch.cat([one.output, torch.stack(counts)]))
    return gathered(rows) if rows else torch.zeros(0, len(COLUMNS), dtype=torch.float64)


def _over_others(x: Tensor, unit_dim: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce every dimension but that of the units, innermost first, which is the quicker way."""
    if x.dim() <= 1:
        return reduce(x.reshape(-1), (0,), keepdim=True)
    unit_dim %= x.dim()
    inner = tuple(range(unit_dim + 1, x.dim()))
    if inner:
        x = reduce(x, inner)
    outer = tuple(range(unit_dim))
    return reduce(x, outer) if outer else x
