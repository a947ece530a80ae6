"""Views of your own: a folder with one table a modality."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipes.modalities.views import Array

__all__ = ["read_folder"]

_LABEL = "label"


def read_folder(folder: str | Path) -> tuple[dict[str, Array], NDArray[np.int64] | None]:
    """Read one view from each CSV or .npy file; row i is the same thing in all of them.

    A CSV file begins with the names of its columns, and holds numbers. A column ``label`` in one or
    more of them, or a file ``label.npy`` of one dimension, is no part of a view: integers, which
    only keep the splits alike and are never trained on. A .npy file holds ``(rows, features)``.

    Args:
        folder: where the files are; the views come in the order of their file names.

    Returns:
        The views by file name without its ending, and the labels, or None.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file breaks a rule; the message names it, and the rule.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` must be a folder of CSV or .npy files, got {folder}.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".npy"))
    views: dict[str, Array] = {}
    labels: dict[str, Array] = {}
    for path in files:
        if path.stem in views:
            raise ValueError(f"{folder}: a view must have one file, `{path.stem}` has two.")
        table, label = _read_csv(path) if path.suffix.lower() == ".csv" else _read_array(path)
        if table is not None:
            views[path.stem] = table
        if label is not None:
            labels[path.name] = label
    _check(folder, views, labels)
    return views, next((_whole(name, label) for name, label in labels.items()), None)


def _read_csv(path: Path) -> tuple[Array | None, Array | None]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        names, *lines = list(csv.reader(file)) or [[]]
    if all(_is_number(name) for name in names):
        raise ValueError(f"{path}: the first line must name the columns, got {names[:3]}.")
    rows = []
    for number, line in enumerate(lines, start=2):
        if not line:
            continue
        if len(line) != len(names):
            raise ValueError(
                f"{path}, line {number}: the line must have {len(names)} fields, got {len(line)}."
            )
        try:
            rows.append([float(field) for field in line])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: fields must be numbers, {error}.") from error
    table = np.array(rows, dtype=float).reshape(len(rows), len(names))
    is_label = np.array([name.strip().lower() == _LABEL for name in names], dtype=bool)
    if is_label.sum() > 1:
        raise ValueError(f"{path}: there must be one column `label`, it has {is_label.sum()}.")
    features = table[:, ~is_label]
    label = table[:, is_label][:, 0] if is_label.any() else None
    # a file of labels alone is no view
    return (features if features.shape[1] or label is None else None), label


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _read_array(path: Path) -> tuple[Array | None, Array | None]:
    try:
        table = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: the file must be a plain numeric array, {error}") from error
    if not isinstance(table, np.ndarray) or table.dtype.kind not in "biuf":
        raise ValueError(f"{path}: the array must be numeric, got {getattr(table, 'dtype', None)}.")
    if path.stem.lower() == _LABEL:
        if table.ndim != 1:
            raise ValueError(f"{path}: labels must have one dimension, got {table.ndim}.")
        return None, table.astype(float)
    if table.ndim != 2:
        raise ValueError(f"{path}: the array must be (rows, features), got {table.shape}.")
    return table.astype(float), None


def _check(folder: Path, views: dict[str, Array], labels: dict[str, Array]) -> None:
    if len(views) < 2:
        raise ValueError(f"{folder}: there must be at least 2 views, found {sorted(views)}.")
    rows = {name: len(table) for name, table in (*views.items(), *labels.items())}
    if len(set(rows.values())) > 1:
        raise ValueError(f"{folder}: all files must have the same number of rows, got {rows}.")
    for name, table in views.items():
        if not table.size:
            raise ValueError(f"{folder}: view `{name}` must hold rows and columns, it is empty.")
        if not np.isfinite(table).all():
            row = int(np.argwhere(~np.isfinite(table))[0, 0])
            raise ValueError(f"{folder}: numbers must be finite, view `{name}` row {row} is not.")
    names = list(labels)
    for name in names[1:]:
        if not np.array_equal(labels[names[0]], labels[name]):
            raise ValueError(f"{folder}: labels must agree, {names[0]} and {name} do not.")


def _whole(name: str, label: Array) -> NDArray[np.int64]:
    if not np.array_equal(label, np.round(label)):
        raise ValueError(f"{name}: labels must be whole numbers, got {label[label % 1 != 0][0]}.")
    return label.astype(np.int64)
