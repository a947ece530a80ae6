"""Is the machine the limit?"""

from time import perf_counter
from typing import Any

import torch

from lightning_diag.callbacks.base import Diagnostic, Interval, OnError, Row
from lightning_diag.callbacks.hardware_gpu import GpuProbe, peak_flops
from lightning_diag.callbacks.hardware_sampler import HostProbe, MemoryProbe, Sampler
from lightning_diag.callbacks.hardware_stopwatch import Stopwatch, Window
from lightning_diag.functional.batches import batch_size
from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["HardwareMonitor"]

_MIB = 2**20


class HardwareMonitor(Diagnostic):
    """Use of processor, memory and GPU, throughput, and the share of time spent waiting for data.

    A thread looks at the machine every `sample_seconds`; a measured step only picks up what it
    found last, and what the host's clock says of the batches since the last row. No tensor is read
    or made, and no device is waited for. The thread ends with training, also when that fails.

    The wait for data is the time from the end of a batch to the start of the next: fetching and
    moving it, and what loggers and other callbacks do in between. Validation is left out, and so is
    a gap in which a checkpoint is written. The clock is the host's: where a GPU lags behind, the
    copy of a batch that does not lie in pinned memory waits for it, and that looks like a wait for
    data (``pin_memory=True`` in the loader).

    Rank 0 measures itself and its own device. Numbers of GPUs need NVML (``nvidia-ml-py``); what
    is not known is not in the row.

    Args:
        every_n_steps: Optimizer steps between two rows, or ``"auto"``.
        sample_seconds: Seconds between two looks at the machine.
        flops_per_sample: Floating point operations of forward and backward for one sample, if
            known; then the share of the device's peak is reported (model FLOPs utilization).
        peak_flops: Operations per second that one device makes at most, in place of the data
            sheet's number for dense products in half precision.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``"auto"`` may spend.

    Raises:
        ValueError: If an argument is out of range.

    Rows:
        ``records/hardware.jsonl``, for the whole model. Since the last row: ``batches``,
        ``samples``, ``seconds`` (in batches and waiting), ``step_seconds`` (a batch from start to
        end, mean), ``data_wait`` (share of ``seconds`` spent between batches),
        ``batches_per_second``, ``samples_per_second`` (of all ranks, taken as alike), ``mfu``
        (share of the peak, 0 to 1).

        At the last look: ``cpu_percent`` (of all cores), ``process_cpu_percent`` (100: one core),
        ``memory_percent`` (of the machine); ``gpu_percent`` (time in which anything ran),
        ``gpu_memory_used`` (MiB on the device, by all processes; without NVML what PyTorch
        reserved), ``gpu_memory_percent`` (the same, of the device's memory), ``gpu_temperature``
        (degrees Celsius), ``gpu_power`` (W). At the row: ``process_memory`` (MiB, without worker
        processes), ``gpu_memory_allocated``, ``gpu_memory_reserved``, ``gpu_memory_peak`` (MiB,
        PyTorch's).

    Logs:
        Under ``hardware/`` all of these but ``batches``, ``samples`` and ``seconds``.

    Example:
        >>> HardwareMonitor(sample_seconds=5.0).every_n_steps
        10
    """

    prefix = "hardware"
    logged = frozenset(
        {
            *("step_seconds", "data_wait", "batches_per_second", "samples_per_second", "mfu"),
            *("cpu_percent", "process_cpu_percent", "memory_percent", "process_memory"),
            *("gpu_percent", "gpu_memory_used", "gpu_memory_percent", "gpu_temperature"),
            *("gpu_power", "gpu_memory_allocated", "gpu_memory_reserved", "gpu_memory_peak"),
        }
    )

    def __init__(
        self,
        every_n_steps: Interval = 10,
        sample_seconds: float = 1.0,
        flops_per_sample: float | None = None,
        peak_flops: float | None = None,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        for name, value in (
            ("sample_seconds", sample_seconds),
            ("flops_per_sample", flops_per_sample),
            ("peak_flops", peak_flops),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        self.sample_seconds = sample_seconds
        self.flops_per_sample = flops_per_sample
        self.peak_flops = peak_flops
        self._sampler: Sampler | None = None
        self._memory: MemoryProbe | None = None
        self._gpu: GpuProbe | None = None
        self._peak_flops: float | None = None
        super().__init__(
            every_n_steps=every_n_steps, on_error=on_error, overhead_budget=overhead_budget
        )

    # ---- hooks ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._peak_flops = self._find_peak(trainer, pl_module.device)
        if trainer.is_global_zero:
            self._start(trainer, pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stopwatch.ready(perf_counter())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._stopwatch.starts(perf_counter())
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stopwatch.ends(perf_counter(), batch_size(batch))
        if self.is_due_after(trainer):
            self._measure(trainer, pl_module.device)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stopwatch.pauses(perf_counter())
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._stopwatch.resumes(perf_counter())

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._stopwatch.skips()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def release(self) -> None:
        super().release()
        sampler, self._sampler = self._sampler, None
        gpu, self._gpu = self._gpu, None
        self._memory = None
        if sampler is not None:
            sampler.stop()
        if gpu is not None:
            gpu.close()

    def forget(self) -> None:
        super().forget()
        self._stopwatch = Stopwatch()
        self._said: set[str] = set()

    # ---- private ----

    def _start(self, trainer: Trainer, device: torch.device) -> None:
        self._memory = MemoryProbe()
        probes = [HostProbe().sample]
        if device.type == "cuda":
            try:
                self._gpu = GpuProbe(device)
                probes.append(self._gpu.sample)
            except RuntimeError as error:
                self.note(trainer, f"no use, temperature and power of the GPU: {error}.")
        else:
            self.note(trainer, f"training on `{device.type}`: rows have no numbers of a GPU.")
        self._sampler = Sampler(probes, self.sample_seconds)
        self._sampler.start()

    def _find_peak(self, trainer: Trainer, device: torch.device) -> float | None:
        if self.flops_per_sample is None or self.peak_flops is not None:
            return self.peak_flops
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        peak = peak_flops(name)
        if peak is None:
            self.note(
                trainer,
                f"the most operations per second of `{name}` are not known: give `peak_flops` to "
                "see the share that is used.",
                "warning",
            )
        return peak

    def _measure(self, trainer: Trainer, device: torch.device) -> None:
        self.measured()
        window = self._stopwatch.take()
        sampler = self._sampler
        if sampler is None:
            return
        row: Row = {"component": None, **self._speed_row(window, trainer.world_size)}
        row |= sampler.latest()
        if self._memory is not None:
            row |= self._memory.now()
        if device.type == "cuda":
            row = _torch_memory(device) | row
        # the step has been made, and counted where Lightning makes it
        made = int(trainer.lightning_module.automatic_optimization)
        self.report(trainer, [row], step=self.step_of(trainer) - made)
        for failure in sampler.failures:
            if failure not in self._said:
                self._said.add(failure)
                self.note(trainer, f"a look at the machine failed and is left out: {failure}.")

    def _speed_row(self, window: Window, ranks: int) -> Row:
        row: Row = {"batches": window.batches, "samples": window.samples}
        row["seconds"] = window.seconds
        if window.batches and window.seconds > 0:
            row["step_seconds"] = window.step_seconds / window.batches
            row["data_wait"] = window.wait_seconds / window.seconds
            row["batches_per_second"] = window.batches / window.seconds
            if window.samples is not None:
                speed = window.samples / window.seconds
                row["samples_per_second"] = speed * ranks
                if self.flops_per_sample is not None and self._peak_flops is not None:
                    row["mfu"] = speed * self.flops_per_sample / self._peak_flops
        return row


def _torch_memory(device: torch.device) -> Row:
    """PyTorch's own account, which it keeps on the host."""
    reserved = torch.cuda.memory_reserved(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return {
        "gpu_memory_used": reserved / _MIB,
        "gpu_memory_percent": 100 * reserved / total,
        "gpu_memory_allocated": torch.cuda.memory_allocated(device) / _MIB,
        "gpu_memory_reserved": reserved / _MIB,
        "gpu_memory_peak": torch.cuda.max_memory_allocated(device) / _MIB,
    }
