"""Sampled maps of attention: as compressed arrays in the run, and as images to the loggers."""

import io
from collections.abc import Mapping
from typing import Any

from lightning_diag.lightning import Trainer
from lightning_diag.records import RunLogger
from lightning_diag.records.files import write_bytes

__all__ = ["AttentionImages", "save_maps"]

_FOLDER = "attention"


def save_maps(run: RunLogger, maps: Mapping[str, Any], step: int) -> None:
    """Write maps into ``<run>/attention/step_XXXXXX.npz``, whole or not at all.

    Args:
        run: The run.
        maps: Component to an array ``(heads, rows, keys)``.
        step: The step that was measured.

    Raises:
        OSError: The file could not be written.
    """
    import numpy as np

    buffer = io.BytesIO()
    # the one name that NumPy keeps for itself
    arrays = {"file_" if name == "file" else name: array for name, array in maps.items()}
    np.savez_compressed(buffer, **arrays)
    write_bytes(run.path / _FOLDER / f"step_{step:06d}.npz", buffer.getvalue())


class AttentionImages:
    """Gives maps to those loggers of a Trainer that take images, until one of them fails."""

    def __init__(self) -> None:
        self._broken: set[int] = set()

    def log(self, trainer: Trainer, maps: Mapping[str, Any], step: int) -> list[str]:
        """Log one image for each component.

        Args:
            trainer: The trainer that is running.
            maps: Component to an array ``(heads, rows, keys)``.
            step: The step that was measured.

        Returns:
            A sentence for each logger that failed just now.
        """
        failures = []
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, RunLogger) or id(logger) in self._broken:
                continue
            try:
                for name, array in maps.items():
                    _log_image(logger, f"{_FOLDER}/{name}/map", _image(array), step)
            except Exception as error:
                self._broken.add(id(logger))
                failures.append(
                    f"no more maps are given to {type(logger).__name__}: "
                    f"{type(error).__name__}: {error}"
                )
        return failures


def _log_image(logger: Any, tag: str, image: Any, step: int) -> None:
    if callable(getattr(logger, "log_image", None)):
        logger.log_image(key=tag, images=[image], step=step)
        return
    add_image = getattr(logger.experiment, "add_image", None)
    if callable(add_image):
        add_image(tag, image, step, dataformats="HW")


def _image(array: Any) -> Any:
    """Heads side by side, each as bright as its largest weight allows."""
    import numpy as np

    heads, rows, _ = array.shape
    largest = array.max(axis=(1, 2), keepdims=True, initial=0)
    shades = np.round(255 * array / np.where(largest > 0, largest, 1)).astype(np.uint8)
    gap = np.full((rows, 1), 255, np.uint8)
    pieces = [piece for head in range(heads) for piece in (gap, shades[head])]
    return np.concatenate(pieces[1:], axis=1)
