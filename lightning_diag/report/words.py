"""Numbers and overrides as text for people."""

import shlex
from collections.abc import Mapping
from typing import Any

__all__ = ["flatten", "override_words", "short", "step_words"]


def short(value: float | None, missing: str = "-") -> str:
    """A number in three or four digits.

    Example:
        >>> short(0.0452314), short(1234567.0), short(3.2e-8), short(0.0)
        ('0.0452', '1.23e+06', '3.2e-08', '0')
    """
    return missing if value is None else f"{value:.3g}"


def step_words(first: int | None, last: int | None) -> str:
    """A range of steps.

    Example:
        >>> step_words(10, 90), step_words(10, 10), step_words(None, None)
        ('steps 10 to 90', 'step 10', '')
    """
    if first is None:
        return ""
    return f"step {first}" if last in (None, first) else f"steps {first} to {last}"


def override_words(overrides: Mapping[str, object]) -> str:
    """Hydra overrides as one types them in a shell.

    Example:
        >>> override_words({"optimizer.lr": 0.0003, "component_lrs": {"head": 3.0}})
        "optimizer.lr=0.0003 'component_lrs={head: 3.0}'"
    """
    return " ".join(shlex.quote(f"{key}={_hydra(value)}") for key, value in overrides.items())


def _hydra(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_hydra(one)}" for key, one in value.items()) + "}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys.

    Example:
        >>> flatten({"a": {"b": 1}, "c": [2]})
        {'a.b': 1, 'c': [2]}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
