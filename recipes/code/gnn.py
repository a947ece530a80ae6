"""The graph network: lines exchange messages along the edges of the line graph."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_geometric.nn import SAGEConv, global_max_pool, global_mean_pool

from recipes.code.batches import Batch
from recipes.code.graphs import KINDS, LineGraph, line_graph
from recipes.code.model import CodeClassifier
from recipes.code.tokenizer import PADDING

__all__ = ["CodeGNN", "GraphBlock", "GraphEncoder", "GraphHead", "LineBag", "focal_loss"]


class LineBag(nn.Module):
    """One vector a line: the normalized sum of its tokens' vectors, whatever their order.

    Args:
        vocabulary_size: number of token ids.
        width: length of a vector.
        dropout: share of numbers dropped in training.
    """

    def __init__(self, vocabulary_size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.EmbeddingBag(vocabulary_size, width, mode="sum", padding_idx=PADDING)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, graph: LineGraph) -> Tensor:
        """Embed the lines as ``(nodes, width)``."""
        lines: Tensor = self.dropout(self.norm(self.token(graph.tokens, graph.offsets)))
        return lines


class GraphBlock(nn.Module):
    """Pre-norm block: the mean over the neighbours of each kind, weighed, added to the input.

    Formula: ``x + relu(W h + sum_k s_k V_k mean_k(h))``, where ``h`` is the normalized input,
    ``mean_k`` the mean over the neighbours along edges of kind k, and ``s`` are learned strengths.

    Args:
        width: length of a vector.
        dropout: share of numbers dropped in training.
        order_strength: strength with which the edges between neighbouring lines start; those
            between lines that share a name start at 1.

    References:
        Schlichtkrull et al. (2018), Modeling relational data with graph convolutional networks,
        https://arxiv.org/abs/1703.06103, equation 2: a weight matrix for each kind of edge.
    """

    def __init__(self, width: int, dropout: float, order_strength: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own = nn.Linear(width, width)
        self.kinds = nn.ModuleList(
            SAGEConv(width, width, aggr="mean", root_weight=False, bias=False) for _ in KINDS
        )
        start = [order_strength if kind.endswith("line") else 1.0 for kind in KINDS]
        self.strength = nn.Parameter(torch.tensor(start))
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, edges: Sequence[Tensor]) -> Tensor:
        """Mix ``(nodes, width)`` along the edges of each kind, ``(2, edges)``."""
        h = self.norm(x)
        mixed = self.own(h)
        for strength, conv, along in zip(self.strength, self.kinds, edges, strict=True):
            mixed = mixed + strength * conv(h, along)
        output: Tensor = x + self.dropout(self.activation(mixed))
        return output


class GraphEncoder(nn.Module):
    """Blocks of messages and a last normalization; see `GraphBlock` for the arguments."""

    def __init__(self, width: int, layers: int, dropout: float, order_strength: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            GraphBlock(width, dropout, order_strength) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, graph: LineGraph) -> Tensor:
        """Encode ``(nodes, width)``."""
        edges = [graph.edges[:, graph.kind == kind] for kind in range(len(KINDS))]
        for block in self.blocks:
            x = block(x, edges)
        encoded: Tensor = self.norm(x)
        return encoded


class GraphHead(nn.Module):
    """Two logits from the mean and the largest value of each number over the lines."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, function: Tensor, size: int) -> Tensor:
        pooled = [pool(x, function, size) for pool in (global_mean_pool, global_max_pool)]
        logits: Tensor = self.net(torch.cat(pooled, dim=1))
        return logits


class CodeGNN(CodeClassifier):
    """Says whether a function is vulnerable, by its line graph: `embedding`, `encoder`, `head`.

    The loss is focal, which leaves more of the gradient to functions that are not yet told apart.
    Learning rate and what is logged are those of `CodeClassifier`.

    Args:
        optimizer: makes the optimizer from parameters; None for AdamW with ``lr=2e-3``.
        component_lrs: component to factor on the optimizer's learning rate, as
            ``{"encoder": 0.1}``; None for one rate throughout.
        components: the parts that `component_lrs` speaks of, name to globs; None for `embedding`,
            `encoder` and `head`.
        vocabulary_size: number of token ids, as in the data module.
        width: length of the vectors.
        layers: number of blocks; a line hears of those that many edges away.
        dropout: share of numbers dropped in training, 0 to 1.
        order_strength: strength with which the edges between neighbouring lines start, where
            those between lines that share a name start at 1.
        gamma: exponent of the focal loss; 0 for cross-entropy.
        warmup_share: share of the optimizer steps over which the learning rate rises, 0 to 1.
    """

    def __init__(
        self,
        *,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        component_lrs: Mapping[str, float | None] | None = None,
        components: Mapping[str, str | Sequence[str]] | None = None,
        vocabulary_size: int = 8192,
        width: int = 64,
        layers: int = 5,
        dropout: float = 0.1,
        order_strength: float = 0.1,
        gamma: float = 1.5,
        warmup_share: float = 0.1,
    ) -> None:
        super().__init__(optimizer, component_lrs, warmup_share, components)
        for name, value in (("width", width), ("layers", layers)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not gamma >= 0:
            raise ValueError(f"`gamma` must be at least 0, got {gamma}.")
        self.save_hyperparameters(ignore=["optimizer"])
        self.gamma = gamma
        self.embedding = LineBag(vocabulary_size, width, dropout)
        self.encoder = GraphEncoder(width, layers, dropout, order_strength)
        self.head = GraphHead(width, dropout)

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``(batch, 2)`` of safe and vulnerable."""
        graph = line_graph(batch)
        lines = self.encoder(self.embedding(graph), graph)
        logits: Tensor = self.head(lines, graph.function, len(batch.filled))
        return logits

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean focal loss of logits ``(batch, 2)`` against classes ``(batch,)``."""
        return focal_loss(logits, target, gamma=self.gamma, weight=self.class_weights)


def focal_loss(logits: Tensor, target: Tensor, *, gamma: float, weight: Tensor) -> Tensor:
    """Cross-entropy in which what is already told apart counts less.

    Formula: the mean of ``-(1 - p)^gamma ln p``, weighed by the class, where ``p`` is the
    probability of the right class.

    Args:
        logits: ``(batch, classes)``; computed in single precision.
        target: the right classes, ``(batch,)``.
        gamma: the exponent, at least 0.
        weight: of each class, ``(classes,)``.

    Returns:
        A scalar.

    References:
        Lin et al. (2017), Focal loss for dense object detection,
        https://arxiv.org/abs/1708.02002, equation 5.
    """
    log_p = logits.float().log_softmax(dim=-1).gather(1, target.unsqueeze(1)).squeeze(1)
    # a floor, since the slope of a power below 1 is infinite at 0
    missing = (-torch.expm1(log_p)).clamp(min=1e-12)
    weights = weight[target]
    return -(weights * missing**gamma * log_p).sum() / weights.sum()
