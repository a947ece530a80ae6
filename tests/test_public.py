"""Is the public surface small, lazy and light?"""

import ast
import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_diag

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(lightning_diag.__path__, "lightning_diag.")
)


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", lightning_diag.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(lightning_diag, name)
    assert value.__name__ == name
    assert value.__doc__.partition("\n")[0].rstrip().endswith((".", "?"))
    assert getattr(lightning_diag, name) is value
    assert name in dir(lightning_diag)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="module `lightning_diag` has no attribute `nothing`"):
        lightning_diag.nothing  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    heavy = ["torch", "numpy", "polars", "hydra", "omegaconf", "pytorch_lightning", "lightning"]
    loaded = python(f"import sys, lightning_diag; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


def test_a_diagnostic_loads_nothing_heavy_but_torch_and_lightning():
    heavy = ["polars", "altair", "sklearn", "hydra", "omegaconf", "starlette", "matplotlib", "rich"]
    code = f"""
import sys, pytorch_lightning
before = set(sys.modules)
from lightning_diag import GradientHealth, RunLogger, Components, param_groups, read_run, diagnose
new = set(sys.modules) - before
print([m for m in {heavy} if m in new])
"""
    assert python(code) == "[]"


def test_type_checkers_see_the_names_that_are_loaded():
    tree = ast.parse(Path(lightning_diag.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(seen) == set(lightning_diag.__all__)
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(lightning_diag, name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0


def test_all_is_sorted_and_says_everything():
    assert sorted(lightning_diag.__all__) == list(lightning_diag.__all__)
    assert set(lightning_diag.__all__) <= set(dir(lightning_diag))
    version = lightning_diag.__version__.split(".")
    assert len(version) == 3
    assert all(number.isdigit() for number in version)
