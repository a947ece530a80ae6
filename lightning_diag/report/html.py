"""report.html: one file that needs neither network nor server."""

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from lightning_diag.records.json_safe import json_safe
from lightning_diag.report.norms import WHOLE, ComponentNorms
from lightning_diag.report.overhead import Overhead
from lightning_diag.report.page_template import SCRIPT, STYLE, TEMPLATE
from lightning_diag.report.section import Section
from lightning_diag.report.theme import chart_config
from lightning_diag.report.verdict import Verdict
from lightning_diag.report.words import flatten, override_words, short, step_words
from lightning_diag.rules.finding import Finding

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["html_page", "vega_bundle"]

_FIRST = 3  # findings on the first screen
_NOTES = 200


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
        pictures: PNG pictures of the same charts.
    """
    grave = [one for one in findings if one.rank > 0]
    figures = {name: _figure(name, spec, pictures[name]) for name, spec in charts.items()}
    elsewhere = {name for section in sections for name in section.charts}
    page: str = _template().render(
        title=run.path.resolve().name or "run",
        verdict=verdict,
        first=grave[:_FIRST],
        more=grave[_FIRST:],
        noted=[one for one in findings if one.rank == 0],
        figures=figures,
        first_figures=[figures[name] for name in charts if name not in elsewhere],
        sections=sections,
        components=components,
        costs=costs,
        notes=_notes(run),
        torn=sum(getattr(run, "torn", {}).values()),
        facts=_facts(run.info),
        config=json.dumps(json_safe(run.config), indent=2, ensure_ascii=False),
        has_config=bool(run.config),
        bundle=vega_bundle(),
        light=_script_json(_without_width(chart_config())),
        dark=_script_json(_without_width(chart_config(dark=True))),
        style=STYLE,
        script=SCRIPT,
        written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        whole=WHOLE,
    )
    return page


@cache
def _template() -> Any:  # noqa: ANN401 - Jinja2 is loaded here only
    from jinja2 import Environment
    from markupsafe import Markup, escape

    def prose(text: str) -> Markup:
        """A sentence of ours, in which names stand between backticks."""
        parts = text.split("`")
        if len(parts) % 2 == 0:
            return escape(text)
        return Markup("").join(
            Markup("<code>{}</code>").format(part) if index % 2 else escape(part)
            for index, part in enumerate(parts)
        )

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        prose=prose, short=short, override_words=override_words, safe_json=Markup
    )
    environment.globals.update(step_words=step_words)
    return environment.from_string(TEMPLATE)


def _script_json(value: object) -> str:
    """JSON that may stand inside a script element: nothing in it can close the element."""
    text = json.dumps(json_safe(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _without_width(config: dict[str, Any]) -> dict[str, Any]:
    """The page gives charts its own ground."""
    return {**config, "background": None}


def _figure(name: str, spec: Mapping[str, Any], picture: bytes) -> dict[str, str]:
    drawn = {key: value for key, value in spec.items() if key not in ("$schema", "config", "title")}
    title = spec["title"]
    text = title if isinstance(title, str) else title["text"]
    said = [] if isinstance(title, str) else title.get("subtitle", [])
    return {
        "name": name,
        "title": text,
        "caption": " ".join([said] if isinstance(said, str) else said),
        "described": str(spec.get("description", text)),
        "spec": _script_json(drawn),
        "picture": base64.b64encode(picture).decode(),
    }


@cache
def vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, without a network."""
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    # the default snippet, which the stubs of vl-convert do not know to be optional
    bundle: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


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
