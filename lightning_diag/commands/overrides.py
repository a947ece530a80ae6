"""Hydra's overrides as they are typed: what they may be, and which right name a wrong one is near.

Nothing here knows Hydra; `lightning_diag.cli` alone does.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lightning_diag.commands.errors import UsageError
from lightning_diag.spelling import nearest, takes

__all__ = [
    "check_sweep",
    "config_groups",
    "experiment_files",
    "no_key",
    "option_names",
    "resumed",
    "search_path",
    "unnamed_experiment",
]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_WORDS = {"null", "none", "true", "false", "nan", "inf"}  # what Hydra reads as a value


def check_sweep(overrides: Sequence[str]) -> None:
    """Refuse one folder for all jobs of a sweep.

    Raises:
        UsageError: An override names the folder of one run.
    """
    for override in overrides:
        key, _, folder = override.partition("=")
        if key.lstrip("+") in {"run_dir", "hydra.run.dir"}:
            raise UsageError(
                f"`{key}` is the folder of one run, a sweep has a folder for each of its jobs: "
                f"write `hydra.sweep.dir={folder}`."
            )


def resumed(overrides: Sequence[str]) -> list[str]:
    """A checkpoint of a run is resumed in the folder of that run, unless told otherwise."""
    given = dict(override.partition("=")[::2] for override in overrides)
    checkpoint = Path(given.get("ckpt_path", "").strip("'\""))
    if checkpoint.parent.name != "checkpoints" or given.keys() & {"run_dir", "hydra.run.dir"}:
        return []
    return [f"run_dir='{checkpoint.parent.parent}'"]


def experiment_files(override: str, taken: Mapping[str, str]) -> dict[str, str] | None:
    """The files that `experiment=FILE.yaml` names, each with a name that Hydra can read.

    Args:
        override: One override; that of a sweep may name several files.
        taken: Names that something else has, with the file it is; empty for no file.

    Returns:
        Name to file, in order; None where the override names no file.

    Raises:
        UsageError: A file is not there.
    """
    key, _, text = override.partition("=")
    text = text.strip("'\"")
    if key != "experiment" or not text.endswith(".yaml"):
        return None
    files = [text] if Path(text).is_file() else text.split(",")
    named: dict[str, str] = {}
    for file in files:
        if not Path(file).is_file():
            raise UsageError(f"`experiment` names a file that is not there, got `{file}`.")
        path = str(Path(file).absolute())
        name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(file).stem)
        if not _NAME.fullmatch(name) or name.lower() in _WORDS:
            name = f"file_{name}"
        while {**taken, **named}.get(name, path) != path:
            name += "_file"
        named[name] = path
    return named


def search_path(hydra: Any) -> list[str]:  # noqa: ANN401 - Hydra's own configuration
    """What told Hydra where else to look for configuration, as arguments."""
    given = [text for text in hydra.overrides.hydra if text.startswith("hydra.searchpath=")]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            given += ["--config-dir", source.path]
    return given


def config_groups(folder: str | None) -> dict[str, list[str]]:
    """Each configuration group, with the names that can be chosen in it.

    Args:
        folder: The user's folder of configuration.
    """
    roots = [Path(str(resources.files("lightning_diag.conf")))]
    roots += [Path(folder)] if folder else []
    groups: dict[str, list[str]] = {}
    for root in roots:
        for group in filter(Path.is_dir, root.rglob("[!_]*")):
            names = (path.relative_to(group).with_suffix("") for path in group.rglob("*.yaml"))
            known = groups.setdefault(group.relative_to(root).as_posix(), [])
            known += [name.as_posix() for name in names]
    return groups


def no_key(key: str, tree: Mapping[str, object], known: list[str]) -> str:
    """What to say of a key that the configuration does not have."""
    target = takes(tree, key)
    if target is not None:
        return f"The configuration does not list `{key}`, `{target}` takes it: write `+{key}=`."
    near = nearest(key, known)
    hint = f"did you mean `{near}`?" if near else "`--cfg job` shows them all."
    return f"The configuration has no key `{key}`; {hint}"


def unnamed_experiment(said: str, groups: Mapping[str, list[str]]) -> str:
    """What Hydra said, or where it misses an experiment, those that there are."""
    if "You must specify" not in said:
        return said
    names = ", ".join(sorted(groups.get("experiment", []))) or "none yet"
    return f"An experiment must be named, as in `experiment=NAME`; there are: {names}."


def option_names(value: object) -> list[str]:
    """The options that the value of a group's override names, those of a sweep as well."""
    choices = getattr(value, "list", value)
    if isinstance(choices, list):
        return [name for choice in choices for name in option_names(choice)]
    return [choices] if isinstance(choices, str) else []
