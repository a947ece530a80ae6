"""run.json: what a run is, what it ran on, and the attempts that were made at it."""

import contextlib
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_diag.records.files import write_json
from lightning_diag.records.json_safe import Json

__all__ = ["blank_attempt", "positions_fit", "read_info", "save_info", "sizes"]

_TAIL_BYTES = 1 << 16


def blank_attempt(session: str) -> dict[str, Any]:
    """An attempt as run.json lists it, before it is numbered.

    Args:
        session: Names the logger, also in the processes that it is sent to.

    Returns:
        ``first_step`` is the step that came first; with ``supersedes``, rows of earlier attempts
        from that step on are replaced, but for those before the bytes in ``resumed_at``.
        ``began_at`` are the bytes in each record file when the attempt began; ``process`` is who
        writes, so that a reader can see whether it still lives. Times are in Unix seconds.
    """
    return {
        "attempt": None,
        "started": time.time(),
        "first_step": None,
        "supersedes": False,
        "status": "running",
        "ended": None,
        "stop_reason": None,
        "resumed_at": None,
        "began_at": {},
        "session": session,
        "process": {"host": platform.node(), "pid": os.getpid()},
    }


def save_info(
    path: Path, package: str, fields: Mapping[str, Json], attempt: dict[str, Any] | None
) -> None:
    """Lay fields and an attempt over run.json; an attempt without a number receives the next one.

    Args:
        path: The run folder.
        package: The Lightning package in use.
        fields: JSON-safe values of run.json.
        attempt: What `blank_attempt` gave, filled further.

    Raises:
        OSError: run.json could not be written. The attempt has its number where that was known.
    """
    with _exclusive(path):
        info = read_info(path) or _blank_info()
        if attempt is not None:
            if attempt["attempt"] is None:
                _number(attempt, path, info)
                info.update(_environment(package))
            _enter(attempt, info)
        info.update(fields)
        write_json(path / "run.json", info)


def read_info(path: Path) -> dict[str, Any] | None:
    """run.json of a run folder, or None where it is missing or unreadable.

    Args:
        path: The run folder.

    Returns:
        Its fields; ``attempts`` is a list of mappings with a whole number ``attempt``.
    """
    try:
        info = json.loads((path / "run.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(info, dict):
        return None
    attempts = info.get("attempts")
    info["attempts"] = [
        attempt
        for attempt in (attempts if isinstance(attempts, list) else [])
        if isinstance(attempt, dict) and isinstance(attempt.get("attempt"), int)
    ]
    return info


def sizes(path: Path) -> dict[str, int]:
    """Bytes in each record file, by prefix.

    Args:
        path: The run folder.

    Returns:
        An entry for every file that is there.
    """
    return {file.stem: file.stat().st_size for file in _record_files(path)}


def positions_fit(path: Path, positions: Mapping[str, int]) -> bool:
    """Whether these positions can come from this folder: each lies in its file, between two lines.

    Args:
        path: The run folder.
        positions: Bytes by prefix.

    Returns:
        False for the positions of another run.
    """
    for prefix, position in positions.items():
        file = path / "records" / f"{prefix}.jsonl"
        if position == 0:
            continue
        if not file.exists() or file.stat().st_size < position:
            return False
        with file.open("rb") as stream:
            stream.seek(position - 1)
            # after a torn line the newline that closes it comes second
            if b"\n" not in stream.read(2):
                return False
    return True


def _number(attempt: dict[str, Any], path: Path, info: dict[str, Any]) -> None:
    known = [earlier["attempt"] for earlier in info["attempts"]]
    attempt["attempt"] = 1 + max([_highest_attempt(path), *known])
    attempt["began_at"] = sizes(path)
    for earlier in info["attempts"]:
        if earlier.get("status") == "running":
            earlier.update(status="interrupted", stop_reason="The process ended without a word.")


def _enter(attempt: dict[str, Any], info: dict[str, Any]) -> None:
    others = [one for one in info["attempts"] if one["attempt"] != attempt["attempt"]]
    info["attempts"] = sorted([*others, attempt], key=lambda one: int(one["attempt"]))
    last = info["attempts"][-1]
    info.update(status=last.get("status"), stop_reason=last.get("stop_reason"))


def _highest_attempt(path: Path) -> int:
    highest = 0
    for file in _record_files(path):
        with file.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            for line in stream.read(_TAIL_BYTES).splitlines():
                highest = max(highest, _attempt_of(line))
    return highest


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    # a lock on the folder itself leaves no file behind, and ends with the process
    path.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        for _ in range(100):  # a second, then on without it
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # a network file system without locks
                break
        yield
    finally:
        os.close(fd)


def _record_files(path: Path) -> list[Path]:
    return sorted((path / "records").glob("*.jsonl"))


def _attempt_of(line: bytes) -> int:
    try:
        row = json.loads(line)
    except ValueError:
        return 0
    attempt = row.get("attempt") if isinstance(row, dict) else None
    return attempt if isinstance(attempt, int) else 0


def _blank_info() -> dict[str, Any]:
    return {
        "id": f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}",
        "status": "created",
        "stop_reason": None,
        "seed": None,
        "devices": None,
        "data": None,
        "versions": {},
        "host": {},
        "attempts": [],
    }


def _environment(package: str) -> dict[str, Any]:
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    found = {"seed": int(seed)} if seed.isdecimal() else {}
    lightning = package if package == "pytorch_lightning" else "lightning"
    versions = {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "lightning_package": package,
        "lightning": _version(lightning),
        "numpy": _version("numpy"),
        "lightning_diag": _version("lightning_diag"),
    }
    host = {"name": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()}
    return {**found, "devices": _devices(), "versions": versions, "host": host}


def _devices() -> list[str]:
    torch = sys.modules.get("torch")
    # asking a GPU for its name would start CUDA in a process that may still fork
    if torch is None or not torch.cuda.is_initialized():
        return ["cpu"]
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
