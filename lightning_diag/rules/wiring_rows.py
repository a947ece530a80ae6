"""The rows of a wiring check as faults: the same thing seen wrong, look after look."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["WIRING_FILE", "Fault", "checked", "faults"]

WIRING_FILE = "records/wiring.jsonl"

_MORE = re.compile(r" and \d+ more$")
_ALIKE = ("component", "kind", "at", "optimizer")


@dataclass(frozen=True)
class Fault:
    """Rows of one check that found the same thing, by rising step.

    Attributes:
        rows: At most one a step.
        well_before: Step of the last look before them, at which it was not seen.
    """

    rows: list[dict[str, Any]]
    well_before: int | None = None

    @property
    def last(self) -> dict[str, Any]:
        """The last row."""
        return self.rows[-1]

    @property
    def kind(self) -> str:
        """Which of the faults of its check it is."""
        return str(self.last.get("kind") or "")

    @property
    def looks(self) -> int:
        """At how many steps it was seen."""
        return len(self.rows)

    @property
    def names(self) -> str:
        """The first of the subjects, in words."""
        text = str(self.last.get("names") or "?")
        more = _MORE.search(text)
        named, rest = (text[: more.start()], more[0]) if more else (text, "")
        return ", ".join(f"`{name}`" for name in named.split(", ")) + rest

    @property
    def share(self) -> float:
        """Share of all parameters that it concerns."""
        return self.number("share")

    def number(self, key: str) -> float:
        """A number of the last row; 0 where there is none."""
        value = self.last.get(key)
        return float(value) if isinstance(value, (int, float)) else 0.0

    def finding(
        self,
        severity: Severity,
        message: str,
        suggestion: str,
        *,
        observed: float | None = None,
        threshold: float | None = None,
        unit: str = "",
        confidence: float = 0.9,
    ) -> Finding:
        """The finding that rests on these rows."""
        steps = [int(row["step"]) for row in self.rows]
        component = self.last.get("component")
        return Finding(
            rule=str(self.last["check"]),
            severity=severity,
            component=None if component is None else str(component),
            first_step=steps[0],
            last_step=steps[-1],
            observed=observed,
            threshold=threshold,
            unit=unit,
            evidence=Evidence(WIRING_FILE, evidence_steps(steps)),
            message=message,
            suggestion=suggestion,
            confidence=confidence,
            began_after=self.well_before,
        )


def checked(wiring: "pl.DataFrame", check: str) -> list[dict[str, Any]]:
    """The rows of one check, by rising step, without those that know nothing."""
    import polars as pl

    if not {"check", "state", "step"} <= set(wiring.columns):
        return []
    known = pl.col("state").is_in(["ok", "wrong"]) & pl.col("step").is_not_null()
    rows = wiring.filter(pl.col("check") == check, known)
    return rows.sort("step", maintain_order=True).to_dicts()


def faults(wiring: "pl.DataFrame", check: str) -> list[Fault]:
    """What a check has found up to its last look; what was healed before is no fault."""
    rows = checked(wiring, check)
    if not rows:
        return []
    last = rows[-1]["step"]
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["state"] == "wrong":
            key = tuple(row.get(name) for name in _ALIKE)
            groups.setdefault(key, {})[int(row["step"])] = row
    looks = sorted({int(row["step"]) for row in rows})
    found = [list(group.values()) for group in groups.values() if last in group]
    return [Fault(group, _before(looks, int(group[0]["step"]))) for group in found]


def _before(looks: list[int], step: int) -> int | None:
    return max((one for one in looks if one < step), default=None)
