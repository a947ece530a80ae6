"""How long `quick_moments` and `moments` take, over one `sum` pass of the same bytes.

Run from a checkout: ``python -m benchmarks.moments [--write]``.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarks.bench import (
    Times,
    Transformer,
    device,
    machine,
    options,
    quiet_machine,
    spread,
    table,
    write,
)
from lightning_diag.functional.moments import moments, quick_moments

GOAL = 2.5


def main() -> None:
    """Measure, print, and write if asked to."""
    chosen = options(argparse.ArgumentParser(description=__doc__), rounds=25)
    quiet = quiet_machine(chosen.wait)

    generator = torch.Generator().manual_seed(0)
    shapes = [parameter.shape for parameter in Transformer("30 M").parameters()]
    tensors = [torch.randn(s, generator=generator).mul_(1e-3).to(device()) for s in shapes]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    arms: dict[str, Callable[[], object]] = {
        "one `sum` over one flat tensor": flat.sum,
        "`sum` of each tensor": lambda: [tensor.sum() for tensor in tensors],
        "`quick_moments`": lambda: quick_moments(tensors),
        "`moments`": lambda: moments(tensors),
        "seven statistics, `.item()` each": lambda: [_seven(tensor) for tensor in tensors],
    }
    times = measure(arms, chosen.rounds, cpu_seconds=chosen.cpu_seconds)
    base = times["one `sum` over one flat tensor"]
    ratios = {
        name: [a / b for a, b in zip(found, base, strict=True)] for name, found in times.items()
    }
    rows = [
        [name, f"{1000 * statistics.median(times[name]):.1f}", spread(found, 2)]
        for name, found in ratios.items()
    ]
    size = f"{flat.numel() / 1e6:.1f} M float32 in {len(tensors)} tensors"
    text = table(
        [size, "CPU ms" if chosen.cpu_seconds else "ms", "x one `sum` pass, median (range)"], rows
    )
    verdict = _verdict(statistics.median(ratios["`quick_moments`"]))
    print(f"{machine()}\n{quiet}\n\n{text}\n\n{verdict}")
    if chosen.write:
        write("Moments", machine() + " " + quiet, text, verdict)


def measure(
    arms: dict[str, Callable[[], object]], rounds: int, *, cpu_seconds: bool
) -> dict[str, list[float]]:
    """Seconds of each function, all of them in turn in every round."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 2):
        for name, function in arms.items():
            clock = Times(cpu_seconds=cpu_seconds)
            clock.mark()
            function()
            clock.mark()
            if number >= 2:
                times[name] += clock.seconds()
    return times


def _seven(x: torch.Tensor) -> tuple[float, ...]:
    numbers = (x.norm(), x.mean(), x.std(), x.max(), x.min(), x.isnan().any(), x.isinf().any())
    return tuple(number.item() for number in numbers)


def _verdict(ratio: float) -> str:
    word = "is met" if ratio <= GOAL else "is missed"
    return f"Goal, `quick_moments` in at most {GOAL} passes: {ratio:.2f}, {word}."


if __name__ == "__main__":
    main()
