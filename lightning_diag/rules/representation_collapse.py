"""A representation in which all samples are the same."""

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_diag.rules.consequences import STANDSTILL
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_progress import Progress, loss_progress
from lightning_diag.rules.module_rows import lasting_since, number, rows_by, sorted_rows
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import usual_settings
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["RepresentationCollapse", "representation_collapse"]

LATENT_FILE = "records/latent.jsonl"

_COLUMNS = (
    *("features", "rows", "mean_cosine", "std_ratio", "effective_rank", "rank_limit", "side"),
    *("latent_norm", "output_cosine", "output_features"),
)


# weights that do not move a bit have another reason
_STANDSTILL = tuple(one for one in STANDSTILL if one != "frozen_weights")


@dataclass(frozen=True)
class RepresentationCollapse:
    """Thresholds of `representation_collapse`."""

    min_cosine: float = field(default=0.99, metadata={"unit": "mean cosine between two samples"})
    max_std_ratio: float = field(default=0.1, metadata={"unit": "1: samples point everywhere"})
    sure_cosine: float = field(default=0.999, metadata={"unit": "mean cosine"})
    min_features: float = field(default=4, metadata={"unit": "dimensions"})
    output_features: float = field(default=8, metadata={"unit": "dimensions of an output"})
    exact: float = field(default=1e-5, metadata={"unit": "distance of the mean cosine from 1"})
    exact_steps: float = field(default=50, metadata={"unit": "steps, exactly the same"})
    min_rows: float = field(default=3, metadata={"unit": "rows in a row, up to the last"})
    min_steps: float = field(default=30, metadata={"unit": "steps, from the start"})
    fall: float = field(default=5.0, metadata={"unit": "times less varied than before"})
    answers_vary: float = field(default=0.1, metadata={"unit": "of the targets' deviation"})
    scores_vary: float = field(default=0.3, metadata={"unit": "deviation of scores of classes"})


@rule(
    "representation_collapse",
    family="outputs",
    needs=("latent", "loss", "metrics", "wiring"),
    thresholds=RepresentationCollapse,
    explains=("divergence", "loss_spike", "attention_uniform", *_STANDSTILL),
    reference="Chen & He 2021, SimSiam, figure 2: the deviation of unit vectors; Jing et al. 2022, "
    "dimensional collapse.",
    remedy=usual_settings,
)
def representation_collapse(
    latent: "pl.DataFrame",
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    wiring: "pl.DataFrame",
    thresholds: RepresentationCollapse,
) -> list[Finding]:
    """Samples whose representations all point the same way, and stay so.

    A low effective rank alone is no fault: a network that tells two classes apart ends with one
    direction. Nor is one direction that all samples share, if what the head reads beside it makes
    the predictions vary, or training goes well.
    """
    progress = loss_progress(loss, metrics)
    answers = _answers_vary(wiring, thresholds)
    found = []
    for name, rows in rows_by(latent, _COLUMNS).items():
        one = _judge(name, rows, progress, answers, thresholds)
        if one is None and answers is None:
            # without answers that are compared with a batch, what the last layer gives is the aim
            one = _judge(name, _outputs(rows, thresholds), progress, answers, thresholds)
        found.append(one)
    return [one for one in found if one is not None]


def _outputs(rows: list[dict[str, Any]], t: RepresentationCollapse) -> list[dict[str, Any]]:
    return [
        {
            "step": row["step"],
            "mean_cosine": row["output_cosine"],
            "features": row["output_features"],
            "side": "output",
        }
        for row in rows
        if row.get("output_cosine") is not None
        and number(row, "output_features") >= t.output_features
    ]


def _answers_vary(wiring: "pl.DataFrame", t: RepresentationCollapse) -> bool | None:
    """Whether the predictions of the last looks vary as targets do; None where nobody looked."""
    if not {"check", "std"} <= set(wiring.columns):
        return None
    names = ("at", "call", "std", "target_std", "from_batch")
    rows = sorted_rows(wiring.filter(wiring["check"] == "constant_prediction"), names)
    shares = []
    for row in rows[-2:]:
        std, wanted = number(row, "std"), number(row, "target_std")
        if row.get("from_batch") != 1:
            continue
        if wanted > 0 and row.get("at") not in ("cross_entropy", "nll_loss"):
            shares.append(std / wanted / t.answers_vary)
        elif std == std:
            shares.append(std / t.scores_vary)
    return min(shares) > 1 if shares else None


def _judge(
    name: str,
    rows: list[dict[str, Any]],
    progress: Progress | None,
    answers: bool | None,
    t: RepresentationCollapse,
) -> Finding | None:
    # rows of zeros have no direction, and are all the same
    rows = [
        {**row, "mean_cosine": 1.0, "std_ratio": 0.0} if row.get("latent_norm") == 0 else row
        for row in rows
    ]
    rows = [row for row in rows if row.get("mean_cosine") is not None]
    if not rows or number(rows[-1], "features") < t.min_features:
        return None
    cosines = [number(row, "mean_cosine") for row in rows]
    ratios = [number(row, "std_ratio") for row in rows]
    same = [
        cosine > t.min_cosine or (ratio < t.max_std_ratio and cosine > 0.5)
        for cosine, ratio in zip(cosines, ratios, strict=True)
    ]
    since = lasting_since(same, int(t.min_rows))
    if since is None:
        return None
    steps = [int(row["step"]) for row in rows[since:]]
    apart = [1 - cosine for cosine in cosines]
    before, now = apart[:since], median(apart[-3:])
    fell = bool(before) and max(before) > t.fall * max(now, 1e-7)
    leaving = len(apart) > since + 3 and now > max(1.5 * median(apart[since : since + 3]), t.exact)
    if not fell and (steps[-1] - steps[0] < t.min_steps or leaving):
        return None
    severity: Severity = "warning"
    well = progress is not None and not progress.harmed(steps[0])
    sure = median(cosines[-3:]) > t.sure_cosine
    # without a loss that stands still it must be seen to come, beyond doubt
    unsure = answers is None and (well or progress is None)
    exact = min(cosines[since:]) > 1 - t.exact and since == 0
    always = exact and steps[-1] - steps[0] >= t.exact_steps
    if answers or (unsure and not (fell and sure)):
        severity = "warning" if always else "info"
    elif sure and steps[-1] - steps[0] >= 100:
        severity = "critical"
    when = f"since step {steps[0]}" if since else "from the first measured step on"
    side = "input" if rows[-1].get("side") == "input" else "output"
    return Finding(
        rule="representation_collapse",
        severity=severity,
        first_step=steps[0],
        last_step=steps[-1],
        observed=median(cosines[-3:]),
        threshold=t.min_cosine,
        unit="mean cosine between two samples",
        evidence=Evidence(LATENT_FILE, evidence_steps(steps)),
        message=(
            f"All samples have nearly the same representation {when}: the mean cosine between two "
            f"of them is {median(cosines[-3:]):.4f} in the {side} of `{name}` "
            f"({number(rows[-1], 'features'):.0f} dimensions). What comes after it cannot tell "
            "them apart."
        ),
        suggestion=(
            "In self-supervised training look first for a missing stop-gradient, missing negatives "
            "or a temperature out of range; a variance term keeps the dimensions apart. Elsewhere "
            "lower the learning rate, and look for dead or saturated units before this layer; "
            "normalize its input."
        ),
        confidence=0.9 if sure else 0.7,
    )
