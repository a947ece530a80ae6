"""What the watching itself cost."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Overhead", "overheads"]


@dataclass(frozen=True)
class Overhead:
    """The cost of one diagnostic over a run.

    Args:
        diagnostic: Its class.
        measured: How often it measured.
        every_n_steps: Its interval.
        seconds: Host time in its hooks.
        device_seconds: Time on the device, where there is one.
        share: Part of the training time, 0 to 1.
    """

    diagnostic: str
    measured: int | None
    every_n_steps: object
    seconds: float | None
    device_seconds: float | None
    share: float | None


def overheads(frame: "pl.DataFrame") -> list[Overhead]:
    """The last row of each diagnostic: rows of ``records/overhead.jsonl`` are cumulative."""
    if "diagnostic" not in frame.columns:
        return []
    last: dict[str, dict[str, Any]] = {}
    for row in frame.sort("step", maintain_order=True).iter_rows(named=True):
        if row["diagnostic"] is not None:
            last[str(row["diagnostic"])] = row
    names = ("measured", "every_n_steps", "seconds", "device_seconds", "share")
    return [Overhead(name, *(row.get(column) for column in names)) for name, row in last.items()]
