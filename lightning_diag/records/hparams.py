"""config.yaml: hyper-parameters merged over several calls, readable without any import."""

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import yaml

from lightning_diag.records.files import write_text
from lightning_diag.records.json_safe import Json, json_safe
from lightning_diag.records.secret_keys import mask_secrets

__all__ = ["merge_config", "plain_hparams"]


def plain_hparams(params: object) -> dict[str, Json]:
    """Hyper-parameters as plain values with secrets masked; what is no value becomes its name.

    Args:
        params: A mapping, an ``argparse.Namespace`` or an OmegaConf container.

    Returns:
        What config.yaml can hold.

    Raises:
        TypeError: `params` is neither a mapping nor a namespace.

    Example:
        >>> plain_hparams({"net": dict, "lr": 0.1, "hf_token": "abc"})
        {'net': 'dict', 'lr': 0.1, 'hf_token': '***'}
    """
    fields = params if isinstance(params, Mapping) else vars(params)
    plain = mask_secrets(json_safe(fields, default=_describe, allow_nan=True))
    return cast("dict[str, Json]", plain)


def merge_config(path: Path, params: Mapping[str, Json]) -> None:
    """Write config.yaml again with these values laid over those it holds.

    A mapping is merged key by key, and is never replaced by a single value: the resolved
    configuration of ``optimizer`` outlives the hyper-parameter that holds the optimizer itself.

    Args:
        path: The file; it is made if it is missing.
        params: JSON-safe values.

    Raises:
        OSError: It could not be read or written.
        ValueError: The file that is there is not a YAML mapping; it is left alone.
    """
    try:
        old = yaml.safe_load(path.read_text("utf-8")) or {}
    except FileNotFoundError:
        old = {}
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` must be YAML, got {error}.") from error
    if not isinstance(old, dict):
        raise ValueError(f"`{path}` must hold a mapping, got {type(old).__name__}.")
    merged = _merged(old, params)
    if merged != old or not path.exists():
        write_text(path, yaml.safe_dump(merged, sort_keys=False, allow_unicode=True))


def _merged(old: Mapping[str, Json], new: Mapping[str, Json]) -> dict[str, Json]:
    result = dict(old)
    for key, value in new.items():
        before = result.get(key)
        if isinstance(before, dict):
            if isinstance(value, dict):
                result[key] = _merged(before, value)
            continue
        result[key] = value
    return result


def _describe(value: object) -> object:
    if isinstance(value, functools.partial):
        args = {"_args_": value.args} if value.args else {}
        return {"_target_": _describe(value.func), "_partial_": True, **args, **value.keywords}
    named = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
    module = getattr(named, "__module__", None)
    name = getattr(named, "__qualname__", type(named).__name__)
    return name if module in (None, "builtins") else f"{module}.{name}"
