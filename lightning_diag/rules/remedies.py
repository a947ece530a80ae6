"""Hydra overrides that try a suggestion, for the keys that a run's configuration really has."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_diag.rules.finding import Finding

__all__ = ["boost_component", "calm_steps", "leave_half_precision", "loosen_clip"]

_MISSING = object()


def _look_up(config: Mapping[str, Any], key: str) -> object:
    found: object = config
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return _MISSING
        found = found[part]
    return found


def _number(config: Mapping[str, Any], key: str) -> float | None:
    found = _look_up(config, key)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    return float(found) if math.isfinite(found) and found > 0 else None


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def _optimizer(config: Mapping[str, Any]) -> str:
    target = _look_up(config, "optimizer._target_")
    return target.rpartition(".")[2].lower() if isinstance(target, str) else ""


def calm_steps(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """A learning rate of 0.3 times the old one, and a clip that is tighter than the old one."""
    overrides: dict[str, object] = {}
    rate = _number(config, "optimizer.lr")
    if rate is not None:
        overrides["optimizer.lr"] = _round(0.3 * rate)
    if _look_up(config, "trainer.gradient_clip_val") is not _MISSING:
        clip = _number(config, "trainer.gradient_clip_val")
        tighter = 1.0 if clip is None or clip > 1.0 else _round(0.5 * clip)
        overrides["trainer.gradient_clip_val"] = tighter
    return overrides


def leave_half_precision(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """`calm_steps`, and bfloat16 in place of float16, whose range ends at 65504."""
    overrides = calm_steps(finding, config)
    for key in ("hardware.precision", "trainer.precision"):
        if str(_look_up(config, key)) in ("16", "16-mixed", "16-true"):
            overrides[key] = "bf16-mixed"
            break
    return overrides


def boost_component(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """Three times the learning rate for the component, where the optimizer is plain SGD.

    Adam and its kin divide the size of the gradient out, so there a higher rate answers nothing.
    """
    rates = _look_up(config, "component_lrs")
    if finding.component is None or rates is _MISSING or _optimizer(config) != "sgd":
        return {}
    given = dict(rates) if isinstance(rates, Mapping) else {}
    old = given.get(finding.component)
    return {"component_lrs": {**given, finding.component: 3.0 * old if old else 3.0}}


def loosen_clip(finding: Finding, config: Mapping[str, Any]) -> dict[str, object]:
    """A clip near the norm that is usual here, where the optimizer divides the size out anyway."""
    clip = _number(config, "trainer.gradient_clip_val")
    adaptive = any(name in _optimizer(config) for name in ("adam", "lion", "lamb", "adafactor"))
    if clip is None or not adaptive or not finding.observed or finding.caused_by is not None:
        return {}
    return {"trainer.gradient_clip_val": _round(clip / finding.observed)}
