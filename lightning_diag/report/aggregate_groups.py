"""Which runs are the same experiment: those whose configuration differs in the seed alone."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_diag.report.aggregate_runs import OneRun
from lightning_diag.report.words import flatten

__all__ = ["grouped", "run_folders"]

_OWN = {"run_dir", "ckpt_path", "logger"}  # what a run has for itself, or an attempt at it
_MOST = 4  # differences that a name tells


def run_folders(folder: Path) -> list[Path]:
    """Every run in a folder, at any depth, and the folder itself where it is one."""
    marks = [*folder.rglob("run.json"), *folder.rglob("records/metrics.jsonl")]
    found = {mark.parent if mark.name == "run.json" else mark.parents[1] for mark in marks}
    return sorted(found)


def grouped(folder: Path, runs: Sequence[OneRun]) -> dict[str, list[OneRun]]:
    """The runs of each experiment, under a name that tells the experiments apart.

    Two runs belong together where their names, and their configurations without seed, run folder,
    checkpoint, loggers and diagnostics (which change no training), are equal; a run without
    config.yaml goes by its parent folder. The name is the parent folder of its runs where each
    group has one of its own, else the name of the runs where that is one of its own, else what its
    configuration has that another has not.

    Args:
        folder: The folder that holds the runs.
        runs: The runs.
    """
    groups: dict[str, list[OneRun]] = {}
    keys: list[dict[str, str]] = []
    for run in runs:
        key = _key(run)
        number = keys.index(key) if key in keys else len(keys)
        if number == len(keys):
            keys.append(key)
        groups.setdefault(str(number), []).append(run)
    names = _names(folder, list(groups.values()), keys)
    return dict(zip(names, groups.values(), strict=True))


def _key(run: OneRun) -> dict[str, str]:
    """What makes the experiment, key by key as text."""
    if not run.config:
        return {"name": run.name, "folder": str(run.path.parent)}
    return {"name": run.name, **_experiment(run.config, run.seed)}


def _experiment(config: Mapping[str, Any], seed: int | None) -> dict[str, str]:
    own = str(config.get("run_dir") or "")
    found = {}
    counted = {key: value for key, value in config.items() if key not in _OWN}
    if isinstance(config.get("callbacks"), Mapping):
        named = config["callbacks"].items()
        counted["callbacks"] = {name: node for name, node in named if not _is_diagnostic(node)}
    for key, value in flatten(counted).items():
        if key.rpartition(".")[2] == "seed" and value == seed:
            continue
        text = repr(value)
        text = text.replace(own, "RUN") if own else text
        # as in the folder of another run with the same seed
        found[key] = text if seed is None else re.sub(rf"seed([_=-]?){seed}(?!\d)", "seed", text)
    return found


def _is_diagnostic(node: object) -> bool:
    target = str(node.get("_target_")) if isinstance(node, Mapping) else ""
    return re.fullmatch(r"lightning_diag\.[A-Z]\w*", target) is not None


def _names(folder: Path, groups: list[list[OneRun]], keys: list[dict[str, str]]) -> list[str]:
    parents = [{run.path.parent for run in group} for group in groups]
    inside = all(folder in path.parents for one in parents for path in one)
    if inside and all(len(one) == 1 for one in parents):
        names = [next(iter(one)).relative_to(folder).as_posix() for one in parents]
        if len(set(names)) == len(names):
            return names
    names = [group[0].name or group[0].path.parent.name for group in groups]
    if len(set(names)) == len(names):
        return names
    described = [_described(key, keys) for key in keys]
    return [
        text if described.count(text) == 1 else f"{text} ({number})".strip()
        for number, text in enumerate(described, start=1)
    ]


def _described(key: Mapping[str, str], keys: Sequence[Mapping[str, str]]) -> str:
    every = dict.fromkeys(name for one in keys for name in one)
    telling = [name for name in every if len({one.get(name) for one in keys}) > 1]
    words = [f"{name}={key[name]}" for name in telling if name in key]
    more = [f"and {len(words) - _MOST} more"] if len(words) > _MOST else []
    return ", ".join([*words[:_MOST], *more])
