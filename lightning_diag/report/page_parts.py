"""What every page is made of: templates, charts, and JSON that may stand in a page."""

import base64
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from lightning_diag.records.json_safe import json_safe
from lightning_diag.report.issue_words import noted, since, what_is_wrong
from lightning_diag.report.theme import chart_config
from lightning_diag.report.words import (
    capital,
    first_sentence,
    override_words,
    short,
    step_words,
    to_try,
)

__all__ = [
    "drawn",
    "figure",
    "page_template",
    "script_json",
    "themes",
    "vega_bundle",
    "writable",
]


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # what XML refuses


@cache
def page_template(text: str) -> Any:  # noqa: ANN401 - Jinja2 is loaded here only
    """A Jinja template with the filters that every page of a report needs.

    Args:
        text: Its source.
    """
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
        prose=prose,
        short=short,
        override_words=override_words,
        first_sentence=first_sentence,
        capital=capital,
        question=_question,
        to_try=to_try,
        noted=noted,
        what_is_wrong=what_is_wrong,
        safe_json=Markup,
    )
    environment.globals.update(step_words=step_words, since=since)
    return environment.from_string(text)


def _question(line: str) -> tuple[str, str]:
    """A line of questions and answers as both."""
    question, mark, answer = line.partition("? ")
    return (f"{question}?", answer) if mark else ("", line)


def script_json(value: object) -> str:
    """JSON that may stand inside a script element: nothing in it can close the element.

    Args:
        value: What `json_safe` takes.
    """
    text = json.dumps(json_safe(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def themes() -> dict[str, str]:
    """The look of charts on light and on dark ground, as JSON for the page's script."""
    # the page gives charts its own ground
    looks = {"light": chart_config(), "dark": chart_config(dark=True)}
    return {name: script_json({**look, "background": None}) for name, look in looks.items()}


def figure(name: str, spec: Mapping[str, Any], picture: bytes) -> dict[str, str]:
    """A chart as the page draws it: specification, picture, title and caption.

    Args:
        name: Its name in the page.
        spec: A Vega-Lite specification with a title.
        picture: An SVG or PNG picture of it, for viewers that run no scripts.
    """
    drawn = {key: value for key, value in spec.items() if key not in ("$schema", "config", "title")}
    title = spec["title"]
    text = title if isinstance(title, str) else title["text"]
    said = [] if isinstance(title, str) else title.get("subtitle", [])
    return {
        "name": name,
        "title": text,
        "caption": " ".join([said] if isinstance(said, str) else said),
        "described": str(spec.get("description", text)),
        "spec": script_json(drawn),
        "kind": "svg+xml" if picture.startswith(b"<svg") else "png",
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


def writable(value: Any) -> Any:  # noqa: ANN401
    """A specification without control characters, on which drawing it ends the whole process.

    Args:
        value: What JSON can hold.
    """
    if isinstance(value, str):
        return value if value.isprintable() else _CONTROL.sub("?", value)
    if isinstance(value, list):
        return [writable(one) for one in value]
    if isinstance(value, dict):
        return {writable(key): writable(one) for key, one in value.items()}
    return value


def drawn(chart: Any) -> tuple[dict[str, Any], bytes]:  # noqa: ANN401 - Altair's charts
    """The specification of a chart, and its picture as PNG."""
    import altair as alt
    import vl_convert

    # validating every point against the schema takes longer than drawing it
    spec: dict[str, Any] = writable(chart.to_dict(validate=False))
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    picture: bytes = vl_convert.vegalite_to_png(spec, vl_version=version, scale=2)
    return spec, picture
