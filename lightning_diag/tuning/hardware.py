"""Training settings that suit a machine: accelerator, precision, batch size, accumulation, workers.

`detect` looks at the machine, `settings` decides; the second is pure, so any machine can be asked
about from any other.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from lightning_diag.spelling import did_you_mean

__all__ = ["Device", "Settings", "detect", "gpu_key", "settings"]


@dataclass(frozen=True)
class Device:
    """What a machine trains on.

    Args:
        accelerator: `cuda`, `mps` or `cpu`.
        name: the name that the driver gives, such as `NVIDIA H100 80GB HBM3`.
        memory_gib: memory of one device, in GiB; where devices differ, that of the smallest.
        bf16: whether the device computes in bfloat16 natively.
        count: number of devices.
        cores: CPU cores that this process may use.
    """

    accelerator: str
    name: str = ""
    memory_gib: float = 0.0
    bf16: bool = False
    count: int = 1
    cores: int = 1


@dataclass(frozen=True)
class Settings:
    """Training settings for one machine; `batch_size` and `num_workers` are per device."""

    accelerator: str
    devices: int | str
    precision: str
    batch_size: int
    accumulate: int
    num_workers: int
    pin_memory: bool


class _Row(NamedTuple):
    memory_gib: float
    batch_size: int
    accumulate: int
    num_workers: int


_GPUS = {
    "h200": _Row(141, 128, 1, 8),
    "h100": _Row(80, 96, 1, 8),
    "a100": _Row(40, 64, 1, 8),
    "l40s": _Row(48, 64, 1, 8),
    "l4": _Row(24, 48, 2, 6),
    "v100": _Row(16, 48, 2, 6),
    "t4": _Row(16, 32, 2, 4),
    "rtx4090": _Row(24, 56, 1, 8),
    "rtx3090": _Row(24, 48, 2, 6),
}
# for a GPU without a row of its own: the first tier whose memory it has
_TIERS = (
    _Row(120, 128, 1, 8),
    _Row(70, 96, 1, 8),
    _Row(36, 64, 1, 8),
    _Row(20, 48, 2, 6),
    _Row(14, 32, 2, 4),
    _Row(7, 16, 4, 4),
    _Row(0, 8, 8, 2),
)
_CPU = _Row(0, 16, 1, 2)
# a driver shows less than the label says; far less is a slice of the GPU and not the whole
_WHOLE = 0.75


def gpu_key(name: str) -> str:
    """Return the table's key for a GPU's name, or an empty string for a GPU without a row.

    Case, vendor, spaces, dashes and what follows the model (memory, socket) do not matter.

    Args:
        name: the name that the driver gives.

    Returns:
        The key, such as `a100` or `rtx3090`.

    Example:
        >>> gpu_key("NVIDIA GeForce RTX 3090"), gpu_key("A100-SXM4-40GB"), gpu_key("NVIDIA L40S")
        ('rtx3090', 'a100', 'l40s')
        >>> gpu_key("Quadro P2000")
        ''
    """
    joined = re.sub(r"\b(rtx|gtx)[\s_-]+(?=\d)", r"\1", name.lower())
    return next((word for word in re.split(r"[^a-z0-9]+", joined) if word in _GPUS), "")


def settings(device: Device, overrides: Mapping[str, object] | None = None) -> Settings:
    """Return the training settings for a device; what is overridden is taken as given.

    A known GPU has its own row, any other GPU gets the tier of its memory, never the row of the
    CPU. Mixed precision is chosen on a GPU from NVIDIA or AMD: bfloat16 where the device has it.

    Args:
        device: the machine, from `detect` or described by hand.
        overrides: fields of `Settings`; `None` as a value means: decide.

    Returns:
        The settings.

    Raises:
        ValueError: if a name in `overrides` is no field of `Settings`.

    Example:
        >>> chosen = settings(Device("cuda", "NVIDIA L4", 22.0, bf16=True, cores=16))
        >>> chosen.precision, chosen.batch_size, chosen.accumulate
        ('bf16-mixed', 48, 2)
        >>> settings(Device("cpu", cores=8), {"batch_size": 4}).batch_size
        4
    """
    row = _row(device)
    detected: dict[str, object] = asdict(
        Settings(
            accelerator=device.accelerator,
            devices=device.count if device.accelerator == "cuda" else 1,
            precision=_precision(device),
            batch_size=row.batch_size,
            accumulate=row.accumulate,
            num_workers=min(row.num_workers, max(device.cores // device.count - 1, 0)),
            pin_memory=device.accelerator == "cuda",
        )
    )
    for name, value in (overrides or {}).items():
        if name not in detected:
            raise ValueError(f"`hardware` has no field `{name}`; {did_you_mean(name, detected)}")
        if value is not None:
            detected[name] = value
    return Settings(**detected)  # type: ignore[arg-type]


def _row(device: Device) -> _Row:
    if device.accelerator == "cpu":
        return _CPU
    known = _GPUS.get(gpu_key(device.name))
    if known and device.memory_gib >= _WHOLE * known.memory_gib:
        return known
    return next(tier for tier in _TIERS if device.memory_gib >= tier.memory_gib)


def _precision(device: Device) -> str:
    if device.accelerator != "cuda":
        return "32-true"
    return "bf16-mixed" if device.bf16 else "16-mixed"


def detect() -> Device:
    """Look at this machine.

    Returns:
        The CUDA devices if there are any, else Apple's GPU, else the CPU.
    """
    cores = _cores()
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        smallest = min(found, key=lambda properties: properties.total_memory)
        return Device(
            accelerator="cuda",
            name=smallest.name,
            memory_gib=smallest.total_memory / 2**30,
            bf16=all(properties.major >= 8 for properties in found),
            count=len(found),
            cores=cores,
        )
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory() / 2**30
        return Device("mps", name="mps", memory_gib=memory, cores=cores)
    return Device("cpu", name="cpu", cores=cores)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
