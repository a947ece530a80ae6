"""From a run to its findings, causes first."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_diag.rules import gradients as gradients  # entering its rules into the registry
from lightning_diag.rules import wiring as wiring
from lightning_diag.rules.finding import Finding
from lightning_diag.rules.registry import RULES, Rule, resolve_thresholds

if TYPE_CHECKING:
    from lightning_diag.records.live_rows import LiveRows
    from lightning_diag.records.read_run import Run

__all__ = ["diagnose", "order_findings"]


def diagnose(
    run: "str | Path | Run | LiveRows",
    thresholds: Mapping[str, Any] | None = None,
    *,
    on_error: Literal["report", "raise"] = "report",
) -> list[Finding]:
    """Run every rule on a run, and return what they found, most severe and most causal first.

    Args:
        run: The folder of a run, what `read_run` made of it, or the latest rows of a live one.
        thresholds: ``{rule id: {threshold: number}}`` in place of the defaults.
        on_error: What to do if a rule fails: ``"report"`` turns it into a finding of severity
            ``info`` that names the rule, ``"raise"`` lets the error through.

    Raises:
        ValueError: An unknown rule, threshold or `on_error`.
    """
    if on_error not in ("report", "raise"):
        raise ValueError(f"`on_error` must be 'report' or 'raise', got {on_error!r}.")
    resolved = resolve_thresholds(thresholds)
    if isinstance(run, (str, Path)):
        from lightning_diag.records.read_run import read_run

        run = read_run(run)
    found, there = [], set(run.prefixes)
    for one in RULES.values():
        if not there.isdisjoint(one.needs):
            found += _check(one, run, resolved[one.id], on_error)
    explained = _with_causes(found)
    return order_findings([_with_remedy(one, run.config) for one in explained])


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
    explained = []
    for finding in findings:
        causes = [one for one in findings if _explains(one, finding)]
        first = min(causes, key=lambda one: (_step(one), -one.rank), default=None)
        explained.append(replace(finding, caused_by=first.rule) if first else finding)
    return explained


def _explains(cause: Finding, effect: Finding) -> bool:
    rule = RULES[cause.rule]
    later = effect.rule in rule.explains_later and _step(cause) < _step(effect)
    if cause.rank == 0 or not (effect.rule in rule.explains or later):
        return False
    # a loss that is the same to the last bit is an effect of gradients that are tiny, but there
    if (cause.rule, cause.unit, effect.rule) == ("detached_graph", "loss", "vanishing_gradient"):
        return False
    # a part that died or blew up disturbs the balance of all; other effects stay where they began
    anywhere = effect.rule in ("gradient_imbalance", "nonfinite_gradient", "clipping_dominates")
    together = None in (cause.component, effect.component) or cause.component == effect.component
    return (anywhere or together) and _step(cause) <= _step(effect)


def _step(finding: Finding) -> int:
    return -1 if finding.first_step is None else finding.first_step


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
