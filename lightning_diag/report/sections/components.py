"""What each part of the model is and costs, out of the rows of ComponentProfiler."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_diag.report.section import Section, Table
from lightning_diag.report.theme import chart_config
from lightning_diag.report.words import short

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["components_section"]

Row = dict[str, Any]
Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_WHOLE = "whole model"
_TIMES = ("forward_seconds", "backward_seconds", "step_share", "step_seconds")
_COUNTS = ("forward_flops", "saved_bytes", "peak_bytes", "eager")
_SIZES = ("parameters", "share", "trainable", "frozen", "buffers", "bytes")
_MOST = 20
_SAID = 40
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def components_section(run: "Run") -> Section | None:
    """Sizes, times, memory and operations of each component, and what modules said of themselves.

    Times are medians over the measured steps; those in which operators were counted, which slows
    the forward, are taken only where there are no others.

    Args:
        run: What `read_run` returned.

    Returns:
        None where the run has no such rows.
    """
    rows = [row for row in run.frame("component").to_dicts() if _number(row, "parameters")]
    said = _said_table(run)
    if not rows:
        return Section("Components", tables=(said,)) if said else None
    parts, whole = _parts(rows)
    tables = [_size_table(parts, whole)]
    timed = {name: part for name, part in parts.items() if _is_timed(part)}
    if timed or _is_timed(whole):
        tables.append(_cost_table(timed, whole))
    tables += [said] if said else []
    return Section(
        "Components",
        lines=tuple(_lines(parts, whole)),
        tables=tuple(tables),
        charts={"components": _chart(parts)} if parts else {},
    )


def _parts(rows: list[Row]) -> tuple[dict[str, Row], Row]:
    """What is known of each component, in the order of the rows, and of the whole model."""
    found: dict[str | None, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["step"] if row["step"] is not None else -1):
        found.setdefault(row["component"], []).append(row)
    whole = found.pop(None, None)
    parts = {str(name): _known(own) for name, own in found.items()}
    return parts, _known(whole) if whole else {}


def _known(rows: list[Row]) -> Row:
    known: Row = {key: _last(rows, key) for key in (*_SIZES, *_COUNTS)}
    timed = [row for row in rows if any(_number(row, key) for key in _TIMES)]
    quiet = [row for row in timed if not row.get("counting")] or timed
    for key in _TIMES:
        values = [row[key] for row in quiet if _number(row, key)]
        known[key] = statistics.median(values) if values else None
    return known | {"measured": len(quiet), "slowed": any(r.get("counting") for r in quiet)}


def _number(row: Row, key: str) -> bool:
    return isinstance(row.get(key), int | float)


def _last(rows: list[Row], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if _number(row, key)), None)


def _is_timed(part: Row) -> bool:
    return any(part.get(key) is not None for key in _TIMES)


def _size_table(parts: dict[str, Row], whole: Row) -> Table:
    columns = ("component", "parameters", "of total", "trainable", "frozen", "buffers", "size")
    cells: list[tuple[str, ...]] = [
        (
            name,
            _count(part.get("parameters")),
            _percent(part.get("share")),
            *(_count(part.get(key)) for key in ("trainable", "frozen", "buffers")),
            _size(part.get("bytes")),
        )
        for name, part in _with_whole(parts, whole)
    ]
    return Table(columns, cells, title="Parameters")


def _cost_table(parts: dict[str, Row], whole: Row) -> Table:
    costs = ("forward", "backward", "of step", "forward operations", "kept for backward", "peak")
    cells: list[tuple[str, ...]] = [
        (
            f"{name} (eager copy)" if part.get("eager") else name,
            _milliseconds(part.get("forward_seconds")),
            _milliseconds(part.get("backward_seconds")),
            _percent(part.get("step_share")),
            short(part.get("forward_flops")),
            _size(part.get("saved_bytes")),
            _size(part.get("peak_bytes")),
        )
        for name, part in _with_whole(parts, whole)
    ]
    return Table(("component", *costs), cells, title="Time and memory of a step")


def _with_whole(parts: dict[str, Row], whole: Row) -> list[tuple[str, Row]]:
    return [*parts.items(), *([(_WHOLE, whole)] if whole else [])]


def _said_table(run: "Run") -> Table | None:
    rows = [row for row in run.frame("component_internal").to_dicts() if row.get("name")]
    if not rows:
        return None
    last = {(row.get("module"), row["name"]): row for row in rows}
    cells = [
        (
            str(module or _WHOLE),
            str(name),
            *(short(_float(row, k)) for k in ("value", "min", "max")),
        )
        for (module, name), row in list(last.items())[:_SAID]
    ]
    more = f", {_SAID} of {len(last)}" if len(last) > _SAID else ""
    columns = ("module", "name", "value", "min", "max")
    return Table(columns, cells, title=f"What modules said of themselves, last{more}", left=2)


def _float(row: Row, key: str) -> float | None:
    return float(row[key]) if _number(row, key) else None


def _lines(parts: dict[str, Row], whole: Row) -> list[str]:
    lines = []
    total, trainable = whole.get("parameters"), whole.get("trainable")
    if total is not None and trainable is not None:
        lines.append(f"{trainable:,} of {total:,} parameters are trainable.")
    shares = {name: part["step_share"] for name, part in parts.items() if part.get("step_share")}
    if shares:
        name = max(shares, key=lambda name: float(shares[name]))
        share, own = _percent(shares[name]), parts[name].get("share")
        lines.append(
            f"{_quoted(name)} takes the largest part of a step, {share} of its time, "
            f"with {_percent(own)} of the parameters."
        )
    elif any(part.get("eager") for part in parts.values()):
        lines.append("The components are compiled: their times are those of an eager copy.")
    if whole.get("slowed"):
        lines.append("Operators were counted while these times were taken, which slowed them.")
    return lines


def _chart(parts: dict[str, Row]) -> Chart:
    import altair as alt

    names = sorted(parts, key=lambda name: -(parts[name].get("share") or 0))[:_MOST]
    left_out = len(parts) - len(names)
    notes = [f"{left_out} more components are not drawn."] if left_out else []
    panels = [_bars("share of the parameters, %", names, _share_bars(parts, names), legend=False)]
    times = _time_bars(parts, names)
    if times:
        panels.append(_bars("time of a step, ms", names, times, legend=True))
    words = [f"{name} {_percent(parts[name].get('share'))}" for name in names]
    title = "Components: size and time"
    chart: Any = alt.vconcat(*panels, spacing=16).resolve_scale(color="independent")
    return chart.properties(
        title=alt.Title(title, subtitle=notes) if notes else alt.Title(title),
        description=f"{title}. Share of the parameters: {', '.join(words)}.",
    ).configure(**chart_config())


def _share_bars(parts: dict[str, Row], names: Sequence[str]) -> list[Row]:
    return [
        {"name": name, "value": 100 * (parts[name].get("share") or 0), "what": "parameters"}
        for name in names
    ]


def _time_bars(parts: dict[str, Row], names: Sequence[str]) -> list[Row]:
    return [
        {"name": name, "value": 1000 * parts[name][key], "what": key.removesuffix("_seconds")}
        for name in names
        for key in ("forward_seconds", "backward_seconds")
        if parts[name].get(key) is not None
    ]


def _bars(label: str, names: Sequence[str], rows: list[Row], *, legend: bool) -> Chart:
    import altair as alt

    chart = alt.Chart({"values": rows}).mark_bar()
    return chart.encode(
        x=alt.X("value:Q", title=label, stack="zero"),
        y=alt.Y("name:N", title=None, sort=list(names)),
        color=alt.Color(
            "what:N",
            scale=alt.Scale(domain=list(dict.fromkeys(row["what"] for row in rows))),
            legend=alt.Legend(title=None) if legend else None,
        ),
        tooltip=["name:N", "what:N", alt.Tooltip("value:Q", format=".4~g")],
    ).properties(width=820, height={"step": 22})


def _quoted(name: str) -> str:
    return f"`{name.replace('`', chr(39))}`"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{short(1000 * value)} ms"


def _size(value: float | None) -> str:
    if value is None:
        return "-"
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
