"""What one diagnostic has to say in a report, whatever the report is written as."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Section", "Table"]


@dataclass(frozen=True)
class Table:
    """A table whose cells are text already.

    Args:
        columns: Names; the first column is aligned left, the others right.
        rows: A cell a column; they may hold names out of the run, which the writers escape.
        title: A few words above it, or nothing.
        left: How many columns are aligned left.

    Raises:
        ValueError: A row has another number of cells than there are columns.
    """

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    title: str = ""
    left: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"A row must have {len(self.columns)} cells, got {len(row)}.")


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Args:
        title: A few words: ``"Attention"``.
        lines: Sentences; names in them stand between backticks.
        tables: What the terminal, the page and the text all show.
        charts: Altair charts by file name without ending: ``{"attention_entropy": chart}``. Each
            has a title and, for those who cannot see it, a description.
        files: Further files of ``analysis/``, by name, as text.
    """

    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
