"""Clean vectors of your own, from a .npy or CSV file."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["read_table"]


def read_table(path: str, features: int) -> Tensor:
    """The clean vectors of a file, one a row.

    Args:
        path: a ``.npy`` file of shape ``(rows, features)``, or a CSV file of as many columns, with
            or without one line of names.
        features: number of columns there must be.

    Returns:
        ``(rows, features)`` in single precision.

    Raises:
        ValueError: the file breaks a rule.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".npy", ".csv"):
        raise ValueError(f"`path` must end in .npy or .csv, got {path}.")
    if not Path(path).is_file():
        raise ValueError(f"`path` must be a file, got {path}.")
    table = _npy(path) if kind == ".npy" else _csv(path)
    if table.ndim != 2 or len(table) < 2:
        raise ValueError(f"{path} must hold at least 2 rows of numbers, got shape {table.shape}.")
    if table.shape[1] != features:
        raise ValueError(
            f"`features` must be the number of columns of {path}, {table.shape[1]}, got {features}."
        )
    if not np.isfinite(table).all():
        row = int(np.argmin(np.isfinite(table).all(axis=1))) + 1
        raise ValueError(f"{path} must hold finite numbers alone, got another in row {row}.")
    if not table.any():
        raise ValueError(f"{path} must hold a number other than 0, got none.")
    return torch.from_numpy(table.astype(np.float32))


def _npy(path: str) -> NDArray[np.generic]:
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} must be an array as `numpy.save` writes it: {error}.") from error
    if table.dtype.kind not in "biuf":
        raise ValueError(f"{path} must hold real numbers, got {table.dtype}.")
    return np.asarray(table)


def _csv(path: str) -> NDArray[np.float64]:
    with Path(path).open(encoding="utf-8-sig") as file:
        names = int(not _numbers(file.readline()))
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2, skiprows=names, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} must hold numbers with commas between them: {error}.") from error


def _numbers(line: str) -> bool:
    try:
        return bool([float(word) for word in line.split(",")])
    except ValueError:
        return False
