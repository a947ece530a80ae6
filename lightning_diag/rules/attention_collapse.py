"""Heads that look at a single key, and have no reason to."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.attention_heads import HEAD_FILE, Head, Look, looks_by_module
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_progress import Progress, loss_progress
from lightning_diag.rules.module_rows import lasting_since
from lightning_diag.rules.registry import rule
from lightning_diag.rules.remedies import lower_rate
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["AttentionCollapse", "attention_collapse"]


@dataclass(frozen=True)
class AttentionCollapse:
    """Thresholds of `attention_collapse`."""

    max_entropy: float = field(default=0.1, metadata={"unit": "entropy over ln(keys)"})
    heads_share: float = field(default=0.5, metadata={"unit": "share of a module's heads"})
    one_key: float = field(default=0.9, metadata={"unit": "mean weight of a key over all queries"})
    min_keys: float = field(default=3, metadata={"unit": "keys"})
    min_rows: float = field(default=3, metadata={"unit": "rows in a row, up to the last"})
    mixed_entropy: float = field(default=0.5, metadata={"unit": "entropy over ln(keys)"})
    bare_entropy: float = field(default=1e-3, metadata={"unit": "entropy over ln(keys)"})
    critical_entropy: float = field(default=0.02, metadata={"unit": "entropy over ln(keys)"})


@rule(
    "attention_collapse",
    family="attention",
    needs=("attention_head", "attention", "loss", "metrics"),
    thresholds=AttentionCollapse,
    explains=(
        "loss_spike",
        *("vanishing_gradient", "attention_sink", "divergence"),
        *("not_learning", "slow_convergence", "loss_plateau", "constant_prediction"),
    ),
    reference="Zhai et al. 2023, Stabilizing transformer training by preventing attention entropy "
    "collapse.",
    remedy=lower_rate,
)
def attention_collapse(
    attention_head: "pl.DataFrame",
    attention: "pl.DataFrame",
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    thresholds: AttentionCollapse,
) -> list[Finding]:
    """Modules most of whose heads give all weight to one key, with a loss that suffers.

    Attention may rightly be sharp: where different queries look at different keys and the loss
    falls, it is noted only.
    """
    progress = loss_progress(loss, metrics)
    found = [
        _judge(name, part, looks, progress, thresholds)
        for (name, part), looks in looks_by_module(attention_head, attention).items()
    ]
    return [one for one in found if one is not None]


def _judge(
    name: str, part: str, looks: list[Look], progress: Progress | None, t: AttentionCollapse
) -> Finding | None:
    looks = [look for look in looks if look.heads[0].keys >= t.min_keys]
    sharp = [look.share([_sharp(head, t) for head in look.heads]) for look in looks]
    since = lasting_since([share > t.heads_share for share in sharp], int(t.min_rows))
    if since is None:
        return None
    stretch = looks[since:]
    start, last = stretch[0].step, stretch[-1]
    heads = [head for head in last.heads if _sharp(head, t)] or last.heads
    entropy = sum(head.entropy for head in heads) / len(heads)
    one_key = sum(head.mass > t.one_key for head in heads) / len(heads) > 0.5
    harmed = progress is None or progress.harmed(start if since else None)
    at_once = bool(since) and _fell(looks[since - 1], looks[since], t)
    severity: Severity = "info"
    if at_once:
        severity = "warning"
    elif progress is None:
        severity = "warning" if one_key else "info"
    elif harmed:
        severity = "critical" if one_key and entropy < t.critical_entropy else "warning"
    when = f"since step {start}" if since else "from the first measured step on"
    keys = sorted({int(head.key) for head in heads if head.key == head.key})
    where = f", all queries at key {', '.join(map(str, keys[:3]))}" if one_key and keys else ""
    # what was so before anything was learned is given
    mask = (
        "Check the mask first: one that is inverted leaves a single key to look at; and "
        if one_key and not since
        else "Check "
    )
    then = (
        "It came about at once, from one look to the next, as no training does it."
        if at_once
        else "The loss falls nevertheless, so this may be what the task asks for."
        if severity == "info"
        else "Nothing is mixed any more, the softmax passes hardly any gradient, and the loss does "
        "not fall."
    )
    return Finding(
        rule="attention_collapse",
        severity=severity,
        component=part,
        first_step=start,
        last_step=last.step,
        observed=entropy,
        threshold=t.max_entropy,
        unit="entropy over ln(keys)",
        evidence=Evidence(HEAD_FILE, evidence_steps(look.step for look in stretch)),
        message=(
            f"{len(heads)} of {len(last.heads)} heads of `{name}` look at a single key {when}"
            f"{where} (normalized entropy {entropy:.3f}). {then}"
        ),
        suggestion=(
            f"{mask}that scores are divided by the root of the head's width. Then a lower learning "
            "rate or a longer warm-up, normalization of queries and keys, or smaller weights at "
            "the start."
        ),
        confidence=0.8 if one_key else 0.65,
    )


def _fell(before: Look, after: Look, t: AttentionCollapse) -> bool:
    """Whether every head mixed many keys a look ago, and has one alone now."""
    mixed = min((head.entropy for head in before.heads), default=0.0) > t.mixed_entropy
    return mixed and all(head.entropy < t.bare_entropy for head in after.heads)


def _sharp(head: Head, t: AttentionCollapse) -> bool:
    return head.entropy < t.max_entropy
