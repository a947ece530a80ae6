"""A finding: one thing that a rule saw in a run, where, since when, and what to try."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

__all__ = ["SEVERITIES", "Evidence", "Finding", "Severity"]

Severity = Literal["info", "warning", "critical"]

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
"""From the mildest to the gravest; the index in this tuple is the rank."""


@dataclass(frozen=True)
class Evidence:
    """The rows that a finding rests on: a file of the run, and steps in it."""

    file: str = ""
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that a rule saw in a run.

    Args:
        rule: Id of the rule, as in ``"dead_component"``.
        severity: ``"info"``, ``"warning"`` or ``"critical"``.
        component: Part of the model it is about; None means the whole model.
        first_step: First step at which it shows.
        last_step: Last step at which it shows.
        observed: The number that was seen.
        threshold: The number it was compared with.
        unit: What both numbers count.
        evidence: File and steps of the rows it rests on.
        message: What happened, in a sentence or two.
        suggestion: What to try.
        overrides: Hydra overrides that try it; empty where no key of the run's configuration does.
        confidence: How sure the rule is, 0 to 1.
        caused_by: Id of the rule whose finding explains this one.
        began_after: Last step at which it was looked for and not seen, where that is known; not
            written down.
    """

    rule: str
    severity: Severity
    component: str | None = None
    first_step: int | None = None
    last_step: int | None = None
    observed: float | None = None
    threshold: float | None = None
    unit: str = ""
    evidence: Evidence = field(default_factory=Evidence)
    message: str = ""
    suggestion: str = ""
    overrides: Mapping[str, object] = field(default_factory=dict)
    confidence: float = 1.0
    caused_by: str | None = None
    began_after: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(
                f"`severity` must be one of {', '.join(SEVERITIES)}, got {self.severity!r}."
            )

    @property
    def rank(self) -> int:
        """Severity as a number: 0 for info, 2 for critical."""
        return SEVERITIES.index(self.severity)

    @property
    def issue(self) -> str:
        """The rule's id in words, as in ``"Dead component"``."""
        return self.rule.replace("_", " ").capitalize()

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain dicts, lists, strings and numbers."""
        plain = asdict(self)
        del plain["began_after"]
        plain["evidence"]["steps"] = list(self.evidence.steps)
        plain["overrides"] = dict(self.overrides)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Finding":
        """Read back what `to_dict` gave.

        Raises:
            ValueError: A field that a finding does not have.
        """
        unknown = sorted(set(plain) - {one.name for one in fields(cls)})
        if unknown:
            raise ValueError(f"A finding must have only its own fields, got {unknown[0]!r}.")
        evidence = plain.get("evidence") or {}
        kept = Evidence(str(evidence.get("file", "")), tuple(evidence.get("steps", ())))
        return cls(**{**plain, "evidence": kept})
