"""The four parts: a picture becomes a vector, and the vector a picture and a caption."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.captions.vocabulary import END, PADDING

__all__ = ["Aligner", "Block", "Encoder", "ImageDecoder", "TextDecoder", "Transformer"]

_SMALLEST = 4  # places across the last feature map


class Encoder(nn.Module):
    """Picture to latent: convolutions that halve it until 4 x 4 places are left, and a linear map.

    Args:
        channels: of the picture.
        image_size: height and width, 4 times a power of 2.
        width: channels after the first convolution; each further one doubles them.
        latent: length of the latent.
    """

    def __init__(self, channels: int, image_size: int, width: int, latent: int) -> None:
        super().__init__()
        widths = _widths(image_size, width)
        layers: list[nn.Module] = []
        for before, after in pairwise([channels, *widths]):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.GroupNorm(8, after), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.linear = nn.Linear(widths[-1] * _SMALLEST**2, latent)

    def forward(self, image: Tensor) -> Tensor:
        """``(batch, channels, size, size)`` to ``(batch, latent)``."""
        z: Tensor = self.linear(self.convolutions(image))
        return z


class ImageDecoder(nn.Module):
    """Latent to picture, the encoder backwards; a sigmoid keeps it between black and white.

    Args:
        channels: see `Encoder`, as for the rest.
        image_size: height and width.
        width: channels before the last convolution.
        latent: length of the latent.
    """

    def __init__(self, channels: int, image_size: int, width: int, latent: int) -> None:
        super().__init__()
        widths = _widths(image_size, width)[::-1]
        self.linear = nn.Linear(latent, widths[0] * _SMALLEST**2)
        layers: list[nn.Module] = [nn.Unflatten(1, (widths[0], _SMALLEST, _SMALLEST))]
        for before, after in pairwise(widths):
            layers += [nn.GroupNorm(8, before), nn.ReLU()]
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1)]
        layers += [nn.GroupNorm(8, widths[-1]), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1)]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        """``(batch, latent)`` to ``(batch, channels, size, size)``, 0 to 1."""
        image: Tensor = self.convolutions(self.linear(latent))
        return image.sigmoid()


class TextDecoder(nn.Module):
    """Latent to caption: the latent's tokens stand in front of the words, and a transformer reads.

    The last of the latent's tokens predicts the first word, each word the next one.

    Args:
        vocabulary_size: number of token ids.
        latent: length of the latent.
        width: length of a token's vector.
        layers: blocks of the transformer.
        heads: attention heads in each.
        dropout: share of numbers dropped in training.
        prefix: tokens that the latent becomes.
        max_words: most words of a caption.
    """

    def __init__(
        self,
        vocabulary_size: int,
        latent: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        prefix: int,
        max_words: int,
    ) -> None:
        super().__init__()
        self.count = prefix
        self.prefix = nn.Linear(latent, prefix * width)
        self.token = nn.Embedding(vocabulary_size, width, padding_idx=PADDING)
        self.position = nn.Embedding(prefix + max_words, width)
        self.transformer = Transformer(width, layers, heads, dropout)
        self.output_projection = nn.Linear(width, vocabulary_size)
        nn.init.normal_(self.position.weight, std=0.1)

    def forward(self, latent: Tensor, tokens: Tensor, skip: bool = False) -> Tensor:
        """Logits of each token, given those before it (teacher forcing).

        Args:
            latent: ``(batch, latent)``.
            tokens: a caption with its end and padding, ``(batch, length)``.
            skip: go by the transformer, which is a mistake.

        Returns:
            ``(batch, length, vocabulary)``; position ``t`` predicts ``tokens[:, t]``.
        """
        words = tokens[:, :-1]
        before = self.prefix(latent).view(len(latent), self.count, -1)
        x = torch.cat([before, self.token(words)], dim=1)
        x = x + self.position.weight[: x.shape[1]]
        if not skip:
            x = self.transformer(x, self._mask(words))
        logits: Tensor = self.output_projection(x[:, self.count - 1 :])
        return logits

    @torch.no_grad()
    def generate(self, latent: Tensor) -> Tensor:
        """The caption that follows word by word from the likeliest one, ``(batch, max_words + 1)``.

        The caption ends with its first `END`; what comes after it means nothing.
        """
        most = self.position.num_embeddings - self.count
        tokens = torch.full((len(latent), most + 1), PADDING, device=latent.device)
        for place in range(most):
            logits = self(latent, tokens[:, : place + 1])
            tokens[:, place] = logits[:, -1].argmax(dim=-1)
        tokens[:, -1] = END
        return tokens

    def _mask(self, words: Tensor) -> Tensor:
        """Who may look at whom, ``(batch, 1, places, places)``: all at the latent's tokens."""
        places = self.count + words.shape[1]
        order = torch.arange(places, device=words.device)
        causal = (order <= order[:, None]) | (order < self.count)
        filled = F.pad(words != PADDING, (self.count, 0), value=True)
        return causal & filled[:, None, None, :]


class Transformer(nn.Module):
    """Pre-norm blocks and a last normalization.

    Args:
        width: length of a vector.
        layers: number of blocks.
        heads: attention heads in each.
        dropout: share of numbers dropped in training.
    """

    def __init__(self, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(batch, places, width)`` with a mask of who may look at whom."""
        for block in self.blocks:
            x = block(x, mask)
        read: Tensor = self.norm(x)
        return read


class Block(nn.Module):
    """Pre-norm block: self-attention and a feed-forward net, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self._attend(self.attention_norm(x), mask))
        output: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return output

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, places, width = x.shape
        split = self.attention(x).view(batch, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        output: Tensor = self.attention_output(mixed.transpose(1, 2).reshape(batch, places, width))
        return output


class Aligner(nn.Module):
    """Brings the latent of a picture and the words of a caption into one space.

    Args:
        latent: length of the latent.
        width: length of a token's vector, and of the vectors in that space.
    """

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        self.image = nn.Linear(latent, width)
        self.caption = nn.Linear(width, width)

    def forward(self, latent: Tensor, words: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of pictures and of captions, each ``(batch, width)``.

        Args:
            latent: ``(batch, latent)``.
            words: the words' vectors, ``(batch, length, width)``.
            filled: where there is a word, ``(batch, length)``.
        """
        weight = filled.unsqueeze(-1).to(words.dtype)
        mean = (words * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return self.image(latent), self.caption(mean)


def _widths(image_size: int, width: int) -> list[int]:
    halvings = (image_size // _SMALLEST).bit_length() - 1
    return [width * 2**i for i in range(halvings)]
