"""Heads that give their weight to the first key."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_diag.rules.attention_heads import HEAD_FILE, Head, Look, looks_by_module
from lightning_diag.rules.finding import Evidence, Finding, Severity
from lightning_diag.rules.loss_progress import Progress, loss_progress
from lightning_diag.rules.module_rows import lasting_since
from lightning_diag.rules.registry import rule
from lightning_diag.rules.traces import evidence_steps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["AttentionSink", "attention_sink"]


@dataclass(frozen=True)
class AttentionSink:
    """Thresholds of `attention_sink`."""

    min_share: float = field(default=0.5, metadata={"unit": "mean weight of the first key"})
    all_share: float = field(default=0.9, metadata={"unit": "mean weight, in all heads"})
    heads_share: float = field(default=0.5, metadata={"unit": "share of a module's heads"})
    own_share: float = field(default=2.5, metadata={"unit": "times an even share"})
    min_keys: float = field(default=4, metadata={"unit": "keys"})
    min_rows: float = field(default=3, metadata={"unit": "rows in a row, up to the last"})


@rule(
    "attention_sink",
    family="attention",
    needs=("attention_head", "attention", "loss", "metrics"),
    thresholds=AttentionSink,
    explains=(
        "loss_spike",
        *("vanishing_gradient", "divergence"),
        *("not_learning", "slow_convergence", "loss_plateau", "constant_prediction"),
    ),
    reference="Xiao et al. 2024, Efficient streaming language models with attention sinks.",
)
def attention_sink(
    attention_head: "pl.DataFrame",
    attention: "pl.DataFrame",
    loss: "pl.DataFrame",
    metrics: "pl.DataFrame",
    thresholds: AttentionSink,
) -> list[Finding]:
    """Modules most of whose heads give most of their weight to the first key.

    Trained language models have such heads and are healthy: it is noted only, unless hardly any
    weight is left for the other keys in any head, or the loss does not fall.
    """
    progress = loss_progress(loss, metrics)
    found = [
        _judge(name, part, looks, progress, thresholds)
        for (name, part), looks in looks_by_module(attention_head, attention).items()
    ]
    return [one for one in found if one is not None]


def _judge(
    name: str, part: str, looks: list[Look], progress: Progress | None, t: AttentionSink
) -> Finding | None:
    looks = [look for look in looks if look.heads[0].keys >= t.min_keys]
    shares = [look.share([_sinks(head, t) for head in look.heads]) for look in looks]
    since = lasting_since([share > t.heads_share for share in shares], int(t.min_rows))
    if since is None:
        return None
    all_of_it = [min(head.sink for head in look.heads) > t.all_share for look in looks]
    whole = lasting_since(all_of_it, int(t.min_rows))
    start = looks[since].step
    harmed = progress is not None and progress.harmed(start if since else None)
    severity: Severity = "warning" if whole is not None or harmed else "info"
    heads = [head for head in looks[-1].heads if _sinks(head, t)] or looks[-1].heads
    observed = sum(head.sink for head in heads) / len(heads)
    when = f"since step {start}" if since else "from the first measured step on"
    then = (
        "Hardly anything of the other keys is used."
        if whole is not None
        else "The loss does not fall."
        if harmed
        else "Many healthy language models have such sinks."
    )
    return Finding(
        rule="attention_sink",
        severity=severity,
        component=part,
        first_step=start,
        last_step=looks[-1].step,
        observed=observed,
        threshold=t.all_share if whole is not None else t.min_share,
        unit="mean weight of the first key",
        evidence=Evidence(HEAD_FILE, evidence_steps(look.step for look in looks[since:])),
        message=(
            f"{len(heads)} of {len(looks[-1].heads)} heads of `{name}` give "
            f"{100 * observed:.0f} % of their weight to the first key {when}. {then}"
        ),
        suggestion=(
            "Check the mask first: one that hides all keys but the first, or is turned round, does "
            "this. Then what stands at the first position (a token much larger than the others, "
            "padding on the left), and a bias in the scores. If the loss falls well, leave it."
        ),
        confidence=0.85 if whole is not None else 0.6,
    )


def _sinks(head: Head, t: AttentionSink) -> bool:
    return head.sink > t.min_share and head.sink * head.keys > t.own_share
