"""The process that trains with one batch size and tells what it measures, a line at a time."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diag.records.files import LineWriter
from lightning_diag.tuning.batch_size_reference import load

if TYPE_CHECKING:
    from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["EVENTS", "UNGUARDED", "checked", "inside", "main"]

EVENTS = "LIGHTNING_DIAG_BATCH_SIZE_EVENTS"
"""Environment variable with the file of lines; set in these processes alone."""

UNGUARDED = (
    'A script must call `profile_batch_sizes` under `if __name__ == "__main__":`, since every '
    "batch size is measured in a new process that imports the script; it was called by that import."
)

Write = Callable[[Mapping[str, Any]], None]


def inside() -> bool:
    """Whether this process is one of those that measure; tells the parent of a missing guard."""
    if EVENTS not in os.environ:
        return False
    _writer(os.environ[EVENTS])({"status": "unguarded"})
    return True


def main(request_path: str) -> None:
    """Measure what a request asks for; ends the process with status 1 on any error.

    Args:
        request_path: A JSON file, as `batch_size_job` writes it.
    """
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    request = json.loads(Path(request_path).read_text())
    sys.argv = request["argv"]
    write = _writer(os.environ[EVENTS])
    try:
        _measure(request, write)
    except BaseException as error:
        _tell(error, write)
        raise


def _writer(path: str) -> Write:
    lines = LineWriter(path)
    return lambda event: lines.write(json.dumps(event))


def _end_with_the_parent() -> None:
    # the pipe ends when the parent does, however it ends
    while os.read(0, 1):
        pass
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _measure(request: Mapping[str, Any], write: Write) -> None:
    make = load(request["make"])
    # after the user's own imports, which decide which of the two Lightnings is meant
    from lightning_diag.lightning import PACKAGE
    from lightning_diag.tuning.batch_size_meter import BatchSizeMeter

    seed_everything = sys.modules[PACKAGE].seed_everything
    seed_everything(request["seed"], workers=True, verbose=False)
    arguments, module, data = checked(make(request["batch_size"], **request["arguments"]))
    meter = BatchSizeMeter(write)
    trainer = _trainer(arguments, [meter], request["epochs"], request["folder"])
    _prepare(trainer, request["memory_limit_gib"], write)
    _fit(trainer, module, data)
    write({"status": "ok"})


def checked(made: object) -> tuple[dict[str, Any], "LightningModule", Any]:
    """What `make` returned, if it is what it should return.

    Raises:
        TypeError: It is something else.
    """
    from lightning_diag.lightning import LightningModule

    parts = made if isinstance(made, tuple) else (made,)
    rule = "`make` must return (trainer_arguments, module, data)"
    if len(parts) != 3 or not isinstance(parts[0], Mapping):
        raise TypeError(f"{rule}, got {tuple(type(part).__name__ for part in parts)}.")
    if not isinstance(parts[1], LightningModule):
        raise TypeError(f"{rule} with a LightningModule, got a {type(parts[1]).__name__}.")
    return dict(parts[0]), parts[1], parts[2]


def _trainer(
    arguments: dict[str, Any], callbacks: list[Any], epochs: int, folder: str
) -> "Trainer":
    """A Trainer with what was asked for but one device, these epochs, and nothing that writes."""
    from lightning_diag.lightning import Trainer

    devices = arguments.get("devices")
    only: dict[str, Any] = {
        "devices": devices[:1] if isinstance(devices, list | tuple) else 1,
        "num_nodes": 1,
        "strategy": "auto",
        "callbacks": callbacks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": epochs,
        "min_epochs": None,
        "max_steps": -1,
        "min_steps": None,
        "max_time": None,
        "fast_dev_run": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": 1,
        "val_check_interval": 1.0,
        "profiler": None,
        "default_root_dir": folder,
    }
    return Trainer(**{**arguments, **only})


def _prepare(trainer: "Trainer", limit_gib: float | None, write: Write) -> None:
    import torch

    from lightning_diag.tuning import batch_size_memory as memory

    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    write({"device": name, "device_memory_gb": memory.device_memory(device, limit_gib)})
    if limit_gib is not None:
        memory.limit_memory(device, limit_gib)


def _fit(trainer: "Trainer", module: "LightningModule", data: Any) -> None:  # noqa: ANN401
    from lightning_diag.lightning import LightningDataModule

    if isinstance(data, LightningDataModule):
        trainer.fit(module, datamodule=data)
    elif isinstance(data, tuple):
        trainer.fit(module, *data)
    else:
        trainer.fit(module, data)


def _tell(error: BaseException, write: Write) -> None:
    from lightning_diag.tuning.batch_size_memory import is_memory_error, unlimit_memory

    unlimit_memory()
    status = "out of memory" if is_memory_error(error) else "error"
    first = next(iter(str(error).strip().splitlines()), "")
    write({"status": status, "message": f"{type(error).__name__}: {first}".rstrip(": ")})
