"""What was looked at in a run: silence is no health where nobody looked."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.registry import RULES

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["DIAGNOSTICS", "Looked", "looked_at"]

DIAGNOSTICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "GradientHealth": ("gradients", ("grad",)),
    "UpdateRatio": ("weight updates", ("update",)),
    "CollapseStop": ("loss and predictions", ("loss", "collapse")),
    "WiringCheck": ("wiring", ("wiring",)),
    "ActivationHealth": ("activations", ("activation",)),
    "LatentStats": ("representation", ("latent",)),
    "AttentionCapture": ("attention", ("attention_head",)),
    "HardwareMonitor": ("machine", ("hardware",)),
}
"""The diagnostics whose rows rules judge: what each looks at, and where its rows are."""

_LATE = 10
_NOTHING = re.compile(r"no [\w ]+ was seen")
_IN_VAIN = {"AttentionCapture": "attention"}  # what also has rows where nothing is to be seen


@dataclass(frozen=True)
class Looked:
    """Who looked at a run, at what, and over which steps.

    Args:
        seen: What was looked at, by diagnostic.
        unseen: What was not, by diagnostic.
        first: First step with a row; None where there is none.
        last: Last step with a row.
        absent: What was looked for and is not there, by diagnostic.
    """

    seen: dict[str, str]
    unseen: dict[str, str]
    first: int | None = None
    last: int | None = None
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> str:
        """``600 steps``, or ``steps 9000 to 9599`` where the rows begin late; empty for none."""
        if self.first is None or self.last is None:
            return ""
        if self.first * _LATE > self.last:
            return f"steps {self.first:,} to {self.last:,}"
        return f"{self.last + 1:,} step{'s' * (self.last > 0)}"


def looked_at(run: "Run") -> Looked:
    """Which of the diagnostics that rules judge left rows in a run.

    Args:
        run: What `read_run` returned.
    """
    there = {one for one in _judged() if one in run.prefixes and not run.frame(one).is_empty()}
    seen: dict[str, str] = {}
    unseen: dict[str, str] = {}
    absent: dict[str, str] = {}
    in_vain = _in_vain(run)
    for name, (what, prefixes) in DIAGNOSTICS.items():
        without = absent if name in in_vain else unseen
        (without if there.isdisjoint(prefixes) else seen)[name] = what
    edges = [edge for prefix in there for edge in _edges(run, prefix)]
    return Looked(seen, unseen, min(edges, default=None), max(edges, default=None), absent)


def _in_vain(run: "Run") -> set[str]:
    """Diagnostics that looked, and found that there is nothing of the kind in the model."""
    found = {name for name, prefix in _IN_VAIN.items() if not run.frame(prefix).is_empty()}
    notes = run.frame("notes")
    if {"diagnostic", "message"} <= set(notes.columns):
        said = zip(notes["diagnostic"], notes["message"], strict=True)
        found |= {str(who) for who, what in said if _NOTHING.match(str(what))}
    return found


def _judged() -> set[str]:
    return {prefix for rule in RULES.values() for prefix in rule.needs}


def _edges(run: "Run", prefix: str) -> list[int]:
    frame = run.frame(prefix)
    if "step" not in frame.columns:
        return []
    ends = (frame["step"].min(), frame["step"].max())
    return [int(end) for end in ends if isinstance(end, int | float)]
