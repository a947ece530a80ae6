"""Batch sizes by trial: how fast each trains, how much memory it takes, and which to choose."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_diag.records.files import write_text
from lightning_diag.tuning.batch_size_child import UNGUARDED, inside
from lightning_diag.tuning.batch_size_choice import Recommendation, recommend
from lightning_diag.tuning.batch_size_job import INTERRUPTED, UnguardedError, measure
from lightning_diag.tuning.batch_size_profile import BatchSizeProfile
from lightning_diag.tuning.batch_size_reference import reference
from lightning_diag.tuning.batch_size_report import markdown

__all__ = ["BatchSizeProfile", "Recommendation", "markdown", "profile_batch_sizes", "recommend"]

_WARMUP_EPOCHS = 1  # the first epoch also starts the device, its kernels and the caches


def profile_batch_sizes(
    make: Callable[..., tuple[Mapping[str, Any], Any, Any]],
    batch_sizes: Sequence[int],
    *,
    epochs: int = 5,
    arguments: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    title: str = "",
    memory_limit_gib: float | None = None,
    timeout_s: float | None = None,
    spare: float = 0.15,
    skip_larger: bool = True,
    seed: int = 42,
    tell: Callable[[str], object] | None = None,
) -> list[BatchSizeProfile]:
    """Train some epochs with each batch size, each in a new process, and measure them.

    A process that runs out of memory, or is killed, is one row of the result. Each trains on one
    device for one warm-up epoch and then the timed ones, with the Trainer that `make` describes
    less its callbacks, loggers, checkpoints, profiler and strategy. Nothing of this process is
    changed, and it needs no GPU. Ctrl-C ends the measuring and returns what there is.

    A script calls this under ``if __name__ == "__main__":``, since the new processes import it.

    Args:
        make: ``make(batch_size, **arguments) -> (trainer_arguments, module, data)``: a function at
            the top of a file. `data` is a LightningDataModule, a loader, a tuple
            ``(train, validation)`` of loaders, or None where the module has its own.
        batch_sizes: Samples in a batch; tried from the smallest.
        epochs: Timed epochs of each size.
        arguments: Further arguments of `make`, of types that JSON knows.
        output: A Markdown file to write, anew after each size; None for none.
        title: Its title.
        memory_limit_gib: Memory after which allocations fail, as on a smaller device, in GiB: of
            the GPU, or of the process on the CPU (Linux).
        timeout_s: Seconds that one size may take; None for any.
        spare: Share of the memory that the recommendation in `output` keeps free.
        skip_larger: Skip the sizes above one that found no memory.
        seed: Seeds each process before `make` is called.
        tell: Gets a line before and after each size; `print` will do.

    Returns:
        One profile for each size, from the smallest.

    Raises:
        TypeError: `make` cannot be imported by its name, or `arguments` cannot be written as JSON.
        ValueError: A number is out of its range.
        RuntimeError: A script calls this while it is being imported.
    """
    sizes = _checked(batch_sizes, epochs, memory_limit_gib, timeout_s)
    recommend([], spare=spare)  # checks it
    if inside():
        raise UnguardedError(UNGUARDED)
    request = {
        "make": reference(make),
        "arguments": _as_json(arguments or {}),
        "epochs": epochs + _WARMUP_EPOCHS,
        "memory_limit_gib": memory_limit_gib,
        "seed": seed,
    }
    rows: list[BatchSizeProfile] = []
    for size in sizes:
        row = _skipped(size, rows, skip_larger)
        if row is None:
            try:
                _say(tell, f"batch size {size:,} ...")
                row = measure({**request, "batch_size": size}, timeout_s)
            except KeyboardInterrupt:  # before its process ran or after
                row = BatchSizeProfile(size, "interrupted", error_message=INTERRUPTED)
        rows.append(row)
        _say(tell, f"batch size {size:,}: {_line(row)}")
        if output is not None:
            write_text(
                output, markdown(rows, title=title, recommendation=recommend(rows, spare=spare))
            )
    return rows


def _checked(
    batch_sizes: Sequence[int], epochs: int, limit_gib: float | None, timeout_s: float | None
) -> list[int]:
    sizes = list(batch_sizes)
    if not sizes:
        raise ValueError("`batch_sizes` must name at least one size, got none.")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`batch_sizes` must be whole numbers of at least 1, got {size!r}.")
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"`epochs` must be a whole number of at least 1, got {epochs!r}.")
    for name, value in (("memory_limit_gib", limit_gib), ("timeout_s", timeout_s)):
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    return sorted(set(sizes))


def _as_json(arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
    try:
        return json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`arguments` must be of types that JSON knows, got {arguments!r}: {error}."
        ) from error


def _skipped(
    size: int, rows: Sequence[BatchSizeProfile], skip_larger: bool
) -> BatchSizeProfile | None:
    if any(row.status == "interrupted" for row in rows):
        return BatchSizeProfile(size, "skipped", error_message="Somebody pressed Ctrl-C before.")
    failed = next((row for row in rows if row.oom_error), None)
    if failed is None or not skip_larger:
        return None
    why = f"Not tried: already {failed.batch_size:,} found too little memory."
    return BatchSizeProfile(size, "skipped", error_message=why)


def _line(row: BatchSizeProfile) -> str:
    if row.samples_per_second is None or row.status != "ok":
        return f"{row.status}. {row.error_message or ''}".rstrip()
    return (
        f"{row.avg_time_per_epoch or 0:.3g} s an epoch, {row.samples_per_second:,.0f} samples/s, "
        f"{row.peak_memory_gb or 0:.2f} GB"
    )


def _say(tell: Callable[[str], object] | None, line: str) -> None:
    if tell is not None:
        tell(line)
