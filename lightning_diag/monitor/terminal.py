"""The runs on a terminal: for those who are on another machine, by a shell."""

import time
from typing import TYPE_CHECKING

from lightning_diag.monitor.watched_run import ENDED, Summary, WatchedRun
from lightning_diag.monitor.watched_runs import WatchedRuns
from lightning_diag.report.words import short
from lightning_diag.rules.finding import Finding

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.text import Text

__all__ = ["duration_words", "screen", "show"]

_COLOURS = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
_COLUMNS = (
    *("run", "state", "step", "loss", "best val", "lr", "samples/s", "time", "left", "findings"),
)
_FEW_COLUMNS = ("run", "state", "step", "loss", "findings")
_WIDE = 110
_MOST_FINDINGS = 8
_MOST_CHARACTERS = 60


def show(runs: WatchedRuns, console: "Console") -> None:
    """Draw the runs again and again, until all of them have ended or it is interrupted.

    Args:
        runs: What to show.
        console: A rich console; one that is no terminal gets one drawing and no more.
    """
    from rich.live import Live

    runs.look(at_once=True)
    if not console.is_terminal:
        console.print(screen(runs, console.width))
        return
    with Live(screen(runs, console.width), console=console, auto_refresh=False) as live:
        while not all(run.summary().state in ENDED for run in runs.runs):
            time.sleep(runs.interval)
            runs.look(at_once=True)
            live.update(screen(runs, console.width), refresh=True)


def screen(runs: WatchedRuns, width: int) -> "Group":
    """A table of the runs, and below it what was found in them.

    Args:
        runs: What to show.
        width: Columns of the terminal; a narrow one shows fewer numbers.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(_clipped(runs.path.resolve().name)), title_justify="left")
    shown = _COLUMNS if width >= _WIDE else _FEW_COLUMNS
    for name in shown:
        left = name in ("run", "state")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for run in runs.runs:
        cells = _cells(run.summary())
        # names of runs are text: brackets in them mean nothing
        table.add_row(*(Text(cells[name]) for name in shown))
    return Group(table, *(line for run in runs.runs for line in _findings(run, len(runs.runs) > 1)))


def duration_words(seconds: float | None) -> str:
    """A time for people.

    Example:
        >>> duration_words(75.0), duration_words(7300.0), duration_words(None)
        ('1 min 15 s', '2 h 1 min', '-')
    """
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _cells(one: Summary) -> dict[str, str]:
    step = "-" if one.step is None else str(one.step)
    if one.planned_steps and one.progress is not None:
        step += f" of {one.planned_steps} ({one.progress:.0%})"
    grave = [f"{count} {name}" for name, count in one.counts.items() if count and name != "info"]
    return {
        "run": _clipped(one.name),
        "state": one.state,
        "step": step,
        "loss": short(one.loss),
        "best val": short(one.best_val_loss),
        "lr": short(one.learning_rate),
        "samples/s": short(one.samples_per_second),
        "time": duration_words(one.elapsed_seconds),
        "left": duration_words(one.remaining_seconds),
        "findings": ", ".join(reversed(grave)) or "none",
    }


def _findings(run: WatchedRun, named: bool) -> "list[Text]":
    from rich.text import Text

    grave = [one for one in run.findings if one.rank > 0]
    lines = [_line(one, run.path.name if named else "") for one in grave]
    if len(lines) > _MOST_FINDINGS:
        more = Text(f"and {len(lines) - _MOST_FINDINGS} more", "dim")
        lines = [*lines[:_MOST_FINDINGS], more]
    return lines


def _line(one: Finding, name: str) -> "Text":
    from rich.text import Text

    where = f" in {_clipped(one.component)}" if one.component else ""
    since = "" if one.first_step is None else f" since step {one.first_step}"
    text = Text(f"{one.issue}{where}{since}. ", _COLOURS[one.severity])
    if name:
        text = Text(f"{_clipped(name)}: ", "bold") + text
    text.append(one.message, "default")
    return text


def _clipped(name: str) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in name)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
