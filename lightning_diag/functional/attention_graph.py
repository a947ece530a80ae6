"""Attention over the edges of a graph: each node looks at the nodes that point at it."""

import torch
from torch import Tensor

from lightning_diag.functional.attention_capture import PEAKED_WEIGHT, AttentionSums

__all__ = ["graph_sums"]

_LOWEST = -80.0


def graph_sums(
    logits: Tensor, index: Tensor, nodes: int | None = None
) -> tuple[AttentionSums, Tensor]:
    r"""Entropy and its companions for every head of a softmax over incoming edges.

    A row is one node with incoming edges, its keys are these edges, self-loops among them; a node
    with a single one has no choice. Edges have no order, so there is no sink (``nan``).

    Args:
        logits: What enters the softmax, shape ``(edges, heads)``, or ``(edges,)`` for one head.
        index: Node at which each edge ends, shape ``(edges,)``.
        nodes: Number of nodes; found out, at the cost of a sort, without it.

    Returns:
        The sums, and the cosine between the maps of every two heads, ``(heads, heads)``, averaged
        over the nodes that have a choice (``nan`` where there is none).

    Example:
        >>> sums, _ = graph_sums(torch.zeros(5), torch.tensor([0, 0, 0, 0, 1]), 2)
        >>> sums.normalized / sums.choices, sums.rows
        (tensor([1.], dtype=torch.float64), tensor([2.], dtype=torch.float64))
    """
    s = logits.detach()
    s = s.unsqueeze(-1) if s.dim() == 1 else s.flatten(1)
    s = s if s.dtype == torch.float64 else s.float()
    if nodes is None:
        nodes, index = len(index), _dense(index)
    heads = s.shape[1]
    wide = torch.float32 if s.device.type == "mps" else torch.float64
    zero = s.new_zeros(nodes, heads)
    place = index.unsqueeze(-1).expand(-1, heads)
    top = torch.full_like(zero, -torch.inf).scatter_reduce(0, place, s, "amax")
    s = (s - top[index]).nan_to_num(nan=_LOWEST, neginf=_LOWEST).clamp(min=_LOWEST)
    e = s.exp()
    z = zero.index_add(0, index, e)
    count = zero[:, :1].index_add(0, index, torch.ones_like(s[:, :1]))
    there = count > 0
    finite = there & top.isfinite()
    factor = torch.where(finite, 1 / z, 0)
    mean_s = zero.index_add(0, index, e * s) * factor
    entropy = torch.where(finite, (z.log() - mean_s).clamp(min=0), 0)
    choice = finite & (count > 1)
    found = {
        "rows": finite,
        "choices": choice,
        "masked": zero,
        "nonfinite": there & ~finite,
        "entropy": entropy,
        "normalized": torch.where(choice, entropy / count.log(), 0),
        "largest": factor,
        "peaked": factor > PEAKED_WEIGHT,
        "sink": zero + torch.nan,
        "sink_choices": zero + torch.nan,
        "mean": torch.where(finite, 1 / count, 0),
        "keys": torch.where(finite, count, 0),
    }
    sums = AttentionSums(**{name: x.sum(0, dtype=wide) for name, x in found.items()})
    return sums, _similarity(e * factor[index], index, choice.all(1))


def _similarity(weights: Tensor, index: Tensor, usable: Tensor) -> Tensor:
    square = weights.new_zeros(len(usable), weights.shape[1]).index_add(0, index, weights.square())
    length = torch.where(usable.unsqueeze(-1) & (square > 0), square.sqrt(), torch.inf)
    unit = weights / length[index]
    return (unit.T @ unit) / usable.sum()


def _dense(index: Tensor) -> Tensor:
    """The groups of equal indices numbered from 0, without asking the device how many there are."""
    ordered, order = index.sort()
    number = torch.zeros_like(index)
    number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(number).index_copy(0, order, number)
