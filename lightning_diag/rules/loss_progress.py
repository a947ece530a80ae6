"""Whether training gets anywhere: what weighs a suspicion before it becomes an accusation."""

import math
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from lightning_diag.rules.loss_series import training_losses

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Progress", "loss_progress"]

_EARLY = 3
_LEARNT = 0.15
_WORSE = 0.1
_SIGMAS = 3.0


class Progress(NamedTuple):
    """The training loss at its start and by windows.

    Attributes:
        steps: Last step of each window that has a loss.
        means: Its mean loss.
        noise: Typical deviation of a window from the one before.
    """

    steps: list[int]
    means: list[float]
    noise: float

    @property
    def start(self) -> float:
        """The loss of the first windows."""
        return median(self.means[: min(_EARLY, 1 + len(self.means) // 4)])

    @property
    def now(self) -> float:
        """The loss of the last windows."""
        return median(self.means[-max(_EARLY, len(self.means) // 10) :])

    def learnt(self, share: float = _LEARNT) -> bool:
        """Whether the loss has fallen by more than a share of its start, and than its noise."""
        fall = self.start - self.now
        noise = _SIGMAS * self.noise / math.sqrt(len(self.means))
        return fall > max(share * abs(self.start), noise)

    def worse_since(self, step: int) -> bool:
        """Whether the loss is higher now than before a step."""
        before = [mean for end, mean in zip(self.steps, self.means, strict=True) if end <= step]
        if not before:
            return False
        level = median(before[-_EARLY:])
        return self.now - level > max(_WORSE * abs(level), 2.0 * self.noise)

    def harmed(self, step: int | None, share: float = _LEARNT) -> bool:
        """Whether nothing has been learnt, or what was learnt has been lost since a step."""
        return not self.learnt(share) or (step is not None and self.worse_since(step))


def loss_progress(
    loss: "pl.DataFrame", metrics: "pl.DataFrame", min_windows: int = 3
) -> Progress | None:
    """What the training loss says; None where it says too little."""
    losses = training_losses(loss, metrics)
    if losses is None:
        return None
    known = [
        (step, mean)
        for step, mean in zip(losses.steps, losses.means, strict=True)
        if math.isfinite(mean)
    ]
    if len(known) < min_windows:
        return None
    steps, means = [step for step, _ in known], [mean for _, mean in known]
    jumps = [abs(b - a) for a, b in pairwise(means)]
    return Progress(steps, means, 1.4826 * median(jumps) / math.sqrt(2))
