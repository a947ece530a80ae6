"""Did weight pairs form blobs: how many, when, where, and how clear."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_diag.report.section import Section, Table
from lightning_diag.report.series import Panel, line_chart, points_by
from lightning_diag.report.theme import chart_config
from lightning_diag.rules.loss_series import training_losses, validation_losses

if TYPE_CHECKING:
    import polars as pl

    from lightning_diag.records.read_run import Run

__all__ = ["blob_history", "blobs_section"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_PICTURES = 4
_LINES = 10
_NOISE = "noise"
_HEIGHT = 150
_COLUMNS = ("pair", "cluster", "share", "encoder", "decoder", "encoder std", "decoder std")


def blobs_section(run: "Run") -> Section | None:
    """Clusters of weight pairs over the run, and those of the last measurement.

    Args:
        run: What `read_run` returned.

    Returns:
        None where `BlobMetrics` wrote nothing.
    """
    frame = run.frame("blob")
    if frame.is_empty() or "n_clusters_dbscan" not in frame.columns:
        return None
    last = _last(frame)
    cells = [cell for name, row in list(last.items())[:_LINES] for cell in _cells(name, row)]
    title = "Largest clusters of the last measurement, in units of the weights"
    charts = {"blob_history": blob_history(run), "blob_spread": _spread(frame)}
    pictures = _last(run.frame("blob_sample"))
    drawn = {name: points for name in pictures if (points := _points(pictures[name]))}
    if drawn:
        charts["blobs"] = _scatter(drawn, pictures)
    return Section(
        "Blobs",
        lines=tuple(_sentence(name, row, frame) for name, row in list(last.items())[:_LINES]),
        tables=(Table(_COLUMNS, cells, title, left=2),) if cells else (),
        charts=charts,
    )


def _last(frame: "pl.DataFrame") -> dict[str, dict[str, Any]]:
    """The last row of each pair of weights."""
    rows = (row for row in frame.iter_rows(named=True) if row.get("step") is not None)
    ordered = sorted(rows, key=lambda row: int(row["step"]))
    return {_name(row.get("component")): row for row in ordered}


def _name(component: object) -> str:
    return "weights" if component is None else str(component)


def _sentence(name: str, row: Mapping[str, Any], frame: "pl.DataFrame") -> str:
    count = _number(row.get("n_clusters_dbscan"))
    if count is None:
        return f"`{name}`: nothing is known of step {row['step']}."
    several = "1 cluster" if count == 1 else f"{count:.0f} clusters"
    used, there = (_number(row.get(key)) for key in ("n_pairs_analyzed", "n_pairs"))
    parts = [f"`{name}` has {several} at step {row['step']}"]
    if used is not None:
        parts[0] += f" in {used:,.0f}" + (f" of {there:,.0f}" if there else "") + " pairs"
    since = _since(name, count, frame)
    parts += [f"first so at step {since}"] if since is not None and since != row["step"] else []
    for key, words in (
        ("silhouette_score", "silhouette"),
        ("weight_correlation", "correlation of the two sides"),
    ):
        value = _number(row.get(key))
        parts += [f"{words} {value:.2f}"] if value is not None else []
    bad = _number(row.get("nonfinite"))
    parts += [f"{bad:.0f} pairs left out as NaN or infinite"] if bad else []
    return f"{'; '.join(parts)}."


def _since(name: str, count: float, frame: "pl.DataFrame") -> int | None:
    """The first step of the last stretch of rows with that number of clusters."""
    points = points_by(frame, "n_clusters_dbscan", whole=_name(None)).get(name, [])
    first = None
    for step, value in reversed(points):
        if value != count:
            break
        first = int(step)
    return first


def _cells(name: str, row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    centers, stds, shares = (
        _items(row.get(key)) for key in ("cluster_centers", "cluster_stds", "cluster_shares")
    )
    cells: list[tuple[str, ...]] = []
    for index, share in enumerate(shares[: len(centers)]):
        spread = stds[index] if index < len(stds) else None
        place = (*_two(centers[index]), *_two(spread))
        cells.append((name, str(index + 1), _percent(share), *place))
    noise = _number(row.get("noise_share"))
    if noise:
        cells.append((name, _NOISE, _percent(noise), "", "", "", ""))
    return cells


def _items(value: object) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []


def _two(value: object) -> tuple[str, str]:
    numbers = [_number(one) for one in _items(value)][:2]
    first, second, *_ = ["" if one is None else f"{one:.4g}" for one in [*numbers, None, None]]
    return first, second


def _percent(value: object) -> str:
    number = _number(value)
    return "" if number is None else f"{100 * number:.2f} %"


def _number(value: object) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]


def blob_history(run: "Run") -> Chart:
    """Silhouette, number of clusters, correlation of the weights and losses, in four panels.

    Args:
        run: What `read_run` returned.
    """
    frame, metrics = run.frame("blob"), run.frame("metrics")
    losses: dict[str, list[tuple[float, float | None]]] = {}
    seen, checked = training_losses(run.frame("loss"), metrics), validation_losses(metrics)
    if seen:
        losses["training"] = list(zip(seen.steps, seen.means, strict=True))
    if checked:
        losses["validation"] = list(zip(checked[0], checked[1], strict=True))
    panels = [
        Panel(
            "silhouette",
            _by_pair(frame, "silhouette_score"),
            domain=(-1.0, 1.0),
            empty="it needs two clusters.",
        ),
        Panel("clusters", _by_pair(frame, "n_clusters_dbscan"), empty="none were counted."),
        Panel(
            "correlation of the weights",
            _by_pair(frame, "weight_correlation"),
            domain=(-1.0, 1.0),
            empty="none was measured.",
        ),
        Panel("loss", losses, empty="none was logged."),
    ]
    panels = [replace(panel, height=_HEIGHT) for panel in panels]
    said = ["The correlation of encoder and decoder weights says nothing about health."]
    return line_chart("Blobs of weight pairs", panels, said=said, columns=2)


def _spread(frame: "pl.DataFrame") -> Chart:
    sides = {
        f"{name}, {side}": points
        for side in ("encoder", "decoder")
        for name, points in _by_pair(frame, f"{side}_std").items()
    }
    panel = Panel("standard deviation", sides, height=_HEIGHT)
    return line_chart("Spread of weight pairs", [panel])


def _by_pair(frame: "pl.DataFrame", column: str) -> dict[str, list[tuple[float, float | None]]]:
    return points_by(frame, column, whole=_name(None))


def _points(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = [_items(row.get(key)) for key in ("encoder", "decoder", "cluster")]
    rows = []
    for x, y, cluster in zip(*columns, strict=False):
        if _number(x) is not None and _number(y) is not None and _number(cluster) is not None:
            name = _NOISE if cluster < 0 else f"{cluster + 1:.0f}"
            rows.append({"encoder": x, "decoder": y, "cluster": name})
    return rows


def _scatter(
    drawn: Mapping[str, list[dict[str, Any]]], rows: Mapping[str, dict[str, Any]]
) -> Chart:
    import altair as alt

    plots, words = [], []
    for name, points in list(drawn.items())[:_PICTURES]:
        found = {point["cluster"] for point in points}
        names = sorted(found - {_NOISE}, key=int) + ([_NOISE] if _NOISE in found else [])
        title = f"{name}, step {rows[name]['step']}"
        plots.append(_plot(points, names, title, 820 if len(drawn) == 1 else 400))
        words.append(f"{title}: {len(points)} pairs in {len(found - {_NOISE})} clusters")
    said = ["About as many pairs of each cluster; the true shares are in the table."]
    if len(drawn) > _PICTURES:
        said.append(f"{_PICTURES} of {len(drawn)} pairs of weights are drawn.")
    chart = alt.concat(*plots, columns=2, spacing=24).resolve_scale(
        color="independent", shape="independent"
    )
    return chart.properties(
        title=alt.Title("Weight pairs and their clusters", subtitle=said),
        description=f"Scatter of decoder weight over encoder weight. {'; '.join(words)}.",
    ).configure(**chart_config())


def _plot(points: list[dict[str, Any]], names: list[str], title: str, width: int) -> Chart:
    import altair as alt

    legend = alt.Legend(title="cluster")
    scale = alt.Scale(domain=names)
    axes = {
        axis: alt.Axis(format="~g", tickCount=6, labelOverlap=True)
        for axis in ("encoder", "decoder")
    }
    return (
        alt.Chart({"values": points})
        .mark_point(filled=True, size=22, opacity=0.7)
        .encode(
            x=alt.X("encoder:Q", title="encoder weight", axis=axes["encoder"]),
            y=alt.Y("decoder:Q", title="decoder weight", axis=axes["decoder"]),
            color=alt.Color("cluster:N", scale=scale, sort=names, legend=legend),
            shape=alt.Shape("cluster:N", scale=scale, sort=names, legend=legend),
            tooltip=["cluster:N", "encoder:Q", "decoder:Q"],
        )
        .properties(width=width, height=320, title=title)
    )
