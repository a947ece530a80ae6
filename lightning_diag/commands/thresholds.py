"""Thresholds of rules as they are given on the command line."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_diag.commands.errors import UsageError
from lightning_diag.rules.registry import resolve_thresholds
from lightning_diag.rules.run_thresholds import run_thresholds

__all__ = ["check_thresholds", "parsed_thresholds"]


def parsed_thresholds(given: Sequence[str]) -> dict[str, dict[str, float]]:
    """``RULE.THRESHOLD=NUMBER``, each one, as the mapping that `diagnose` takes.

    Raises:
        UsageError: It is written in another way, or names what does not exist.
    """
    parsed: dict[str, dict[str, float]] = {}
    for text in given:
        name, equals, number = text.partition("=")
        rule, dot, threshold = name.strip().partition(".")
        if not (equals and dot and rule and threshold):
            raise UsageError(f"A threshold must be written RULE.THRESHOLD=NUMBER, got `{text}`.")
        try:
            parsed.setdefault(rule, {})[threshold] = float(number)
        except ValueError as error:
            raise UsageError(f"`{name}` must be a number, got `{number}`.") from error
    _check(parsed, "--threshold")
    return parsed


def check_thresholds(config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose ``rules`` name no rule, no threshold or no number.

    Raises:
        UsageError: What is wrong, with the nearest right name.
    """
    try:
        own = run_thresholds(config)
    except TypeError as error:
        raise UsageError(str(error)) from error
    _check(own, "rules")


def _check(thresholds: Mapping[str, Any], where: str) -> None:
    import lightning_diag.rules  # noqa: F401 - enters the rules into the registry

    try:
        resolve_thresholds(thresholds)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error).replace("`thresholds", f"`{where}", 1)) from error
