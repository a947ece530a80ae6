"""From a run to its findings, causes first."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_diag.rules import attention as attention
from lightning_diag.rules import gradients as gradients  # entering its rules into the registry
from lightning_diag.rules import losses as losses
from lightning_diag.rules import machine as machine
from lightning_diag.rules import outputs as outputs
from lightning_diag.rules import updates as updates
from lightning_diag.rules import wiring as wiring
from lightning_diag.rules.causal_order import place
from lightning_diag.rules.finding import Finding
from lightning_diag.rules.registry import RULES, Rule, resolve_thresholds
from lightning_diag.rules.run_thresholds import run_thresholds

if TYPE_CHECKING:
    from lightning_diag.records.live_rows import LiveRows
    from lightning_diag.records.read_run import Run

__all__ = ["diagnose", "order_findings"]

_EVERYWHERE = ("gradient_imbalance", "nonfinite_gradient", "clipping_dominates")
_SPREADING = ("dead_relu", "saturated_activation", "input_scale", "learning_rate_too_high")
_EITHER_WAY = (("unused_parameter", "dead_component"), ("dead_component", "unused_parameter"))
_EXACT = ("nonfinite_gradient", "nonfinite_loss")  # told to the step
_WHOLE_RUN = ("not_learning", "slow_convergence")
_WINDOWS = ("loss.jsonl", "metrics.jsonl")
_WINDOW_STEPS = 10
_FROM_THE_START = 20  # steps: what is seen first that early has been so from the start


def diagnose(
    run: "str | Path | Run | LiveRows",
    thresholds: Mapping[str, Any] | None = None,
    *,
    on_error: Literal["report", "raise"] = "report",
) -> list[Finding]:
    """Run every rule on a run, and return what they found, most severe and most causal first.

    Args:
        run: The folder of a run, what `read_run` made of it, or the latest rows of a live one.
        thresholds: ``{rule id: {threshold: number}}``; what is left out comes from ``rules`` in the
            run's configuration, then from the defaults.
        on_error: What to do if a rule fails: ``"report"`` turns it into a finding of severity
            ``info`` that names the rule, ``"raise"`` lets the error through.

    Raises:
        ValueError: An unknown rule, threshold or `on_error`.
    """
    if on_error not in ("report", "raise"):
        raise ValueError(f"`on_error` must be 'report' or 'raise', got {on_error!r}.")
    if isinstance(run, (str, Path)):
        from lightning_diag.records.read_run import read_run

        run = read_run(run)
    resolved = resolve_thresholds(run_thresholds(run.config, thresholds))
    found, there = [], set(run.prefixes)
    for one in RULES.values():
        if not there.isdisjoint(one.needs):
            found += _check(one, run, resolved[one.id], on_error)
    explained = _with_causes(found)
    config = dict(run.config)
    if getattr(run, "info", {}).get("automatic_optimization") is False:
        config["automatic_optimization"] = False
    return order_findings([_with_remedy(one, config) for one in explained])


def _check(one: Rule, run: "Run | LiveRows", thresholds: object, on_error: str) -> list[Finding]:
    try:
        return one.check(*(run.frame(prefix) for prefix in one.needs), thresholds)
    except Exception as error:
        if on_error == "raise":
            raise
        reason = f"{type(error).__name__}: {error}"
        return [
            Finding(
                rule=one.id,
                severity="info",
                message=f"The rule `{one.id}` could not be checked: {reason}",
                suggestion="The other rules are not affected. Please report this as a bug.",
                confidence=0.0,
            )
        ]


def _with_remedy(finding: Finding, config: Mapping[str, Any]) -> Finding:
    remedy = RULES[finding.rule].remedy
    if remedy is None or finding.severity == "info":
        return finding
    return replace(finding, overrides=remedy(finding, config))


def _with_causes(findings: list[Finding]) -> list[Finding]:
    """Every finding with the rule that explains it, so that no rule explains itself by others."""
    explained = {id(one): one for one in findings}
    for finding in sorted(findings, key=lambda one: place(one.rule)):
        causes = [one for one in findings if _explains(one, finding)]
        # what explains it must not hang on it
        causes = [one for one in causes if finding.rule not in _chain(one, explained.values())]
        first = min(causes, key=lambda one: (_step(one), -one.rank), default=None)
        if first is not None:
            explained[id(finding)] = replace(finding, caused_by=first.rule)
    return list(explained.values())


def _chain(finding: Finding, findings: Iterable[Finding]) -> set[str]:
    """The rule of a finding, and those that explain it one behind the other."""
    causes = {one.rule: one.caused_by for one in findings if one.caused_by is not None}
    chain, rule = {finding.rule}, causes.get(finding.rule)
    while rule is not None and rule not in chain:
        chain.add(rule)
        rule = causes.get(rule)
    return chain


def _explains(cause: Finding, effect: Finding) -> bool:
    if cause.rank == 0 or effect.rule not in RULES[cause.rule].explains:
        return False
    pair = (cause.rule, effect.rule)
    if pair in _EITHER_WAY:
        # connected, and nothing but zeros comes back: that is a part which died, and no loose end
        zeros = "zeros" in (cause if pair == _EITHER_WAY[0] else effect).unit
        return zeros == (pair == _EITHER_WAY[1]) and _together(cause, effect)
    if place(cause.rule) > place(effect.rule) and not _before(cause, effect):
        return False
    # a loss that is the same to the last bit is an effect of gradients that are tiny, but there
    if (cause.rule, cause.unit, effect.rule) == ("detached_graph", "loss", "vanishing_gradient"):
        return False
    # a part that died or blew up disturbs the balance of all, and one that lets nothing through
    # silences what comes before it; other effects stay where they began
    anywhere = cause.rule in _SPREADING or effect.rule in _EVERYWHERE
    near = anywhere or _together(cause, effect)
    return near and _earliest(cause) <= _latest(cause, effect)


def _together(cause: Finding, effect: Finding) -> bool:
    return None in (cause.component, effect.component) or cause.component == effect.component


def _before(cause: Finding, effect: Finding) -> bool:
    """Whether it surely began earlier, and not only was seen earlier in the first steps."""
    exact = cause.rule in _EXACT and effect.rule in _EXACT
    if cause.rule == "divergence":
        # it may have begun as late as at the end of its window, and the other before it was seen
        return _step(cause) + _WINDOW_STEPS <= _earliest(effect)
    return _step(cause) < _step(effect) and (exact or _step(effect) >= _FROM_THE_START)


def _step(finding: Finding) -> int:
    return -1 if finding.first_step is None else finding.first_step


def _latest(cause: Finding, effect: Finding) -> int:
    """The last step at which an effect may have begun: losses are told by the ten steps."""
    if effect.rule in _WHOLE_RUN and effect.last_step is not None:
        # it is said of the run as a whole: what shows within its first quarter may be why
        return _step(effect) + (effect.last_step - _step(effect)) // 4
    windows = effect.evidence.file.endswith(_WINDOWS) and cause.rule != "nonfinite_loss"
    return _step(effect) + (_WINDOW_STEPS if windows else 0)


def _earliest(cause: Finding) -> int:
    """The first step at which it may have begun: what is seldom measured is seen late."""
    step = _step(cause)
    if cause.rule in _EXACT:
        return step
    if step < _FROM_THE_START:
        return min(step, 0)
    if cause.began_after is not None:
        return cause.began_after + 1
    gaps = [after - before for before, after in pairwise(cause.evidence.steps) if after > before]
    return step - min(gaps, default=1) + 1


def order_findings(findings: list[Finding]) -> list[Finding]:
    """Sort findings: the gravest first, and every cause before what it explains.

    A cause is as grave as the gravest finding that it explains.
    """
    ranks = {id(one): one.rank for one in findings}
    for _ in findings:  # a chain of causes is no longer than the list
        for effect in findings:
            for cause in findings:
                if cause.rule == effect.caused_by and cause is not effect:
                    ranks[id(cause)] = max(ranks[id(cause)], ranks[id(effect)])
    depths = {id(one): _depth(one, findings) for one in findings}
    return sorted(
        findings,
        key=lambda one: (-ranks[id(one)], depths[id(one)], -one.rank, _step(one), one.rule),
    )


def _depth(finding: Finding, findings: list[Finding]) -> int:
    depth, seen, cause = 0, {finding.rule}, finding.caused_by
    while cause is not None and cause not in seen:
        depth += 1
        seen.add(cause)
        cause = next((one.caused_by for one in findings if one.rule == cause), None)
    return depth
