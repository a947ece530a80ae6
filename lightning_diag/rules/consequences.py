"""What several causes bring about alike, in two words: training stands still, or it shakes."""

__all__ = ["STANDSTILL", "TURMOIL"]

STANDSTILL = (
    "not_learning",
    "slow_convergence",
    "loss_plateau",
    "constant_prediction",
    "update_too_small",
    "frozen_weights",
    "learning_rate_too_low",
)
"""Rules whose findings follow where a model, or a part of it, learns too little or nothing."""

TURMOIL = (
    "update_too_large",
    "learning_rate_too_high",
    "exploding_gradient",
    "clipping_dominates",
    "loss_spike",
    "loss_oscillation",
    "divergence",
    "nonfinite_gradient",
    "nonfinite_loss",
)
"""Rules whose findings follow where steps or gradients are too large."""
