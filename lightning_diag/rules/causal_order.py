"""Which of two findings that began together comes first: what is wired, set, inside, and seen."""

__all__ = ["CAUSAL_ORDER", "place"]

CAUSAL_ORDER: tuple[str, ...] = (
    # data and wiring
    *("nonfinite_data", "input_scale", "loss_target_mismatch", "double_softmax", "wrong_reduction"),
    *("missing_zero_grad", "detached_graph", "unoptimized_parameter", "frozen_in_optimizer"),
    *("eval_mode_in_training", "tied_weight_broken", "replica_drift"),
    # settings
    *("scheduler_misuse", "learning_rate_too_high", "clipping_dominates"),
    # gradients and steps that are too large
    *("exploding_gradient", "update_too_large"),
    # insides
    *("dead_relu", "saturated_activation", "attention_collapse", "attention_sink"),
    # gradients that do not arrive
    *("unused_parameter", "dead_component", "vanishing_gradient", "gradient_imbalance"),
    # what is the same for all samples
    *("representation_collapse", "attention_uniform"),
    # steps that are too small
    *("learning_rate_too_low", "frozen_weights", "update_too_small"),
    # what all of them end in
    *("constant_prediction", "nonfinite_loss", "nonfinite_gradient", "divergence"),
    *("not_learning", "loss_oscillation", "loss_spike", "loss_plateau", "slow_convergence"),
    "overfitting",
    # the machine
    *("memory_growth", "input_bound", "gpu_underused"),
)
"""All rules. An earlier one explains a later one that began at the same step or after it, where it
lists it in ``explains``; a later one explains an earlier one only if it began before it."""

_PLACES = {rule: number for number, rule in enumerate(CAUSAL_ORDER)}


def place(rule: str) -> int:
    """Where a rule stands in the order; one that is not in it stands last."""
    return _PLACES.get(rule, len(_PLACES))
