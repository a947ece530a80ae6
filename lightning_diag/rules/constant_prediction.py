"""The same answer for every sample."""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_progress import Progress, loss_progress
from lightning_diag.rules.loss_series import LOSS_FILE
from lightning_diag.rules.module_rows import lasting_since, number, sorted_rows
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import usual_settings
from lightning_diag.rules.traces import evidence_steps
from lightning_diag.rules.wiring_rows import WIRING_FILE

if TYPE_CHECKING:
    import polars as pl

__all__ = ["ConstantPrediction", "constant_prediction"]

_DIFFERENCES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
_CLASSES = ("cross_entropy", "nll_loss")
_COLUMNS = (
    *("check", "state", "at", "call", "samples", "from_batch", "std", "abs_max"),
    *("top_share", "target_std", "target_top_share"),
)


@dataclass(frozen=True)
class ConstantPrediction:
    """Thresholds of `constant_prediction`."""

    target_share: float = field(default=0.01, metadata={"unit": "of the targets' deviation"})
    faint_share: float = field(default=0.07, metadata={"unit": "of the targets' deviation"})
    score_spread: float = field(default=0.01, metadata={"unit": "deviation of scores of classes"})
    own_share: float = field(default=1e-3, metadata={"unit": "of the largest prediction"})
    exact_share: float = field(default=1e-5, metadata={"unit": "of the largest prediction"})
    min_variance: float = field(default=1e-6, metadata={"unit": "variance over the samples"})
    top_share: float = field(default=0.999, metadata={"unit": "share of the most frequent class"})
    label_share: float = field(default=0.8, metadata={"unit": "share of the most frequent label"})
    fall: float = field(default=10.0, metadata={"unit": "times less varied than before"})
    min_rows: float = field(default=2, metadata={"unit": "rows in a row, up to the last"})
    exact_steps: float = field(default=10, metadata={"unit": "steps, exactly constant"})
    min_steps: float = field(default=50, metadata={"unit": "steps, from the start"})
    critical_steps: float = field(default=100, metadata={"unit": "steps"})


@rule(
    "constant_prediction",
    family="outputs",
    needs=("wiring", "loss", "metrics"),
    thresholds=ConstantPrediction,
    explains=("not_learning", "slow_convergence", "loss_plateau"),
    reference="StreamGuard's CollapseDetector (variance below 1e-6); the constant that lowers the "
    "loss most is what a model without information predicts.",
    remedy=usual_settings,
)
def constant_prediction(
    wiring: "pl.DataFrame",
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    thresholds: ConstantPrediction,
) -> list[Finding]:
    """Predictions that do not vary from sample to sample, or are all of one class.

    A model that starts with equal answers, by a head of zeros or a warm-up, has time to leave
    them. Predictions are compared with how their targets vary, where these are known. That one
    class is predicted throughout is a fault only if the labels are of several, none of them rare,
    and the loss does not fall.
    """
    progress = loss_progress(loss, metrics)
    looks = _looks(wiring)
    series = [_of_call(rows, thresholds) for rows in looks.values()]
    if _from_loss_is_fair(looks):
        series.append(_of_loss(loss, thresholds))
    found = [_constant(one, progress, thresholds) for one in series if one.points]
    labels = _label_share(looks)
    found += [_one_class(one, labels, progress, thresholds) for one in series if one.points]
    found += [_faint(one, thresholds) for one in series if one.points]
    known = [one for one in found if one is not None]
    return [max(known, key=lambda one: (one.rank, -(one.first_step or 0)))] if known else []


class _Point(NamedTuple):
    """Predictions at one step: the spread, what it is compared with, and the top share.

    Below `faint` predictions vary so little that it counts if they once varied more.
    """

    step: int
    spread: float
    limit: float
    exact: bool
    top_share: float
    faint: float = 0.0


class _Series(NamedTuple):
    """What one loss function was fed, or what ``loss.jsonl`` says of the predictions."""

    points: list[_Point]
    file: str
    unit: str


def _looks(wiring: "pl.DataFrame") -> dict[Any, list[dict[str, Any]]]:
    if not {"check", "std"} <= set(wiring.columns):
        return {}
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in sorted_rows(wiring.filter(wiring["check"] == "constant_prediction"), _COLUMNS):
        found.setdefault((row.get("at"), row.get("call")), []).append(row)
    return found


def _of_call(rows: list[dict[str, Any]], t: ConstantPrediction) -> _Series:
    points = []
    for row in rows:
        spread, size, wanted = (number(row, key) for key in ("std", "abs_max", "target_std"))
        kind, own = str(row.get("at")), row.get("from_batch") == 1
        if math.isnan(spread) or not (own or kind in _CLASSES):
            continue
        if kind in _DIFFERENCES:
            if not wanted > 0:
                continue
            limit, faint = t.target_share * wanted, t.faint_share * wanted
        else:
            limit, faint = max(t.score_spread, t.own_share * size), 0.0
        exact = size > 0 and spread <= t.exact_share * size
        share = number(row, "top_share")
        points.append(_Point(int(row["step"]), spread, limit, exact, share, faint))
    return _Series(points, WIRING_FILE, "deviation over samples")


def _from_loss_is_fair(looks: dict[Any, list[dict[str, Any]]]) -> bool:
    """Whether the variance may be taken as it is: not where targets may be tiny numbers."""
    return not any(at in _DIFFERENCES for at, _ in looks)


def _of_loss(loss: "pl.DataFrame", t: ConstantPrediction) -> _Series:
    if "variance" not in loss.columns:
        return _Series([], LOSS_FILE, "")
    points = []
    for row in sorted_rows(loss, ("variance", "top_share")):
        variance = number(row, "variance")
        if variance >= 0:
            limit, spread = math.sqrt(t.min_variance), math.sqrt(variance)
            exact = variance <= (t.exact_share) ** 2
            points.append(_Point(int(row["step"]), spread, limit, exact, number(row, "top_share")))
    return _Series(points, LOSS_FILE, "deviation over samples")


def _label_share(looks: dict[Any, list[dict[str, Any]]]) -> float:
    known = [
        share
        for rows in looks.values()
        for share in (number(row, "target_top_share") for row in rows)
        if not math.isnan(share)
    ]
    return median(known) if known else math.nan


def _constant(series: _Series, progress: Progress | None, t: ConstantPrediction) -> Finding | None:
    points = series.points
    since = lasting_since([one.spread <= one.limit for one in points], int(t.min_rows))
    if since is None:
        return None
    stretch = points[since:]
    lasted = stretch[-1].step - stretch[0].step
    before = [one.spread for one in points[:since]]
    fell = bool(before) and max(before) > t.fall * median(one.spread for one in stretch)
    exact = all(one.exact for one in stretch[-2:])
    steps = t.exact_steps if exact or fell else t.min_steps
    if lasted < steps or (not exact and not fell and _grows(stretch)):
        return None
    if progress is not None and not fell and not exact and not progress.harmed(stretch[0].step):
        return None
    sure = lasted >= t.critical_steps and (exact or fell)
    return _finding(series, stretch, "critical" if sure else "warning", since > 0)


def _faint(series: _Series, t: ConstantPrediction) -> Finding | None:
    """Predictions that have shrunk towards one answer, and hardly differ any more."""
    points = series.points
    since = lasting_since([one.spread <= one.faint for one in points], int(t.min_rows) + 1)
    if not since:
        return None
    stretch, most = points[since:], max(one.spread for one in points[:since])
    spreads = [one.spread for one in stretch]
    if points[-1].step < t.critical_steps or most < 2 * median(spreads) or _grows(stretch):
        return None
    return _finding(series, stretch, "warning", True)


def _finding(series: _Series, stretch: list[_Point], severity: Severity, later: bool) -> Finding:
    last = stretch[-1]
    exact = all(one.exact for one in stretch[-2:])
    since_when = f"since step {stretch[0].step}" if later else "from the first look on"
    return Finding(
        rule="constant_prediction",
        severity=severity,
        first_step=stretch[0].step,
        last_step=last.step,
        observed=last.spread,
        threshold=max(last.limit, last.faint) if last.spread > last.limit else last.limit,
        unit=series.unit,
        evidence=Evidence(series.file, evidence_steps(one.step for one in stretch)),
        message=(
            f"The model gives every sample nearly the same answer {since_when}: its predictions "
            f"deviate by {last.spread:.2g} from sample to sample. It hardly uses its input."
        ),
        suggestion=_SUGGESTION,
        confidence=0.95 if exact else 0.8,
    )


_SUGGESTION = (
    "Look first for what cuts the output off from the input: dead ReLUs, saturated units, a "
    "detached or frozen part. Then lower the learning rate (a single large step can do this), and "
    "check that inputs are scaled and belong to their targets."
)


def _grows(stretch: list[_Point]) -> bool:
    third = max(1, len(stretch) // 3)
    first = median(one.spread for one in stretch[:third])
    return median(one.spread for one in stretch[-third:]) > 1.5 * first


def _one_class(
    series: _Series, labels: float, progress: Progress | None, t: ConstantPrediction
) -> Finding | None:
    points = [one for one in series.points if not math.isnan(one.top_share)]
    if not labels < t.label_share or progress is None:
        return None
    since = lasting_since([one.top_share >= t.top_share for one in points], int(t.min_rows) + 1)
    if since is None:
        return None
    stretch = points[since:]
    lasted = stretch[-1].step - stretch[0].step
    # the looks at the first steps are close together
    later = stretch[0].step > t.min_steps
    steps = t.min_steps if later else t.critical_steps
    if lasted < steps or not progress.harmed(stretch[0].step):
        return None
    severity: Severity = "critical" if later and lasted >= t.critical_steps else "warning"
    since_when = f"since step {stretch[0].step}" if since else "from the first look on"
    return Finding(
        rule="constant_prediction",
        severity=severity,
        first_step=stretch[0].step,
        last_step=stretch[-1].step,
        observed=stretch[-1].top_share,
        threshold=t.top_share,
        unit="share of the most frequent class",
        evidence=Evidence(series.file, evidence_steps(one.step for one in stretch)),
        message=(
            f"One class is predicted for all samples {since_when}, while only "
            f"{100 * labels:.0f} % of the labels are of the most frequent one, and the loss does "
            "not fall. The model does not tell its samples apart."
        ),
        suggestion=_SUGGESTION,
        confidence=0.75,
    )
