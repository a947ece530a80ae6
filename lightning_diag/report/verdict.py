"""A run's state in one word, one sentence and one exit code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_diag.report.groups import Group, grouped
from lightning_diag.report.issue_words import plainly, since, what_is_wrong
from lightning_diag.report.looked import DIAGNOSTICS, Looked
from lightning_diag.rules.finding import Finding

__all__ = ["EXIT_CODES", "State", "Verdict", "judge"]

State = Literal["healthy", "warning", "critical", "too little", "nothing measured"]

EXIT_CODES: dict[State, int] = {
    "healthy": 0,
    "too little": 0,
    "warning": 3,
    "nothing measured": 3,
    "critical": 4,
}
"""What ``lightning-diag report`` exits with."""

_FEW_STEPS = 10


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a run first.

    Args:
        state: One of the keys of `EXIT_CODES`.
        headline: What is wrong first, or that nothing is, in a sentence.
        sentence: How much was found, and what was looked at.
    """

    state: State
    headline: str
    sentence: str

    @property
    def exit_code(self) -> int:
        """0 for healthy, 3 for warnings or where nothing was measured, 4 for critical."""
        return EXIT_CODES[self.state]

    def __str__(self) -> str:
        return f"{self.headline} {self.sentence}"


def judge(
    findings: Sequence[Finding],
    steps: Sequence[int],
    info: Mapping[str, Any],
    looked: Looked | None = None,
) -> Verdict:
    """Weigh findings against what was measured: silence is no health where nobody looked.

    Args:
        findings: What `diagnose` returned.
        steps: The steps at which a gradient was measured.
        info: run.json.
        looked: Who looked at what; by default gradients alone, at those steps.
    """
    stopped = _stop(info)
    state: State = "critical" if stopped else _state(findings, steps)
    looked = _gradients_alone(steps) if looked is None else looked
    groups = grouped(findings)
    headline = (
        _sick(state, groups, looked.last) if groups else _nothing(state, looked, bool(stopped))
    )
    parts = [_found(findings), _too_little(state, steps, looked), _who(looked)]
    extra = [_unchecked(findings), stopped or _ending(info)]
    return Verdict(state, headline, " ".join(filter(None, [*parts, *extra])))


_GRAVE = ("critical", "warning")
_MORE_OFTEN = "measure more often (`every_n_steps`) or train longer"


def _gradients_alone(steps: Sequence[int]) -> Looked:
    names = {name: what for name, (what, _) in DIAGNOSTICS.items()}
    seen = {"GradientHealth": names.pop("GradientHealth")} if steps else {}
    return Looked(seen, names, min(steps, default=None), max(steps, default=None))


def _sick(state: State, groups: Sequence[Group], last: int | None) -> str:
    """The first cause, since when, and how much else there is."""
    first = groups[0]
    clause, when = plainly(what_is_wrong(first.first)), since(first.first, last)
    # "does not learn from the start" would say something else
    clause += f"{',' * when.startswith('from')} {when}" if when else ""
    if first.elsewhere:
        clause += f" (also in {_count(len(first.elsewhere), 'other part')})"
    effects, others = len(first.consequences), len(groups) - 1
    rest = [_count(effects, "consequence")] * bool(effects)
    rest += [_count(others, "other problem")] * bool(others)
    more = f"; {', '.join(rest)}" if rest else ""
    return f"{state.capitalize()}: {clause}{more}."


def _nothing(state: State, looked: Looked, stopped: bool) -> str:
    if stopped:
        return "Critical: a diagnostic stopped this run."
    who = _count(len(looked.seen), "diagnostic")
    if not looked.seen:
        return "Nothing was measured."
    if state == "nothing measured":
        return f"Nothing wrong was seen by {who}, but gradients were not measured."
    if state == "too little":
        return "Nothing wrong was seen, but too little was measured to judge by."
    return f"Nothing wrong was seen by {who} in {looked.steps}."


def _found(findings: Sequence[Finding]) -> str:
    critical, warnings = (sum(one.severity == kind for one in findings) for kind in _GRAVE)
    found = " and ".join(
        _count(number, noun)
        for number, noun in ((critical, "critical finding"), (warnings, "warning"))
        if number
    )
    return f"{found[:1].upper()}{found[1:]} in all." if found else ""


def _too_little(state: State, steps: Sequence[int], looked: Looked) -> str:
    """Why silence says little here; empty where it says something."""
    if state == "too little":
        seen = _count(len(steps), "measured step")
        seen += f" ({steps[0]} to {steps[-1]})" if len(steps) > 1 else ""
        return f"Gradients have {seen}, which are too few: {_MORE_OFTEN}."
    if state == "nothing measured":
        return (
            "Without gradients little can be said about a run's health: add `GradientHealth` to "
            f"the Trainer's callbacks, or, if it is there, {_MORE_OFTEN}."
        )
    return ""


def _who(looked: Looked) -> str:
    """What was looked at, and what was not."""
    if not looked.seen:
        return ""
    over = f" in {looked.steps}" if looked.steps else ""
    text = f"Looked at{over}: {', '.join(looked.seen.values())}."
    text += f" Looked for, but not there: {', '.join(looked.absent.values())}." * bool(
        looked.absent
    )
    return text + f" Not looked at: {', '.join(looked.unseen.values())}." * bool(looked.unseen)


def _state(findings: Sequence[Finding], steps: Sequence[int]) -> State:
    if any(one.severity == "critical" for one in findings):
        return "critical"
    if any(one.severity == "warning" for one in findings):
        return "warning"
    if not steps:
        return "nothing measured"
    return "healthy" if len(steps) >= _FEW_STEPS else "too little"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _unchecked(findings: Sequence[Finding]) -> str:
    failed = sum(one.confidence == 0 for one in findings)
    return f"{_count(failed, 'rule')} could not be checked." if failed else ""


def _stop(info: Mapping[str, Any]) -> str:
    """Why a diagnostic stopped the last attempt; empty where none did."""
    reason = info.get("stop_reason")
    if not isinstance(reason, Mapping):
        return ""
    who = reason.get("diagnostic") or "A diagnostic"
    return f"{who} stopped the run: {reason.get('message') or reason.get('rule')}"


def _ending(info: Mapping[str, Any]) -> str:
    attempts = info.get("attempts")
    last = attempts[-1] if isinstance(attempts, list) and attempts else None
    status = last.get("status") if isinstance(last, Mapping) else None
    if status == "running":
        return "The run is still going on, or was broken off."
    if status in (None, "success", "finished", "completed"):
        return ""
    reason = last.get("stop_reason") if isinstance(last, Mapping) else None
    return f"The run ended as {status}{f': {reason}' if reason else ''}."
