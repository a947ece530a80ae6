"""Rules on updates and the learning rate: is each step neither too large nor too small?"""

from lightning_diag.rules.learning_rate_too_high import (
    LearningRateTooHigh,
    learning_rate_too_high,
)
from lightning_diag.rules.learning_rate_too_low import LearningRateTooLow, learning_rate_too_low
from lightning_diag.rules.scheduler_misuse import SchedulerMisuse, scheduler_misuse
from lightning_diag.rules.update_too_large import UpdateTooLarge, update_too_large
from lightning_diag.rules.update_too_small import UpdateTooSmall, update_too_small

__all__ = [
    "LearningRateTooHigh",
    "LearningRateTooLow",
    "SchedulerMisuse",
    "UpdateTooLarge",
    "UpdateTooSmall",
    "learning_rate_too_high",
    "learning_rate_too_low",
    "scheduler_misuse",
    "update_too_large",
    "update_too_small",
]
