"""One batch size: starts its process, waits, and puts together what it told."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lightning_diag.tuning.batch_size_child import EVENTS, UNGUARDED
from lightning_diag.tuning.batch_size_profile import BatchSizeProfile, Status

__all__ = ["INTERRUPTED", "UnguardedError", "measure"]

INTERRUPTED = "Somebody pressed Ctrl-C."
"""Why a size is `interrupted`."""

# a path for imports first: what the child needs may lie on that of the parent alone
_START = (
    "import json, sys; sys.path[:] = json.load(open(sys.argv[1]))['path']; "
    "from lightning_diag.tuning.batch_size_child import main; main(sys.argv[1])"
)
_MEMORY = ("memoryerror", "out of memory", "can't allocate memory", "bad_alloc")
_MEASURED = ("device", "device_memory_gb", "memory_kind", "peak_memory_gb", "allocated_gb")


class UnguardedError(RuntimeError):
    """The script called the profile while its own child imported it."""


def measure(request: Mapping[str, Any], timeout_s: float | None) -> BatchSizeProfile:
    """Train with one batch size in a process of its own.

    Args:
        request: What to train: `make`, `arguments`, `batch_size`, `epochs` with the warm-up,
            `memory_limit_gib`, `seed`.
        timeout_s: Seconds after which the process is ended; None for no end.

    Returns:
        What was measured, also where the process failed, was killed or interrupted.

    Raises:
        UnguardedError: The script lacks its guard.
    """
    with tempfile.TemporaryDirectory(prefix="batch-size-") as folder:
        events, said = Path(folder, "events.jsonl"), Path(folder, "output.txt")
        place = Path(folder, "request.json")
        common = {"folder": folder, "path": sys.path, "argv": sys.argv}
        place.write_text(json.dumps({**request, **common}))
        with said.open("wb") as output:
            ended = _run(place, {EVENTS: str(events)}, output, timeout_s)
        told = _lines(events)
        output_tail = said.read_bytes()[-4000:].decode(errors="replace")
    last: dict[str, Any] = next((one for one in reversed(told) if "status" in one), {})
    if any(one.get("status") == "unguarded" for one in told):
        raise UnguardedError(UNGUARDED)
    status, message = _verdict(ended, last, output_tail, timeout_s)
    return _profile(request["batch_size"], told, status, message, ended == -signal.SIGKILL)


def _run(
    place: Path,
    variables: Mapping[str, str],
    output: IO[bytes],
    timeout_s: float | None,
) -> int | str:
    """How the process ended: its exit status, or `timeout` or `interrupted`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _START, str(place)],
        stdin=subprocess.PIPE,  # never written to: its end tells the child that we are gone
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **variables},
        start_new_session=True,
    )
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return "timeout"
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process with all that it started."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line]


def _verdict(
    ended: int | str, last: Mapping[str, Any], output: str, timeout_s: float | None
) -> tuple[Status, str | None]:
    if ended == "timeout":
        return "timeout", f"It took longer than {timeout_s:g} seconds."
    if ended == "interrupted":
        return "interrupted", INTERRUPTED
    if last:
        return last["status"], last.get("message")
    tail = next(iter(output.strip().splitlines()[::-1]), "without a word")
    if any(word in output.lower() for word in _MEMORY):
        return "out of memory", tail
    if isinstance(ended, int) and ended < 0:
        name = signal.Signals(-ended).name
        why = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return "killed", f"The process was ended by {name}{why}."
    return "error", f"The process ended with status {ended}: {tail}"


def _profile(
    batch_size: int,
    told: list[dict[str, Any]],
    status: Status,
    message: str | None,
    killed: bool,
) -> BatchSizeProfile:
    latest: dict[str, Any] = {}
    for one in told:
        latest.update(one)
    timed = [one for one in told if one.get("epoch", 0) > 0]
    seconds = [one["seconds"] for one in timed]
    samples = [one["samples"] for one in timed]
    middle = statistics.median(seconds) if seconds else None
    counted = middle and all(one is not None for one in samples)
    if status == "ok" and not timed:
        status, message = (
            "error",
            "No epoch was timed: training ended in its warm-up epoch or before.",
        )
    if status == "ok":
        message = _odd(batch_size, latest.get("largest_batch"))
    return BatchSizeProfile(
        batch_size=batch_size,
        status=status,
        epochs_completed=len(timed),
        avg_time_per_epoch=middle,
        samples_per_second=statistics.fmean(samples) / middle if counted and middle else None,
        final_train_loss=latest.get("train_loss"),
        final_test_loss=latest.get("test_loss"),
        oom_error=status == "out of memory" or (status == "killed" and killed),
        error_message=message,
        epoch_seconds=tuple(seconds),
        epoch_samples=tuple(samples),
        largest_batch=latest.get("largest_batch"),
        **{name: latest.get(name) for name in _MEASURED},
    )


def _odd(batch_size: int, largest: int | None) -> str | None:
    if largest is None:
        return "No tensor in a batch told how many samples it holds."
    if largest < batch_size:
        return f"The largest batch held {largest} samples: this size was not reached."
    return None
