"""Where the diagnostics of a Trainer write: its RunLogger, or one that is added to it."""

from math import isfinite
from pathlib import Path

from lightning_diag.lightning import Trainer, rank_zero_info
from lightning_diag.records import RunLogger

__all__ = ["add_run_logger", "planned_steps", "run_logger"]

_FOLDER = "diagnostics"


def run_logger(trainer: Trainer) -> RunLogger | None:
    """The run that `trainer` records, if it records one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)


def planned_steps(trainer: Trainer, *, automatic: bool) -> int | None:
    """How many steps the run will have made if nothing stops it; None where nobody knows.

    Args:
        trainer: A trainer that is about to train.
        automatic: Whether optimization is; else the steps are batches.
    """
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if automatic:
        steps = float(trainer.estimated_stepping_batches)
    elif epochs is None or epochs < 0:
        steps = float(trainer.max_steps)
    else:
        steps = float(epochs * batches)
    return int(steps) if isfinite(steps) and steps > 0 else None


def add_run_logger(trainer: Trainer, resumed: str | None) -> None:
    """Give the Trainer a RunLogger, beside the folder of its other loggers, where it has none.

    Args:
        trainer: The trainer; every rank must call, since the folder is agreed by a broadcast.
        resumed: Folder of the run that a checkpoint continues, taken again if it lies there.
    """
    if run_logger(trainer) is not None or getattr(trainer, "fast_dev_run", False):
        return
    base = Path(trainer.log_dir or trainer.default_root_dir).resolve() / _FOLDER
    path = Path(resumed) if resumed and Path(resumed).parent == base else _next_version(base)
    path = Path(trainer.strategy.broadcast(str(path)))
    trainer.loggers = [*trainer.loggers, RunLogger(path)]
    rank_zero_info(f"lightning_diag writes this run into {path}")


def _next_version(base: Path) -> Path:
    number = 0
    while (base / f"version_{number}").exists():
        number += 1
    return base / f"version_{number}"
