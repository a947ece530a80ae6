"""What a denoised vector is worth, where the clean one is not zero and where it is."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LOSSES", "DenoisingLoss", "check_loss", "denoising_loss"]

LOSSES = ("scaled", "lp", "logistic")


class DenoisingLoss(NamedTuple):
    """The loss of a batch, each of shape ``()``.

    Attributes:
        scaled: what is made smaller.
        on: mean over the vectors of the error, summed where the clean vector is not zero; without
            its weight.
        off: the same where it is zero.
    """

    scaled: Tensor
    on: Tensor
    off: Tensor


def denoising_loss(
    denoised: Tensor,
    clean: Tensor,
    *,
    loss: str = "scaled",
    lambda_on: float = 16.0,
    lambda_off: float = 1.0,
    power: float = 2.0,
) -> DenoisingLoss:
    r"""How far denoised vectors are from the clean ones, by two weights.

    With :math:`e = y - x^*`, :math:`\lambda_j` = `lambda_on` where :math:`x^*_j \ne 0` and
    `lambda_off` elsewhere, and the mean over the vectors of a batch:

    .. math::
        \text{scaled: } \sum_j \lambda_j e_j^2 \quad
        \text{lp: } \sum_j \lambda_j |e_j|^p \quad
        \text{logistic: } d \, \ln \sum_j \exp(\lambda_j e_j^2)

    Without any error the first two are 0, and the last is d ln d.

    Args:
        denoised: ``(batch, features)``.
        clean: ``(batch, features)``.
        loss: ``scaled``, ``lp`` or ``logistic``.
        lambda_on: weight where the clean vector is not zero.
        lambda_off: weight where it is.
        power: p of ``lp``.

    Returns:
        The loss and the two sums, of squares or, with ``lp``, of the powers.

    Example:
        >>> clean = torch.tensor([[1.0, 0.0, 1.0]])
        >>> denoising_loss(torch.tensor([[0.5, 2.0, 1.0]]), clean).scaled  # 16 / 4 + 2 ** 2
        tensor(8.)
    """
    on = clean != 0
    error = (denoised - clean).float()
    size = error.abs().pow(power) if loss == "lp" else error.square()
    weighted = torch.where(on, lambda_on, lambda_off) * size
    if loss == "logistic":
        each = clean.shape[1] * torch.logsumexp(weighted, dim=1)
    else:
        each = weighted.sum(dim=1)
    return DenoisingLoss(each.mean(), (size * on).sum(dim=1).mean(), (size * ~on).sum(dim=1).mean())


def check_loss(loss: str, lambda_on: float, lambda_off: float, power: float) -> None:
    """Check the arguments of `denoising_loss`.

    Raises:
        ValueError: one breaks a rule.
    """
    if loss not in LOSSES:
        raise ValueError(f"`loss` must be one of {LOSSES}, got {loss!r}.")
    for name, value in (("lambda_on", lambda_on), ("lambda_off", lambda_off)):
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be at least 0, got {value}.")
    if not 1 <= power < math.inf:
        raise ValueError(f"`power` must be at least 1, got {power}.")
