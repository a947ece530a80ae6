"""Heads that look at all keys alike."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.attention_heads import HEAD_FILE, Look, looks_by_module
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_progress import Progress, loss_progress
from lightning_diag.rules.module_rows import lasting_since
from lightning_diag.rules.registry import rule
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["AttentionUniform", "attention_uniform"]


@dataclass(frozen=True)
class AttentionUniform:
    """Thresholds of `attention_uniform`."""

    min_entropy: float = field(default=0.985, metadata={"unit": "entropy over ln(keys)"})
    exact_distance: float = field(default=2e-6, metadata={"unit": "distance of the entropy from 1"})
    before: float = field(default=0.95, metadata={"unit": "entropy over ln(keys), of a fall back"})
    min_keys: float = field(default=3, metadata={"unit": "keys"})
    min_rows: float = field(default=3, metadata={"unit": "rows in a row, up to the last"})
    exact_steps: float = field(default=15, metadata={"unit": "steps, exactly uniform"})
    min_steps: float = field(default=120, metadata={"unit": "steps, from the start"})
    learnt: float = field(default=0.1, metadata={"unit": "share of the first loss"})
    flat_entropy: float = field(default=0.999, metadata={"unit": "entropy over ln(keys)"})
    flat_learnt: float = field(default=0.3, metadata={"unit": "share of the first loss"})


@rule(
    "attention_uniform",
    family="attention",
    needs=("attention_head", "attention", "loss", "metrics"),
    thresholds=AttentionUniform,
    explains=(
        *("vanishing_gradient", "divergence"),
        *("not_learning", "slow_convergence", "loss_plateau", "constant_prediction"),
    ),
    reference="Bao et al. 2024, Self-attention networks localize when QK-eigenspectrum "
    "concentrates; Noci et al. 2022, rank collapse.",
)
def attention_uniform(
    attention_head: "pl.DataFrame",
    attention: "pl.DataFrame",
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    thresholds: AttentionUniform,
) -> list[Finding]:
    """Modules all of whose heads spread their weight evenly, long after the start.

    Every transformer begins so. It is a fault if the scores are exactly the same, so that nothing
    is learnt about where to look, or if it lasts while the loss does not fall.
    """
    progress = loss_progress(loss, metrics)
    found = [
        _judge(name, part, looks, progress, thresholds)
        for (name, part), looks in looks_by_module(attention_head, attention).items()
    ]
    return [one for one in found if one is not None]


def _judge(
    name: str, part: str, looks: list[Look], progress: Progress | None, t: AttentionUniform
) -> Finding | None:
    looks = [look for look in looks if look.heads[0].keys >= t.min_keys]
    lowest = [min(head.entropy for head in look.heads) for look in looks]
    since = lasting_since([low > t.min_entropy for low in lowest], int(t.min_rows))
    if since is None:
        return None
    exact = lasting_since([low > 1 - t.exact_distance for low in lowest], int(t.min_rows))
    start = looks[since if exact is None else exact].step
    last, first = looks[-1].step, looks[since].step
    fell_back = any(low < t.before for low in lowest[:since])
    flat = lasting_since([low > t.flat_entropy for low in lowest], int(t.min_rows))
    share = t.learnt if flat is None else t.flat_learnt
    harmed = progress is not None and progress.harmed(start if fell_back else None, share)
    enough = last - first >= t.min_steps or fell_back
    severity: Severity = "info"
    if (exact is not None and last - start >= t.exact_steps) or (enough and harmed):
        severity = "warning"
    elif not enough:
        return None
    when = f"since step {start}" if fell_back or start > looks[0].step else "from the start"
    why = (
        "Its scores are exactly the same for all keys, so queries and keys take no part."
        if exact is not None
        else "It only averages its values."
    )
    then = " The loss falls little." if harmed else ""
    return Finding(
        rule="attention_uniform",
        severity=severity,
        component=part,
        first_step=start,
        last_step=last,
        observed=lowest[-1],
        threshold=t.min_entropy,
        unit="entropy over ln(keys)",
        evidence=Evidence(HEAD_FILE, evidence_steps(look.step for look in looks[since:])),
        message=(
            f"All {len(looks[-1].heads)} heads of `{name}` look at every key alike {when} "
            f"(normalized entropy {lowest[-1]:.4f}). {why}{then}"
        ),
        suggestion=(
            "Check that queries and keys get a gradient and are neither frozen, zero nor divided "
            "by too much; then that tokens differ when they come in (positions, normalization, a "
            "mask that hides what matters). Then a higher learning rate or larger weights of "
            "queries and keys."
        ),
        confidence=0.85 if exact is not None else 0.6,
    )
