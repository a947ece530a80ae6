"""Numbers and overrides as text for people."""

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "capital",
    "cut",
    "first_sentence",
    "flatten",
    "not_said_before",
    "override_words",
    "short",
    "step_words",
    "to_try",
]

_LONG_END = 80  # characters


def first_sentence(text: str) -> tuple[str, str]:
    """A text as its first sentence and what comes after it.

    Example:
        >>> first_sentence("Lower `lr`. Then clip (e.g. at 1.) it.")
        ('Lower `lr`.', 'Then clip (e.g. at 1.) it.')
    """
    for end in re.finditer(r"[.!?]\s+(?=[A-Z`])", text):
        first, rest = text[: end.start() + 1], text[end.end() :]
        if first.count("`") % 2 == 0 and first.count("(") == first.count(")"):
            return first, rest
    return text, ""


def to_try(suggestion: str) -> str:
    """A suggestion as it stands behind the word "try".

    Example:
        >>> to_try("Try a lower rate."), to_try("Clip the gradient.")
        ('A lower rate.', 'Clip the gradient.')
    """
    return capital(suggestion.removeprefix("Try "))


def not_said_before(text: str, before: Iterable[str]) -> str:
    """A text without the long end that it shares with one of those before it.

    Example:
        >>> same = "At step 6 it was made by a square root in `net`: " + 50 * "x" + "."
        >>> not_said_before(f"The loss is NaN. {same}", [f"A gradient is NaN. {same}"])
        'The loss is NaN.'
    """
    for end in re.finditer(r"[.!?]\s+(?=[A-Z`])", text):
        rest = text[end.end() :]
        if len(rest) < _LONG_END:
            break
        if any(one.endswith(rest) for one in before):
            return text[: end.start() + 1]
    return text


def short(value: float | None, missing: str = "-") -> str:
    """A number in three or four digits; a power of ten only where it is very large or small.

    Example:
        >>> short(0.0452314), short(9167.2), short(1234567.0), short(3.2e-8), short(0.0)
        ('0.0452', '9,167', '1.23e+06', '3.2e-08', '0')
    """
    if value is None:
        return missing
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"


def capital(text: str) -> str:
    """A clause as the beginning of a sentence; a name in backticks stays as it is.

    Example:
        >>> capital("the loss leaps up"), capital("`head` is frozen")
        ('The loss leaps up', '`head` is frozen')
    """
    return f"{text[:1].upper()}{text[1:]}"


def cut(text: str, most: int) -> str:
    """A text of at most so many characters; the end of a dotted name says more than its middle.

    Example:
        >>> cut("model.encoder.layers.11.attention", 20)
        'model.enc….attention'
    """
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[-(most - 1 - head) :]}"


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
