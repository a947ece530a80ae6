"""The parts of a model as a table for the terminal."""

from collections.abc import Mapping, Sequence

__all__ = ["print_table", "size_words"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_words(size: float) -> str:
    """A number of bytes for people.

    Example:
        >>> size_words(512), size_words(1536), size_words(3 * 2**30)
        ('512 B', '1.5 KiB', '3.0 GiB')
    """
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print the rows of a model's parts; the last is the whole. Nothing where `rich` is missing.

    Args:
        rows: With component, parameters, share, trainable, frozen, buffers and bytes.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return
    table = Table(title="Components", title_justify="left")
    table.add_column("component", overflow="fold")
    for name in ("parameters", "share", "trainable", "frozen", "buffers", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        last = number == len(rows) - 1
        name = "whole model" if row["component"] is None else str(row["component"])
        share = row["share"]
        cells = [f"{row[key]:,}" for key in ("parameters", "trainable", "frozen", "buffers")]
        cells.insert(1, f"{share:.2%}" if isinstance(share, float) else "-")
        # as text: a name may look like markup
        table.add_row(Text(name), *cells, size_words(int(str(row["bytes"]))), end_section=last)
        if number == len(rows) - 2:
            table.add_section()
    Console().print(table)
