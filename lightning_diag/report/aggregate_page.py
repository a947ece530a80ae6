"""production_report.md: a summary over several runs as text."""

import re
from collections.abc import Sequence
from pathlib import Path

from lightning_diag.report.aggregate import Group, Statistic, Summary, relative
from lightning_diag.report.aggregate_runs import CLEAN, OneRun

__all__ = ["aggregate_page"]


def aggregate_page(summary: Summary, picture: str | None) -> str:
    """The summary as Markdown; names out of the runs are escaped.

    Args:
        summary: What `aggregate` gave.
        picture: File name of the chart, None where it could not be drawn.
    """
    parts = [
        f"# {plain(summary.folder.resolve().name)}",
        *_ground(summary),
        _verdict(summary),
        "## By experiment",
        _experiments(summary),
        *_further(summary),
    ]
    if picture:
        parts += [f"![{plain(summary.metric)} by experiment]({picture})"]
    parts += ["## Run by run", _runs(summary)]
    apart = [run for group in summary.groups for run in group.runs if run.state != CLEAN]
    if apart:
        told = [_apart(run, summary.folder) for run in apart]
        parts += ["## Runs that stand apart", "\n".join(told)]
    return "\n\n".join([*parts, "## How this was counted", _method(summary)]) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it stands."""
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>()#!|&~])", r"\\\1", text)


def _prose(text: str) -> str:
    """A sentence of ours, in which names stand between backticks."""
    parts = " ".join(text.split()).split("`")
    if len(parts) % 2 == 0:
        return plain(text)
    return "".join(
        f"`{part.replace('|', '/')}`" if index % 2 else _escaped(part)
        for index, part in enumerate(parts)
    )


def _ground(summary: Summary) -> list[str]:
    """When, and on what."""
    runs = [run for group in summary.groups for run in group.runs]
    lines = [f"Made on {summary.made:%Y-%m-%d} from {len(runs)} runs."]
    machines = dict.fromkeys(map(_machine, runs))
    lines += [f"Machine: {plain('; '.join(filter(None, machines)))}."] if any(machines) else []
    versions = dict.fromkeys(map(_versions, runs))
    lines += [f"Software: {plain('; '.join(filter(None, versions)))}."] if any(versions) else []
    return ["\n".join(lines)]


def _machine(run: OneRun) -> str:
    devices, host = run.info.get("devices"), run.info.get("host")
    named = [str(device) for device in devices] if isinstance(devices, list) else []
    cpus = host.get("cpus") if isinstance(host, dict) else None
    what = [
        f"{named.count(name)} x {name}" if named.count(name) > 1 else name
        for name in dict.fromkeys(named)
    ]
    cores = [f"{cpus} CPU cores"] if cpus else []
    if set(named) == {"cpu"}:
        return ", ".join([*cores, "no GPU"])
    return ", ".join([*([" and ".join(what)] if what else []), *cores])


def _versions(run: OneRun) -> str:
    versions = run.info.get("versions")
    found = versions.items() if isinstance(versions, dict) else ()
    return ", ".join(
        f"{name} {version}" for name, version in found if version and name != "lightning_package"
    )


def _verdict(summary: Summary) -> str:
    best = summary.best
    if best is None:
        return "No clean run has been measured."
    word = "highest" if summary.higher else "lowest"
    said = f"The {word} mean {plain(summary.metric)} is that of {plain(best.name)}."
    own = best.metrics[summary.metric].ci95
    others = [group for group in summary.groups if group is not best]
    rivals = [group for group in others if _overlaps(own, _of(group, summary).ci95)]
    if rivals:
        names = " and ".join(plain(group.name) for group in rivals)
        said += f" Its interval overlaps that of {names}: these runs do not tell them apart."
    return said


def _overlaps(one: tuple[float, float] | None, two: tuple[float, float] | None) -> bool:
    return one is not None and two is not None and one[0] <= two[1] and two[0] <= one[1]


def _of(group: Group, summary: Summary) -> Statistic:
    return group.metrics.get(summary.metric, Statistic(0, None, None, None))


def _experiments(summary: Summary) -> str:
    head = ["experiment", "clean", "diverged", "unfinished", f"mean {summary.metric}", "std"]
    rows = []
    for group in summary.groups:
        found, best = _of(group, summary), summary.best_run(group)
        counts = (len(group.clean), len(group.diverged), len(group.unfinished))
        interval = "-" if found.ci95 is None else f"{found.ci95[0]:.4f} to {found.ci95[1]:.4f}"
        rows.append(
            [
                group.name,
                *map(str, counts),
                _number(found.mean),
                _number(found.std),
                interval,
                "-" if best is None else str(best.seed),
                "-" if best is None else _number(best.metrics[summary.metric]),
            ]
        )
    return _table([*head, "95 % interval", "best seed", "its value"], rows)


def _further(summary: Summary) -> list[str]:
    """Mean and spread of all other metrics."""
    names = dict.fromkeys(name for group in summary.groups for name in group.metrics)
    others = [name for name in names if name != summary.metric]
    if not others:
        return []
    none = Statistic(0, None, None, None)
    rows = []
    for name in others:
        found = [group.metrics.get(name, none) for group in summary.groups]
        rows.append([name, *(_spread(one) for one in found)])
    head = ["mean ± std", *(group.name for group in summary.groups)]
    return ["All other metrics, of the same runs and epochs:", _table(head, rows)]


def _spread(found: Statistic) -> str:
    if found.mean is None:
        return "-"
    return _number(found.mean) + ("" if found.std is None else f" ± {found.std:.4f}")


def _runs(summary: Summary) -> str:
    names = dict.fromkeys(name for group in summary.groups for name in group.metrics)
    first = [summary.metric, *(name for name in names if name != summary.metric)]
    head = ["experiment", "seed", "state", "best epoch", "minutes", *first]
    rows = [
        [
            group.name,
            "-" if run.seed is None else str(run.seed),
            run.state,
            "-" if run.epoch is None else str(run.epoch),
            "-" if run.seconds is None else f"{run.seconds / 60:.1f}",
            *(_number(run.metrics.get(name)) for name in first),
        ]
        for group in summary.groups
        for run in group.runs
    ]
    return _table(head, rows)


def _apart(run: OneRun, folder: Path) -> str:
    seed = "" if run.seed is None else f", seed {run.seed}"
    return f"- {plain(relative(run.path, folder))}{seed}: {run.state}. {_prose(run.reason)}"


def _method(summary: Summary) -> str:
    chosen = dict.fromkeys(
        f"{'highest' if run.higher else 'lowest'} {run.monitor}"
        for group in summary.groups
        for run in group.runs
    )
    twice = [
        f"{group.name} has seed {seed} more than once"
        for group in summary.groups
        for seed in dict.fromkeys(run.seed for run in group.clean if run.seed is not None)
        if sum(run.seed == seed for run in group.clean) > 1
    ]
    lines = [
        "All metrics of a run come from one validation, its best one by its own monitor "
        f"({plain('; '.join(chosen))}), so they flatter a little; epochs count from 0.",
        "Mean, standard deviation (n - 1) and the 95 % confidence interval of the mean (Student's "
        "t) are those of the clean runs. Runs that diverged, collapsed or did not finish stand "
        "apart.",
        *(f"{plain(text)}, which makes the interval too narrow." for text in twice),
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        [plain(name) for name in head],
        ["---"] + ["---:"] * (len(head) - 1),
        *([plain(cell) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
