"""The findings of two runs, paired."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_diag.rules.finding import Finding

__all__ = ["FindingChange", "compared_findings"]

State = Literal["gone", "new", "still"]
Change = Literal["worse", "milder", "same"]


@dataclass(frozen=True)
class FindingChange:
    """A finding of one run or of both.

    Args:
        state: ``gone``: in the first run alone; ``new``: in the second alone; ``still``: in both.
        before: The finding of the first run.
        after: The finding of the second run.
        known_cause: Whether a finding of both runs explains this one.
        reached: Whether the second run came to the step at which one that is gone began in the
            first; true for the others.
    """

    state: State
    before: Finding | None
    after: Finding | None
    known_cause: bool = False
    reached: bool = True

    @property
    def moved(self) -> str | None:
        """The part that one which is still there was in before, if that was another; else None.

        An empty text stands for the whole model.
        """
        if self.before is None or self.after is None:
            return None
        before = self.before.component
        return None if before == self.after.component else before or ""

    @property
    def finding(self) -> Finding:
        """That of the second run, else that of the first."""
        found = self.after or self.before
        if found is None:
            raise ValueError("A change must have a finding before or after, got neither.")
        return found

    @property
    def change(self) -> Change | None:
        """How the severity of one that is still there changed; None for the others."""
        if self.before is None or self.after is None:
            return None
        if self.before.rank == self.after.rank:
            return "same"
        return "worse" if self.after.rank > self.before.rank else "milder"

    @property
    def alarm(self) -> int:
        """The rank of what is new or worse in it; 0 where nothing is."""
        if self.after is None or self.known_cause or self.change in ("same", "milder"):
            return 0
        return self.after.rank

    def to_dict(self) -> dict[str, Any]:
        """Rule, component, severities and cause, and both findings whole."""
        one = self.finding
        return {
            "rule": one.rule,
            "component": one.component,
            "severity_before": self.before.severity if self.before else None,
            "severity_after": self.after.severity if self.after else None,
            "change": self.change,
            "caused_by": one.caused_by,
            "known_cause": self.known_cause,
            "reached": self.reached,
            "before": self.before.to_dict() if self.before else None,
            "after": self.after.to_dict() if self.after else None,
        }


def compared_findings(
    before: Sequence[Finding], after: Sequence[Finding], last_step: float = math.inf
) -> list[FindingChange]:
    """Pair findings by rule and component, then by rule alone; those above ``info`` in either run.

    New ones come first, then those that are still there, then those that are gone; in each the
    causes come first.

    Args:
        before: Of the first run, causes first.
        after: Of the second run, causes first.
        last_step: That of the second run.
    """
    pairs: dict[int, Finding] = {}
    left = list(before)
    for same in (_same_part, _same_rule):
        for index, finding in enumerate(after):
            if index not in pairs:
                partner = next((one for one in left if same(one, finding)), None)
                if partner is not None:
                    pairs[index] = partner
                    left.remove(partner)
    kept = {pairs[index].rule for index, one in enumerate(after) if index in pairs and one.rank}
    new, still = [], []
    for index, finding in enumerate(after):
        partner = pairs.get(index)
        if max(finding.rank, partner.rank if partner else 0) == 0:
            continue
        if finding.rank == 0:
            still.append(_gone(partner, math.inf))
        elif partner is None or partner.rank == 0:
            known = finding.caused_by in kept
            new.append(FindingChange("new", None, finding, known))
        else:
            still.append(FindingChange("still", partner, finding))
    gone = [one for one in still if one.state == "gone"]
    gone += [_gone(one, last_step) for one in left if one.rank]
    order = {id(one): place for place, one in enumerate(before)}
    gone.sort(key=lambda one: order[id(one.before)])
    return [*new, *(one for one in still if one.state == "still"), *gone]


def _gone(before: Finding | None, last_step: float) -> FindingChange:
    began = -1 if before is None or before.first_step is None else before.first_step
    return FindingChange("gone", before, None, reached=began <= last_step)


def _same_part(one: Finding, other: Finding) -> bool:
    return (one.rule, one.component) == (other.rule, other.component)


def _same_rule(one: Finding, other: Finding) -> bool:
    return one.rule == other.rule
