"""What stands in a run's configuration: values by dotted key, the optimizer, names of components.

The keys are those of the package's own experiments; a configuration that lacks one has no say.
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

__all__ = [
    "MISSING",
    "adaptive",
    "count",
    "look_up",
    "number",
    "optimizer_name",
    "rate_key",
    "share",
    "takes_component_rates",
    "word",
]

MISSING = object()
"""What `look_up` returns for a key that is not there, where None is a value like any other."""

_ADAPTIVE = ("adam", "lion", "lamb", "adafactor", "rmsprop", "adagrad", "adadelta")


def look_up(config: Mapping[str, Any], key: str) -> object:
    """The value of a dotted key, or `MISSING`."""
    found: object = config
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return MISSING
        found = found[part]
    return found


def number(config: Mapping[str, Any], key: str) -> float | None:
    """A finite number above zero, or None."""
    found = look_up(config, key)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    return float(found) if math.isfinite(found) and found > 0 else None


def share(config: Mapping[str, Any], key: str) -> float | None:
    """A number that may be zero, or None."""
    return 0.0 if _is_zero(look_up(config, key)) else number(config, key)


def count(config: Mapping[str, Any], key: str) -> int | None:
    """A whole number, or None."""
    found = look_up(config, key)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def word(config: Mapping[str, Any], key: str) -> str:
    """Text in small letters; empty where there is none."""
    found = look_up(config, key)
    return found.lower() if isinstance(found, str) else ""


def _is_zero(found: object) -> bool:
    return isinstance(found, (int, float)) and not isinstance(found, bool) and found == 0


# ---- the optimizer ----


def optimizer_name(config: Mapping[str, Any]) -> str:
    """The class in small letters, as in ``"adamw"``."""
    return word(config, "optimizer._target_").rpartition(".")[2]


def adaptive(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer divides the size of a gradient out, so that its rate is the step."""
    return any(name in optimizer_name(config) for name in _ADAPTIVE)


# ---- components ----


def takes_component_rates(config: Mapping[str, Any]) -> bool:
    """Whether the rates reach the model; only an own model of somebody may not take them."""
    model = look_up(config, "model")
    return not isinstance(model, Mapping) or "_target_" not in model or "component_lrs" in model


def rate_key(component: str, config: Mapping[str, Any]) -> str | None:
    """The key of ``component_lrs`` that takes a component, as `param_groups` reads it.

    A model that takes ``components`` too knows their names. To any other a key is the name of a
    top-level part or a glob over names: a component that the configuration makes of one glob goes
    by that, and one that it makes of several, or of the rest, has no key.

    Args:
        component: As the diagnostics name it.
        config: The configuration of the run.

    Returns:
        The key; None where there is none, or where a key that is there takes the same parameters.
    """
    key = _name_for_groups(component, config)
    rates = look_up(config, "component_lrs")
    if key is None or not isinstance(rates, Mapping) or key in rates:
        return key
    return None if any(_takes(str(one), key) for one in rates) else key


def _name_for_groups(component: str, config: Mapping[str, Any]) -> str | None:
    parts, model = look_up(config, "components"), look_up(config, "model")
    own = isinstance(model, Mapping) and "components" in model
    if own:
        parts = look_up(config, "model.components")
    if not isinstance(parts, Mapping) or (own and component in parts):
        return component
    globs = parts.get(component)
    listed = [globs] if isinstance(globs, str) else globs
    if own or not isinstance(listed, list) or len(listed) != 1:
        return None
    return str(listed[0])


def _takes(key: str, other: str) -> bool:
    """Whether what `other` stands for lies within what `key` stands for."""
    pieces = other.split(".")
    return any(fnmatchcase(".".join(pieces[:n]), key) for n in range(1, len(pieces) + 1))
