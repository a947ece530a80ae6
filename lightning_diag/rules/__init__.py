"""Rules: pure functions from a run's rows to findings."""

from lightning_diag.rules.diagnosis import diagnose, order_findings
from lightning_diag.rules.finding import SEVERITIES, Evidence, Finding, Severity
from lightning_diag.rules.registry import RULES, Rule, rule

__all__ = [
    "RULES",
    "SEVERITIES",
    "Evidence",
    "Finding",
    "Rule",
    "Severity",
    "diagnose",
    "order_findings",
    "rule",
]
