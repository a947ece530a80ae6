"""What is installed is what is in the tree, and it works away from the tree."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TREE = Path(__file__).parents[1]
PROJECT = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]

IMPORT_ALL = """
import importlib, pkgutil, sys
importlib.import_module(sys.argv[1])
import lightning_diag
names = ["lightning_diag"]
names += [one.name for one in pkgutil.walk_packages(lightning_diag.__path__, "lightning_diag.")]
for name in names:
    print(name, importlib.import_module(name).__file__)
"""
LIBRARY = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
pl = importlib.import_module(sys.argv[1])
import torch
from lightning_diag import Components, GradientHealth, RunLogger, read_run

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = pl.Trainer(
    callbacks=[GradientHealth(Components({"net": "net.*"}), every_n_steps=2, on_error="raise")],
    logger=RunLogger("runs/mine"), max_epochs=1, accelerator="cpu", enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False,
)
trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(8, 3)))
print(read_run("runs/mine").grad["step"].unique().sort().to_list())
"""
USERS_APP = """
import hydra
from hydra.utils import instantiate

@hydra.main(config_path=".", config_name="app", version_base="1.3")
def main(config):
    print([type(one).__name__ for one in instantiate(config.callbacks, _convert_="all").values()])

main()
"""
USERS_CONFIG = """
defaults:
  - callbacks: [gradient_health, lr_monitor]
hydra:
  searchpath: ["pkg://lightning_diag.conf"]
  run: {dir: .}
  output_subdir: null
"""


def call(*command, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is packaged, so that building leaves nothing behind in the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("lightning_diag", "conf"):
        ignored = shutil.ignore_patterns("__pycache__", "version_*")
        shutil.copytree(TREE / name, copy / name, ignore=ignored)
    for name in filter(None, ("pyproject.toml", "LICENSE", PROJECT.get("readme"))):
        shutil.copy(TREE / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """The wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree, cwd=folder)
    return next(folder.glob("*.whl"))


def empty_environment(folder):
    """A virtual environment that has the dependencies, and nothing of this checkout.

    The path file adds a plain folder: the hook of an editable install in it is not run.
    """
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=TREE)
    python = folder / "bin" / "python"
    where = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    Path(where.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip(python, *arguments, cwd):
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    call(sys.executable, "-m", "pip", "--python", python, "install", *options, *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    python = empty_environment(folder / "venv")
    pip(python, wheel, cwd=folder)
    return python


def packaged(tree):
    """The files of the tree that belong into the wheel, under their names in it."""
    package = [path for path in (tree / "lightning_diag").rglob("*") if path.is_file()]
    conf = [path for path in (tree / "conf").rglob("*") if path.is_file()]
    return {path.relative_to(tree).as_posix() for path in package} | {
        f"lightning_diag/conf/{path.relative_to(tree / 'conf').as_posix()}" for path in conf
    }


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_tree_and_no_other(tree, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if name.startswith("lightning_diag/")}
    assert inside == packaged(tree)
    assert "lightning_diag/py.typed" in inside
    assert "lightning_diag/conf/callbacks/gradient_health.yaml" in inside
    rest = names - inside
    assert all(re.match(r"lightning_diag-[\d.]+\.dist-info/", name) for name in rest)
    assert any(name.endswith("LICENSE") for name in rest)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_every_module_imports_from_the_wheel(tree, installed, tmp_path, package):
    lines = call(installed, "-c", IMPORT_ALL, package, cwd=tmp_path).splitlines()
    found = dict(line.split(" ", 1) for line in lines)
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in packaged(tree)
        if name.endswith(".py")
    }
    assert set(found) == modules
    home = installed.parents[1]
    assert all(Path(place).is_relative_to(home) for place in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_the_library_works_from_the_wheel(installed, tmp_path, package):
    assert call(installed, "-c", LIBRARY, package, cwd=tmp_path).strip() == "[1, 3, 5, 7]"
    command = installed.parent / "lightning-diag"
    assert "report.html" in call(command, "report", "runs/mine", "--no-fail", cwd=tmp_path)


def write_app(folder):
    (folder / "app.py").write_text(USERS_APP)
    (folder / "app.yaml").write_text(USERS_CONFIG)
    return folder / "app.py"


@pytest.mark.slow
def test_a_users_own_app_finds_the_configuration_in_the_wheel(installed, tmp_path):
    built = call(installed, write_app(tmp_path), cwd=tmp_path)
    assert built.strip() == "['GradientHealth', 'LearningRateMonitor']"


@pytest.mark.slow
def test_an_editable_install_serves_new_files_at_once(tree, tmp_path):
    copy = shutil.copytree(tree, tmp_path / "tree")
    python = empty_environment(tmp_path / "venv")
    pip(python, "--editable", copy, cwd=tmp_path)
    app = write_app(tmp_path)
    assert "GradientHealth" in call(python, app, cwd=tmp_path)
    (copy / "conf" / "callbacks" / "mine.yaml").write_text("mine: {_target_: builtins.dict}\n")
    assert call(python, app, "callbacks=[mine]", cwd=tmp_path).strip() == "['dict']"


def requirements():
    """Every requirement of every extra, but the package's own extras among them."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(text) for group in groups for text in group]
    return [one for one in found if one.name != "lightning-diag"]


def pins():
    lines = (TREE / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_the_pinned_version_satisfies_the_range(requirement):
    pinned = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned, prereleases=True)


def test_the_makefile_installs_the_torch_that_is_pinned():
    makefile = (TREE / "Makefile").read_text()
    assert f"TORCH := torch=={pins()['torch']}\n" in makefile


def test_the_extra_all_takes_in_every_extra_a_user_can_want():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(Requirement(everything).extras) == set(extras) - {"all", "dev"}


def test_the_version_has_one_source():
    import lightning_diag

    assert PROJECT["dynamic"] == ["version"]
    assert metadata.version("lightning-diag") == lightning_diag.__version__
