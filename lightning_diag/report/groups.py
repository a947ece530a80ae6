"""Findings as people should read them: each cause once, with what follows from it below."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from lightning_diag.report.words import not_said_before
from lightning_diag.rules.finding import Finding, Severity

__all__ = ["Group", "grouped"]


@dataclass(frozen=True)
class Group:
    """One thing that is wrong.

    Args:
        first: The finding to begin with.
        elsewhere: The same thing in other parts of the model.
        consequences: What it explains, directly or through others.
    """

    first: Finding
    elsewhere: tuple[Finding, ...] = ()
    consequences: tuple[Finding, ...] = ()

    @property
    def severity(self) -> Severity:
        """That of the gravest of all its findings: a cause is as grave as what follows from it."""
        everything = (self.first, *self.elsewhere, *self.consequences)
        return max(everything, key=lambda one: one.rank).severity

    def told(self, finding: Finding) -> str:
        """The message of one of its findings, without an end that one before it has, too."""
        everything = (self.first, *self.elsewhere, *self.consequences)
        before = takewhile(lambda one: one is not finding, everything)
        return not_said_before(finding.message, [one.message for one in before])


def grouped(findings: Sequence[Finding]) -> list[Group]:
    """The findings above ``info`` by what causes them, in their order.

    A finding whose cause is not among them stands by itself, so that none is lost.

    Args:
        findings: What `diagnose` returned.
    """
    grave = [one for one in findings if one.rank > 0]
    roots: dict[str, list[Finding]] = {}
    below: dict[str, list[Finding]] = {}
    for one in grave:
        root = _root(one, grave)
        (roots if root is one else below).setdefault(root.rule, []).append(one)
    return [
        Group(own[0], tuple(own[1:]), tuple(below.get(rule, ()))) for rule, own in roots.items()
    ]


def _root(finding: Finding, grave: Sequence[Finding]) -> Finding:
    """What explains it in the end; of findings that explain each other, the first."""
    chain = [finding]
    while (cause := _cause(chain[-1], grave)) is not None:
        if any(cause is one for one in chain):
            return next(one for one in grave if any(one is other for other in chain))
        chain.append(cause)
    return chain[-1]


def _cause(finding: Finding, grave: Sequence[Finding]) -> Finding | None:
    """The finding of the rule that explains it, best of the same component."""
    named = [one for one in grave if one.rule == finding.caused_by and one is not finding]
    return min(
        named,
        key=lambda one: (one.component != finding.component, one.component is not None),
        default=None,
    )
