"""All charts of a run, or the main ones of several runs, in one picture."""

import textwrap
from collections.abc import Sequence
from copy import deepcopy
from io import BytesIO
from typing import TYPE_CHECKING, Any

from lightning_diag.monitor.findings_of_all import findings_of_all
from lightning_diag.monitor.live_charts import CHARTS
from lightning_diag.monitor.watched_runs import WatchedRuns
from lightning_diag.report.page_parts import writable
from lightning_diag.report.words import cut
from lightning_diag.report.write_report import chart_png

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["picture"]

_GAP = 24
_SCALE = 2  # pixels of the picture to one of a chart
_MOST = 4  # runs side by side, as on the page
_BESIDE = ("training", "gradient_flow")
_WIDTH, _EACH = 1240, 420  # of all, and of one of several side by side at least
_EDGE = 96  # beside a plot: its axis
_LETTER = 6.5  # pixels


def picture(runs: WatchedRuns) -> bytes:
    """The charts of a run below one another as one PNG.

    Of several runs: the losses of all, how many findings each has, and side by side the losses and
    the gradients of four, the gravest first.

    Args:
        runs: What to draw; it is read to its end first.

    Raises:
        ValueError: Nothing can be drawn yet.
    """
    runs.look(at_once=True)
    while any(run.behind for run in runs.runs):
        runs.look(at_once=True)
    rows = [[runs.chart(0, name)] for name in CHARTS] if len(runs.runs) == 1 else _of_several(runs)
    images = [[None if spec is None else _image(spec) for spec in row] for row in rows]
    drawn = [row for row in images if any(row)]
    if not drawn:
        raise ValueError(f"A picture needs a run that has measured something, got {runs.path}.")
    return _pasted(drawn)


def _of_several(runs: WatchedRuns) -> list[list[dict[str, Any] | None]]:
    together = runs.together()
    if together is None and not any(run.versions for run in runs.runs):
        return []
    shown = _gravest(runs)
    wide = max(_EACH, (_WIDTH - _GAP * (len(shown) - 1)) // max(1, len(shown)))
    whole = max(_WIDTH, len(shown) * (wide + _GAP) - _GAP)
    found: dict[str, Any] = findings_of_all(runs.runs).to_dict(validate=False)
    rows: list[list[dict[str, Any] | None]] = [
        [together and _sized(together, whole)],
        [_sized(found, whole)],
    ]
    for name in _BESIDE:
        specs = [(number, runs.chart(number, name)) for number in shown]
        rows.append(
            [
                spec and _sized(_titled(spec, runs.runs[number].name, wide), wide)
                for number, spec in specs
            ]
        )
    return rows


def _gravest(runs: WatchedRuns) -> list[int]:
    """Places of those to be shown, in their order."""
    counts = [run.summary().counts for run in runs.runs]
    places = [number for number, run in enumerate(runs.runs) if run.versions]

    def gravity(number: int) -> tuple[int, int]:
        return -counts[number].get("critical", 0), -counts[number].get("warning", 0)

    return sorted(sorted(places, key=gravity)[:_MOST])


def _titled(spec: dict[str, Any], name: str, wide: int) -> dict[str, Any]:
    """A chart that says of which run it is."""
    title = spec.get("title") or {}
    title = {"text": title} if isinstance(title, str) else dict(title)
    under = title.get("subtitle") or []
    sentence = under if isinstance(under, str) else " ".join(under)
    title["subtitle"] = [str(title.get("text", "")), *textwrap.wrap(sentence, int(wide / _LETTER))]
    return {**spec, "title": {**title, "text": f"Run {cut(name, 40)}", "limit": wide}}


def _sized(spec: dict[str, Any], wide: int) -> dict[str, Any]:
    """A chart of this width; those of the report are as wide as its page."""
    spec = deepcopy(spec)
    spec.setdefault("config", {}).setdefault("legend", {})["columns"] = max(1, wide // 200)
    for panel in spec.get("vconcat", [spec]):
        panel["width"] = wide - _EDGE
    return spec


def _image(spec: dict[str, Any]) -> "Image":
    from PIL import Image

    return Image.open(BytesIO(chart_png(writable(spec)))).convert("RGB")


def _pasted(rows: "Sequence[Sequence[Image | None]]") -> bytes:
    """Pictures in rows, one below the other; those of a column begin at the same place."""
    from PIL import Image

    gap = _SCALE * _GAP
    beside = [one.width for row in rows if len(row) > 1 for one in row if one]
    stride = max(beside, default=0) + gap
    alone = [one.width for row in rows if len(row) == 1 for one in row if one]
    width = max([*alone, max(len(row) for row in rows) * stride - gap])
    heights = [max(one.height for one in row if one) for row in rows]
    whole = Image.new("RGB", (width, sum(heights) + gap * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for place, one in enumerate(row):
            if one:
                whole.paste(one, (place * stride, top))
        top += height + gap
    out = BytesIO()
    whole.save(out, format="PNG")
    return out.getvalue()
