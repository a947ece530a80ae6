"""How fast batches come and go, and how long the step waits for them."""

from dataclasses import dataclass

__all__ = ["Stopwatch", "Window"]


@dataclass
class Window:
    """What happened since the last row.

    Attributes:
        batches: Batches that ended.
        samples: Samples in these; None from the first batch on whose size is unknown.
        step_seconds: Time in batches, from start to end.
        wait_seconds: Time between a batch and the next.
    """

    batches: int = 0
    samples: int | None = 0
    step_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """All of the time."""
        return self.step_seconds + self.wait_seconds


class Stopwatch:
    """A stopwatch around batches, which stands still while something else goes on between them."""

    def __init__(self) -> None:
        self._window = Window()
        self._began: float | None = None
        self._ended: float | None = None
        self._paused: float | None = None

    def ready(self, now: float) -> None:
        """From here on the loop waits for its next batch."""
        self._ended = now

    def starts(self, now: float) -> None:
        """A batch is there and starts."""
        if self._ended is not None:
            self._window.wait_seconds += now - self._ended
        self._began, self._ended, self._paused = now, None, None

    def ends(self, now: float, samples: int | None) -> None:
        """The batch is through."""
        window = self._window
        if self._began is not None:
            window.step_seconds += now - self._began
            window.batches += 1
            known = samples is not None and window.samples is not None
            window.samples = (window.samples or 0) + (samples or 0) if known else None
        self._began, self._ended = None, now

    def pauses(self, now: float) -> None:
        """Something else begins between two batches, such as a validation."""
        self._paused = now

    def resumes(self, now: float) -> None:
        """It is over."""
        if self._paused is not None and self._ended is not None:
            self._ended += now - self._paused
        self._paused = None

    def skips(self) -> None:
        """Something else goes on whose end nobody will tell: this gap counts for nothing."""
        self._ended = None

    def take(self) -> Window:
        """What happened since the last call."""
        window, self._window = self._window, Window()
        return window
