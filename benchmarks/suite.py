"""What each diagnostic costs on the demo's transformer, and what all of them cost together.

One by one: a diagnostic measures every n-th step of a training, and each measured step is compared
with the ordinary ones just before and behind it, so that a machine which slows down slows both.
The median of these differences is what a measured step costs; divided by the default interval, and
with what the hooks take on ordinary steps added, it is what the diagnostic costs a training.

Together: trainings with and without the suite at its default intervals in turn, in one process,
compared by their whole time over steps in which every interval comes up.

Run from a checkout: ``python -m benchmarks.suite [--steps 500] [--suite full] [--write]``.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning_diag
from benchmarks.bench import device, machine, options, quiet_machine, spread, table, write
from lightning_diag import RunLogger, read_run, suite
from lightning_diag.callbacks.base import Diagnostic
from lightning_diag.lightning import PACKAGE, Callback, LightningModule, Trainer
from lightning_diag.suites import SUITES

EVERY, WARM_UP, GOAL = 5, 10, 1.01
# epochs are shorter than a default interval of these; what they cost is asked for by the epoch
BY_EPOCH = {"BlobMetrics"}
# their rows arise while others measure
BESIDE = {"HealthAlerts": "GradientHealth"}


class Clock(Callback):
    """The time from each batch start to the next."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        if device().type == "cuda":
            import torch

            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """One number a batch."""
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def project() -> tuple[LightningModule, Any]:
    """The model and the data of the demo."""
    from hydra import compose, initialize
    from hydra.utils import instantiate

    with initialize(version_base="1.3", config_path="../conf"):
        overrides = ["experiment=code_transformer", "run_dir=unused"]
        config = compose("train", overrides=overrides)
    return instantiate(config.model, _convert_="all"), instantiate(config.data, _convert_="all")


def train(steps: int, diagnostics: Sequence[Diagnostic], folder: str) -> list[float]:
    """Seconds of each step of one training."""
    import torch

    torch.manual_seed(0)
    module, data = project()
    clock = Clock()
    trainer = Trainer(
        accelerator="gpu" if device().type == "cuda" else "cpu",
        devices=1,
        max_steps=steps + 1,
        max_epochs=-1,
        limit_val_batches=0,
        logger=RunLogger(folder) if diagnostics else False,
        callbacks=[clock, *diagnostics],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    return clock.seconds()


def one_by_one(names: Sequence[str], steps: int) -> list[list[str]]:
    """A row for each diagnostic."""
    rows = []
    for name in names:
        kind: Callable[..., Diagnostic] = getattr(lightning_diag, name)
        beside = [getattr(lightning_diag, BESIDE[name])(every_n_steps=1)] if name in BESIDE else []
        default = kind().every_n_steps
        with tempfile.TemporaryDirectory() as folder:
            arguments = {} if name in BY_EPOCH else {"every_n_steps": EVERY}
            if default == 1:
                arguments = {"every_n_steps": 2}
            diagnostic = kind(**arguments)
            seconds = train(steps, [*beside, diagnostic], folder)
            overhead = read_run(folder).frame("overhead").filter(diagnostic=name).to_dicts()
        every = arguments.get("every_n_steps")
        rows.append(_row(name, default, every, seconds, overhead))
        print(" | ".join(rows[-1]), flush=True)
    return rows


def _row(
    name: str,
    default: object,
    every: int | None,
    seconds: list[float],
    overhead: list[dict[str, Any]],
) -> list[str]:
    last = overhead[-1] if overhead else {}
    own = last.get("seconds", 0.0) / max(1, last.get("measured", 1))
    if every is None:
        return [name, "1 epoch", f"{1000 * own:.1f}", "-", "-"]
    base = statistics.median(seconds)
    ordinary = {i for i in range(WARM_UP, len(seconds)) if (i + 1) % every}
    extra = [
        seconds[i] - statistics.mean(seconds[j] for j in (i - 1, i + 1))
        for i in range(WARM_UP, len(seconds) - 1)
        if i not in ordinary and {i - 1, i + 1} <= ordinary
    ]
    cost = statistics.median(extra)
    interval = default if isinstance(default, int) else every
    return [
        name,
        str(default),
        f"{1000 * own:.1f}",
        f"{1000 * cost:.1f}",
        f"{cost / base:.3f}",
        f"{cost / base / interval:.4f}",
    ]


def together(name: str, steps: int, rounds: int) -> tuple[list[float], list[str]]:
    """Ratios of whole trainings, and the share that each diagnostic says of itself."""
    ratios, shares = [], []
    for number in range(rounds):
        spent = {}
        for watched in (False, True) if number % 2 else (True, False):
            with tempfile.TemporaryDirectory() as folder:
                found = train(steps, suite(name) if watched else [], folder)  # type: ignore[arg-type]
                spent[watched] = sum(found[WARM_UP:])
                if watched:
                    rows = read_run(folder).frame("overhead").to_dicts()
                    last = {row["diagnostic"]: row for row in rows}
                    shares = [f"{key} {row['share']:.2%}" for key, row in last.items()]
        ratios.append(spent[True] / spent[False])
        print(f"round {number + 1}: {ratios[-1]:.4f}", flush=True)
    return ratios, shares


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of each training with the suite")
    parser.add_argument("--short", type=int, default=100, help="steps with one diagnostic")
    parser.add_argument("--suite", choices=SUITES, default="full")
    parser.add_argument("--only", choices=SUITES["full"], action="append")
    chosen = options(parser, rounds=3)
    warnings.simplefilter("ignore")
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    logging.getLogger(f"{PACKAGE}.utilities.rank_zero").setLevel(logging.ERROR)
    quiet = quiet_machine(chosen.wait)
    head = ["diagnostic", "interval", "own ms a measurement", "ms a measured step"]
    head += ["x an ordinary step", "share at its interval"]
    rows = one_by_one(chosen.only or SUITES[chosen.suite], chosen.short)
    rows = [row + ["-"] * (len(head) - len(row)) for row in rows]
    text = table(head, rows)
    said = []
    if chosen.rounds:
        ratios, shares = together(chosen.suite, chosen.steps, chosen.rounds)
        middle = statistics.median(ratios)
        word = "met" if middle <= GOAL else "missed"
        if max(ratios) - min(ratios) > GOAL - 1:
            word += f", though the rounds differ by {max(ratios) - min(ratios):.3f}"
        said.append(
            f'`suite("{chosen.suite}")` over {chosen.steps} steps: {spread(ratios)} of the time '
            f"without. Goal at most {GOAL}: {word}."
        )
        said.append(f"By their own clocks: {', '.join(shares)}.")
    print("\n\n".join([machine(), quiet, text, *said]), flush=True)
    if chosen.write:
        write("All diagnostics, the demo's transformer", f"{machine()} {quiet}", text, *said)


if __name__ == "__main__":
    main()
