"""Trained runs as parts of another model: what must fit, and what is said where it does not."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypeVar

import torch
import yaml

from recipes.code.model import CodeClassifier

__all__ = ["Branch", "load_branch"]

Model = TypeVar("Model", bound=CodeClassifier)
_OWN = ("optimizer", "component_lrs", "components")  # of the branch's own training


class Branch(NamedTuple):
    """What is known of the run that a branch comes from.

    Attributes:
        folder: the run.
        seed: its seed.
        data: the fingerprint of its data, None where the run does not say.
        hyperparameters: what its network was made of.
    """

    folder: Path
    seed: int | None
    data: Any
    hyperparameters: dict[str, Any]


def load_branch(
    kind: type[Model], run: str | Path, *, argument: str, seed: int
) -> tuple[Model, Branch]:
    """The network of a run with the weights of its best epoch; nothing is unpickled.

    Args:
        kind: the class of the network.
        run: the folder of the run, with ``checkpoints/best.ckpt`` in it.
        argument: the setting that named the run, for the messages.
        seed: the seed that the run must have.

    Returns:
        The network, and what is known of its run.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the run has another seed or another network.
    """
    folder = Path(run)
    path = folder / "checkpoints" / "best.ckpt"
    if not path.is_file():
        raise FileNotFoundError(
            f"`{argument}` must be a run with `checkpoints/best.ckpt` in it, got {folder}."
        )
    info = _mapping(folder / "run.json")
    found = info.get("seed", _mapping(folder / "config.yaml").get("seed"))
    if found != seed:
        raise ValueError(
            f"`{argument}` must be a run with seed {seed}, got seed {found} of {folder}."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"`{argument}` must have a whole checkpoint of plain values, {path} cannot be read: "
            f"{error}"
        ) from error
    given = checkpoint.get("hyper_parameters", {})
    hyperparameters = {key: value for key, value in given.items() if key not in _OWN}
    try:
        model = kind(**hyperparameters)
        model.load_state_dict(checkpoint["state_dict"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"`{argument}` must be a run of {kind.__name__}, {path} does not fit it: {error}"
        ) from error
    return model, Branch(folder, found, info.get("data"), hyperparameters)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
