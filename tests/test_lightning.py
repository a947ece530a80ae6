"""Which of the two Lightning packages does the door open to?"""

import importlib
from pathlib import Path

import pytest

from lightning_diag import lightning as door
from tests.test_public import python

NAMES = [name for name in door.__all__ if name != "PACKAGE"]


STAND_IN = """
class Callback: ...
class LightningDataModule: ...
class LightningModule: ...
class Trainer: ...
class Checkpoint: ...
class Logger: ...
rank_zero_info = rank_zero_only = rank_zero_warn = print
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder with stand-ins for both packages, which load at once."""
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text("from lightning import pytorch")
    for package in ("pytorch_lightning", "lightning/pytorch"):
        folder = tmp_path / package
        folder.mkdir()
        for module in ("__init__", "callbacks", "loggers", "utilities"):
            (folder / f"{module}.py").write_text(STAND_IN)
    return tmp_path


@pytest.mark.parametrize(
    ("first", "package"),
    [
        ("import pytorch_lightning", "pytorch_lightning"),
        ("import lightning.pytorch", "lightning.pytorch"),
        ("import lightning", "lightning.pytorch"),
        ("import pytorch_lightning, lightning.pytorch", "pytorch_lightning"),
        ("import lightning.pytorch, pytorch_lightning", "lightning.pytorch"),
        ("pass", "pytorch_lightning"),
    ],
)
def test_the_package_that_was_imported_first_decides(stand_ins, first, package):
    code = f"""
import sys
sys.path.insert(0, {str(stand_ins)!r})
{first}
from lightning_diag import lightning as door
import {package} as wanted, {package}.callbacks, {package}.loggers
assert door.Trainer is wanted.Trainer and door.Callback is wanted.Callback
assert door.Checkpoint is wanted.callbacks.Checkpoint and door.Logger is wanted.loggers.Logger
print(door.PACKAGE)
"""
    assert python(code) == package


@pytest.mark.parametrize(
    ("missing", "package"),
    [("lightning", "pytorch_lightning"), ("pytorch_lightning", "lightning.pytorch")],
)
def test_the_installed_package_is_taken_where_there_is_but_one(stand_ins, missing, package):
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(stand_ins)!r})
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {missing!r} else real(name, *a)
from lightning_diag.lightning import PACKAGE
print(PACKAGE, {missing!r} in sys.modules)
"""
    assert python(code) == f"{package} False"


def test_without_either_it_says_what_to_install():
    code = """
import importlib.util
importlib.util.find_spec = lambda name, *a: None
try:
    import lightning_diag.lightning
except ImportError as error:
    print(error)
"""
    assert python(code) == (
        "`lightning_diag` needs PyTorch Lightning: install `pytorch-lightning` or `lightning`; "
        "found neither."
    )


def test_diagnostics_belong_to_the_package_that_the_user_imported():
    other = "lightning.pytorch" if door.PACKAGE == "pytorch_lightning" else "pytorch_lightning"
    code = f"""
import sys
import {other} as wanted
from lightning_diag import GradientHealth, RunLogger
assert issubclass(GradientHealth, wanted.Callback)
assert issubclass(RunLogger, wanted.loggers.Logger)
wanted.Trainer(callbacks=[GradientHealth()], logger=False, accelerator="cpu")
print({door.PACKAGE!r} in sys.modules)
"""
    assert python(code) == "False"


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_the_packages_own(name):
    homes = [door.PACKAGE, *(f"{door.PACKAGE}.{x}" for x in ("callbacks", "loggers", "utilities"))]
    found = [getattr(importlib.import_module(home), name, None) for home in homes]
    assert any(value is getattr(door, name) for value in found)
