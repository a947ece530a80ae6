"""Rows to disk, and back: what a run measured, in plain files that outlive it."""

from typing import TYPE_CHECKING, Any

from lightning_diag.records.files import write_json, write_text
from lightning_diag.records.json_safe import json_safe
from lightning_diag.records.read_run import Run, read_run

if TYPE_CHECKING:
    from lightning_diag.records.run_logger import RunLogger

__all__ = ["Run", "RunLogger", "json_safe", "read_run", "write_json", "write_text"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # to read a run takes no Lightning
    if name != "RunLogger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_diag.records.run_logger import RunLogger

    return RunLogger
