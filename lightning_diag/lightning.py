"""The one door to Lightning: `pytorch_lightning` or `lightning.pytorch`, as this process does.

The two packages hold the same code under two names, and their classes are different classes to
Python. The package that was imported first decides; where neither was, the one that is installed.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning import callbacks as callbacks
    from pytorch_lightning import loggers as loggers
    from pytorch_lightning.callbacks import Checkpoint
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = [
    "PACKAGE",
    "Callback",
    "Checkpoint",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "Trainer",
    "callbacks",
    "loggers",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]

_PACKAGES = ("pytorch_lightning", "lightning.pytorch")


def _decide() -> str:
    # sys.modules keeps the order of import: with both loaded, the user's own came first
    for name in sys.modules:
        if name in _PACKAGES:
            return name
    for name in _PACKAGES:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return name
    raise ImportError(
        "`lightning_diag` needs PyTorch Lightning: install `pytorch-lightning` or `lightning`; "
        "found neither."
    )


PACKAGE = _decide()

if not TYPE_CHECKING:
    _pl = importlib.import_module(PACKAGE)
    Callback = _pl.Callback
    LightningDataModule = _pl.LightningDataModule
    LightningModule = _pl.LightningModule
    Trainer = _pl.Trainer
    # whole modules too, so that a configuration can name what is in them
    callbacks = importlib.import_module(f"{PACKAGE}.callbacks")
    loggers = importlib.import_module(f"{PACKAGE}.loggers")
    Checkpoint = callbacks.Checkpoint
    Logger = loggers.Logger
    _utilities = importlib.import_module(f"{PACKAGE}.utilities")
    rank_zero_info = _utilities.rank_zero_info
    rank_zero_only = _utilities.rank_zero_only
    rank_zero_warn = _utilities.rank_zero_warn
