"""The thresholds that a run's own configuration asks for."""

from collections.abc import Mapping
from typing import Any

__all__ = ["run_thresholds"]


def run_thresholds(
    config: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What stands under ``rules`` in config.yaml, with what was given laid over it.

    Args:
        config: The configuration of a run.
        given: ``{rule id: {threshold: number}}``, the last word.

    Returns:
        The same shape, for `resolve_thresholds`, which checks it.

    Raises:
        TypeError: ``rules`` is not a mapping.

    Example:
        >>> own = {"rules": {"dead_component": {"min_rows": 5}}}
        >>> run_thresholds(own, {"dead_component": {"faded_l2": 0.1}})
        {'dead_component': {'min_rows': 5, 'faded_l2': 0.1}}
    """
    own = config.get("rules") or {}
    if not isinstance(own, Mapping):
        raise TypeError(f"`rules` must be a mapping of rule ids, got {own!r}.")
    merged: dict[str, Any] = dict(own)
    for id, values in (given or {}).items():
        before = merged.get(id)
        if isinstance(before, Mapping) and isinstance(values, Mapping):
            values = {**before, **values}
        merged[id] = values
    return merged
