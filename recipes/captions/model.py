"""The autoencoder as a LightningModule: losses, metrics, learning rate."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_diag import param_groups
from lightning_diag.functional.multimodal import (
    CaptionScores,
    ImageErrors,
    LossShares,
    caption_scores_update,
    caption_scores_value,
    image_errors_update,
    image_errors_value,
    loss_shares,
)
from lightning_diag.lightning import LightningModule
from recipes.captions.data import Batch
from recipes.captions.losses import contrastive_alignment, norm_alignment
from recipes.captions.network import Aligner, Encoder, ImageDecoder, TextDecoder
from recipes.captions.vocabulary import END, PADDING, UNKNOWN

__all__ = ["CaptionAutoencoder", "Outputs", "cosine_with_warmup"]

_ALIGNMENTS = ("contrastive", "seed")
_BLACK_AND_WHITE = (0.0, 1.0)


class Outputs(NamedTuple):
    """What the model makes of a batch.

    Attributes:
        latent: ``(batch, latent)``.
        image: the pictures drawn from it, 0 to 1, ``(batch, channels, size, size)``.
        logits: of each token, given those before it, ``(batch, length, vocabulary)``.
    """

    latent: Tensor
    image: Tensor
    logits: Tensor


class CaptionAutoencoder(LightningModule):
    """Draws a picture again and says what it shows, both from one vector.

    The parts are `encoder`, `image_decoder`, `text_decoder` and, with contrastive alignment,
    `aligner`. The loss is the weighted sum of three: the squared error of the picture, the
    cross-entropy of the caption's tokens without padding, and the alignment. The learning rate
    rises linearly over the first optimizer steps and falls to zero as a cosine.

    Args:
        optimizer: makes the optimizer from parameters; None for AdamW with ``lr=1e-3``.
        component_lrs: component to factor on the optimizer's learning rate, as
            ``{"encoder": 0.1}``; None for one rate throughout.
        channels: of the pictures, as in the data module.
        image_size: height and width, as in the data module; 4 times a power of 2.
        vocabulary_size: number of token ids, as in the data module.
        max_words: most words of a caption, as in the data module.
        latent: length of the vector between encoder and decoders.
        image_width: channels of the first convolution, a multiple of 8.
        text_width: length of a token's vector.
        text_layers: blocks of the text decoder's transformer.
        text_heads: attention heads in each.
        text_prefix: tokens of the text decoder that the latent becomes.
        dropout: share of numbers dropped in the transformer in training, 0 to 1.
        alignment: ``contrastive``, which ties pictures to their captions, or ``seed``, the loss of
            the original, which only holds the norm of the latent.
        image_weight: weight of the picture's squared error in the loss.
        caption_weight: weight of the caption's cross-entropy.
        alignment_weight: weight of the alignment.
        skip_text_decoder: whether teacher forcing goes by the transformer and takes its logits
            straight from the embeddings: the mistake of the original.
        warmup_share: share of the optimizer steps over which the learning rate rises, 0 to 1.

    Raises:
        ValueError: an argument breaks a rule.

    Logs:
        At every step ``train_loss``; its parts ``loss_image``, ``loss_caption`` and
        ``loss_alignment``, not weighted yet; and the share of each in the whole,
        ``loss_share/image`` and so on. For validation (``val_``) and test (``test_``), over all
        pictures: ``loss`` and its parts; ``image_mse`` and ``image_l1``, where black is 0 and white
        is 1, as in the loss; ``caption_accuracy``, ``caption_perplexity`` and ``caption_entropy``
        of the tokens, given those before them, without padding; ``caption_exact``, the share of
        captions that come out right word by word when the model goes on by itself.
    """

    def __init__(
        self,
        *,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        component_lrs: Mapping[str, float] | None = None,
        channels: int = 1,
        image_size: int = 32,
        vocabulary_size: int = 1024,
        max_words: int = 16,
        latent: int = 64,
        image_width: int = 32,
        text_width: int = 128,
        text_layers: int = 2,
        text_heads: int = 4,
        text_prefix: int = 4,
        dropout: float = 0.3,
        alignment: str = "contrastive",
        image_weight: float = 20.0,
        caption_weight: float = 1.0,
        alignment_weight: float = 0.5,
        skip_text_decoder: bool = False,
        warmup_share: float = 0.05,
    ) -> None:
        super().__init__()
        _check(image_size, image_width, text_width, text_heads, alignment, warmup_share)
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer = optimizer or partial(AdamW, lr=1e-3)
        self.component_lrs = component_lrs
        self.warmup_share = warmup_share
        self.skip_text_decoder = skip_text_decoder
        self.weights = {
            "image": image_weight,
            "caption": caption_weight,
            "alignment": alignment_weight,
        }
        self.encoder = Encoder(channels, image_size, image_width, latent)
        self.image_decoder = ImageDecoder(channels, image_size, image_width, latent)
        self.text_decoder = TextDecoder(
            vocabulary_size,
            latent,
            text_width,
            text_layers,
            text_heads,
            dropout,
            text_prefix,
            max_words,
        )
        self.aligner = Aligner(latent, text_width) if alignment == "contrastive" else None
        self._images: ImageErrors | None = None
        self._captions: CaptionScores | None = None
        self._exact: list[Tensor] = []

    def forward(self, batch: Batch) -> Outputs:
        """Pictures drawn again, and the logits of their captions."""
        latent = self.encoder(batch.image)
        logits = self.text_decoder(latent, batch.tokens, skip=self.skip_text_decoder)
        return Outputs(latent, self.image_decoder(latent), logits)

    def losses(self, batch: Batch, outputs: Outputs) -> dict[str, Tensor]:
        """The three parts of the loss, not weighted yet, each of shape ``()``."""
        drawn, logits = outputs.image.float(), outputs.logits.float()
        caption = F.cross_entropy(
            logits.flatten(0, 1), batch.tokens.flatten(), ignore_index=PADDING
        )
        return {
            "image": F.mse_loss(drawn, batch.image),
            "caption": caption,
            "alignment": self._alignment(batch, outputs),
        }

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        parts = self.losses(batch, self(batch))
        loss = self._weighted(parts)
        size = len(batch.image)
        self.log("train_loss", loss.total, batch_size=size, prog_bar=True)
        self.log_dict(_named("loss_", parts), batch_size=size)
        self.log_dict(_named("loss_share/", loss.shares), batch_size=size)
        return loss.total

    def on_validation_epoch_start(self) -> None:
        self._forget()

    def on_test_epoch_start(self) -> None:
        self._forget()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val_")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test_")

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val_")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test_")

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        optimizer = self.optimizer(self.parameters())
        if self.component_lrs:
            base_lr = optimizer.defaults["lr"]
            optimizer = self.optimizer(param_groups(self, self.component_lrs, base_lr=base_lr))
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "`max_epochs` or `max_steps` must be given, since the learning rate falls to zero "
                "at the last step; both are unlimited."
            )
        factor = partial(cosine_with_warmup, steps=int(steps), warmup_share=self.warmup_share)
        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _alignment(self, batch: Batch, outputs: Outputs) -> Tensor:
        if self.aligner is None:
            return norm_alignment(outputs.latent, outputs.image, batch.image)
        filled = (batch.tokens != PADDING) & (batch.tokens != END)
        words = self.text_decoder.token(batch.tokens)
        return contrastive_alignment(*self.aligner(outputs.latent, words, filled))

    def _weighted(self, parts: Mapping[str, Tensor]) -> LossShares:
        return loss_shares(parts, self.weights)

    def _forget(self) -> None:
        self._images, self._captions, self._exact = None, None, []

    def _evaluate(self, batch: Batch, stage: str) -> None:
        outputs = self(batch)
        parts = self.losses(batch, outputs)
        size = len(batch.image)
        logged = {"loss": self._weighted(parts).total, **_named("loss_", parts)}
        self.log_dict(_named(stage, logged), batch_size=size, sync_dist=True)
        self._images = image_errors_update(
            self._images,
            outputs.image.float(),
            batch.image,
            prediction_range=_BLACK_AND_WHITE,
            target_range=_BLACK_AND_WHITE,
        )
        self._captions = caption_scores_update(
            self._captions, outputs.logits, batch.tokens, pad=PADDING
        )
        said = self.text_decoder.generate(outputs.latent)[:, : batch.tokens.shape[1]]
        right = (batch.tokens == PADDING) | ((said == batch.tokens) & (batch.tokens != UNKNOWN))
        self._exact.append(right.all(dim=1))

    def _log_scores(self, stage: str) -> None:
        if self._images is None or self._captions is None:
            return
        exact = torch.cat(self._exact)
        right, said = exact.sum(), exact.new_ones((), dtype=torch.long) * len(exact)
        wide = self._images.sum_sq.dtype
        sums = torch.stack([x.to(wide) for x in (*self._images, *self._captions, right, said)])
        if self.trainer.world_size > 1:
            sums = cast("Tensor", self.all_gather(sums)).sum(dim=0)
        first, last = len(self._images), -2
        images = image_errors_value(ImageErrors(*sums[:first]))
        captions = caption_scores_value(CaptionScores(*sums[first:last]))
        scores = {
            "image_mse": images.mse,
            "image_l1": images.l1,
            "caption_accuracy": captions.accuracy,
            "caption_perplexity": captions.perplexity,
            "caption_entropy": captions.entropy,
            "caption_exact": sums[-2] / sums[-1],
        }
        self.log_dict(_named(stage, {name: value.float() for name, value in scores.items()}))
        self._forget()


def cosine_with_warmup(step: int, *, steps: int, warmup_share: float) -> float:
    """The factor on the learning rate at an optimizer step: a linear rise, then half a cosine.

    Args:
        step: the step, from 0.
        steps: number of steps in all.
        warmup_share: share of them over which the factor rises.

    Returns:
        The factor, 0 to 1; the last step of the rise has 1.

    Example:
        >>> [round(cosine_with_warmup(i, steps=4, warmup_share=0.5), 2) for i in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rise = round(steps * warmup_share)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _named(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _check(
    image_size: int,
    image_width: int,
    text_width: int,
    text_heads: int,
    alignment: str,
    warmup_share: float,
) -> None:
    if image_size < 8 or image_size & (image_size - 1):
        raise ValueError(f"`image_size` must be a power of 2, at least 8, got {image_size}.")
    if image_width < 8 or image_width % 8:
        raise ValueError(f"`image_width` must be a multiple of 8, got {image_width}.")
    if text_heads < 1 or text_width % text_heads:
        raise ValueError(
            f"`text_heads` must divide `text_width`, got {text_heads} and {text_width}."
        )
    if alignment not in _ALIGNMENTS:
        raise ValueError(f"`alignment` must be one of {_ALIGNMENTS}, got {alignment!r}.")
    if not 0 <= warmup_share <= 1:
        raise ValueError(f"`warmup_share` must be between 0 and 1, got {warmup_share}.")
