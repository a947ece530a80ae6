"""How a diagnostic knows its own cost: clocks of its hooks, of ordinary steps and of the device."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

__all__ = ["Clock", "Read"]

_LONGEST_INTERVAL = 1000


class Clock:
    """Times the training steps around one diagnostic, without its own share.

    Attributes:
        elapsed: Seconds spent in training batches so far, this diagnostic's own among them.
        spent: The diagnostic's own seconds among these.
        measuring: Whether the batch that is under way is measured.
    """

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.spent = 0.0
        self.measuring = False
        self._steps: deque[float] = deque(maxlen=64)
        self._costs: deque[float] = deque(maxlen=5)
        self._began: float | None = None
        self._own = 0.0
        self._agreed: tuple[float, float] | None = None

    def start(self, own_seconds: float) -> None:
        """A batch begins; `own_seconds` is what the diagnostic has spent so far."""
        self._began, self._own = time.perf_counter(), own_seconds

    def stop(self, own_seconds: float) -> bool:
        """A batch ends; returns whether it was measured."""
        if self._began is None:
            return False
        whole, own = time.perf_counter() - self._began, own_seconds - self._own
        self.elapsed += whole
        self.spent += own
        self._began = None
        measured, self.measuring = self.measuring, False
        if measured:
            self._costs.append(own)
        else:
            self._steps.append(whole - own)
        return measured

    def cost(self) -> float:
        """Median seconds of a measurement; 0 before the first."""
        return statistics.median(self._costs) if self._costs else 0.0

    def step(self) -> float:
        """Median seconds of an ordinary training batch; 0 before the first."""
        return statistics.median(self._steps) if self._steps else 0.0

    def agree(self, cost: float, step: float) -> None:
        """Take the clocks of all ranks instead of this one's, so that all choose alike."""
        self._agreed = (cost, step)

    def interval(self, budget: float) -> int | None:
        """Shortest interval in steps that keeps to `budget`; None before anything is known."""
        cost, step = self._agreed or (self.cost(), self.step())
        if not cost or not step:
            return None
        return min(_LONGEST_INTERVAL, max(1, ceil(cost / step / budget)))


class Read:
    """One copy from the device to the host that is under way.

    Args:
        values: What is copied, on a CUDA device.
        then: Called with the values on the host, by `finish`.
        began: Event at which the device began to measure.
    """

    def __init__(
        self, values: Tensor, then: Callable[[Tensor], None], began: torch.cuda.Event
    ) -> None:
        self._then = then
        self._began = began
        self._host = torch.empty_like(values, device="cpu", pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._ended = end
        self._ended.record()

    def arrived(self) -> bool:
        """Whether the copy is complete; does not wait."""
        return bool(self._ended.query())  # type: ignore[no-untyped-call]

    def finish(self) -> float:
        """Wait for the copy, hand it over, and return what the device spent, in seconds."""
        self._ended.synchronize()
        self._then(self._host)
        return float(self._began.elapsed_time(self._ended)) / 1000
