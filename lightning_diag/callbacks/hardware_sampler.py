"""A thread that looks at the machine now and then, so that no training step has to."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["HostProbe", "MemoryProbe", "Sampler"]

_MIB = 2**20
_FIRST_SECONDS = 0.1

Numbers = Mapping[str, float]


class HostProbe:
    """Use of processor and memory, by `psutil`. To be asked again and again from one thread."""

    def __init__(self) -> None:
        # imported here and not in the thread: a fork must not find an import half done
        import psutil

        self._psutil: Any = psutil
        self._process = psutil.Process()

    def sample(self) -> dict[str, float]:
        """The use since the last call; what the system does not tell is missing."""
        found: dict[str, float] = {}
        for key, ask in (
            ("cpu_percent", self._psutil.cpu_percent),
            ("process_cpu_percent", self._process.cpu_percent),
            ("memory_percent", lambda: self._psutil.virtual_memory().percent),
            ("process_memory", lambda: self._process.memory_info().rss / _MIB),
        ):
            try:
                found[key] = float(ask())
            except (self._psutil.Error, OSError, NotImplementedError):
                continue
        return found


class MemoryProbe:
    """Memory of this process, by `psutil`: quick enough to be asked between two steps."""

    def __init__(self) -> None:
        import psutil

        self._psutil: Any = psutil
        self._process = psutil.Process()

    def now(self) -> dict[str, float]:
        """The memory in MiB; empty where the system does not tell."""
        try:
            return {"process_memory": self._process.memory_info().rss / _MIB}
        except (self._psutil.Error, OSError, NotImplementedError):
            return {}


class Sampler:
    """Asks probes every so many seconds from a thread of its own, and keeps the last answer.

    The thread holds no lock while it asks, so that a process may fork (as data loaders do) at any
    time, and it dies with the process.

    Args:
        probes: Each gives numbers by name; one that fails is left out from then on.
        seconds: Time between two samples; the first is taken after a tenth of a second or less.
    """

    def __init__(self, probes: Sequence[Callable[[], Numbers]], seconds: float) -> None:
        self.failures: list[str] = []
        self._probes = list(probes)
        self._seconds = seconds
        self._latest: Numbers = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="lightning_diag-hardware", daemon=True
        )

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for it to have ended."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def latest(self) -> dict[str, float]:
        """The last sample; empty before the first."""
        return dict(self._latest)

    def _run(self) -> None:
        # the use of a processor is a difference: the first answer counts from nothing
        self._ask()
        wait = min(_FIRST_SECONDS, self._seconds)
        while not self._stopped.wait(wait):
            self._latest = self._ask()
            wait = self._seconds

    def _ask(self) -> Numbers:
        found: dict[str, float] = {}
        for probe in list(self._probes):
            try:
                found.update(probe())
            except Exception as error:
                self._probes.remove(probe)
                self.failures.append(f"{type(error).__name__}: {error}")
        return found
