"""A run's state in one word, one sentence and one exit code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
        headline: A few words.
        sentence: What was measured and found.
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


def judge(findings: Sequence[Finding], steps: Sequence[int], info: Mapping[str, Any]) -> Verdict:
    """Weigh findings against what was measured: silence is no health where nobody looked.

    Args:
        findings: What `diagnose` returned.
        steps: The steps at which a gradient was measured.
        info: run.json.
    """
    stopped = _stop(info)
    state: State = "critical" if stopped else _state(findings, steps)
    critical, warnings = (sum(one.severity == kind for one in findings) for kind in _GRAVE)
    seen = f"{_count(len(steps), 'measured step')}"
    if len(steps) > 1:
        seen += f" ({steps[0]} to {steps[-1]})"
    found = " and ".join(
        _count(number, noun)
        for number, noun in ((critical, "critical finding"), (warnings, "warning"))
        if number
    )
    sentences = {
        "nothing measured": "The run holds no gradients, so nothing can be said about its health. "
        "Add `GradientHealth` to the Trainer's callbacks; if it is there, let it measure more "
        "often (`every_n_steps`) or train longer.",
        "too little": f"Nothing wrong was seen, but {seen} are too few to judge by. Measure more "
        "often (`every_n_steps`) or train longer.",
        "healthy": f"No rule found anything wrong in {seen}.",
    }
    judged = f"{found[:1].upper()}{found[1:]}" or "No finding"
    sentence = sentences.get(state, f"{judged} in {seen}.")
    extra = [_unchecked(findings), stopped or _ending(info)]
    return Verdict(state, _HEADLINES[state], " ".join([sentence, *filter(None, extra)]))


_GRAVE = ("critical", "warning")
_HEADLINES: dict[State, str] = {
    "healthy": "Gradients look healthy.",
    "warning": "Something needs a look.",
    "critical": "This run is sick.",
    "too little": "Too little was measured.",
    "nothing measured": "Nothing was measured.",
}


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
