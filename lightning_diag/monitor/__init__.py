"""The live page: what is known of a run while it trains."""

from lightning_diag.monitor.training_monitor import TrainingMonitor

__all__ = ["TrainingMonitor"]
