"""`make faults`: train every case, diagnose it, and say how right the rules are."""

import argparse
import importlib
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

importlib.import_module(os.environ.get("LIGHTNING_DIAG_TEST_PACKAGE", "pytorch_lightning"))

from tests.faults.case import all_cases  # noqa: E402
from tests.faults.trial import Setting, Trial, attempt  # noqa: E402


def run_one(name: str, folder: str, setting: Setting) -> Trial | str:
    """One case in a process of its own; what went wrong, if it could not be run."""
    import logging

    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    try:
        trial = attempt(all_cases()[name], Path(folder) / name, setting)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return trial


def line(name: str, trial: "Trial | str") -> str:
    """One case in one line."""
    if isinstance(trial, str):
        return f"{name:44} ERROR {trial}"
    case, half = trial.case, "held out" if trial.case.held_out else "tuned"
    said = [
        f"{one.rule}{'' if one.rank > 1 else '?'}@{one.first_step}" for one in trial.accusations
    ]
    if case.healthy:
        word = "ACCUSED" if said else "quiet"
    else:
        word = "MISSED" if not trial.found else "right" if trial.right_cause else "WRONG CAUSE"
    delay = "" if trial.delay is None else f" +{trial.delay}"
    return f"{name:44} {half:8} {word:11}{delay:5} {' '.join(said)} {trial.error}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases, or beginnings of names; all if none")
    parser.add_argument("--setting", choices=["close", "default"], default="close")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="folder for the runs")
    parser.add_argument("--half", choices=["tuned", "held-out", "both"], default="both")
    given = parser.parse_args()
    cases = all_cases()
    names = [n for n in cases if not given.names or any(n.startswith(g) for g in given.names)]
    if given.half != "both":
        names = [n for n in names if cases[n].held_out == (given.half == "held-out")]
    if not names:
        sys.exit(f"no case begins with {', '.join(given.names)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(given.keep or scratch)
        with ProcessPoolExecutor(given.processes) as pool:
            futures = {n: pool.submit(run_one, n, folder, given.setting) for n in names}
            trials = {}
            for name, future in futures.items():
                trials[name] = future.result()
                print(line(name, trials[name]), flush=True)


if __name__ == "__main__":
    main()
