"""What one job of a sweep needs for itself: a folder, processes, and a word when it fails."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lightning_diag.commands.errors import UsageError

if TYPE_CHECKING:
    from lightning_diag.lightning import Trainer

__all__ = ["claim", "command", "own_process_group", "telling"]

_GROUP_VARIABLES = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_PATIENCE_S = 60
_CLAIM = ".sweep_job"


def claim(folder: Path, number: int, overrides: Sequence[str]) -> None:
    """Take a folder for one job of a sweep; the same job may come back to it, as after a requeue.

    Args:
        folder: The folder of the run.
        number: The job's number in its sweep.
        overrides: What the job trains.

    Raises:
        UsageError: Another job has taken the folder.
    """
    mine = " ".join([f"#{number}", *sorted(overrides)])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / _CLAIM).open("x") as file:
            file.write(mine)
    except FileExistsError:
        theirs = (folder / _CLAIM).read_text()
        if theirs != mine:
            raise UsageError(
                f"Each job of a sweep needs a folder of its own, `{folder}` was taken by the job "
                f"`{theirs}`: choose another `hydra.sweep.dir` or `hydra.sweep.subdir`."
            ) from None


@contextmanager
def telling(folder: str) -> Iterator[None]:
    """Say which job of a sweep failed, and of what, while the others go on."""
    try:
        yield
    except Exception as error:
        typer.echo(f"failed: {folder}: {type(error).__name__}: {error}", err=True)
        raise


@contextmanager
def command(arguments: Sequence[str], module: str | None) -> Iterator[None]:
    """Have Lightning start its other processes with these arguments.

    Args:
        arguments: What follows the name of the command.
        module: The module to start, where this process was started by a launcher, whose own
            command would train nothing; None keeps what started this process.
    """
    main = sys.modules["__main__"]
    before = sys.argv, main.__spec__
    sys.argv = [sys.argv[0], *arguments]
    if module is not None:
        main.__spec__ = find_spec(module)
    try:
        yield
    finally:
        sys.argv, main.__spec__ = before


@contextmanager
def own_process_group(trainer: "Trainer") -> Iterator[None]:
    """Leave no process and no process group behind, which the next job would take for its own."""
    from torch import distributed

    before = set(os.environ)
    ended = False
    try:
        yield
        ended = True
    finally:
        _end_children(trainer, _PATIENCE_S if ended else 0)
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        for name in _GROUP_VARIABLES - before:
            os.environ.pop(name, None)


def _end_children(trainer: "Trainer", patience_s: float) -> None:
    started = getattr(trainer.strategy.launcher, "procs", [])
    children = [child for child in started if isinstance(child, subprocess.Popen)]
    # Lightning watches this list for seconds more, and kills the whole sweep for a failed child
    started.clear()
    for child in children:
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
