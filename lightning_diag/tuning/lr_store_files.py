"""Files of the learning-rate cache: written whole without a temporary name, and locked."""

import errno
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_diag.records.files import write_bytes

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["locked", "sweep", "write_whole"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_TRIES = 10
_LONG = 3600.0


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that there is all of it or none, also where the process is killed half-way.

    On Linux the file has no name until it is complete, so nothing can be left behind: the system
    itself frees a nameless file whose process ends. Elsewhere, and on file systems that know no
    nameless files, `write_bytes` does it by a temporary name.

    Args:
        path: The file; missing folders are made, an older file is replaced.
        content: Its content.

    Raises:
        OSError: It could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        written = _write_nameless(path, content)
    except OSError as error:
        if error.errno in _FULL:
            raise
        written = False
    if not written:
        write_bytes(path, content)


def _write_nameless(path: Path, content: bytes) -> bool:
    if not hasattr(os, "O_TMPFILE"):
        return False
    descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
        for _ in range(_TRIES):
            # a name that is taken cannot be linked to: between these two calls there is no entry,
            # which a reader takes for a miss
            path.unlink(missing_ok=True)
            with suppress(FileExistsError):
                # only with a `src_dir_fd` does Python follow the link in /proc; which one is of no
                # matter, since both names are absolute
                source = f"/proc/self/fd/{descriptor}"
                os.link(source, path.absolute(), src_dir_fd=descriptor)
                return True
    return False


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Hold a lock file, or go on without it, with a warning, where it cannot be made.

    The system frees the lock of a process that ends, in whatever way. The file is removed at the
    end.

    Args:
        path: The lock file; missing folders are made.
        waiting: Called once if another process holds it.
    """
    from filelock import Timeout

    lock, held = _new(path), False
    for timeout in (0.0, -1.0):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=timeout)
            held = True
            break
        except Timeout:  # at the first try alone: the second waits without end
            pass
        except OSError as error:
            warnings.warn(
                f"`{path}` cannot be locked ({error.strerror or error}): jobs that run at the same "
                "time may search for the same learning rate each for itself.",
                stacklevel=5,
            )
            break
        if waiting is not None:
            waiting()
    try:
        yield
    finally:
        if held:
            # Removed while it is still held. Who opened the file before and gets the lock after
            # holds one without a name; filelock sees that and begins anew. A version that does not
            # look lets two holders in at once: both read the store again before they search, as
            # `LRStore.lock` asks, so they find the entry, and at worst two search after a search
            # that failed. Each writes a whole file, so that costs time and nothing else.
            _remove_held(path, lock)
            lock.release()


def sweep(folder: Path, older_than_seconds: float = 0.0) -> None:
    """Remove what killed processes left behind; what is in use is kept.

    That is their lock files and, where there are no nameless files, temporary ones of an hour ago.

    Args:
        folder: The folder of the entries; its lock files are in `locks`.
        older_than_seconds: Keep younger lock files.
    """
    for path in folder.glob(".*.json.*.tmp"):
        if _age_seconds(path) > _LONG:
            _remove(path)
    for path in folder.glob("locks/*.lock"):
        if _age_seconds(path) < older_than_seconds:
            continue
        lock = _new(path)
        with suppress(OSError):  # a lock in use raises Timeout, which is one
            lock.acquire(timeout=0)
            _remove_held(path, lock)
            lock.release()


def _age_seconds(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return -1.0


def _new(path: Path) -> "BaseFileLock":
    # here, since it takes 40 ms, and who finds an entry needs no lock
    from filelock import FileLock

    return FileLock(path)


def _remove_held(path: Path, lock: "BaseFileLock") -> None:
    from filelock import SoftFileLock

    # filelock takes this kind where the file system cannot lock: the file itself is the lock
    if not isinstance(lock, SoftFileLock):
        _remove(path)


def _remove(path: Path) -> None:
    # Windows removes no file that is open: there the lock file stays until the next sweep
    with suppress(OSError):
        path.unlink()
