"""``results.json``: the history of a training by epoch, which a monitor can follow."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_diag.records.files import write_json

__all__ = ["EpochResults", "split_metrics"]

_NAME = "results.json"
_TEST = ("val", "valid", "validation", "test")
_TRAIN = ("train", "training")


class EpochResults:
    """The history of a run, rewritten whole after every epoch.

    Args:
        folder: The run's folder.
        epochs: Epochs that are complete: what an earlier attempt wrote of later ones is left out.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        self.path = folder / _NAME
        self.history = [one for one in _history(self.path) if one["epoch"] <= epochs]

    def epoch(self, number: int) -> dict[str, Any]:
        """The entry of an epoch, counted from 1; a new one if there is none.

        Args:
            number: The epoch.
        """
        if not self.history or self.history[-1]["epoch"] != number:
            self.history = [one for one in self.history if one["epoch"] < number]
            self.history.append({"epoch": number, "train": {}, "test": {}})
        return self.history[-1]

    def write(self, seconds: float) -> None:
        """Replace the file.

        Args:
            seconds: What training has taken so far.

        Raises:
            OSError: It could not be written; the old one is as it was.
        """
        last = self.history[-1] if self.history else {}
        folder = self.path.parent
        content = {
            "experiment_name": folder.resolve().name,
            "output_dir": str(folder),
            "training_duration_seconds": seconds,
            "training_history": self.history,
            "final_metrics": {key: value for key, value in last.items() if key != "diagnostics"},
        }
        write_json(self.path, content)


def _history(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text("utf-8"))["training_history"]
        known = [one for one in entries if isinstance(one["epoch"], int)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return sorted(known, key=lambda one: one["epoch"])


def split_metrics(
    metrics: Mapping[str, Tensor], leave_out: Collection[str], *, validated: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of training and of validation, without what says so in their names.

    Args:
        metrics: Lightning's, by name.
        leave_out: What stands before the first ``/`` of names to leave out.
        validated: Whether those of validation are of this epoch.

    Returns:
        ``{"loss": 0.1, ...}`` for training, and the same for validation. Where a metric was logged
        by step and by epoch, that of the epoch.
    """
    names = [
        name
        for name, value in metrics.items()
        if name.partition("/")[0] not in leave_out
        and value.numel() == 1
        and not _is_fork(name, metrics)
    ]
    # one copy to the host for each device that holds some
    host: dict[str, float] = {}
    for device in {metrics[name].device for name in names}:
        own = [name for name in names if metrics[name].device == device]
        wide = torch.float32 if device.type == "mps" else torch.float64
        values = torch.stack([metrics[name].detach().reshape(()).to(wide) for name in own])
        host |= zip(own, values.tolist(), strict=True)
    train: dict[str, float] = {}
    test: dict[str, float] = {}
    for name in names:
        stage, short = _stage(name)
        if stage != "test":
            train[short] = host[name]
        elif validated:
            test[short] = host[name]
    return train, test


def _is_fork(name: str, metrics: Mapping[str, Tensor]) -> bool:
    whole, _, ending = name.rpartition("_")
    return ending in ("step", "epoch") and whole in metrics


def _stage(name: str) -> tuple[str, str]:
    for stage, words in (("test", _TEST), ("train", _TRAIN)):
        for word in words:
            for mark in ("_", "/", "."):
                if name.lower().startswith(word + mark) and len(name) > len(word) + 1:
                    return stage, name[len(word) + 1 :]
    return "train", name
