"""What the command knows of a run and its loggers do not."""

from collections.abc import Mapping
from typing import Any

from lightning_diag.lightning import Callback, LightningModule, Trainer
from lightning_diag.records import RunLogger
from lightning_diag.tuning.hardware import detect

__all__ = ["RunDetails"]


class RunDetails(Callback):
    """Writes the configuration, the machine and the data's fingerprint into each RunLogger.

    Args:
        plain: The configuration as plain values.
    """

    def __init__(self, plain: Mapping[str, Any]) -> None:
        super().__init__()
        self.plain = plain

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        fingerprint = getattr(data, "fingerprint", None)
        devices = [detect().name] * (trainer.num_devices * trainer.num_nodes)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_hyperparams(self.plain)
                logger.update_info(
                    name=self.plain["name"],
                    seed=self.plain["seed"],
                    devices=devices,
                    data=fingerprint,
                )
