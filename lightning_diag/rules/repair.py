"""The overrides of several findings as one set of changes, in which causes come first."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from lightning_diag.rules.finding import Finding

__all__ = ["Change", "changed_config", "changes", "left_out"]

_MISSING = object()
_UNRELATED = ("hardware.num_workers", "hardware.pin_memory")
"""Keys that change how fast batches come, and nothing of what is learned from them."""


@dataclass(frozen=True)
class Change:
    """One key of a configuration, and the finding that asks for another value.

    Args:
        path: The key, part by part, as in ``("optimizer", "lr")``.
        before: The value that the run had; None where it had none.
        value: The value to try.
        finding: Why.
    """

    path: tuple[str, ...]
    before: object
    value: object
    finding: Finding

    @property
    def key(self) -> str:
        """The path with dots, as one writes it on the command line."""
        return ".".join(self.path)


def changes(findings: Iterable[Finding], config: Mapping[str, Any]) -> list[Change]:
    """What to change: each key once, as the first finding in the list asks for it.

    Findings that another one in the list explains change nothing: what they ask for treats a
    symptom. Nor do notes, of severity ``info``. Mappings are merged entry by entry, so that two
    components may each have a learning rate of their own. A rate is not raised along with anything
    else that changes how the model learns: that updates were small was measured without it.

    Args:
        findings: Causes first, as `diagnose` returns them.
        config: The configuration of the run.
    """
    found = list(findings)
    chosen: dict[tuple[str, ...], Change] = {}
    for finding in found:
        if finding.rank == 0 or _explained(finding, found):
            continue
        for path, value in _leaves(finding, config):
            before = _at(config, path)
            if path not in chosen and value != before:
                known = None if before is _MISSING else before
                change = Change(path, known, value, finding)
                if not _awaited(change, chosen.values()):
                    chosen[path] = change
    return list(chosen.values())


def _awaited(change: Change, chosen: Iterable[Change]) -> Change | None:
    """What an earlier finding changes, whose effect a raise of a rate has to wait for."""
    if not _raises(change):
        return None
    for one in chosen:
        side_by_side = change.path[0] == one.path[0] == "component_lrs"
        if one.finding is not change.finding and not side_by_side and one.key not in _UNRELATED:
            return one
    return None


def _raises(change: Change) -> bool:
    """Whether it is a learning rate, or a factor on one, that gets higher."""
    if change.path[0] != "component_lrs" and change.path != ("optimizer", "lr"):
        return False
    before, value = 1.0 if change.before is None else change.before, change.value
    if not isinstance(before, (int, float)) or not isinstance(value, (int, float)):
        return False
    return value > before


def left_out(findings: Iterable[Finding], config: Mapping[str, Any]) -> list[tuple[Finding, str]]:
    """The findings above ``info`` that `changes` does not treat as they ask, and why not."""
    found = list(findings)
    made = {change.path: change for change in changes(found, config)}
    told = []
    for finding in found:
        if finding.rank == 0:
            continue
        if not finding.overrides:
            if not _explained(finding, found):
                told.append((finding, "no key of the configuration treats it"))
            continue
        if _explained(finding, found):
            told.append((finding, f"explained by {finding.caused_by}"))
            continue
        for path, value in _leaves(finding, config):
            if path in made and made[path].finding is not finding and made[path].value != value:
                reason = f"{made[path].key} is changed for {made[path].finding.rule}"
                told.append((finding, reason))
            elif path not in made:
                before = _at(config, path)
                known = None if before is _MISSING else before
                first = _awaited(Change(path, known, value, finding), made.values())
                if value != before and first is not None:
                    told.append((finding, f"waits for what a change of {first.key} does"))
    return told


def changed_config(config: Mapping[str, Any], made: Iterable[Change]) -> dict[str, Any]:
    """A copy of a configuration with changes in it."""
    result = deepcopy(dict(config))
    for change in made:
        place = result
        for part in change.path[:-1]:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[change.path[-1]] = deepcopy(change.value)
    return result


def _explained(finding: Finding, findings: list[Finding]) -> bool:
    return finding.caused_by is not None and any(
        one.rule == finding.caused_by and one.rank > 0 for one in findings
    )


def _leaves(
    finding: Finding, config: Mapping[str, Any]
) -> Iterable[tuple[tuple[str, ...], object]]:
    """Paths and values that a finding asks for; of a mapping, the entries that are new."""
    for key, value in finding.overrides.items():
        path = tuple(key.split("."))
        if not isinstance(value, Mapping):
            yield path, value
            continue
        for name, one in value.items():
            if one != _at(config, (*path, name)):
                yield (*path, name), one


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> object:
    found: object = config
    for part in path:
        if not isinstance(found, Mapping) or part not in found:
            return _MISSING
        found = found[part]
    return found
