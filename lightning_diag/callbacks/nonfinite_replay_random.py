"""The random numbers of a step, to be drawn again."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Generators", "put_back"]


@dataclass(frozen=True)
class Generators:
    """The states of the global generators at one moment.

    On a CUDA device a state is its seed and its place in the sequence, which the host knows: to
    ask for it waits for nothing.

    Attributes:
        host: PyTorch's own generator on the host.
        devices: Those of CUDA devices, by their place.
        metal: That of an Apple device.
        python: The one of ``random``; None where it was not asked for.
        numpy: The one of ``numpy.random``; None where it was not asked for.
    """

    host: torch.Tensor
    devices: dict[int, torch.Tensor]
    metal: torch.Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls, device: torch.device | None = None, *, others: bool = True) -> "Generators":
        """The states as they are.

        Args:
            device: The device that computes; None for all.
            others: Whether those of Python and NumPy are wanted, which take 40 times as long.
        """
        kind = "any" if device is None else device.type
        devices, metal = {}, None
        if kind in ("any", "cuda") and torch.cuda.is_available():
            places = range(torch.cuda.device_count()) if device is None else [device.index or 0]
            devices = {place: torch.cuda.get_rng_state(place) for place in places}
        if kind in ("any", "mps") and torch.backends.mps.is_available():
            metal = torch.mps.get_rng_state()
        if not others:
            return cls(torch.get_rng_state(), devices, metal, None, None)
        numpy = sys.modules.get("numpy")
        drawn = None if numpy is None else numpy.random.get_state()
        return cls(torch.get_rng_state(), devices, metal, random.getstate(), drawn)

    def set(self) -> None:
        """Go on from here."""
        torch.set_rng_state(self.host)
        for place, state in self.devices.items():
            torch.cuda.set_rng_state(state, place)
        if self.metal is not None:
            torch.mps.set_rng_state(self.metal)
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def others_moved(self) -> bool:
        """Whether Python's or NumPy's numbers have been drawn since."""
        numpy = sys.modules.get("numpy")
        if self.python is not None and random.getstate() != self.python:
            return True
        if self.numpy is None or numpy is None:
            return False
        _, keys, *rest = numpy.random.get_state()
        return rest != list(self.numpy[2:]) or bool((keys != self.numpy[1]).any())


@contextmanager
def put_back() -> Iterator[None]:
    """Leave every generator as it is now, whatever happens in between."""
    before = Generators.now()
    try:
        yield
    finally:
        before.set()
