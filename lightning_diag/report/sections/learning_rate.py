"""Which learning rate did the range test suggest, and what did its curve look like?"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_diag.report.section import Section, Table
from lightning_diag.report.theme import WARNING, chart_config
from lightning_diag.report.words import short

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["learning_rate_chart", "learning_rate_section"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_COLUMNS = (
    *("range test", "suggested", "confidence", "configured", "slope", "noise"),
    *("points", "range", "diverged", "cache", "seconds"),
)
_HEADROOM = 2.0  # falls above the start of a curve; what left further would flatten the rest
_LOSS, _SMOOTHED = "loss", "smoothed loss"


def learning_rate_section(run: "Run") -> Section | None:
    """What each range test suggested, and the curve of the last.

    Args:
        run: What `read_run` returned.

    Returns:
        None where `LRCache` wrote nothing.
    """
    rows = [row for row in run.frame("lr_finder").to_dicts() if _told(row)]
    if not rows:
        return None
    last = rows[-1]
    points = run.frame("lr_finder_curve").to_dicts()
    curve = _last_curve([row for row in points if row.get("attempt") == last.get("attempt")])
    title = "Slope: loss by factor e of the learning rate. Noise: of the loss around its average"
    cells = [_cells(number, row) for number, row in enumerate(rows, start=1)]
    charts = {}
    if any(_usable(rate) for rate in curve["lr"]):
        charts["lr_range_test"] = learning_rate_chart(curve, _number(last.get("lr")))
    lines = [_verdict(last), *([said] if (said := _origin(last)) else [])]
    return Section(
        "Learning rate", lines=tuple(lines), tables=(Table(_COLUMNS, cells, title),), charts=charts
    )


def learning_rate_chart(
    curve: Mapping[str, Sequence[float | None]], lr: float | None, *, title: str = "LR range test"
) -> Chart:
    """Loss over the learning rate, measured and smoothed, with a line at the suggestion.

    Args:
        curve: Learning rates (`lr`), losses (`loss`) and smoothed losses (`smoothed`), of one
            length; what is not finite is left out.
        lr: The suggested learning rate, None where there is none.
        title: Title of the chart.
    """
    import altair as alt

    rows = _points(curve)
    domain = _domain(rows)
    across = alt.X(
        "lr:Q",
        title="learning rate, log scale",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(format="~e", tickCount=8, labelOverlap=True, labelFlush=True),
    )
    up = alt.Y(
        "loss:Q",
        title=f"loss, cut off above {domain[1]:.3g}" if domain else "loss",
        scale=alt.Scale(domain=domain) if domain else alt.Scale(zero=False),
        axis=alt.Axis(format="~g", tickCount=5),
    )
    names = alt.Color(
        "what:N", scale=alt.Scale(domain=[_SMOOTHED, _LOSS]), legend=alt.Legend(title=None)
    )
    tips: list[Any] = [
        "what:N",
        alt.Tooltip("lr:Q", format=".3~e"),
        alt.Tooltip("loss:Q", format=".4~g"),
    ]
    base = alt.Chart({"values": rows}).encode(x=across, y=up, color=names, tooltip=tips)
    line = base.transform_filter(f"datum.what === '{_SMOOTHED}'").mark_line(clip=True)
    dots = base.transform_filter(f"datum.what === '{_LOSS}'").mark_point(
        size=22, filled=True, clip=True
    )
    layers: list[Chart] = [dots, line]
    if lr is not None and _usable(lr):
        mark = alt.Chart({"values": [{"lr": lr, "label": f"suggested: {lr:.3g}"}]}).encode(x=across)
        layers.append(mark.mark_rule(color=WARNING, strokeDash=[4, 3], strokeWidth=1.5))
        # on the side where there is more room
        rates = sorted(row["lr"] for row in rows) or [lr]
        right = lr * lr < rates[0] * rates[-1]
        text = mark.mark_text(y=10, align="left" if right else "right", dx=6 if right else -6)
        layers.append(text.encode(text="label:N"))
    return (
        alt.layer(*layers)
        .properties(width=820, height=280, title=title, description=_described(title, rows, lr))
        .configure(**chart_config())
    )


def _domain(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Where the loss stands while it falls; None if all of the curve is near enough."""
    smooth = [float(row["loss"]) for row in rows if row["what"] == _SMOOTHED]
    values = [float(row["loss"]) for row in rows]
    if not smooth or smooth[0] <= min(smooth):
        return None
    top = smooth[0] + _HEADROOM * (smooth[0] - min(smooth))
    return (min(values), top) if max(values) > top else None


def _points(curve: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    return [
        {"lr": rate, "loss": float(f"{loss:.6g}"), "what": what}
        for what, key in ((_LOSS, "loss"), (_SMOOTHED, "smoothed"))
        for rate, loss in zip(curve["lr"], curve[key], strict=True)
        if _usable(rate) and _number(loss) is not None
    ]


def _described(title: str, rows: Sequence[Mapping[str, Any]], lr: float | None) -> str:
    smooth = [row for row in rows if row["what"] == _SMOOTHED]
    if not smooth:
        return f"{title}: nothing was measured."
    first, last = smooth[0], smooth[-1]
    least = min(smooth, key=lambda row: float(row["loss"]))
    said = f"{lr:.3g} is suggested" if lr is not None else "no learning rate is suggested"
    return (
        f"{title}: the smoothed loss goes from {first['loss']:.4g} at {first['lr']:.3g} over "
        f"{least['loss']:.4g} at {least['lr']:.3g} to {last['loss']:.4g} at {last['lr']:.3g}; "
        f"{said}."
    )


def _verdict(row: Mapping[str, Any]) -> str:
    lr, before = _number(row.get("lr")), _number(row.get("lr_before"))
    reason = str(row.get("reason") or "").strip().rstrip(".").replace("`", "'")
    if lr is None:
        kept = "" if before is None else f" {short(before)} is configured."
        return f"No learning rate is suggested{f': {reason}' if reason else ''}.{kept}"
    said = f"A learning rate of {short(lr)} is suggested, with {row.get('confidence')} confidence"
    if before is not None and before > 0:
        factor = lr / before
        times = "as" if 0.995 < factor < 1.005 else f"{short(factor)} times what"
        said += f", {times} is configured ({short(before)})"
    applied = _number(row.get("applied"))
    if applied is not None:
        said += "; it was set" if applied else "; it was not set"
    return f"{said}{f'; {reason}' if reason else ''}."


def _origin(row: Mapping[str, Any]) -> str:
    hit, age = _number(row.get("cache_hit")), _number(row.get("age_hours"))
    if hit:
        when = "" if age is None else f"; it was found {_ago(age)} before"
        return f"It was read from the cache under the key `{_plain(row.get('key'))}`{when}."
    low, high = _number(row.get("min_lr")), _number(row.get("max_lr"))
    points, seconds = _number(row.get("points")), _number(row.get("seconds"))
    if points is None or low is None or high is None:
        return ""
    took = "" if seconds is None else f" in {short(seconds)} s"
    end = ", where the loss diverged before the end" if _number(row.get("diverged")) else ""
    return f"{points:.0f} rates from {short(low)} to {short(high)} were tried{took}{end}."


def _ago(hours: float) -> str:
    return f"{60 * hours:.0f} minutes" if hours < 1 else f"{short(hours)} hours"


def _cells(number: int, row: Mapping[str, Any]) -> tuple[str, ...]:
    def shown(key: str) -> str:
        return short(_number(row.get(key)))

    step = row.get("step")
    diverged = _number(row.get("diverged"))
    hit = _number(row.get("cache_hit"))
    return (
        f"{number}" if step is None else f"{number}, step {step}",
        shown("lr"),
        _plain(row.get("confidence")) or "-",
        *(shown(key) for key in ("lr_before", "slope", "noise", "points")),
        f"{shown('min_lr')} to {shown('max_lr')}",
        "-" if diverged is None else ("yes" if diverged else "no"),
        "-" if hit is None else ("hit" if hit else "miss"),
        shown("seconds"),
    )


def _last_curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """The points of the last test: its numbers begin anew with each."""
    own: list[Mapping[str, Any]] = []
    before = math.inf
    for row in rows:
        point = _number(row.get("point"))
        if point is None:
            continue
        own = [*own, row] if point > before else [row]
        before = point
    keys = ("lr", "loss", "smoothed")
    return {key: [_number(row.get(key)) for row in own] for key in keys}


def _told(row: Mapping[str, Any]) -> bool:
    return any(row.get(key) is not None for key in ("lr", "reason", "confidence", "key", "points"))


def _plain(value: object) -> str:
    return "" if value is None else str(value).replace("`", "'")


def _usable(rate: float | None) -> bool:
    return rate is not None and math.isfinite(rate) and rate > 0


def _number(value: object) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]
