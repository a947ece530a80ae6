"""Watching runs: on a page, as a picture, or on a terminal."""

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning_diag.monitor.app import HOST, make_app
from lightning_diag.monitor.watched_runs import WatchedRuns

__all__ = ["TrainingMonitor"]


class TrainingMonitor:
    """A run, or all runs of a sweep, watched while they train or afterwards.

    Args:
        run: The run folder, or one with run folders in it; it need not exist yet.

    Example:
        >>> TrainingMonitor("runs/mine").live(interval=5)  # doctest: +SKIP
        >>> TrainingMonitor("runs/mine").png("training.png")  # doctest: +SKIP
    """

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run)

    def live(
        self, interval: float = 5.0, port: int = 0, announce: Callable[[str], None] = print
    ) -> None:
        """Serve the page on this machine alone, until it is interrupted.

        Args:
            interval: Seconds between two looks at the files.
            port: Where to serve; 0 takes a free one.
            announce: Called once with the page's address.

        Raises:
            ValueError: `interval` is not positive, or `port` is none.
            OSError: The port is taken.
        """
        import uvicorn

        if not 0 <= port <= 65535:
            raise ValueError(f"`port` must lie in 0 to 65535, got {port}.")
        app = make_app(WatchedRuns(self.path, interval))
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind((HOST, port))
            # who asks as soon as the address is known waits rather than being refused
            place.listen()
            announce(f"http://{HOST}:{place.getsockname()[1]}/")
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_graceful_shutdown=1
            )
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[place])

    def terminal(self, interval: float = 5.0) -> None:
        """Show the runs on the terminal, until all of them have ended or it is interrupted.

        Args:
            interval: Seconds between two looks at the files.

        Raises:
            ValueError: `interval` is not positive.
        """
        from rich.console import Console

        from lightning_diag.monitor.terminal import show

        with suppress(KeyboardInterrupt):
            show(WatchedRuns(self.path, interval), Console())

    def png(self, path: str | Path) -> Path:
        """Draw the charts of the run below one another into one picture, whole or not at all.

        Args:
            path: The picture's file, which must end in ``.png``.

        Returns:
            The file.

        Raises:
            ValueError: The name does not end in ``.png``, or there is nothing to draw.
            OSError: The file could not be written.
        """
        from lightning_diag.monitor.picture import picture
        from lightning_diag.records.files import write_bytes

        target = Path(path)
        if target.suffix.lower() != ".png":
            raise ValueError(f"`path` must end in .png, got {target.name}.")
        write_bytes(target, picture(WatchedRuns(self.path)))
        return target
