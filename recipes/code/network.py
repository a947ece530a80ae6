"""A transformer over statements: tokens are summed line by line, and lines attend to lines."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.code.batches import Batch
from recipes.code.tokenizer import MAX_NAMES, PADDING

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "Block",
    "Encoder",
    "Head",
    "StatementEmbedding",
    "name_relations",
    "scale_weights",
]

ACTIVATIONS = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
}


class StatementEmbedding(nn.Module):
    """One vector a line: the sum of its tokens' vectors, each with its place in the line.

    Args:
        vocabulary_size: number of token ids.
        width: length of a vector.
        max_columns: places in a line that are told apart; later ones share the last.
        max_statements: lines that are told apart; later ones share the last.
        dropout: share of numbers dropped in training.
    """

    def __init__(
        self,
        vocabulary_size: int,
        width: int,
        max_columns: int,
        max_statements: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary_size, width, padding_idx=PADDING)
        self.column = nn.Embedding(max_columns, width)
        self.statement = nn.Embedding(max_statements, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.column.weight, std=0.3)
        nn.init.normal_(self.statement.weight, std=0.1)

    def forward(self, batch: Batch) -> Tensor:
        """Embed ``(batch, tokens)`` as ``(batch, statements, width)``."""
        column = batch.column.clamp(max=self.column.num_embeddings - 1)
        tokens = self.token(batch.ids) + self.column(column)
        lines = self.norm(_membership(batch, tokens.dtype) @ tokens)
        order = torch.arange(lines.shape[1], device=lines.device)
        place = self.statement(order.clamp(max=self.statement.num_embeddings - 1))
        embedded: Tensor = self.dropout(lines + place)
        return embedded


def name_relations(batch: Batch) -> Tensor:
    """Which lines share a name, and in which sense.

    It is read off the text: a name in front of ``=`` is assigned, anywhere else it is used. What
    lies between the lines, such as a second assignment, plays no part.

    Args:
        batch: padded functions.

    Returns:
        Zeros and ones, ``(batch, 2, statements, statements)``. In the first matrix row i, column j
        is 1 where line i uses a name that line j assigns, in the second where line i assigns a
        name that line j uses.
    """
    named = F.one_hot(batch.name, MAX_NAMES + 1)[..., 1:].float()
    member = _membership(batch, named.dtype)
    assigned = batch.assigns.unsqueeze(-1).float()
    assigns = member @ (named * assigned)
    uses = member @ (named * (1 - assigned))
    forward = (uses @ assigns.mT).clamp(max=1)
    return torch.stack([forward, forward.mT], dim=1)


class Attention(nn.Module):
    """Self-attention with a learned extra score for lines that share a name, a number a head.

    The first head starts out looking at where the names that it uses were assigned, the second at
    where the assigned name is used, the others at everything.

    Args:
        width: length of a vector.
        heads: number of heads.
        name_bias: extra score with which the first two heads start; None for attention that
            knows nothing of names.

    References:
        Guo et al. (2021), GraphCodeBERT, https://arxiv.org/abs/2009.08366, section 4.2, lets
        attention follow data flow by a hard mask; here it is a soft bias.
    """

    def __init__(self, width: int, heads: int, name_bias: float | None) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.bias: nn.Parameter | None = None
        if name_bias is not None:
            start = torch.zeros(heads, 2)
            start[0, 0] = name_bias
            start[1, 1] = name_bias
            self.bias = nn.Parameter(start)

    def forward(self, x: Tensor, filled: Tensor, relations: Tensor | None) -> Tensor:
        """Mix ``(batch, statements, width)`` over the statements that are filled."""
        size, statements, width = x.shape
        q, k, v = self.projection(x).view(size, statements, 3, self.heads, -1).unbind(dim=2)
        mask = filled[:, None, None, :]
        if self.bias is not None and relations is not None:
            score = torch.einsum("hr,brij->bhij", self.bias, relations.to(self.bias.dtype))
            mask = score.masked_fill(~mask, -torch.inf).to(q.dtype)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(size, statements, width))
        return output


class Block(nn.Module):
    """Pre-norm block: attention and a feed-forward net, each added to its input."""

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        name_bias: float | None,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, name_bias)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 2 * width), ACTIVATIONS[activation](), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, filled: Tensor, relations: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), filled, relations))
        output: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return output


class Encoder(nn.Module):
    """Pre-norm blocks and a last normalization.

    Args:
        width: length of a vector.
        layers: number of blocks.
        heads: attention heads in each.
        dropout: share of numbers dropped in training.
        name_bias: see `Attention`.
        activation: of the feed-forward nets, one of `ACTIVATIONS`.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        name_bias: float | None,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, dropout, name_bias, activation) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.name_bias = name_bias

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Encode ``(batch, statements, width)``."""
        relations = None if self.name_bias is None else name_relations(batch)
        for block in self.blocks:
            x = block(x, batch.filled, relations)
        encoded: Tensor = self.norm(x)
        return encoded


class Head(nn.Module):
    """Two logits from the largest value of each number over the filled statements."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2)

    def forward(self, x: Tensor, filled: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.masked_fill(~filled.unsqueeze(-1), -torch.inf).amax(dim=1))
        return logits


@torch.no_grad()
def scale_weights(module: nn.Module, scale: float) -> None:
    """Multiply the weights of every linear layer, and not the biases, by a number.

    Args:
        module: what holds the layers.
        scale: the factor; 1 changes no bit.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(scale)


def _membership(batch: Batch, dtype: torch.dtype) -> Tensor:
    """1 where a token stands in a line, ``(batch, statements, tokens)``."""
    order = torch.arange(batch.filled.shape[1], device=batch.statement.device)
    return (batch.statement.unsqueeze(1) == order[:, None]).to(dtype)
