"""report.html: one file that needs neither network nor server."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lightning_diag.records.json_safe import json_safe
from lightning_diag.report.experiment import apply_command
from lightning_diag.report.groups import grouped
from lightning_diag.report.looked import looked_at
from lightning_diag.report.norms import WHOLE, ComponentNorms
from lightning_diag.report.overhead import Overhead
from lightning_diag.report.page_markup import TEMPLATE
from lightning_diag.report.page_parts import figure, page_template, themes, vega_bundle
from lightning_diag.report.page_template import SCRIPT, STYLE
from lightning_diag.report.section import Section
from lightning_diag.report.sections.questions import QUESTIONS
from lightning_diag.report.verdict import Verdict
from lightning_diag.report.words import flatten
from lightning_diag.rules.finding import Finding

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["EVIDENCE", "FIRST", "html_page", "vega_bundle"]

FIRST = 3
"""Findings on the first screen, each with its evidence."""

EVIDENCE = "evidence_"
"""Beginning of the names of their charts, followed by the number of the finding."""

_NOTES = 200
_SHOWN = 4  # consequences named without opening them


def html_page(
    run: "Run",
    verdict: Verdict,
    findings: Sequence[Finding],
    components: Sequence[ComponentNorms],
    costs: Sequence[Overhead],
    sections: Sequence[Section],
    charts: Mapping[str, Mapping[str, Any]],
    pictures: Mapping[str, bytes],
) -> str:
    """The whole report as one HTML file, with scripts, charts and pictures inside.

    Where a viewer does not run scripts, the pictures stand in for the charts.

    Args:
        run: The run.
        verdict: What to say first.
        findings: Causes first.
        components: Gradient norms, a line per component.
        costs: Cost of each diagnostic.
        sections: What the other diagnostics have to say.
        charts: Vega-Lite specifications by name.
        pictures: SVG or PNG pictures of the same charts.
    """
    groups = grouped(findings)
    figures = {name: figure(name, spec, pictures[name]) for name, spec in charts.items()}
    page: str = page_template(TEMPLATE).render(
        title=run.path.resolve().name or "run",
        verdict=verdict,
        first=groups[:FIRST],
        more=groups[FIRST:],
        evidence=EVIDENCE,
        shown=_SHOWN,
        command=apply_command(run.path, findings),
        until=looked_at(run).last,
        noted=[one for one in findings if one.rank == 0],
        figures=figures,
        questions=[one for one in sections if one.title == QUESTIONS],
        sections=[one for one in sections if one.title != QUESTIONS],
        components=components,
        costs=costs,
        notes=_notes(run),
        torn=sum(getattr(run, "torn", {}).values()),
        facts=_facts(run.info),
        config=json.dumps(json_safe(run.config), indent=2, ensure_ascii=False),
        has_config=bool(run.config),
        bundle=vega_bundle(),
        **themes(),
        style=STYLE,
        script=SCRIPT,
        written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        whole=WHOLE,
    )
    return page


def _notes(run: "Run") -> list[dict[str, Any]]:
    frame = run.frame("notes")
    if "message" not in frame.columns:
        return []
    rows = list(frame.iter_rows(named=True))[-_NOTES:]
    return [{"severity": "info", "diagnostic": "", **row} for row in rows]


def _facts(info: Mapping[str, Any]) -> dict[str, str]:
    """run.json for people: one line a fact, attempts counted rather than listed."""
    facts = {key: value for key, value in info.items() if key != "attempts"}
    attempts = info.get("attempts")
    if isinstance(attempts, list) and attempts:
        facts["attempts"] = len(attempts)
        last = attempts[-1] if isinstance(attempts[-1], Mapping) else {}
        for key in ("status", "stop_reason"):
            if last.get(key) is not None:
                facts[key] = last[key]
    flat = flatten(facts)
    return {key: _fact(value) for key, value in flat.items() if value not in (None, [], {})}


def _fact(value: object) -> str:
    if isinstance(value, list) and all(isinstance(one, (str, int, float)) for one in value):
        value = ", ".join(str(one) for one in value)
    text = value if isinstance(value, str) else json.dumps(json_safe(value), ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:299]}…"
