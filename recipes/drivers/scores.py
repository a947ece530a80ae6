"""How good forecasts are, target by target, and whether attention finds the planted drivers."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from recipes.drivers.planted import Edges

__all__ = ["ForecastScores", "Scores", "drivers_found"]


class Scores(NamedTuple):
    """Over everything that was evaluated.

    Attributes:
        mse: Mean squared error by target, over windows and hours ahead.
        r2: Share of variance explained by target, over the same.
        attention: Mean weight over windows and heads, ``(targets, bodies)``.
    """

    mse: Tensor
    r2: Tensor
    attention: Tensor


class ForecastScores(Metric):
    """Collects `Scores` over batches and devices.

    Args:
        targets: Number of targets.
        bodies: Number of bodies.
    """

    error: Tensor
    total: Tensor
    square: Tensor
    count: Tensor
    weight: Tensor
    windows: Tensor

    def __init__(self, targets: int, bodies: int) -> None:
        super().__init__()
        for name in ("error", "total", "square"):
            self.add_state(name, torch.zeros(targets), dist_reduce_fx="sum")
        for name in ("count", "windows"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(targets, bodies), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, actual: Tensor, attention: Tensor) -> None:
        """Add a batch.

        Args:
            predicted: Shape ``(batch, horizon, targets)``.
            actual: The same.
            attention: Shape ``(batch, heads, targets, bodies)``.
        """
        predicted, actual = predicted.float(), actual.float()
        self.error += (actual - predicted).square().sum((0, 1))
        self.total += actual.sum((0, 1))
        self.square += actual.square().sum((0, 1))
        self.count += actual.shape[0] * actual.shape[1]
        self.weight += attention.float().mean(1).sum(0)
        self.windows += len(attention)

    def scores(self) -> Scores:
        """What `compute` gives, in shape: torchmetrics takes the axes off a single number."""
        mse, r2, attention = self.compute()
        return Scores(
            mse.view_as(self.error), r2.view_as(self.error), attention.view_as(self.weight)
        )

    def compute(self) -> Scores:
        spread = self.square - self.total.square() / self.count
        return Scores(self.error / self.count, 1 - self.error / spread, self.weight / self.windows)


def drivers_found(attention: Tensor, edges: Edges) -> tuple[float, float]:
    """Whether the largest weights are those of the planted drivers.

    Args:
        attention: Mean weights, ``(targets, bodies)``.
        edges: The planted edges, the main driver of each target first.

    Returns:
        The share of targets whose largest weight is that of their main driver; and the share of
        planted drivers that are among the three largest weights of their target.
    """
    best = attention.topk(edges.body.shape[1], dim=1).indices.tolist()
    planted = edges.body.tolist()
    pairs = list(zip(best, planted, strict=True))
    top = [own[0] == found[0] for found, own in pairs]
    recall = [len(set(found) & set(own)) / len(own) for found, own in pairs]
    return sum(top) / len(top), sum(recall) / len(recall)
