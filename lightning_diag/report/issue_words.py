"""What is wrong, in words for people who do not know the rules."""

from lightning_diag.report.words import cut
from lightning_diag.rules.finding import Finding

__all__ = ["WORDS", "noted", "plainly", "since", "what_is_wrong"]

WORDS: dict[str, str] = {
    "vanishing_gradient": "hardly any gradient reaches {part}",
    "exploding_gradient": "the gradient of {part} explodes",
    "nonfinite_gradient": "the gradient of {part} is NaN or infinite",
    "dead_component": "{part} gets a gradient of exactly zero",
    "gradient_imbalance": "the gradient of {part} is out of proportion to the others",
    "clipping_dominates": "clipping cuts away nearly all of the gradient",
    "update_too_large": "each step changes {part} too much",
    "update_too_small": "steps hardly change {part}",
    "frozen_weights": "weights of {part} do not change",
    "learning_rate_too_high": "the learning rate is too high",
    "learning_rate_too_low": "the learning rate is too low",
    "scheduler_misuse": "the learning rate schedule does not fit the run",
    "nonfinite_loss": "the loss is NaN or infinite",
    "loss_spike": "the loss leaps up",
    "loss_oscillation": "the loss swings up and down",
    "loss_plateau": "the loss no longer falls",
    "not_learning": "the model does not learn",
    "slow_convergence": "the loss falls slowly",
    "divergence": "the loss rises and stays up",
    "overfitting": "the model learns its training data by heart",
    "constant_prediction": "the model gives every sample nearly the same answer",
    "dead_relu": "many units of {part} are switched off for good",
    "saturated_activation": "outputs of {part} are stuck at the ends of their range",
    "representation_collapse": "all samples look the same inside the model",
    "double_softmax": "softmax or sigmoid is applied twice",
    "attention_collapse": "attention heads of {part} look at a single position",
    "attention_uniform": "attention of {part} looks everywhere alike",
    "attention_sink": "attention of {part} looks at the first position alone",
    "unoptimized_parameter": "weights of {part} are in no optimizer",
    "frozen_in_optimizer": "frozen weights of {part} are moved by an optimizer",
    "unused_parameter": "weights of {part} get no gradient",
    "detached_graph": "no gradient can reach {part}: the graph is cut",
    "missing_zero_grad": "gradients of earlier steps are not cleared",
    "eval_mode_in_training": "{part} trains in evaluation mode",
    "tied_weight_broken": "weights that were one have come apart",
    "replica_drift": "the copies of the model on several devices differ",
    "nonfinite_data": "the data hold NaN or infinity",
    "input_scale": "the input of {part} is far too large or too small",
    "loss_target_mismatch": "the targets do not fit the loss",
    "wrong_reduction": "the loss is a sum where a mean is expected",
    "input_bound": "training waits for data",
    "memory_growth": "memory grows from step to step",
    "gpu_underused": "the GPU has little to do",
}
"""Rule id to a clause, in which ``{part}`` stands for the component."""

_LONG = 40  # characters of a name
_START = 1


def what_is_wrong(finding: Finding) -> str:
    """A clause without capital and full stop: ``the learning rate is too high``.

    The name of the component stands between backticks, as in all prose of ours.
    """
    name = None if finding.component is None else _name(finding.component)
    part = "the model" if name is None else f"`{name}`"
    words = WORDS.get(finding.rule)
    if words is None:
        known = finding.rule.replace("_", " ")
        return known if name is None else f"{known} in {part}"
    return words.replace("{part}", part)


def _name(component: str) -> str:
    """A name that fits a line, and can neither end a quotation nor steer a terminal."""
    shown = "".join(one if one.isprintable() else "?" for one in cut(component, _LONG))
    return shown.replace("`", "'")


def noted(finding: Finding) -> str:
    """Its message, with the part of the model in front where the message does not name it."""
    name = finding.component
    if name is None or name in finding.message:
        return finding.message
    return f"`{_name(name)}`: {finding.message}"


def plainly(words: str) -> str:
    """The same where no markup is shown: quotation marks tell a name from the words around it.

    Example:
        >>> plainly("hardly any gradient reaches `other`")
        "hardly any gradient reaches 'other'"
    """
    return words.replace("`", "'")


def since(finding: Finding, until: int | None = None) -> str:
    """When it was seen: ``since step 40``, ``from step 40 to 60``, ``from the start``.

    Args:
        finding: What was found.
        until: Last step of the run; what ended well before it has an end.
    """
    first, last = finding.first_step, finding.last_step
    if first is None:
        return ""
    if until is not None and last is not None and until - last > max(20, (until - first) // 5):
        return f"at step {first}" if last <= first else f"from step {first} to {last}"
    return "from the start" if first <= _START else f"since step {first}"
