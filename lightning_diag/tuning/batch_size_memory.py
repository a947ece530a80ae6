"""Memory of a process that trains: its peak, what it may have, and a limit on it."""

import gc
import sys
from pathlib import Path

import torch

__all__ = [
    "GB",
    "device_memory",
    "is_memory_error",
    "limit_memory",
    "peak_memory",
    "unlimit_memory",
]

GB = 1e9

_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "_alloc_failed",
)
_CONTAINER = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def peak_memory(device: torch.device) -> dict[str, float | str]:
    """Largest memory of this process until now, by the fields of a profile.

    On CUDA what PyTorch reserved, and the part of it that tensors filled; else what the process
    held in main memory.
    """
    if device.type == "cuda":
        return {
            "memory_kind": "gpu reserved",
            "peak_memory_gb": torch.cuda.max_memory_reserved(device) / GB,
            "allocated_gb": torch.cuda.max_memory_allocated(device) / GB,
        }
    return {"memory_kind": "resident", "peak_memory_gb": _peak_resident() / GB}


def _peak_resident() -> int:
    # ru_maxrss of Linux starts with the peak of the parent, VmHWM with this program
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory(device: torch.device, limit_gib: float | None = None) -> float:
    """Memory that this process may have, what it holds included, in units of 1e9 bytes.

    Args:
        device: What it trains on.
        limit_gib: The limit that `limit_memory` was given.
    """
    if device.type == "cuda":
        most = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        import psutil

        most = psutil.virtual_memory().available + psutil.Process().memory_info().rss
        most = min([most, *_container_limits()])
    return min(most, int(limit_gib * 2**30) if limit_gib else most) / GB


def _container_limits() -> list[int]:
    found = (Path(name) for name in _CONTAINER)
    texts = [path.read_text().strip() for path in found if path.exists()]
    return [int(text) for text in texts if text.isdigit()]


def limit_memory(device: torch.device, gib: float) -> None:
    """Let allocations of this process fail beyond a limit, as on a smaller device.

    On CUDA the limit is on what PyTorch reserves, on the CPU of Linux on what the process holds:
    its address space may grow by the limit less what it holds now.

    Args:
        device: What it trains on.
        gib: The limit, in GiB.

    Raises:
        MemoryError: The process already holds more.
        ValueError: There is no such limit on this platform.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
        return
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        raise ValueError(
            "`memory_limit_gib` works on CUDA and on the CPU of Linux, "
            f"got {gib} for {device.type} on {sys.platform}."
        )
    import resource

    gc.collect()
    pages = [int(number) for number in Path("/proc/self/statm").read_text().split()[:2]]
    mapped, resident = (number * resource.getpagesize() for number in pages)
    if resident >= gib * 2**30:
        raise MemoryError(
            f"`memory_limit_gib` must be above what the process holds before training, "
            f"{resident / 2**30:.2f} GiB, got {gib}."
        )
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = mapped + int(gib * 2**30) - resident
    soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def unlimit_memory() -> None:
    """Take back a limit on the address space, so that a failure can be told."""
    if sys.platform.startswith("linux"):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, says that memory ran out.

    Example:
        >>> is_memory_error(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
        True
        >>> is_memory_error(ValueError("`width` must be at least 1, got 0."))
        False
    """
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        words = str(one).lower()
        if isinstance(one, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(one, RuntimeError | OSError) and any(word in words for word in _WORDS):
            return True
        seen.append(one)
        one = one.__cause__ or one.__context__
    return False
