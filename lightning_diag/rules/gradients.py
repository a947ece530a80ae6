"""Rules on gradients: do they arrive, everywhere, at a sane size?"""

from lightning_diag.rules.clipping_dominates import ClippingDominates, clipping_dominates
from lightning_diag.rules.dead_component import DeadComponent, dead_component
from lightning_diag.rules.exploding_gradient import ExplodingGradient, exploding_gradient
from lightning_diag.rules.gradient_imbalance import GradientImbalance, gradient_imbalance
from lightning_diag.rules.nonfinite_gradient import NonfiniteGradient, nonfinite_gradient
from lightning_diag.rules.vanishing_gradient import VanishingGradient, vanishing_gradient

__all__ = [
    "ClippingDominates",
    "DeadComponent",
    "ExplodingGradient",
    "GradientImbalance",
    "NonfiniteGradient",
    "VanishingGradient",
    "clipping_dominates",
    "dead_component",
    "exploding_gradient",
    "gradient_imbalance",
    "nonfinite_gradient",
    "vanishing_gradient",
]
