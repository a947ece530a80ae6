"""Was the run dead, since when, why, and what was done about it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_diag.report.section import Section, Table
from lightning_diag.report.series import Panel, line_chart, points_by
from lightning_diag.report.words import short, step_words

if TYPE_CHECKING:
    import polars as pl

    from lightning_diag.records.read_run import Run

__all__ = ["collapse_section"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_MOST = 20
_ORIGINS = 3
_WORDS = {
    "nonfinite_loss": "loss not finite",
    "nonfinite_gradient": "gradient not finite",
    "exploding_gradient": "gradient explodes",
    "vanishing_gradient": "gradient vanishes",
    "loss_spike": "loss spike",
    "one_class": "one class predicted",
    "constant_prediction": "constant predictions",
}
_COLUMNS = ("steps", "what happened", "done", "events", "loss", "gradient norm", "variance")
_PANELS = (
    ("loss", "loss"),
    ("gradient norm", "gradient_norm"),
    ("variance of predictions", "variance"),
)


@dataclass
class _Streak:
    """Events in a row."""

    first: int
    last: int
    events: int
    kinds: dict[str, None]
    row: Mapping[str, Any]
    action: str


def collapse_section(run: "Run") -> Section | None:
    """Events in a row, what they were and what followed.

    Args:
        run: What `read_run` returned.

    Returns:
        None where `CollapseStop` wrote nothing.
    """
    frame = run.frame("collapse")
    if frame.is_empty() or not {"event", "step"} <= set(frame.columns):
        return None
    rows = [row for row in frame.to_dicts() if _whole(row.get("step")) is not None]
    if not rows:
        return None
    streaks = _streaks(sorted(rows, key=lambda row: int(row["step"])))
    lines = [_sentence(streaks, rows)]
    reason = run.info.get("stop_reason")
    if isinstance(reason, Mapping) and reason.get("diagnostic") == "CollapseStop":
        lines.append(_stopped(reason))
    lines += _origins(run.frame("nonfinite"))
    cells = [_cells(streak) for streak in streaks[-_MOST:]]
    title = "Events in a row" + (f", the last {_MOST}" if len(streaks) > _MOST else "")
    return Section(
        "Collapse",
        lines=tuple(lines),
        tables=(Table(_COLUMNS, cells, title, left=3),) if cells else (),
        charts={"collapse": _chart(frame)},
    )


def _streaks(rows: list[dict[str, Any]]) -> list[_Streak]:
    found: list[_Streak] = []
    running = 0
    for row in rows:
        streak = _whole(row.get("streak")) or 0
        if not row.get("event"):
            # a step that the scaler skipped leaves the row of events as it is
            running = streak
            continue
        step = int(row["step"])
        if not found or not running or streak <= running:
            found.append(_Streak(step, step, streak, {}, row, ""))
        last = found[-1]
        last.last, last.events, last.row = step, max(streak, 1), row
        last.kinds.update(dict.fromkeys(str(row.get("kinds") or "unknown").split(",")))
        last.action = _action(row) or last.action
        running = streak
    return found


def _action(row: Mapping[str, Any]) -> str:
    action, restored = row.get("action"), _whole(row.get("restored_step"))
    if action == "rollback" and restored is not None:
        return f"back to the state after {restored} steps"
    return {"stop": "stopped", "warn": "warned", "rollback": "rolled back"}.get(str(action), "")


def _sentence(streaks: list[_Streak], rows: list[dict[str, Any]]) -> str:
    last = max(int(row["step"]) for row in rows)
    if not streaks:
        return f"No step was an event, up to step {last}."
    totals = [_whole(row.get("events_total")) or 0 for row in rows]
    total = max([*totals, sum(streak.events for streak in streaks)])
    several = f"{total} steps were events" if total != 1 else "1 step was an event"
    longest = max(streak.events for streak in streaks)
    row = f", at most {longest} in a row" if longest > 1 else ""
    return f"{several}, the first at step {streaks[0].first}{row}, up to step {last}."


def _origins(frame: "pl.DataFrame") -> list[str]:
    """Where numbers that are not finite came from, for the steps that were made again."""
    if not {"message", "step"} <= set(frame.columns):
        return []
    known = [row for row in frame.to_dicts() if row["message"] and row["step"] is not None]
    return [f"Step {row['step']} was made again: {row['message']}" for row in known[:_ORIGINS]]


def _stopped(reason: Mapping[str, Any]) -> str:
    message = str(reason.get("message") or "The run was stopped.")
    text = f"{message[:1].upper()}{message[1:]}"
    delay = reason.get("delayed_by")
    return f"{text} The stop had to wait for `{delay}`." if delay else text


def _cells(streak: _Streak) -> tuple[str, ...]:
    kinds = ", ".join(_WORDS.get(kind, kind) for kind in streak.kinds)
    numbers = (_value(streak.row, key) for key in ("loss", "gradient_norm", "variance"))
    steps = step_words(streak.first, streak.last)
    return (steps, kinds, streak.action or "-", str(streak.events), *numbers)


def _value(row: Mapping[str, Any], key: str) -> str:
    if row.get(f"{key}_nonfinite"):
        return "not finite"
    value = row.get(key)
    number = value if isinstance(value, int | float) and math.isfinite(value) else None
    return short(number)


def _chart(frame: "pl.DataFrame") -> Chart:
    panels = [
        Panel(label, series, log=_is_wide(series), height=150)
        for label, key in _PANELS
        if (series := points_by(frame, key))
    ]
    said = ("Judged steps that were recorded; a gap where a value is not finite.",)
    return line_chart("Signs of collapse", panels, said=said)


def _is_wide(series: Mapping[str, list[tuple[float, float | None]]]) -> bool:
    """Whether the values are positive and span two decades."""
    values = [
        value
        for points in series.values()
        for _, value in points
        if value is not None and math.isfinite(value)
    ]
    return bool(values) and min(values) > 0 and max(values) > 100 * min(values)


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None
