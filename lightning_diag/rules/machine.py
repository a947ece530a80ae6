"""Rules on the machine: what limits the speed, and what will end the run."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.module_rows import lasting_since, number, sorted_rows
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import more_workers
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "GpuUnderused",
    "InputBound",
    "MemoryGrowth",
    "gpu_underused",
    "input_bound",
    "memory_growth",
]

HARDWARE_FILE = "records/hardware.jsonl"

_SPEED = ("batches", "seconds", "step_seconds", "data_wait", "epoch")


@dataclass(frozen=True)
class InputBound:
    """Thresholds of `input_bound`."""

    max_share: float = field(default=0.5, metadata={"unit": "share of the time, waiting for data"})
    min_wait: float = field(default=5.0, metadata={"unit": "milliseconds a batch"})
    max_epochs: float = field(default=0.25, metadata={"unit": "epochs a batch: more are noted"})
    min_rows: float = field(default=2, metadata={"unit": "rows in a row, up to the last"})
    warmup_rows: float = field(default=1, metadata={"unit": "rows at the start that do not count"})


@rule(
    "input_bound",
    family="machine",
    needs="hardware",
    thresholds=InputBound,
    explains=("gpu_underused",),
    reference="SageMaker Debugger's CPUBottleneck; torchtitan's share of data loading.",
    remedy=more_workers,
)
def input_bound(hardware: "pl.DataFrame", thresholds: InputBound) -> list[Finding]:
    """Training that waits for data for most of its time.

    The first row holds the start of the workers. Waits of a few milliseconds a batch are the cost
    of any loop, and are noted only.
    """
    t = thresholds
    rows = [row for row in sorted_rows(hardware, _SPEED) if row.get("data_wait") is not None]
    rows = rows[int(t.warmup_rows) :]
    since = lasting_since([number(row, "data_wait") > t.max_share for row in rows], int(t.min_rows))
    if since is None:
        return []
    stretch = rows[since:]
    share = median(number(row, "data_wait") for row in stretch)
    wait = median(_wait(row) for row in stretch)
    short = _epochs_a_batch(stretch) > t.max_epochs
    severity: Severity = "warning" if wait > t.min_wait and not short else "info"
    steps = [int(row["step"]) for row in stretch]
    when = f"since step {steps[0]}" if since else "from the start"
    return [
        Finding(
            rule="input_bound",
            severity=severity,
            first_step=steps[0] if since else 0,
            last_step=steps[-1],
            observed=share,
            threshold=t.max_share,
            unit="share of the time, waiting for data",
            evidence=Evidence(HARDWARE_FILE, evidence_steps(steps)),
            message=(
                f"Training waits for data {100 * share:.0f} % of its time {when}: "
                f"{wait:.1f} ms for each batch. The model could be trained in "
                f"{100 * (1 - share):.0f} % of the time."
            ),
            suggestion=(
                "Give the DataLoader more workers (`num_workers`, `persistent_workers=True`, "
                "`pin_memory=True` with a GPU). Then do once what is done for each sample: decode "
                "and resize ahead, cache, read in larger pieces. Slow loggers and callbacks "
                "between two batches count here too."
            ),
            confidence=0.9 if share > 0.7 else 0.75,
        )
    ]


def _epochs_a_batch(rows: list[dict[str, Any]]) -> float:
    """Epochs that end for each batch: what they cost is waiting too, but not for data."""
    batches = sum(number(row, "batches") for row in rows[1:] if row.get("batches") is not None)
    passed = number(rows[-1], "epoch") - number(rows[0], "epoch")
    return passed / batches if batches > 0 and passed == passed else 0.0


def _wait(row: dict[str, Any]) -> float:
    """Milliseconds of waiting for a batch."""
    batches, share = number(row, "batches"), number(row, "data_wait")
    if batches > 0 and number(row, "seconds") >= 0:
        return 1000 * share * number(row, "seconds") / batches
    return 1000 * number(row, "step_seconds") * share / max(1 - share, 1e-9)


@dataclass(frozen=True)
class MemoryGrowth:
    """Thresholds of `memory_growth`."""

    min_share: float = field(default=0.05, metadata={"unit": "of the memory after the warm-up"})
    min_growth: float = field(default=32.0, metadata={"unit": "MiB"})
    first_epoch: float = field(default=3.0, metadata={"unit": "times more, in the first epoch"})
    warmup_share: float = field(default=0.2, metadata={"unit": "share of the rows, not counted"})
    min_rows: float = field(default=5, metadata={"unit": "rows since the rise began"})
    rising: float = field(default=0.75, metadata={"unit": "share of the parts that rise"})
    steady: float = field(default=0.4, metadata={"unit": "rise of the last part over the mean"})
    critical_percent: float = field(default=90.0, metadata={"unit": "percent of the memory"})


@rule(
    "memory_growth",
    family="machine",
    needs="hardware",
    thresholds=MemoryGrowth,
    reference="SageMaker Debugger's GPUMemoryIncrease; PyTorch FAQ: history kept by an "
    "accumulated loss.",
)
def memory_growth(hardware: "pl.DataFrame", thresholds: MemoryGrowth) -> list[Finding]:
    """Memory that rises as long as training goes on, and does not level off.

    Allocators and caches fill at the start; a leak goes on at the same pace.
    """
    found = []
    for name, words in (
        ("gpu_memory_allocated", "on the GPU"),
        ("process_memory", "of the process"),
    ):
        if name in hardware.columns:
            found.append(_growth(hardware, name, words, thresholds))
    known = [one for one in found if one is not None]
    return [max(known, key=lambda one: one.rank)] if known else []


_PARTS = 4


def _growth(hardware: "pl.DataFrame", name: str, words: str, t: MemoryGrowth) -> Finding | None:
    columns = (name, "epoch", "memory_percent", "gpu_memory_percent")
    known = [row for row in sorted_rows(hardware, columns) if row.get(name) is not None]
    rows = known[math.ceil(t.warmup_share * len(known)) :]
    rows = rows[_start([number(row, name) for row in rows]) :]
    if len(rows) < t.min_rows:
        return None
    values = [number(row, name) for row in rows]
    growth = values[-1] - values[0]
    within = rows[0].get("epoch") in (None, 0) and rows[-1].get("epoch") in (None, 0)
    least = max(t.min_growth, t.min_share * values[0]) * (t.first_epoch if within else 1.0)
    if growth < least or not _steady(values, t):
        return None
    steps = [int(row["step"]) for row in rows]
    pace = growth / max(1, steps[-1] - steps[0])
    on_gpu = name.startswith("gpu")
    full = number(rows[-1], "gpu_memory_percent" if on_gpu else "memory_percent")
    severity: Severity = "critical" if full > t.critical_percent else "warning"
    rest = ""
    if on_gpu and 0 < full < 100:
        rest = f" At this pace it is full in {values[-1] / full * (100 - full) / pace:.0f} steps."
    return Finding(
        rule="memory_growth",
        severity=severity,
        first_step=_began(known, name, steps[0], t.steady * pace),
        last_step=steps[-1],
        observed=growth,
        threshold=least,
        unit="MiB",
        evidence=Evidence(HARDWARE_FILE, evidence_steps(steps)),
        message=(
            f"The memory {words} rises steadily: from {values[0]:.0f} to {values[-1]:.0f} MiB "
            f"between steps {steps[0]} and {steps[-1]}, {1024 * pace:.0f} KiB a step, and does not "
            f"level off.{rest}"
        ),
        suggestion=(
            "Look for a list or sum that keeps losses or outputs with their graphs: append "
            "`loss.item()` or `loss.detach()`. Then hooks that are added at every step, caches "
            "without a limit, `backward(retain_graph=True)`, and metrics that are never reset."
        ),
        confidence=0.8,
    )


def _began(rows: list[dict[str, Any]], name: str, step: int, pace: float) -> int:
    """The first step of the rise, which may lie in the warm-up: as far back as it goes on."""
    earlier = [row for row in rows if int(row["step"]) <= step]
    for before, after in reversed(list(pairwise(earlier))):
        steps = int(after["step"]) - int(before["step"])
        if number(after, name) - number(before, name) < pace * steps:
            break
        step = int(before["step"])
    return step


def _start(values: list[float]) -> int:
    """Where the rise begins: the last row that is hardly above the lowest."""
    if not values:
        return 0
    low = min(values)
    edge = low + 0.03 * (values[-1] - low)
    return max(place for place, value in enumerate(values) if value <= edge or value == low)


def _steady(values: list[float], t: MemoryGrowth) -> bool:
    """Whether each part of the series carries its share of the rise, up to the last.

    What rises by a leap and rests is no leak, nor what rises ever less.
    """
    count = min(_PARTS, len(values) - 1)
    places = [round(part * (len(values) - 1) / count) for part in range(count + 1)]
    rises = [values[b] - values[a] for a, b in pairwise(places)]
    even = (values[-1] - values[0]) / count
    rising = sum(rise > t.steady * even for rise in rises) / count
    back = sum(after < before - 0.1 * even for before, after in pairwise(values))
    return rising >= t.rising and rises[-1] > t.steady * even and back <= 0.1 * len(values)


@dataclass(frozen=True)
class GpuUnderused:
    """Thresholds of `gpu_underused`."""

    max_percent: float = field(default=30.0, metadata={"unit": "percent of the time, 95th of 100"})
    noted_percent: float = field(default=70.0, metadata={"unit": "percent of the time"})
    min_idle: float = field(default=20.0, metadata={"unit": "milliseconds of idling a batch"})
    max_wait: float = field(default=0.5, metadata={"unit": "share of the time, waiting for data"})
    min_rows: float = field(default=5, metadata={"unit": "rows"})
    warmup_share: float = field(default=0.1, metadata={"unit": "share of the rows, not counted"})


@rule(
    "gpu_underused",
    family="machine",
    needs="hardware",
    thresholds=GpuUnderused,
    reference="SageMaker Debugger's LowGPUUtilization: 95th percentile below 70 %.",
)
def gpu_underused(hardware: "pl.DataFrame", thresholds: GpuUnderused) -> list[Finding]:
    """A GPU that rests for most of each step, although data are there.

    A small model cannot fill a large GPU: it is a warning only where each batch loses time.
    """
    t = thresholds
    if "gpu_percent" not in hardware.columns:
        return []
    rows = [
        row
        for row in sorted_rows(hardware, (*_SPEED, "gpu_percent"))
        if row.get("gpu_percent") is not None
    ]
    rows = rows[math.ceil(t.warmup_share * len(rows)) :]
    if len(rows) < t.min_rows:
        return []
    used = sorted(number(row, "gpu_percent") for row in rows)
    high = used[min(len(used) - 1, math.ceil(0.95 * len(used)) - 1)]
    waits = [number(row, "data_wait") for row in rows if row.get("data_wait") is not None]
    if high >= t.noted_percent or (waits and median(waits) > t.max_wait):
        return []
    seconds = [number(row, "step_seconds") for row in rows if row.get("step_seconds") is not None]
    idle = 1000 * median(seconds) * (1 - median(used) / 100) if seconds else 0.0
    severity: Severity = "warning" if high < t.max_percent and idle > t.min_idle else "info"
    steps = [int(row["step"]) for row in rows]
    return [
        Finding(
            rule="gpu_underused",
            severity=severity,
            first_step=steps[0],
            last_step=steps[-1],
            observed=high,
            threshold=t.max_percent if severity == "warning" else t.noted_percent,
            unit="percent of the time",
            evidence=Evidence(HARDWARE_FILE, evidence_steps(steps)),
            message=(
                f"The GPU is busy for at most {high:.0f} % of the time (95th percentile), though "
                f"data are there: in each batch it idles for about {idle:.0f} ms, waiting for the "
                "processor."
            ),
            suggestion=(
                "Try a larger batch first. Then look for what holds the processor up in "
                "`training_step`: `.item()`, `.cpu()` and printing, Python loops over tensors, "
                "many small operations (`torch.compile` fuses them)."
            ),
            confidence=0.7,
        )
    ]
