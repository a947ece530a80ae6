"""All charts of a run below one another in one picture."""

from io import BytesIO

from lightning_diag.monitor.live_charts import CHARTS
from lightning_diag.monitor.watched_runs import WatchedRuns
from lightning_diag.report.write_report import chart_png

__all__ = ["picture"]

_GAP = 24


def picture(runs: WatchedRuns) -> bytes:
    """The charts of a run as one PNG; of several runs, their losses in one chart.

    Args:
        runs: What to draw; it is read to its end first.

    Raises:
        ValueError: Nothing can be drawn yet.
    """
    runs.look(at_once=True)
    while any(run.behind for run in runs.runs):
        runs.look(at_once=True)
    alone = len(runs.runs) == 1
    specs = [runs.chart(0, name) for name in CHARTS] if alone else [runs.together()]
    drawn = [chart_png(spec) for spec in specs if spec is not None]
    if not drawn:
        raise ValueError(f"A picture needs a run that has measured something, got {runs.path}.")
    return _below_one_another(drawn)


def _below_one_another(pictures: list[bytes]) -> bytes:
    from PIL import Image

    images = [Image.open(BytesIO(one)).convert("RGB") for one in pictures]
    width = max(one.width for one in images)
    height = sum(one.height + _GAP for one in images) - _GAP
    whole = Image.new("RGB", (width, height), "white")
    top = 0
    for one in images:
        whole.paste(one, (0, top))
        top += one.height + _GAP
    out = BytesIO()
    whole.save(out, format="PNG")
    return out.getvalue()
