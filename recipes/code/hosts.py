"""Real functions of the installed sympy, cut out of its source as hosts for injected flows."""

import ast
import importlib.metadata
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Host", "package_hosts", "package_version"]

_IDENTIFIER = re.compile(r"[^\W\d]\w*")


class Host(NamedTuple):
    """One real function, ready to have statements put between its own.

    Attributes:
        key: where it comes from, as ``core/add.py::Add.flatten``.
        lines: its source without the docstring, first line at column 0.
        cuts: indices into ``lines``; a statement put before one of these lines is reached by every
            call that reaches the line.
        indent: the white space in front of the function's own statements.
    """

    key: str
    lines: tuple[str, ...]
    cuts: tuple[int, ...]
    indent: str

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def identifiers(self) -> frozenset[str]:
        return frozenset(_IDENTIFIER.findall(self.text))


def package_version(package: str = "sympy") -> str:
    """The version of the installed package that the hosts come from."""
    return importlib.metadata.version(package)


def package_hosts(package: str = "sympy", *, min_lines: int = 4, max_lines: int = 60) -> list[Host]:
    """Every function of an installed package that is neither too short nor too long.

    Tests are left out, and of several functions with one text only the first stays. The order is
    that of the sorted file names, so it is the same on every machine.

    Args:
        package: name of the package; it is read as text and not imported.
        min_lines: fewest source lines after the docstring has been removed.
        max_lines: most source lines after the docstring has been removed.

    Returns:
        The hosts.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    hosts: dict[str, Host] = {}
    root = _package_root(package)
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if not _is_test(name):
            for host in _file_hosts(path.read_text(encoding="utf-8"), name):
                if min_lines <= len(host.lines) <= max_lines:
                    hosts.setdefault(host.text, host)
    return list(hosts.values())


def _package_root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The corpus takes its functions from the package `{package}`, which is not installed."
        )
    return Path(spec.submodule_search_locations[0])


def _is_test(name: str) -> bool:
    *folders, file = name.split("/")
    return file.startswith("test_") or not {"tests", "testing"}.isdisjoint(folders)


def _file_hosts(source: str, file: str) -> Iterator[Host]:
    lines = source.splitlines()
    for name, node in _functions(ast.parse(source), ""):
        host = _cut_out(node, lines, f"{file}::{name}")
        if host is not None:
            yield host


def _functions(tree: ast.AST, scope: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield scope + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{scope}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from _functions(node, scope)


def _cut_out(node: ast.FunctionDef, source: list[str], key: str) -> Host | None:
    first, last = node.lineno, node.end_lineno or node.lineno
    body = node.body
    hidden = range(0)
    if ast.get_docstring(node, clean=False) is not None:
        hidden = range(body[0].lineno, (body[0].end_lineno or 0) + 1)
        body = body[1:]
    if not body or not _one_a_line(body, first, source):
        return None
    kept = [number for number in range(first, last + 1) if number not in hidden]
    text = textwrap.dedent("\n".join(source[number - 1] for number in kept))
    lines = tuple(text.splitlines())
    cuts = tuple(kept.index(number) for number in _reached(body))
    opening = lines[cuts[0]]
    host = Host(key, lines, cuts, opening[: len(opening) - len(opening.lstrip())])
    return host if _parses(text) and len(lines) == len(kept) else None


def _one_a_line(body: list[ast.stmt], header: int, source: list[str]) -> bool:
    ends = [header, *((statement.end_lineno or 0) for statement in body)]
    for statement, end in zip(body, ends, strict=False):
        first = _start(statement)
        if first <= end or source[first - 1][: statement.col_offset].strip():
            return False
    return True


def _reached(body: list[ast.stmt]) -> Iterator[int]:
    for statement in body:
        yield _start(statement)
        if isinstance(statement, ast.Return | ast.Raise):
            return


def _start(statement: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
