"""Ready sets of diagnostics, by what they cost."""

import importlib
from inspect import signature
from typing import TYPE_CHECKING, Literal, get_args

from lightning_diag.components import Components, Patterns

if TYPE_CHECKING:
    from lightning_diag.callbacks.base import Diagnostic

__all__ = ["SUITES", "Suite", "suite"]

Suite = Literal["cheap", "standard", "full"]

_CHEAP = ("GradientHealth", "WiringCheck", "CollapseStop", "HardwareMonitor", "HealthAlerts")
_STANDARD = (*_CHEAP[:-1], "UpdateRatio", "ComponentProfiler", "AttentionCapture", "HealthAlerts")
_FULL = (*_STANDARD[:-1], "ActivationHealth", "LatentStats", "BlobMetrics", "HealthAlerts")

SUITES: dict[str, tuple[str, ...]] = {"cheap": _CHEAP, "standard": _STANDARD, "full": _FULL}
"""The diagnostics of each suite, in the order of the list; HealthAlerts sees what others wrote."""


def suite(
    name: Suite = "standard", components: Patterns | Components | None = None
) -> "list[Diagnostic]":
    """The diagnostics of a suite with their default settings, for ``Trainer(callbacks=...)``.

    ``"cheap"`` watches gradients, wiring, collapse and the machine; ``"standard"`` also how far the
    weights move, what each part costs and where attention goes; ``"full"`` is everything that
    measures without being told what to look for.

    Args:
        name: ``"cheap"``, ``"standard"`` or ``"full"``.
        components: The parts of the model to speak of, given to each diagnostic that speaks of
            parts; see `Components`.

    Raises:
        ValueError: If there is no such suite.

    Example:
        >>> [type(diagnostic).__name__ for diagnostic in suite("cheap")][:2]
        ['GradientHealth', 'WiringCheck']
    """
    if name not in SUITES:
        raise ValueError(f"`name` must be one of {', '.join(get_args(Suite))}, got {name!r}.")
    home = importlib.import_module("lightning_diag")
    kinds = [getattr(home, kind) for kind in SUITES[name]]
    return [
        kind(components=components) if "components" in signature(kind).parameters else kind()
        for kind in kinds
    ]
