"""How busy the machine was, and whether training waited for data, out of HardwareMonitor's rows."""

import statistics
from typing import TYPE_CHECKING

from lightning_diag.report.section import Section, Table
from lightning_diag.report.series import Panel, line_chart
from lightning_diag.report.words import short

if TYPE_CHECKING:
    import polars as pl

    from lightning_diag.records.read_run import Run

__all__ = ["hardware_section"]

Points = list[tuple[float, float | None]]

# key of the rows, name for people, unit, factor
_NUMBERS = (
    ("samples_per_second", "throughput", "samples/s", 1.0),
    ("batches_per_second", "throughput", "batches/s", 1.0),
    ("step_seconds", "time of a batch", "ms", 1000.0),
    ("data_wait", "waiting for data", "% of the time", 100.0),
    ("mfu", "share of the peak", "%", 100.0),
    ("gpu_percent", "GPU in use", "% of the time", 1.0),
    ("gpu_memory_percent", "GPU memory", "%", 1.0),
    ("gpu_memory_used", "GPU memory", "MiB", 1.0),
    ("gpu_memory_peak", "GPU memory, peak of PyTorch", "MiB", 1.0),
    ("gpu_temperature", "GPU temperature", "°C", 1.0),
    ("gpu_power", "GPU power", "W", 1.0),
    ("cpu_percent", "processors in use", "%", 1.0),
    ("process_cpu_percent", "processor of this process", "% of a core", 1.0),
    ("memory_percent", "memory of the machine", "%", 1.0),
    ("process_memory", "memory of this process", "MiB", 1.0),
)
_PANELS = {
    "samples per second": ("samples_per_second",),
    "share, %": ("data_wait", "gpu_percent", "cpu_percent", "mfu"),
    "memory, %": ("gpu_memory_percent", "memory_percent"),
    "memory of the process, MiB": ("process_memory",),
}
_MUCH = 0.2


def hardware_section(run: "Run") -> Section | None:
    """Throughput, the wait for data, and the use of processors, memory and GPU.

    Args:
        run: What `read_run` returned.

    Returns:
        None where the run has no such rows.
    """
    frame = run.frame("hardware")
    known = {key: points for key, *_ in _NUMBERS if (points := _points(frame, key))}
    if not known:
        return None
    charts = {"hardware": line_chart("Machine", _panels(known))}
    return Section("Machine", lines=tuple(_lines(known)), tables=(_table(known),), charts=charts)


def _points(frame: "pl.DataFrame", key: str) -> Points:
    """The numbers of one column by step; none where nothing in it is a finite number."""
    if key not in frame.columns or not frame[key].dtype.is_numeric():
        return []
    pairs = zip(frame["step"], frame[key], strict=True)
    points = sorted(((s, v) for s, v in pairs if s is not None), key=lambda point: point[0])
    return points if any(value is not None for _, value in points) else []


def _values(points: Points) -> list[float]:
    return [float(value) for _, value in points if value is not None]


def _table(known: dict[str, Points]) -> Table:
    rows = []
    for key, name, unit, factor in _NUMBERS:
        values = [factor * value for value in _values(known.get(key, []))]
        if values:
            numbers = (statistics.median(values), min(values), max(values), values[-1])
            rows.append((name, unit, *(short(number) for number in numbers)))
    return Table(("what", "unit", "median", "least", "most", "last"), rows, left=2)


def _lines(known: dict[str, Points]) -> list[str]:
    lines = []
    speed = _values(known.get("samples_per_second", []))
    if speed:
        lines.append(f"{short(statistics.median(speed))} samples per second (median).")
    waits = _values(known.get("data_wait", []))
    if waits:
        wait = statistics.median(waits)
        said = f"{100 * wait:.1f} % of the time went between batches, mostly in waiting for data"
        hint = ": more `num_workers`, or `pin_memory=True`, may help." if wait > _MUCH else "."
        lines.append(said + hint)
    if not any(key.startswith("gpu") for key in known):
        lines.append("No numbers of a GPU were recorded.")
    return lines


def _panels(known: dict[str, Points]) -> list[Panel]:
    names = {key: name for key, name, _, _ in _NUMBERS}
    factors = {key: factor for key, _, _, factor in _NUMBERS}
    return [
        Panel(
            label,
            {
                names[key]: [(s, None if v is None else factors[key] * v) for s, v in known[key]]
                for key in keys
                if key in known
            },
            height=140,
        )
        for label, keys in _PANELS.items()
        if any(key in known for key in keys)
    ]
