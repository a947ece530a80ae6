"""Does the house stand as DESIGN.md drew it: who imports whom, and the five places of a name?"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import lightning_diag
from lightning_diag.callbacks import Diagnostic

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_diag"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("recipes/**/*.py")])

# what each part may import from lightning_diag, besides itself
MAY_IMPORT = {
    "__init__": None,
    "cli": None,
    "lightning": set(),
    "components": {"spelling"},
    "spelling": set(),
    "functional": set(),
    "records": {"lightning", "spelling"},
    "callbacks": {"lightning", "components", "functional", "records", "spelling"},
    "suites": {"callbacks", "components"},
    "rules": {"records", "spelling"},
    "report": {"records", "rules", "spelling"},
    "monitor": {"records", "rules", "report", "spelling"},
    "tuning": {"lightning", "components", "functional", "records", "spelling"},
    "commands": None,
    "conf": set(),
}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
HYDRA = {"hydra", "omegaconf"}
# made where they are used, since importing them takes long
HEAVY = {
    *("sklearn", "polars", "altair", "vl_convert", "starlette", "uvicorn", "matplotlib"),
    *("scipy", "pandas", "torchmetrics", "wandb", "sympy", "torch_geometric"),
}
# what stands in the way of a rule, and may
HEALTH_ALERTS = "callbacks/health_"
HEALTH_CHARTS = "callbacks/health_charts.py"
LR_CACHE = "callbacks/lr_cache.py"


class Import:
    """One imported module, and whether it is loaded when the file is."""

    def __init__(self, module: str, names: list[str], at_start: bool, line: int) -> None:
        self.module = module
        self.names = names
        self.at_start = at_start
        self.line = line

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports(path: Path) -> list[Import]:
    return list(_imports(ast.parse(path.read_text()), at_start=True))


def _imports(node: ast.AST, *, at_start: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for name in child.names:
                yield Import(name.name, [], at_start, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            names = [name.name for name in child.names]
            yield Import(child.module or "", names, at_start, child.lineno)
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _imports(child, at_start=at_start and not later and not typing)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def own(paths: list[Path]) -> list[Path]:
    return [path for path in paths if PACKAGE in path.parents]


def parts_imported(found: Import) -> set[str]:
    if found.top != "lightning_diag":
        return set()
    below = found.module.split(".")[1:]
    return {below[0]} if below else set(found.names)


def test_every_part_is_known():
    assert {part_of(path) for path in own(SOURCES)} <= set(MAY_IMPORT)
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", own(SOURCES), ids=named)
def test_imports_point_one_way(path):
    part = part_of(path)
    allowed = MAY_IMPORT[part]
    if allowed is None:
        return
    if HEALTH_ALERTS in named(path):
        allowed = allowed | {"rules"}
    if HEALTH_CHARTS in named(path):
        allowed = allowed | {"report"}
    if LR_CACHE in named(path):
        allowed = allowed | {"tuning"}
    for found in imports(path):
        wrong = parts_imported(found) - allowed - {part, "__version__"}
        assert not wrong, f"line {found.line}: {part} must not import {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_doors_are_used(path):
    for found in imports(path):
        place = f"line {found.line}: {found.module}"
        if named(path) != "lightning_diag/lightning.py":
            assert found.top not in LIGHTNING, place
        if named(path) != "lightning_diag/cli.py":
            assert found.top not in HYDRA, place
        if PACKAGE in path.parents:
            assert found.top not in {"recipes", "tests", "notebooks", "benchmarks"}, place


@pytest.mark.parametrize("path", own(SOURCES), ids=named)
def test_heavy_imports_are_made_where_they_are_used(path):
    for found in imports(path):
        assert not (found.at_start and found.top in HEAVY), f"line {found.line}: {found.module}"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_underscore_name_crosses_a_file(path):
    for found in imports(path):
        if found.top in {"lightning_diag", "recipes"}:
            private = [name for name in [*found.module.split("."), *found.names] if _private(name)]
            assert not private, f"line {found.line}: {private}"


def _private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=named)
def test_no_configuration_names_something_private(path):
    for target in re.findall(r"_target_:\s*(\S+)", path.read_text()):
        assert not any(_private(name) for name in target.split(".")), target


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").glob("*.py")), ids=named)
def test_functional_needs_torch_alone(path):
    import sys

    allowed = {"torch", "lightning_diag", *sys.stdlib_module_names}
    for found in imports(path):
        inside = found.top in {"sklearn", "numpy"} and not found.at_start
        assert found.top in allowed or inside, f"line {found.line}: {found.module}"
    calls = {
        node.func.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert not calls & {"item", "cpu"}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_recipes_use_the_public_names(path):
    if PACKAGE in path.parents:
        return
    for found in imports(path):
        if found.top == "lightning_diag":
            public = found.module in {"lightning_diag", "lightning_diag.lightning"}
            assert public or found.module.startswith("lightning_diag.functional."), found.line


def test_one_callback_never_imports_another():
    folder = PACKAGE / "callbacks"
    homes = {Path(inspect.getfile(kind)).stem for kind in diagnostics().values()}
    for path in folder.glob("*.py"):
        if path.stem == "__init__":
            continue
        for found in imports(path):
            for home in homes - {path.stem}:
                assert found.module != f"lightning_diag.callbacks.{home}", path


def diagnostics() -> dict[str, type[Diagnostic]]:
    """The public diagnostics, by name."""
    public = {name: getattr(lightning_diag, name) for name in lightning_diag.__all__}
    return {
        name: kind
        for name, kind in public.items()
        if isinstance(kind, type) and issubclass(kind, Diagnostic)
    }


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@pytest.mark.parametrize("name", diagnostics())
def test_a_diagnostic_has_its_five_places(name):
    place = snake(name)
    assert (PACKAGE / "callbacks" / f"{place}.py").is_file()
    assert (ROOT / "conf" / "callbacks" / f"{place}.yaml").is_file()
    assert (ROOT / "tests" / "callbacks" / f"test_{place}.py").is_file()
    if (PACKAGE / "functional" / f"{place}.py").is_file():
        assert (ROOT / "tests" / "functional" / f"test_{place}.py").is_file()


@pytest.mark.parametrize("name", diagnostics())
def test_a_configuration_lists_every_argument_with_its_default(name):
    text = (ROOT / "conf" / "callbacks" / f"{snake(name)}.yaml").read_text()
    assert text.startswith("# ")
    ((key, settings),) = yaml.safe_load(text).items()
    assert key == snake(name)
    assert settings.pop("_target_") == f"lightning_diag.{name}"
    # what another group may fill in stands with its default: ${oc.select:key,default}
    values = {
        argument: yaml.safe_load(match[1]) if (match := _SELECT.fullmatch(str(value))) else value
        for argument, value in settings.items()
    }
    signature = inspect.signature(diagnostics()[name]).parameters
    assert values == {argument: one.default for argument, one in signature.items()}


_SELECT = re.compile(r"\$\{oc\.select:[^,]+,\s*(.+)\}")
