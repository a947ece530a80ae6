"""Does the live page keep up with a long run, and with a sweep of 200?

A look is what the page asks for every few seconds: the new rows are read, the run is judged, and
all numbers and findings are told. The long run has a million rows of gradients, losses, metrics
and updates already; before each look one row a component is appended to each file. Drawing is
timed apart, since only charts in view whose rows changed are drawn.

From a source checkout: ``python -m benchmarks.monitor [--rows 1000000] [--runs 200] [--write]``.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.bench import machine, options, quiet_machine, spread, table, write
from lightning_diag.monitor.live_charts import CHARTS
from lightning_diag.monitor.watched_runs import WatchedRuns

GOAL_MS, GOAL_SWEEP_S = 200.0, 1.0
PARTS = ("embedding", "encoder", "decoder", "head")
EVERY = 10
REST = 5.0  # seconds, the page's own interval
clock = time.perf_counter


def rows_of(step: int) -> dict[str, list[dict[str, object]]]:
    """One measurement of a healthy run, by record file."""
    base = {"step": step, "epoch": 0, "time": 1000.0 + step / 10, "attempt": 1}
    wave = 1 + (step // EVERY * 7919 % 101) / 1000
    loss = wave * (0.5 + 2 / (1 + step / 2000))
    norms = [
        {**base, "component": name, "l2": 0.3 * wave, "count": 1000, "tensors": 4, "missing": 0}
        for name in PARTS
    ]
    whole = {"l2": 0.6 * wave, "count": 4000, "tensors": 16, "missing": 0}
    updates = [
        {**base, "component": name, "ratio": 1e-3 * wave, "lr": 1e-3, "weight_l2": 10.0}
        for name in PARTS
    ]
    seen = {"first_step": step - EVERY + 1, "steps": EVERY, "loss": loss, "lr": 1e-3}
    return {
        "grad": [*norms, {**base, "component": None, **whole}],
        "update": updates,
        "loss": [{**base, "component": None, **seen}],
        "metrics": [{**base, "component": None, "train_loss": loss}],
    }


def make_run(folder: Path, first: int, measurements: int, status: str) -> None:
    """Write a run, or more of one."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    attempt = {"attempt": 1, "first_step": 0, "started": 1000.0}
    info = {"status": status, "planned_steps": 10**8, "attempts": [attempt]}
    (folder / "run.json").write_text(json.dumps(info))
    lines: dict[str, list[str]] = {}
    for number in range(first, first + measurements):
        for name, rows in rows_of(EVERY * (number + 1) - 1).items():
            lines.setdefault(name, []).extend(json.dumps(row) + "\n" for row in rows)
    for name, some in lines.items():
        with (folder / "records" / f"{name}.jsonl").open("a") as stream:
            stream.writelines(some)


def seconds(work: Callable[[], object]) -> float:
    """How long it took: what all threads computed, if that is asked for, else what passed."""
    start = clock()
    work()
    return clock() - start


def long_run(folder: Path, rows: int, rounds: int) -> tuple[list[float], dict[str, list[float]]]:
    """Milliseconds of each look, and of drawing each chart."""
    measurements = rows // sum(len(own) for own in rows_of(0).values())
    make_run(folder, 0, measurements, "running")
    runs = WatchedRuns(folder, interval=1e-9)
    first = seconds(lambda: runs.look(at_once=True))
    while runs.runs[0].behind:
        first += seconds(lambda: runs.look(at_once=True))
    print(f"{rows} rows read in {first:.1f} s")
    looks: list[float] = []
    drawn: dict[str, list[float]] = {}
    for number in range(rounds):
        make_run(folder, measurements + number, 1, "running")
        # the rules rest for a while after a look
        time.sleep(REST)
        looks.append(1000 * seconds(runs.state))
        for name in CHARTS:
            if name in runs.runs[0].versions:
                took = seconds(lambda name=name: runs.chart(0, name))
                drawn.setdefault(name, []).append(1000 * took)
        print(f"round {number}: a look {looks[-1]:.0f} ms")
    return looks, drawn


def sweep(folder: Path, count: int, rounds: int) -> tuple[float, list[float], list[float]]:
    """Seconds until all runs are read; of a look after that; of one where a run goes on."""
    for number in range(count):
        make_run(folder / str(number), 0, 100, "finished")
    runs = WatchedRuns(folder, interval=1e-9)
    first = seconds(runs.state)
    while runs.state()["behind"]:
        pass
    whole = first
    quiet = [seconds(runs.state) for _ in range(rounds)]
    busy = []
    for number in range(rounds):
        make_run(folder / "0", 100 + number, 1, "running")
        busy.append(seconds(runs.state))
    return whole, quiet, busy


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=200)
    arguments = options(parser, rounds=10)
    if arguments.cpu_seconds:
        global clock
        clock = time.process_time
    load = quiet_machine(arguments.wait)
    with tempfile.TemporaryDirectory() as folder:
        looks, drawn = long_run(Path(folder) / "long", arguments.rows, arguments.rounds)
        first, quiet, busy = sweep(Path(folder) / "sweep", arguments.runs, arguments.rounds)
    rows = [
        [f"a look at {arguments.rows:,} rows, ms", spread(looks, 0)],
        *([f"drawing `{name}`, ms", spread(took, 0)] for name, took in drawn.items()),
        [f"first answer about {arguments.runs} runs, s", f"{first:.2f}"],
        ["a look at them, nothing new, s", spread(quiet, 3)],
        ["a look at them, one goes on, s", spread(busy, 3)],
    ]
    found = table(["", "median (range)"], rows)
    goal = " ".join(
        f"Goal, {what} at most {most:g} {unit}: {took:.3g}, {'met' if took <= most else 'missed'}."
        for what, most, unit, took in (
            ("a look", GOAL_MS, "ms", median(looks)),
            ("a look at the sweep", GOAL_SWEEP_S, "s", median(busy)),
        )
    )
    print(found, goal, sep="\n\n")
    if arguments.write:
        counted = " Seconds of all threads." if arguments.cpu_seconds else ""
        write("The live page", f"{machine()} {load}{counted}", found, goal)


if __name__ == "__main__":
    main()
