"""What a learning rate depends on, as a flat table: the key under which it is kept."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_diag.lightning import LightningModule, Trainer
from lightning_diag.tuning.learning_rate import multiples
from lightning_diag.tuning.lr_search import accumulation
from lightning_diag.tuning.snapshot import Snapshot, same_random_numbers

__all__ = ["ALGORITHM", "key_parts"]

ALGORITHM = 1
"""Version of the search; another one finds other learning rates."""

_LRS = {"lr", "initial_lr", "max_lr", "min_lr", "learning_rate", "base_lr"}
_NOT_TRAINING = {"training", "seed", "trainer", "random_state"}
_LIBRARIES = {"torch", "pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics"}
_SAMPLES = 3
_PLAIN = (bool, int, float, complex, str, bytes, torch.device, torch.dtype)
_FEW = 256  # elements of what is looked into
_SMALL = 1 << 16  # bytes of what may be a data set's memory
_DEEP = 6


def key_parts(
    trainer: Trainer,
    pl_module: LightningModule,
    optimizer: Optimizer,
    search: Mapping[str, object],
    *,
    values: bool = False,
) -> dict[str, object]:
    """What the result of a learning rate range test depends on, name by name.

    The model: classes and their code, names, shapes and types of its parameters, and what its
    modules hold besides (a dropout rate, a loss's ``reduction``, class weights, functions with the
    code that they use); the optimizer: class, options, ratios between its groups; the effective
    batch; precision and clipping; the data; the search; torch. Learning rate, seed, order of the
    data and number of workers are left out, so runs that differ in these alone share a key.

    The data are what the data module's ``fingerprint`` says where it has one. Otherwise they are
    class and length of the training set and three of its samples, read with fixed random numbers;
    of an iterable data set, class and settings alone.

    Args:
        trainer: The trainer, in ``on_train_start``.
        pl_module: Its module.
        optimizer: The optimizer whose learning rate is searched.
        search: Settings of the search.
        values: Whether the initial values of the parameters count too: then each seed has a key.

    Returns:
        Dotted names and plain values; long content as a hash.
    """
    parts: dict[str, object] = {
        "algorithm": ALGORITHM,
        "torch": torch.__version__,
        "model": type(pl_module).__qualname__,
        "model.code": _digest(_code(type(part) for part in pl_module.modules())),
        "model.settings": _digest(_settings(pl_module)),
        "model.parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
        "model.shapes": _digest(_shapes(pl_module)),
        "optimizer": type(optimizer).__qualname__,
        "batch": _effective_batch(trainer),
        "batches": _limited(trainer),
        "precision": str(trainer.precision),
        "clip.value": trainer.gradient_clip_val,
        "clip.algorithm": str(trainer.gradient_clip_algorithm or "norm"),
    }
    parts |= {f"optimizer.{name}": value for name, value in _options(optimizer).items()}
    parts |= {f"search.{name}": value for name, value in search.items()}
    parts |= {f"data.{name}": value for name, value in _data(trainer).items()}
    if values:
        parts["model.values"] = _digest(_bytes(p) for p in pl_module.parameters())
    return parts


def _shapes(module: nn.Module) -> Iterator[str]:
    for name, parameter in sorted(module.named_parameters(), key=lambda pair: pair[0]):
        kind = "trained" if parameter.requires_grad else "frozen"
        yield f"{name} {tuple(parameter.shape)} {parameter.dtype} {kind}"


def _code(kinds: Iterable[type]) -> Iterator[str]:
    """The code of classes and of what they inherit, where they are not a library's."""
    seen: dict[int, object] = {}
    every = {base for kind in kinds for base in kind.__mro__}
    for kind in sorted(every, key=lambda kind: (kind.__module__, kind.__qualname__)):
        if kind is not object and not _of_library(kind):
            yield kind.__qualname__
            for name, member in sorted(vars(kind).items()):
                if not name.startswith("__") or name in ("__init__", "__call__", "__getitem__"):
                    yield f"{name} {_described(member, seen)}"


def _of_library(value: object) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in _LIBRARIES


def _described(value: Any, seen: dict[int, object], depth: int = 0) -> str:  # noqa: ANN401
    """What a loss may depend on in a value, the same in every process."""
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    if id(value) in seen or depth > _DEEP:
        return type(value).__qualname__
    seen[id(value)] = value  # held, so that its id stays its own

    def inner(one: object) -> str:
        return _described(one, seen, depth + 1)

    if isinstance(value, Tensor):
        small = value.numel() <= _FEW and value.layout == torch.strided
        return f"{tuple(value.shape)} {_digest([_bytes(value)]) if small else ''}"
    if isinstance(value, list | tuple | set | frozenset | Mapping) and len(value) > _FEW:
        return f"{type(value).__qualname__} of {len(value)}"
    if isinstance(value, Mapping):
        # in one order: what was seen before is told by its kind alone
        kept = sorted(((str(key), one) for key, one in value.items() if _counts(key)), key=_first)
        return str([(key, inner(one)) for key, one in kept])
    if isinstance(value, list | tuple):
        return str([inner(one) for one in value])
    if isinstance(value, set | frozenset):
        return str([inner(one) for one in sorted(value, key=repr)])
    if isinstance(value, partial):
        return inner([value.func, value.args, value.keywords])
    if isinstance(value, staticmethod | classmethod | MethodType):
        return inner(value.__func__)
    if isinstance(value, property):
        return inner(value.fget)
    if isinstance(value, nn.Module | Trainer) or (not callable(value) and _of_library(type(value))):
        return type(value).__qualname__
    return _described_code(inspect.unwrap(value) if callable(value) else value, inner)


def _first(pair: tuple[str, object]) -> str:
    return pair[0]


def _described_code(value: Any, inner: Callable[[object], str]) -> str:  # noqa: ANN401
    if isinstance(value, FunctionType):
        if _of_library(value):
            return f"{value.__module__}.{value.__qualname__}"
        names = sorted(_names(value.__code__) & set(value.__globals__))
        used = {name: value.__globals__[name] for name in names}
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        rest = inner([value.__defaults__, value.__kwdefaults__, used, cells])
        return f"{_instructions(value.__code__)} {rest}"
    if isinstance(value, type) or type(value).__module__ in ("builtins", "torch"):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return f"{type(value).__qualname__} {inner(getattr(value, '__dict__', None))}"


def _is_filled(cell: Any) -> bool:  # noqa: ANN401
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _names(code: CodeType) -> set[str]:
    inside = [_names(one) for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*inside)


def _counts(name: object) -> bool:
    """Whether a setting of this name may change what is learnt."""
    text = str(name)
    return text not in _LRS | _NOT_TRAINING and not text.endswith(("_seed", "_dir", "_path"))


def _instructions(code: CodeType) -> str:
    documented = bool(code.co_consts) and isinstance(code.co_consts[0], str)
    constants = [_constant(one) for one in code.co_consts[documented:]]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _constant(value: object) -> str:
    if isinstance(value, CodeType):
        return _instructions(value)
    # a set's order changes from process to process
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _settings(module: nn.Module) -> Iterator[str]:
    """What the modules hold besides weights: numbers, words, functions, buffers."""
    usual = (set(vars(nn.Module())) | set(vars(LightningModule()))) - {"_hparams"}
    seen: dict[int, object] = {}
    for name, part in module.named_modules():
        library = _of_library(type(part))
        own = {
            key: value
            for key, value in vars(part).items()
            if key not in usual and not (library and key.startswith("_"))
        }
        yield f"{name} {type(part).__qualname__} {_described(own, seen)}"
        for buffer in part.buffers(recurse=False):
            yield _described(buffer, seen)


def _options(optimizer: Optimizer) -> dict[str, object]:
    """Options that are the same in all groups once, the others as a list by group."""
    groups = optimizer.param_groups
    names = sorted({key for group in groups for key in group} - _LRS - {"params", "name"})
    found: dict[str, object] = {}
    for name in names:
        each = [_plain(group.get(name)) for group in groups]
        found[name] = each[0] if all(one == each[0] for one in each) else each
    found["group_sizes"] = [sum(p.numel() for p in group["params"]) for group in groups]
    found["group_ratios"] = multiples(optimizer)
    return found


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _effective_batch(trainer: Trainer) -> object:
    sizes = []
    for loader in _leaves(trainer.train_dataloader):
        sampler = getattr(loader, "batch_sampler", None)
        own = getattr(loader, "batch_size", None)
        sizes.append(own if own is not None else getattr(sampler, "batch_size", None))
    factor = accumulation(trainer) * trainer.world_size
    whole = [size * factor if isinstance(size, int) else None for size in sizes]
    return whole[0] if len(whole) == 1 else whole


def _limited(trainer: Trainer) -> int | None:
    """Batches of an epoch, where they are fewer than there are."""
    limit = trainer.limit_train_batches
    whole = isinstance(limit, float) and limit == 1.0
    return None if whole else int(trainer.num_training_batches)


def _data(trainer: Trainer) -> dict[str, object]:
    module = getattr(trainer, "datamodule", None)
    found = _fingerprint(module)
    if module is not None:
        found["code"] = _digest(_code([type(module)]))
    if "fingerprint" in found:
        return found
    for place, loader in enumerate(_leaves(trainer.train_dataloader)):
        prefix = f"{place}." if place else ""
        data = getattr(loader, "dataset", loader)
        found |= {f"{prefix}{name}": value for name, value in _dataset(data).items()}
        if isinstance(loader, DataLoader):
            found[f"{prefix}sampler"] = type(loader.sampler).__qualname__
            found[f"{prefix}collate"] = _digest([_described(loader.collate_fn, {})])
    return found


def _fingerprint(data: object) -> dict[str, object]:
    """What the data say of themselves, in whatever form."""
    own = getattr(data, "fingerprint", None)
    if own is None or callable(own):
        return {}
    text = own if isinstance(own, str) else json.dumps(own, sort_keys=True, default=repr)
    return {"fingerprint": _digest([text])}


def _dataset(data: Any) -> dict[str, object]:  # noqa: ANN401
    own = _fingerprint(data)
    if own:
        return own
    length = _length(data)
    while isinstance(data, Subset):  # which part a seed chose does not matter, its size does
        data = data.dataset
    found: dict[str, object] = {"class": type(data).__qualname__, "length": length}
    found["class.code"] = _digest(_code([type(data)]))
    if isinstance(data, IterableDataset):
        found["settings"] = _digest([_described(vars(data), {})])
    elif isinstance(data, Dataset | list | tuple):
        found["samples"] = _samples(data)
    return found


def _length(data: Any) -> int | None:  # noqa: ANN401
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _samples(data: Any) -> str | None:  # noqa: ANN401
    """A hash of some samples, read as if nobody had read them."""
    length = _length(data)
    if not length:
        return None
    kept = Snapshot(data, largest=_SMALL)
    try:
        with same_random_numbers():
            torch.manual_seed(0)
            places = sorted({i * (length - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)})
            return _digest(_content(data[place]) for place in places)
    except Exception:
        return None  # it is no sequence after all
    finally:
        kept.restore()


def _content(value: object) -> bytes:
    if isinstance(value, Tensor):
        return _bytes(value)
    if isinstance(value, Mapping):
        return b"".join(str(key).encode() + _content(one) for key, one in value.items())
    if isinstance(value, tuple | list):
        return b"".join(_content(one) for one in value)
    if hasattr(value, "tobytes"):
        return bytes(value.tobytes())
    if isinstance(value, bool | int | float | str | None):
        return repr(value).encode()
    inside = getattr(value, "__dict__", None)
    return _content(inside) if isinstance(inside, dict) else type(value).__qualname__.encode()


def _bytes(value: Tensor) -> bytes:
    plain = value.detach().cpu().contiguous()
    return str(tuple(plain.shape)).encode() + plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def _leaves(loaders: Any) -> Iterator[Any]:  # noqa: ANN401
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from _leaves(loader)
    elif loaders is not None:
        yield loaders


def _digest(pieces: Iterable[str | bytes]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        content = piece if isinstance(piece, bytes) else json.dumps(piece).encode()
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()[:16]
