"""The diagnostics that must keep the promises: a new one is added by one line."""

from functools import partial

from lightning_diag import GradientHealth
from lightning_diag.callbacks.base import Diagnostic

DIAGNOSTICS = {
    "gradient_health": partial(GradientHealth, zeros_every=2, per_parameter=True, histogram=True),
    "gradient_health_parts": partial(GradientHealth, {"first": "*embed*", "norms": "*norm*"}),
}
CASES = [*DIAGNOSTICS, "all"]
CLASSES = {type(make()): name for name, make in reversed(DIAGNOSTICS.items())}


def build(case: str, **arguments: object) -> list[Diagnostic]:
    """New diagnostics of one case: every second step is measured, and an error is an error."""
    arguments = {"every_n_steps": 2, "on_error": "raise", **arguments}
    return [DIAGNOSTICS[name](**arguments) for name in DIAGNOSTICS if case in (name, "all")]
