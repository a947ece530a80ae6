"""Marks in time: on the device where it has a clock of its own to ask, else on the host."""

from time import perf_counter

import torch

__all__ = ["Mark", "Timeline"]

Mark = float | torch.cuda.Event


class Timeline:
    """Sets marks without waiting for anything, and says later how far apart they are.

    Args:
        device: Where the model computes. On a CUDA device marks are events in its current stream;
            on any other the host's clock is read, which on an asynchronous device (Apple's) tells
            how long a launch takes, not the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._origin = self.mark()

    def mark(self) -> Mark:
        """A mark at this moment."""
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, mark: Mark) -> float:
        """Seconds from the beginning of the timeline to a mark, for which it waits if need be."""
        origin = self._origin
        if isinstance(mark, float) or isinstance(origin, float):
            return float(mark) - float(origin)  # type: ignore[arg-type]
        mark.synchronize()
        return float(origin.elapsed_time(mark)) / 1000
