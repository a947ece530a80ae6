"""Which modules to look at, what their attention is called, and what their keys stand for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lightning_diag.spelling import did_you_mean, nearest

__all__ = ["AttentionNames", "Place", "checked_names"]

_MOST_QUERIES = 64


@dataclass(frozen=True)
class Place:
    """One module's attention.

    Attributes:
        module: The module's name without wrapper prefixes.
        label: What its rows carry as component.
        part: The component of the model that the module belongs to, where some are named.
        named: Whether the user has named it: it then gets rows by query.
        keys: What the keys stand for.
        queries: What the groups of queries stand for.
    """

    module: str
    label: str
    part: str | None = None
    named: bool = False
    keys: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()

    def groups(self, queries: int) -> int:
        """Number of groups of so many queries: one a name, or one each if they are few."""
        if not self.named:
            return 0
        if self.queries and queries >= len(self.queries):
            return len(self.queries)
        return queries if queries <= _MOST_QUERIES else 1


@dataclass(frozen=True)
class _Named:
    name: str
    attribute: str | None


class AttentionNames:
    """The names of one model's attention.

    Args:
        modules: Every module by name.
        capture: Name to the glob of a module, or to ``module.attribute``.
        key_names: A name of `capture`, or the glob of a module, to the names of its keys.
        query_names: The same for queries.
        patterns: Component to globs; modules outside of all are not looked at. None: all are.

    Attributes:
        modules: Every module by name.
        wrong: Sentences about names that match nothing.
        outside: Modules with attention that lie outside `patterns`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        capture: Mapping[str, str],
        key_names: Mapping[str, Sequence[str]],
        query_names: Mapping[str, Sequence[str]],
        patterns: Mapping[str, Sequence[str]] | None,
    ) -> None:
        self.modules = modules
        self._patterns = patterns
        self._capture = capture
        self._keys, self._queries = key_names, query_names
        self._places: dict[str, Place | None] = {}
        self._captured: dict[str, _Named] = {}
        self.wrong: list[str] = []
        self.outside: set[str] = set()
        for name, target in capture.items():
            self._resolve(name, target)
        for argument, names in (("key_names", key_names), ("query_names", query_names)):
            for name in names:
                if name not in capture and not _matching(name, modules):
                    near = did_you_mean(name, [*capture, *filter(None, modules)])
                    self.wrong.append(f"`{name}` of `{argument}` matches nothing; {near}")

    @property
    def captured(self) -> dict[str, nn.Module]:
        """The modules that `capture` names."""
        return {name: self.modules[name] for name in self._captured}

    @property
    def asked(self) -> set[str]:
        """The names that `capture` gives to modules that exist."""
        return {named.name for named in self._captured.values()}

    def name_of(self, module: str) -> str | None:
        """What `capture` calls a module, or the module that it lies in."""
        root = self._root(module)
        return None if root is None else self._captured[root].name

    def place(self, module: str) -> Place | None:
        """How the attention of a module is called; None if it is not to be looked at."""
        if module not in self._places:
            self._places[module] = self._place(module)
        return self._places[module]

    def handed_out(self, module: str, output: object) -> Iterator[Tensor]:
        """The tensors that a captured module hands out, which may be weights."""
        named = self._captured.get(module)
        if named is None:
            return
        source = output
        if named.attribute is not None:
            source = getattr(self.modules[module], named.attribute, None)
        yield from _tensors(source)

    def _place(self, module: str) -> Place | None:
        root = self._root(module)
        part = next(
            (p for p, globs in (self._patterns or {}).items() if _inside(module, globs)), None
        )
        if root is None and part is None and self._patterns is not None:
            self.outside.add(module or "model")
            return None
        label = module or "model"
        names = [module]
        if root is not None:
            name = self._captured[root].name
            several = sum(named.name == name for named in self._captured.values()) > 1
            label = (f"{name}.{root}" if several else name) + module[len(root) :]
            names.insert(0, name)
        keys = _named_for(names, self._keys)
        queries = _named_for(names, self._queries)
        named = root is not None or bool(keys or queries)
        return Place(module, label, part, named, keys, queries)

    def _root(self, module: str) -> str | None:
        while module and module not in self._captured:
            module = module.rpartition(".")[0]
        return module or None

    def _resolve(self, name: str, target: str) -> None:
        found, attribute = _matching(target, self.modules), None
        if not found and "." in target:
            glob, _, attribute = target.rpartition(".")
            found = _matching(glob, self.modules)
        unknown = attribute is not None and not any(
            hasattr(self.modules[module], attribute) for module in found
        )
        # an attribute may come into being with the first forward, a misspelt module never does
        if not found or (unknown and nearest(target, filter(None, self.modules))):
            near = did_you_mean(target, filter(None, self.modules))
            self.wrong.append(f"`{target}` of `capture` matches no module; {near}")
        for module in found:
            self._captured.setdefault(module, _Named(name, attribute))


def checked_names(argument: str, names: object) -> dict[str, list[str]]:
    """Names of keys or queries as given to the constructor, as plain lists.

    Args:
        argument: What the argument is called.
        names: Its value.

    Raises:
        TypeError: If it is no mapping of names to lists of text.
        ValueError: If a list is empty.
    """
    if names is None:
        return {}
    if not isinstance(names, Mapping):
        kind = type(names).__name__
        raise TypeError(f"`{argument}` must be a mapping of names to lists of names, got {kind}.")
    for name, listed in names.items():
        text = isinstance(listed, str) or not isinstance(listed, Sequence)
        if text or not all(isinstance(one, str) for one in listed):
            raise TypeError(f"`{argument}` of `{name}` must be a list of names, got {listed!r}.")
        if not listed:
            raise ValueError(f"`{argument}` of `{name}` must hold at least one name, got none.")
    return {str(name): list(listed) for name, listed in names.items()}


def _matching(glob: str, modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name in modules if name and fnmatchcase(name, glob)]


def _inside(module: str, globs: Sequence[str]) -> bool:
    pieces = module.split(".")
    above = [".".join(pieces[:depth]) for depth in range(1, len(pieces) + 1)]
    return any(fnmatchcase(name, glob) for glob in globs for name in above)


def _named_for(names: Sequence[str], lists: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    for name in names:
        for glob, listed in lists.items():
            if name and fnmatchcase(name, glob):
                return tuple(listed)
    return ()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
