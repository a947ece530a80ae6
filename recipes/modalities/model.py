"""An encoder a view, a learned temperature, and the contrast between tuples of views."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_diag import param_groups
from lightning_diag.functional.contrastive import (
    NEGATIVES,
    SIMILARITIES,
    ContrastiveLoss,
    contrastive_loss,
    line_logits,
    mip_length,
    pairwise_loss,
    recall_at,
    safe_normalize,
)
from lightning_diag.lightning import LightningModule
from recipes.modalities.batches import Batch, check_at_least

__all__ = ["ACTIVATIONS", "PAIRWISE", "ViewContrast"]

PAIRWISE = "pairwise"
ACTIVATIONS = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
}
LENGTHS = ("unit", "mip", "free")


class ViewContrast(LightningModule):
    """Encodes each view by itself, so that views of one thing go together and others do not.

    Args:
        optimizer: makes the optimizer from parameters; None for AdamW with ``lr=2e-3``.
        component_lrs: component to factor on the optimizer's learning rate; None for one rate.
        view_sizes: numbers in each view, by name; None to ask the data module.
        similarity: ``mip``, ``norm``, ``leave_one_out`` or ``gram``, see `contrastive_loss`; or
            ``pairwise`` for CLIP's loss over all pairs.
        negatives: ``lines``, ``shuffle`` or ``full``; ``pairwise`` knows ``lines`` alone.
        length: of the features: ``unit``; ``mip``, the length at which the product of n views does
            not vanish (see `mip_length`); ``free``, as they come.
        features: length of the vectors that are compared.
        hidden: width of the encoders.
        layers: hidden layers; 0 for linear encoders.
        activation: ``gelu``, ``silu``, ``mish``, ``relu`` or ``leaky_relu``.
        dropout: share of numbers dropped in training, 0 to 1.
        temperature: what similarities are divided by at first; it is learned.
        max_logit_scale: largest factor on similarities.
        seed: of the tuples that ``shuffle`` draws.

    Raises:
        ValueError: an argument breaks a rule.

    Logs:
        At every step ``train_loss`` (at chance the logarithm of the batch size),
        ``train_accuracy``, ``train_spread`` (of the scaled logits; far below 1 the softmax is
        uniform) and ``logit_scale``. For validation (``val_``) and test (``test_``): ``loss``, and,
        over the things of a gallery, ``recall_1`` and ``recall_5``: how often the right one is
        found, or is among five, when one view is looked for by all the others; a mean over the
        views, and ``recall_1_<view>`` by view. ``recall_1_chance`` is what guessing finds.
    """

    def __init__(
        self,
        *,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        component_lrs: Mapping[str, float] | None = None,
        view_sizes: Mapping[str, int] | None = None,
        similarity: str = "norm",
        negatives: str = "lines",
        length: str = "unit",
        features: int = 64,
        hidden: int = 128,
        layers: int = 2,
        activation: str = "gelu",
        dropout: float = 0.0,
        temperature: float = 0.07,
        max_logit_scale: float = 100.0,
        seed: int = 42,
    ) -> None:
        super().__init__()
        _check_choice("similarity", similarity, (*SIMILARITIES, PAIRWISE))
        _check_choice("negatives", negatives, NEGATIVES)
        _check_choice("length", length, LENGTHS)
        _check_choice("activation", activation, tuple(ACTIVATIONS))
        check_at_least(1, features=features, hidden=hidden)
        check_at_least(0, layers=layers)
        if similarity == PAIRWISE and negatives != "lines":
            raise ValueError(f'`negatives` must be "lines" with "pairwise", got {negatives!r}.')
        if not 0 < 1 / max_logit_scale <= temperature:
            raise ValueError(
                "`temperature` must be at least 1 / `max_logit_scale`, and both above 0, got "
                f"{temperature} and {max_logit_scale}."
            )
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer = optimizer or partial(AdamW, lr=2e-3)
        self.component_lrs = component_lrs
        self.similarity = similarity
        self.negatives = negatives
        self.length = length
        self.seed = seed
        self.make_encoder = partial(
            _encoder,
            features=features,
            hidden=hidden,
            layers=layers,
            activation=activation,
            dropout=dropout,
        )
        self.encoders = nn.ModuleDict()
        self.temperature = Temperature(temperature, max_logit_scale)
        if view_sizes is not None:
            self._build(view_sizes)

    def setup(self, stage: str) -> None:
        if not self.encoders:
            sizes = getattr(getattr(self.trainer, "datamodule", None), "view_sizes", None)
            if not sizes:
                raise ValueError(
                    "`view_sizes` must be given where the data module has none, got None."
                )
            self._build(sizes)
            # so that a checkpoint can be loaded without the data
            self.hparams["view_sizes"] = dict(sizes)

    def forward(self, views: Iterable[Tensor]) -> list[Tensor]:
        """Features of each view, ``(batch, features)``, in single precision and of their length."""
        encoded = [
            encoder(view).float()
            for encoder, view in zip(self.encoders.values(), views, strict=True)
        ]
        if self.length == "free":
            return encoded
        radius = mip_length(len(encoded), encoded[0].shape[1]) if self.length == "mip" else 1.0
        return [radius * safe_normalize(one) for one in encoded]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        found = self._contrast(self(batch.views), batch_idx)
        size = len(batch.label)
        self.log("train_loss", found.loss, batch_size=size, prog_bar=True)
        self.log("train_accuracy", found.accuracy.mean(), batch_size=size)
        self.log("train_spread", found.spread.mean(), batch_size=size)
        self.log("logit_scale", self.temperature().detach(), batch_size=size)
        return found.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

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
        scheduler = {"scheduler": CosineAnnealingLR(optimizer, int(steps)), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _contrast(self, encoded: list[Tensor], batch_idx: int) -> ContrastiveLoss:
        scale = self.temperature()
        if self.similarity == PAIRWISE:
            return pairwise_loss(encoded, logit_scale=scale)
        generator = None
        if self.negatives == "shuffle":
            # of step and batch, so that a resumed run draws what it would have drawn
            draw = (self.seed * 1_000_003 + self.global_step) * 1_009 + batch_idx
            generator = torch.Generator().manual_seed(draw % (1 << 63))
        return contrastive_loss(
            encoded,
            similarity=self.similarity,
            negatives=self.negatives,
            logit_scale=scale,
            generator=generator,
        )

    def _evaluate(self, batch: Batch, batch_idx: int, stage: str) -> None:
        encoded = self(batch.views)
        size = len(batch.label)
        if self.similarity == PAIRWISE:
            loss = pairwise_loss(encoded, logit_scale=self.temperature()).loss
            # sorts as the sum of cosines does
            logits = line_logits([safe_normalize(one) for one in encoded], "norm")
        else:
            loss = self._contrast(encoded, batch_idx).loss
            logits = line_logits(encoded, self.similarity)
        first = recall_at(logits, 1)
        named = zip(self.encoders, first, strict=True)
        numbers = {
            "loss": loss,
            "recall_1": first.mean(),
            "recall_5": recall_at(logits, 5).mean(),
            "recall_1_chance": 1 / size,
            **{f"recall_1_{name}": one for name, one in named},
        }
        for name, number in numbers.items():
            shown = stage == "val" and name in ("loss", "recall_1")
            self.log(f"{stage}_{name}", number, batch_size=size, sync_dist=True, prog_bar=shown)

    def _build(self, view_sizes: Mapping[str, int]) -> None:
        if len(view_sizes) < 2:
            raise ValueError(f"`view_sizes` must name at least 2 views, got {dict(view_sizes)}.")
        for name, size in view_sizes.items():
            # names of files are free, those of modules are not
            key = re.sub(r"\W", "_", name)
            key += "_view" if hasattr(self.encoders, key) else ""
            self.encoders[key] = self.make_encoder(size)


class Temperature(nn.Module):
    """The factor on similarities, learned as its logarithm and never above a maximum.

    Args:
        temperature: one over the factor, at first.
        max_logit_scale: the largest factor.
    """

    def __init__(self, temperature: float, max_logit_scale: float) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.highest = math.log(max_logit_scale)

    def forward(self) -> Tensor:
        return self.logit_scale.clamp(max=self.highest).exp()

    def diagnostics(self) -> dict[str, Tensor]:
        """The factor, for `ComponentProfiler`."""
        return {"logit_scale": self()}


def _encoder(
    size: int, *, features: int, hidden: int, layers: int, activation: str, dropout: float
) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(size, hidden), ACTIVATIONS[activation](), nn.Dropout(dropout)]
        size = hidden
    return nn.Sequential(*parts, nn.Linear(size, features))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
