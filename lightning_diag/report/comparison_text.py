"""A comparison on a terminal."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_diag.report.comparison import Comparison, Side
from lightning_diag.report.comparison_findings import FindingChange
from lightning_diag.report.comparison_metrics import MetricChange
from lightning_diag.report.comparison_settings import Difference
from lightning_diag.report.norms import WHOLE
from lightning_diag.report.words import short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["number_words", "one_line", "print_comparison", "setting_words"]

_COLOURS = {"critical": "bold red", "warning": "bold yellow", "info": "cyan"}
_STYLES = {"new": "bold red", "still": "bold yellow", "gone": "bold green"}
_WORDS = {"new": "NEW", "still": "STILL THERE", "gone": "GONE"}
_BETTER = {True: "green", False: "red", None: ""}
_MOST = 20  # rows of a table; JSON has them all


def print_comparison(comparison: Comparison, console: "Console") -> None:
    """Print findings, metrics, machine, configuration, environment and the cost of watching.

    Args:
        comparison: What `compare` returned.
        console: A rich console.
    """
    from rich.text import Text

    sides = comparison.before, comparison.after
    for letter, side in zip("AB", sides, strict=True):
        console.print(_side(letter, side))
    console.rule("Findings", align="left")
    console.print(Text(comparison.headline, "bold"))
    for one in comparison.findings:
        console.print(_finding(one))
    if comparison.metrics:
        console.rule("Metrics", align="left")
        console.print(_metrics(comparison.metrics))
    for title, rows in (("Machine", comparison.machine), ("Watching", comparison.watching)):
        if rows:
            console.rule(title, align="left")
            console.print(_numbers(rows))
    for title, differences in (
        ("Configuration", comparison.configuration),
        ("Environment", comparison.environment),
    ):
        console.rule(title, align="left")
        if differences:
            console.print(_settings(differences))
        else:
            console.print("No difference.")


def number_words(value: float | None, unit: str = "") -> str:
    """A number of a comparison: shares as per cent, NaN by its name.

    Example:
        >>> number_words(0.0123, "share of training"), number_words(float("nan"))
        ('1.23%', 'NaN')
    """
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    return f"{value:.2%}" if unit.startswith("share") else short(value)


def one_line(text: str) -> str:
    r"""What came out of a run without what moves a cursor or begins another line.

    Example:
        >>> one_line("a\n b\x1b[31m")
        'a b?[31m'
    """
    return "".join(one if one.isprintable() else "?" for one in " ".join(text.split()))


def setting_words(value: object) -> str:
    """A value of a configuration in one line, not too long.

    Example:
        >>> setting_words(None), setting_words([1, 2]), setting_words(0.5)
        ('null', '[1, 2]', '0.5')
    """
    if value is None:
        return "null"
    text = one_line(str(value))
    return text if len(text) <= 60 else f"{text[:59]}…"


def _side(letter: str, side: Side) -> "Text":
    from rich.text import Text

    status = f", {one_line(str(side.status))}" if side.status else ""
    steps = "" if side.steps is None else f", step {side.steps}"
    line = Text(f"{letter} {one_line(side.name)}", "bold")
    return line.append(f"{status}{steps}: {side.verdict.headline}", "not bold")


def _finding(one: FindingChange) -> "Text":
    from rich.text import Text

    found = one.finding
    line = Text(f"{_WORDS[one.state]:<12}", _STYLES[one.state])
    line.append(f"{found.severity.upper()} ", _COLOURS[found.severity])
    line.append(f"{found.issue}: {one_line(found.component or WHOLE)}", "bold")
    if one.change in ("worse", "milder") and one.before is not None:
        line.append(f" ({one.change}: was {one.before.severity})")
    if found.caused_by:
        known = ", which was there before" if one.known_cause else ""
        line.append(f" (caused by {found.caused_by.replace('_', ' ')}{known})", "dim")
    if one.moved is not None:
        line.append(f" (was in: {one_line(one.moved or WHOLE)})")
    if not one.reached:
        line.append(f" (B has not come to step {found.first_step}, where it began in A)")
    if one.state != "gone":
        line.append(f"\n            {one_line(found.message)}")
    return line


def _metrics(rows: Sequence[MetricChange]) -> Any:  # noqa: ANN401 - rich is loaded here only
    table = _table("metric", "A last", "B last", "A best", "B best", "at step", "A", "B")
    for one in rows[:_MOST]:
        values = (one.before, one.after, one.best_before, one.best_after)
        step = "-" if one.step is None else str(one.step)
        at_step = (number_words(one.at_step_before), number_words(one.at_step_after))
        cells = [one.name, *map(number_words, values), step, *at_step]
        table.add_row(*_cells(cells, _BETTER[one.better]))
    return _with_more(table, len(rows))


def _numbers(rows: Sequence[MetricChange]) -> Any:  # noqa: ANN401
    table = _table("", "A", "B", "unit")
    for one in rows[:_MOST]:
        pair = (number_words(value, one.unit) for value in (one.before, one.after))
        table.add_row(*_cells([one.name, *pair, one.unit], ""))
    return _with_more(table, len(rows))


def _settings(rows: Sequence[Difference]) -> Any:  # noqa: ANN401
    table = _table("key", "A", "B")
    for one in rows[:_MOST]:
        cells = [one.key, setting_words(one.before), setting_words(one.after)]
        table.add_row(*_cells(cells, ""))
    return _with_more(table, len(rows))


def _table(*names: str) -> Any:  # noqa: ANN401
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table


def _cells(texts: Sequence[str], style: str) -> "list[Text]":
    from rich.text import Text

    # what came out of a run is text, never markup
    return [
        Text(one_line(text), style if number == len(texts) - 1 else "")
        for number, text in enumerate(texts)
    ]


def _with_more(table: Any, count: int) -> Any:  # noqa: ANN401
    if count > _MOST:
        table.caption = f"{count - _MOST} more rows in the JSON and on the page"
        table.caption_justify = "left"
    return table
