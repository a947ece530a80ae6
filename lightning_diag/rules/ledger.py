"""Which findings are news: each is said once, until it has been gone for a while."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_diag.rules.finding import SEVERITIES, Finding, Severity

__all__ = ["Changes", "Ledger", "Standing"]


class Standing(NamedTuple):
    """A finding that has been said: how grave it was then, and for how many looks it is gone."""

    severity: Severity
    gone: int


class Changes(NamedTuple):
    """What is new since the last look.

    Args:
        raised: Findings that were not known.
        worsened: Known findings that are graver than when they were last said.
        cleared: Rule and component of those that are gone.
    """

    raised: list[Finding]
    worsened: list[Finding]
    cleared: list[tuple[str, str | None]]


@dataclass
class Ledger:
    """The findings that have been said and still stand.

    Args:
        clear_after: How many looks in a row a finding must be gone before it is cleared, and may be
            said again.

    Raises:
        ValueError: `clear_after` is below 1.

    Example:
        >>> ledger, dead = Ledger(clear_after=1), Finding("dead_component", "warning", "head")
        >>> len(ledger.update([dead]).raised), len(ledger.update([dead]).raised)
        (1, 0)
        >>> ledger.update([]).cleared
        [('dead_component', 'head')]
    """

    clear_after: int = 3
    standing: dict[tuple[str, str | None], Standing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.clear_after < 1:
            raise ValueError(f"`clear_after` must be at least 1, got {self.clear_after}.")

    def update(self, findings: Iterable[Finding]) -> Changes:
        """Compare what is found now with what stands."""
        changes = Changes([], [], [])
        seen = set()
        for finding in findings:
            key = (finding.rule, finding.component)
            known = self.standing.get(key)
            if key in seen:
                continue
            seen.add(key)
            if known is None:
                changes.raised.append(finding)
            elif finding.rank > SEVERITIES.index(known.severity):
                changes.worsened.append(finding)
            said = known.severity if known and finding not in changes.worsened else finding.severity
            self.standing[key] = Standing(said, 0)
        for key, known in list(self.standing.items()):
            if key in seen:
                continue
            if known.gone + 1 >= self.clear_after:
                del self.standing[key]
                changes.cleared.append(key)
            else:
                self.standing[key] = Standing(known.severity, known.gone + 1)
        return changes

    def counts(self) -> dict[str, int]:
        """How many findings stand, by severity."""
        found = [one.severity for one in self.standing.values()]
        return {severity: found.count(severity) for severity in SEVERITIES}
