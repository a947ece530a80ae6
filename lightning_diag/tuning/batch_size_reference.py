"""A function by its place, so that a new process finds it without any pickle."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

__all__ = ["load", "reference"]

_RULE = (
    "`make` must be a function at the top of a file, for a new process to import it; got {found}."
)
_MAIN = "__mp_main__"  # the name that multiprocessing gives to a script that is imported again


def reference(make: Callable[..., object]) -> dict[str, str]:
    """The place of a function: its name, and the module or script that holds it.

    Args:
        make: A function, or a class or static method, at the top of a module or of a script.

    Returns:
        `name`, with `module` or `file`.

    Raises:
        TypeError: It cannot be imported by its name.
    """
    name = getattr(make, "__qualname__", None)
    module = sys.modules.get(getattr(make, "__module__", None) or "")
    if name is None or module is None or "<" in name or _found(module, name) != make:
        raise TypeError(_RULE.format(found=f"`{name or make!r}`"))
    if module.__name__ != "__main__":
        return {"name": name, "module": module.__name__}
    spec = getattr(module, "__spec__", None)
    if spec is not None:  # python -m package.module
        return {"name": name, "module": spec.name}
    file = Path(getattr(module, "__file__", None) or "")
    if not file.is_file():
        raise TypeError(_RULE.format(found=f"`{name}`, which was typed into a session"))
    return {"name": name, "file": str(file.resolve())}


def load(place: Mapping[str, str]) -> Callable[..., Any]:
    """The function at a place that `reference` gave.

    A script is run again, under a name for which `if __name__ == "__main__":` does not hold.
    """
    if "module" in place:
        module: object = importlib.import_module(place["module"])
    else:
        spec = importlib.util.spec_from_file_location(_MAIN, place["file"])
        if spec is None or spec.loader is None:
            raise ImportError(f"`{place['file']}` must be a Python file, got one of another kind.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[_MAIN] = sys.modules["__main__"] = module
        spec.loader.exec_module(module)
    return cast("Callable[..., Any]", _found(module, place["name"]))


def _found(module: object, name: str) -> object:
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
