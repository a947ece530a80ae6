"""The report on a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lightning_diag.report.groups import Group, grouped
from lightning_diag.report.issue_words import plainly, since, what_is_wrong
from lightning_diag.report.norms import WHOLE, ComponentNorms
from lightning_diag.report.section import Section, Table
from lightning_diag.report.words import override_words, short, step_words, to_try
from lightning_diag.report.write_report import Report
from lightning_diag.rules.finding import Finding

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["print_summary"]

_COLOURS = {"critical": "bold red", "warning": "bold yellow", "info": "cyan"}
_STATES = {"healthy": "bold green", "critical": "bold red"}
_WIDE = 100
_ROWS = 20  # of a table; the page has them all
_GAP = 2  # characters between two columns


def print_summary(report: Report, console: "Console") -> None:
    """Print norms by component, the verdict, the findings and where the page is.

    Args:
        report: What `write_report` returned.
        console: A rich console.
    """
    from rich.text import Text

    console.rule("Gradients by component", align="left")
    if report.components:
        console.print(_table(report.components, wide=console.width >= _WIDE))
    else:
        console.print("None were measured.")
    for section in report.sections:
        _print_section(section, console)
    console.rule("Verdict", align="left")
    style = _STATES.get(report.verdict.state, "bold yellow")
    console.print(Text(report.verdict.headline, style), Text(report.verdict.sentence))
    for cost in report.overheads:
        if cost.share is not None:
            console.print(Text(f"{cost.diagnostic} took {cost.share:.2%} of training.", "dim"))
    groups = grouped(report.findings)
    if groups:
        console.rule("Findings", align="left")
    for number, group in enumerate(groups, start=1):
        console.print(_group(number, group))
    notes = sum(one.rank == 0 for one in report.findings)
    if notes:
        console.print(Text(f"{notes} more noted in the report, none of them an alarm.", "dim"))
    page = report.files["report.html"]
    console.print(Text(f"Report: {page}"), soft_wrap=True)


def _print_section(section: Section, console: "Console") -> None:
    from rich.text import Text

    console.rule(Text(section.title), align="left")
    for line in section.lines:
        console.print(Text(line.replace("`", "")))
    for table in section.tables:
        console.print(_cells(table, console.width))


def _cells(table: Table, width: int) -> object:
    from rich.table import Table as RichTable
    from rich.text import Text

    title = Text(table.title, "bold") if table.title else None
    drawn = RichTable(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="dim"
    )
    rows = [[_shortened(row[0], width // 3), *row[1:]] for row in table.rows[:_ROWS]]
    widths = _widths(table.columns, rows)
    shown = max(2, sum(sum(widths[: count + 1]) <= width for count in range(len(widths))))
    for number, name in enumerate(table.columns[:shown]):
        justify: Literal["left", "right"] = "left" if number < table.left else "right"
        least = min(widths[number] - _GAP, width // 2)
        drawn.add_column(Text(name), justify=justify, overflow="fold", min_width=least)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row[:shown]))
    more = [
        f"{number} more {what}{'s' * (number != 1)}"
        for number, what in (
            (len(table.rows) - len(rows), "row"),
            (len(table.columns) - shown, "column"),
        )
        if number > 0
    ]
    if more:
        drawn.caption = f"{' and '.join(more)} in the report"
        drawn.caption_justify = "left"
    return drawn


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """What each column needs, with the gap to the next; headings may break between words."""
    return [
        _GAP + max([*map(len, name.split()), *(len(row[number]) for row in rows)], default=0)
        for number, name in enumerate(columns)
    ]


def _shortened(name: str, width: int) -> str:
    # the end of a dotted name says more than its beginning
    return name if len(name) <= width or " " in name else f"…{name[-(width - 1) :]}"


def _table(components: list[ComponentNorms], *, wide: bool) -> object:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("component", overflow="fold")
    names = ["mean norm", "std", "max", "min"] + ["elements", "missing", "frozen"] * wide
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in components:
        cells = [short(value) for value in (one.mean, one.std, one.max, one.min)]
        if wide:
            cells += [f"{one.elements:,}", str(one.missing), str(one.frozen)]
        table.add_row(Text(one.component), *cells)
    return table


def _group(number: int, group: Group) -> object:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    one, severity = group.first, group.severity
    steps = step_words(one.first_step, one.last_step)
    head = Text(f"{number}. ")
    head.append(f"{severity.upper()} ", _COLOURS[severity])
    head.append(f"{one.issue}: {one.component or WHOLE}", "bold")
    head.append(f" ({steps})" if steps else "", "dim")
    lines = [Text(one.message)]
    lines.append(Text(f"Try: {to_try(one.suggestion)}"))
    if one.overrides:
        lines.append(Text(override_words(one.overrides), "green"))
    lines += [_brief("The same", other) for other in group.elsewhere]
    lines += [_brief("Consequence", effect) for effect in group.consequences]
    return Group(head, Padding(Group(*lines), (0, 0, 1, 3)))


def _brief(what: str, one: Finding) -> "Text":
    from rich.text import Text

    when = f", {known}" if (known := since(one)) else ""
    return Text(f"{what}: {plainly(what_is_wrong(one))}{when}.", "dim")
