"""Two runs side by side: findings gone and new, and what became of their numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_diag.records.json_safe import json_safe
from lightning_diag.report.comparison_findings import FindingChange, compared_findings
from lightning_diag.report.comparison_metrics import (
    MetricChange,
    compared_machine,
    compared_metrics,
)
from lightning_diag.report.comparison_settings import (
    Difference,
    compared_configurations,
    compared_environments,
)
from lightning_diag.report.looked import looked_at
from lightning_diag.report.norms import measured_steps
from lightning_diag.report.overhead import overheads
from lightning_diag.report.verdict import Verdict, judge
from lightning_diag.rules import diagnose
from lightning_diag.rules.finding import SEVERITIES
from lightning_diag.rules.run_thresholds import run_thresholds

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["Comparison", "FailOn", "Side", "compare"]

FailOn = Literal["warning", "critical"]

_STATUS = {"warning": 3, "critical": 4}
_SCHEMA = 1


@dataclass(frozen=True)
class Side:
    """One of the two runs.

    Args:
        name: What it is called in the comparison.
        path: Its folder.
        id: From run.json; None where that is missing.
        status: How its last attempt ended, or ``running``; None where nobody knows.
        verdict: What `lightning-diag report` says of it.
        steps: The last step that any row of it has; None where it has no rows.
        stopped: Whether a diagnostic stopped it.
        measured: How many steps there are at which a gradient was measured.
    """

    name: str
    path: str
    id: str | None
    status: str | None
    verdict: Verdict
    steps: int | None
    stopped: bool = False
    measured: int = 0

    @property
    def failed(self) -> bool:
        """Whether an error ended its last attempt."""
        return self.status == "failed"


@dataclass(frozen=True)
class Comparison:
    """What changed from one run to another.

    Args:
        before: The run that is compared with.
        after: The run that is judged.
        findings: Gone, new and still there, those above ``info`` in either run.
        metrics: What both or one of them logged.
        machine: Time, throughput, memory.
        configuration: Keys whose values differ.
        environment: Versions, seed, data and machine, where they differ.
        watching: Cost of each diagnostic, a share of the training time.
    """

    before: Side
    after: Side
    findings: list[FindingChange]
    metrics: list[MetricChange]
    machine: list[MetricChange]
    configuration: list[Difference]
    environment: list[Difference]
    watching: list[MetricChange]

    def of(self, state: str) -> list[FindingChange]:
        """The findings in one state: ``gone``, ``new`` or ``still``."""
        return [one for one in self.findings if one.state == state]

    def exit_code(self, fail_on: FailOn | None) -> int:
        """0 where nothing that counts is new or worse; else 3 for a warning, 4 for a critical one.

        A new finding that a finding of both runs explains does not count. A second run that cannot
        be judged counts, where the first one could be: see `setback`.

        Args:
            fail_on: The mildest severity that counts; None for none.
        """
        if fail_on is None:
            return 0
        gravest = max((one.alarm for one in self.findings), default=0)
        gravest = max(gravest, self._fallen[0])
        if gravest < SEVERITIES.index(fail_on):
            return 0
        return _STATUS[SEVERITIES[gravest]]

    @property
    def setback(self) -> str:
        """What is worse in the second run though no finding says so; empty where nothing is.

        It failed, was stopped by a diagnostic or measured no gradient, unlike the first one.
        """
        return self._fallen[1]

    @property
    def _fallen(self) -> tuple[int, str]:
        before, after = self.before, self.after
        if after.failed and not before.failed:
            return 2, "B failed, A did not."
        if after.stopped and not before.stopped:
            return 2, "A diagnostic stopped B, none stopped A."
        if after.verdict.state == "nothing measured" and before.measured:
            return 1, "B has measured no gradient, so that little can be said to be gone."
        return 0, ""

    @property
    def headline(self) -> str:
        """Findings gone, new and still there, in a sentence."""
        counts = {state: len(self.of(state)) for state in ("gone", "new", "still")}
        worse = sum(one.change == "worse" for one in self.findings)
        if not any(counts.values()):
            return " ".join(filter(None, ["Nothing was found in either run.", self.setback]))
        parts = [f"{counts['gone']} gone", f"{counts['new']} new", f"{counts['still']} still there"]
        told = f"Findings: {', '.join(parts)}{f' ({worse} worse)' if worse else ''}."
        return " ".join(filter(None, [told, self.setback]))

    def to_dict(self, fail_on: FailOn | None = None) -> dict[str, Any]:
        """The comparison as JSON can hold it; what ``lightning-diag compare --json`` writes.

        ``schema`` is raised when a field changes its meaning or goes away; fields may be added.

        Args:
            fail_on: What `exit_code` takes.
        """
        plain = {
            "schema": _SCHEMA,
            "before": _side(self.before),
            "after": _side(self.after),
            "fail_on": fail_on,
            "exit_code": self.exit_code(fail_on),
            "headline": self.headline,
            "findings": {state: [one.to_dict() for one in self.of(state)] for state in _STATES},
            "metrics": [one.to_dict() for one in self.metrics],
            "machine": [one.to_dict() for one in self.machine],
            "configuration": [one.to_dict() for one in self.configuration],
            "environment": [one.to_dict() for one in self.environment],
            "watching": [one.to_dict() for one in self.watching],
        }
        safe: dict[str, Any] = json_safe(plain)  # type: ignore[assignment]
        return safe


_STATES = ("gone", "new", "still")


def compare(before: "Run", after: "Run", thresholds: Mapping[str, Any] | None = None) -> Comparison:
    """Diagnose two runs by the same thresholds, and say what differs.

    Either may be still going on, broken off or empty: what both have is compared.

    Args:
        before: The run to compare with.
        after: The run that is judged.
        thresholds: ``{rule id: {threshold: number}}`` for both; what is left out comes from the
            configuration of each run, then from the defaults.

    Raises:
        ValueError: An unknown rule or threshold.
    """
    found = [diagnose(run, run_thresholds(run.config, thresholds)) for run in (before, after)]
    names = _names(before, after)
    sides = [
        _seen(name, run, findings)
        for name, run, findings in zip(names, (before, after), found, strict=True)
    ]
    return Comparison(
        before=sides[0],
        after=sides[1],
        findings=compared_findings(
            found[0], found[1], -1 if sides[1].steps is None else sides[1].steps
        ),
        metrics=compared_metrics(before, after),
        machine=compared_machine(before, after),
        configuration=compared_configurations(before, after),
        environment=compared_environments(before, after),
        watching=_costs(before, after),
    )


def _names(before: "Run", after: "Run") -> tuple[str, str]:
    paths = before.path.resolve(), after.path.resolve()
    if paths[0].name != paths[1].name:
        return paths[0].name or "before", paths[1].name or "after"
    above = [f"{path.parent.name}/{path.name}" for path in paths]
    return (above[0], above[1]) if above[0] != above[1] else ("before", "after")


def _seen(name: str, run: "Run", findings: Sequence[Any]) -> Side:
    info = run.info
    measured = measured_steps(run.frame("grad"))
    verdict = judge(findings, measured, info, looked_at(run))
    lasts = [run.frame(prefix)["step"].max() for prefix in run.prefixes]
    steps = [int(last) for last in lasts if isinstance(last, (int, float))]
    return Side(
        name=name,
        path=str(run.path),
        id=info.get("id"),
        status=info.get("status"),
        verdict=verdict,
        steps=max(steps, default=None),
        stopped=isinstance(info.get("stop_reason"), Mapping),
        measured=len(measured),
    )


def _costs(before: "Run", after: "Run") -> list[MetricChange]:
    shares = [
        {one.diagnostic: one.share for one in overheads(run.frame("overhead"))}
        for run in (before, after)
    ]
    names = dict.fromkeys([*shares[0], *shares[1]])
    rows = [
        MetricChange(name, "share of training", "min", shares[0].get(name), shares[1].get(name))
        for name in names
    ]
    before_all, after_all = (sum(s or 0.0 for s in one.values()) if one else None for one in shares)
    whole = MetricChange("all", "share of training", "min", before_all, after_all)
    return [whole, *rows] if rows else []


def _side(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "path": side.path,
        "id": side.id,
        "status": side.status,
        "state": side.verdict.state,
        "verdict": str(side.verdict),
        "last_step": side.steps,
    }
