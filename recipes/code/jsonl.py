"""The user's own labelled functions: one JSON object a line, as CodeXGLUE and Devign have it."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

__all__ = ["Labelled", "file_digest", "read_jsonl"]

_CODE = ("func", "code")
_LABEL = ("target", "label")


class Labelled(NamedTuple):
    """A function and whether it is vulnerable (1) or not (0)."""

    func: str
    target: int


def read_jsonl(path: str | Path, argument: str = "path") -> list[Labelled]:
    """Read labelled functions: code in ``func`` or ``code``, 0 or 1 in ``target`` or ``label``.

    Args:
        path: a UTF-8 file with one JSON object a line; blank lines and other keys are passed over.
        argument: the setting that named the file, for the message.

    Returns:
        The functions in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks a rule; the message gives path, line and rule.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`{argument}` must name a JSON Lines file, got {path}.")
    functions = [
        _labelled(line, f"{path}, line {number}")
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)
        if line.strip()
    ]
    if not functions:
        raise ValueError(f"{path}: the file must hold at least one function, it is empty.")
    return functions


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _labelled(line: bytes, place: str) -> Labelled:
    try:
        row = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{place}: the line must be one JSON object, {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: the line must be a JSON object, got {type(row).__name__}.")
    code, label = (_first(row, keys, place) for keys in (_CODE, _LABEL))
    if not isinstance(code, str) or not code.strip():
        raise ValueError(f"{place}: the code must be text that is not blank, got {code!r}.")
    if label not in (0, 1) or isinstance(label, float):
        raise ValueError(f"{place}: the label must be 0 or 1, got {label!r}.")
    return Labelled(code, int(label))


def _first(row: dict[str, object], keys: tuple[str, str], place: str) -> object:
    for key in keys:
        if key in row:
            return row[key]
    held = ", ".join(f"`{key}`" for key in row) or "no key"
    raise ValueError(f"{place}: the line must have `{keys[0]}` or `{keys[1]}`, it has {held}.")
