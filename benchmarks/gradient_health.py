"""What GradientHealth costs a training step, beside other ways to watch gradients.

Each way trains the same transformer under a Lightning Trainer for a few steps, one after the
other in turning order, round after round in one process. The time of a step runs from one batch
start to the next. A way that measures at some steps only counts as (1 - m) ordinary + m measured
steps, each by its median, with m the share that it measures. The ratio is taken to "nothing" in
the same round.

Run from a checkout: ``python -m benchmarks.gradient_health [--size "5 M"] [--write]``.
"""

import argparse
import importlib.util
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.bench import (
    SIZES,
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
from lightning_diag import GradientHealth, RunLogger, read_run
from lightning_diag.lightning import PACKAGE, Callback, LightningModule, Trainer
from lightning_diag.records import Run

LENGTH, BATCH, WARM_UP = 32, 8, 5
GOALS = {"GradientHealth, each step": 1.05, "GradientHealth, default": 1.01}


class Module(LightningModule):
    """Predicts the next of random tokens."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.net = Transformer(size)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        logits = self.net(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(Callback):
    """Marks each batch start."""

    def __init__(self, cpu_seconds: bool) -> None:
        self.times = Times(cpu_seconds=cpu_seconds)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: list[Tensor], batch_idx: int
    ) -> None:
        self.times.mark()


class GradNorm(Callback):
    """Lightning's own `grad_norm`, logged."""

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> None:
        utilities = import_module(f"{PACKAGE}.utilities")
        module.log_dict(utilities.grad_norm(module, norm_type=2))


class ItemLoop(Callback):
    """Seven statistics of each parameter's gradient, each read by itself."""

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> None:
        found = {}
        for name, parameter in module.named_parameters():
            g = parameter.grad
            assert g is not None
            found[f"{name}/norm"] = g.norm().item()
            found[f"{name}/mean"] = g.mean().item()
            found[f"{name}/std"] = g.std().item()
            found[f"{name}/max"] = g.max().item()
            found[f"{name}/min"] = g.min().item()
            found[f"{name}/has_nan"] = g.isnan().any().item()
            found[f"{name}/has_inf"] = g.isinf().any().item()


# name: (the callback, steps to train); the default interval must be reached once
WAYS: dict[str, tuple[Callable[[], Callback | None], int]] = {
    "nothing": (lambda: None, 20),
    "GradientHealth, each step": (lambda: GradientHealth(every_n_steps=1), 20),
    "GradientHealth, default": (GradientHealth, 52),
    "GradientHealth, auto": (lambda: GradientHealth(every_n_steps="auto"), 52),
    "Lightning grad_norm, log_dict each step": (GradNorm, 20),
    "seven statistics, .item() each": (ItemLoop, 20),
    "wandb.watch(log_freq=1), offline": (lambda: None, 20),
}


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, action="append")
    chosen = options(parser, rounds=5)
    os.environ["WANDB_SILENT"] = "true"
    warnings.simplefilter("ignore")
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    logging.getLogger(f"{PACKAGE}.utilities.rank_zero").setLevel(logging.ERROR)
    for size in chosen.size or SIZES:
        clock = "CPU seconds" if chosen.cpu_seconds else "wall clock"
        quiet = quiet_machine(chosen.wait)
        times, notes = measure(size, chosen.rounds, cpu_seconds=chosen.cpu_seconds)
        text, verdict = results(times)
        parameters = sum(p.numel() for p in Transformer(size).parameters()) / 1e6
        work = f"{parameters:.1f} M parameters, {BATCH} x {LENGTH} tokens"
        head = f"{work}, {chosen.rounds} rounds, {clock}."
        print("\n\n".join([machine(), head, quiet, text, verdict, *notes]), flush=True)
        if chosen.write:
            write(
                f"GradientHealth, transformer of {size}",
                f"{machine()} {head} {quiet}",
                text,
                verdict,
                *notes,
            )


def measure(
    size: str, rounds: int, *, cpu_seconds: bool
) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds a step of each way in each round, and what could not be measured."""
    ways, notes = dict(WAYS), []
    if importlib.util.find_spec("wandb") is None:
        del ways["wandb.watch(log_freq=1), offline"]
        notes.append("`wandb.watch` was left out: wandb is not installed.")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        # in another order each round, so that none always comes first or after a dear one
        turned = [*ways.items()][number % len(ways) :] + [*ways.items()][: number % len(ways)]
        for name, (make, steps) in turned:
            clock = Clock(cpu_seconds)
            times[name].append(train(size, clock, make(), steps, "wandb" in name))
            print(f"round {number + 1}: {name} {1000 * times[name][-1]:.1f} ms", flush=True)
    return times, notes


def train(size: str, clock: Clock, watched: Callback | None, steps: int, wandb: bool) -> float:
    """Seconds a step of one training."""
    torch.manual_seed(0)
    module = Module(size)
    tokens = torch.randint(SIZES[size][2], (BATCH * (steps + 1), LENGTH + 1))
    kinds = import_module(f"{PACKAGE}.loggers")
    with tempfile.TemporaryDirectory() as folder:
        loggers = [kinds.CSVLogger(folder)]
        if isinstance(watched, GradientHealth):
            loggers.append(RunLogger(f"{folder}/run"))
        if wandb:
            loggers = [kinds.WandbLogger(save_dir=folder, offline=True)]
            loggers[0].watch(module, log_freq=1)
        trainer = Trainer(
            accelerator="gpu" if device().type == "cuda" else "cpu",
            devices=1,
            max_steps=steps + 1,
            logger=loggers,
            callbacks=[clock, *([watched] if watched else [])],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader(TensorDataset(tokens), batch_size=BATCH))
        if wandb:
            loggers[0].experiment.finish()
        seconds = dict(list(enumerate(clock.times.seconds()))[WARM_UP:])
        if not isinstance(watched, GradientHealth):
            return statistics.median(seconds.values())
        return _with_rare_steps(seconds, read_run(f"{folder}/run"))


def _with_rare_steps(seconds: dict[int, float], run: Run) -> float:
    measured = set(run.grad["step"]) & seconds.keys()
    ordinary = seconds.keys() - measured
    if not measured or not ordinary:
        return statistics.median(seconds.values())
    base = statistics.median(seconds[step] for step in ordinary)
    dear = statistics.median(seconds[step] for step in measured)
    return base + (dear - base) / int(run.overhead["every_n_steps"][-1])


def results(times: dict[str, list[float]]) -> tuple[str, str]:
    """The table, and a sentence for each goal."""
    base = times["nothing"]
    ratios = {
        name: [a / b for a, b in zip(found, base, strict=True)] for name, found in times.items()
    }
    rows = [
        [name, f"{1000 * statistics.median(times[name]):.1f}", spread(found)]
        for name, found in ratios.items()
    ]
    verdicts = [_verdict(name, ratios[name], goal) for name, goal in GOALS.items()]
    head = ["watched by", "ms a step", "ratio to nothing, median (range)"]
    return table(head, rows), " ".join(verdicts)


def _verdict(name: str, ratios: list[float], goal: float) -> str:
    width = max(ratios) - min(ratios)
    ratio = statistics.median(ratios)
    word = "met" if ratio <= goal else "missed"
    # noise that is wider than the margin decides nothing
    if width > goal - 1:
        word = f"cannot be told, since the rounds differ by {width:.3f}"
    return f"Goal, {name} at most {goal}: {ratio:.3f}, {word}."


if __name__ == "__main__":
    main()
