"""comparison.html: two runs on one page that needs neither network nor server."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lightning_diag.report.comparison import Comparison
from lightning_diag.report.comparison_metrics import metric_points
from lightning_diag.report.comparison_text import number_words, one_line, setting_words
from lightning_diag.report.norms import WHOLE
from lightning_diag.report.page_parts import drawn, figure, page_template, themes, vega_bundle
from lightning_diag.report.page_template import SCRIPT, STYLE
from lightning_diag.report.series import Panel, line_chart, points_by
from lightning_diag.report.training_data import is_loss

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["comparison_page"]

_LOSSES = 4  # panels of losses


def comparison_page(comparison: Comparison, before: "Run", after: "Run") -> str:
    """The comparison as one HTML file, with scripts, charts and pictures inside.

    Args:
        comparison: What `compare` returned.
        before: The first run.
        after: The second run.
    """
    charts = {"losses": _losses(comparison, before, after), "gradient": _norms(before, after)}
    figures = {name: figure(name, *drawn(chart)) for name, chart in charts.items()}
    page: str = page_template(TEMPLATE).render(
        one=comparison,
        sides=[("A", comparison.before), ("B", comparison.after)],
        states=[(title, text, comparison.of(state)) for state, title, text in _STATES],
        figures=figures,
        number=number_words,
        setting=setting_words,
        whole=WHOLE,
        bundle=vega_bundle(),
        **themes(),
        style=STYLE + _STYLE,
        script=SCRIPT,
        written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
    )
    return page


_STATES = (
    ("new", "New", "Found in B, not in A."),
    ("still", "Still there", "Found in both."),
    ("gone", "Gone", "Found in A, not in B."),
)


def _losses(comparison: Comparison, before: "Run", after: "Run") -> Any:  # noqa: ANN401
    points = metric_points(before), metric_points(after)
    names = [one.name for one in comparison.metrics if is_loss(one.name)]
    both = [name for name in names if name in points[0] and name in points[1]]
    panels, lost = [], []
    for name in (both or names)[:_LOSSES]:
        series = {
            letter: one[name] for letter, one in zip("AB", points, strict=True) if name in one
        }
        finite = {letter: [y for _, y in line if y == y] for letter, line in series.items()}
        lost += [
            f"{one_line(name)} of {letter} was never finite."
            for letter in series
            if not finite[letter]
        ]
        series = {letter: line for letter, line in series.items() if finite[letter]}
        values = [value for line in finite.values() for value in line]
        wide = bool(values) and min(values) > 0 and max(values) > 100 * min(values)
        # Vega makes an expression of it, which ends with the line
        label = f"{one_line(name)}, log scale" if wide else one_line(name)
        panels.append(Panel(label, series, log=wide))
    said = [f"A: {one_line(comparison.before.name)}. B: {one_line(comparison.after.name)}.", *lost]
    if len(both or names) > _LOSSES:
        said.append(f"The first {_LOSSES} of {len(both or names)} losses are drawn.")
    return line_chart("Losses of both runs", panels, said=said)


def _norms(before: "Run", after: "Run") -> Any:  # noqa: ANN401
    series = {}
    for letter, run in zip("AB", (before, after), strict=True):
        frame = run.frame("grad")
        named = "global_norm" if "global_norm" in frame.columns else "l2"
        found = points_by(frame, named, whole=WHOLE).get(WHOLE)
        if not found:
            found = points_by(run.frame("loss"), "gradient_norm", whole=WHOLE).get(WHOLE)
        if found:
            series[letter] = found
    panel = Panel("l2 norm of the gradient, log scale", series, log=True)
    said = ["The whole model, before clipping."]
    return line_chart("Gradient norm of both runs", [panel], said=said)


_STYLE = """
.better { color: var(--healthy); font-weight: 600; }
.worse { color: var(--critical); font-weight: 600; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 16px; }
.sides .card p { margin: 4px 0; overflow-wrap: anywhere; }
td.name { white-space: normal; overflow-wrap: anywhere; }
"""

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ one.before.name }} and {{ one.after.name }} compared</title>
<style>{{ style|safe_json }}</style>
</head>
<body>
{% macro card(change) %}
{% set found = change.finding %}
<article class="card {{ found.severity }}">
<h3>{{ found.issue }}<span class="where">{{ found.component or whole }}</span></h3>
<p class="tags"><span class="tag">{{ found.severity }}</span>
{% if change.change in ("worse", "milder") %}
<span>{{ change.change }}: was {{ change.before.severity }}</span>{% endif %}
{% if change.moved is not none %}<span>was in: {{ change.moved or whole }}</span>{% endif %}
{% if not change.reached %}<span>B has not come to that step</span>{% endif %}
{% set steps = step_words(found.first_step, found.last_step) %}
{% if steps %}<span>{{ steps }}</span>{% endif %}
{% if found.caused_by %}<span>caused by: {{ found.caused_by|replace("_", " ") }}
{% if change.known_cause %}(was there before){% endif %}</span>{% endif %}</p>
<p>{{ found.message|prose }}</p>
{% if change.state != "gone" %}
<p><strong>Try:</strong> {{ found.suggestion|prose }}</p>
{% if found.overrides %}<pre><code>{{ found.overrides|override_words }}</code></pre>{% endif %}
{% endif %}
</article>
{% endmacro %}
{% macro drawing(figure) %}
<figure>
<figcaption><strong>{{ figure.title }}</strong>
{% if figure.caption %}<span>{{ figure.caption }}</span>{% endif %}</figcaption>
<div class="chart" data-chart="{{ figure.name }}" aria-label="{{ figure.described }}">
<img src="data:image/png;base64,{{ figure.picture }}" alt="{{ figure.described }}"></div>
</figure>
{% endmacro %}
{% macro numbers(rows) %}
<div class="scroll" tabindex="0" role="region" aria-label="Numbers of both runs"><table>
<thead><tr><th scope="col">what</th><th scope="col">A</th><th scope="col">B</th>
<th scope="col">unit</th></tr></thead><tbody>
{% for row in rows %}
<tr><th scope="row">{{ row.name }}</th><td>{{ number(row.before, row.unit) }}</td>
<td>{{ number(row.after, row.unit) }}</td><td>{{ row.unit }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro settings(rows) %}
{% if rows %}
<div class="scroll" tabindex="0" role="region" aria-label="Differences"><table>
<thead><tr><th scope="col">key</th><th scope="col" class="name">A</th>
<th scope="col" class="name">B</th></tr></thead><tbody>
{% for row in rows %}
<tr><th scope="row">{{ row.key }}</th><td class="name">{{ setting(row.before) }}</td>
<td class="name">{{ setting(row.after) }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}<p>No difference.</p>{% endif %}
{% endmacro %}
<header class="{{ one.after.verdict.state|replace(" ", "-") }}">
<p class="over">Comparison <span>{{ one.before.name }}, {{ one.after.name }}</span></p>
<h1>{{ one.headline }}</h1>
<p class="lead">{{ one.after.verdict.sentence|prose }}</p>
</header>
<main>
<section aria-label="The two runs"><div class="sides">
{% for letter, side in sides %}
<article class="card"><h3>{{ letter }}: {{ side.name }}</h3>
<p>{{ side.verdict.headline }}</p>
<p class="quiet">{{ side.path }}{% if side.status %}, {{ side.status }}{% endif %}
{% if side.steps is not none %}, last step {{ side.steps }}{% endif %}</p></article>
{% endfor %}
</div></section>
{% for title, text, found in states if found %}
<section aria-labelledby="findings-{{ loop.index }}">
<h2 id="findings-{{ loop.index }}">{{ title }}</h2>
<p class="quiet">{{ text }}</p>
<div class="cards">{% for change in found %}{{ card(change) }}{% endfor %}</div></section>
{% endfor %}
<section aria-labelledby="charts"><h2 id="charts">Charts</h2>
{% for drawn in figures.values() %}{{ drawing(drawn) }}{% endfor %}
</section>
<section aria-labelledby="metrics"><h2 id="metrics">Metrics</h2>
{% if one.metrics %}
<p class="quiet">At the last step that both reached, B is green where it did better.</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="metrics"><table>
<thead><tr><th scope="col">metric</th><th scope="col">A last</th><th scope="col">B last</th>
<th scope="col">A best</th><th scope="col">B best</th><th scope="col">at step</th>
<th scope="col">A</th><th scope="col">B</th></tr></thead><tbody>
{% for row in one.metrics %}
<tr><th scope="row">{{ row.name }}</th><td>{{ number(row.before) }}</td>
<td>{{ number(row.after) }}</td><td>{{ number(row.best_before) }}</td>
<td>{{ number(row.best_after) }}</td><td>{{ "-" if row.step is none else row.step }}</td>
<td>{{ number(row.at_step_before) }}</td>
<td{% if row.better is not none %} class="{{ "better" if row.better else "worse" }}"{% endif %}>
{{ number(row.at_step_after) }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}<p>Neither run logged any.</p>{% endif %}
</section>
{% if one.machine %}
<section aria-labelledby="machine"><h2 id="machine">Machine</h2>{{ numbers(one.machine) }}</section>
{% endif %}
<section aria-labelledby="configuration"><h2 id="configuration">Configuration</h2>
{{ settings(one.configuration) }}</section>
<section aria-labelledby="environment"><h2 id="environment">Versions, seed, data and machine</h2>
{{ settings(one.environment) }}</section>
{% if one.watching %}
<section aria-labelledby="watching"><h2 id="watching">Cost of watching</h2>
{{ numbers(one.watching) }}</section>
{% endif %}
</main>
<footer><p>Written by lightning_diag, {{ written }}.</p></footer>
<script type="application/json" id="light">{{ light|safe_json }}</script>
<script type="application/json" id="dark">{{ dark|safe_json }}</script>
{% for figure in figures.values() %}
<script type="application/json" id="spec-{{ figure.name }}">{{ figure.spec|safe_json }}</script>
{% endfor %}
<script>{{ bundle|safe_json }}</script>
<script>{{ script|safe_json }}</script>
</body>
</html>
"""
