"""The profile of batch sizes as Markdown."""

from collections.abc import Sequence

from lightning_diag.tuning.batch_size_choice import Recommendation, recommend
from lightning_diag.tuning.batch_size_profile import BatchSizeProfile, Status

__all__ = ["markdown"]

_STATUS: dict[Status, str] = {
    "ok": "OK",
    "out of memory": "OOM",
    "killed": "KILLED",
    "error": "ERROR",
    "timeout": "TIMEOUT",
    "interrupted": "INTERRUPTED",
    "skipped": "SKIPPED",
}


def markdown(
    profiles: Sequence[BatchSizeProfile],
    *,
    title: str = "",
    recommendation: Recommendation | None = None,
    picture: str | None = None,
) -> str:
    """Table, recommendation, samples per second and GB, and what went wrong.

    Args:
        profiles: What `profile_batch_sizes` returned.
        title: What was profiled.
        recommendation: What `recommend` returned; None to ask it.
        picture: Path of a chart, relative to the text.

    Returns:
        The text.
    """
    chosen = recommendation or recommend(profiles)
    parts = [f"# Batch Size Profile{f': {_plain(title)}' if title else ''}", _table(profiles)]
    parts += [f"![Throughput and memory by batch size]({picture})"] if picture else []
    parts += ["## Recommendation", *_recommendation(profiles, chosen)]
    parts += _per_memory(profiles)
    odd = [row for row in profiles if row.error_message]
    if odd:
        lines = (f"- {row.batch_size:,}: {_plain(row.error_message or '')}" for row in odd)
        parts += ["## What was not measured, and why", "\n".join(lines)]
    parts += ["## How it was measured", _method(profiles)]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    text = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in "\\*`[]<>#|" else sign for sign in text)


def _on_gpu(profiles: Sequence[BatchSizeProfile]) -> bool:
    return any((row.memory_kind or "").startswith("gpu") for row in profiles)


def _table(profiles: Sequence[BatchSizeProfile]) -> str:
    memory = "GPU Memory" if _on_gpu(profiles) else "Memory"
    head = ["Batch Size", "Time/Epoch", memory, "Samples/Sec"]
    head += ["Final Train Loss", "Final Test Loss", "Status"]
    rows = [_cells(row) for row in profiles]
    widths = [len(name) for name in head]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"


def _cells(row: BatchSizeProfile) -> list[str]:
    return [
        f"{row.batch_size:,}",
        _seconds(row.avg_time_per_epoch),
        _gigabytes(row.peak_memory_gb),
        "-" if row.samples_per_second is None else _rate(row.samples_per_second),
        "-" if row.final_train_loss is None else f"{row.final_train_loss:.4f}",
        "-" if row.final_test_loss is None else f"{row.final_test_loss:.4f}",
        _STATUS[row.status],
    ]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}s" if value >= 1 else f"{value:.3g}s"


def _gigabytes(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} GB" if value >= 1 else f"{value:.2f} GB"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _recommendation(profiles: Sequence[BatchSizeProfile], chosen: Recommendation) -> list[str]:
    row = next((one for one in profiles if one.batch_size == chosen.batch_size), None)
    if row is None:
        return ["**No batch size can be recommended.**", _bullets(chosen.reasons)]
    memory = "GPU memory usage" if _on_gpu(profiles) else "Memory usage"
    lines = [
        f"Throughput: {_rate(row.samples_per_second or 0)} samples/sec",
        f"Time per epoch: {_seconds(row.avg_time_per_epoch)}",
        f"{memory}: {_gigabytes(row.peak_memory_gb)}",
    ]
    if row.final_test_loss is not None:
        lines.append(f"Final test loss: {row.final_test_loss:.4f}")
    lines += chosen.reasons
    lines.append(
        "The learning rate belongs to the batch size: search it again where this size is another "
        "than that of your configuration. Losses of different sizes after the same epochs are "
        "losses after different numbers of steps."
    )
    return [f"**Optimal batch size: {row.batch_size:,}**", _bullets(lines)]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _per_memory(profiles: Sequence[BatchSizeProfile]) -> list[str]:
    lines = [
        f"{row.batch_size:,}: {_rate(row.samples_per_second / row.peak_memory_gb)} samples/sec/GB"
        for row in profiles
        if row.status == "ok" and row.samples_per_second and row.peak_memory_gb
    ]
    return ["## Samples per second and GB", _bullets(lines)] if lines else []


def _method(profiles: Sequence[BatchSizeProfile]) -> str:
    devices = sorted({row.device for row in profiles if row.device})
    where = f" on one device ({_plain(', '.join(devices))})" if devices else ""
    kind = next((row.memory_kind for row in profiles if row.memory_kind), None)
    memory = {
        "gpu reserved": " Memory is the most that PyTorch took from the GPU.",
        "resident": " Memory is the most that the process held, its libraries included.",
    }.get(kind or "", "")
    return (
        f"Each size was trained in a process of its own{where}, without callbacks, loggers and "
        "checkpoints. The time of an epoch is the median over the epochs after one warm-up epoch, "
        f"without validation.{memory}"
    )
