"""The user's own pictures: a folder ``images/`` and a file of captions beside it."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from recipes.captions.samples import Sample, Source

__all__ = ["read_folder"]

_FILES = ("captions.jsonl", "captions.csv")
_KEYS = ("file", "caption")
_MODES = {1: "L", 3: "RGB"}


def read_folder(path: str | Path, *, size: int = 32, channels: int = 1) -> Source:
    """Read pictures and captions.

    Args:
        path: a folder with ``images/`` and either ``captions.jsonl``, one object a line with
            ``file`` and ``caption``, or ``captions.csv`` with these two columns. ``file`` is a path
            inside ``images/``; further keys and columns are passed over.
        size: height and width that the pictures are brought to.
        channels: 1 for grey, 3 for colour.

    Returns:
        The pictures in the order of the file; those that are equal to the last byte share a group.

    Raises:
        FileNotFoundError: a folder, the captions or a picture is missing.
        ValueError: a line or a picture breaks a rule; the message says where.
    """
    folder = Path(path)
    if not (folder / "images").is_dir():
        raise FileNotFoundError(f"`path` must be a folder that holds images/, got {folder}.")
    captions = _captions_file(folder)
    samples = []
    digest = hashlib.sha256()
    rows = _json_rows(captions) if captions.suffix == ".jsonl" else _csv_rows(captions)
    for place, row in rows:
        file, caption = (_text(row, key, place) for key in _KEYS)
        pixels = _pixels(folder / "images", file, size, channels, place)
        digest.update(f"{file}\n{caption}\n".encode() + pixels)
        image = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(size, size, channels)
        group = hashlib.sha1(pixels).hexdigest()
        samples.append(Sample(image.permute(2, 0, 1).contiguous(), caption, group))
    if not samples:
        raise ValueError(f"{captions}: the file must hold at least one caption, it is empty.")
    return Source(folder.resolve().name, digest.hexdigest(), samples)


def _captions_file(folder: Path) -> Path:
    there = [folder / name for name in _FILES if (folder / name).is_file()]
    if len(there) == 1:
        return there[0]
    message = (
        f"`path` must be a folder that holds either {' or '.join(_FILES)}, "
        f"got {'both' if there else 'neither'} in {folder}."
    )
    raise ValueError(message) if there else FileNotFoundError(message)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one, too
            raise ValueError(f"{place}: the line must be one JSON object, {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: the line must be a JSON object, got {type(row).__name__}.")
        yield place, row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            yield f"{path}, line {rows.line_num}", dict(row)


def _text(row: dict[str, object], key: str, place: str) -> str:
    if key not in row:
        held = ", ".join(f"`{name}`" for name in row) or "nothing"
        raise ValueError(f"{place}: the line must have `{key}`, it has {held}.")
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: `{key}` must be text that is not blank, got {value!r}.")
    return value


def _pixels(images: Path, file: str, size: int, channels: int, place: str) -> bytes:
    path = images / file
    if not path.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"{place}: `file` must lie inside images/, got {file}.")
    if not path.is_file():
        raise FileNotFoundError(f"{place}: `file` must name a picture in images/, got {file}.")
    try:
        with Image.open(path) as image:
            square = image.convert(_MODES[channels]).resize((size, size))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{place}: {file} must be a picture, {error}.") from error
    return square.tobytes()
