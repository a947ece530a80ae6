"""One finished search for a learning rate: what was found, for what, and its form as JSON."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

__all__ = [
    *("KEY_DIGITS", "CorruptError", "Entry", "decoded", "differences", "encoded", "key_of"),
    "sentence",
]

KEY_DIGITS = 32
"""Hexadecimal digits of a key: 128 bits, which no two searches of a lifetime share by chance."""

_FORMAT = 1
_CURVE = ("lr", "loss", "smoothed")
_CONFIDENCES = ("high", "medium")
_LONGEST = 40  # characters of a value in a sentence
_MOST = 8  # differing parts in a sentence
_ABSENT = object()


class CorruptError(ValueError):
    """A file that does not hold what was written into it."""


@dataclass(frozen=True)
class Entry:
    """A learning rate that a search found. A search that found none has no entry.

    Args:
        key: `key_of` of the parts.
        created: When the search ended, ISO 8601 with its zone: `2026-01-31T12:00:00+00:00`.
        lr: The suggested learning rate.
        confidence: `high` or `medium`.
        slope: Steepest descent of the smoothed loss, loss by factor ``e`` of the learning rate.
        noise: Standard deviation of the losses around the smoothed ones.
        parts: What the key is made of: dotted names to strings, numbers, booleans, None, or lists
            of these.
        curve: Learning rates (`lr`), losses (`loss`) and smoothed losses (`smoothed`), of one
            length, all finite.
        versions: Packages by name.

    Raises:
        TypeError: A value has another type.
        ValueError: A value is outside what is said above.
    """

    key: str
    created: str
    lr: float
    confidence: str
    slope: float
    noise: float
    parts: dict[str, object]
    curve: dict[str, list[float]]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        for name in ("lr", "slope", "noise"):
            _check_number(name, getattr(self, name))
        if self.lr <= 0:
            raise ValueError(f"`lr` must be above 0, got {self.lr}.")
        if self.confidence not in _CONFIDENCES:
            raise ValueError(f"`confidence` must be high or medium, got {self.confidence!r}.")
        if not isinstance(self.key, str) or self.key != key_of(self.parts):
            raise ValueError(f"`key` must be `key_of(parts)`, got {self.key!r}.")
        _moment(self.created)
        _check_curve(self.curve)
        if not isinstance(self.versions, dict) or not _all_text(self.versions):
            raise TypeError(f"`versions` must map names to text, got {self.versions!r}.")

    @property
    def age_hours(self) -> float:
        """Hours since `created`, by the clock of this machine; negative for a date to come."""
        return (datetime.now(UTC) - _moment(self.created)).total_seconds() / 3600


def key_of(parts: Mapping[str, object]) -> str:
    """The first 32 hexadecimal digits of SHA-256 over the parts as canonical JSON.

    Canonical: keys sorted, no spaces, floats by `repr`, tuples as lists. 1, 1.0 and True differ.

    Args:
        parts: Names to strings, numbers, booleans, None, or lists of these.

    Returns:
        The key.

    Raises:
        TypeError: A name is no string, or a value is of another type.
        ValueError: A number is not finite.

    Example:
        >>> key_of({"batch": 64, "model": "mlp"}) == key_of({"model": "mlp", "batch": 64})
        True
    """
    if not isinstance(parts, Mapping):
        raise TypeError(f"`parts` must be a mapping, got {type(parts).__name__}.")
    for name, value in parts.items():
        if not isinstance(name, str):
            raise TypeError(f"The name of a part must be a string, got {name!r}.")
        _check_part(name, value)
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()[:KEY_DIGITS]


def encoded(entry: Entry) -> bytes:
    """An entry as one JSON object, with a digest of itself."""
    body = asdict(entry)
    whole = {"format": _FORMAT, "sha256": _digest(body), **body}
    return (json.dumps(whole, allow_nan=False) + "\n").encode()


def decoded(content: bytes, key: str) -> Entry | None:
    """The entry in a file.

    Args:
        content: What stands in the file.
        key: The key that the file's name gives.

    Returns:
        The entry; None for one of another format, written by another version of this package.

    Raises:
        CorruptError: The content is not what was written.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"it is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise CorruptError(f"it holds a {type(found).__name__}, no object")
    if found.pop("format", None) != _FORMAT:
        return None
    digest = found.pop("sha256", None)
    if found.keys() != {field.name for field in fields(Entry)}:
        raise CorruptError("its fields are others")
    if digest != _digest(found):
        raise CorruptError("its content has changed since it was written")
    try:
        entry = Entry(**found)
    except (TypeError, ValueError, OverflowError) as error:
        raise CorruptError(str(error)) from error
    if entry.key != key:
        raise CorruptError(f"it belongs to the key {entry.key}")
    return entry


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Which parts differ, each as `name: old -> new`.

    Example:
        >>> differences({"batch": 64, "seed": 1}, {"batch": 32, "seed": 1, "clip": 0.5})
        ['batch: 64 -> 32', 'clip: absent -> 0.5']
    """
    pairs = {name: (old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in (*old, *new)}
    return [
        f"{name}: {_shown(before)} -> {_shown(after)}"
        for name, (before, after) in pairs.items()
        if before is _ABSENT or after is _ABSENT or _canonical(before) != _canonical(after)
    ]


def sentence(found: Sequence[str]) -> str:
    """Differences in one line, the first eight in full.

    Example:
        >>> sentence(["a: 1 -> 2", "b: 3 -> 4"])
        'a: 1 -> 2, b: 3 -> 4'
    """
    more = len(found) - _MOST
    return ", ".join(found[:_MOST]) + (f", and {more} more" if more > 0 else "")


def _check_part(name: str, value: object) -> None:
    if isinstance(value, list | tuple):  # of lists too: an option by parameter group
        for one in value:
            _check_part(name, one)
        return
    if value is not None and not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise TypeError(
            f"Part `{name}` must be text, a number, a boolean, None or a list of these, got {kind}."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Part `{name}` must be finite, got {value}.")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")


def _check_curve(curve: object) -> None:
    if not isinstance(curve, dict) or set(curve) != set(_CURVE):
        raise ValueError(f"`curve` must have the lists lr, loss and smoothed, got {curve!r:.80}.")
    lengths = []
    for name in _CURVE:
        if not isinstance(curve[name], list):
            raise TypeError(f"`curve.{name}` must be a list, got {type(curve[name]).__name__}.")
        for value in curve[name]:
            _check_number(f"curve.{name}", value)
        lengths.append(len(curve[name]))
    if not lengths[0] or len(set(lengths)) > 1:
        raise ValueError(f"The lists of `curve` must have one length above 0, got {lengths}.")


def _all_text(mapping: Mapping[Any, Any]) -> bool:
    return all(isinstance(one, str) for pair in mapping.items() for one in pair)


def _moment(text: object) -> datetime:
    with suppress(TypeError, ValueError):
        moment = datetime.fromisoformat(text)  # type: ignore[arg-type]
        if moment.tzinfo is not None:
            return moment
    raise ValueError(f"`created` must be ISO 8601 with a zone, got {text!r}.")


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(body: Mapping[str, object]) -> str:
    try:
        return hashlib.sha256(_canonical(body).encode()).hexdigest()
    except (ValueError, RecursionError) as error:
        raise CorruptError(str(error)) from error


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    text = value if isinstance(value, str) else _canonical(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
