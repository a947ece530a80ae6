"""Settings that are far from what networks train with, and what is usual in their place."""

from collections.abc import Mapping
from typing import Any

from lightning_diag.rules.settings import (
    adaptive,
    look_up,
    number,
    optimizer_name,
    share,
    word,
)

__all__ = ["large_factors", "small_steps", "unusual_settings"]

_HIGHEST_ADAPTIVE_RATE = 0.03
_USUAL_ADAPTIVE_RATE = 3e-3
_HIGHEST_RATE = 1.0
_USUAL_RATE = 0.1
_LARGEST_EPSILON = 1e-3
_USUAL_EPSILON = 1e-8
_MOST_DAMPENING = 0.5
_TIGHTEST_CLIP = 1e-2
_USUAL_CLIP = 1.0
_USUAL_INIT = (0.5, 2.0)
_LONGEST_WARMUP = 0.5
_USUAL_WARMUP = 0.1
_MOST_DROPOUT = 0.6
_USUAL_DROPOUT = 0.1
_MOST_DECAY = 1.0
_MOST_COUPLED_DECAY = 0.1
_USUAL_DECAY = 0.01
_LARGEST_FACTOR = 10.0


def unusual_settings(config: Mapping[str, Any]) -> dict[str, object]:
    """Overrides that make every unusual setting usual.

    What a person looks at first who is shown a run that learns nothing, and not why: a rate above
    0.03 with Adam and its kin or above 1 with SGD (times one less the momentum), a clip below
    0.01, weights that start at less than half or more than twice their usual size, a sigmoid in
    hidden layers, a warm-up over half of the run, dropout above 0.6, a weight decay that leaves no
    weights, and a component with more than 10 times the rate of the others.

    Args:
        config: The configuration of the run.

    Returns:
        Overrides by dotted key; empty where all is usual.
    """
    found = small_steps(config) | _rates(config) | _network(config)
    clip = number(config, "trainer.gradient_clip_val")
    if clip is not None and clip < _TIGHTEST_CLIP:
        found["trainer.gradient_clip_val"] = _USUAL_CLIP
    decay = number(config, "optimizer.weight_decay")
    decoupled = optimizer_name(config) in ("adamw", "nadamw", "lion")
    most = _MOST_DECAY if decoupled else _MOST_COUPLED_DECAY
    if decay is not None and decay > most:
        found["optimizer.weight_decay"] = _USUAL_DECAY if decoupled else 0.0
    return found


def small_steps(config: Mapping[str, Any]) -> dict[str, object]:
    """Overrides for what makes steps small besides the rate: Adam's epsilon, SGD's dampening."""
    found: dict[str, object] = {}
    epsilon = number(config, "optimizer.eps")
    if epsilon is not None and epsilon > _LARGEST_EPSILON and adaptive(config):
        found["optimizer.eps"] = _USUAL_EPSILON
    dampening = number(config, "optimizer.dampening")
    if dampening is not None and dampening > _MOST_DAMPENING:
        found["optimizer.dampening"] = 0.0
    return found


def large_factors(config: Mapping[str, Any]) -> dict[str, float]:
    """The entries of ``component_lrs`` above 10 times the rate of the others."""
    factors = look_up(config, "component_lrs")
    if not isinstance(factors, Mapping):
        return {}
    return {
        str(name): float(factor)
        for name, factor in factors.items()
        if isinstance(factor, (int, float)) and factor > _LARGEST_FACTOR
    }


def _rates(config: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    rate = number(config, "optimizer.lr")
    if rate is not None and adaptive(config) and rate > _HIGHEST_ADAPTIVE_RATE:
        found["optimizer.lr"] = _USUAL_ADAPTIVE_RATE
    elif rate is not None and "sgd" in optimizer_name(config):
        brake = 1 - min(share(config, "optimizer.momentum") or 0.0, 0.99)
        if rate > _HIGHEST_RATE * brake:
            found["optimizer.lr"] = float(f"{_USUAL_RATE * brake:.3g}")
    large, factors = large_factors(config), look_up(config, "component_lrs")
    if large and isinstance(factors, Mapping):
        found["component_lrs"] = {**factors, **dict.fromkeys(large, 1.0)}
    return found


def _network(config: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    init = number(config, "model.init_scale")
    if init is not None and not _USUAL_INIT[0] <= init <= _USUAL_INIT[1]:
        found["model.init_scale"] = 1.0
    if word(config, "model.activation") in ("sigmoid", "hardsigmoid", "hard_sigmoid"):
        found["model.activation"] = "gelu"
    warmup = number(config, "model.warmup_share")
    if warmup is not None and warmup > _LONGEST_WARMUP:
        found["model.warmup_share"] = _USUAL_WARMUP
    dropout = number(config, "model.dropout")
    if dropout is not None and dropout > _MOST_DROPOUT:
        found["model.dropout"] = _USUAL_DROPOUT
    return found
