"""The files of a run as RunLogger writes them: a failing disk costs rows, never the training."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_diag.lightning import PACKAGE, rank_zero_warn
from lightning_diag.records.files import LineWriter
from lightning_diag.records.hparams import merge_config
from lightning_diag.records.json_safe import Json
from lightning_diag.records.run_info import positions_fit, read_info, save_info, sizes

__all__ = ["RunFiles"]


class RunFiles:
    """Writes rows, run.json and config.yaml, and keeps what a failing disk did not take.

    The first failure is told in one warning. Fields of run.json and config.yaml wait in memory
    and are written with the next row that succeeds; rows that failed are only counted.

    Args:
        path: The run folder; it is made at the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost: Counter[str] = Counter()
        self._writers: dict[str, LineWriter] = {}
        self._info: dict[str, Json] = {}
        self._attempt: dict[str, Any] | None = None
        self._config: dict[str, Json] = {}
        self._stale = False
        self._warned = False

    def append(self, prefix: str, line: str) -> bool:
        """Write one row.

        Args:
            prefix: The record file.
            line: The row as JSON.

        Returns:
            Whether it was written.
        """
        writer = self._writers.get(prefix)
        if writer is None:
            writer = LineWriter(self.path / "records" / f"{prefix}.jsonl")
            self._writers[prefix] = writer
        try:
            writer.write(line)
        except OSError as error:
            self.lost[prefix] += 1
            self._trouble(writer.path, error)
            return False
        if self._stale:
            self._stale = False
            self.save_info({}, self._attempt)
            self.save_config({})
        return True

    def save_info(self, fields: Mapping[str, Json], attempt: dict[str, Any] | None) -> None:
        """Merge fields and an attempt into run.json.

        Args:
            fields: JSON-safe values.
            attempt: What `blank_attempt` made; it receives its number here.
        """
        self._info.update(fields)
        self._attempt = attempt
        try:
            save_info(self.path, PACKAGE, self._info, attempt)
        except OSError as error:
            self._stale = True
            self._trouble(self.path / "run.json", error)
        else:
            self._info = {}

    def save_config(self, params: Mapping[str, Json]) -> None:
        """Merge hyper-parameters into config.yaml.

        Args:
            params: JSON-safe values.
        """
        self._config.update(params)
        if not self._config:
            return
        path = self.path / "config.yaml"
        try:
            merge_config(path, self._config)
        except OSError as error:
            self._stale = True
            self._trouble(path, error)
            return
        except ValueError as error:
            rank_zero_warn(f"The hyper-parameters were not recorded: {error}")
        self._config = {}

    def positions(self) -> dict[str, int]:
        """Bytes in each record file.

        Returns:
            An entry by prefix; none where the folder cannot be read.
        """
        try:
            return sizes(self.path)
        except OSError as error:
            self._trouble(self.path, error)
            return {}

    def fits(self, positions: Mapping[str, int]) -> bool:
        """Whether these positions can come from this folder.

        Args:
            positions: Bytes by prefix.

        Returns:
            False also where the folder cannot be read.
        """
        try:
            return positions_fit(self.path, positions)
        except OSError as error:
            self._trouble(self.path, error)
            return False

    def running(self, session: str) -> dict[str, Any] | None:
        """The attempt of this session that run.json calls running.

        Args:
            session: Names the logger.

        Returns:
            The last such attempt, or None.
        """
        try:
            info = read_info(self.path) or {"attempts": []}
        except OSError as error:
            self._trouble(self.path / "run.json", error)
            return None
        attempts = [one for one in info["attempts"] if one.get("session") == session]
        return next((one for one in attempts[::-1] if one.get("status") == "running"), None)

    def close(self) -> None:
        """Close the record files; a later row opens its file again."""
        for writer in self._writers.values():
            writer.close()

    def _trouble(self, path: Path, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            reason = error.strerror or str(error)
            rank_zero_warn(
                f"`{path}` cannot be written ({reason}): training goes on, and rows that fail "
                "until it can be are lost."
            )
