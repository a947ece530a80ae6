"""What was measured of one batch size."""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["BatchSizeProfile", "Status"]

Status = Literal["ok", "out of memory", "killed", "error", "timeout", "interrupted", "skipped"]


@dataclass(frozen=True)
class BatchSizeProfile:
    """What was measured of one batch size; None stands for what was not.

    Where training ended early, what was measured until then is kept.

    Args:
        batch_size: Samples that the loaders were asked to put into a batch.
        status: `ok`; `out of memory`: an allocation failed; `killed`: a signal ended the process,
            as the system does where memory runs out; `error`; `timeout`; `interrupted`: Ctrl-C;
            `skipped`: not tried, since a smaller size found no memory or somebody interrupted.
        epochs_completed: Timed epochs; the warm-up epoch before them is not counted.
        avg_time_per_epoch: Median over the timed epochs, in seconds of training: without
            validation, logging, checkpoints and diagnostics.
        samples_per_second: Samples that were trained in an epoch over `avg_time_per_epoch`.
        peak_memory_gb: Largest memory of the process, validation included, in units of 1e9 bytes.
        memory_kind: What `peak_memory_gb` counts. `gpu reserved`: what PyTorch took from the
            device, which is what runs out; `resident`: the process in main memory, without the
            processes that load data.
        allocated_gb: On a GPU, the part of `peak_memory_gb` that tensors filled.
        device_memory_gb: What the process could have had: memory that was free on the device, or
            in the machine or its container, when training began; less where it was limited.
        device: Name of the device.
        final_train_loss: Mean over the samples of the last epoch.
        final_test_loss: Validation loss after the last epoch.
        oom_error: Whether memory ran out, or, after SIGKILL, most likely did.
        error_message: Why the status is not `ok`, or what is odd about the numbers.
        epoch_seconds: Each timed epoch.
        epoch_samples: Samples that were trained in each timed epoch.
        largest_batch: Samples in the largest batch; below `batch_size` where the data are too few.
    """

    batch_size: int
    status: Status
    epochs_completed: int = 0
    avg_time_per_epoch: float | None = None
    samples_per_second: float | None = None
    peak_memory_gb: float | None = None
    memory_kind: str | None = None
    allocated_gb: float | None = None
    device_memory_gb: float | None = None
    device: str | None = None
    final_train_loss: float | None = None
    final_test_loss: float | None = None
    oom_error: bool = False
    error_message: str | None = None
    epoch_seconds: tuple[float, ...] = field(default=())
    epoch_samples: tuple[int | None, ...] = field(default=())
    largest_batch: int | None = None
