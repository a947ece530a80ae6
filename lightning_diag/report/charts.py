"""The charts of a run: one function each, for PNG files, the HTML page and notebooks."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_diag.report.annotations import step_axis
from lightning_diag.report.flow_data import HEALTHY, SILENT, FlowData, flow_data
from lightning_diag.report.series import with_data
from lightning_diag.report.theme import DASHES, WARNING, chart_config
from lightning_diag.report.training_data import Curve, training_data
from lightning_diag.rules.finding import Finding

if TYPE_CHECKING:
    import altair as alt
    import polars as pl

    from lightning_diag.records.read_run import Run

__all__ = ["gradient_flow", "training"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_SHAPES = {
    SILENT: "triangle-down",
    "NaN or infinity": "cross",
    "step skipped by the scaler": "diamond",
}
_DECADES = (
    "datum.value >= 0.001 && datum.value <= 10000 ? format(datum.value, ',~f') "
    ": replace(format(datum.value, '~e'), '+', '')"
)
_LEFT_OUT = 40  # characters of a component's name in a title


def gradient_flow(
    run: "Run", findings: Sequence[Finding] = (), *, width: int = 820, height: int = 360
) -> Chart:
    """Gradient norm of each component over the run, on a logarithmic axis.

    The ten components with the largest norms are drawn, each with at most 5000 points; what was
    left out is said below the title. A norm of zero has no place on such an axis: it is drawn as
    a triangle at the floor.

    Args:
        run: What `read_run` returned.
        findings: The first steps of those among the first three that are above ``info`` are
            marked by their number.
        width: Width of the plot in pixels.
        height: Height of the plot in pixels.
    """
    import altair as alt

    data = flow_data(run.frame("grad"))
    title = "Gradient norm by component"
    if not data.points and not data.marks:
        return _nothing(title, "No gradients were measured.", width, height // 2)
    x, y = _step_axis(data.steps), _norm_axis(data)
    layers: list[Chart] = [_band(data, y), _lines(data, x, y)]
    layers += [_clip_line(data, y)] if data.clip is not None else []
    layers += [_marks(data, x, y)] if data.marks else []
    firsts = _first_steps(findings, data.steps)
    layers += [_numbers(firsts, x)] if firsts else []
    said = ["Before clipping. Shaded: 0.001 to 1, a usual range; a change says more than a level."]
    said += [f"Numbered: {'; '.join(row['text'] for row in firsts)}."] if firsts else []
    chart: Chart = alt.layer(*layers).properties(
        width=width,
        height=height,
        title=alt.Title(title, subtitle=[*said, *data.said]),
        description=data.described,
    )
    datasets = {"lines": data.points, "marks": data.marks}
    return with_data(chart.configure(**chart_config()), datasets)


def _step_axis(steps: list[int]) -> "alt.X":
    import altair as alt

    scale = alt.Scale(domain=steps, nice=False)
    return alt.X("step:Q", title="optimizer step", scale=scale, axis=step_axis(steps))


def _norm_axis(data: FlowData) -> "alt.Y":
    import altair as alt

    low, high = (round(math.log10(edge)) for edge in data.domain)
    every = max(1, math.ceil((high - low) / 8))
    ticks = [float(f"1e{power}") for power in range(low, high + 1, every)]
    scale = alt.Scale(type="log", domain=data.domain, clamp=True, nice=False)
    axis = alt.Axis(values=ticks, labelExpr=_DECADES)
    return alt.Y("l2:Q", title="l2 norm of the gradient", scale=scale, axis=axis)


def _band(data: FlowData, y: "alt.Y") -> Chart:

    low, high = (min(max(edge, data.domain[0]), data.domain[1]) for edge in HEALTHY)
    base = _chart([{"l2": low, "top": high}])
    return base.mark_rect(color="#009e73", opacity=0.09).encode(y=y, y2="top:Q")


def _by_name(field: str, names: list[str]) -> dict[str, Any]:
    """Colour and stroke pattern of a field, which together tell ten names apart."""
    import altair as alt

    dashes = [list(DASHES[index // 5 % len(DASHES)]) for index in range(len(names))]
    legend = alt.Legend(title=None, symbolType="stroke")
    return {
        "color": alt.Color(field, scale=alt.Scale(domain=names), legend=legend),
        "strokeDash": alt.StrokeDash(
            field, scale=alt.Scale(domain=names, range=dashes), legend=legend
        ),
    }


def _lines(data: FlowData, x: "alt.X", y: "alt.Y") -> Chart:
    import altair as alt

    longest = len(data.points) / max(1, len(data.names))
    stroke: dict[str, Any] = {"strokeWidth": 1.0, "opacity": 0.8} if longest > 400 else {}
    points = alt.OverlayMarkDef(size=22) if longest <= 60 else False
    return (
        _chart("lines")
        .mark_line(point=points, **stroke)
        .encode(
            x=x,
            y=y,
            detail="segment:N",
            tooltip=["component:N", "step:Q", alt.Tooltip("l2:Q", format=".3~e")],
            **_by_name("component:N", data.names),
        )
    )


def _clip_line(data: FlowData, y: "alt.Y") -> Chart:
    import altair as alt

    row = {"l2": data.clip, "label": f"clipped to {data.clip:g}"}
    base = _chart([row]).encode(y=y)
    rule = base.mark_rule(strokeDash=[2, 3], color="#7b8794", strokeWidth=1.5)
    label = base.mark_text(align="right", dx=-4, dy=-7, x="width").encode(text="label:N")
    return alt.layer(rule, label)


def _marks(data: FlowData, x: "alt.X", y: "alt.Y") -> Chart:
    import altair as alt

    kinds = [kind for kind in _SHAPES if any(mark["what"] == kind for mark in data.marks)]
    shapes = alt.Scale(domain=kinds, range=[_SHAPES[kind] for kind in kinds])
    legend = alt.Legend(
        title=None, labelLimit=280, symbolFillColor=WARNING, symbolStrokeColor=WARNING
    )
    return (
        _chart("marks")
        .mark_point(size=45, filled=True, color=WARNING, opacity=0.85)
        .encode(
            x=x,
            y=y,
            shape=alt.Shape("what:N", scale=shapes, legend=legend),
            tooltip=["component:N", "step:Q", "what:N"],
        )
    )


def _first_steps(findings: Sequence[Finding], steps: list[int]) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for number, one in enumerate(findings[:3], start=1):
        if one.rank == 0 or one.first_step is None or not steps[0] <= one.first_step <= steps[1]:
            continue
        name = one.component or "the whole model"
        name = name if len(name) <= _LEFT_OUT else f"{name[: _LEFT_OUT - 1]}…"
        text = f"{number} {one.issue.lower()} in {name}, step {one.first_step}"
        row = rows.setdefault(one.first_step, {"step": one.first_step, "label": "", "text": ""})
        row["label"] += f"{', ' * bool(row['label'])}{number}"
        row["text"] += f"{'; ' * bool(row['text'])}{text}"
    return list(rows.values())


def _numbers(rows: list[dict[str, Any]], x: "alt.X") -> Chart:
    import altair as alt

    base = _chart(rows).encode(x=x)
    rule = base.mark_rule(color=WARNING, strokeDash=[4, 3], opacity=0.8)
    # in the ink of other words: that colour is too pale to be read
    label = base.mark_text(y=-12, fontSize=12, fontWeight="bold")
    return alt.layer(rule, label.encode(text="label:N"))


def training(run: "Run", *, width: int = 820, height: int = 240) -> Chart:
    """Loss curves, and the learning rate below them.

    The losses are the logged metrics with ``loss`` in their name but for ``loss_share``, which is
    none: the whole one before its parts, training before validation. The learning rates are those
    that begin with ``lr``; where the module logs no loss, what `CollapseStop` saw of it is drawn.
    Each has at most 5000 points.

    Args:
        run: What `read_run` returned.
        width: Width of the plots in pixels.
        height: Height of the loss plot in pixels.
    """
    import altair as alt

    data = training_data(run.frame("metrics"))
    if not data.losses:
        data = training_data(_watched(run.frame("loss"), run.frame("metrics")))
    title = "Loss and learning rate"
    if not data.losses and not data.rates:
        return _nothing(title, "No loss and no learning rate were logged.", width, height // 2)
    panels, datasets = [], {}
    for label, curves, tall in (
        ("loss", data.losses, height),
        ("learning rate", data.rates, height // 2),
    ):
        if curves:
            panels.append(_panel(label, curves, data.steps).properties(width=width, height=tall))
            datasets[label] = [row for curve in curves for row in curve.points]
    chart = alt.vconcat(*panels, spacing=18).resolve_scale(
        color="independent", strokeDash="independent"
    )
    chart = chart.properties(
        title=alt.Title(title, subtitle=data.said) if data.said else alt.Title(title),
        description=data.described,
    ).configure(**chart_config())
    return with_data(chart, datasets)


def _watched(loss: "pl.DataFrame", metrics: "pl.DataFrame") -> "pl.DataFrame":
    """What was logged, with the loss that CollapseStop wrote beside it."""
    import polars as pl

    if "loss" not in loss.columns or "lr" not in loss.columns:
        return metrics
    columns = loss.select("step", "loss", "lr")
    return pl.concat([metrics, columns], how="diagonal_relaxed").sort("step")


def _panel(label: str, curves: list[Curve], steps: list[int]) -> Chart:
    import altair as alt

    logarithmic = label == "loss" and all(curve.wide for curve in curves)
    scale = alt.Scale(type="log") if logarithmic else alt.Scale(zero=False)
    if not any(curve.points for curve in curves):
        scale = alt.Scale(domain=[0, 1])  # nothing but marks of what was lost
    x = _step_axis(steps)
    title = f"{label}, log scale" if logarithmic else label
    y = alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(format="~g", tickCount=5))
    style = _by_name("metric:N", [curve.name for curve in curves])
    tips: list[Any] = ["metric:N", "step:Q", alt.Tooltip("value:Q", format=".4~g")]
    base = _chart(label).encode(x=x, y=y, tooltip=tips)
    layers: list[Chart] = [base.mark_line().encode(detail="segment:N", **style)]
    if any(row["few"] for curve in curves for row in curve.points):
        dotted = base.mark_point(size=30, filled=True).transform_filter("datum.few")
        layers.append(dotted.encode(color=style["color"]))
    lost = [row for curve in curves for row in curve.lost]
    if lost:
        marks = _chart(lost).mark_point(shape="cross", size=45, filled=True, color=WARNING, y=0)
        layers.append(marks.encode(x=x, tooltip=["metric:N", "step:Q", "what:N"]))
    return alt.layer(*layers)


def _chart(data: str | list[dict[str, Any]]) -> Chart:
    """A chart of rows, or of a data set that the whole chart names."""
    import altair as alt

    return alt.Chart({"name": data} if isinstance(data, str) else {"values": data})


def _nothing(title: str, message: str, width: int, height: int) -> Chart:

    chart = _chart([{"message": message}])
    text = chart.mark_text(fontSize=14, x={"expr": "width / 2"}, y=height / 2).encode(
        text="message:N"
    )
    return text.properties(
        width=width, height=height, title=title, description=f"{title}: {message}"
    ).configure(**chart_config())
