"""`lightning-diag monitor`: a run, or all runs of a sweep, while they train."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lightning_diag.commands.errors import UsageError, plain_errors
from lightning_diag.commands.installing import in_words

__all__ = ["monitor"]

_NEEDS = {"starlette": "page", "uvicorn": "page", "PIL": "picture"}
_PACKAGES = {"PIL": "pillow"}


def monitor(
    path: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or a folder with runs in it.")
    ],
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 5.0,
    port: Annotated[int, typer.Option(help="Where to serve; 0: a port that is free.")] = 0,
    static: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw one picture instead.")
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Show it here instead of on a page.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the code an error arose.")
    ] = False,
) -> None:
    """Show losses, gradients, findings and more of a run on a page that keeps up with it.

    The page is served on 127.0.0.1 alone: on another machine, forward the port
    (`ssh -L 8000:127.0.0.1:8000 HOST` with `--port 8000`), or use `--terminal`. The run may not
    have begun yet. Ctrl-C ends it; the run goes on.
    """
    with plain_errors(debug):
        if static is not None and terminal:
            raise UsageError("Only one of `--static` and `--terminal` can be wanted, got both.")
        if path.exists() and not path.is_dir():
            raise UsageError(f"`RUN` must be a folder, got the file {path}.")
        if not interval > 0:
            raise UsageError(f"`--interval` must be positive, got {interval:g}.")
        if not 0 <= port <= 65535:
            raise UsageError(f"`--port` must lie in 0 to 65535, got {port}.")
        _check_installed("picture" if static else "terminal" if terminal else "page")
        _show(path, interval, port, static, terminal=terminal)


def _show(path: Path, interval: float, port: int, static: Path | None, *, terminal: bool) -> None:
    from lightning_diag.monitor import TrainingMonitor

    watched = TrainingMonitor(path)
    if static is not None:
        try:
            typer.echo(f"picture: {watched.png(static)}")
        except ValueError as error:
            raise UsageError(str(error)) from error
    elif terminal:
        watched.terminal(interval)
    else:
        try:
            watched.live(interval, port, announce=lambda url: typer.echo(f"live page: {url}"))
        except OSError as error:
            raise UsageError(f"Port {port} cannot be used: {error.strerror}.") from error


def _check_installed(kind: str) -> None:
    missing = [name for name, use in _NEEDS.items() if use == kind and find_spec(name) is None]
    if missing:
        packages = [_PACKAGES.get(name, name) for name in missing]
        how = in_words("'.[monitor]'", packages)
        raise UsageError(f"The {kind} needs what is not installed: {how}.")
