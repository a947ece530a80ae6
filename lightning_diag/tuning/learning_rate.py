"""The one learning rate that stands for an optimizer, and setting it wherever it is written."""

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_diag.lightning import LightningModule

__all__ = ["base_lr", "multiples", "set_base_lr", "set_group_lrs", "set_module_lr"]

# what a scheduler keeps of the learning rate in a parameter group (OneCycleLR: the last two)
_KEYS = ("lr", "initial_lr", "max_lr", "min_lr")
_LARGEST_DENOMINATOR = 100_000


def base_lr(optimizer: Optimizer, schedulers: Iterable[Any] = ()) -> float:
    """The learning rate that a person would type for this optimizer.

    That is the one it was made with, if a parameter group has it; else that of the first group
    which has the largest. A group counts with the rate that its scheduler multiplies (its peak,
    where that is what the scheduler was given), not with that of a warm-up's first step.

    Args:
        optimizer: Any optimizer whose groups have an ``lr``.
        schedulers: Those of this optimizer.

    Raises:
        ValueError: If no group has a learning rate above 0.

    Example:
        >>> weight, bias = torch.nn.Linear(2, 2).parameters()
        >>> groups = [{"params": [weight], "lr": 1e-4}, {"params": [bias]}]
        >>> base_lr(torch.optim.SGD(groups, lr=1e-3))
        0.001
    """
    rates = _group_lrs(optimizer, schedulers)
    if not any(rate > 0 for rate in rates):
        raise ValueError(f"An optimizer must have a learning rate above 0, got {rates}.")
    made_with = float(optimizer.defaults.get("lr") or 0.0)
    return made_with if made_with in rates and made_with > 0 else max(rates)


def multiples(optimizer: Optimizer) -> list[float]:
    """What each group's learning rate is, in units of `base_lr`."""
    base = base_lr(optimizer)
    return [_multiple(rate, base) for rate in _group_lrs(optimizer, ())]


def set_group_lrs(optimizer: Optimizer, lr: float, factors: Iterable[float]) -> None:
    """Give each group ``factor * lr`` for its next step; its scheduler is left as it is."""
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        _write(group, "lr", factor * lr)


def set_base_lr(optimizer: Optimizer, schedulers: Iterable[Any], lr: float) -> None:
    """Make the optimizer and its schedulers what they would be, had they been made with `lr`.

    Every learning rate in the groups (``lr``, ``initial_lr``, ``max_lr``, ``min_lr``) and in the
    schedulers (``base_lrs``, ``max_lrs``), those inside of chained ones too, keeps its ratio to
    the base. Ratios are taken as the simplest fraction that gives the present value to the last
    bit, so the numbers are those that the same configuration with another `lr` would give.

    Args:
        optimizer: Before its first step.
        schedulers: Those of this optimizer.
        lr: The new `base_lr`, above 0.
    """
    schedulers = _all_schedulers(schedulers)
    base = base_lr(optimizer, schedulers)
    for group in optimizer.param_groups:
        for key in _KEYS:
            # groups share the tensor that the optimizer was made with
            if isinstance(group.get(key), torch.Tensor):
                group[key] = group[key].clone()
    for group in optimizer.param_groups:
        initial = float(group.get("initial_lr", group["lr"]))
        # the schedule's first factor is one of the group's own rate
        first = _multiple(float(group["lr"]), initial)
        for key in _KEYS[1:]:
            if key in group:
                _write(group, key, _multiple(float(group[key]), base) * lr)
        _write(group, "lr", first * (_multiple(initial, base) * lr))
    made_with = optimizer.defaults.get("lr")
    if isinstance(made_with, int | float):
        # of groups that are added later
        optimizer.defaults["lr"] = _multiple(float(made_with), base) * lr
    for scheduler in schedulers:
        if not type(scheduler).__module__.startswith("torch.optim"):
            for name, value in vars(scheduler).items():
                if _is(value, base):
                    setattr(scheduler, name, lr)
        for name in ("base_lrs", "max_lrs", "_last_lr"):
            kept = getattr(scheduler, name, None)
            if isinstance(kept, list) and kept:
                setattr(scheduler, name, _scaled(name, kept, optimizer, base, lr))


def set_module_lr(pl_module: LightningModule, old: float, new: float) -> list[str]:
    """Set ``lr`` or ``learning_rate`` of the module and of its hyper-parameters, where it is `old`.

    Returns:
        What was set, such as ``["hparams.lr", "lr"]``.
    """
    done = []
    for name in ("lr", "learning_rate"):
        if _is(pl_module.hparams.get(name), old):
            pl_module.hparams[name] = new
            done.append(f"hparams.{name}")
        # a property may not be set, and shows what it is made of
        if _is(vars(pl_module).get(name), old):
            setattr(pl_module, name, new)
            done.append(name)
    return done


def _is(value: object, lr: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # a rate that went through a tensor is rounded to single precision
    return number and math.isclose(float(value), lr, rel_tol=1e-6)  # type: ignore[arg-type]


def _group_lrs(optimizer: Optimizer, schedulers: Iterable[Any]) -> list[float]:
    """The rate of each group that its schedule reaches, or starts from."""
    for scheduler in schedulers:
        peaks = getattr(scheduler, "max_lrs", None)  # of CyclicLR
        if isinstance(peaks, list) and len(peaks) == len(optimizer.param_groups):
            return [float(peak) for peak in peaks]
    keys = ("max_lr", "initial_lr", "lr")
    return [
        float(next((group[key] for key in keys if key in group), 0.0))
        for group in optimizer.param_groups
    ]


def _scaled(
    name: str, kept: list[Any], optimizer: Optimizer, base: float, lr: float
) -> list[float]:
    if name == "_last_lr":
        return [float(group["lr"]) for group in optimizer.param_groups]
    return [_multiple(float(rate), base) * lr for rate in kept]


def _all_schedulers(schedulers: Iterable[Any]) -> list[Any]:
    """Schedulers, and those that they hold."""
    found: list[Any] = []
    waiting = list(schedulers)
    while waiting:
        scheduler = waiting.pop(0)
        if any(scheduler is one for one in found):
            continue
        found.append(scheduler)
        for value in vars(scheduler).values():
            inner = value if isinstance(value, list | tuple) else [value]
            waiting += [one for one in inner if hasattr(one, "last_epoch")]
    return found


def _multiple(value: float, base: float) -> float:
    """The simplest q with ``q * base == value`` in floating point."""
    if base == 0:
        return 0.0
    simplest = float(Fraction(value / base).limit_denominator(_LARGEST_DENOMINATOR))
    return simplest if simplest * base == value else value / base


def _write(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group[key], torch.Tensor):
        # a capturable optimizer reads it where it is
        group[key].fill_(value)
    else:
        group[key] = value
