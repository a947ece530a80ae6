"""A run as the page needs it: few enough steps to be judged and drawn every few seconds."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_diag.records.followed_run import FollowedRun

if TYPE_CHECKING:
    import polars as pl

__all__ = ["LightRun", "fewer_steps"]

_MOST_STEPS = 1000


class LightRun(FollowedRun):
    """A `FollowedRun` whose frames hold at most about a thousand measured steps.

    Args:
        path: The run folder, which need not exist yet.
        most_rows: Rows of each record file that are kept, about.
    """

    def __init__(self, path: str | Path, most_rows: int) -> None:
        super().__init__(path, most_rows)
        self._light: dict[str, tuple[pl.DataFrame, pl.DataFrame]] = {}

    def frame(self, prefix: str) -> "pl.DataFrame":
        """The rows of one record file, of long ones those of some steps."""
        rows = super().frame(prefix)
        known = self._light.get(prefix)
        if known is None or known[0] is not rows:
            known = self._light[prefix] = (rows, fewer_steps(rows, _MOST_STEPS))
        return known[1]


def fewer_steps(rows: "pl.DataFrame", most: int) -> "pl.DataFrame":
    """The first and the latest steps whole, and every second, fourth, ... of the others.

    Args:
        rows: With a column ``step``, in the order in which they were written.
        most: Steps to stay within.

    Example:
        >>> import polars as pl
        >>> fewer_steps(pl.DataFrame({"step": range(16)}), 8)["step"].to_list()
        [0, 4, 8, 12, 14, 15]
    """
    import polars as pl

    if len(rows) <= most:
        return rows
    number = rows["step"].rle_id().cast(pl.Int64)
    steps = int(number[-1]) + 1
    if steps <= most:
        return rows
    recent, stride = steps - most // 4, 1
    while recent // stride + most // 4 > most:
        stride *= 2
    return rows.filter((number % stride == 0) | (number >= recent))
