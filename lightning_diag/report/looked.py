"""What was looked at in a run: silence is no health where nobody looked."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_diag.rules.registry import RULES

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["DIAGNOSTICS", "Looked", "looked_at"]

DIAGNOSTICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "GradientHealth": ("gradients", ("grad",)),
    "UpdateRatio": ("weight updates", ("update",)),
    "CollapseStop": ("loss and predictions", ("loss", "collapse")),
    "WiringCheck": ("wiring of model, data and loss", ("wiring",)),
    "ActivationHealth": ("activations", ("activation",)),
    "LatentStats": ("representation", ("latent",)),
    "AttentionCapture": ("attention", ("attention_head",)),
    "HardwareMonitor": ("machine", ("hardware",)),
}
"""The diagnostics whose rows rules judge: what each looks at, and where its rows are."""

_LATE = 10


@dataclass(frozen=True)
class Looked:
    """Who looked at a run, at what, and over which steps.

    Args:
        seen: What was looked at, by diagnostic.
        unseen: What was not, by diagnostic.
        first: First step with a row; None where there is none.
        last: Last step with a row.
    """

    seen: dict[str, str]
    unseen: dict[str, str]
    first: int | None = None
    last: int | None = None

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
    for name, (what, prefixes) in DIAGNOSTICS.items():
        (unseen if there.isdisjoint(prefixes) else seen)[name] = what
    edges = [edge for prefix in there for edge in _edges(run, prefix)]
    return Looked(seen, unseen, min(edges, default=None), max(edges, default=None))


def _judged() -> set[str]:
    return {prefix for rule in RULES.values() for prefix in rule.needs}


def _edges(run: "Run", prefix: str) -> list[int]:
    frame = run.frame(prefix)
    if "step" not in frame.columns:
        return []
    ends = (frame["step"].min(), frame["step"].max())
    return [int(end) for end in ends if isinstance(end, int | float)]
