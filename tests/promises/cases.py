"""The diagnostics that must keep the promises: a new one is added by one line."""

from functools import partial
from tempfile import gettempdir

from lightning_diag import (
    ActivationHealth,
    AttentionCapture,
    BlobMetrics,
    CollapseStop,
    ComponentProfiler,
    GradientHealth,
    HardwareMonitor,
    HealthAlerts,
    LatentStats,
    LRCache,
    UpdateRatio,
    WiringCheck,
)
from lightning_diag.callbacks.base import Diagnostic


def _lr_cache(every_n_steps: object = None, **arguments: object) -> LRCache:
    """Searches once, whatever the interval; what it finds is not set, which would be its task."""
    options = {"num_steps": 20, "apply": False, "refresh": True, "cache_dir": gettempdir()}
    return LRCache(**options, optimizer=0, **arguments)


# rules that judge the machine see other numbers each time
_NOT_THE_MACHINE = {"input_bound": {"min_wait": 1e9}, "memory_growth": {"min_growth": 1e9}}
_PAIR = ["net.body.0.weight", "net.body.3.weight"]

DIAGNOSTICS = {
    "gradient_health": partial(GradientHealth, zeros_every=2, per_parameter=True, histogram=True),
    "gradient_health_parts": partial(GradientHealth, {"first": "*embed*", "norms": "*norm*"}),
    "collapse_stop": CollapseStop,
    "wiring_check": WiringCheck,
    "update_ratio": partial(UpdateRatio, per_parameter=True),
    "activation_health": ActivationHealth,
    "latent_stats": LatentStats,
    "attention_capture": AttentionCapture,
    "component_profiler": partial(ComponentProfiler, table=False),
    "blob_metrics": partial(BlobMetrics, {"body": _PAIR}, every_n_epochs=None, results=False),
    "hardware_monitor": HardwareMonitor,
    "lr_cache": _lr_cache,
    "health_alerts": partial(HealthAlerts, console=False, thresholds=_NOT_THE_MACHINE),
}
CASES = [*DIAGNOSTICS, "all"]
CLASSES = {type(make(every_n_steps=2)): name for name, make in reversed(DIAGNOSTICS.items())}

# steps, counted from 0, at which some measure besides those that are due
ALSO: dict[str, set[int]] = {"WiringCheck": {0, 1, 2}}
# those that look at every micro-batch of a step
WHOLE_STEPS: set[str] = {"WiringCheck"}
# those that work once, before the first step
ONCE = {"LRCache"}
# those that measure by the epoch, whatever `every_n_steps` is
BY_EPOCH: set[str] = set()


def build(case: str, **arguments: object) -> list[Diagnostic]:
    """New diagnostics of one case: every second step is measured, and an error is an error."""
    arguments = {"every_n_steps": 2, "on_error": "raise", **arguments}
    return [DIAGNOSTICS[name](**arguments) for name in DIAGNOSTICS if case in (name, "all")]


def kinds(case: str) -> list[str]:
    """The class names of a case's diagnostics."""
    return [type(diagnostic).__name__ for diagnostic in build(case)]
