"""Parameters and optimizers laid side by side: who is in whose hands, and who is tied to whom."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_diag.callbacks.base import Row
from lightning_diag.callbacks.optimizers import own_parameters
from lightning_diag.callbacks.wiring_tensors import attribute
from lightning_diag.components import OTHER, Assignment, parameter_names, weight_of

__all__ = [
    "Book",
    "Subject",
    "Ties",
    "hidden_parameters",
    "listed",
    "twin_pairs",
    "untied_by_config",
]

_MOST_MEMBERS = 1000
_NAMED = 4


class Subject(NamedTuple):
    """One parameter of the model."""

    component: str
    name: str
    parameter: Parameter


class Book:
    """The parameters of a model, and the optimizer that each belongs to.

    Args:
        assignment: The parts of the model.
        optimizers: Those of the Trainer.
    """

    def __init__(self, assignment: Assignment, optimizers: Sequence[Optimizer]) -> None:
        self.subjects = [
            Subject(component, name, parameter)
            for component, members in assignment.parameters.items()
            for name, parameter in members.items()
        ]
        self.by_id = {id(subject.parameter): subject for subject in self.subjects}
        self.optimized = {id(p) for optimizer in optimizers for p in own_parameters(optimizer)}
        self.strangers = len(self.optimized - self.by_id.keys())
        self._sizes: dict[str, int] = {}
        for subject in self.subjects:
            size = self._sizes.get(subject.component, 0)
            self._sizes[subject.component] = size + _numel(subject.parameter)
        self.total = sum(self._sizes.values())

    def subject(self, parameter: Parameter) -> Subject:
        """A parameter by component and name; one that the model does not have is "?"."""
        return self.by_id.get(id(parameter)) or Subject(OTHER, "?", parameter)

    def unoptimized(self) -> list[Subject]:
        """Trainable parameters that no optimizer has."""
        return [
            subject
            for subject in self.subjects
            if subject.parameter.requires_grad and id(subject.parameter) not in self.optimized
        ]

    def frozen_in_optimizer(self) -> list[Subject]:
        """Frozen parameters that an optimizer has."""
        return [
            subject
            for subject in self.subjects
            if not subject.parameter.requires_grad and id(subject.parameter) in self.optimized
        ]

    def rows(self, check: str, subjects: Iterable[Subject], **more: object) -> list[Row]:
        """A row for every component that has some of the subjects, all of them wrong."""
        parts: dict[str, list[Subject]] = {}
        for subject in subjects:
            parts.setdefault(subject.component, []).append(subject)
        rows = []
        for component, members in parts.items():
            size = sum(_numel(subject.parameter) for subject in members)
            row: Row = {"component": component, "check": check, "state": "wrong", **more}
            row |= {"count": len(members), "parameters": size}
            row["share"] = size / self.total if self.total else None
            whole = self._sizes.get(component, 0)
            row["component_share"] = size / whole if whole else None
            row["names"] = listed([subject.name for subject in members])
            rows.append(row)
        return rows


def hidden_parameters(
    modules: Mapping[str, nn.Module], known: Container[int]
) -> list[tuple[str, Parameter]]:
    """Parameters with a gradient that modules keep in plain lists, which PyTorch passes by.

    Args:
        modules: All modules of the model, by name.
        known: The ``id`` of the model's own parameters, and of those that optimizers have.

    Returns:
        Names, as in ``layers[1].weight``, and parameters; a part that no gradient reaches is kept
        apart on purpose, as teachers are.
    """
    found: dict[int, tuple[str, Parameter]] = {}
    for owner, module in modules.items():
        for slot, value in vars(module).items():
            plain = isinstance(value, list | tuple | dict) and not slot.startswith("_")
            # a list that is longer keeps numbers, and no layers
            if not plain or len(value) > _MOST_MEMBERS:
                continue
            members = value.items() if isinstance(value, dict) else enumerate(value)
            for key, member in members:
                place = f"{owner}.{slot}[{key}]" if owner else f"{slot}[{key}]"
                for name, one in _parameters_in(place, member):
                    wanting = one.requires_grad and one.grad is not None
                    if wanting and id(one) not in known:
                        found.setdefault(id(one), (name, one))
    return list(found.values())


def _parameters_in(place: str, member: object) -> list[tuple[str, Parameter]]:
    if isinstance(member, Parameter):
        return [(place, member)]
    if isinstance(member, nn.Module):
        return [(f"{place}.{name}", one) for name, one in member.named_parameters()]
    return []


def listed(names: Sequence[str], most: int = _NAMED) -> str:
    """The first few names in words, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


class Ties:
    """Parameters that stand under several names, and whether they still do.

    Args:
        groups: Names that stood for one parameter.
    """

    def __init__(self, groups: Sequence[Sequence[str]] = ()) -> None:
        self.groups = [list(group) for group in groups]

    def learn(self, model: nn.Module) -> None:
        """Take note of what is tied now, beside what has been known before."""
        known = {tuple(group) for group in self.groups}
        names: dict[int, list[str]] = {}
        for name, parameter in parameter_names(model):
            names.setdefault(id(parameter), []).append(name)
        new = [group for group in names.values() if len(group) > 1 and tuple(group) not in known]
        self.groups += new

    def broken(self, model: nn.Module) -> list[tuple[str, str]]:
        """Pairs of names that stood for one parameter and stand for two now."""
        now = dict(parameter_names(model)) if self.groups else {}
        return [
            (group[0], name)
            for group in self.groups
            for name in group[1:]
            if group[0] in now and name in now and now[group[0]] is not now[name]
        ]


def untied_by_config(modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """Input and output embeddings that a Hugging Face configuration calls tied, and are not.

    Args:
        modules: All modules of the model, by name.
    """
    names = {id(module): name for name, module in modules.items()}
    found = []
    for name, module in modules.items():
        if not attribute(module, "_tied_weights_keys"):
            continue
        config = attribute(module, "config")
        if attribute(config, "tie_word_embeddings", False) is not True:
            continue
        try:
            first, second = (getattr(module, f"get_{x}_embeddings")() for x in ("input", "output"))
        except Exception:
            # it is the user's: whatever it raises, there is nothing to compare
            continue
        if not isinstance(first, nn.Module) or not isinstance(second, nn.Module):
            continue
        a, b = weight_of(first), weight_of(second)
        if a is not None and b is not None and a is not b and a.shape == b.shape:
            places = (names.get(id(part), name) for part in (first, second))
            one, other = (f"{place}.weight" for place in places)
            found.append((one, other))
    return found


def twin_pairs(
    modules: Mapping[str, nn.Module],
) -> list[tuple[str, str, Parameter, Parameter]]:
    """Embeddings and linear maps of one shape: two parameters that may be meant as one.

    Args:
        modules: All modules of the model, by name.
    """
    weights = {
        name: (part, weight_of(part))
        for name, part in modules.items()
        if isinstance(part, (nn.Embedding, nn.Linear))
    }
    known = [(f"{name}.weight", part, w) for name, (part, w) in weights.items() if w is not None]
    embeddings = [(name, weight) for name, part, weight in known if isinstance(part, nn.Embedding)]
    maps = [(name, weight) for name, part, weight in known if isinstance(part, nn.Linear)]
    pairs = [
        (one, other, a, b)
        for one, a in embeddings
        for other, b in maps
        if a is not b and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    ]
    return pairs[:4] if all(type(x) is Parameter for _, _, a, b in pairs for x in (a, b)) else []


def _numel(parameter: Parameter) -> int:
    return 0 if torch.nn.parameter.is_lazy(parameter) else parameter.numel()
