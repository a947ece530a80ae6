"""The forecaster as a LightningModule: eight components by name, loss, scores, learning rate."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_diag import param_groups
from lightning_diag.lightning import LightningModule
from recipes.drivers.data import SeriesData
from recipes.drivers.network import (
    CelestialToTargetAttention,
    Decoder,
    FusionCrossAttention,
    GraphCombiner,
    PatchingComposer,
    StochasticLearner,
)
from recipes.drivers.report import comparison
from recipes.drivers.scores import ForecastScores, Scores, drivers_found
from recipes.drivers.windows import Window

__all__ = ["DriversForecaster", "Forecast"]


class Forecast(NamedTuple):
    """What the forecaster says about a batch of windows.

    Attributes:
        future: The targets to come, ``(batch, horizon, targets)``.
        attention: From targets to bodies, ``(batch, heads, targets, bodies)``.
        divergence: Of the stochastic graph from its prior, a number, in nats an edge.
    """

    future: Tensor
    attention: Tensor
    divergence: Tensor


class DriversForecaster(LightningModule):
    """Foretells targets from their history and from bodies, of which each target chooses some.

    The loss is the mean squared error, plus `divergence_weight` times the divergence of the
    stochastic graph from its prior. The learning rate rises linearly over the first optimizer steps
    and falls to zero as a cosine.

    Args:
        optimizer: makes the optimizer from parameters; None for AdamW with ``lr=2e-3``.
        component_lrs: component to factor on the optimizer's learning rate; None for one rate.
        bodies: number of drivers, as in the data.
        features: numbers of each driver at a time, as in the data.
        targets: number of targets, as in the data.
        context: times that are seen, as in the data.
        horizon: times that are foretold, as in the data.
        patches: lengths of the patches, in times; the whole window always is one too.
        width: length of the vectors.
        fusion_heads: heads of the attention to patches.
        heads: heads of the attention to bodies; with one, its weights say what is used.
        dropout: share dropped in training, 0 to 1.
        noise: noise that values of bodies pass through in training, see
            `CelestialToTargetAttention`.
        edge_scale: extra score of an edge of the graph.
        expected_edges: edges a target, as the prior of the stochastic graph has it.
        divergence_weight: what the divergence counts in the loss.
        warmup_share: share of the optimizer steps over which the learning rate rises, 0 to 1.

    Logs:
        ``train_loss`` and ``train_mse`` at every step. For validation (``val_``) and test
        (``test_``), by epoch and in units of the training part's variance: ``loss``, ``mse``,
        ``r2`` and the last two by target (``r2_<target>``); beside them, as means over targets,
        ``r2_ridge_history``, ``r2_ridge_all``. Where the drivers are planted also
        ``r2_ridge_planted``, ``r2_ceiling``, ``attention_top1`` (share of targets whose main driver
        has the largest weight) and ``recall_at_3`` (share of planted drivers among the three
        largest weights).
    """

    def __init__(
        self,
        *,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        component_lrs: Mapping[str, float] | None = None,
        bodies: int = 13,
        features: int = 1,
        targets: int = 4,
        context: int = 96,
        horizon: int = 24,
        patches: Sequence[int] = (24, 48),
        width: int = 64,
        fusion_heads: int = 4,
        heads: int = 1,
        dropout: float = 0.1,
        noise: float = 0.2,
        edge_scale: float = 4.0,
        expected_edges: float = 3.0,
        divergence_weight: float = 0.002,
        warmup_share: float = 0.1,
    ) -> None:
        super().__init__()
        _check(width, {"fusion_heads": fusion_heads, "heads": heads}, context, patches, noise)
        if not 0 <= warmup_share <= 1:
            raise ValueError(f"`warmup_share` must be between 0 and 1, got {warmup_share}.")
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer = optimizer or partial(AdamW, lr=2e-3)
        self.component_lrs = component_lrs
        self.divergence_weight = divergence_weight
        self.warmup_share = warmup_share
        self.sizes = (bodies, features, targets, context, horizon)
        self.wave_patching_composer = PatchingComposer(bodies, features, context, patches, width)
        self.target_patching_composer = PatchingComposer(targets, 1, context, patches, width)
        self.fusion_cross_attention = FusionCrossAttention(width, fusion_heads, dropout)
        self.hierarchical_fusion_proj = nn.Linear(4 * width, width)
        self.stochastic_learner = StochasticLearner(targets, bodies, expected_edges)
        self.graph_combiner = GraphCombiner(targets, bodies, width)
        self.celestial_to_target_attention = CelestialToTargetAttention(
            targets, bodies, width, heads, edge_scale, noise
        )
        self.decoder = Decoder(width, horizon, dropout)
        self.val_scores = ForecastScores(targets, bodies)
        self.test_scores = ForecastScores(targets, bodies)
        self.latest: dict[str, Scores] = {}

    def setup(self, stage: str) -> None:
        data = self._data()
        if data is not None and (sizes := _sizes(data)) != self.sizes:
            raise ValueError(
                "`bodies`, `features`, `targets`, `context` and `horizon` must be those of the "
                f"data, {sizes}, got {self.sizes}."
            )

    def forward(self, batch: Window, hidden: Tensor | None = None) -> Forecast:
        """Foretell a batch of windows.

        Args:
            batch: The windows.
            hidden: Where a target must not look, ``(targets, bodies)``.
        """
        body = self._fused(self.wave_patching_composer(batch.drivers))
        target = self._fused(self.target_patching_composer(batch.history.unsqueeze(-1)))
        drawn, divergence = self.stochastic_learner(len(target))
        edges = self.graph_combiner(target, body, drawn)
        target, attention = self.celestial_to_target_attention(target, body, edges, hidden)
        return Forecast(self.decoder(target), attention, divergence)

    def training_step(self, batch: Window, batch_idx: int) -> dict[str, Tensor]:
        forecast = self(batch)
        mse = F.mse_loss(forecast.future.float(), batch.future)
        loss = mse + self.divergence_weight * forecast.divergence
        size = len(batch.future)
        self.log("train_loss", loss, batch_size=size, prog_bar=True)
        self.log("train_mse", mse, batch_size=size)
        return _outputs(loss, forecast, batch)

    def validation_step(self, batch: Window, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val", self.val_scores)

    def test_step(self, batch: Window, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test", self.test_scores)

    def on_validation_epoch_end(self) -> None:
        self._summarize("val", self.val_scores)

    def on_test_epoch_end(self) -> None:
        self._summarize("test", self.test_scores)

    def on_train_end(self) -> None:
        self._tell("val")

    def on_test_end(self) -> None:
        self._tell("test")

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
        factor = partial(_factor, steps=int(steps), warmup=round(steps * self.warmup_share))
        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _fused(self, tokens: Tensor) -> Tensor:
        fused: Tensor = self.hierarchical_fusion_proj(self.fusion_cross_attention(tokens))
        return fused

    def _evaluate(self, batch: Window, stage: str, metric: ForecastScores) -> dict[str, Tensor]:
        forecast = self(batch)
        mse = F.mse_loss(forecast.future.float(), batch.future)
        loss = mse + self.divergence_weight * forecast.divergence
        size = len(batch.future)
        self.log(f"{stage}_loss", loss, batch_size=size, sync_dist=True, prog_bar=stage == "val")
        metric.update(forecast.future, batch.future, forecast.attention)
        return _outputs(loss, forecast, batch)

    def _summarize(self, stage: str, metric: ForecastScores) -> None:
        scores = metric.scores()
        metric.reset()
        self.latest[stage] = scores
        data = self._data()
        names = [f"target_{m}" for m in range(len(scores.r2))]
        if data is not None and data.series is not None:
            names = list(data.series.target_names)
        values = {"mse": scores.mse.mean(), "r2": scores.r2.mean()}
        for m, name in enumerate(names):
            values |= {f"mse_{name}": scores.mse[m], f"r2_{name}": scores.r2[m]}
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()})
        if data is not None:
            self._compare(stage, data, scores)

    def _compare(self, stage: str, data: SeriesData, scores: Scores) -> None:
        beside = {}
        for name, r2 in data.baselines(stage).items():
            prefix = "r2_" if name == "ceiling" else "r2_ridge_"
            beside[f"{stage}_{prefix}{name}"] = float(r2.mean())
        if data.edges is not None:
            top1, recall = drivers_found(scores.attention, data.edges)
            beside |= {f"{stage}_attention_top1": top1, f"{stage}_recall_at_3": recall}
        self.log_dict(beside)

    def _tell(self, stage: str) -> None:
        data = self._data()
        if data is not None and stage in self.latest and self.trainer.is_global_zero:
            # the module's own print is silent once the progress bar has closed
            print(f"\n{comparison(stage, data, self.latest[stage])}")

    def _data(self) -> SeriesData | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, SeriesData) else None


def _outputs(loss: Tensor, forecast: Forecast, batch: Window) -> dict[str, Tensor]:
    predicted = forecast.future.detach().flatten(1)
    return {"loss": loss, "logits": predicted, "target": batch.future.flatten(1)}


def _factor(step: int, *, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _sizes(data: SeriesData) -> tuple[int, int, int, int, int]:
    window = data.parts["train"][0]
    context, bodies, features = window.drivers.shape
    horizon, targets = window.future.shape
    return bodies, features, targets, context, horizon


def _check(
    width: int, heads: Mapping[str, int], context: int, patches: Sequence[int], noise: float
) -> None:
    for name, count in heads.items():
        if count < 1 or width % count:
            raise ValueError(
                f"`{name}` must be at least 1 and divide `width`, got {count} and {width}."
            )
    if any(not 1 <= patch < context for patch in patches):
        raise ValueError(
            f"`patches` must be at least 1 and shorter than `context`, got {list(patches)} and "
            f"{context}."
        )
    if noise < 0:
        raise ValueError(f"`noise` must be at least 0, got {noise}.")
