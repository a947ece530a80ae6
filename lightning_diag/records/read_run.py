"""A run folder, read back as one polars frame for each record file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diag.records.lineage import attempts_of, current_rows
from lightning_diag.records.read_records import read_records
from lightning_diag.records.run_info import read_info

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Run", "read_config", "read_run"]


def read_run(path: str | Path) -> "Run":
    """Open the folder of a run, finished, broken off or still going on.

    Args:
        path: The folder that a `RunLogger` wrote into.

    Returns:
        The run; each file is read when it is first asked for.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The folder holds neither run.json nor records.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "run.json").write_text("{}")
        ...     read_run(folder).prefixes
        []
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"`path` must be a run folder, got {folder}, which does not exist.")
    if not folder.is_dir():
        raise ValueError(f"`path` must be a run folder, got {folder}, which is a file.")
    if not (folder / "run.json").exists() and not any(folder.glob("records/*.jsonl")):
        inside = sorted(file.parent.name for file in folder.glob("*/run.json"))
        hint = f" It has runs inside: {', '.join(inside[:5])}." if inside else ""
        raise ValueError(
            "`path` must be a run folder, with `run.json` or `records/*.jsonl` in it, "
            f"got {folder}.{hint}"
        )
    return Run(folder)


class Run:
    """What a run has written so far: ``run.grad``, ``run.metrics``, ... and its configuration.

    Every frame has the columns step, epoch, time, attempt and component, in the order of the
    file, without the rows that a later attempt replaced. Torn lines are left out and counted. A
    frame is read once; open the run again to see what was added.

    Args:
        path: The run folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._frames: dict[str, pl.DataFrame] = {}
        self._torn: dict[str, int] = {}
        self._info: dict[str, Any] | None = None
        self._config: dict[str, Any] | None = None

    @property
    def prefixes(self) -> list[str]:
        """The record files that are there, in alphabetical order."""
        return sorted(file.stem for file in self.path.glob("records/*.jsonl"))

    @property
    def info(self) -> dict[str, Any]:
        """run.json; empty where it is missing or unreadable."""
        if self._info is None:
            self._info = read_info(self.path) or {}
        return self._info

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml; empty where it is missing.

        Raises:
            ValueError: It is not a YAML mapping.
        """
        if self._config is None:
            self._config = read_config(self.path / "config.yaml")
        return self._config

    @property
    def torn(self) -> dict[str, int]:
        """How many lines of each record file could not be read, for the files that had any."""
        for prefix in self.prefixes:
            self.frame(prefix)
        return {prefix: count for prefix, count in sorted(self._torn.items()) if count}

    def frame(self, prefix: str) -> "pl.DataFrame":
        """The rows of one record file.

        Args:
            prefix: Its name without the ending, such as ``"grad"``.

        Returns:
            The rows; none, with the columns of every row, where there is no such file.
        """
        if prefix not in self._frames:
            # run.json first: an attempt that begins in between then only adds rows
            attempts = attempts_of(self.info)
            rows, offsets, torn = read_records(self.path / "records" / f"{prefix}.jsonl")
            self._torn[prefix] = torn
            self._frames[prefix] = current_rows(rows, offsets, prefix, attempts)
        return self._frames[prefix]

    def __getattr__(self, name: str) -> "pl.DataFrame":
        if name.startswith("_") or name not in self.prefixes:
            there = ", ".join(f"`{prefix}`" for prefix in self.prefixes) or "no records"
            raise AttributeError(f"The run has no records `{name}`; {self.path} has {there}.")
        return self.frame(name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.prefixes]

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, prefixes={self.prefixes})"


def read_config(path: Path) -> dict[str, Any]:
    """config.yaml as a mapping; empty where it is missing.

    Raises:
        ValueError: It is not a YAML mapping.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text("utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` must be YAML, got {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"`{path}` must hold a mapping, got {type(config).__name__}.")
    return config
