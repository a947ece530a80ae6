"""What was said while the run went on."""

from typing import TYPE_CHECKING, Any

from lightning_diag.report.section import Section, Table

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["alerts_section"]

_MOST = 30
_WHOLE = "whole model"


def alerts_section(run: "Run") -> Section | None:
    """When each alert was raised and when it ended.

    Args:
        run: What `read_run` returned.

    Returns:
        None where `HealthAlerts` wrote nothing.
    """
    looks = [row for row in run.frame("health").to_dicts() if row.get("step") is not None]
    rows = [row for row in run.frame("health_alert").to_dicts() if row.get("step") is not None]
    if not looks and not rows:
        return None
    last = max(row["step"] for row in [*looks, *rows])
    raised = sum(row.get("state") != "cleared" for row in rows)
    several = "1 alert" if raised == 1 else f"{raised or 'no'} alerts"
    line = f"{len(looks)} looks while the run went on, the last at step {last}: {several}."
    cells = [_cells(row) for row in sorted(rows, key=lambda row: int(row["step"]))]
    title = f"The last {_MOST} of {len(cells)}" if len(cells) > _MOST else ""
    columns = ("step", "alert", "where", "what", "severity")
    tables = (Table(columns, cells[-_MOST:], title, left=5),) if cells else ()
    return Section("Alerts", (line,), tables)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    rule = str(row.get("rule") or "").replace("_", " ")
    where = str(row.get("component") or _WHOLE)
    state = str(row.get("state") or "raised")
    return (str(row["step"]), state, where, rule, str(row.get("severity") or "-"))
