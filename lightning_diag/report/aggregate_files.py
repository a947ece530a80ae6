"""The files of ``production_summary/``, each written whole or not at all."""

from pathlib import Path
from typing import Any

from lightning_diag.records.files import write_bytes, write_json, write_text
from lightning_diag.report.aggregate import Summary, aggregate
from lightning_diag.report.aggregate_chart import comparison_chart
from lightning_diag.report.aggregate_page import aggregate_page
from lightning_diag.report.page_parts import writable

__all__ = ["write_aggregate"]

_PICTURE = "metrics_comparison.png"


def write_aggregate(
    folder: str | Path, metric: str | None = None
) -> tuple[Summary, dict[str, Path]]:
    """Summarize the runs in a folder into ``production_summary/`` beside them.

    Args:
        folder: See `aggregate`.
        metric: See `aggregate`.

    Returns:
        The summary, and the files by name; a chart that could not be drawn is none of them.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no run, or no run has the metric.
        OSError: A file could not be written.
    """
    summary = aggregate(folder, metric)
    out = Path(folder) / "production_summary"
    try:
        return summary, _write(summary, out)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"`{out}` must be a folder that takes files, got: {reason}.") from error


def _write(summary: Summary, out: Path) -> dict[str, Path]:
    picture = _png(summary)
    files = {}
    if picture is not None:
        files[_PICTURE] = out / _PICTURE
        write_bytes(files[_PICTURE], picture)
    files["production_summary.json"] = out / "production_summary.json"
    write_json(files["production_summary.json"], summary.to_dict())
    files["production_report.md"] = out / "production_report.md"
    page = aggregate_page(summary, _PICTURE if picture is not None else None)
    write_text(files["production_report.md"], page)
    return files


def _png(summary: Summary) -> bytes | None:
    """The chart, or None: the numbers are worth more than the picture."""
    try:
        import altair as alt
        import vl_convert

        version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
        # validating every point against the schema takes longer than drawing it
        spec: dict[str, Any] = writable(comparison_chart(summary).to_dict(validate=False))
        picture: bytes = vl_convert.vegalite_to_png(spec, vl_version=version, scale=1.25)
    except Exception:
        return None
    return picture
