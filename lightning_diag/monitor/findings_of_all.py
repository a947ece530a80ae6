"""How many findings each run has, in one chart."""

from collections.abc import Sequence
from typing import Any

from lightning_diag.monitor.watched_run import WatchedRun
from lightning_diag.report.theme import WARNING, chart_config

__all__ = ["findings_of_all"]

_MOST = 40
_COLOURS = {"critical": WARNING, "warning": "#e69f00", "info": "#56b4e9"}
_ROW, _WIDTH = 22, 820  # pixels
_TICKS = 10


def findings_of_all(runs: Sequence[WatchedRun]) -> Any:  # noqa: ANN401
    """An Altair chart of the findings of each run by severity; of many runs, of the first 40."""
    import altair as alt

    counts = {f"{n} {run.name}": run.summary().counts for n, run in enumerate(runs[:_MOST])}
    bars = [
        {"run": run, "severity": severity, "count": own[severity]}
        for run, own in counts.items()
        for severity in _COLOURS
        if own.get(severity)
    ]
    none = [{"run": run, "said": "none"} for run, own in counts.items() if not any(own.values())]
    # two runs may be called alike: they are told apart by a number that is not shown
    name = alt.Axis(labelExpr="slice(datum.label, indexof(datum.label, ' ') + 1)", labelLimit=260)
    places = alt.Y("run:N", sort=None, title="run", axis=name, scale=alt.Scale(domain=[*counts]))
    most = max((sum(own.values()) for own in counts.values()), default=0)
    whole = alt.Axis(format="d", values=[*range(0, most + 1, max(1, -(-most // _TICKS)))])
    drawn = alt.Chart(alt.InlineData(values=bars)).mark_bar(height={"band": 0.6})
    amount = drawn.encode(
        x=alt.X("count:Q", stack="zero", title="number of findings", axis=whole),
        y=places,
        color=alt.Color(
            "severity:N",
            title=None,
            scale=alt.Scale(domain=[*_COLOURS], range=[*_COLOURS.values()]),
        ),
        order=alt.Order("place:Q"),
    ).transform_calculate(place="indexof(['critical', 'warning', 'info'], datum.severity)")
    silent = alt.Chart(alt.InlineData(values=none)).mark_text(align="left", dx=6)
    said = [] if len(runs) <= _MOST else [f"The first {_MOST} of {len(runs)} runs."]
    words = "; ".join(
        f"{run.partition(' ')[2]}: {own.get('critical', 0)} critical, {own.get('warning', 0)} "
        f"warnings"
        for run, own in counts.items()
    )
    return (
        alt.layer(amount, silent.encode(x=alt.datum(0), y=places, text="said:N"))
        .properties(
            width=_WIDTH,
            height=_ROW * len(counts),
            title=alt.Title("Findings of each run", subtitle=said),
            description=f"Findings of each run. {words}.",
        )
        .configure(**chart_config())
    )
