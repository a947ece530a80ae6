"""Components: which parameters and modules belong to which named part of a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn import Parameter

from lightning_diag.spelling import did_you_mean

__all__ = [
    "Assignment",
    "Components",
    "matches",
    "module_names",
    "param_groups",
    "parameter_names",
    "weight_of",
]

OTHER = "other"
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

Patterns = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Assignment:
    """The parts of one model: every parameter in exactly one component.

    Attributes:
        parameters: Component to its parameters by name, in the order of the components; a tied
            parameter stands once, under its first name.
        modules: Component to the outermost modules that lie wholly inside it, by name.
        notes: What the user should know: patterns without a match, overlaps, tied parameters.
    """

    parameters: dict[str, dict[str, Parameter]]
    modules: dict[str, dict[str, nn.Module]]
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The components, in order."""
        return list(self.parameters)

    def owners(self) -> dict[int, tuple[str, str]]:
        """``id(parameter)`` to its component and its name."""
        return {
            id(parameter): (component, name)
            for component, members in self.parameters.items()
            for name, parameter in members.items()
        }


class Components:
    """The parts of a model that a diagnostic speaks of.

    Without patterns the parts are the top-level children that have parameters, found below any
    lone wrapper (a module whose only child with parameters is another module). With patterns each
    part is named by the user, and takes every parameter whose dotted name, or a module name in
    front of it, matches one of its globs: ``encoder``, ``encoder.*`` and ``*.layers.0`` all take
    whole modules. The first component that matches wins, and ``other`` takes the rest.

    The prefixes that wrappers put into names (``_orig_mod`` of `torch.compile`, ``module`` of data
    parallel wrappers and the like) are left out.

    Args:
        patterns: Component to a glob or several globs, in order of precedence; None for the
            default parts.

    Raises:
        TypeError: If `patterns` is not a mapping of names to globs.
        ValueError: If a component has an empty name or no glob.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> Components().assign(model).names
        ['encoder', 'head']
        >>> Components({"biases": "*.bias"}).assign(model).names
        ['biases', 'other']
    """

    def __init__(self, patterns: "Patterns | Components | None" = None) -> None:
        self.patterns: dict[str, list[str]] | None
        if isinstance(patterns, Components):
            self.patterns = patterns.patterns
        else:
            self.patterns = None if patterns is None else _checked(patterns)

    def __repr__(self) -> str:
        return f"Components({self.patterns!r})"

    def assign(self, model: nn.Module) -> Assignment:
        """Distribute the parameters and modules of `model` over the components.

        Args:
            model: The network; nothing in it is changed.

        Returns:
            Every parameter under exactly one component. Patterned components appear even when they
            are empty; ``other`` appears when it is needed.
        """
        names = parameter_names(model)
        if self.patterns is None:
            return _by_children(model, names)
        return _by_patterns(model, names, self.patterns)


def parameter_names(model: nn.Module) -> list[tuple[str, Parameter]]:
    """Every name of every parameter, without wrapper prefixes; tied parameters come repeatedly.

    Args:
        model: The network.

    Returns:
        Pairs of dotted name and parameter, in the order of `Module.named_parameters`.
    """
    clean = _clean_prefixes(model)
    return [
        (_join(clean[prefix], name), parameter)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of a model once, by dotted name without wrapper prefixes; the model is "".

    Args:
        model: The network.

    Example:
        >>> list(module_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
        ['', '0', '1']
    """
    clean = _clean_prefixes(model)
    # a wrapper comes before what it wraps, under the same name; the last of them is the module
    return {clean[name]: module for name, module in model.named_modules()}


def weight_of(module: nn.Module) -> Parameter | None:
    """The parameter ``weight`` of a module; None where it has none, or computes it.

    A parametrization computes its tensor at every look, and may change state or draw random numbers
    in doing so: the attribute of a user's module is not ours to ask for.

    Args:
        module: Any module.
    """
    return dict(module.named_parameters(recurse=False)).get("weight")


def matches(name: str, glob: str) -> bool:
    """Whether a glob takes a dotted name: the name itself, or a module in front of it.

    Args:
        name: Dotted name of a parameter or module.
        glob: A pattern as in file names.

    Example:
        >>> matches("net.encoder.0.weight", "net.encoder"), matches("net.head", "encoder")
        (True, False)
    """
    if fnmatchcase(name, glob):
        return True
    return any(
        fnmatchcase(name[:index], glob) for index, letter in enumerate(name) if letter == "."
    )


def param_groups(
    model: nn.Module,
    lrs: Mapping[str, float | None],
    default: float | None = None,
    *,
    base_lr: float | None = None,
    components: Components | Patterns | None = None,
) -> list[dict[str, object]]:
    """Optimizer parameter groups that give every component a learning rate of its own.

    Schedulers that multiply keep the ratios of the groups: `LambdaLR`, `LinearLR`,
    `CosineAnnealingLR` down to 0, `ReduceLROnPlateau`, and chains of these. A floor, ``eta_min`` or
    ``min_lr``, is one rate for all groups: near it the ratios go, and ``eta_min`` lifts a group
    that lies below. `OneCycleLR` and `CyclicLR` set every group to the rates they are given: give
    them one for each group, as in the example.

    A rate of 0 stops the updates of a part and nothing else: it still costs a backward pass, and
    counts in the norm that is clipped. ``requires_grad_(False)`` before this call freezes it, and
    leaves it out of the groups. A tied parameter belongs to one component, see `Components`. A run
    that is resumed has the rates of its checkpoint, whatever is given here.

    Args:
        model: The network; its frozen parameters are left out.
        lrs: Component to learning rate, or to a multiplier where `base_lr` is given; None as if
            the component were not named. Without `components` a key names a top-level part or,
            failing that, is a glob over names, of which the first that matches wins.
        default: Learning rate (or multiplier) of all other parameters; without it `base_lr` (or
            multiplier 1), or the optimizer's own default where neither is given.
        base_lr: The learning rate that multipliers refer to.
        components: The parts of the model; their names and ``other`` are then the only keys.

    Returns:
        Groups ``{"params", "lr", "name"}`` for a `torch.optim.Optimizer`, in the order of the
        components; empty groups are left out. The name is what `LearningRateMonitor` shows; parts
        that `lrs` does not name make up one group, ``other``, unless it names that one too.

    Raises:
        TypeError: If `lrs` is not a mapping, or a rate is not a number.
        ValueError: If a rate is negative or not finite, or a key of `lrs` names no component.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> groups = param_groups(model, {"encoder": 0.1}, base_lr=1e-2)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('encoder', 0.001), ('other', 0.01)]
        >>> import torch
        >>> optimizer = torch.optim.AdamW(groups)
        >>> peaks = [group["lr"] for group in optimizer.param_groups]
        >>> schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=100)
        >>> [round(group["lr"], 6) for group in optimizer.param_groups]  # a 25th of each, to begin
        [4e-05, 0.0004]
    """
    rates = _rates(lrs)
    for name, given in {"default": default, "base_lr": base_lr}.items():
        _check_rate(name, given)
    parts = _parts_for(model, rates, components)
    factor = 1.0 if base_lr is None else base_lr
    rest = default if default is not None else (1.0 if base_lr is not None else None)
    groups: dict[str, dict[str, object]] = {}
    for component, members in parts.items():
        rate = rates.get(component, rest)
        name = component if component in rates or OTHER in rates else OTHER
        trainable = [parameter for parameter in members.values() if parameter.requires_grad]
        if not trainable:
            continue
        group = groups.setdefault(name, {"params": [], "name": name})
        group["params"] += trainable  # type: ignore[operator]
        if rate is not None:
            group["lr"] = rate * factor
    return list(groups.values())


def _rates(lrs: Mapping[str, float | None]) -> dict[str, float]:
    if not isinstance(lrs, Mapping):
        raise TypeError(
            f"Learning rates must be a mapping of components to numbers, got {type(lrs).__name__}."
        )
    for name, rate in lrs.items():
        _check_rate(name, rate)
    return {name: rate for name, rate in lrs.items() if rate is not None}


def _check_rate(name: str, rate: float | None) -> None:
    if rate is None:
        return
    if isinstance(rate, bool) or not hasattr(rate, "__float__"):
        raise TypeError(f"Learning rates must be numbers, got {rate!r} for `{name}`.")
    if not 0 <= rate < float("inf"):
        raise ValueError(f"Learning rates must be at least 0 and finite, got {rate} for `{name}`.")


def _parts_for(
    model: nn.Module, lrs: Mapping[str, float], components: Components | Patterns | None
) -> dict[str, dict[str, Parameter]]:
    assignment = Components(components).assign(model)
    parts = [part for part in assignment.names if assignment.parameters[part]]
    if components is None and not set(lrs) <= set(assignment.names):
        # a key that names a part takes it, any other is a glob
        globs = {name: list(assignment.parameters.get(name, ())) or [name] for name in lrs}
        assignment = Components(globs).assign(model)
    for name in lrs:
        if not assignment.parameters.get(name):
            taken = _taken(name, assignment)
            if taken:
                raise ValueError(f"`{name}` has nothing left to have a learning rate for: {taken}")
            names = [name for name, _ in parameter_names(model)] if components is None else []
            near = f"{nearest(name, [*parts, *_prefixes(names)])}." if names else ""
            near = near or did_you_mean(name, parts)
            raise ValueError(
                f"A learning rate must be for a component of the model, got `{name}`; {near}"
            )
    return assignment.parameters


def _taken(name: str, assignment: Assignment) -> str | None:
    """The note that says who has the parameters of a component that has none."""
    notes = (note for note in assignment.notes if f"`{name}`" in note)
    return next((note for note in notes if "matches nothing" not in note), None)


def nearest(name: str, known: Sequence[str]) -> str:
    """Words that name the nearest of `known`, for an error message.

    Args:
        name: What was asked for.
        known: What there is.

    Returns:
        "the nearest names are `a`, `b`", or the first few names where none is near.
    """
    unique = list(dict.fromkeys(known))
    near = get_close_matches(name, unique, n=3, cutoff=0.5)
    label = "the nearest names are" if near else "there are"
    shown = near or unique[:5]
    return f"{label} {', '.join(f'`{x}`' for x in shown)}" if shown else "there are no names"


def _checked(patterns: Patterns) -> dict[str, list[str]]:
    if not isinstance(patterns, Mapping):
        raise TypeError(
            f"`components` must be a mapping of names to globs, got {type(patterns).__name__}."
        )
    checked: dict[str, list[str]] = {}
    for name, globs in patterns.items():
        listed = [globs] if isinstance(globs, str) else globs
        if not isinstance(name, str) or not name:
            raise ValueError(f"A component must have a name, got {name!r}.")
        if not isinstance(listed, Sequence) or not listed:
            raise ValueError(f"Component `{name}` must have at least one glob, got {globs!r}.")
        if not all(isinstance(glob, str) and glob for glob in listed):
            raise ValueError(f"The globs of component `{name}` must be text, got {globs!r}.")
        checked[name] = list(listed)
    return checked


def _clean_prefixes(model: nn.Module) -> dict[str, str]:
    """Dotted module name to the same name without the segments that wrappers add."""
    modules = dict(model.named_modules(remove_duplicate=False))
    clean = {"": ""}
    for name in modules:
        if not name:
            continue
        parent, _, leaf = name.rpartition(".")
        drop = leaf in _WRAPPERS or (leaf == "module" and _is_lone(modules[parent]))
        clean[name] = clean[parent] if drop else _join(clean[parent], leaf)
    return clean


def _is_lone(parent: nn.Module) -> bool:
    return len(parent._modules) == 1 and not parent._parameters and not parent._buffers


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf


def _prefixes(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def _by_children(model: nn.Module, names: list[tuple[str, Parameter]]) -> Assignment:
    root, prefix = _descend(model)
    tops = {name: _title(name, prefix) for name, _ in _children(root)}
    parameters: dict[str, dict[str, Parameter]] = {title: {} for title in tops.values()}
    owner: dict[int, str] = {}
    notes = []
    start = f"{prefix}." if prefix else ""
    for name, parameter in names:
        top = name[len(start) :].partition(".") if name.startswith(start) else ("", "", "")
        component = tops[top[0]] if top[1] and top[0] in tops else OTHER
        first = owner.get(id(parameter))
        if first is None:
            owner[id(parameter)] = component
            parameters.setdefault(component, {})[name] = parameter
        elif first != component:
            notes.append(_tied_note(name, component, first))
    return Assignment(parameters, _modules_of(model, parameters), notes)


def _descend(model: nn.Module) -> tuple[nn.Module, str]:
    """The module whose children are the parts, and its name without wrapper prefixes."""
    clean = _clean_prefixes(model)
    root, raw = model, ""
    while True:
        children = _children(root)
        if len(children) != 1:
            return root, clean[raw]
        name, inner = children[0]
        path = _join(raw, name)
        while [leaf for leaf, _ in _children(inner)] in ([w] for w in (*_WRAPPERS, "module")):
            leaf, inner = _children(inner)[0]
            path = _join(path, leaf)
        if not _children(inner):
            return root, clean[raw]
        root, raw = inner, path


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children that have parameters."""
    return [(name, child) for name, child in module.named_children() if _has_parameters(child)]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _title(name: str, prefix: str) -> str:
    """A number alone says nothing: the children of a sequence carry its name in front."""
    return f"{prefix.rpartition('.')[2] or 'layer'}.{name}" if name.isdigit() else name


def _by_patterns(
    model: nn.Module, names: list[tuple[str, Parameter]], patterns: dict[str, list[str]]
) -> Assignment:
    hits: dict[str, list[str]] = {name: [] for name, _ in names}
    notes = []
    for component, globs in patterns.items():
        for glob in globs:
            matched = [name for name, _ in names if matches(name, glob)]
            for name in matched:
                if component not in hits[name]:
                    hits[name].append(component)
            if not matched:
                near = nearest(glob, list(_prefixes([name for name, _ in names])))
                notes.append(
                    f"Pattern `{glob}` of component `{component}` matches nothing; {near}."
                )
    order = {component: rank for rank, component in enumerate([*patterns, OTHER])}
    by_name = dict(names)
    aliases: dict[int, list[str]] = {}
    for name, parameter in names:
        aliases.setdefault(id(parameter), []).append(name)
    parameters: dict[str, dict[str, Parameter]] = {component: {} for component in patterns}
    overlaps: dict[tuple[str, ...], list[str]] = {}
    for same in aliases.values():
        claims = sorted({c for name in same for c in hits[name] or [OTHER]}, key=order.__getitem__)
        component = claims[0]
        parameters.setdefault(component, {})[same[0]] = by_name[same[0]]
        for name in same:
            if len(hits[name]) > 1:
                overlaps.setdefault(tuple(hits[name]), []).append(name)
            own = (hits[name] or [OTHER])[0]
            if own != component:
                notes.append(_tied_note(name, own, component))
    notes += [_overlap_note(rivals, members) for rivals, members in overlaps.items()]
    return Assignment(parameters, _modules_of(model, parameters), notes)


def _overlap_note(rivals: tuple[str, ...], names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    listed = " and ".join(f"`{rival}`" for rival in rivals)
    return f"{listed} both match `{names[0]}`{more}; `{rivals[0]}` stands first and takes them."


def _tied_note(name: str, component: str, first: str) -> str:
    return (
        f"`{name}` of component `{component}` is tied to a parameter of `{first}`; "
        f"it is counted once, there."
    )


def _modules_of(
    model: nn.Module, parameters: dict[str, dict[str, Parameter]]
) -> dict[str, dict[str, nn.Module]]:
    """The outermost modules whose parameters all lie in one component."""
    owner = {
        id(parameter): component
        for component, members in parameters.items()
        for parameter in members.values()
    }
    clean = _clean_prefixes(model)
    found: dict[str, dict[str, nn.Module]] = {component: {} for component in parameters}
    taken: set[str] = set()
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if name and parent in taken:
            taken.add(name)
            continue
        owners = {owner[id(parameter)] for parameter in module.parameters()}
        if len(owners) == 1 and clean[name]:
            found[owners.pop()][clean[name]] = module
            taken.add(name)
    return found
