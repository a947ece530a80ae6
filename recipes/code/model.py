"""What the models of the recipe share (loss, metrics, learning rate), and the transformer."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryF1Score,
    BinaryPrecision,
    BinaryRecall,
)

from lightning_diag import param_groups
from lightning_diag.lightning import LightningModule
from recipes.code.batches import Batch
from recipes.code.network import ACTIVATIONS, Encoder, Head, StatementEmbedding, scale_weights

__all__ = ["CodeClassifier", "CodeTransformer", "warmup_cosine"]


class CodeClassifier(LightningModule):
    """What every model of this recipe has in common: steps, metrics, optimizer, learning rate.

    A model says in ``forward`` how a batch becomes two logits a function. The loss is cross-entropy
    with the class weights of the data module. The learning rate rises linearly over the first
    optimizer steps and falls to zero as a cosine.

    Args:
        optimizer: makes the optimizer from parameters; None for AdamW with ``lr=2e-3``.
        component_lrs: component to factor on the optimizer's learning rate, as
            ``{"encoder": 0.1}``; None for one rate throughout.
        components: the parts that `component_lrs` speaks of, name to globs; None for the
            top-level children.
        warmup_share: share of the optimizer steps over which the learning rate rises, 0 to 1.

    Logs:
        ``train_loss`` at every step. For validation (``val_``) and test (``test_``), by epoch:
        ``loss``, ``f1``, ``precision``, ``recall``, ``accuracy``, ``auc``; and, for the embedded
        corpus, ``auc_within_injected``: the AUC over the functions that something was planted in.
        It is .5 for a model that has only learnt whether something was planted.
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None,
        component_lrs: Mapping[str, float | None] | None,
        warmup_share: float,
        components: Mapping[str, str | Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_share <= 1:
            raise ValueError(f"`warmup_share` must be between 0 and 1, got {warmup_share}.")
        self.optimizer = optimizer or partial(AdamW, lr=2e-3)
        self.component_lrs = component_lrs
        self.components = components
        self.warmup_share = warmup_share
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.ones(2))
        self.val_scores = _scores("val_")
        self.test_scores = _scores("test_")
        self.val_auc_within_injected = BinaryAUROC()
        self.test_auc_within_injected = BinaryAUROC()

    def setup(self, stage: str) -> None:
        weights = getattr(getattr(self.trainer, "datamodule", None), "class_weights", None)
        if weights is not None:
            self.class_weights.copy_(torch.tensor(weights))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch)
        loss = self.loss(logits, batch.target)
        self.log("train_loss", loss, batch_size=len(batch.target), prog_bar=True)
        return {"loss": loss, "logits": logits.detach(), "target": batch.target}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val", self.val_scores, self.val_auc_within_injected)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test", self.test_scores, self.test_auc_within_injected)

    def on_train_end(self) -> None:
        within = self.trainer.callback_metrics.get("val_auc_within_injected")
        if within is not None and self.trainer.is_global_zero:
            # the module's own print is silent once the progress bar has closed
            print(
                f"\nAUC within injected {within:.3f} (validation); it is .500 for a model that has "
                "only learnt whether something was injected."
            )

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        optimizer = self.optimizer(self.parameters())
        if self.component_lrs:
            base_lr = optimizer.defaults["lr"]
            optimizer = self.optimizer(self.parameter_groups(base_lr))
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "`max_epochs` or `max_steps` must be given, since the learning rate falls to zero "
                "at the last step; both are unlimited."
            )
        factor = partial(warmup_cosine, steps=int(steps), warmup_share=self.warmup_share)
        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def parameter_groups(self, base_lr: float) -> list[dict[str, object]]:
        """Groups for an optimizer, with the learning rates of `component_lrs` at this base.

        Raises:
            ValueError: if `component_lrs` names what is no component of the model.
        """
        lrs = self.component_lrs or {}
        return param_groups(self, lrs, base_lr=base_lr, components=self.components)

    def _evaluate(
        self, batch: Batch, stage: str, scores: MetricCollection, within: BinaryAUROC
    ) -> dict[str, Tensor]:
        logits = self(batch)
        loss = self.loss(logits, batch.target)
        probability = logits.float().softmax(dim=-1)[:, 1]
        scores.update(probability, batch.target)
        size = len(batch.target)
        self.log(f"{stage}_loss", loss, batch_size=size, sync_dist=True, prog_bar=stage == "val")
        self.log_dict(cast("dict[str, Any]", scores), batch_size=size)
        if batch.injected is not None:
            within.update(probability[batch.injected], batch.target[batch.injected])
            self.log(f"{stage}_auc_within_injected", within, batch_size=size)
        return {"loss": loss, "logits": logits, "target": batch.target}

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean loss of logits ``(batch, 2)`` against classes ``(batch,)``."""
        return F.cross_entropy(logits.float(), target, weight=self.class_weights)


class CodeTransformer(CodeClassifier):
    """Says whether a function is vulnerable: `embedding`, pre-norm `encoder`, `head`.

    Loss, learning rate and what is logged are those of `CodeClassifier`.

    Args:
        optimizer: makes the optimizer from parameters; None for AdamW with ``lr=2e-3``.
        component_lrs: component to factor on the optimizer's learning rate, as
            ``{"encoder": 0.1}``; None for one rate throughout.
        components: the parts that `component_lrs` speaks of, name to globs; None for `embedding`,
            `encoder` and `head`.
        vocabulary_size: number of token ids, as in the data module.
        width: length of the vectors.
        layers: number of blocks.
        heads: attention heads in each, at least 2.
        dropout: share of numbers dropped in training, 0 to 1.
        name_bias: extra attention score, at the start, between lines that share a name; None for
            a plain transformer.
        max_columns: places in a line that are told apart.
        max_statements: lines that are told apart.
        warmup_share: share of the optimizer steps over which the learning rate rises, 0 to 1.
        activation: of the feed-forward nets: ``gelu``, ``silu``, ``relu``, ``leaky_relu`` or
            ``tanh``.
        init_scale: what the weights of linear layers are multiplied by at the start.
    """

    def __init__(
        self,
        *,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        component_lrs: Mapping[str, float | None] | None = None,
        components: Mapping[str, str | Sequence[str]] | None = None,
        vocabulary_size: int = 8192,
        width: int = 64,
        layers: int = 6,
        heads: int = 4,
        dropout: float = 0.1,
        name_bias: float | None = 4.0,
        max_columns: int = 24,
        max_statements: int = 512,
        warmup_share: float = 0.1,
        activation: str = "gelu",
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(optimizer, component_lrs, warmup_share, components)
        _check(width, heads, layers)
        _check_start(activation, init_scale)
        self.save_hyperparameters(ignore=["optimizer"])
        self.embedding = StatementEmbedding(
            vocabulary_size, width, max_columns, max_statements, dropout
        )
        self.encoder = Encoder(width, layers, heads, dropout, name_bias, activation)
        self.head = Head(width)
        scale_weights(self, init_scale)
        self.parameter_groups(1.0)  # names a component that does not exist before data are made

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``(batch, 2)`` of safe and vulnerable."""
        encoded = self.encoder(self.embedding(batch), batch)
        logits: Tensor = self.head(encoded, batch.filled)
        return logits


def warmup_cosine(step: int, *, steps: int, warmup_share: float) -> float:
    """The factor on the learning rate at an optimizer step: a linear rise, then half a cosine.

    Args:
        step: the step, from 0.
        steps: number of steps in all.
        warmup_share: share of them over which the factor rises.

    Returns:
        The factor, 0 to 1; the last step of the rise has 1.

    Example:
        >>> [round(warmup_cosine(i, steps=4, warmup_share=0.5), 2) for i in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = round(steps * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _scores(prefix: str) -> MetricCollection:
    return MetricCollection(
        {
            "f1": BinaryF1Score(),
            "precision": BinaryPrecision(),
            "recall": BinaryRecall(),
            "accuracy": BinaryAccuracy(),
            "auc": BinaryAUROC(),
        },
        prefix=prefix,
    )


def _check(width: int, heads: int, layers: int) -> None:
    if heads < 2 or width % heads:
        raise ValueError(f"`heads` must be at least 2 and divide `width`, got {heads} and {width}.")
    if layers < 1:
        raise ValueError(f"`layers` must be at least 1, got {layers}.")


def _check_start(activation: str, init_scale: float) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {tuple(ACTIVATIONS)}, got {activation!r}.")
    if not 0 < init_scale < math.inf:
        raise ValueError(f"`init_scale` must be positive and finite, got {init_scale}.")
