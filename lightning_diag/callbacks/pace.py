"""When a diagnostic measures: each n-th step, or as often as a budget allows."""

from typing import Any, Literal

__all__ = ["Interval", "Pace", "check_interval"]

Interval = int | Literal["auto"]

_FIRST_AUTO_STEP = 4


class Pace:
    """Says of each step whether it is one to measure.

    Args:
        every_n_steps: Measure steps n-1, 2n-1, ... counted from 0; ``"auto"``: as `interval` says,
            which the owner sets; None: never.

    Attributes:
        interval: Steps between two measurements, as of now.
        came: Whether any step was one to measure.
    """

    def __init__(self, every_n_steps: Interval | None) -> None:
        self.every_n_steps = every_n_steps
        self.interval = every_n_steps if isinstance(every_n_steps, int) else 1
        self.came = False
        self._due: dict[int, int] = {}
        self._asked: dict[int, int] = {}
        self._counted: dict[int, int] = {}

    def is_turn(self, whose: int, step: int) -> bool:
        """Whether a step is one to measure; of questions about the same step the first counts.

        Args:
            whose: Number of the optimizer, or another key: each is asked about in its own order.
            step: The step, from 0.
        """
        # a step may be asked about several times: micro-batches, or a line search; its start counts
        if self._asked.get(whose) == step or self.every_n_steps is None:
            return False
        self._asked[whose] = step
        if self.every_n_steps != "auto":
            due = (step + 1) % self.interval == 0
        elif due := step >= self._next(whose):
            self._due[whose] = step
        self.came = self.came or due
        return due

    def _next(self, whose: int) -> int:
        return self._due.get(whose, _FIRST_AUTO_STEP - self.interval) + self.interval

    def count(self, whose: int) -> int:
        """How often this was called for `whose` before."""
        count = self._counted.get(whose, 0)
        self._counted[whose] = count + 1
        return count

    def state_dict(self) -> dict[str, Any]:
        """What must outlive a restart."""
        return {
            "interval": self.interval,
            "due": dict(self._due),
            "asked": dict(self._asked),
            "counted": dict(self._counted),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; an interval given as a number stays what it is."""
        self._asked = dict(state["asked"])
        self._counted = dict(state["counted"])
        if self.every_n_steps == "auto":
            self.interval = state["interval"]
            self._due = dict(state["due"])


def check_interval(every_n_steps: Interval | None) -> None:
    """Raise unless it is a whole number from 1, or ``"auto"``.

    Raises:
        ValueError: If `every_n_steps` is neither.
    """
    whole = isinstance(every_n_steps, int) and not isinstance(every_n_steps, bool)
    if every_n_steps != "auto" and not (whole and int(every_n_steps or 0) >= 1):
        raise ValueError(f'`every_n_steps` must be at least 1 or "auto", got {every_n_steps!r}.')
