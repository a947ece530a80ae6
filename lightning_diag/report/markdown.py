"""report.md: the report as text."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_diag.report.experiment import apply_command
from lightning_diag.report.groups import Group, grouped
from lightning_diag.report.issue_words import noted, what_is_wrong
from lightning_diag.report.norms import ComponentNorms
from lightning_diag.report.overhead import Overhead
from lightning_diag.report.section import Section, Table
from lightning_diag.report.verdict import Verdict
from lightning_diag.report.words import capital, override_words, short, step_words, to_try
from lightning_diag.rules.finding import Finding

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["markdown_page"]


def markdown_page(
    run: "Run",
    verdict: Verdict,
    findings: Sequence[Finding],
    components: Sequence[ComponentNorms],
    costs: Sequence[Overhead],
    sections: Sequence[Section] = (),
) -> str:
    """The report as Markdown; names out of the run are escaped."""
    parts = [
        f"# {_plain(run.path.resolve().name)}",
        f"**{_plain(verdict.headline)}** {_prose(verdict.sentence)}",
    ]
    groups = grouped(findings)
    notes = [one for one in findings if one.rank == 0]
    if groups:
        told = (_group(number, one) for number, one in enumerate(groups, start=1))
        parts += ["## What is wrong, and what to try", *told]
        command = apply_command(run.path, findings)
        parts += ["Make an experiment with these changes:", f"    {command}"] if command else []
    parts += [
        "## Charts",
        "![Loss and learning rate](training.png)",
        "![Gradient norm by component](gradient_flow.png)",
        "## Gradients by component",
        _norms(components) if components else "None were measured.",
    ]
    for section in sections:
        parts += _section(section)
    if notes:
        parts += ["## Noted", *(f"- {_prose(f'{noted(one)} {one.suggestion}')}" for one in notes)]
    if costs:
        parts += ["## Cost of watching", _costs(costs)]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it stands."""
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>()#!|&~])", r"\\\1", text)


def _prose(text: str) -> str:
    """A sentence of ours, in which names stand between backticks."""
    parts = " ".join(text.split()).split("`")
    if len(parts) % 2 == 0:
        return _plain(text)
    return "".join(
        f"`{part.replace('|', '/')}`" if index % 2 else _escaped(part)
        for index, part in enumerate(parts)
    )


def _group(number: int, group: Group) -> str:
    one = group.first
    steps, words = step_words(one.first_step, one.last_step), what_is_wrong(one)
    where = f"in {_plain(one.component)}" if one.component and "`" not in words else ""
    lines = [
        f"### {number}. {_prose(capital(words))}",
        f"*{', '.join(filter(None, [group.severity, steps, where]))}; rule {_plain(one.rule)}*",
        _prose(one.message),
        f"**Try:** {_prose(to_try(one.suggestion))}",
    ]
    if one.overrides:
        lines += ["As overrides:", f"    {override_words(one.overrides)}"]
    if group.elsewhere:
        lines += ["The same elsewhere:", _items(group, group.elsewhere)]
    if group.consequences:
        lines += ["Consequences:", _items(group, group.consequences)]
    return "\n\n".join(lines)


def _items(group: Group, findings: Sequence[Finding]) -> str:
    return "\n".join(_item(one, group.told(one)) for one in findings)


def _item(one: Finding, message: str) -> str:
    steps = step_words(one.first_step, one.last_step)
    where = f" ({steps})" if steps else ""
    return f"- **{_prose(capital(what_is_wrong(one)))}**{where}. {_prose(message)}"


def _section(section: Section) -> list[str]:
    parts = [f"## {_plain(section.title)}", *(_prose(line) for line in section.lines)]
    parts += [f"![{_plain(section.title)}]({name}.png)" for name in section.charts]
    for table in section.tables:
        parts += [f"### {_plain(table.title)}"] * bool(table.title) + [_cells(table)]
    return parts


def _cells(table: Table) -> str:
    rows = [[_plain(cell) for cell in row] for row in table.rows]
    return _table([_plain(name) for name in table.columns], rows, table.left)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _norms(components: Sequence[ComponentNorms]) -> str:
    head = ["component", "mean norm", "std", "max", "min", "elements", "no gradient", "frozen"]
    rows = [
        [
            _plain(one.component),
            *(short(value) for value in (one.mean, one.std, one.max, one.min)),
            f"{one.elements:,}",
            str(one.missing),
            str(one.frozen),
        ]
        for one in components
    ]
    return _table(head, rows)


def _costs(costs: Sequence[Overhead]) -> str:
    head = ["diagnostic", "measured", "host time", "share of training"]
    rows = [
        [
            _plain(one.diagnostic),
            "-" if one.measured is None else str(one.measured),
            "-" if one.seconds is None else f"{one.seconds:.2f} s",
            "-" if one.share is None else f"{one.share:.2%}",
        ]
        for one in costs
    ]
    return _table(head, rows)
