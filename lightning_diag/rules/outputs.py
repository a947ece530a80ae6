"""Rules on outputs and what is inside: do units live, and do samples stay apart?"""

from lightning_diag.rules.constant_prediction import ConstantPrediction, constant_prediction
from lightning_diag.rules.dead_relu import DeadRelu, dead_relu
from lightning_diag.rules.representation_collapse import (
    RepresentationCollapse,
    representation_collapse,
)
from lightning_diag.rules.saturated_activation import SaturatedActivation, saturated_activation

__all__ = [
    "ConstantPrediction",
    "DeadRelu",
    "RepresentationCollapse",
    "SaturatedActivation",
    "constant_prediction",
    "dead_relu",
    "representation_collapse",
    "saturated_activation",
]
