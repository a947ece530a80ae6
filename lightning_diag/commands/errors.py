"""Errors as a user of the command line reads them: one line, and a status for the shell."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

__all__ = ["UsageError", "plain_errors"]


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
        place = _place(error)
        typer.echo(f"error: {type(error).__name__}: {error}", err=True)
        typer.echo(f"in {place}; `--debug` shows the way there.", err=True)
        raise typer.Exit(1) from error


def _place(error: Exception) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return "an unknown place"
    return f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
