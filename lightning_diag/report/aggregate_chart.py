"""The chart of a summary: boxes by experiment, and the course of each over the epochs."""

from statistics import fmean
from typing import Any

from lightning_diag.report.aggregate import Group, Summary
from lightning_diag.report.annotations import step_axis
from lightning_diag.report.theme import WARNING, chart_config

__all__ = ["boxed_metrics", "comparison_chart"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_BOXES = 4
_USUAL = ("f1", "precision", "recall", "accuracy", "auc")
_WIDTH = 820


def boxed_metrics(summary: Summary) -> list[str]:
    """The metrics that are drawn as boxes: the one that is compared by, then the usual ones."""
    measured = dict.fromkeys(name for group in summary.groups for name in group.metrics)
    wanted = [summary.metric, *_USUAL, *measured]
    return [name for name in dict.fromkeys(wanted) if name in measured][:_BOXES]


def comparison_chart(summary: Summary) -> Chart:
    """Boxes of the clean runs above, lines of all runs below.

    A box spans the middle half of the runs, its line is their median, and each run is a point. A
    thin line is a run, a thick one the mean of the clean runs that have the epoch; a dashed line is
    a run that does not count.

    Args:
        summary: What `aggregate` gave.
    """
    import altair as alt

    names = [group.name for group in summary.groups]
    colour = alt.Color(
        "model:N", scale=alt.Scale(domain=names), legend=alt.Legend(title=None, symbolType="stroke")
    )
    parts = []
    boxes = [_box(summary, name, colour) for name in boxed_metrics(summary)]
    if boxes:
        parts.append(alt.hconcat(*boxes, spacing=18))
    lines = _lines(summary, colour)
    if lines is not None:
        parts.append(lines)
    title = f"{summary.metric} and others by experiment"
    if not parts:
        empty = alt.Chart({"values": [{"message": "Nothing was measured."}]})
        parts.append(empty.mark_text(fontSize=14).encode(text="message:N").properties(width=_WIDTH))
    counted = sum(len(group.clean) for group in summary.groups)
    apart = sum(len(group.runs) for group in summary.groups) - counted
    said = [f"{counted} clean runs; {apart} stand apart (dashed)." if apart else f"{counted} runs."]
    return (
        alt.vconcat(*parts, spacing=24)
        .properties(title=alt.Title(title, subtitle=said), description=_described(summary))
        .configure(**chart_config())
    )


def _box(summary: Summary, metric: str, colour: Any) -> Chart:  # noqa: ANN401
    import altair as alt

    rows = [
        {"model": group.name, "value": run.metrics[metric], "seed": run.seed}
        for group in summary.groups
        for run in group.clean
        if metric in run.metrics
    ]
    shown = alt.X(
        "model:N",
        title=None,
        sort=[group.name for group in summary.groups],
        axis=alt.Axis(labelAngle=-30, labelLimit=120),
    )
    up = alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False))
    base = alt.Chart({"values": rows}).encode(x=shown, y=up, color=colour)
    drawn = alt.layer(
        base.mark_boxplot(extent="min-max", size=26, opacity=0.45),
        base.mark_point(filled=True, size=45, opacity=1),
    )
    return drawn.properties(width=(_WIDTH - 200) // _BOXES, height=190)


def _lines(summary: Summary, colour: Any) -> Chart | None:  # noqa: ANN401
    import altair as alt

    thin: list[dict[str, Any]] = []
    thick: list[dict[str, Any]] = []
    apart: list[dict[str, Any]] = []
    for group in summary.groups:
        for number, run in enumerate(group.runs):
            to = thin if run in group.clean else apart
            for epoch, value in run.history.get(summary.metric, ()):
                row = {"model": group.name, "run": f"{group.name} {number}"}
                to.append({**row, "epoch": epoch, "value": value})
        thick += [
            {"model": group.name, "epoch": epoch, "value": value}
            for epoch, value in _means(group, summary.metric)
        ]
    if not thin and not apart:
        return None
    epochs = [row["epoch"] for row in [*thin, *apart]]
    across = alt.X("epoch:Q", title="epoch", axis=step_axis((min(epochs), max(epochs))))
    up = alt.Y("value:Q", title=summary.metric, scale=alt.Scale(zero=False))

    def drawn(rows: list[dict[str, Any]]) -> Chart:
        return alt.Chart({"values": rows}).encode(x=across, y=up)

    few = max((row["epoch"] for row in thick), default=0) < 60
    return alt.layer(
        drawn(thin).mark_line(strokeWidth=1, opacity=0.45).encode(color=colour, detail="run:N"),
        drawn(thick)
        .mark_line(strokeWidth=2.6, point=alt.OverlayMarkDef(size=24) if few else False)
        .encode(color=colour),
        drawn(apart)
        .mark_line(strokeWidth=1.4, strokeDash=[4, 3], color=WARNING)
        .encode(detail="run:N"),
    ).properties(width=_WIDTH - 40, height=240)


def _means(group: Group, metric: str) -> list[tuple[float, float]]:
    by_epoch: dict[float, list[float]] = {}
    for run in group.clean:
        for epoch, value in run.history.get(metric, ()):
            by_epoch.setdefault(epoch, []).append(value)
    return [(epoch, fmean(values)) for epoch, values in sorted(by_epoch.items())]


def _described(summary: Summary) -> str:
    said = []
    for group in summary.groups:
        mean = summary.mean(group)
        told = "no clean run" if mean is None else f"mean {mean:.4g} of {len(group.clean)} runs"
        said.append(f"{group.name}: {told}")
    return f"Boxes and lines of {summary.metric}. {'; '.join(said)}."
