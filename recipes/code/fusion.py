"""The fusion: a trained transformer and a trained graph network give one verdict together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recipes.code.batches import Batch
from recipes.code.branches import Branch, load_branch
from recipes.code.gnn import CodeGNN
from recipes.code.model import CodeClassifier, CodeTransformer

__all__ = ["FACTORS", "CodeFusion", "LogitFusion"]

FACTORS = {"transformer": 0.1, "gnn": 0.5, "fusion": 1.0}
"""Learning rates of branches that train on, as shares of the optimizer's."""


class LogitFusion(nn.Module):
    """Two pairs of logits become one: half a weighted mean of both, half a small net on all four.

    Formula: ``(a t + (1 - a) g) / 2 + net([t, g]) / 2``, where ``a`` is the sigmoid of one learned
    number and .5 at the start.

    Args:
        hidden: units of the net.
        dropout: share of them dropped in training.
    """

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(()))
        self.net = nn.Sequential(
            nn.Linear(4, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 2)
        )

    @property
    def transformer_share(self) -> Tensor:
        """Weight of the transformer in the mean, 0 to 1."""
        return self.mix.sigmoid()

    def forward(self, transformer: Tensor, gnn: Tensor) -> Tensor:
        """Fuse logits ``(batch, 2)`` and ``(batch, 2)``."""
        share = self.transformer_share
        mean = share * transformer + (1 - share) * gnn
        fused: Tensor = (mean + self.net(torch.cat([transformer, gnn], dim=1))) / 2
        return fused


class CodeFusion(CodeClassifier):
    """A `transformer` and a `gnn` from runs of the same seed, and the `fusion` of their logits.

    What is fused are the two logits of each branch, as in the reference system: the few numbers of
    `LogitFusion` cannot learn the training split by heart a third time, and how far each branch is
    trusted can be read off one of them. The branches have seen these training functions, though,
    and are surer of them than of others.

    Loss, learning rate and what is logged are those of `CodeClassifier`; besides, by epoch,
    ``transformer_share``, the weight of the transformer in the mean.

    Args:
        transformer_run: folder of a run of `CodeTransformer`.
        gnn_run: folder of a run of `CodeGNN`.
        optimizer: makes the optimizer from parameters; None for AdamW with ``lr=2e-3``.
        component_lrs: component to factor on the optimizer's learning rate; None for 0.1 on
            ``transformer``, 0.5 on ``gnn`` and 1.0 on ``fusion``. Only where the branches train.
        components: the parts that `component_lrs` speaks of, name to globs; None for
            `transformer`, `gnn` and `fusion`.
        seed: the seed of this run, which both branches must share.
        vocabulary_size: number of token ids, as in the data module and in both branches.
        branches: ``discriminative``: they train on, with learning rates of their own; ``frozen``:
            they stay as they are, in evaluation mode and without gradients.
        hidden: units of the net that fuses.
        dropout: share of them dropped in training, 0 to 1.
        warmup_share: share of the optimizer steps over which the learning rate rises, 0 to 1.

    Raises:
        FileNotFoundError: a run has no best checkpoint.
        ValueError: an argument breaks a rule, or the runs do not belong together.
    """

    def __init__(
        self,
        *,
        transformer_run: str,
        gnn_run: str,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        component_lrs: Mapping[str, float | None] | None = None,
        components: Mapping[str, str | Sequence[str]] | None = None,
        seed: int = 42,
        vocabulary_size: int = 8192,
        branches: str = "discriminative",
        hidden: int = 16,
        dropout: float = 0.1,
        warmup_share: float = 0.1,
    ) -> None:
        _check(branches, component_lrs)
        trains = branches == "discriminative"
        # groups by component leave out what is frozen
        factors = FACTORS if trains else {"fusion": 1.0}
        given = (component_lrs, components) if component_lrs is not None else (factors, None)
        super().__init__(optimizer, given[0], warmup_share, given[1])
        self.save_hyperparameters(ignore=["optimizer"])
        self.branches = branches
        self.transformer, one = load_branch(
            CodeTransformer, transformer_run, argument="transformer_run", seed=seed
        )
        self.gnn, two = load_branch(CodeGNN, gnn_run, argument="gnn_run", seed=seed)
        self.sources = {"transformer_run": one, "gnn_run": two}
        _check_vocabulary(self.sources, vocabulary_size)
        self.fusion = LogitFusion(hidden, dropout)
        self.transformer.requires_grad_(trains)
        self.gnn.requires_grad_(trains)
        self.train()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(getattr(self.trainer, "datamodule", None), "fingerprint", None)
        for argument, source in self.sources.items():
            if data and source.data and source.data != data:
                raise ValueError(
                    f"`{argument}` must be a run on the same data, {source.folder} saw "
                    f"{source.data}, got {data}."
                )

    def train(self, mode: bool = True) -> "CodeFusion":
        super().train(mode)
        if self.branches == "frozen":
            self.transformer.eval()
            self.gnn.eval()
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``(batch, 2)`` of safe and vulnerable."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.branches != "frozen"):
            pair = self.transformer(batch), self.gnn(batch)
        fused: Tensor = self.fusion(*pair)
        return fused

    def on_fit_start(self) -> None:
        if self.trainer.is_global_zero:
            print(_SAID[self.branches])

    def on_validation_epoch_end(self) -> None:
        self.log("transformer_share", self.fusion.transformer_share.detach())


_SAID = {
    "frozen": "The branches are frozen: the fusion alone trains.",
    "discriminative": "The branches train on, at learning rates of their own.",
}


def _check(branches: str, component_lrs: object) -> None:
    if branches not in _SAID:
        raise ValueError(f"`branches` must be one of {tuple(_SAID)}, got {branches!r}.")
    if branches == "frozen" and component_lrs is not None:
        raise ValueError(
            "`component_lrs` must be null where `branches` is frozen, since what does not train "
            f"has no learning rate, got {component_lrs}."
        )


def _check_vocabulary(sources: Mapping[str, Branch], vocabulary_size: int) -> None:
    for argument, source in sources.items():
        found = source.hyperparameters.get("vocabulary_size")
        if found != vocabulary_size:
            raise ValueError(
                f"`{argument}` must be a run with a vocabulary of {vocabulary_size} tokens, as the "
                f"data have, got {found} in {source.folder}."
            )
