"""Did the representation keep its dimensions?"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_diag.report.section import Section, Table
from lightning_diag.report.series import Panel, line_chart, points_by
from lightning_diag.report.words import short

if TYPE_CHECKING:
    import polars as pl

    from lightning_diag.records.read_run import Run

__all__ = ["latents_section"]

Chart = Any
"""An Altair chart; the annotations of Altair itself do not fit one another."""

_TABLE = {
    "deviation": "latent_std",
    "norm": "latent_norm",
    "deviation of a dimension": "std_ratio",
    "cosine": "mean_cosine",
    "effective rank": "effective_rank",
    "participation": "participation",
    "dead dimensions": "dead_dimensions",
}


def latents_section(run: "Run") -> Section | None:
    """How the statistics of the representation went, and where they are.

    Args:
        run: What `read_run` returned.

    Returns:
        None where `LatentStats` wrote nothing.
    """
    frame = run.frame("latent")
    rows = [row for row in frame.to_dicts() if row.get("step") is not None]
    if not rows:
        return None
    modules: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        modules.setdefault(str(row.get("component") or "model"), []).append(row)
    cells = [
        (name, when, *(short(_number(row.get(key))) for key in _TABLE.values()))
        for name, own in modules.items()
        for when, row in _ends(own)
    ]
    return Section(
        "Representation",
        lines=tuple(_sentence(name, own[-1]) for name, own in modules.items()),
        tables=(Table(("module", "step", *_TABLE), cells, left=2),),
        charts={"latents": _chart(frame)},
    )


def _ends(own: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """The first measurement and the last."""
    shown = [own[0], own[-1]] if len(own) > 1 else own[:1]
    return [(str(row["step"]), row) for row in shown]


def _sentence(name: str, row: Mapping[str, Any]) -> str:
    which = "Input" if row.get("side") == "input" else "Output"
    line = f"{which} of `{name}`"
    features, rows = _number(row.get("features")), _number(row.get("rows"))
    if features is not None and rows is not None:
        line += f", {features:,.0f} dimensions, {rows:,.0f} rows"
    rank, limit = _number(row.get("effective_rank")), _number(row.get("rank_limit"))
    if rank is not None:
        most = "" if limit is None else f" of at most {limit:,.0f}"
        line += f": effective rank {short(rank)}{most} at step {row['step']}"
    bad = _number(row.get("nonfinite"))
    return f"{line}; {bad:,.0f} elements are NaN or infinite." if bad else f"{line}."


def _chart(frame: "pl.DataFrame") -> Chart:
    panels = [
        Panel("deviation of all elements", points_by(frame, "latent_std", whole="model")),
        Panel(
            "deviation by dimension",
            points_by(frame, "std_ratio", whole="model"),
            rules={"isotropic": 1.0},
            height=150,
        ),
        Panel("mean cosine between rows", points_by(frame, "mean_cosine", whole="model")),
        Panel("effective rank", points_by(frame, "effective_rank", whole="model"), height=150),
    ]
    said = [
        "A collapse: cosine towards 1, or effective rank and deviation of a dimension towards 0.",
        "The deviation of all elements does not see it.",
    ]
    return line_chart("Representation", panels, said=said)


def _number(value: object) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]
