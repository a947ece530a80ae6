"""The logits of attention, a few query rows at a time, from whatever there is of them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Scores",
    "aligned",
    "dot_product_scores",
    "given_scores",
    "sampled",
    "spread",
    "weight_scores",
]

# an additive mask below this forbids a key: -1e9 and the lowest number of a type are both in use
_FORBIDDEN = -5e8


class Scores(NamedTuple):
    """Logits of attention that are computed for a few query rows at a time.

    Attributes:
        shape: Batch (what is looked at of it), heads, queries and keys.
        rows: From indices of queries ``(r,)`` to their logits ``(batch, heads, r, keys)``, a tensor
            of its own in single precision or better, and which keys are allowed, as booleans that
            broadcast to the same shape (None: all).
        device: Where they are computed.
    """

    shape: tuple[int, int, int, int]
    rows: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    device: torch.device


def dot_product_scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    max_batch: int = 4,
) -> Scores:
    r"""Logits of scaled dot product attention, ``scale * q k^T + mask``.

    Args:
        query: Shape ``(..., heads, T, d)``; ``(batch, T, d)`` is one head.
        key: Shape ``(..., key heads, S, d)``. With fewer heads than `query`, each serves a group of
            neighbouring heads (grouped queries).
        mask: None, or broadcastable to ``(..., heads, T, S)``: boolean, true where a query may
            look, or added to the logits. What is added below -5e8, or below half of the lowest
            number of its type, counts as forbidden.
        is_causal: Query i sees the keys up to i, as PyTorch counts them: from the upper left.
        scale: Factor of the product, ``1 / sqrt(d)`` without it.
        max_batch: How many examples to look at, evenly spread.

    Returns:
        Scores in single precision, in double if the inputs are double.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    mask = None if mask is None else aligned(mask.detach(), query.dim())
    query, key = _four(query.detach()), _four(key.detach())
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"`query` and `key` must be equally wide, got {query.shape[-1]} and {key.shape[-1]}."
        )
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])  # type: ignore[no-untyped-call]
    heads, key_heads = query.shape[-3], key.shape[-3]
    if key_heads > heads and heads == 1:
        query, heads = query.expand(*query.shape[:-3], key_heads, -1, -1), key_heads
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(f"Heads of `query` must be a multiple of {key_heads}, got {heads}.")
    queries, keys, width = query.shape[-2], key.shape[-2], query.shape[-1]
    query, key = _batched(query, lead), _batched(key, lead)
    if mask is not None:
        mask = mask if mask.shape[:-3].numel() == 1 else mask.expand(*lead, -1, -1, -1)
        mask = mask.flatten(0, -4)
    chosen = sampled(query.shape[0], max_batch, query.device)
    if chosen is not None:
        query, key = query[chosen], key[chosen]
        mask = mask if mask is None or mask.shape[0] == 1 else mask[chosen]
    wide = _wide(query)
    across = key.to(wide).transpose(-1, -2)
    factor = 1 / math.sqrt(width) if scale is None and width else scale or 0.0
    batch = query.shape[0]
    order = torch.arange(keys, device=query.device) if is_causal else None

    def rows(index: Tensor) -> tuple[Tensor, Tensor | None]:
        part = query.index_select(-2, index).to(wide) * factor
        # the heads that share keys are rows of one product: keys are not repeated
        grouped = part.reshape(batch, key_heads, heads // key_heads * len(index), width)
        logits = (grouped @ across).view(batch, heads, len(index), keys)
        allowed = None if order is None else order <= index.unsqueeze(-1)
        if mask is None:
            return logits, allowed
        piece = mask if mask.shape[-2] == 1 else mask.index_select(-2, index)
        if piece.dtype == torch.bool:
            return logits, piece if allowed is None else piece & allowed
        may = ~(piece <= _forbidden(piece.dtype))
        return logits.add_(piece), may if allowed is None else may & allowed

    return Scores((batch, heads, queries, keys), rows, query.device)


def given_scores(scores: Tensor, *, max_batch: int = 4) -> Scores:
    """Logits as they enter a softmax, masks included.

    Args:
        scores: Shape ``(batch, heads, T, S)`` or less; a logit that is as low as a mask (see
            `dot_product_scores`) counts as forbidden.
        max_batch: How many examples to look at, evenly spread.
    """
    scores = _sampled_batch(scores, max_batch)
    wide, lowest = _wide(scores), _forbidden(scores.dtype)

    def rows(index: Tensor) -> tuple[Tensor, Tensor | None]:
        part = scores.index_select(-2, index)
        # a logit that is not a number is no mask
        return part.to(wide), ~(part <= lowest)

    return Scores(_shape(scores), rows, scores.device)


def weight_scores(weights: Tensor, *, max_batch: int = 4) -> Scores:
    """Logits of weights that are already there; rows that do not sum to one are normalized.

    Masks cannot be told from weights that vanish: every key counts as allowed, and a row of zeros
    as masked.

    Args:
        weights: Not negative, shape ``(batch, heads, T, S)``; with three dimensions the heads are
            missing, with two the batch too, with one the queries too.
        max_batch: How many examples to look at, evenly spread.
    """
    weights = _sampled_batch(weights, max_batch)
    wide = _wide(weights)

    def rows(index: Tensor) -> tuple[Tensor, Tensor | None]:
        return weights.index_select(-2, index).to(wide).log(), None

    return Scores(_shape(weights), rows, weights.device)


def sampled(size: int, most: int, device: torch.device) -> Tensor | None:
    """Evenly spread indices, in the middle of equal parts; None where all are wanted.

    Args:
        size: How many there are.
        most: How many to take.
        device: Where the indices are needed.
    """
    return None if size <= most else spread(size, most, device)


def spread(size: int, most: int, device: torch.device) -> Tensor:
    """Evenly spread indices, in the middle of equal parts.

    Args:
        size: How many there are.
        most: How many to take; all if there are no more.
        device: Where the indices are needed.
    """
    count = min(size, most)
    middle = 2 * torch.arange(count, device=device) + 1
    return (middle * size).div(2 * max(1, count), rounding_mode="floor")


def aligned(mask: Tensor, dimensions: int) -> Tensor:
    """The mask with the dimensions that it has when it is added to the logits of the query.

    Args:
        mask: With any number of dimensions.
        dimensions: That of the query.

    Returns:
        At least four dimensions.
    """
    while mask.dim() < min(dimensions, 4):
        mask = mask.unsqueeze(0)
    return _four(mask)


def _four(x: Tensor) -> Tensor:
    """At least four dimensions; of three, the first is the batch, and there is one head."""
    if x.dim() == 3:
        return x.unsqueeze(1)
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x


def _batched(x: Tensor, lead: torch.Size) -> Tensor:
    """All leading dimensions as one."""
    if x.shape[:-3].numel() == 1:
        return x.reshape(1, *x.shape[-3:]).expand(lead.numel(), -1, -1, -1)
    return x.expand(*lead, -1, -1, -1).flatten(0, -4)


def _sampled_batch(x: Tensor, max_batch: int) -> Tensor:
    x = _four(x.detach())
    x = x.flatten(0, -4)
    chosen = sampled(x.shape[0], max_batch, x.device)
    return x if chosen is None else x[chosen]


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    batch, heads, queries, keys = x.shape
    return batch, heads, queries, keys


def _forbidden(dtype: torch.dtype) -> float:
    return max(torch.finfo(dtype).min / 2, _FORBIDDEN)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
