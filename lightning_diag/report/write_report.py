"""The files of ``analysis/``: tables, charts, findings and the page that shows them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_diag.records.files import write_bytes, write_json, write_text
from lightning_diag.records.read_run import Run, read_run
from lightning_diag.report.charts import Chart, gradient_flow, training
from lightning_diag.report.evidence_chart import evidence_chart
from lightning_diag.report.groups import Group, grouped
from lightning_diag.report.html import EVIDENCE, FIRST, html_page
from lightning_diag.report.looked import looked_at
from lightning_diag.report.markdown import markdown_page
from lightning_diag.report.norms import (
    WHOLE,
    ComponentNorms,
    component_norms,
    measured_steps,
    norms_csv,
)
from lightning_diag.report.overhead import Overhead, overheads
from lightning_diag.report.page_parts import writable
from lightning_diag.report.section import Section
from lightning_diag.report.sections import sections
from lightning_diag.report.sections.questions import agreed
from lightning_diag.report.verdict import Verdict, judge
from lightning_diag.rules import Finding, diagnose

__all__ = ["Report", "chart_png", "chart_svg", "recommendations", "svg_png", "write_report"]


@dataclass(frozen=True)
class Report:
    """What was found in a run, and where it was written.

    Args:
        run: The run's folder.
        findings: Causes first.
        files: The files of ``analysis/`` by name.
        verdict: State, headline and sentence.
        components: Gradient norms, a line per component.
        overheads: Cost of each diagnostic.
        sections: What the other diagnostics have to say.
    """

    run: Path
    findings: list[Finding]
    files: dict[str, Path]
    verdict: Verdict
    components: list[ComponentNorms]
    overheads: list[Overhead]
    sections: list[Section]

    @property
    def exit_code(self) -> int:
        """0 for healthy, 3 for warnings or where nothing was measured, 4 for critical."""
        return self.verdict.exit_code


def write_report(path: str | Path | Run, thresholds: Mapping[str, Any] | None = None) -> Report:
    """Diagnose a run and write ``analysis/`` into its folder, each file whole or not at all.

    Args:
        path: The run's folder, or what `read_run` made of it.
        thresholds: ``{rule id: {threshold: number}}`` in place of the defaults.

    Raises:
        ValueError: An unknown rule or threshold, or a folder that holds no run.
        OSError: A file could not be written.

    Example:
        >>> write_report("runs/mine").verdict.state  # doctest: +SKIP
        'healthy'
    """
    run = path if isinstance(path, Run) else read_run(path)
    findings = diagnose(run, thresholds)
    grad = run.frame("grad")
    steps = measured_steps(grad)
    verdict = judge(findings, steps, run.info, looked_at(run))
    components, costs = component_norms(grad), overheads(run.frame("overhead"))
    folder = run.path / "analysis"
    groups = grouped(findings)
    charts = {
        "training": _spec(training(run)),
        "gradient_flow": _spec(gradient_flow(run, [one.first for one in groups])),
    }
    pictures = {name: chart_svg(spec) for name, spec in charts.items()}
    others = [_drawn(one, charts, pictures) for one in agreed(sections(run), groups)]
    files = {f"{name}.png": svg_png(picture) for name, picture in pictures.items()}
    _evidence(run, groups, charts, pictures)
    parts = (run, verdict, findings, components, costs, others)
    texts = {"gradient_norms.csv": norms_csv(grad)}
    for section in others:
        texts |= section.files
    for name, text in texts.items():
        write_text(folder / name, text)
    for name, picture in files.items():
        write_bytes(folder / name, picture)
    write_json(folder / "findings.json", [one.to_dict() for one in findings])
    write_json(folder / "recommendations.json", recommendations(findings))
    write_text(folder / "report.md", markdown_page(*parts))
    write_text(folder / "report.html", html_page(*parts, charts, pictures))
    paths = {name: folder / name for name in [*texts, *files, *_FILES]}
    return Report(run.path, findings, paths, verdict, components, costs, others)


_FILES = ("findings.json", "recommendations.json", "report.md", "report.html")


def _drawn(
    section: Section, charts: dict[str, dict[str, Any]], pictures: dict[str, bytes]
) -> Section:
    """Draw a section's charts into `charts` and `pictures`; one that fails is said instead."""
    lines, drawn = [*section.lines], {}
    for name, chart in section.charts.items():
        try:
            spec = _spec(chart)
            pictures[name] = chart_svg(spec)
        except Exception as error:
            lines.append(f"The chart {name} could not be drawn: {type(error).__name__}.")
            continue
        charts[name] = spec
        drawn[name] = chart
    return replace(section, lines=tuple(lines), charts=drawn)


def _evidence(
    run: Run,
    groups: list[Group],
    charts: dict[str, dict[str, Any]],
    pictures: dict[str, bytes],
) -> None:
    """Draw the evidence of the first findings; one that cannot be drawn is left out."""
    for number, group in enumerate(groups[:FIRST], start=1):
        name = f"{EVIDENCE}{number}"
        try:
            chart = evidence_chart(run, group.first)
            if chart is not None:
                spec = _spec(chart)
                pictures[name] = chart_svg(spec)
                charts[name] = spec
        except Exception:  # a chart that fails must not cost the finding
            continue


def recommendations(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings above ``info`` as a short list for people, in the same order."""
    return [
        {
            "component": one.component or WHOLE,
            "issue": one.issue,
            "severity": one.severity,
            "suggestion": one.suggestion,
            "what": one.message,
            "since_step": one.first_step,
            "caused_by": one.caused_by,
            "overrides": dict(one.overrides),
        }
        for one in findings
        if one.rank > 0
    ]


def _spec(chart: Chart) -> dict[str, Any]:
    # validating every point against the schema takes longer than drawing it
    spec: dict[str, Any] = writable(chart.to_dict(validate=False))
    return spec


def chart_svg(spec: Mapping[str, Any]) -> bytes:
    """A Vega-Lite specification as an SVG picture: a fifth of a PNG, and as sharp as the screen."""
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    picture: str = vl_convert.vegalite_to_svg(dict(spec), vl_version=version)
    return picture.encode()


def svg_png(picture: bytes) -> bytes:
    """An SVG picture as PNG, twice as dense as it is large."""
    import vl_convert

    drawn: bytes = vl_convert.svg_to_png(picture.decode(), scale=2)
    return drawn


def chart_png(spec: Mapping[str, Any]) -> bytes:
    """A Vega-Lite specification as a PNG picture, twice as dense as it is large."""
    return svg_png(chart_svg(spec))
