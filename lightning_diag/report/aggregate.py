"""Several runs as one summary: mean, spread and confidence by experiment, the sick ones apart."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from lightning_diag.report.aggregate_groups import grouped, run_folders
from lightning_diag.report.aggregate_runs import (
    CLEAN,
    COLLAPSED,
    DIVERGED,
    OneRun,
    read_one,
)
from lightning_diag.spelling import did_you_mean

__all__ = [
    "Group",
    "Statistic",
    "Summary",
    "aggregate",
    "relative",
    "statistic",
    "t_quantile",
]

T = TypeVar("T")

_LOWER = ("loss", "error", "mse", "mae", "perplexity")


@dataclass(frozen=True)
class Statistic:
    """One metric over runs.

    Args:
        n: Number of runs that have it.
        mean: Their mean, None for none.
        std: Their standard deviation with one degree of freedom less, None below two.
        ci95: Ends of the 95 % confidence interval of the mean by Student's t, None below two.
    """

    n: int
    mean: float | None
    std: float | None
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Group:
    """The runs of one experiment.

    Args:
        name: What tells it from the others.
        runs: All of them.
        metrics: Metric to its statistic over the clean ones.
    """

    name: str
    runs: Sequence[OneRun]
    metrics: Mapping[str, Statistic] = field(default_factory=dict)

    @property
    def clean(self) -> list[OneRun]:
        """The runs that count."""
        return [run for run in self.runs if run.state == CLEAN]

    @property
    def diverged(self) -> list[OneRun]:
        """The runs that diverged or collapsed."""
        return [run for run in self.runs if run.state in (DIVERGED, COLLAPSED)]

    @property
    def unfinished(self) -> list[OneRun]:
        """The runs of which nothing can be said yet."""
        return [run for run in self.runs if run.state not in (CLEAN, DIVERGED, COLLAPSED)]


@dataclass(frozen=True)
class Summary:
    """What there is to say about the runs in a folder.

    Args:
        folder: The folder.
        groups: One an experiment, by name.
        metric: The metric that experiments and seeds are compared by.
        higher: Whether a high value of it is good.
        made: When the summary was made, with the time zone.
    """

    folder: Path
    groups: Sequence[Group]
    metric: str
    higher: bool
    made: datetime

    @property
    def best(self) -> Group | None:
        """The experiment with the best mean."""
        means = [(self.mean(group), group) for group in self.groups]
        return self._best([(mean, group) for mean, group in means if mean is not None])

    def best_run(self, group: Group) -> OneRun | None:
        """The clean run with the best value."""
        clean = [run for run in group.clean if self.metric in run.metrics]
        return self._best([(run.metrics[self.metric], run) for run in clean])

    def mean(self, group: Group) -> float | None:
        """The mean of the metric over the clean runs."""
        found = group.metrics.get(self.metric)
        return found.mean if found else None

    def to_dict(self) -> dict[str, Any]:
        """The content of production_summary.json."""
        best = self.best
        return {
            "timestamp": self.made.isoformat(timespec="seconds"),
            "metric": self.metric,
            "higher_is_better": self.higher,
            "models": {group.name: self._model(group) for group in self.groups},
            "best_overall_model": best.name if best else None,
            f"best_overall_{self.metric}": self.mean(best) if best else None,
        }

    def _model(self, group: Group) -> dict[str, Any]:
        best = self.best_run(group)
        row: dict[str, Any] = {}
        for name, found in group.metrics.items():
            row[f"mean_{name}"], row[f"std_{name}"] = found.mean, found.std
            row[f"ci95_{name}"] = found.ci95
        return {
            **row,
            "seeds": [run.seed for run in group.clean],
            "best_seed": best.seed if best else None,
            f"best_{self.metric}": best.metrics[self.metric] if best else None,
            "n": len(group.clean),
            "n_diverged": len(group.diverged),
            "n_unfinished": len(group.unfinished),
            "runs": [self._run(run) for run in group.runs],
        }

    def _run(self, run: OneRun) -> dict[str, Any]:
        return {
            "path": relative(run.path, self.folder),
            "seed": run.seed,
            "state": run.state,
            "reason": run.reason or None,
            "monitor": run.monitor,
            "best_epoch": run.epoch,
            "step": run.step,
            "seconds": run.seconds,
            "metrics": dict(run.metrics),
        }

    def _best(self, items: Sequence[tuple[float, T]]) -> T | None:
        if not items:
            return None
        return (max if self.higher else min)(items, key=lambda item: item[0])[1]


def aggregate(folder: str | Path, metric: str | None = None) -> Summary:
    """Summarize the runs in a folder by experiment.

    All metrics of a run come from its one best row, chosen by the `monitor` and `monitor_mode` of
    its configuration; the names of validation metrics lose their ``val_``. Mean, standard deviation
    and interval are those of the clean runs.

    Args:
        folder: Any folder with runs in it, at any depth: the runs of a sweep, or folders of runs.
        metric: What to compare by; None for ``f1`` where a run has it, else what most runs monitor.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no run, or no run has the metric.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"`folder` must be a folder with runs in it, got {root}.")
    runs = [read_one(path) for path in run_folders(root)]
    if not runs:
        raise ValueError(f"`folder` must have a run in it, with `run.json` or records, got {root}.")
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    chosen, higher = _metric(runs, names, metric)
    groups = [
        Group(name, members, _statistics(members, names))
        for name, members in sorted(grouped(root, runs).items())
    ]
    return Summary(root, groups, chosen, higher, datetime.now().astimezone())


def statistic(values: Sequence[float]) -> Statistic:
    """Mean, standard deviation and 95 % confidence interval of some values.

    Example:
        >>> round(statistic([0.91, 0.93, 0.95]).std, 6)
        0.02
    """
    n = len(values)
    if n == 0:
        return Statistic(0, None, None, None)
    mean = math.fsum(values) / n
    if n == 1:
        return Statistic(1, mean, None, None)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(0.975, n - 1) * std / math.sqrt(n)
    return Statistic(n, mean, std, (mean - half, mean + half))


def t_quantile(share: float, degrees: int) -> float:
    """The value below which this share of Student's t distribution lies.

    Bisection on the distribution function, which is a finite sum for whole degrees of freedom.

    Args:
        share: Between 0.5 and 1, both excluded.
        degrees: Degrees of freedom, at least 1.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> round(t_quantile(0.975, 2), 4)
        4.3027

    References:
        Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if not 0.5 < share < 1:
        raise ValueError(f"`share` must be between 0.5 and 1, got {share}.")
    if degrees < 1:
        raise ValueError(f"`degrees` must be at least 1, got {degrees}.")
    low, high = 0.0, math.pi / 2  # of the angle, whose tangent is t over the root of the degrees
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _between(middle, degrees) < 2 * share - 1 else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(degrees)


def _between(angle: float, degrees: int) -> float:
    """Probability that t lies between minus and plus the value of this angle."""
    squared, odd = math.cos(angle) ** 2, degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(odd + 1, degrees, 2):
        total += term
        term *= squared * k / (k + 1)
    inner = math.sin(angle) * total
    return 2 / math.pi * (angle + inner) if odd else inner


def relative(path: Path, folder: Path) -> str:
    """A run's place in the folder, "." for the folder itself."""
    return path.relative_to(folder).as_posix()


def _statistics(runs: Sequence[OneRun], names: Sequence[str]) -> dict[str, Statistic]:
    clean = [run for run in runs if run.state == CLEAN]
    return {
        name: statistic([run.metrics[name] for run in clean if name in run.metrics])
        for name in names
        if any(name in run.metrics for run in runs)
    }


def _metric(runs: Sequence[OneRun], names: Sequence[str], asked: str | None) -> tuple[str, bool]:
    monitored = Counter(run.monitor for run in runs if run.metrics or len(runs) == 1)
    chosen = asked
    if asked is not None and asked not in names:
        if names:
            raise ValueError(f"No run has the metric `{asked}`; {did_you_mean(asked, names)}")
        raise ValueError(f"No run has the metric `{asked}`; none has logged its `monitor`.")
    if chosen is None:
        fallback = monitored.most_common(1)[0][0] if monitored else runs[0].monitor
        chosen = "f1" if "f1" in names else fallback
    watching = [run.higher for run in runs if run.monitor == chosen]
    if watching:
        return chosen, sum(watching) * 2 > len(watching)
    return chosen, not any(word in chosen.lower() for word in _LOWER)
