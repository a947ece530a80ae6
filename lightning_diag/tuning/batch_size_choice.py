"""Which batch size to take: the smallest that trains about as fast as the fastest that fits."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_diag.tuning.batch_size_profile import BatchSizeProfile

__all__ = ["WITHIN", "Recommendation", "noise", "recommend"]

WITHIN = 0.05
"""Share of the best throughput that is given up for a smaller batch. Runs of one size on a quiet
machine differ by a few percent, and a doubled batch that gains less costs memory and optimizer
steps for nothing."""


@dataclass(frozen=True)
class Recommendation:
    """A batch size, or None, and why.

    Args:
        batch_size: The size to take; None where no size can be recommended.
        reasons: Sentences, the weightiest first.
    """

    batch_size: int | None
    reasons: tuple[str, ...]


def recommend(
    profiles: Sequence[BatchSizeProfile],
    device_memory_gb: float | None = None,
    spare: float = 0.15,
) -> Recommendation:
    """Choose the knee of the throughput among the sizes that leave memory to spare.

    A size qualifies if it was trained to the end, its batches were filled, and its peak memory is
    at most ``(1 - spare) * device_memory_gb``. Of those, the smallest with at least
    ``1 - WITHIN`` of the best throughput is the knee. Where the epochs of one size differ by more
    than `WITHIN`, and by as much as the sizes do among one another, nothing is chosen.

    Args:
        profiles: What `profile_batch_sizes` returned.
        device_memory_gb: Memory of the device, in units of 1e9 bytes; None for what the profiles
            say that they could have had.
        spare: Share of the memory that is to stay free, 0 to 1; 0.1 to 0.2 serves for longer
            samples, fragmentation and other processes.

    Returns:
        The size and the reasons.

    Raises:
        ValueError: `spare` is not in [0, 1), or `device_memory_gb` not positive.

    Example:
        >>> rows = [
        ...     BatchSizeProfile(16, "ok", 2, 2.0, 100.0, 2.0, epoch_seconds=(2.0, 2.0)),
        ...     BatchSizeProfile(64, "ok", 2, 1.0, 200.0, 6.0, epoch_seconds=(1.0, 1.0)),
        ...     BatchSizeProfile(256, "ok", 2, 0.99, 202.0, 8.0, epoch_seconds=(0.99, 0.99)),
        ... ]
        >>> recommend(rows, 16.0).batch_size, recommend(rows, 4.0).batch_size
        (64, 16)
    """
    if not 0 <= spare < 1:
        raise ValueError(f"`spare` must be at least 0 and below 1, got {spare}.")
    if device_memory_gb is not None and device_memory_gb <= 0:
        raise ValueError(f"`device_memory_gb` must be positive, got {device_memory_gb}.")
    rows = sorted(filter(_measured, profiles), key=lambda row: row.batch_size)
    if not rows:
        return Recommendation(None, ("No batch size was measured to the end.",))
    memory = device_memory_gb or min((row.device_memory_gb or 0 for row in rows), default=0)
    fits = [row for row in rows if not memory or (row.peak_memory_gb or 0) <= (1 - spare) * memory]
    if not fits:
        return Recommendation(None, (_none_fits(rows[0], memory, spare),))
    hidden = _hidden(fits)
    if hidden:
        return Recommendation(None, (hidden,))
    return _knee(fits, profiles, memory, spare)


def _measured(row: BatchSizeProfile) -> bool:
    filled = row.largest_batch is None or row.largest_batch >= row.batch_size
    return row.status == "ok" and bool(row.samples_per_second) and filled


def noise(row: BatchSizeProfile) -> float:
    """How far the timed epochs of one size lie apart, as a share of their median.

    Example:
        >>> noise(BatchSizeProfile(8, "ok", 3, 2.0, epoch_seconds=(1.9, 2.0, 2.1)))
        0.1
    """
    if not row.epoch_seconds or not row.avg_time_per_epoch:
        return 0.0
    apart = max(row.epoch_seconds) - min(row.epoch_seconds)
    return round(apart / row.avg_time_per_epoch, 6)


def _rate(row: BatchSizeProfile) -> float:
    return row.samples_per_second or 0.0


def _none_fits(smallest: BatchSizeProfile, memory: float, spare: float) -> str:
    return (
        f"No batch size leaves {spare:.0%} of {memory:.1f} GB free: the smallest, "
        f"{smallest.batch_size:,}, took {smallest.peak_memory_gb or 0:.1f} GB; try smaller ones."
    )


def _hidden(fits: Sequence[BatchSizeProfile]) -> str | None:
    apart = max(map(_rate, fits)) / min(map(_rate, fits)) - 1
    unsteady = max(map(noise, fits))
    if len(fits) == 1 or unsteady <= WITHIN or apart > unsteady:
        return None
    return (
        f"Noise hides the difference: epochs of one size lay up to {unsteady:.0%} apart, the sizes "
        f"{apart:.0%}. Measure more epochs, or on a quieter machine."
    )


def _knee(
    fits: Sequence[BatchSizeProfile],
    profiles: Sequence[BatchSizeProfile],
    memory: float,
    spare: float,
) -> Recommendation:
    best = max(fits, key=_rate)
    near = [row for row in fits if _rate(row) >= (1 - WITHIN) * _rate(best)]
    knee = near[0]
    reasons = [_why(knee, best)]
    if memory and knee.peak_memory_gb is not None:
        free = 1 - knee.peak_memory_gb / memory
        reasons.append(f"{free:.0%} of {memory:.1f} GB stay free; {spare:.0%} were asked for.")
    else:
        reasons.append("The memory of the device is not known, so none was kept free.")
    reasons += _doubts(knee, fits, profiles)
    return Recommendation(knee.batch_size, tuple(reasons))


def _why(knee: BatchSizeProfile, best: BatchSizeProfile) -> str:
    if knee is best:
        return "No other size that leaves this memory free trains faster."
    return (
        f"It reaches {_rate(knee) / _rate(best):.0%} of the throughput of {best.batch_size:,}, "
        f"the fastest that leaves this memory free: beyond it, the throughput hardly rises."
    )


def _doubts(
    knee: BatchSizeProfile,
    fits: Sequence[BatchSizeProfile],
    profiles: Sequence[BatchSizeProfile],
) -> list[str]:
    said = []
    smaller = [row for row in fits if row.batch_size < knee.batch_size]
    unsteady = max(map(noise, fits))
    rivals = [row for row in smaller if _rate(row) * (1 + unsteady) >= (1 - WITHIN) * _rate(knee)]
    if rivals:
        names = ", ".join(f"{row.batch_size:,}" for row in rivals)
        said.append(
            f"Epochs of one size lay up to {unsteady:.0%} apart, so {names} may do as well."
        )
    if len(fits) == 1:
        said.append("It is the only size that was measured and leaves this memory free.")
    elif knee.batch_size == max(row.batch_size for row in profiles):
        said.append("It is the largest that was measured, and throughput still rises: try more.")
    elif not smaller:
        said.append("It is the smallest that was measured: a smaller one may do as well.")
    return said
