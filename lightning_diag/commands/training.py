"""What `lightning-diag train` checks before, shows meanwhile and returns afterwards."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diag.commands.errors import UsageError
from lightning_diag.commands.thresholds import check_thresholds
from lightning_diag.spelling import unknown_arguments

if TYPE_CHECKING:
    from lightning_diag.lightning import Callback, Trainer

__all__ = ["best_metric", "check", "progress"]


def check(plain: Mapping[str, Any]) -> None:
    """Refuse a configuration that cannot be trained.

    Args:
        plain: The configuration, as plain values.

    Raises:
        UsageError: What is wrong with it, with the nearest right names.
    """
    check_thresholds(plain)
    wrong = list(unknown_arguments(plain))
    checkpoint = plain["ckpt_path"]
    if checkpoint is not None and "://" not in checkpoint and not Path(checkpoint).exists():
        wrong.append(f"`ckpt_path` must name a checkpoint that exists, got `{checkpoint}`.")
    if wrong:
        raise UsageError("\n".join(wrong))


def progress(plain: Mapping[str, Any], callbacks: list["Callback"]) -> list["Callback"]:
    """A progress bar for a pipe or a file, where the default one shows nothing before the end."""
    from lightning_diag.lightning import callbacks as kinds

    wanted = plain["trainer"].get("enable_progress_bar") is not False
    given = any(isinstance(callback, kinds.ProgressBar) for callback in callbacks)
    if sys.stdout.isatty() or given or not wanted:
        return []
    return [kinds.TQDMProgressBar(refresh_rate=10)]


def best_metric(trainer: "Trainer", monitor: str) -> float | None:
    """The best value of the monitored metric where a checkpoint kept it, else the last."""
    for callback in trainer.checkpoint_callbacks:
        best = getattr(callback, "best_model_score", None)
        if best is not None and getattr(callback, "monitor", None) == monitor:
            return float(best)
    last = trainer.callback_metrics.get(monitor)
    return None if last is None else float(last)
