"""What a learning rate search costs, in steps of the training it precedes, and what a hit costs.

Each round trains the demo's transformer for some steps without and with a search, in one process,
and then again with the answer at hand. A search of n steps also passes each of its batches through
the untrained model once, and reads each loss.

Run from a checkout: ``python -m benchmarks.lr_cache [--rounds 3] [--search 100] [--write]``.
"""

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path

from benchmarks.bench import machine, options, quiet_machine, spread, table, write
from benchmarks.suite import train
from lightning_diag import LRCache, read_run

GOAL_MS, STEPS = 10.0, 20


def rounds(count: int, search: int) -> tuple[list[float], list[float], list[float]]:
    """Of each round: ms of an ordinary step, ordinary steps that a search took, ms of a hit."""
    steps, searches, hits = [], [], []
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            step = statistics.median(train(STEPS, [], folder))
            took = []
            for name in ("search", "first hit", "hit"):
                path = str(Path(folder) / name)
                train(1, [LRCache(cache, num_steps=search)], path)
                (row,) = read_run(path).lr_finder.to_dicts()
                took.append(row["seconds"])
                assert bool(row["cache_hit"]) == (name != "search"), row["reason"]
            steps.append(1000 * step)
            searches.append(took[0] / step)
            hits.append(1000 * took[2])
        print(f"round {number}: {steps[-1]:.1f} ms, {searches[-1]:.0f} steps, {hits[-1]:.1f} ms")
    return steps, searches, hits


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--search", type=int, default=100)
    arguments = options(parser, rounds=3)
    warnings.simplefilter("ignore")
    load = quiet_machine(arguments.wait)
    steps, searches, hits = rounds(arguments.rounds, arguments.search)
    rows = [
        ["ordinary step, ms", spread(steps, 1)],
        [f"search of {arguments.search} steps, in ordinary steps", spread(searches, 0)],
        ["hit, ms", spread(hits, 1)],
    ]
    found = table(["", "median (range)"], rows)
    verdict = "met" if statistics.median(hits) <= GOAL_MS else "missed"
    goal = f"Goal, a hit at most {GOAL_MS:.0f} ms: {statistics.median(hits):.1f}, {verdict}."
    print(found, goal, sep="\n\n")
    if arguments.write:
        write("LRCache, the demo's transformer", f"{machine()} {load}", found, goal)


if __name__ == "__main__":
    main()
