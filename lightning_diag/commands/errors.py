"""Errors as a user of the command line reads them: one line, and a status for the shell."""

import os
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import typer

__all__ = ["UsageError", "plain_errors"]


_VERBS = {
    "iterdir": "list",
    "makedirs": "make",
    "mkdir": "make",
    "mkdtemp": "write",
    "mkstemp": "write",
    "open": "open",
    "read_bytes": "read",
    "read_text": "read",
    "rename": "rename",
    "replace": "rename",
    "rmtree": "remove",
    "unlink": "remove",
    "write_bytes": "write",
    "write_text": "write",
}
"""What the functions of Python that fail on a file do, to be said to people."""


class UsageError(Exception):
    """What was asked for cannot be done as it was written; ends the command with status 2."""


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Print what went wrong instead of a traceback, and end the command.

    Args:
        debug: Let the error through as it is.

    Raises:
        typer.Exit: Status 2 for a `UsageError`, 1 for any other error.
    """
    try:
        yield
    except UsageError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except (typer.Exit, typer.Abort):
        raise
    except SystemExit as error:
        # Lightning ends a training that was sent SIGTERM with this, and without a status
        if type(error).__name__ == "SIGTERMException":
            raise typer.Exit(128 + signal.SIGTERM) from error
        raise
    except BrokenPipeError as error:
        # who reads our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(128 + signal.SIGPIPE) from error
    except Exception as error:
        if debug:
            raise
        typer.echo(f"error: {_what(error)}", err=True)
        typer.echo(f"in {_place(error)}; `--debug` shows the way there.", err=True)
        raise typer.Exit(1) from error


def _what(error: Exception) -> str:
    """What went wrong; of a file, which one, and what was to be done with it."""
    if not isinstance(error, OSError) or error.filename is None:
        return f"{type(error).__name__}: {error}"
    frames, own = _frames(error), _own(error)
    called = [one.tb_frame.f_code.co_name for one in frames[own + 1 :]]
    verb = next((_VERBS[name] for name in called if name in _VERBS), "use")
    paths = [str(one) for one in (error.filename, error.filename2) if one is not None]
    reason = error.strerror or type(error).__name__
    return f"cannot {verb} {' as '.join(paths)}: {reason}."


def _place(error: Exception) -> str:
    frames = _frames(error)
    if not frames:
        return "an unknown place"
    # where Python opens files says nothing, but the line that wanted one does
    last = frames[_own(error) if isinstance(error, OSError) else -1]
    return f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}"


def _frames(error: Exception) -> list[TracebackType]:
    found, frame = [], error.__traceback__
    while frame is not None:
        found.append(frame)
        frame = frame.tb_next
    return found


def _own(error: Exception) -> int:
    """Number of the last frame outside of Python's own library."""
    files = [one.tb_frame.f_code.co_filename for one in _frames(error)]
    outside = [number for number, name in enumerate(files) if not _is_pythons(name)]
    return outside[-1] if outside else len(files) - 1


def _is_pythons(name: str) -> bool:
    library = sysconfig.get_path("stdlib")
    installed = "site-packages" in name or "dist-packages" in name
    return name.startswith("<frozen") or (name.startswith(f"{library}{os.sep}") and not installed)
