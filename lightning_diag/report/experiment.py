"""A run's experiment, with the changes that its findings ask for, as a file for Hydra."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from os import PathLike
from typing import Any

from lightning_diag.report.norms import WHOLE
from lightning_diag.rules.finding import Finding
from lightning_diag.rules.repair import Change

__all__ = ["apply_command", "difference", "experiment_yaml", "in_a_line", "not_taken_away"]

_PER_RUN = ("run_dir", "ckpt_path")
_REMOVABLE = ("callbacks", "logger")  # groups in which null stands for "not there"
_MISSING = object()


def difference(base: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be laid over `base` to get `config`, but for what names one run.

    Interpolations such as ``${optimizer}`` are compared as they are written, so that a value which
    follows another one goes on following it.

    Args:
        base: What the groups alone compose, unresolved.
        config: What the run was composed to, unresolved.

    Returns:
        A tree of the values that differ. A callback or logger that was taken away is null in it.
    """
    found = _difference(base, config)
    for key in _PER_RUN:
        found.pop(key, None)
    for group in _REMOVABLE:
        was, has = base.get(group), config.get(group)
        if isinstance(was, Mapping) and isinstance(has, Mapping):
            gone = {name: None for name in was if name not in has}
            if gone:
                found[group] = {**found.get(group, {}), **gone}
    return found


def apply_command(path: str | PathLike[str], findings: Iterable[Finding]) -> str:
    """What writes an experiment with all overrides, as one types it; empty where there is none.

    Example:
        >>> apply_command("runs/mine", [Finding("loss_spike", "warning", overrides={"lr": 0.1})])
        'lightning-diag report runs/mine --apply fixed.yaml'
    """
    if not any(one.overrides for one in findings if one.rank > 0):
        return ""
    return shlex.join(["lightning-diag", "report", str(path), "--apply", "fixed.yaml"])


def not_taken_away(base: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Keys that `base` gives a value and the run did not have, which an experiment cannot undo."""
    return [
        key
        for key in _removed(base, config)
        if not (key.count(".") == 1 and key.partition(".")[0] in _REMOVABLE)
    ]


def _difference(base: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        old = base.get(key, _MISSING)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            inner = _difference(old, value)
            if inner:
                found[key] = inner
        elif old is _MISSING or old != value or type(old) is not type(value):
            found[key] = value
    return found


def _removed(base: Mapping[str, Any], config: Mapping[str, Any], above: str = "") -> Iterable[str]:
    for key, old in base.items():
        if key not in config:
            if old is not None:
                yield f"{above}{key}"
        elif isinstance(old, Mapping) and isinstance(config[key], Mapping):
            yield from _removed(old, config[key], f"{above}{key}.")


def experiment_yaml(
    groups: Mapping[str, object],
    added: Sequence[str],
    body: Mapping[str, Any],
    made: Sequence[Change],
    *,
    title: str,
    kept: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> str:
    """The text of an experiment: the run's groups, its own values, and the changes.

    Each change has a comment line that says what was before and which finding asks for it.

    Args:
        groups: Configuration group to the option, or options, that the run chose.
        added: Those of the groups that the package's own defaults do not have.
        body: The run's own values, see `difference`.
        made: The changes.
        title: Says what the file is, in a line.
        kept: Keys that the run did not have, and that come back with the groups.
        config: The run's configuration, resolved: it has what an interpolation stands for, where a
            change lies inside of that.
    """
    lines = ["# @package _global_", f"# {_one_line(title)}"]
    gone = map(_one_line, kept)
    lines += [f"# The run did not have `{key}`, which comes back with its group." for key in gone]
    lines += ["defaults:"]
    # Hydra takes overrides at the end of a list of defaults alone
    for group in sorted(groups, key=lambda group: group not in added):
        prefix = "/" if group in added else "override /"
        lines.append(f"  - {in_a_line(prefix + group)}: {in_a_line(groups[group])}")
    tree: dict[str, Any] = {}
    _lay(tree, body)
    notes = {change.path: _note(change) for change in made}
    for change in made:
        _put(tree, change.path, change.value, config)
    lines += ["", *_written(tree, notes, ())]
    return "\n".join(lines) + "\n"


def in_a_line(value: object) -> str:
    """A value in one line of YAML.

    Example:
        >>> in_a_line([1.0e-4, None, "a: b"])
        "[0.0001, null, 'a: b']"
    """
    import json

    import yaml

    text: str = yaml.dump(
        value,
        Dumper=_dumper(),
        default_flow_style=True,
        allow_unicode=True,
        width=float("inf"),
        sort_keys=False,
    )
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text.splitlines()) == 1 else json.dumps(value)


@cache
def _dumper() -> Any:  # noqa: ANN401 - a class of PyYAML, which is loaded here only
    import yaml

    class Dumper(yaml.SafeDumper):
        """Puts quotes around ``1e-3`` too, which is a word to PyYAML and a number to Hydra."""

    number = re.compile(r"^[-+]?(\d[\d_]*)?\.?[\d_]*([eE][-+]?\d+)?$")
    Dumper.add_implicit_resolver("tag:yaml.org,2002:int", number, list("-+.0123456789"))
    return Dumper


def _lay(tree: dict[str, Any], body: Mapping[str, Any]) -> None:
    for key, value in body.items():
        if isinstance(value, Mapping):
            tree[key] = {}
            _lay(tree[key], value)
        else:
            tree[key] = value


def _put(
    tree: dict[str, Any],
    path: Sequence[str],
    value: object,
    config: Mapping[str, Any] | None,
) -> None:
    known: object = config
    for part in path[:-1]:
        known = known.get(part) if isinstance(known, Mapping) else None
        if not isinstance(tree.get(part), dict):
            # an interpolation that stands for a mapping, of which one value changes
            follows = isinstance(tree.get(part), str)
            tree[part] = deepcopy(dict(known)) if follows and isinstance(known, Mapping) else {}
        tree = tree[part]
    tree[path[-1]] = value


def _note(change: Change) -> str:
    one: Finding = change.finding
    since = "" if one.first_step is None else f", since step {one.first_step}"
    before = in_a_line(change.before)
    return f"# was {before}; {one.rule}, {_one_line(one.component or WHOLE)}{since}"


def _written(
    tree: Mapping[str, Any], notes: Mapping[tuple[str, ...], str], above: tuple[str, ...]
) -> list[str]:
    lines, indent = [], "  " * len(above)
    for key, value in tree.items():
        path = (*above, str(key))
        if path in notes:
            lines.append(f"{indent}{notes[path]}")
        if isinstance(value, Mapping) and value:
            lines.append(f"{indent}{in_a_line(key)}:")
            lines += _written(value, notes, path)
        else:
            lines.append(f"{indent}{in_a_line(key)}: {in_a_line(value)}")
    return lines


def _one_line(text: str) -> str:
    """Without what ends a line, and without what YAML refuses even in a comment."""
    return "".join(one if one.isprintable() else "?" for one in " ".join(text.split()))
