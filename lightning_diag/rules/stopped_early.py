"""What is known of a run that `CollapseStop` has ended before other rows told anything."""

import math
from typing import TYPE_CHECKING, Any

from lightning_diag.rules.finding import Evidence, Finding
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["COLLAPSE_FILE", "Stopped", "stopped_early", "stopped_finding"]

COLLAPSE_FILE = "records/collapse.jsonl"

_COLUMNS = ("step", "event", "kinds", "gradient_norm", "loss", "action", "streak")
_EARLY_STEPS = 50
_IN_A_ROW = 3


class Stopped:
    """The last streak of events of a run that was ended in its first steps.

    Attributes:
        events: Rows of the streak, by rising step.
        first: The row of step 0, before anything was changed; None if there is none.
    """

    def __init__(self, events: list[dict[str, Any]], first: dict[str, Any] | None) -> None:
        self.events = events
        self.first = first

    @property
    def kinds(self) -> set[str]:
        """The kinds of all events of the streak."""
        return {kind for row in self.events for kind in str(row["kinds"] or "").split(",") if kind}

    def numbers(self, name: str) -> list[float]:
        """A column of the streak, where it is known."""
        return [float(row[name]) for row in self.events if row[name] is not None]

    @property
    def turned_at_once(self) -> bool:
        """Whether an ordinary gradient blew up, or vanished, with the very first step."""
        if self.first is None or self.events[0]["step"] > 2:
            return False
        before = self.first["gradient_norm"]
        after = self.events[0]["gradient_norm"]
        if self.events[0] is self.first:
            after = self.events[1]["gradient_norm"] if len(self.events) > 1 else None
        # exactly zero is what dead units leave, whatever the step
        if before is None or not after or not 1e-3 < before <= 100:
            return False
        return bool(after > 1e3 * before or after < 1e-4 * before)


def stopped_early(collapse: "pl.DataFrame", *, ended: bool = True) -> Stopped | None:
    """The first streak of events of a run that collapsed within its first fifty steps.

    Args:
        collapse: Rows of ``collapse.jsonl``.
        ended: Whether the run must have been ended by it; otherwise three events in a row do, as
            where `CollapseStop` only warns.

    Returns:
        None for any other run.
    """
    if not set(_COLUMNS) <= set(collapse.columns) or collapse.height < 2:
        return None
    rows = [row for row in collapse.sort("step").to_dicts() if row["step"] < _EARLY_STEPS]
    until = next((at for at, row in enumerate(rows) if row["action"] == "stop"), None)
    if until is None and not ended:
        streaks = (at for at, row in enumerate(rows) if (row["streak"] or 0) >= _IN_A_ROW)
        until = next(streaks, None)
    if until is None or not rows[until]["streak"]:
        return None
    rows = rows[: until + 1]
    last = rows[-1]
    events = [row for row in rows if row["event"]][-int(last["streak"]) :]
    return Stopped(events, rows[0] if rows[0]["step"] == 0 else None)


def stopped_finding(
    collapse: "pl.DataFrame", rule: str, seen: str, suggestion: str
) -> list[Finding]:
    """The finding that the events of a streak are by themselves; none where there are none.

    Args:
        collapse: Rows of ``collapse.jsonl``.
        rule: The rule, which has the name of the kind of event.
        seen: What was seen, in words; ``{norm}`` and ``{loss}`` stand for the last of them.
        suggestion: What to try.
    """
    stopped = stopped_early(collapse)
    if stopped is None or rule not in stopped.kinds:
        return []
    steps = [int(row["step"]) for row in stopped.events]
    norms, losses = stopped.numbers("gradient_norm"), stopped.numbers("loss")
    norm, loss = norms[-1] if norms else math.nan, losses[-1] if losses else math.nan
    return [
        Finding(
            rule=rule,
            severity="critical",
            first_step=steps[0],
            last_step=steps[-1],
            observed=norm,
            unit="l2 norm of the gradient",
            evidence=Evidence(COLLAPSE_FILE, evidence_steps(steps)),
            message=(
                f"{seen.format(norm=f'{norm:.3g}', loss=f'{loss:.3g}')}, and `CollapseStop` ended "
                f"the run at step {steps[-1]}."
            ),
            suggestion=suggestion,
            confidence=0.8,
        )
    ]
