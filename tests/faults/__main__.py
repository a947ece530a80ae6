"""`make faults`: train all cases, diagnose them, mend what can be mended, and count."""

import argparse
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

importlib.import_module(os.environ.get("LIGHTNING_DIAG_TEST_PACKAGE", "pytorch_lightning"))

from tests.faults.case import all_cases  # noqa: E402  (after the choice)
from tests.faults.repair import Repair, repair  # noqa: E402
from tests.faults.results import results, summary  # noqa: E402
from tests.faults.trial import Setting, Trial, attempt  # noqa: E402

RESULTS = Path(__file__).with_name("RESULTS.md")
_Outcome = TypeVar("_Outcome", Trial, Repair)


def tried(name: str, folder: str, setting: Setting) -> Trial | str:
    """One case; or why it could not be run."""
    return _safely(lambda: attempt(all_cases()[name], Path(folder) / name, setting))


def mended(name: str, folder: str) -> Repair | str:
    """One case, mended; or why it could not be run."""
    case, home = all_cases()[name], Path(folder)
    return _safely(lambda: repair(case, home / f"{name}_repair", home / "close" / name))


def _safely(work: Callable[[], _Outcome]) -> _Outcome | str:
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def line(name: str, trial: Trial | str) -> str:
    """One case in one line."""
    if isinstance(trial, str):
        return f"{name:44} ERROR {trial}"
    case = trial.case
    half = "unseen" if case.unseen else "second" if case.held_out else "first"
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
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases, or beginnings of names; all if none")
    parser.add_argument("--setting", choices=["close", "default"], default="close")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--keep", type=Path, help="folder for the runs; those that are there are not trained again"
    )
    parser.add_argument("--settings", default="close,default", help="what --write measures")
    parser.add_argument("--half", choices=["tuned", "held-out", "both"], default="both")
    parser.add_argument("--repair", action="store_true", help="mend the runs that can be mended")
    parser.add_argument("--write", action="store_true", help=f"all of it, into {RESULTS.name}")
    given = parser.parse_args()
    cases = all_cases()
    names = [n for n in cases if not given.names or any(n.startswith(g) for g in given.names)]
    if given.half != "both":
        names = [n for n in names if cases[n].held_out == (given.half == "held-out")]
    if not names:
        sys.exit(f"no case begins with {', '.join(given.names)}")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(given.processes) as pool:
        folder = str(given.keep or scratch)
        trials: dict[str, list[Trial]] = {}
        broken: list[str] = []
        repairs: list[Repair] = []
        wanted: list[Any] = given.settings.split(",")
        settings: list[Setting] = wanted if given.write else [given.setting]
        for setting in settings if given.write or not given.repair else []:
            futures = {n: pool.submit(tried, n, f"{folder}/{setting}", setting) for n in names}
            for name, future in futures.items():
                trial = future.result()
                print(line(name, trial), flush=True)
                if isinstance(trial, str):
                    broken.append(f"{name} ({setting}): {trial}")
                    continue
                trials.setdefault(setting, []).append(trial)
                if trial.error and setting == "close":
                    broken.append(f"{name}: {trial.error}")
        if given.write or given.repair:
            mending = {n: pool.submit(mended, n, folder) for n in names if cases[n].repairable}
            for name, repaired in mending.items():
                done = repaired.result()
                if isinstance(done, str):
                    done = Repair(name, "", end=done)
                repairs.append(done)
                print(
                    f"{name:44} {done.cause:24} {done.rounds} {done.overrides} {done.end}",
                    flush=True,
                )
    for setting, group in trials.items():
        print(f"\n{setting}")
        for what, figure in summary(group).items():
            print(f"  {what:40} {figure}")
    print(*(f"  {one}" for one in broken), sep="\n")
    if repairs:
        print(f"  mended {sum(one.mended for one in repairs)} of {len(repairs)}")
    if given.write:
        RESULTS.write_text(results(trials, repairs, broken))
        print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
