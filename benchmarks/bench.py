"""What the benchmarks share: the network, the clock, the table and the file of results."""

import os
import platform
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_diag.lightning import PACKAGE

__all__ = [
    "Times",
    "Transformer",
    "device",
    "machine",
    "options",
    "quiet_machine",
    "spread",
    "table",
    "write",
]

RESULTS = Path(__file__).with_name("RESULTS.md")
# name: width, layers, vocabulary
SIZES = {"5 M": (256, 6, 1000), "30 M": (512, 8, 5000)}


class Transformer(nn.Module):
    """A pre-norm encoder with tied embedding and head.

    Args:
        size: A key of `SIZES`.
    """

    def __init__(self, size: str) -> None:
        super().__init__()
        width, layers, vocabulary = SIZES[size]
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, 8, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, length, vocabulary)`` of tokens ``(batch, length)``."""
        hidden: Tensor = self.norm(self.encoder(self.embed(tokens)))
        return hidden @ self.embed.weight.t()


class Times:
    """Marks in time, on the device's own clock where it has one.

    Args:
        cpu_seconds: Count the seconds that this process has computed, not those that have passed:
            on a machine that others use, with one thread, this is what comes nearest to the truth.
    """

    def __init__(self, *, cpu_seconds: bool = False) -> None:
        self._clock = time.process_time if cpu_seconds else time.perf_counter
        self._seconds: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Note this moment."""
        if device().type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._seconds.append(self._clock())

    def seconds(self) -> list[float]:
        """The times between one mark and the next."""
        if self._events:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(self._events)]
        return [b - a for a, b in pairwise(self._seconds)]


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, and the smallest and largest value in brackets."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def options(parser: ArgumentParser, rounds: int) -> Namespace:
    """The command line that the benchmarks share."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--wait", type=float, default=0, help="minutes to wait for quiet")
    parser.add_argument("--cpu-seconds", action="store_true", help="for a machine that is busy")
    parser.add_argument("--write", action="store_true", help="append to RESULTS.md")
    return parser.parse_args()


def quiet_machine(minutes: float, load: float = 1.0) -> str:
    """Wait until nobody else computes.

    Args:
        minutes: How long to wait at most.
        load: Load average of the last minute that counts as quiet.

    Returns:
        A sentence on whether it was.
    """
    deadline = time.monotonic() + 60 * minutes
    while os.getloadavg()[0] >= load and time.monotonic() < deadline:
        time.sleep(5)
    now = os.getloadavg()[0]
    busy = "" if now < load else ", so others were computing meanwhile: read with care"
    return f"Load average at the start {now:.1f}{busy}."


def machine() -> str:
    """Date, processor and versions in one line."""
    names = ("torch", PACKAGE.partition(".")[0].replace("_", "-"), "lightning-diag")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    where = torch.cuda.get_device_name() if device().type == "cuda" else _processor()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{now}; {where}, {torch.get_num_threads()} threads; {versions}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[*head], ["-" * width for width in widths], *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def write(title: str, *paragraphs: str) -> None:
    """Append a dated section to RESULTS.md."""
    text = "\n\n".join([f"## {title}", *paragraphs]) + "\n"
    before = RESULTS.read_text("utf-8") if RESULTS.exists() else "# Results\n"
    RESULTS.write_text(f"{before}\n{text}", "utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
