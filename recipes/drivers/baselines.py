"""What a straight line makes of the same windows, and what nobody can surpass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from recipes.drivers.planted import Edges
from recipes.drivers.windows import Windows

__all__ = ["ceiling", "r_squared", "ridge", "ridge_scores"]

PENALTY = 100.0


def r_squared(predicted: Tensor, actual: Tensor) -> Tensor:
    r"""Share of variance explained, :math:`1 - \sum (y - \hat y)^2 / \sum (y - \bar y)^2`.

    Args:
        predicted: Shape ``(windows, horizon, targets)``.
        actual: The same.

    Returns:
        One number a target, over all windows and hours ahead together.
    """
    error = (actual - predicted).square().sum((0, 1))
    spread = (actual - actual.mean((0, 1))).square().sum((0, 1))
    return 1 - error / spread


def ridge(x: Tensor, y: Tensor, penalty: float = PENALTY) -> tuple[Tensor, Tensor]:
    r"""Weights and intercept that minimize :math:`|y - xW - c|^2 + \lambda |W|^2`.

    Args:
        x: Shape ``(rows, columns)``.
        y: Shape ``(rows, outputs)``.
        penalty: :math:`\lambda`; the intercept is free.

    Returns:
        Double precision, shapes ``(columns, outputs)`` and ``(outputs,)``.
    """
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (y - y_mean))
    return weight, y_mean - x_mean @ weight


def ridge_scores(train: Windows, held_out: Windows, edges: Edges | None) -> dict[str, Tensor]:
    """R2 by target of ridge regressions, fitted on one part and scored on another.

    Args:
        train: Windows to fit on.
        held_out: Windows to score on.
        edges: The planted edges, where they are known.

    Returns:
        ``history``: from the target's own past alone; ``all``: from all drivers alone; and, where
        edges are known, ``planted``: from the target's own drivers alone. Shape ``(targets,)``.
    """
    seen, unseen = train.together(), held_out.together()
    targets = range(seen.future.shape[2])

    def foretold(m: slice, x: Tensor, new: Tensor) -> Tensor:
        weight, intercept = ridge(x.flatten(1), seen.future[..., m].flatten(1))
        answer = new.flatten(1).double() @ weight + intercept
        return answer.view(unseen.future[..., m].shape)

    def score(forecasts: Sequence[Tensor]) -> Tensor:
        return r_squared(torch.cat(list(forecasts), dim=-1), unseen.future.double())

    one = [slice(m, m + 1) for m in targets]
    found = {
        "history": score([foretold(m, seen.history[..., m], unseen.history[..., m]) for m in one])
    }
    if edges is not None:
        own = [edges.body[m].tolist() for m in targets]
        pairs = zip(one, own, strict=True)
        found["planted"] = score(
            [foretold(m, seen.drivers[:, :, b], unseen.drivers[:, :, b]) for m, b in pairs]
        )
    found["all"] = score([foretold(slice(None), seen.drivers, unseen.drivers)])
    return found


def ceiling(part: Windows, clean: Windows) -> Tensor:
    """R2 by target of the planted signal itself: what is left is noise that nobody can foresee.

    Args:
        part: Windows of the series.
        clean: The same windows of the series without its noise.

    Returns:
        Shape ``(targets,)``.
    """
    return r_squared(clean.together().future.double(), part.together().future.double())
