"""How far did each step move each part?"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_diag.report.section import Section, Table
from lightning_diag.report.series import Panel, line_chart
from lightning_diag.report.words import short

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["updates_section"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

RULE_OF_THUMB = 1e-3

_NORMS = ("update_l2", "weight_l2")

_COLUMNS = (
    *("component", "ratio", "smallest", "largest", "last", "update norm", "weight norm"),
    *("elements that stayed", "never changed", "jumps"),
)


def updates_section(run: "Run") -> Section | None:
    """Ratios of update to weight over the run, what never changed, and what jumped.

    Args:
        run: What `read_run` returned.

    Returns:
        None where `UpdateRatio` wrote nothing.
    """
    frame = run.frame("update")
    rows = [row for row in frame.to_dicts() if row.get("step") is not None]
    if not rows:
        return None
    parts = _by_name(sorted(rows, key=lambda row: int(row["step"])))
    made = {name: [row for row in own if row.get("skipped") != 1] for name, own in parts.items()}
    title = "Norm of the update over norm of the weight; median, extremes and last of all steps"
    cells = [_cells(name, own) for name, own in made.items() if own]
    return Section(
        "Updates",
        lines=tuple(_sentences(rows, made)),
        tables=(Table(_COLUMNS, cells, title),) if cells else (),
        charts={"update_ratio": _chart(made)} if cells else {},
    )


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        component, optimizer = row.get("component"), row.get("optimizer")
        name = "whole model" if component is None else str(component)
        if component is None and optimizer is not None:
            name += f", optimizer {optimizer:.0f}"
        found.setdefault(name, []).append(row)
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("whole model")))


def _sentences(
    rows: Sequence[Mapping[str, Any]], made: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    steps, skipped = {row["step"] for row in rows}, _steps(rows, "skipped")
    line = f"{len(steps)} steps were measured, the last {max(steps)}."
    if skipped:
        were = "was" if len(skipped) == 1 else "were"
        line += f" {len(skipped)} of them {were} skipped, as the gradient scaler does."
    lines = [line]
    for name, own in made.items():
        if name.startswith("whole model") or not own:
            continue
        count = _number(own[-1].get("never_changed"))
        if count:
            who = "1 parameter" if count == 1 else f"{count:.0f} parameters"
            names = own[-1].get("first_never_changed") or ""
            lines.append(
                f"`{name}`: {who} got a gradient and never changed at a measured step: `{names}`."
            )
        jumps = _steps(own, "jumped")
        if jumps:
            worst = max(_known(own, "jump"), default=math.nan)
            more = f", and {len(jumps) - 1} times more" if len(jumps) > 1 else ""
            lines.append(
                f"`{name}`: the update jumped at step {jumps[0]}{more}, "
                f"to at most {short(worst)} times its running median."
            )
    return lines


def _cells(name: str, own: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    ratios, last = _known(own, "ratio"), own[-1]
    known = (median(ratios), min(ratios), max(ratios), ratios[-1]) if ratios else (None,) * 4
    stayed = _number(last.get("unchanged_share"))
    # what the norms of such a row hold is of the finite elements alone
    lost = bool(_number(last.get("nonfinite")))
    return (
        name,
        *(short(value) for value in known),
        *("not finite" if lost else short(_number(last.get(key))) for key in _NORMS),
        "-" if stayed is None else f"{100 * stayed:.1f} %",
        short(_number(last.get("never_changed"))),
        str(len(_steps(own, "jumped"))),
    )


def _chart(made: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart:
    def series(key: str) -> dict[str, list[tuple[float, float | None]]]:
        return {
            name: [(row["step"], _number(row.get(key))) for row in own]
            for name, own in made.items()
            if _known(own, key)
        }

    rules = {"1e-3, a rule of thumb": RULE_OF_THUMB}
    panels = [
        Panel("norm of update / norm of weight", series("ratio"), log=True, rules=rules),
        Panel("learning rate", series("lr"), log=True, height=100),
    ]
    said = ["About 1e-3 is usual; weights that normalization makes scale-free may lie elsewhere."]
    return line_chart("Size of the updates", panels, said=said)


def _known(own: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    numbers = [_number(row.get(key)) for row in own]
    return [number for number in numbers if number is not None]


def _steps(own: Sequence[Mapping[str, Any]], key: str) -> list[int]:
    return sorted({int(row["step"]) for row in own if _number(row.get(key))})


def _number(value: object) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]
