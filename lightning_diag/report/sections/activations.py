"""Were units dead or saturated?"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_diag.report.section import Section, Table
from lightning_diag.report.series import Panel, line_chart
from lightning_diag.report.words import short

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["activations_section"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_MOST = 20
_COLUMNS = (
    *("module", "function", "dead units", "dead in the last batch", "saturated", "switched off"),
    *("mean", "std", "NaN or infinite"),
)
_SHARES = ("dead_share", "saturated_share")


def activations_section(run: "Run") -> Section | None:
    """Dead and saturated shares of the activation functions, the worst first.

    Args:
        run: What `read_run` returned.

    Returns:
        None where `ActivationHealth` wrote nothing.
    """
    frame = run.frame("activation")
    rows = [row for row in frame.to_dicts() if row.get("step") is not None]
    modules = _by_module(sorted(rows, key=lambda row: int(row["step"])))
    if not modules:
        return None
    last = {name: own[-1] for name, own in modules.items()}
    worst = sorted(last, key=lambda name: -_badness(last[name]))
    shown = worst[:_MOST]
    title = f"The {len(shown)} worst of {len(last)}, at the last step" if len(last) > _MOST else ""
    table = Table(_COLUMNS, [_cells(name, last[name]) for name in shown], title, left=2)
    charts = {"activations": _chart({name: modules[name] for name in shown})}
    return Section("Activations", tuple(_sentences(modules, last)), (table,), charts)


def _by_module(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("component") is not None:
            found.setdefault(str(row["component"]), []).append(row)
    return found


def _badness(row: Mapping[str, Any]) -> float:
    bad = 1.0 if _number(row.get("nonfinite")) else 0.0
    return max(bad, *(_number(row.get(key)) or 0.0 for key in _SHARES))


def _sentences(
    modules: Mapping[str, Sequence[Mapping[str, Any]]], last: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    steps = {row["step"] for own in modules.values() for row in own}
    known = [row for row in last.values() if _number(row.get("dead_share")) is not None]
    units = sum(_number(row.get("units")) or 0 for row in known)
    dead = sum(_number(row.get("dead_units")) or 0 for row in known)
    line = f"{len(last)} activation functions, measured at {len(steps)} steps."
    if known:
        line += f" {dead:,.0f} of {units:,.0f} units are dead."
    lines = [line]
    for key, words in (("dead_share", "dead units"), ("saturated_share", "saturated outputs")):
        name = max(last, key=lambda name: _number(last[name].get(key)) or 0.0)
        share = _number(last[name].get(key))
        if share:
            first = _number(modules[name][0].get(key))
            grown = "" if first is None else f" ({_percent(first)} at the first step)"
            lines.append(f"`{name}` has the largest share of {words}: {_percent(share)}{grown}.")
    return lines


def _cells(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        str(row.get("function") or ""),
        *(_percent(_number(row.get(key))) for key in ("dead_share", "dead_now")),
        *(_percent(_number(row.get(key))) for key in ("saturated_share", "zero_share")),
        *(short(_number(row.get(key))) for key in ("mean", "std")),
        short(_number(row.get("nonfinite"))),
    )


def _chart(modules: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart:
    def panel(label: str, key: str) -> Panel:
        series = {
            name: [(row["step"], _number(row.get(key))) for row in own]
            for name, own in modules.items()
        }
        kept = {
            name: points
            for name, points in series.items()
            if any(value is not None for _, value in points)
        }
        return Panel(label, kept, domain=(0.0, 1.0), height=150)

    panels = [
        panel("share of dead units", "dead_share"),
        panel("share of saturated outputs", "saturated_share"),
        panel("share of outputs switched off", "zero_share"),
    ]
    said = ["About half of a healthy ReLU's outputs are switched off; a dead unit is so always."]
    return line_chart("Activation functions", panels, said=said)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: object) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]
