"""Nine runs, three models with three seeds: `python -m recipes.code.reproduce --out FOLDER`.

Each run is a training of `lightning-diag` of its own, one after the other, in an order in which the
fusion finds the transformer and the graph network of its seed. Killed at any moment and started
again, the command passes over what is finished and resumes what was cut. It ends in
`lightning-diag aggregate FOLDER`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from filelock import FileLock, Timeout

__all__ = ["Job", "jobs", "main", "reproduce"]

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("transformer", "gnn", "fusion")
SEEDS = (42, 2025, 7)
_EXTRA: dict[str, list[str]] = {
    # plain, since its bias on names is the very graph that the other network is given; and in the
    # first steps, while the rate rises, it calls every function safe, as most of them are
    "transformer": ["model.name_bias=null", "callbacks.collapse_stop.warmup_steps=100"],
    "gnn": [],
    "fusion": [],
}
_SMALL = {"transformer": ["trainer.max_epochs=6"]}
# one measure chooses the best epoch of all three
_ALL = [
    "callbacks=cheap",
    "monitor=val_auc",
    "monitor_mode=max",
    "trainer.enable_progress_bar=false",
]
_COMMAND = (sys.executable, "-m", "lightning_diag.cli")
_LOOK_EVERY = 1.0  # seconds
_TAIL_BYTES = 1 << 16


class Job(NamedTuple):
    """One training.

    Attributes:
        model: ``transformer``, ``gnn`` or ``fusion``.
        seed: its seed.
        folder: where it goes, absolute.
        overrides: what `lightning-diag train` is given besides the folder.
    """

    model: str
    seed: int
    folder: Path
    overrides: list[str]

    @property
    def title(self) -> str:
        return f"{self.model}, seed {self.seed}"


def jobs(out: Path, seeds: Sequence[int], settings: Sequence[str], *, full: bool) -> list[Job]:
    """The trainings, each after those that it needs.

    Args:
        out: folder of all runs.
        seeds: one transformer, graph network and fusion each.
        settings: overrides for every run as ``KEY=VALUE``, or for one model as
            ``MODEL:KEY=VALUE``.
        full: whether the experiments at GPU scale are meant.
    """
    made = []
    for seed in seeds:
        folders = {model: out.resolve() / model / f"seed_{seed}" for model in MODELS}
        for model, folder in folders.items():
            overrides = [f"experiment=code_{model}{'_full' * full}", f"seed={seed}", *_ALL]
            overrides += _EXTRA[model] + ([] if full else _SMALL.get(model, []))
            if model == "fusion":
                overrides += [
                    f"model.{branch}_run={_quoted(folders[branch])}" for branch in MODELS[:2]
                ]
            overrides += [text for one in settings if (text := _meant(model, one))]
            made.append(Job(model, seed, folder, overrides))
    return made


def reproduce(out: Path, seeds: Sequence[int], settings: Sequence[str], *, full: bool) -> int:
    """Train what is not yet trained, and aggregate.

    Args:
        out: folder of all runs; one instance at a time may work in it.
        seeds: see `jobs`.
        settings: see `jobs`; the folder keeps to those that it was begun with.
        full: see `jobs`.

    Returns:
        0 where every run is finished, 1 where one is not, 2 where nothing was begun.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            fixed = {"all": _ALL, "extra": _EXTRA, "small": _SMALL}
            plan = {"settings": list(settings), "full": full, "fixed": fixed}
            wrong = _other_plan(out, plan)
            if wrong:
                print(f"error: {wrong}", file=sys.stderr)
                return 2
            return _run_all(out, jobs(out, seeds, settings, full=full))
    except Timeout:
        print(f"error: Another instance is at work in {out}.", file=sys.stderr)
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.code.reproduce", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of runs")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="as in 42,2025,7")
    parser.add_argument("--full", action="store_true", help="the experiments at GPU scale")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="[MODEL:]KEY=VALUE",
        action="append",
        default=[],
        help="an override for every run or, with the model in front, for the runs of one",
    )
    given = parser.parse_args(arguments)
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in given.seeds.split(",")))
    except ValueError:
        parser.error(f"`--seeds` must be whole numbers with commas between, got {given.seeds}.")
    for setting in given.settings:
        if "=" not in setting:
            parser.error(f"`--set` must be written KEY=VALUE, got {setting}.")
    return reproduce(given.out, seeds, given.settings, full=given.full)


def _run_all(out: Path, todo: list[Job]) -> int:
    began = time.monotonic()
    failed: set[tuple[str, int]] = set()
    for number, job in enumerate(todo, start=1):
        clock = _Clock(f"{number}/{len(todo)} {job.title}", began)
        needed = [(model, job.seed) for model in MODELS[:2]] if job.model == "fusion" else []
        lacking = [f"{model}, seed {seed}" for model, seed in needed if (model, seed) in failed]
        if lacking:
            clock.say(f"left out, since there is no sound {' and no '.join(lacking)}")
            failed.add((job.model, job.seed))
        elif not _finish(job, clock):
            failed.add((job.model, job.seed))
    print(f"{len(todo) - len(failed)} of {len(todo)} runs are finished and sound", flush=True)
    done = subprocess.run([*_COMMAND, "aggregate", str(out)], cwd=ROOT, check=False)
    return 1 if failed or done.returncode else 0


def _finish(job: Job, clock: "_Clock") -> bool:
    """Bring a run to its end, and say whether it is sound."""
    _wait_for_orphans(job, clock)
    if _status(job) != "finished":
        checkpoint = job.folder / "checkpoints" / "last.ckpt"
        # a file that was cut while it was written has lost its directory, which stands last
        resumed = zipfile.is_zipfile(checkpoint)
        clock.say("resumes" if resumed else "begins")
        code = _train(job, [f"ckpt_path={_quoted(checkpoint)}"] * resumed, clock)
        if _status(job) != "finished":
            clock.say(f"FAILED with status {code}, see {job.folder / 'train.log'}")
            return False
    elif not _collapsed(job):
        clock.say("was finished before")
    if _collapsed(job):
        clock.say(f"COLLAPSED, see {job.folder / 'collapse_report.json'}")
        return False
    return True


def _train(job: Job, more: list[str], clock: "_Clock") -> int:
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [*_COMMAND, "train", _own(job), *job.overrides, *more]
    # into a file, since a pipe would end the training with this process
    with (job.folder / "train.log").open("ab") as log:
        child = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        said = None
        while child.poll() is None:
            time.sleep(_LOOK_EVERY)
            said = _report(job, said, clock)
        _report(job, said, clock)
        return child.returncode
    finally:
        signal.signal(signal.SIGTERM, before)
        if child.poll() is None:  # this command was interrupted, and takes the training along
            child.terminate()
            child.wait()


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _report(job: Job, said: str | None, clock: "_Clock") -> str | None:
    """Say how far a run is, where that has changed."""
    now = _progress(job.folder / "records" / "metrics.jsonl")
    if now is not None and now != said:
        clock.say(now)
    return now or said


def _progress(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if b'"val_auc"' in line:
            try:
                row = json.loads(line)
                return f"epoch {row['epoch'] + 1}: AUC {row['val_auc']:.3f}, F1 {row['val_f1']:.3f}"
            except (ValueError, KeyError, TypeError):
                continue
    return None


def _wait_for_orphans(job: Job, clock: "_Clock") -> None:
    """Wait for a training of this folder that outlived the command which had started it."""
    mine = _own(job)
    alive = [
        process
        for process in psutil.process_iter(["cmdline"])
        if mine in (process.info["cmdline"] or ()) and process.pid != os.getpid()
    ]
    if alive:
        clock.say(f"still trains from before (process {alive[0].pid}), waiting")
        psutil.wait_procs(alive)


def _other_plan(out: Path, plan: dict[str, Any]) -> str | None:
    """Keep the plan of a folder, or say what is wrong with another one."""
    path = out / "reproduce.json"
    known = _json(path)
    if not known:
        descriptor, temporary = tempfile.mkstemp(dir=out, suffix=".tmp")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(plan, file, indent=2)
        os.replace(temporary, path)
        return None
    for key, value in plan.items():
        if known.get(key) != value:
            name = {"settings": "`--set`", "full": "`--full`"}.get(key, "What this command fixes")
            return f"{name} must be what {out} was begun with, {known.get(key)}, got {value}."
    return None


def _status(job: Job) -> object:
    return _json(job.folder / "run.json").get("status")


def _collapsed(job: Job) -> bool:
    return bool(_json(job.folder / "collapse_report.json").get("collapsed"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _own(job: Job) -> str:
    return f"run_dir={_quoted(job.folder)}"


def _quoted(path: Path) -> str:
    """A path as Hydra reads it, whatever characters it holds."""
    text = str(path).replace("'", "\\'")
    return f"'{text}'"


def _meant(model: str, setting: str) -> str | None:
    """A setting without the model in front, None where another model is meant."""
    name, colon, rest = setting.partition(":")
    if colon and name in MODELS:
        return rest if name == model else None
    return setting


class _Clock:
    """Says things about one run, with the time since the command began."""

    def __init__(self, title: str, began: float) -> None:
        self.title = title
        self.began = began

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {self.title}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
