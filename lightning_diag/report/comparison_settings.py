"""What two runs were told, and what they ran on, where it differs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_diag.report.words import flatten

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["ABSENT", "Difference", "compared_configurations", "compared_environments"]

ABSENT = "(absent)"
"""Stands for the value of a key that a run does not have."""

_PER_RUN = ("run_dir", "ckpt_path")
_ENVIRONMENT = ("versions", "seed", "data", "devices", "host", "world_size")


@dataclass(frozen=True)
class Difference:
    """A key whose value differs.

    Args:
        key: With dots.
        before: In the first run; `ABSENT` where it has none.
        after: In the second run.
    """

    key: str
    before: object
    after: object

    def to_dict(self) -> dict[str, Any]:
        """Its three fields; a key that is not there is left out."""
        sides = {"before": self.before, "after": self.after}
        return {"key": self.key, **{k: v for k, v in sides.items() if v is not ABSENT}}


def compared_configurations(before: "Run", after: "Run") -> list[Difference]:
    """Keys of config.yaml whose values differ, but for the folder of each run.

    Where one value is handed on to other keys, as ``optimizer.lr`` is to ``model.optimizer.lr``,
    the shortest key alone is told.
    """
    flat = [_without_folder(run) for run in (before, after)]
    found = _differences(*flat)
    short: list[Difference] = []
    for one in sorted(found, key=lambda one: one.key.count(".")):
        if not any(_repeats(one, other) for other in short):
            short.append(one)
    return sorted(short, key=lambda one: found.index(one))


def compared_environments(before: "Run", after: "Run") -> list[Difference]:
    """Versions, seed, data and machine in run.json, where they differ."""
    return _differences(*(_environment(run.info) for run in (before, after)))


def _environment(info: Mapping[str, Any]) -> dict[str, Any]:
    return flatten({key: info[key] for key in _ENVIRONMENT if key in info})


def _without_folder(run: "Run") -> dict[str, Any]:
    flat = flatten(run.config)
    folder = flat.get("run_dir")
    names = [str(folder)] if isinstance(folder, str) and folder else []
    return {
        key: _neutral(value, names)
        for key, value in flat.items()
        if key not in _PER_RUN and not key.startswith("hydra.")
    }


def _neutral(value: object, folders: list[str]) -> object:
    if isinstance(value, str):
        for folder in folders:
            if value == folder or value.startswith(f"{folder}/"):
                return f"RUN{value[len(folder) :]}"
    return value


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    found = []
    for key in dict.fromkeys([*before, *after]):
        pair = before.get(key, ABSENT), after.get(key, ABSENT)
        # null in one run and no such key in the other is what a newer version adds
        if pair[0] != pair[1] and not all(one is None or one is ABSENT for one in pair):
            found.append(Difference(key, *pair))
    return found


def _repeats(one: Difference, other: Difference) -> bool:
    told = one.before == other.before and one.after == other.after
    return told and one.key.endswith(f".{other.key}")
