"""`lightning-diag compare`: what changed from one run to another."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning_diag.commands.errors import UsageError, plain_errors
from lightning_diag.commands.runs import opened
from lightning_diag.commands.thresholds import check_thresholds, parsed_thresholds

if TYPE_CHECKING:
    from lightning_diag.report.comparison import FailOn as Limit

__all__ = ["compare"]


class FailOn(StrEnum):
    """The mildest severity that a new finding must have to end with a status of its own."""

    warning = "warning"
    critical = "critical"


Before = Annotated[Path, typer.Argument(metavar="A", help="The folder of the run to compare with.")]
After = Annotated[Path, typer.Argument(metavar="B", help="The folder of the run that is judged.")]
Fail = Annotated[
    FailOn | None,
    typer.Option("--fail-on", help="End with 3 or 4 where a finding of B is new or worse."),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write JSON; - prints it, alone.")
]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a page that works offline.")
]
Thresholds = Annotated[
    list[str] | None,
    typer.Option(metavar="RULE.THRESHOLD=NUMBER", help="In place of a default; may be repeated."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show where in the code an error arose.")]


def compare(
    before: Before,
    after: After,
    fail_on: Fail = None,
    as_json: Json = None,
    html: Html = None,
    threshold: Thresholds = None,
    debug: Debug = False,
) -> None:
    """Compare the runs A and B: findings gone and new, metrics, configuration, cost.

    Works on runs that are still going on, too: metrics are compared at the last step that both
    reached.

    Exits with 0, or with `--fail-on SEVERITY` with 3 where the gravest finding that is new or worse
    in B is a warning, and 4 where it is critical; 2 on wrong usage. A new finding that a finding of
    both runs explains does not count. A run B that failed or was stopped counts as critical, one
    that has measured no gradient as a warning, unless A was no better.
    """
    with plain_errors(debug):
        if html == Path("-"):
            raise UsageError("`--html` must name a file; JSON alone can be printed, by `--json -`.")
        runs, given = (opened(before), opened(after)), parsed_thresholds(threshold or [])
        for run in runs:
            check_thresholds(run.config)
        from rich.console import Console

        from lightning_diag.records.files import write_text
        from lightning_diag.report.comparison import compare

        found = compare(*runs, given)
        limit: Limit | None = None if fail_on is None else fail_on.value
        text = json.dumps(found.to_dict(limit), indent=2, ensure_ascii=False, allow_nan=False)
        if as_json == Path("-"):
            typer.echo(text)
        else:
            from lightning_diag.report.comparison_text import print_comparison

            print_comparison(found, Console())
        if as_json not in (None, Path("-")):
            write_text(as_json, f"{text}\n")
        if html is not None:
            from lightning_diag.report.comparison_page import comparison_page

            write_text(html, comparison_page(found, *runs))
        written = [str(file) for file in (as_json, html) if file not in (None, Path("-"))]
        if written:
            typer.echo(f"written: {', '.join(written)}", err=as_json == Path("-"))
    raise typer.Exit(found.exit_code(limit))
