"""A run that is going on, read bit by bit: each look reads what was appended since the last one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_diag.records.lineage import attempts_of, current_rows
from lightning_diag.records.read_records import parse_records
from lightning_diag.records.read_run import Run, read_config
from lightning_diag.records.run_info import read_info

if TYPE_CHECKING:
    import polars as pl

__all__ = ["FollowedRun"]

_MOST_ROWS = 20_000
_CHUNK = 8 << 20
_BYTE = "_byte"
_NUMBER = "_number"  # of the step among those of its file


@dataclass
class _File:
    """How far a file was read, and what of it is kept."""

    identity: int
    offset: int = 0
    torn: int = 0
    steps: int = 0
    stride: int = 1
    rows: "pl.DataFrame | None" = None


class FollowedRun(Run):
    """A run folder that others write into, which reads as `Run` does.

    A file is never read twice: `update` takes the whole lines that were added, at most some
    megabytes at a time, so that a look at a long run takes no longer than one at a short one. Of
    long files every second, fourth, ... of the older steps is kept, and the latest ones whole. A
    file that shrank or was replaced, and a run that was resumed, begin anew.

    Args:
        path: The run folder, which need not exist yet.
        most_rows: Rows of each file that are kept, about.

    Raises:
        ValueError: `most_rows` is below 100.

    Example:
        >>> followed = FollowedRun("runs/not_begun_yet")
        >>> followed.update(), followed.exists, followed.prefixes
        (set(), False, [])
    """

    def __init__(self, path: str | Path, most_rows: int = _MOST_ROWS) -> None:
        if most_rows < 100:
            raise ValueError(f"`most_rows` must be at least 100, got {most_rows}.")
        super().__init__(path)
        self.most_rows = most_rows
        self.behind = False
        self._info, self._config = {}, {}
        self._files: dict[str, _File] = {}
        self._attempts: object = None
        self._config_changed: float | None = None

    @property
    def exists(self) -> bool:
        """Whether the folder was there at the last look."""
        return bool(self.info or self._files)

    @property
    def prefixes(self) -> list[str]:
        """The record files that have rows, in alphabetical order."""
        return sorted(name for name, file in self._files.items() if file.rows is not None)

    @property
    def torn(self) -> dict[str, int]:
        """How many lines of each record file could not be read, for the files that had any."""
        return {name: file.torn for name, file in sorted(self._files.items()) if file.torn}

    def update(self) -> set[str]:
        """Read what was added, and return the names of the files that changed.

        `behind` tells whether there is more to read already.
        """
        self._info = read_info(self.path) or {}
        self._read_config()
        attempts = [
            (one["attempt"], one.get("first_step")) for one in self.info.get("attempts", [])
        ]
        if attempts != self._attempts:
            # what a new attempt replaced is known by the bytes of its rows: they are read again
            anew = self._attempts is not None and len(attempts) > 1
            self._attempts = attempts
            self._frames.clear()
            if anew:
                self._files.clear()
        there = {file.stem: file for file in self.path.glob("records/*.jsonl")}
        changed = {name for name in self._files if name not in there}
        for name in changed:
            del self._files[name]
        self.behind = False
        changed |= {name for name, file in there.items() if self._take(name, file)}
        for name in changed:
            self._frames.pop(name, None)
        return changed

    def frame(self, prefix: str) -> "pl.DataFrame":
        """The rows of one record file; none, with the columns of every row, where it has none."""
        if prefix not in self._frames:
            file = self._files.get(prefix)
            if file is None or file.rows is None:
                return parse_records(b"")[0]
            rows, starts = file.rows.drop(_BYTE, _NUMBER), partial(file.rows.get_column, _BYTE)
            self._frames[prefix] = current_rows(rows, starts, prefix, attempts_of(self.info))
        return self._frames[prefix]

    def _read_config(self) -> None:
        file = self.path / "config.yaml"
        try:
            changed = file.stat().st_mtime
        except OSError:
            self._config, self._config_changed = {}, None
            return
        if changed != self._config_changed:
            try:
                self._config, self._config_changed = read_config(file), changed
            except ValueError:
                self._config = {}

    def _take(self, name: str, path: Path) -> bool:
        """Read on in one file; whether there was anything."""
        try:
            with path.open("rb") as stream:
                found = path.stat()
                known = self._files.get(name)
                if known is None or known.identity != found.st_ino or found.st_size < known.offset:
                    known = self._files[name] = _File(found.st_ino)
                stream.seek(known.offset)
                data = stream.read(_CHUNK)
        except OSError:
            return False
        end = data.rfind(b"\n") + 1
        self.behind |= len(data) == _CHUNK
        if end == 0:
            return False
        rows, starts, torn = parse_records(data[:end])
        known.torn += torn
        if len(rows):
            self._append(known, rows, starts)
        known.offset += end
        return True

    def _append(self, file: _File, rows: "pl.DataFrame", starts: "Callable[[], pl.Series]") -> None:
        import polars as pl

        # a step may go on in the rows that are read next
        new = rows["step"].fill_null(-1)
        number = (new != new.shift(1)).fill_null(True).cast(pl.Int64).cum_sum()
        last = -2 if file.rows is None else file.rows["step"].fill_null(-1)[-1]
        number += file.steps - (new[0] == last)
        added = rows.with_columns((starts() + file.offset).alias(_BYTE), number.alias(_NUMBER))
        file.steps = int(number[-1])
        if file.rows is not None:
            added = pl.concat([file.rows, added], how="diagonal_relaxed")
        file.rows = self._thinned(file, added)

    def _thinned(self, file: _File, rows: "pl.DataFrame") -> "pl.DataFrame":
        """Fewer of the older steps, evenly, until there are few enough rows."""
        import polars as pl

        if len(rows) <= self.most_rows:
            return rows
        recent = rows[_NUMBER][-(self.most_rows // 4)]
        while True:
            every = pl.col(_NUMBER) % file.stride == 0
            rows = rows.filter(every | (pl.col(_NUMBER) >= recent) | (pl.col(_NUMBER) == 1))
            if len(rows) <= self.most_rows or file.stride > file.steps:
                return rows
            file.stride *= 2
