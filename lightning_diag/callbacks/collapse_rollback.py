"""A finite state of the training in memory, and the way back to it."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

__all__ = ["Snapshot", "cut_learning_rates", "nonfinite_entries"]

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_BASES = ("base_lrs", "max_lrs", "min_lrs")


class Snapshot:
    """Copies, on the host, of all parameters, buffers and optimizer states; of shards, the own.

    Schedulers, the gradient scaler, counters of steps and the data are not part of it: they go on.

    Args:
        module: The module that trains.
        optimizers: Its optimizers.
        step: The step after which this is taken.

    Attributes:
        step: The step after which it was taken.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], step: int) -> None:
        self.step = step
        copies: dict[int, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        for name, tensor in _tensors(module):
            # a tied parameter has two names and one copy
            if id(tensor) not in copies:
                copies[id(tensor)] = _host_copy(tensor)
            self.weights[name] = copies[id(tensor)]
        self.states = [
            {
                place: _kept(optimizer.state[parameter])
                for place, parameter in enumerate(_parameters(optimizer))
                if parameter in optimizer.state
            }
            for optimizer in optimizers
        ]

    def is_finite(self, but: frozenset[str]) -> bool:
        """Whether all of it is finite, without the entries of the module that need not be.

        Args:
            but: Names of entries that have been non-finite from the start.
        """
        weights = [tensor for name, tensor in self.weights.items() if name not in but]
        return all(_is_finite(tensor) for tensor in [*weights, *_leaves(self.states)])

    @torch.no_grad()
    def restore(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Write it back in place: every tensor stays the object that it is."""
        for name, tensor in _tensors(module):
            if name in self.weights:
                _local(tensor).copy_(self.weights[name])
        for optimizer, states in zip(optimizers, self.states, strict=True):
            for place, parameter in enumerate(_parameters(optimizer)):
                if place in states:
                    state, device = optimizer.state[parameter], _local(parameter).device
                    optimizer.state[parameter] = _put_back(state, states[place], device)
                else:
                    optimizer.state.pop(parameter, None)
            # gradients of the broken weights must not be accumulated any further
            optimizer.zero_grad(set_to_none=True)

    def replace_in(self, checkpoint: dict[str, Any]) -> None:
        """Give a checkpoint these weights and optimizer states instead of its own.

        Args:
            checkpoint: What Lightning is about to save; its entries are replaced, not written to.
        """
        weights = copy(checkpoint["state_dict"])
        for name in weights.keys() & self.weights.keys():
            weights[name] = self.weights[name].clone()
        checkpoint["state_dict"] = weights
        states = checkpoint.get("optimizer_states", [])
        if len(states) == len(self.states):
            checkpoint["optimizer_states"] = [
                {**state, "state": deepcopy(own)}
                for state, own in zip(states, self.states, strict=True)
            ]


def cut_learning_rates(
    optimizers: Sequence[Optimizer], schedulers: Sequence[Any], factor: float
) -> None:
    """Multiply the learning rate, now and in all that schedulers will make of it.

    Args:
        optimizers: Whose groups are changed: the rate, and the initial, smallest and largest one.
        schedulers: Whose base rates are changed; those of combined schedulers too.
        factor: What to multiply with.
    """
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        for key in _RATES:
            if isinstance(group.get(key), Tensor):
                with torch.no_grad():
                    group[key].mul_(factor)
            elif key in group:
                group[key] = group[key] * factor
    for scheduler in schedulers:
        for part in _parts(scheduler):
            for name in _BASES:
                if isinstance(getattr(part, name, None), list):
                    setattr(part, name, [rate * factor for rate in getattr(part, name)])


def nonfinite_entries(weights: Mapping[str, Any]) -> Tensor:
    """Which entries of a state are not all finite; nothing is read from the device.

    Args:
        weights: Tensors by name, or other values, which are finite.

    Returns:
        Booleans, one an entry, shape ``(n,)``.
    """
    flags = [
        ~torch.isfinite(_local(value)).all() if _has_numbers(value) else torch.tensor(False)
        for value in weights.values()
    ]
    home = next((flag.device for flag in flags if flag.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([flag.to(home) for flag in flags]) if flags else torch.zeros(0).bool()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    parameters = module.named_parameters(remove_duplicate=False)
    for name, tensor in chain(parameters, module.named_buffers(remove_duplicate=False)):
        # one that no forward has reached yet has no numbers
        if not is_lazy(tensor):
            yield name, tensor


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _host_copy(tensor: Tensor) -> Tensor:
    return _local(tensor.detach()).to("cpu", copy=True)


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _host_copy(value)
    if isinstance(value, Mapping):
        return {key: _kept(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_kept(item) for item in value]
    return deepcopy(value)


def _put_back(value: Any, saved: Any, device: torch.device) -> Any:
    """The saved value, in the tensors that are there already where they fit."""
    if isinstance(saved, Tensor):
        if isinstance(value, Tensor) and _local(value).shape == saved.shape:
            _local(value).copy_(saved)
            return value
        # a counter of steps stays on the host
        return saved.clone() if saved.dim() == 0 else saved.to(device, copy=True)
    if isinstance(saved, dict):
        old = value if isinstance(value, Mapping) else {}
        return {key: _put_back(old.get(key), item, device) for key, item in saved.items()}
    if isinstance(saved, list):
        old_items = value if isinstance(value, list | tuple) else []
        pairs = zip(saved, [*old_items, *[None] * len(saved)], strict=False)
        return [_put_back(old_item, item, device) for item, old_item in pairs]
    return deepcopy(saved)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _has_numbers(value: Any) -> bool:
    if not isinstance(value, Tensor) or is_lazy(value):
        return False
    return value.is_floating_point() or value.is_complex()


def _is_finite(tensor: Tensor) -> bool:
    return not _has_numbers(tensor) or bool(torch.isfinite(tensor).all())
