"""Files that survive a killed process: replaced whole at once, or appended a line at a time."""

import errno
import json
import os
import uuid
from pathlib import Path

from lightning_diag.records.json_safe import json_safe

__all__ = ["LineWriter", "write_bytes", "write_json", "write_text"]

_BINARY = getattr(os, "O_BINARY", 0)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file so that a reader sees the old text or the new one, never a part.

    Args:
        path: The file; missing folders are made.
        text: Its new content, stored as UTF-8.

    Raises:
        OSError: It could not be written; the old file is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(f"{folder}/notes/a.txt", "one")
        ...     Path(folder, "notes", "a.txt").read_text()
        'one'
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole binary file so that a reader sees the old one or the new one, never a part.

    Args:
        path: The file; missing folders are made.
        content: Its new content.

    Raises:
        OSError: It could not be written; the old file is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, since a rename over file systems is no longer one operation
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: object) -> None:
    """Write a value as an indented JSON file, whole or not at all.

    Args:
        path: The file; missing folders are made.
        value: Whatever `json_safe` understands; non-finite numbers become null.

    Raises:
        TypeError: `json_safe` does not know a type.
        OSError: It could not be written; the old file is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(f"{folder}/a.json", {"at": Path("x")})
        ...     json.loads(Path(folder, "a.json").read_text())
        {'at': 'x'}
    """
    text = json.dumps(json_safe(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


class LineWriter:
    """An append-only file of lines: every line goes to the system at once, in one write.

    Several processes may append to the same file. A line that an earlier process, or a full disk,
    left without its end is closed by a newline before the next one is written. The file is opened
    at the first line, after a failure, and in every process that received the writer.

    Args:
        path: The file; missing folders are made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd: int | None = None
        self._pid = 0
        self._lead = b""

    def write(self, line: str) -> None:
        """Append one line.

        Args:
            line: The line without its newline.

        Raises:
            OSError: Not all of it could be written. The next line may be tried all the same.
        """
        data = line.encode() + b"\n"
        for _ in range(2):
            missing = self._write_once(data)
            if not missing:
                return
            # opening looks at the end of the file, and so finds what this write has left there
            self.close()
            if missing == 1:
                return
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        fd, self._fd = self._fd, None
        if fd is not None and self._pid == os.getpid():
            os.close(fd)

    def _write_once(self, data: bytes) -> int:
        try:
            fd = self._open()
            lead, self._lead = self._lead, b""
            return len(lead) + len(data) - os.write(fd, lead + data)
        except OSError:
            self.close()
            raise

    def _open(self) -> int:
        if self._fd is not None and self._pid == os.getpid():
            return self._fd
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _BINARY
        try:
            fd = os.open(self.path, flags, 0o666)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, flags, 0o666)
        self._fd, self._pid = fd, os.getpid()
        self._lead = b"\n" if _is_torn(self.path, os.fstat(fd).st_size) else b""
        return fd

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()


def _is_torn(path: Path, size: int) -> bool:
    if size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
