"""The two-layer net as a LightningModule: forward, losses, learning rate."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_diag import param_groups
from lightning_diag.lightning import LightningModule
from recipes.denoiser.losses import DenoisingLoss, check_loss, denoising_loss
from recipes.denoiser.stream import Batch

__all__ = ["SCHEDULES", "TwoLayerNet", "lr_factor"]

SCHEDULES = ("constant", "cosine")


class TwoLayerNet(LightningModule):
    r"""Takes the noise off a vector with one hidden layer whose activation is a cubed tanh.

    .. math::
        y = W_\text{dec} \tanh(W_\text{enc} x + b)^3 + b'

    `fc1` is the encoder and `fc2` the decoder. For hidden unit i and feature j,
    ``fc1.weight[i, j]`` and ``fc2.weight[j, i]`` are a pair.

    Args:
        optimizer: makes the optimizer from parameters; None for Adam with ``lr=0.02``.
        component_lrs: component to factor on the optimizer's learning rate; None for one rate.
        features: length of a vector, as in the data module.
        hidden: hidden units.
        encoder_scale: of the encoder's first weights, in those of Xavier's normal ones.
        decoder_scale: the same for the decoder.
        loss: ``scaled``, ``lp`` or ``logistic``, see `recipes.denoiser.losses.denoising_loss`.
        lambda_on: weight of errors where the clean vector is not zero.
        lambda_off: weight of errors where it is.
        power: p of ``lp``.
        lambda_encoder: factor on the sum of the encoder's squared weights in the loss, without
            biases.
        lambda_decoder: the same for the decoder.
        schedule: of the learning rate: ``constant``, or ``cosine`` for half a cosine.
        warmup_share: share of the optimizer steps over which the learning rate rises, 0 to 1.
        final_share: share of the learning rate that ``cosine`` ends with, 0 to 1.

    Raises:
        ValueError: an argument breaks a rule.

    Logs:
        At every step ``train_loss``; ``train_scaled_loss``, which is the loss without the squared
        weights; ``train_loss_on`` and ``train_loss_off``, its two parts without `lambda_on` and
        `lambda_off`. For validation the same with ``val_``, and ``val_floor``: what
        ``val_scaled_loss`` would be if the net returned zeros.
    """

    def __init__(
        self,
        *,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        component_lrs: Mapping[str, float] | None = None,
        features: int = 1024,
        hidden: int = 512,
        encoder_scale: float = 0.03,
        decoder_scale: float = 0.03,
        loss: str = "scaled",
        lambda_on: float = 16.0,
        lambda_off: float = 1.0,
        power: float = 2.0,
        lambda_encoder: float = 0.0,
        lambda_decoder: float = 0.03,
        schedule: str = "constant",
        warmup_share: float = 0.0,
        final_share: float = 0.01,
    ) -> None:
        super().__init__()
        for name, value in (("features", features), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name, number in (
            ("encoder_scale", encoder_scale),
            ("decoder_scale", decoder_scale),
            ("lambda_encoder", lambda_encoder),
            ("lambda_decoder", lambda_decoder),
        ):
            if not 0 <= number < math.inf:
                raise ValueError(f"`{name}` must be at least 0, got {number}.")
        for name, number in (("warmup_share", warmup_share), ("final_share", final_share)):
            if not 0 <= number <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {number}.")
        if schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {SCHEDULES}, got {schedule!r}.")
        check_loss(loss, lambda_on, lambda_off, power)
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer = optimizer or partial(Adam, lr=0.02)
        self.component_lrs = component_lrs
        self.lambda_encoder = lambda_encoder
        self.lambda_decoder = lambda_decoder
        self.schedule = schedule
        self.warmup_share = warmup_share
        self.final_share = final_share
        self.measure = partial(
            denoising_loss, loss=loss, lambda_on=lambda_on, lambda_off=lambda_off, power=power
        )
        self.fc1 = nn.Linear(features, hidden)
        self.tanh = nn.Tanh()
        self.fc2 = nn.Linear(hidden, features)
        for layer, scale in ((self.fc1, encoder_scale), (self.fc2, decoder_scale)):
            nn.init.xavier_normal_(layer.weight, gain=scale)
            nn.init.zeros_(layer.bias)

    def forward(self, noisy: Tensor) -> Tensor:
        """Vectors without their noise, ``(batch, features)``."""
        denoised: Tensor = self.fc2(self.tanh(self.fc1(noisy)) ** 3)
        return denoised

    def penalty(self) -> Tensor:
        """The squared weights of both layers, each with its factor, ``()``."""
        encoder, decoder = self.fc1.weight.square().sum(), self.fc2.weight.square().sum()
        return self.lambda_encoder * encoder + self.lambda_decoder * decoder

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        found = self.measure(self(batch.noisy), batch.clean)
        loss = found.scaled + self.penalty()
        size = len(batch.clean)
        self.log("train_loss", loss, batch_size=size, prog_bar=True)
        self.log_dict(_named("train", found), batch_size=size)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        found = self.measure(self(batch.noisy), batch.clean)
        logged = {
            "val_loss": found.scaled + self.penalty(),
            "val_floor": self.measure(torch.zeros_like(batch.clean), batch.clean).scaled,
            **_named("val", found),
        }
        self.log_dict(logged, batch_size=len(batch.clean), sync_dist=True)

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        optimizer = self.optimizer(self.parameters())
        if self.component_lrs:
            base_lr = optimizer.defaults["lr"]
            optimizer = self.optimizer(param_groups(self, self.component_lrs, base_lr=base_lr))
        if self.schedule == "constant" and not self.warmup_share:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "`max_epochs` or `max_steps` must be given, since the learning rate follows the "
                "share of the training that is done; both are unlimited."
            )
        factor = partial(
            lr_factor,
            steps=int(steps),
            schedule=self.schedule,
            warmup_share=self.warmup_share,
            final_share=self.final_share,
        )
        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def lr_factor(
    step: int, *, steps: int, schedule: str, warmup_share: float, final_share: float
) -> float:
    """The factor on the learning rate at an optimizer step: a linear rise, then the schedule.

    Args:
        step: the step, from 0.
        steps: number of steps in all.
        schedule: ``constant`` or ``cosine``.
        warmup_share: share of them over which the factor rises.
        final_share: where the cosine ends.

    Returns:
        The factor, 0 to 1; the last step of the rise has 1.

    Example:
        >>> named = {"steps": 4, "schedule": "cosine", "warmup_share": 0.5, "final_share": 0.2}
        >>> [round(lr_factor(i, **named), 2) for i in range(5)]
        [0.5, 1.0, 1.0, 0.6, 0.2]
    """
    rise = round(steps * warmup_share)
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - rise) / max(1, steps - rise))
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))


def _named(stage: str, found: DenoisingLoss) -> dict[str, Tensor]:
    return {
        f"{stage}_scaled_loss": found.scaled,
        f"{stage}_loss_on": found.on,
        f"{stage}_loss_off": found.off,
    }
