"""Rules on losses: does the loss go where it should?"""

from lightning_diag.rules.divergence import Divergence, divergence
from lightning_diag.rules.loss_oscillation import LossOscillation, loss_oscillation
from lightning_diag.rules.loss_plateau import LossPlateau, loss_plateau
from lightning_diag.rules.loss_spike import LossSpike, loss_spike
from lightning_diag.rules.nonfinite_loss import NonfiniteLoss, nonfinite_loss
from lightning_diag.rules.not_learning import (
    NotLearning,
    SlowConvergence,
    not_learning,
    slow_convergence,
)
from lightning_diag.rules.overfitting import Overfitting, overfitting

__all__ = [
    "Divergence",
    "LossOscillation",
    "LossPlateau",
    "LossSpike",
    "NonfiniteLoss",
    "NotLearning",
    "Overfitting",
    "SlowConvergence",
    "divergence",
    "loss_oscillation",
    "loss_plateau",
    "loss_spike",
    "nonfinite_loss",
    "not_learning",
    "overfitting",
    "slow_convergence",
]
