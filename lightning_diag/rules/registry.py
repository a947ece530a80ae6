"""The registry of rules: their ids, thresholds, and what each one explains."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from lightning_diag.rules.finding import Finding
from lightning_diag.spelling import did_you_mean

__all__ = ["RULES", "Remedy", "Rule", "resolve_thresholds", "rule"]

Check = Callable[..., list[Finding]]
Remedy = Callable[[Finding, Mapping[str, Any]], dict[str, object]]
_Function = TypeVar("_Function", bound=Callable[..., list[Finding]])


@dataclass(frozen=True)
class Rule:
    """A pure function from rows to findings, and what is known about it.

    Args:
        id: Its name in findings and in ``conf/rules``.
        family: The YAML file in ``conf/rules`` that holds its thresholds.
        needs: Prefixes of the rows it reads. It is checked where a run has rows of any of them, and
            gets a frame for each, without rows where there are none.
        thresholds: Its default thresholds, a frozen dataclass with a unit for every field.
        explains: Ids of the rules whose findings this rule's findings can cause.
        reference: Where the thresholds come from.
        check: The function.
        remedy: From a finding and the run's configuration to overrides.
    """

    id: str
    family: str
    needs: tuple[str, ...]
    thresholds: Any
    explains: tuple[str, ...]
    reference: str
    check: Check
    remedy: Remedy | None


RULES: dict[str, Rule] = {}


def rule(
    id: str,
    *,
    family: str,
    needs: str | Iterable[str],
    thresholds: type,
    explains: Iterable[str] = (),
    reference: str = "",
    remedy: Remedy | None = None,
) -> Callable[[_Function], _Function]:
    """Enter a function into the registry under `id`.

    Raises:
        ValueError: `id` is taken, or a threshold states no unit.
    """
    defaults = thresholds()
    for one in fields(defaults):
        if "unit" not in one.metadata:
            raise ValueError(f"Every threshold must state its unit, got `{id}.{one.name}`.")

    def enter(check: _Function) -> _Function:
        if id in RULES:
            raise ValueError(f"A rule id must be used once, got {id!r}.")
        RULES[id] = Rule(
            id=id,
            family=family,
            needs=(needs,) if isinstance(needs, str) else tuple(needs),
            thresholds=defaults,
            explains=tuple(explains),
            reference=reference,
            check=check,
            remedy=remedy,
        )
        return check

    return enter


def resolve_thresholds(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The thresholds of every rule: the defaults, with what was given put over them.

    Args:
        given: ``{rule id: {threshold: number}}``; what is left out keeps its default.

    Raises:
        ValueError: An unknown rule or threshold, or a number that is not finite.
        TypeError: A threshold that is not a number, or a rule's entry that is not a mapping.
    """
    resolved = {id: one.thresholds for id, one in RULES.items()}
    for id, values in (given or {}).items():
        if id not in resolved:
            near = did_you_mean(str(id), resolved)
            raise ValueError(f"`thresholds` must name rules, got {id!r}; {near}")
        if not isinstance(values, Mapping):
            raise TypeError(f"`thresholds[{id!r}]` must be a mapping, got {values!r}.")
        names = [one.name for one in fields(resolved[id])]
        for name, value in values.items():
            _check_threshold(id, str(name), value, names)
        resolved[id] = replace(resolved[id], **values)
    return resolved


def _check_threshold(id: str, name: str, value: object, names: list[str]) -> None:
    if name not in names:
        near = did_you_mean(name, names)
        raise ValueError(f"`thresholds[{id!r}]` must name its thresholds, got {name!r}; {near}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{id}.{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{id}.{name}` must be finite, got {value!r}.")
