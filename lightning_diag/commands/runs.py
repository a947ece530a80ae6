"""The folder of a run, as a user names it on the command line."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_diag.commands.errors import UsageError
from lightning_diag.spelling import nearest

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["opened"]


def opened(path: Path) -> "Run":
    """The run in a folder.

    Raises:
        UsageError: There is no such folder, or it holds no run, with a hint at one that may be
            meant; or its configuration cannot be read.
    """
    if not path.is_dir():
        near = nearest(path.name, (one.name for one in path.parent.glob("*/")))
        hint = f"; did you mean `{path.parent / near}`?" if near else "."
        raise UsageError(f"There is no folder `{path}`{hint}")
    if not (path / "run.json").exists() and not (path / "records").is_dir():
        inside = sorted(path.glob("**/run.json"), key=lambda one: one.stat().st_mtime)
        hint = f" The newest run in it is `{inside[-1].parent}`." if inside else ""
        raise UsageError(f"A run holds run.json or records/, `{path}` holds neither.{hint}")
    from lightning_diag.records.read_run import Run

    run = Run(path)
    try:
        _ = run.config
    except ValueError as error:
        raise UsageError(str(error)) from error
    return run
