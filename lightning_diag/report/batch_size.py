"""Throughput and memory over batch size, as a chart."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_diag.report.page_parts import writable
from lightning_diag.report.theme import WARNING, chart_config

if TYPE_CHECKING:
    import altair as alt

__all__ = ["batch_size_chart", "batch_size_picture"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_MEMORY = {"gpu reserved": "GPU memory (GB)", "gpu allocated": "GPU memory (GB)"}
_MARK = "not measured to the end"
_NEAR = 3.0


def batch_size_chart(
    profiles: Sequence[Mapping[str, Any]],
    *,
    title: str = "Batch sizes",
    chosen: int | None = None,
    most_memory_gb: float | None = None,
) -> Chart:
    """Samples a second, and peak memory below them, over batch size on a logarithmic axis.

    Args:
        profiles: Of each size its `batch_size`, `status`, `samples_per_second`, `peak_memory_gb`
            and `memory_kind`; None for what was not measured. A bar runs from the slowest to the
            fastest epoch where `epoch_seconds` and `epoch_samples` hold several. A size whose
            status is not `ok` is a cross at the bottom.
        title: Title of the chart.
        chosen: The recommended size, drawn as a line.
        most_memory_gb: Memory that is not to be exceeded, drawn as a line if the sizes come near.
    """
    import altair as alt

    rows = [_row(one) for one in profiles]
    fine = [row for row in rows if row["status"] == "ok"]
    failed = [row for row in rows if row["status"] != "ok"]
    said = [f"Dashed: {chosen:,} is recommended."] if chosen is not None else []
    said += [f"Crosses: {_MARK}."] if failed else []
    kinds = [str(one.get("memory_kind")) for one in profiles if one.get("memory_kind")]
    label = _MEMORY.get(kinds[0] if kinds else "", "memory (GB)")
    sizes = [row["size"] for row in rows]
    peak = max((row["memory"] for row in fine if row["memory"] is not None), default=0.0)
    limit = []
    if most_memory_gb:
        said.append(f"Memory that may be used, dotted where it is near: {most_memory_gb:,.1f} GB.")
        # far above the points it would press them flat
        limit = [most_memory_gb] if most_memory_gb <= _NEAR * peak else []
    panels = [
        _panel(fine, failed, "rate", "samples per second", sizes, chosen, []),
        _panel(fine, failed, "memory", label, sizes, chosen, limit),
    ]
    words = "; ".join(f"{row['size']:,}: {row['said']}" for row in rows) or "nothing was measured"
    chart: Chart = alt.vconcat(*panels, spacing=16).properties(
        title=alt.Title(title, subtitle=said) if said else alt.Title(title),
        description=f"{title}. {words}.",
    )
    return chart.configure(**chart_config())


def batch_size_picture(chart: Chart) -> bytes:
    """A chart as a PNG file."""
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    spec: dict[str, Any] = writable(chart.to_dict())
    picture: bytes = vl_convert.vegalite_to_png(spec, vl_version=version, scale=2)
    return picture


def _row(one: Mapping[str, Any]) -> dict[str, Any]:
    seconds, samples = one.get("epoch_seconds") or (), one.get("epoch_samples") or ()
    pairs = zip(samples, seconds, strict=False)
    rates = [count / time for count, time in pairs if count is not None and time]
    rate, memory = one.get("samples_per_second"), one.get("peak_memory_gb")
    said = str(one["status"])
    if said == "ok" and rate is not None and memory is not None:
        said = f"{rate:.4g} samples per second, {memory:.3g} GB"
    return {
        "size": one["batch_size"],
        "status": one["status"],
        "rate": rate,
        "memory": memory,
        "low": min(rates, default=None),
        "high": max(rates, default=None),
        "said": said,
    }


def _across(sizes: Sequence[int], title: str | None) -> "alt.X":
    import altair as alt

    low, high = min(sizes, default=1), max(sizes, default=2)
    scale = alt.Scale(type="log", base=2, domain=[low / 1.2, high * 1.2], nice=False)
    axis = alt.Axis(values=list(sizes), format=",d", labelOverlap=True)
    return alt.X("size:Q", title=title, scale=scale, axis=axis)


def _panel(
    fine: list[dict[str, Any]],
    failed: list[dict[str, Any]],
    field: str,
    label: str,
    sizes: Sequence[int],
    chosen: int | None,
    limits: list[float],
) -> Chart:
    import altair as alt

    rows = [row for row in fine if row[field] is not None]
    across = _across(sizes, "batch size" if field == "memory" else None)
    # no number at all still needs an axis
    scale = alt.Scale(zero=True) if rows or limits else alt.Scale(domain=[0, 1])
    up = alt.Y(f"{field}:Q", title=label, scale=scale, axis=alt.Axis(tickCount=5, format=",~r"))
    tips: list[Any] = [alt.Tooltip("size:Q", format=",d"), "said:N"]
    base = alt.Chart({"values": rows}).encode(x=across, y=up, tooltip=tips)
    layers: list[Chart] = [base.mark_line(point=alt.OverlayMarkDef(size=40))]
    if field == "rate":
        spread = [row for row in rows if row["low"] is not None and row["high"] > row["low"]]
        bars = alt.Chart({"values": spread}).mark_rule(strokeWidth=1.5, opacity=0.6)
        layers.append(bars.encode(x=across, y=alt.Y("low:Q", title=label), y2="high:Q"))
    if failed:
        marks = alt.Chart({"values": failed}).mark_point(
            shape="cross", size=70, filled=True, color=WARNING, y="height", yOffset=-8
        )
        layers.append(marks.encode(x=across, tooltip=tips))
    if chosen is not None:
        rule = alt.Chart({"values": [{"size": chosen}]}).mark_rule(strokeDash=[4, 3], opacity=0.6)
        layers.append(rule.encode(x=across))
    for limit in limits:
        line = alt.Chart({"values": [{"y": limit}]}).encode(y=alt.Y("y:Q", title=label))
        layers.append(line.mark_rule(strokeDash=[2, 3], color=WARNING, opacity=0.8))
    return alt.layer(*layers).properties(width=820, height=200)
