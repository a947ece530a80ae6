"""`lightning-diag aggregate`: several runs, by seed and experiment, in one summary."""

from pathlib import Path
from typing import Annotated

import typer

from lightning_diag.commands.errors import UsageError, plain_errors
from lightning_diag.report.words import short

__all__ = ["aggregate"]

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A folder with runs in it, at any depth.")
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="What to compare by; f1, else what the runs monitor, by default."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show where in the code an error arose.")]


def aggregate(folder: Folder, metric: Metric = None, debug: Debug = False) -> None:
    """Summarize runs that differ in their seed: mean, spread, confidence, and the sick apart.

    Works on any folder of runs, those of a sweep (`train -m seed=42,2025,7`) as well. Runs whose
    configuration differs in the seed alone are one experiment. Writes production_summary.json,
    production_report.md and metrics_comparison.png into FOLDER/production_summary/.
    """
    with plain_errors(debug):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from lightning_diag.report.aggregate_files import write_aggregate

        try:
            summary, files = write_aggregate(folder, metric)
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(str(error)) from error
        table = Table(box=None, pad_edge=False, header_style="dim")
        names = ("experiment", "clean", "diverged", "unfinished", f"mean {summary.metric}", "std")
        for name in names:
            table.add_column(Text(name), overflow="fold")
        for group in summary.groups:
            found = group.metrics.get(summary.metric)
            counts = (len(group.clean), len(group.diverged), len(group.unfinished))
            spread = (found.mean, found.std) if found else (None, None)
            cells = (group.name, *map(str, counts), *map(short, spread))
            table.add_row(*map(Text, cells))
        Console().print(table)
        typer.echo(f"written: {', '.join(str(path) for path in files.values())}")
