"""Which name was meant: the nearest right one for a name that does not exist."""

import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping

__all__ = ["did_you_mean", "leaf_keys", "locate", "nearest", "takes", "unknown_arguments"]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name most like a misspelt one, or None where nothing is like it.

    A dotted name is also compared by its last part, so that `lr` finds `optimizer.lr`.

    Args:
        name: what was written.
        names: what could have been written.

    Returns:
        The nearest name.

    Example:
        >>> nearest("optimiser.lr", ["optimizer.lr", "optimizer.eps"])
        'optimizer.lr'
        >>> nearest("lr", ["model.width", "optimizer.lr"])
        'optimizer.lr'
    """
    candidates = list(names)
    same_end = [key for key in candidates if key.endswith(f".{name}")]
    if same_end:
        return min(same_end, key=len)
    parent, _, last = name.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in candidates if key.rpartition(".")[0] == parent]
    if siblings and parent:  # without the part they share, which would make all of them alike
        near = difflib.get_close_matches(last, siblings, n=1, cutoff=0.5)
        return f"{parent}.{near[0]}" if near else None
    near = difflib.get_close_matches(name, candidates, n=1)
    return near[0] if near else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the second half of an error's sentence: the nearest name, else all there are.

    Args:
        name: what was written.
        names: what could have been written.

    Returns:
        The words after the semicolon.

    Example:
        >>> did_you_mean("gradient_helth", ["lr_monitor", "gradient_health"])
        'did you mean `gradient_health`?'
        >>> did_you_mean("xyz", ["cpu", "auto"])
        'there are auto, cpu.'
    """
    candidates = sorted(names)
    near = nearest(name, candidates)
    if near is not None:
        return f"did you mean `{near}`?"
    return f"there are {', '.join(candidates)}." if candidates else "there are none."


def leaf_keys(tree: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every key of a nested mapping, inner nodes included.

    Args:
        tree: the mapping.
        prefix: what stands before each name.

    Yields:
        The dotted names.

    Example:
        >>> list(leaf_keys({"optimizer": {"lr": 1.0}, "seed": 42}))
        ['optimizer', 'optimizer.lr', 'seed']
    """
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaf_keys(value, f"{prefix}{key}.")


def locate(path: str) -> object:
    """Return the object that a dotted path names, importing the modules on the way.

    Args:
        path: a path such as `torch.optim.AdamW`.

    Returns:
        The object.

    Raises:
        ImportError: if a module on the way cannot be imported.
        AttributeError: if a module has no such name; the message has the nearest one.
    """
    parts = path.split(".")
    found: object = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], start=1):
        parent = ".".join(parts[:place])
        if not hasattr(found, part):
            try:
                importlib.import_module(f"{parent}.{part}")
            except ModuleNotFoundError as error:
                if error.name != f"{parent}.{part}":
                    raise
                names = [name for name in dir(found) if not name.startswith("_")]
                near = nearest(part, names)
                hint = f"did you mean `{parent}.{near}`?" if near else "check the path."
                raise AttributeError(f"`{parent}` has no `{part}`; {hint}") from None
        found = getattr(found, part)
    return found


def takes(tree: Mapping[str, object], key: str) -> str | None:
    """Return the target that has an argument of this name, where only the configuration lacks it.

    Args:
        tree: the configuration as plain mappings.
        key: a dotted name.

    Returns:
        The dotted path of the target, or None.

    Example:
        >>> takes({"optimizer": {"_target_": "torch.optim.SGD"}}, "optimizer.momentum")
        'torch.optim.SGD'
    """
    *parents, argument = key.split(".")
    node: object = tree
    for parent in parents:
        node = node.get(parent) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        return None
    target = str(node["_target_"])
    try:
        taken = inspect.signature(locate(target)).parameters  # type: ignore[arg-type]
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return target if argument in taken else None


def unknown_arguments(node: object, path: str = "") -> Iterator[str]:
    """Yield one sentence for each thing that is wrong with the `_target_` nodes of a configuration.

    Args:
        node: the configuration as plain mappings and lists.
        path: the dotted name of `node`.

    Yields:
        A sentence for a target that does not exist, or an argument that it does not take.
    """
    if isinstance(node, list):
        for index, value in enumerate(node):
            yield from unknown_arguments(value, f"{path}[{index}]")
    if not isinstance(node, Mapping):
        return
    if isinstance(node.get("_target_"), str):
        yield from _wrong_target(node, path)
    for key, value in node.items():
        yield from unknown_arguments(value, f"{path}.{key}" if path else str(key))


def _wrong_target(node: Mapping[str, object], path: str) -> Iterator[str]:
    target = str(node["_target_"])
    try:
        taken = inspect.signature(locate(target)).parameters  # type: ignore[arg-type]
    except (ImportError, AttributeError) as error:
        yield f"`{path}` names `{target}`, which cannot be imported: {error}"
        return
    except (TypeError, ValueError):  # no signature to compare with
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    for key in node:
        if key not in taken and not (key.startswith("_") and key.endswith("_")):
            yield f"`{path}.{key}` is no argument of `{target}`; {did_you_mean(key, taken)}"
