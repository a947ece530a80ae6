"""What a GPU says of itself, by NVIDIA's management library; and what it can do at most."""

import contextlib
import re
from typing import Any

import torch

__all__ = ["GpuProbe", "peak_flops"]

_MIB = 2**20
# dense products in half precision as the makers' data sheets state them, operations per second
_PEAKS = {
    "b200": 2250e12,
    "h200": 989e12,
    "h100": 989e12,
    "h100pcie": 756e12,
    "a100": 312e12,
    "a10": 125e12,
    "a10g": 70e12,
    "l40s": 362e12,
    "l4": 121e12,
    "v100": 125e12,
    "t4": 65e12,
    "rtx4090": 165e12,
    "rtx3090": 71e12,
}


def peak_flops(name: str) -> float | None:
    """Half precision operations per second that a GPU makes at most; None for an unknown one.

    Args:
        name: The name that the driver gives.

    Example:
        >>> peak_flops("NVIDIA A100-SXM4-80GB"), peak_flops("Quadro P2000")
        (312000000000000.0, None)
        >>> peak_flops("NVIDIA H100 PCIe") == peak_flops("NVIDIA H100 80GB HBM3")
        False
    """
    words = re.split(r"[^a-z0-9]+", re.sub(r"\b(rtx|gtx)[\s_-]+(?=\d)", r"\1", name.lower()))
    key = next((word for word in words if word in _PEAKS), "")
    if f"{key}pcie" in _PEAKS and "pcie" in words:
        key = f"{key}pcie"
    return _PEAKS.get(key)


class GpuProbe:
    """Use, memory, temperature and power of one CUDA device.

    The device is found by its own number (UUID), or by its place on the bus: NVML counts devices in
    another order than CUDA, and knows nothing of ``CUDA_VISIBLE_DEVICES``.

    Args:
        device: A CUDA device of this process.

    Raises:
        RuntimeError: NVML is not installed, or does not know the device.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise RuntimeError("`nvidia-ml-py` is not installed") from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise RuntimeError(f"NVML does not start: {error}") from error
        self._handle = self._find(torch.cuda.get_device_properties(device))
        if self._handle is None:
            self.close()
            raise RuntimeError(f"NVML does not know `{device}`")

    def sample(self) -> dict[str, float]:
        """What the device says now; what it does not tell (a part of one: its use) is missing."""
        nvml, handle = self._nvml, self._handle
        found: dict[str, float] = {}
        with contextlib.suppress(nvml.NVMLError):
            found["gpu_percent"] = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            found["gpu_memory_used"] = memory.used / _MIB
            found["gpu_memory_percent"] = 100 * memory.used / memory.total
        with contextlib.suppress(nvml.NVMLError):
            celsius = nvml.NVML_TEMPERATURE_GPU
            found["gpu_temperature"] = float(nvml.nvmlDeviceGetTemperature(handle, celsius))
        with contextlib.suppress(nvml.NVMLError):
            found["gpu_power"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        return found

    def close(self) -> None:
        """Let go of NVML."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _find(self, properties: Any) -> Any:
        nvml = self._nvml
        uuid = getattr(properties, "uuid", None)
        for kind in ("GPU", "MIG") if uuid is not None else ():
            with contextlib.suppress(nvml.NVMLError):
                return nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
        place = [
            getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")
        ]
        if None not in place:
            domain, bus, device = place
            with contextlib.suppress(nvml.NVMLError):
                return nvml.nvmlDeviceGetHandleByPciBusId(f"{domain:08x}:{bus:02x}:{device:02x}.0")
        return None
