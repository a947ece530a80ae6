"""Where does attention go, head by head: entropy, peaks, sinks and drivers, without a T x T map."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diag.functional.attention_scores import Scores, aligned, spread

__all__ = [
    "AttentionSums",
    "QueryGroups",
    "add_sums",
    "attention_map",
    "attention_sums",
    "attention_verdict",
    "head_similarity",
    "nearest_head",
    "top_keys",
]

PEAKED_WEIGHT = 0.9
"""A row whose largest weight is above this looks at a single key; so does a head, on average."""
UNIFORM_ENTROPY = 0.98
"""A head whose entropy is above this share of the largest possible one prefers no key."""
SINK_SHARE = 0.5
"""A head that gives more than this share of its weight to key 0 parks it there."""
SINK_KEYS = 4
"""With fewer keys than this, much weight on the first of them means nothing."""
DUPLICATE_COSINE = 0.99
"""Two heads whose maps are nearer to each other than this cosine do the same."""

# a weight of 2^-120 is none; what underflows takes a CPU thirty times as long
_LOWEST = -120.0
_LOG2_E = math.log2(math.e)
_CPU_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 23


class AttentionSums(NamedTuple):
    """Sums over rows of attention; every field has the shape ``(heads,)``, in double precision.

    A row is one query of one example in one head.

    Attributes:
        rows: Rows with a finite result and at least one allowed key.
        choices: Those of them with at least two allowed keys.
        masked: Rows without an allowed key.
        nonfinite: Rows that hold ``nan`` or infinite logits.
        entropy: Sum of the entropies, in nats.
        normalized: Sum of entropy over ln(allowed keys), over `choices`.
        largest: Sum of the largest weights.
        peaked: Number of rows whose largest weight is above 0.9.
        sink: Sum of the weights of key 0; ``nan`` where keys have no order.
        sink_choices: The same over `choices`.
        mean: Sum of one over the number of allowed keys.
        keys: Sum of the numbers of allowed keys.
    """

    rows: Tensor
    choices: Tensor
    masked: Tensor
    nonfinite: Tensor
    entropy: Tensor
    normalized: Tensor
    largest: Tensor
    peaked: Tensor
    sink: Tensor
    sink_choices: Tensor
    mean: Tensor
    keys: Tensor


class QueryGroups(NamedTuple):
    """Sums over the rows of each group of queries, over examples and heads alike.

    Attributes:
        rows: Shape ``(groups,)``; the next four like the fields of `AttentionSums`.
        choices: Shape ``(groups,)``.
        entropy: Shape ``(groups,)``.
        normalized: Shape ``(groups,)``.
        largest: Shape ``(groups,)``.
        mass: Sum of the weights of every key, shape ``(groups, keys)``.
    """

    rows: Tensor
    choices: Tensor
    entropy: Tensor
    normalized: Tensor
    largest: Tensor
    mass: Tensor


class _Rows(NamedTuple):
    powers: Tensor
    factor: Tensor
    finite: Tensor
    allowed: Tensor
    masked: Tensor
    entropy: Tensor


def attention_sums(
    scores: Scores, *, max_rows: int = 512, groups: int = 0
) -> tuple[AttentionSums, Tensor, QueryGroups | None]:
    r"""Entropy and its companions for every head, in memory that grows with the keys alone.

    With weights :math:`p = \mathrm{softmax}(s)` of one row, :math:`H = -\sum_j p_j \ln p_j` is
    computed as :math:`\ln \sum_j e^{s_j} - \sum_j p_j s_j` with the largest logit moved to 0.

    Args:
        scores: What `dot_product_scores` and its like give.
        max_rows: How many queries to look at, evenly spread: all of them if there are no more.
        groups: Into how many neighbouring groups of queries to divide them; 0 for none.

    Returns:
        The sums; the weight that each key gets in each head, summed over rows, ``(heads, keys)``;
        and the sums by group of queries if any are asked for.

    Example:
        >>> from lightning_diag.functional.attention_scores import given_scores
        >>> flat = given_scores(torch.zeros(1, 2, 3, 8))
        >>> sums, mass, _ = attention_sums(flat)
        >>> sums.normalized / sums.choices
        tensor([1., 1.], dtype=torch.float64)

    References:
        Zhai et al. (2023), Stabilizing Transformer Training by Preventing Attention Entropy
        Collapse, https://arxiv.org/abs/2303.06296, section 3.
    """
    _, heads, queries, keys = scores.shape
    wide = _accurate(scores.device)
    total = torch.zeros(len(AttentionSums._fields), heads, dtype=wide, device=scores.device)
    mass = torch.zeros(heads, keys, dtype=wide, device=scores.device)
    fields = len(QueryGroups._fields) - 1
    grouped = torch.zeros(groups, fields + keys, dtype=wide, device=scores.device)
    for index in _chunks(scores, max_rows):
        rows = _row_statistics(*scores.rows(index))
        total += torch.stack(_head_sums(rows))
        mass += (rows.factor.unsqueeze(-2) @ rows.powers).sum((0, 2)).to(wide)
        if groups:
            place = (index * groups).div(queries, rounding_mode="floor")
            grouped.index_add_(0, place, _group_sums(rows))
    sums = AttentionSums(*total.unbind(0))
    if not groups:
        return sums, mass, None
    numbers = (*grouped[:, :fields].unbind(1), grouped[:, fields:])
    return sums, mass, QueryGroups._make(numbers)


def attention_map(scores: Scores, max_rows: int = 16) -> tuple[Tensor, Tensor]:
    """The weights of a few evenly spread queries of the first example.

    Args:
        scores: What `dot_product_scores` and its like give.
        max_rows: How many queries; fewer where their maps would be larger than a chunk.

    Returns:
        Weights ``(heads, r, keys)``, zero in rows without a result, and whether a row has a choice
        of keys in every head, ``(r,)``.
    """
    _, heads, queries, keys = scores.shape
    most = max(1, _chunk_elements(scores.device) // max(1, heads * keys))
    index = spread(queries, min(max_rows, most), scores.device)
    logits, allowed = scores.rows(index)
    if allowed is not None:
        allowed = aligned(allowed, 4)[:1]
    rows = _row_statistics(logits[:1], allowed)
    usable = rows.finite & (rows.allowed > 1)
    return (rows.powers * rows.factor.unsqueeze(-1))[0], usable[0].all(0)


def head_similarity(weights: Tensor, usable: Tensor) -> Tensor:
    """Cosine between the maps of every two heads, averaged over rows.

    Args:
        weights: Shape ``(heads, r, keys)``.
        usable: The rows that count, shape ``(r,)``.

    Returns:
        Shape ``(heads, heads)``; ``nan`` where no row counts.
    """
    length = torch.linalg.vector_norm(weights, dim=-1, keepdim=True)
    unit = (weights / length.masked_fill(length == 0, 1)).transpose(0, 1)
    cosines = unit @ unit.transpose(-1, -2)
    counted = usable.to(cosines.dtype)
    total: Tensor = (cosines * counted.view(-1, 1, 1)).sum(0)
    return total / counted.sum()


def nearest_head(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar other head of each.

    Args:
        similarity: What `head_similarity` gives, at least two heads.

    Returns:
        The cosines and the indices, ``(heads,)`` each.
    """
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    cosines, index = similarity.masked_fill(own, -torch.inf).max(-1)
    return cosines, index


def top_keys(mass: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The keys with the largest mean weight, and how far weights are spread.

    Args:
        mass: Summed weights, ``(n, keys)``.
        rows: How many rows were summed, ``(n,)``.
        count: How many keys, if there are so many.

    Returns:
        Mean weights ``(n, count)`` from the largest on, their keys ``(n, count)``, and the standard
        deviation over keys of the mean weights (divisor n), ``(n,)``.
    """
    mean = mass / rows.unsqueeze(-1)
    weights, index = mean.topk(min(count, mass.shape[-1]), dim=-1)
    return weights, index, mean.std(-1, correction=0)


def add_sums(first: AttentionSums, second: AttentionSums) -> AttentionSums:
    """The sums of two sets of rows of the same heads taken together.

    Args:
        first: Fields of shape ``(heads,)``.
        second: The same.
    """
    return AttentionSums(*(a + b for a, b in zip(first, second, strict=True)))


def attention_verdict(
    *, largest: float, normalized: float, sink: float, keys: float, similarity: float
) -> str | None:
    """What is remarkable about a head, in one word.

    Args:
        largest: Mean of the largest weight, over rows that have a choice.
        normalized: Mean entropy over ln(allowed keys), over the same rows.
        sink: Mean weight of key 0, over the same rows; ``nan`` where keys have no order.
        keys: Mean number of allowed keys.
        similarity: Cosine to the most similar other head; ``nan`` without one.

    Returns:
        The first that holds of ``"sink"`` (key 0 has more than half of the weight, out of at least
        four keys), ``"peaked"`` (largest above 0.9), ``"uniform"`` (normalized above 0.98) and
        ``"duplicate"`` (similarity above 0.99), or None.

    Example:
        >>> attention_verdict(largest=0.95, normalized=0.1, sink=0.1, keys=32, similarity=0.2)
        'peaked'
    """
    if sink > SINK_SHARE and keys >= SINK_KEYS:
        return "sink"
    if largest > PEAKED_WEIGHT:
        return "peaked"
    if normalized > UNIFORM_ENTROPY:
        return "uniform"
    return "duplicate" if similarity > DUPLICATE_COSINE else None


def _chunks(scores: Scores, max_rows: int) -> Iterator[Tensor]:
    batch, heads, queries, keys = scores.shape
    if not batch * heads * queries * keys:
        return
    size = max(1, _chunk_elements(scores.device) // (batch * heads * keys))
    yield from torch.split(spread(queries, max_rows, scores.device), size)


def _chunk_elements(device: torch.device) -> int:
    return _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def _row_statistics(logits: Tensor, allowed: Tensor | None) -> _Rows:
    if allowed is None:
        count = logits.new_full((1, 1, 1), logits.shape[-1])
    else:
        logits = logits.masked_fill(~allowed, -torch.inf)
        count = allowed.expand(*allowed.shape[:-1], logits.shape[-1]).sum(-1).to(logits.dtype)
    top = logits.amax(-1, keepdim=True)
    nothing = top == -torch.inf
    s = logits - top.masked_fill(nothing, 0)
    # in powers of two, which are quicker than those of e; what is forbidden, and whole rows that
    # hold something that is no number, get no weight
    s = s.mul_(_LOG2_E).nan_to_num_(nan=_LOWEST, neginf=_LOWEST).clamp_(min=_LOWEST)
    e = s.exp2()
    z = e.sum(-1)
    masked = (count == 0) | nothing.squeeze(-1)
    finite = top.squeeze(-1).isfinite() & ~masked
    factor = torch.where(finite, 1 / z, 0)
    entropy = (z.log2() - (e * s).sum(-1) * factor).clamp(min=0) / _LOG2_E
    # the largest logit is 0 now and its power 1, so `factor` is the largest weight
    return _Rows(e, factor, finite, count, masked, torch.where(finite, entropy, 0))


def _head_sums(rows: _Rows) -> list[Tensor]:
    wide = _accurate(rows.entropy.device)
    choice = rows.finite & (rows.allowed > 1)
    sink = rows.powers[..., 0] * rows.factor
    found = {
        "rows": rows.finite,
        "choices": choice,
        "masked": rows.masked,
        "nonfinite": ~(rows.finite | rows.masked),
        "entropy": rows.entropy,
        "normalized": torch.where(choice, rows.entropy / rows.allowed.log(), 0),
        "largest": rows.factor,
        "peaked": rows.factor > PEAKED_WEIGHT,
        "sink": sink,
        "sink_choices": torch.where(choice, sink, 0),
        "mean": torch.where(rows.finite, 1 / rows.allowed, 0),
        "keys": torch.where(rows.finite, rows.allowed, 0),
    }
    return [x.sum((0, 2), dtype=wide) for x in AttentionSums(**found)]


def _group_sums(rows: _Rows) -> Tensor:
    """The fields of `QueryGroups` for each row of the chunk, shape ``(r, fields)``."""
    wide = _accurate(rows.entropy.device)
    choice = rows.finite & (rows.allowed > 1)
    normalized = torch.where(choice, rows.entropy / rows.allowed.log(), 0)
    found = (rows.finite, choice, rows.entropy, normalized, rows.factor)
    sums = [x.sum((0, 1), dtype=wide).unsqueeze(-1) for x in found]
    mass = (rows.powers * rows.factor.unsqueeze(-1)).sum((0, 1))
    return torch.cat([*sums, mass.to(wide)], dim=-1)


def _accurate(device: torch.device) -> torch.dtype:
    # Apple's accelerator has no double precision
    return torch.float32 if device.type == "mps" else torch.float64
