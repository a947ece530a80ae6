"""Is everything connected that should be?"""

from typing import TYPE_CHECKING, Any

from lightning_diag.report.section import Section, Table

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["CHECKS", "wiring_section"]

_MOST = 12
CHECKS = {
    "unoptimized_parameter": "trainable weights in an optimizer",
    "frozen_in_optimizer": "no frozen weights in an optimizer",
    "unused_parameter": "weights get gradients",
    "detached_graph": "graph from loss to weights",
    "missing_zero_grad": "gradients zeroed between steps",
    "frozen_weights": "weights move",
    "eval_mode_in_training": "modules in training mode",
    "tied_weight_broken": "tied weights are one",
    "replica_drift": "replicas are equal",
    "nonfinite_data": "data are finite",
    "input_scale": "input is scaled",
    "loss_target_mismatch": "targets fit the loss",
    "double_softmax": "loss gets logits",
    "wrong_reduction": "loss is a mean",
}
"""What each check makes sure of."""


def wiring_section(run: "Run") -> Section | None:
    """The last state of every check, and what it found.

    Args:
        run: What `read_run` returned.
    """
    frame = run.frame("wiring")
    if frame.is_empty() or not {"check", "state", "step"} <= set(frame.columns):
        return None
    rows = [row for row in frame.to_dicts() if row["step"] is not None and row["check"]]
    looks = {row["step"] for row in rows}
    if not looks:
        return None
    table = [cells for check in CHECKS for cells in _cells(check, rows)]
    wrong = sorted({cells[0] for cells in table if cells[1] == "wrong"})
    several = "1 check" if len(wrong) == 1 else f"{len(wrong)} checks"
    line = f"{len(looks)} looks, the last at step {max(looks)}: "
    line += f"{several} found something." if wrong else "nothing is wrong."
    fine = [cells[0] for cells in table if cells[1] == "ok"]
    lines = [line, *[f"As it should be: {', '.join(fine)}."] * bool(fine)]
    columns = ("check", "state", "where", "what", "since step")
    odd = [cells for cells in table if cells[1] != "ok"]
    tables = (Table(columns, odd[: 4 * _MOST], left=4),) if odd else ()
    return Section("Wiring", tuple(lines), tables)


def _cells(check: str, rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    own = [row for row in rows if row["check"] == check]
    if not own:
        return []
    last = max(row["step"] for row in own)
    now = [row for row in own if row["step"] == last]
    wrong = [row for row in now if row["state"] == "wrong"]
    name = CHECKS[check]
    if wrong:
        return [
            (name, "wrong", _where(row), _what(row), str(_since(row, own))) for row in wrong[:_MOST]
        ]
    known = any(row["state"] == "ok" for row in now)
    why = "" if known else str(now[-1].get("kind") or "")
    return [(name, "ok" if known else "unknown", "", why, "")]


def _where(row: dict[str, Any]) -> str:
    place = row.get("component") or row.get("at") or "whole model"
    return str(place)


def _what(row: dict[str, Any]) -> str:
    words = [str(row[key]) for key in ("kind", "names", "at") if row.get(key) is not None]
    share = row.get("share")
    if isinstance(share, (int, float)):
        words.append(f"{share:.1%} of all parameters")
    for key in ("input_shape", "target_shape", "rms"):
        value = row.get(key)
        if value is not None:
            shown = f"{value:.3g}" if isinstance(value, float) else value
            words.append(f"{key.replace('_', ' ')} {shown}")
    return "; ".join(dict.fromkeys(words))


def _since(row: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    """The first step from which on the same thing was wrong."""
    alike = [one for one in rows if all(one.get(k) == row.get(k) for k in ("component", "kind"))]
    steps = [one["step"] for one in alike if one["state"] == "wrong"]
    return int(min(steps))
