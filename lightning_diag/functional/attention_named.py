"""Could these be weights of attention? Asked of tensors that a module hands out."""

import torch
from torch import Tensor

from lightning_diag.functional.attention_scores import sampled

__all__ = ["looks_like_weights"]


def looks_like_weights(x: Tensor, max_batch: int = 4, max_rows: int = 512) -> Tensor:
    """What tells weights of attention from other tensors: they are shares of one.

    Args:
        x: Shape ``(..., T, S)``, or ``(S,)``.
        max_batch: How many entries of the first dimension to look at, if there are more than two.
        max_rows: How many queries to look at.

    Returns:
        Three numbers: the sum of all rows, the number of rows that are not all zero, and how many
        elements are negative or not finite in rows that are not wholly ``nan``.

    Example:
        >>> looks_like_weights(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([2., 2., 0.], dtype=torch.float64)
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    x = x.detach()
    if x.dim() > 2:
        chosen = sampled(len(x), max_batch, x.device)
        x = x if chosen is None else x[chosen]
    if x.dim() > 1:
        chosen = sampled(x.shape[-2], max_rows, x.device)
        x = x if chosen is None else x.index_select(-2, chosen)
    x = x.to(wide)
    empty = x.isnan().all(-1, keepdim=True)
    x = x.masked_fill(empty, 0)
    wrong = (x < 0) | ~x.isfinite()
    return torch.stack([x.sum(), (x != 0).any(-1).sum().to(wide), wrong.sum().to(wide)])
