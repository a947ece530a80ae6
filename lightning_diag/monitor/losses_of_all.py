"""The losses of several runs in one chart."""

from collections.abc import Sequence
from typing import Any

from lightning_diag.monitor.watched_run import WatchedRun
from lightning_diag.report.series import Panel, line_chart

__all__ = ["losses_of_all"]

_MOST = 10
_BEST = 5

Points = dict[str, list[tuple[float, float | None]]]


def losses_of_all(runs: Sequence[WatchedRun], picked: Sequence[WatchedRun]) -> Any:  # noqa: ANN401
    """An Altair chart of training and validation losses; None where no run has any.

    Args:
        runs: All of them.
        picked: Those in colour, the others are pale; without any, all of a few runs, and of many
            the five with the smallest loss at their end.
    """
    train: Points = {}
    val: Points = {}
    for run in runs:
        losses, checked = run.losses()
        if losses:
            train[run.name] = list(zip(losses.steps, losses.means, strict=True))
        if checked:
            val[run.name] = list(zip(checked[0], checked[1], strict=True))
    if not train and not val:
        return None
    said, names = [], [run.name for run in picked][:_MOST]
    if not names and len(runs) <= _MOST:
        names = [run.name for run in runs]
    elif not names:
        names = _best(val or train)
        said.append(f"In colour: the {len(names)} runs with the smallest loss at their end.")
    panels = [
        Panel(
            label,
            {name: series[name] for name in names if name in series},
            others={name: points for name, points in series.items() if name not in names},
        )
        for label, series in (("training loss", train), ("validation loss", val))
    ]
    if len(picked) > _MOST:
        said.append(f"In colour: the first {_MOST} of the {len(picked)} chosen.")
    return line_chart("Losses of all runs", panels, said=said)


def _best(series: Points) -> list[str]:
    ends = {}
    for name, points in series.items():
        known = [value for _, value in points if value is not None and value == value]
        if known:
            ends[name] = known[-1]
    return sorted(ends, key=lambda name: ends[name])[:_BEST]
