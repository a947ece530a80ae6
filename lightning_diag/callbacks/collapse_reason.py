"""Why a run was stopped: as data, and in words."""

from typing import Any

from lightning_diag.callbacks.collapse_judge import Verdict
from lightning_diag.lightning import Trainer

__all__ = ["explained", "stop_reason"]

_WORDS = {
    "nonfinite_loss": "the loss is not finite",
    "nonfinite_gradient": "the gradient is not finite",
    "exploding_gradient": "the gradient norm is {observed:.3g}, more than {threshold:.3g}",
    "vanishing_gradient": "the gradient norm is {observed:.3g}, less than {threshold:.3g}",
    "loss_spike": "the loss is {observed:.3g}, more than {threshold:.3g}",
    "one_class": "a single class is predicted, though there are several labels",
    "constant_prediction": "the variance of predictions is {observed:.3g}, less than "
    "{threshold:.3g}",
}


def explained(verdict: Verdict) -> str:
    """A collapse in half a sentence."""
    causes = []
    for kind in verdict.kinds:
        observed, threshold = verdict.observed[kind]
        numbers = {"observed": observed or 0.0, "threshold": threshold or 0.0}
        causes.append(_WORDS[kind].format(**numbers))
    last = f"{verdict.streak} judged steps in a row up to step {verdict.step}"
    return f"the run has collapsed, {last} were events: {' and '.join(causes)}"


def stop_reason(trainer: Trainer, verdict: Verdict, **more: object) -> dict[str, Any]:
    """A stop as data.

    Args:
        trainer: The trainer that is to stop.
        verdict: The last judgement.
        **more: Further entries.

    Returns:
        ``rule`` (the most severe event), ``kinds``, ``step``, ``first_step``, ``observed``,
        ``threshold``, ``delayed_by``, ``message`` and the further entries.
    """
    observed, threshold = verdict.observed[verdict.kinds[0]]
    return {
        "rule": verdict.kinds[0],
        "kinds": list(verdict.kinds),
        "step": verdict.step,
        "first_step": verdict.first_step,
        "observed": observed,
        "threshold": threshold,
        "delayed_by": _delayed_by(trainer),
        "message": f"{explained(verdict)}.",
        **more,
    }


def _delayed_by(trainer: Trainer) -> str | None:
    """What makes Lightning go on although it is told to stop."""
    waits = []
    # Lightning makes one whole epoch of `min_steps` alone
    if trainer.current_epoch < (trainer.min_epochs or 0):
        waits.append(f"min_epochs={trainer.min_epochs}")
    if trainer.global_step < (trainer.min_steps or 0):
        waits.append(f"min_steps={trainer.min_steps}")
    return " and ".join(waits) or None
