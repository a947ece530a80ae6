"""When to measure, and what to pass in: one thin Lightning callback per diagnostic."""

from lightning_diag.callbacks.base import Diagnostic
from lightning_diag.callbacks.gradient_health import GradientHealth

__all__ = ["Diagnostic", "GradientHealth"]
