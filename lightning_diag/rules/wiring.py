"""Rules on wiring: is everything connected that should be?"""

from lightning_diag.rules.wiring_data import (
    InputScale,
    NonfiniteData,
    input_scale,
    nonfinite_data,
)
from lightning_diag.rules.wiring_graph import (
    DetachedGraph,
    EvalModeInTraining,
    MissingZeroGrad,
    ReplicaDrift,
    TiedWeightBroken,
    detached_graph,
    eval_mode_in_training,
    missing_zero_grad,
    replica_drift,
    tied_weight_broken,
)
from lightning_diag.rules.wiring_losses import (
    DoubleSoftmax,
    LossTargetMismatch,
    WrongReduction,
    double_softmax,
    loss_target_mismatch,
    wrong_reduction,
)
from lightning_diag.rules.wiring_parameters import (
    FrozenInOptimizer,
    FrozenWeights,
    UnoptimizedParameter,
    UnusedParameter,
    frozen_in_optimizer,
    frozen_weights,
    unoptimized_parameter,
    unused_parameter,
)

__all__ = [
    "DetachedGraph",
    "DoubleSoftmax",
    "EvalModeInTraining",
    "FrozenInOptimizer",
    "FrozenWeights",
    "InputScale",
    "LossTargetMismatch",
    "MissingZeroGrad",
    "NonfiniteData",
    "ReplicaDrift",
    "TiedWeightBroken",
    "UnoptimizedParameter",
    "UnusedParameter",
    "WrongReduction",
    "detached_graph",
    "double_softmax",
    "eval_mode_in_training",
    "frozen_in_optimizer",
    "frozen_weights",
    "input_scale",
    "loss_target_mismatch",
    "missing_zero_grad",
    "nonfinite_data",
    "replica_drift",
    "tied_weight_broken",
    "unoptimized_parameter",
    "unused_parameter",
    "wrong_reduction",
]
