"""Windows of a series: what was seen, and what came next."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.drivers.series import Array, Series

__all__ = ["Scale", "Window", "Windows", "bounds", "scale_of"]


class Window(NamedTuple):
    """One window, or a batch of them, in units of the training part's deviations.

    Attributes:
        drivers: Shape ``(context, drivers, features)``.
        history: The targets so far, ``(context, targets)``.
        future: The targets to come, ``(horizon, targets)``.
    """

    drivers: Tensor
    history: Tensor
    future: Tensor


class Scale(NamedTuple):
    """Means and deviations by column, of drivers and of targets."""

    driver_mean: Array
    driver_std: Array
    target_mean: Array
    target_std: Array


class Windows(Dataset[Window]):
    """All windows that lie wholly within one part of a series.

    Args:
        series: The series.
        begin: First time of the part.
        end: Time after the last.
        scale: Means and deviations of the training part.
        context: Times seen.
        horizon: Times to come.
    """

    def __init__(
        self, series: Series, begin: int, end: int, scale: Scale, context: int, horizon: int
    ) -> None:
        drivers = (series.drivers[begin:end] - scale.driver_mean) / scale.driver_std
        targets = (series.targets[begin:end] - scale.target_mean) / scale.target_std
        self.begin = begin
        self.context = context
        self.horizon = horizon
        self.drivers = torch.from_numpy(drivers).float()
        self.targets = torch.from_numpy(targets).float()

    def __len__(self) -> int:
        return max(0, len(self.targets) - self.context - self.horizon + 1)

    def __getitem__(self, index: int) -> Window:
        now = index + self.context
        return Window(
            self.drivers[index:now],
            self.targets[index:now],
            self.targets[now : now + self.horizon],
        )

    def together(self) -> Window:
        """All windows as one batch."""
        length = self.context + self.horizon
        drivers = self.drivers.unfold(0, length, 1).movedim(-1, 1)[:, : self.context]
        targets = self.targets.unfold(0, length, 1).movedim(-1, 1)
        return Window(drivers, targets[:, : self.context], targets[:, self.context :])


def bounds(times: int, shares: tuple[float, float, float]) -> dict[str, tuple[int, int]]:
    """First time of each part, and the time after its last.

    Example:
        >>> bounds(6000, (0.7, 0.15, 0.15))
        {'train': (0, 4200), 'val': (4200, 5100), 'test': (5100, 6000)}
    """
    first = round(times * shares[0])
    second = round(times * (shares[0] + shares[1]))
    return {"train": (0, first), "val": (first, second), "test": (second, times)}


def scale_of(series: Series, end: int) -> Scale:
    """Means and deviations over the times before `end`; a constant column has deviation 1."""
    values = []
    for x in (series.drivers[:end], series.targets[:end]):
        std = x.std(axis=0)
        std[std < 1e-12] = 1.0
        values += [x.mean(axis=0), std]
    return Scale(*values)
