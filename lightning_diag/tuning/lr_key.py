"""What a learning rate depends on, as a flat table: the key under which it is kept."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_diag.lightning import LightningModule, Trainer
from lightning_diag.tuning.learning_rate import multiples
from lightning_diag.tuning.snapshot import Snapshot, same_random_numbers

__all__ = ["ALGORITHM", "key_parts"]

ALGORITHM = 1
"""Version of the search; another one finds other learning rates."""

_LRS = {"lr", "initial_lr", "max_lr", "min_lr", "learning_rate", "base_lr"}
_NOT_TRAINING = {"training", "seed", "trainer", "prepare_data_per_node", "allow_zero_length"}
_LIBRARIES = {"torch", "pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics"}
_SAMPLES = 3
_FEW = 256  # elements, or bytes, of what may be a data set's memory


def key_parts(
    trainer: Trainer,
    pl_module: LightningModule,
    optimizer: Optimizer,
    search: Mapping[str, object],
    *,
    values: bool = False,
) -> dict[str, object]:
    """What the result of a learning rate range test depends on, name by name.

    The model: classes and their code, names, shapes and types of its parameters, and the plain
    numbers and words that its modules hold (a dropout rate, a loss's ``reduction``, a class
    weight); the optimizer: class, options, ratios between its groups; the effective batch;
    precision and clipping; the data; the search; torch. Learning rate, seed, order of the data and
    number of workers are left out, so runs that differ in these alone share a key.

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
        "model.code": _digest(_code(pl_module)),
        "model.settings": _digest(_settings(pl_module)),
        "model.parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
        "model.shapes": _digest(_shapes(pl_module)),
        "optimizer": type(optimizer).__qualname__,
        "batch": _effective_batch(trainer),
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


def _code(module: nn.Module) -> Iterator[str]:
    """The code of the module's classes and of its parts', where they are not a library's."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)):
        if kind is object or kind.__module__.partition(".")[0] in _LIBRARIES:
            continue
        yield kind.__qualname__
        for name, member in sorted(vars(kind).items()):
            function = inspect.unwrap(member) if callable(member) else member
            if isinstance(function, FunctionType):
                yield f"{name} {_instructions(function.__code__)}"


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
    for name, part in module.named_modules():
        kind = type(part).__qualname__
        plain = {
            key: value
            for key, value in vars(part).items()
            if not key.startswith("_") and key not in _LRS | _NOT_TRAINING and _is_plain(value)
        }
        yield f"{name} {kind} {sorted(plain.items())}"
        if hasattr(part, "reduction"):
            # a loss's class weights are no parameters
            yield from (_bytes(buffer).hex() for buffer in part.buffers())


def _is_plain(value: object) -> bool:
    """Numbers, and words that are no paths, times or sentences."""
    return (
        value is None
        or isinstance(value, bool | int | float)
        or (isinstance(value, str) and value.isidentifier())
    )


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
    factor = trainer.accumulate_grad_batches * trainer.world_size
    whole = [size * factor if isinstance(size, int) else None for size in sizes]
    return whole[0] if len(whole) == 1 else whole


def _data(trainer: Trainer) -> dict[str, object]:
    found = _fingerprint(getattr(trainer, "datamodule", None))
    if found:
        return found
    for place, loader in enumerate(_leaves(trainer.train_dataloader)):
        prefix = f"{place}." if place else ""
        data = getattr(loader, "dataset", loader)
        found |= {f"{prefix}{name}": value for name, value in _dataset(data).items()}
        if isinstance(loader, DataLoader):
            found[f"{prefix}sampler"] = type(loader.sampler).__qualname__
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
    if isinstance(data, Dataset | list | tuple) and not isinstance(data, IterableDataset):
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
    kept = Snapshot(data, largest=_FEW)
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
