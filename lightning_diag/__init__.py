"""Diagnostics for PyTorch Lightning: what is sick in a run, since when, why, and what to do."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_diag.callbacks.activation_health import ActivationHealth as ActivationHealth
    from lightning_diag.callbacks.attention_capture import AttentionCapture as AttentionCapture
    from lightning_diag.callbacks.blob_metrics import BlobMetrics as BlobMetrics
    from lightning_diag.callbacks.collapse_stop import CollapseStop as CollapseStop
    from lightning_diag.callbacks.component_profiler import ComponentProfiler as ComponentProfiler
    from lightning_diag.callbacks.gradient_health import GradientHealth as GradientHealth
    from lightning_diag.callbacks.hardware_monitor import HardwareMonitor as HardwareMonitor
    from lightning_diag.callbacks.health_alerts import HealthAlerts as HealthAlerts
    from lightning_diag.callbacks.latent_stats import LatentStats as LatentStats
    from lightning_diag.callbacks.lr_cache import LRCache as LRCache
    from lightning_diag.callbacks.update_ratio import UpdateRatio as UpdateRatio
    from lightning_diag.callbacks.wiring_check import WiringCheck as WiringCheck
    from lightning_diag.components import Components as Components
    from lightning_diag.components import param_groups as param_groups
    from lightning_diag.monitor import TrainingMonitor as TrainingMonitor
    from lightning_diag.records import RunLogger as RunLogger
    from lightning_diag.records import read_run as read_run
    from lightning_diag.report.logged_charts import log_charts as log_charts
    from lightning_diag.rules import diagnose as diagnose
    from lightning_diag.suites import suite as suite
    from lightning_diag.tuning.batch_size import profile_batch_sizes as profile_batch_sizes

__version__ = "0.1.0"

_HOMES = {
    "ActivationHealth": "lightning_diag.callbacks.activation_health",
    "AttentionCapture": "lightning_diag.callbacks.attention_capture",
    "BlobMetrics": "lightning_diag.callbacks.blob_metrics",
    "CollapseStop": "lightning_diag.callbacks.collapse_stop",
    "ComponentProfiler": "lightning_diag.callbacks.component_profiler",
    "Components": "lightning_diag.components",
    "GradientHealth": "lightning_diag.callbacks.gradient_health",
    "HardwareMonitor": "lightning_diag.callbacks.hardware_monitor",
    "HealthAlerts": "lightning_diag.callbacks.health_alerts",
    "LRCache": "lightning_diag.callbacks.lr_cache",
    "LatentStats": "lightning_diag.callbacks.latent_stats",
    "RunLogger": "lightning_diag.records",
    "TrainingMonitor": "lightning_diag.monitor",
    "UpdateRatio": "lightning_diag.callbacks.update_ratio",
    "WiringCheck": "lightning_diag.callbacks.wiring_check",
    "diagnose": "lightning_diag.rules",
    "log_charts": "lightning_diag.report.logged_charts",
    "param_groups": "lightning_diag.components",
    "profile_batch_sizes": "lightning_diag.tuning.batch_size",
    "read_run": "lightning_diag.records",
    "suite": "lightning_diag.suites",
}

__all__ = [
    "ActivationHealth",
    "AttentionCapture",
    "BlobMetrics",
    "CollapseStop",
    "ComponentProfiler",
    "Components",
    "GradientHealth",
    "HardwareMonitor",
    "HealthAlerts",
    "LRCache",
    "LatentStats",
    "RunLogger",
    "TrainingMonitor",
    "UpdateRatio",
    "WiringCheck",
    "diagnose",
    "log_charts",
    "param_groups",
    "profile_batch_sizes",
    "read_run",
    "suite",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module `lightning_diag` has no attribute `{name}`.")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
