"""Any value that a run reports, as JSON: primitives, lists, and mappings with string keys."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence, Set, ValuesView
from datetime import date, time, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["Json", "flat_row", "json_safe"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def json_safe(
    value: object,
    *,
    default: Callable[[object], object] | None = None,
    allow_nan: bool = False,
) -> Json:
    """The same value in JSON's types: a tensor becomes lists, a path a string, NaN becomes null.

    Understood are tensors and arrays of every real dtype (bfloat16 too), NumPy scalars, paths,
    dataclasses, enums (their value, or their name where the value is no primitive), dates and
    times (ISO 8601), durations (seconds), sets (sorted), sequences, mappings with any key,
    ``torch.dtype``, ``torch.device`` and OmegaConf containers (resolved).

    Args:
        value: What to convert; it is not changed.
        default: Called with a value of any other type; what it returns is converted instead.
        allow_nan: Keep non-finite numbers as floats, for formats that know them, such as YAML.

    Returns:
        None, bool, int, float, str, or a list or dict of these.

    Raises:
        TypeError: A type is unknown, and no `default` was given; the message names its place.
        ValueError: Two keys of a mapping become the same string, or a value contains itself.

    Example:
        >>> json_safe({"loss": float("nan"), 3: {2, 1}})
        {'loss': None, '3': [1, 2]}
    """
    return _Converter(default, allow_nan).start(value, "value")


def flat_row(row: Mapping[str, object]) -> tuple[dict[str, Json], dict[str, int]]:
    """A row with null for what is not finite, and how many such numbers stood under each key.

    Args:
        row: One level of names and values. A list or tensor is a value, a mapping is not.

    Returns:
        The JSON-safe row, and the counts by key, for the keys that had any.

    Raises:
        TypeError: A key is no string, a value is a mapping, or its type is unknown.

    Example:
        >>> flat_row({"l2": float("inf"), "count": 8})
        ({'l2': None, 'count': 8}, {'l2': 1})
    """
    safe: dict[str, Json] = {}
    counts: dict[str, int] = {}
    for key, value in row.items():
        if not isinstance(key, str):
            raise TypeError(f"The key of a row must be a string, got {key!r}.")
        kind = type(value)
        if kind is int or kind is bool or (kind is float and math.isfinite(value)):  # type: ignore[arg-type]
            safe[key] = value  # type: ignore[assignment]
            continue
        converter = _Converter(None, False)
        safe[key] = result = converter.start(value, key)
        if converter.nonfinite:
            counts[key] = converter.nonfinite
        if isinstance(result, dict):
            raise TypeError(f"`{key}` must be one value of a flat row, got a {kind.__name__}.")
    return safe, counts


class _Converter:
    """One conversion: the options, and the non-finite numbers met so far."""

    def __init__(self, default: Callable[[object], object] | None, allow_nan: bool) -> None:
        self.default = default
        self.allow_nan = allow_nan
        self.nonfinite = 0

    def start(self, value: object, name: str) -> Json:
        try:
            return self.convert(value, name)
        except RecursionError:
            raise ValueError(f"`{name}` must not contain itself.") from None

    def convert(self, value: object, at: str) -> Json:
        if value is None or value is True or value is False:
            return value
        if isinstance(value, Enum):
            plain = isinstance(value.value, (str, int, float))
            return self.convert(value.value if plain else value.name, at)
        if isinstance(value, str):
            return _encodable(value)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return self._number(float(value))
        return self._convert_other(value, at)

    def _convert_other(self, value: object, at: str) -> Json:
        if _is_omegaconf(value):
            value = sys.modules["omegaconf"].OmegaConf.to_container(value, resolve=True)
        if isinstance(value, Mapping):
            return self._mapping(value, at)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            return self._mapping({name: getattr(value, name) for name in names}, at)
        if isinstance(value, Set):
            return _sorted([self.convert(item, f"{at}{{}}") for item in value])
        numbers = _numbers(value, at)
        if numbers is not value:
            return self.convert(numbers, at)
        if isinstance(value, (Sequence, ValuesView)) and not isinstance(value, _BYTES):
            return [self.convert(item, f"{at}[{i}]") for i, item in enumerate(value)]
        return self._convert_scalar(value, at)

    def _convert_scalar(self, value: object, at: str) -> Json:
        torch = sys.modules.get("torch")
        if isinstance(value, os.PathLike):
            return self.convert(os.fsdecode(value), at)
        if isinstance(value, (date, time)):
            return value.isoformat()
        if isinstance(value, timedelta):
            return value.total_seconds()
        if torch is not None and isinstance(value, (torch.dtype, torch.device)):
            return str(value)
        if self.default is not None:
            return self.convert(self.default(value), at)
        raise TypeError(
            f"`{at}` must be a number, string, tensor, array, path, date, enum, dataclass, "
            f"sequence, set or mapping, got {_type_name(value)}."
        )

    def _number(self, value: float) -> float | None:
        if math.isfinite(value):
            return value
        self.nonfinite += 1
        return value if self.allow_nan else None

    def _mapping(self, mapping: Mapping[Any, object], at: str) -> dict[str, Json]:
        result: dict[str, Json] = {}
        for key, value in mapping.items():
            name = _Converter(None, False).convert(key, f"key of {at}")
            name = name if isinstance(name, str) else json.dumps(name)
            if name in result:
                raise ValueError(f"The keys of `{at}` must differ as strings, got {name!r} twice.")
            result[name] = self.convert(value, f"{at}.{name}")
        return result


_BYTES = (bytes, bytearray, memoryview)


def _is_omegaconf(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "omegaconf" and "omegaconf" in sys.modules


def _numbers(value: object, at: str) -> object:
    # a package that was never imported has no values here, so nothing is imported to ask
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        return _numbers_of_tensor(value, at)
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return _numbers_of_array(value, at)
    return value


def _numbers_of_tensor(tensor: "torch.Tensor", at: str) -> object:
    if tensor.is_complex() or tensor.is_meta:
        kind = "meta" if tensor.is_meta else tensor.dtype
        raise TypeError(f"`{at}` must hold real numbers, got a tensor of {kind}.")
    tensor = tensor.detach().cpu().to_dense()
    # float8 has no list of its own, and float64 holds every narrower number exactly
    return (tensor.double() if tensor.is_floating_point() else tensor).tolist()


def _numbers_of_array(array: "np.ndarray[Any, Any] | np.generic", at: str) -> object:
    kind = array.dtype.kind
    if kind in "cV":
        raise TypeError(f"`{at}` must hold real numbers, got an array of {array.dtype}.")
    if kind == "f":
        array = array.astype("float64")
    if kind in "mM":
        # NumPy gives times finer than a microsecond back as bare integers
        array = array.astype(f"{kind}8[us]")
    return array.tolist()


def _sorted(items: list[Json]) -> list[Json]:
    try:
        return sorted(items)  # type: ignore[type-var]
    except TypeError:
        return sorted(items, key=repr)


def _encodable(text: str) -> str:
    # a file name that is not UTF-8 carries lone surrogates, which no JSON reader takes
    plain = str.__str__(text)
    return plain if plain.isascii() else plain.encode("utf-8", "backslashreplace").decode("utf-8")


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
