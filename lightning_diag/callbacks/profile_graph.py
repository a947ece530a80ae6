"""Where the backward pass of one call of a module begins, and where it ends."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["Borders", "borders", "graph_position"]


class Borders(NamedTuple):
    """The nodes at both ends of a stretch of the autograd graph.

    Attributes:
        first: Where gradients come in during the backward pass: the makers of the outputs.
        last: Where they go out: nodes of which an input was made before, or is a leaf.
    """

    first: list[Node]
    last: list[Node]


def graph_position() -> int:
    """The number that the next operator of this thread will have in the autograd graph."""
    return torch._C._autograd._get_sequence_nr()


def borders(outputs: Iterable[Tensor], since: int) -> Borders:
    """The borders of the part of the graph that was made since a position, seen from outputs.

    The graph is only walked. Nothing in it is changed, so gradients flow just as they would.

    Args:
        outputs: What a module returned.
        since: `graph_position` when it began.

    Returns:
        Nodes, each once; none for outputs that need no gradient or were made before.
    """
    until = graph_position()

    def own(node: Node | None) -> bool:
        return node is not None and since <= node._sequence_nr() < until

    first: dict[Node, None] = dict.fromkeys(x.grad_fn for x in outputs if own(x.grad_fn))  # type: ignore[misc]
    last: list[Node] = []
    waiting, seen = list(first), set(first)
    while waiting:
        node = waiting.pop()
        below = [source for source, _ in node.next_functions]
        inside = [source for source in below if source is not None and own(source)]
        if len(inside) < sum(source is not None for source in below):
            last.append(node)
        new = [source for source in dict.fromkeys(inside) if source not in seen]
        seen.update(new)
        waiting += new
    return Borders(list(first), last)
