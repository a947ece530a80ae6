"""What Hydra made a run of: the groups it chose, and its own values over them."""

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from lightning_diag.commands.errors import UsageError
from lightning_diag.report.experiment import difference, not_taken_away

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["Compose", "Composed", "ComposedRun", "Groups"]

Composed = tuple[dict[str, Any], dict[str, Any]]
"""What Hydra composes, unresolved, and the option of each group."""

Compose = Callable[[list[str], str | None], Composed]
"""From overrides and a folder of configuration to what they compose."""

Groups = Callable[[str | None], Mapping[str, Sequence[str]]]
"""From a folder of configuration to each group and its options."""

_SEVERAL = ("callbacks", "logger")


class ComposedRun:
    """The experiment of a run, out of what Hydra kept in ``.hydra/``.

    Args:
        run: The run.
        compose: What Hydra composes; handed in, since `cli` alone knows Hydra.
        options: The groups and options that there are.

    Attributes:
        config: The configuration, unresolved.
        folder: The user's folder of configuration, if one was given.
        groups: Configuration group to its option or options.
        added: The groups that the package's defaults do not have.
        body: The run's own values.
        kept: Keys that the run did not have, and that come back with the groups.

    Raises:
        UsageError: Hydra did not make the run, or its files or folder are gone.
    """

    def __init__(self, run: "Run", compose: Compose, options: Groups) -> None:
        self.config = _read(run, "config.yaml")
        runtime = (_read(run, "hydra.yaml").get("hydra") or {}).get("runtime") or {}
        self.folder = _folder(runtime)
        chosen = _chosen(runtime, self.config, options(self.folder))
        self.groups, self.added, base = _laid(chosen, self.folder, compose)
        self.body = difference(base, self.config)
        self.kept = not_taken_away(base, self.config)


def _chosen(
    runtime: Mapping[str, Any], config: Mapping[str, Any], options: Mapping[str, Sequence[str]]
) -> dict[str, object]:
    """Each group of the run with its option or options, None where it was taken away."""
    choices, primary = runtime.get("choices") or {}, _primary()
    chosen: dict[str, object] = {}
    for group in {**primary, **choices}:
        if group == "experiment" or group.startswith("hydra/"):
            continue
        if group in choices or group not in _SEVERAL:
            chosen[group] = choices.get(group)
            continue
        # a list of options leaves no choice behind: each option is a node of its own name
        nodes = config.get(group)
        named = nodes if isinstance(nodes, Mapping) else {}
        chosen[group] = [
            name
            for name, node in named.items()
            if name in options.get(group, ()) and isinstance(node, Mapping) and "_target_" in node
        ]
    return chosen


def _laid(
    chosen: Mapping[str, object], folder: str | None, compose: Compose
) -> tuple[dict[str, object], list[str], dict[str, Any]]:
    """The groups that must be named, those of them that nothing else brings, and what they compose.

    An option may bring groups of its own, as ``model=fusion`` may bring ``model/encoder``: these
    are overridden, others are added.
    """
    there: Mapping[str, object] = _primary()
    groups: dict[str, object] = {}
    added: list[str] = []
    while True:
        for group in [group for group in chosen if group in there and group not in groups]:
            if chosen[group] is not None or there[group] is not None:
                groups[group] = chosen[group]
        overrides = [
            _override(group, option, added=group in added) for group, option in groups.items()
        ]
        base, there = compose(overrides, folder)
        chosen = {**_taken_away(there, chosen), **chosen}
        left = [
            group
            for group, option in chosen.items()
            if group not in groups and option != there.get(group)
        ]
        if not left:
            return groups, added, base
        if not any(group in there for group in left):
            # what is higher up first: it may bring the others
            added.append(min(left, key=lambda group: group.count("/")))
            groups[added[-1]] = chosen[added[-1]]


def _taken_away(there: Mapping[str, object], chosen: Mapping[str, object]) -> dict[str, object]:
    """Groups that an option brings and the run does not have."""
    own = (group for group in there if group != "experiment" and not group.startswith("hydra/"))
    return {group: None for group in own if group not in chosen}


def _primary() -> dict[str, str | None]:
    """The groups in the defaults of the package, with their options."""
    import yaml

    text = (resources.files("lightning_diag.conf") / "train.yaml").read_text("utf-8")
    defaults = [one for one in yaml.safe_load(text)["defaults"] if isinstance(one, dict)]
    named = {group: option for one in defaults for group, option in one.items()}
    return {group: named[group] for group in named if not group.startswith("override ")}


def _override(group: str, option: object, *, added: bool) -> str:
    if option is None:
        return f"~{group}"
    chosen = f"[{','.join(option)}]" if isinstance(option, list) else option
    return f"{'+' * added}{group}={chosen}"


def _read(run: "Run", name: str) -> dict[str, Any]:
    import yaml

    file = run.path / ".hydra" / name
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            "`--apply` needs a run that `lightning-diag train` made, which keeps what Hydra "
            f"composed; there is no `{file}`. Without `--apply` the report shows the overrides."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"`{file}` must be YAML, got {error}.") from error
    if not isinstance(found, dict):
        raise UsageError(f"`{file}` must hold a mapping, got {type(found).__name__}.")
    return found


def _folder(runtime: Mapping[str, Any]) -> str | None:
    """The user's own folder of configuration, as `--config-dir` or a search path named it."""
    from pathlib import Path

    own = []
    for source in runtime.get("config_sources") or []:
        if source.get("provider") in ("command-line", "hydra.searchpath in command-line"):
            schema = source.get("schema") or "file"
            path = str(source.get("path"))
            own.append(path if schema == "file" else f"{schema}://{path}")
    own = [path.removeprefix("file://") for path in own]
    if not own:
        return None
    if len(own) > 1 or "://" in own[0]:
        raise UsageError(
            "`--apply` needs a run with one folder of configuration besides the package's, "
            f"got {', '.join(own)}."
        )
    if not Path(own[0]).is_dir():
        raise UsageError(f"The run was composed with `--config-dir {own[0]}`, which is not there.")
    return own[0]
