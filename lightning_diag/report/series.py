"""Lines over training steps, in one or several panels: most charts of a run are just that."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_diag.report.annotations import Onset, band_layer, mark_layer, onset_layer, step_axis
from lightning_diag.report.theme import DASHES, WARNING, chart_config
from lightning_diag.report.thinning import thin

if TYPE_CHECKING:
    import altair as alt
    import polars as pl

__all__ = ["Panel", "Points", "line_chart", "points_by", "with_data"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

Points = Sequence[tuple[float, float | None]]
"""Step and value; None and what is not finite break a line."""

Rows = list[dict[str, Any]]

_POINTS = 2000
_MOST = 10
_FEW = 60
_WIDTH = 820
_GAP = 70  # pixels between columns, for the numbers of an axis
_MOST_TICKS = 6


@dataclass(frozen=True)
class Panel:
    """One plot of a chart.

    Args:
        label: Title of the vertical axis, with the unit.
        series: Name to its points ``(step, value)``; None and non-finite values break a line.
        log: Draw on a logarithmic axis; what is not positive is left out.
        domain: Ends of the vertical axis, None for those of the data.
        rules: Horizontal lines to compare with, label to value.
        height: In pixels.
        others: Further series, drawn thin and pale behind these, without a place in the legend.
        title: Above the plot, where the label is not enough.
        empty: Why it may have no values, for its place to be kept; without it there is no panel
            then.
        band: Ends of the usual range, which is shaded.
        marks: Steps to mark, at the lower edge if the label begins with ``zero`` and at the upper
            one otherwise, by what was seen there.
        words: Names of values, where they stand for words.
    """

    label: str
    series: Mapping[str, Points]
    log: bool = False
    domain: tuple[float, float] | None = None
    rules: Mapping[str, float] = field(default_factory=dict)
    height: int = 200
    others: Mapping[str, Points] = field(default_factory=dict)
    title: str = ""
    empty: str = ""
    band: tuple[float, float] | None = None
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    words: Mapping[float, str] = field(default_factory=dict)


def points_by(
    frame: "pl.DataFrame", value: str, by: str = "component", whole: str = "whole model"
) -> dict[str, list[tuple[float, float | None]]]:
    """The points of each component out of a frame of rows, in order of steps.

    Args:
        frame: What `Run.frame` gave; without the columns there are no points.
        value: Column of the values.
        by: Column of the names.
        whole: Name of the rows that have none.
    """
    found: dict[str, list[tuple[float, float | None]]] = {}
    if not {value, "step"} <= set(frame.columns) or not frame[value].dtype.is_numeric():
        return found
    names = frame[by] if by in frame.columns else [None] * len(frame)
    for step, name, number in zip(frame["step"], names, frame[value], strict=True):
        if step is not None:
            found.setdefault(whole if name is None else str(name), []).append((step, number))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def line_chart(
    title: str,
    panels: Iterable[Panel],
    *,
    said: Sequence[str] = (),
    x: str = "optimizer step",
    columns: int = 1,
    onset: Onset | None = None,
    plot_width: int = _WIDTH,
    most_points: int = _POINTS,
) -> Chart:
    """Panels of lines, with a legend each, or one for all where they have the same names.

    The ten series of a panel with the largest last value are drawn, each with at most 2000 points
    that keep every peak; what is left out is said below the title.

    Args:
        title: Title of the chart.
        panels: What to draw, top to bottom.
        said: Sentences below the title.
        x: Title of the horizontal axis.
        columns: Panels beside one another.
        onset: What to mark in every panel, and to name in the first.
        plot_width: Of all columns together, in pixels.
        most_points: Of a series.
    """
    import altair as alt

    drawn, notes, words, legends = [], list(said), [], []
    datasets: dict[str, Rows] = {}
    panels = [panel for panel in panels if panel.empty or _finite(panel)]
    if not any(_finite(panel) for panel in panels):
        return _nothing(title)
    edges = _edges(panels, onset)
    width = (plot_width - _GAP * (columns - 1)) // columns
    for number, panel in enumerate(panels):
        names = _largest(panel)
        called = panel.title or panel.label
        if 0 < len(names) < len(panel.series):
            notes.append(f"{called}: {len(names)} of {len(panel.series)} are drawn.")
        lowest = number >= len(panels) - columns
        # before something began, the line is mostly far from what it is compared with
        late = onset is not None and onset.first > edges[0] + 0.3 * (edges[1] - edges[0])
        across = _Across(edges, x if lowest else None, width, most_points, late)
        plot = _panel(panel, names, across, datasets)
        if onset is not None:
            plot = onset_layer(plot, onset, edges, named=number == 0)
        drawn.append(plot)
        legends.append(names)
        words += [f"{called}: {_described(name, panel.series[name])}" for name in names]
        words += [f"{label} at {len(steps)} steps" for label, steps in panel.marks.items()]
    alike: Literal["shared", "independent"] = (
        "shared" if all(names == legends[0] for names in legends) else "independent"
    )
    chart = (
        alt.vconcat(*drawn, spacing=16)
        if columns == 1
        else alt.concat(*drawn, columns=columns, spacing=24)
    )
    chart = (
        chart.resolve_scale(color=alike, strokeDash=alike)
        .properties(
            title=alt.Title(title, subtitle=notes) if notes else alt.Title(title),
            description=_in_words(title, edges, words, onset),
        )
        .configure(**chart_config())
    )
    return with_data(chart, datasets)


def with_data(chart: Chart, datasets: Mapping[str, Rows]) -> Chart:
    """A chart with the data sets that its layers name.

    Args:
        chart: An Altair chart that is made but for its data.
        datasets: Name to rows.
    """
    # as an argument, every point would be copied and checked several times
    chart["datasets"] = dict(datasets)
    return chart


class _Across(NamedTuple):
    """The horizontal axis of a panel, how finely lines are drawn, and where words stand."""

    edges: tuple[float, float]
    title: str | None
    width: int
    most_points: int
    words_left: bool


def _in_words(
    title: str, edges: tuple[float, float], words: Sequence[str], onset: Onset | None
) -> str:
    said = f" {onset.words[:1].upper()}{onset.words[1:]}." if onset is not None else ""
    return f"{title}, steps {edges[0]:g} to {edges[1]:g}. {'; '.join(words)}.{said}"


def _usable(panel: Panel, value: float | None) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not panel.log)


def _finite(panel: Panel) -> bool:
    drawn = (_usable(panel, value) for points in _all(panel).values() for _, value in points)
    return any(drawn) or any(panel.marks.values())


def _all(panel: Panel) -> dict[str, Points]:
    return {**panel.others, **panel.series}


def _edges(panels: Sequence[Panel], onset: Onset | None = None) -> tuple[float, float]:
    drawn = [points for panel in panels for points in _all(panel).values()]
    steps = [step for points in drawn for step, _ in points]
    steps += [step for panel in panels for marked in panel.marks.values() for step in marked]
    steps += [] if onset is None else [onset.first]
    low, high = min(steps, default=0), max(steps, default=1)
    return (low, high) if low < high else (low - 1, high + 1)


def _largest(panel: Panel) -> list[str]:
    last = {
        name: next((value for _, value in reversed(points) if _usable(panel, value)), None)
        for name, points in panel.series.items()
    }
    known = [name for name, value in last.items() if value is not None]
    kept = set(sorted(known, key=lambda name: -(last[name] or 0))[:_MOST])
    return [name for name in known if name in kept]


def _panel(panel: Panel, names: list[str], on: _Across, datasets: dict[str, Rows]) -> Chart:
    import altair as alt

    def named(rows: Rows) -> Chart:
        name = f"series {len(datasets) + 1}"
        datasets[name] = rows
        return alt.Chart({"name": name})

    size: dict[str, Any] = {"width": on.width, "height": panel.height}
    if panel.title:
        size["title"] = alt.Title(panel.title, fontSize=12, offset=6, limit=on.width)
    if not names and not panel.others and not any(panel.marks.values()):
        return _words(f"No {panel.label}: {panel.empty}").properties(**size)
    rows = [row for name in names for row in _rows(panel, name, on.most_points)]
    most = max(20, on.most_points // max(1, len(panel.others)))
    pale = [row for name in panel.others for row in _rows(panel, name, most)]
    if not rows and not pale:
        # marks alone: no height means anything
        panel = replace(panel, log=False, domain=(0.0, 1.0), band=None, rules={})
    across = alt.X(
        "x:Q",
        title=on.title,
        scale=alt.Scale(domain=list(on.edges), nice=False),
        axis=step_axis(on.edges),
    )
    scale = alt.Scale(type="log") if panel.log else alt.Scale(zero=False)
    if panel.domain is not None:
        scale = alt.Scale(domain=list(panel.domain), type="log" if panel.log else "linear")
    up = alt.Y("y:Q", title=panel.label, scale=scale, axis=_axis(panel, [*rows, *pale]))
    tips = [alt.Tooltip("x:Q", title="step"), alt.Tooltip("y:Q", format=".4~g")]
    legend = (
        None
        if not names or (len(names) == 1 and len(panel.series) == 1)
        else alt.Legend(title=None, symbolType="stroke")
    )
    dashes = [list(DASHES[index // 5 % len(DASHES)]) for index in range(len(names))]
    base = named(rows).encode(
        x=across,
        y=up,
        detail="segment:N",
        color=alt.Color("name:N", scale=alt.Scale(domain=names), legend=legend),
        strokeDash=alt.StrokeDash(
            "name:N", scale=alt.Scale(domain=names, range=dashes), legend=legend
        ),
        tooltip=["name:N", *tips],
    )
    few = len(rows) <= _FEW * max(1, len(names))
    layers: list[Chart] = [] if panel.band is None else [band_layer(panel.band, up)]
    if pale:
        behind = named(pale).mark_line(strokeWidth=1, opacity=0.6, color="#7b8794")
        layers.append(behind.encode(x=across, y=up, detail="segment:N", tooltip=["name:N", *tips]))
    layers.append(base.mark_line(point=alt.OverlayMarkDef(size=22) if few else False))
    for label, value in panel.rules.items():
        rule = alt.Chart({"values": [{"y": value, "label": label}]}).encode(y="y:Q")
        layers.append(rule.mark_rule(strokeDash=[4, 3], color=WARNING, opacity=0.9))
        # at the upper edge words would stand among those above the plot
        high = panel.domain is not None and value > 0.85 * panel.domain[1]
        where: dict[str, Any] = {"align": "right", "dx": -4, "x": "width"}
        if on.words_left:
            where = {"align": "left", "dx": 4, "x": 0}
        text = rule.mark_text(dy=9 if high else -7, **where)
        layers.append(text.encode(text="label:N"))
    layers += [
        mark_layer(label, steps, across, panel.height) for label, steps in panel.marks.items()
    ]
    return alt.layer(*layers).properties(**size)


def _axis(panel: Panel, rows: Sequence[Mapping[str, Any]]) -> "alt.Axis":
    import altair as alt

    if panel.words:
        names = ", ".join(f"'{value:g}': '{word}'" for value, word in panel.words.items())
        return alt.Axis(values=list(panel.words), labelExpr=f"({{{names}}})[datum.value]")
    # large and small numbers as powers, the others as people write them
    plain = "abs(datum.value) >= 0.001 && abs(datum.value) < 1000000 || datum.value == 0"
    text = f"{plain} ? format(datum.value, ',~r') : format(datum.value, '~e')"
    shown = [*(row["y"] for row in rows), *(panel.band or ()), *panel.rules.values()]
    decades = _decades([y for y in shown if y > 0]) if panel.log and rows else []
    if len(decades) > 1:
        return alt.Axis(labelExpr=text, values=decades)
    return alt.Axis(labelExpr=text, tickCount=5)


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten that lie among positive numbers, not too many of them."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    every = max(1, math.ceil((high - low) / _MOST_TICKS))
    return [float(f"1e{power}") for power in range(low, high + 1, every)]


def _rows(panel: Panel, name: str, most: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    segment = 0
    for step, value in _all(panel)[name]:
        if value is None or not _usable(panel, value):
            segment += 1
            continue
        short = float(f"{value:.6g}")
        rows.append({"x": step, "y": short, "name": name, "segment": f"{name} {segment}"})
    return [rows[index] for index in thin([row["y"] for row in rows], most)]


def _described(name: str, points: Points) -> str:
    values = [value for _, value in points if value is not None and math.isfinite(value)]
    return f"{name} goes from {values[0]:.4g} to {values[-1]:.4g}"


def _nothing(title: str) -> Chart:
    chart = _words("Nothing was measured.")
    return chart.properties(
        width=_WIDTH, height=80, title=title, description=f"{title}: nothing was measured."
    ).configure(**chart_config())


def _words(message: str) -> Chart:
    import altair as alt

    chart = alt.Chart({"values": [{"message": message}]})
    # the width of a panel among others is not known to an expression
    return chart.mark_text(fontSize=13, align="left", x=0, y=40).encode(text="message:N")
