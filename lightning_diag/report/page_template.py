"""Markup, style and script of report.html."""

__all__ = ["SCRIPT", "STYLE", "TEMPLATE"]

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}: {{ verdict.headline }}</title>
<style>{{ style|safe_json }}</style>
</head>
<body>
{% macro drawing(figure) %}
<figure>
<figcaption><strong>{{ figure.title }}</strong>
{% if figure.caption %}<span>{{ figure.caption }}</span>{% endif %}</figcaption>
<div class="chart" data-chart="{{ figure.name }}" aria-label="{{ figure.described }}">
<img src="data:image/png;base64,{{ figure.picture }}" alt="{{ figure.described }}"></div>
</figure>
{% endmacro %}
{% macro card(one, number=none) %}
<article class="card {{ one.severity }}">
<h3>{% if number %}<span class="number" aria-hidden="true">{{ number }}</span>{% endif %}
{{ one.issue }}<span class="where">{{ one.component or whole }}</span></h3>
<p class="tags"><span class="tag">{{ one.severity }}</span>
{% set steps = step_words(one.first_step, one.last_step) %}
{% if steps %}<span>{{ steps }}</span>{% endif %}
{% if one.caused_by %}<span>caused by: {{ one.caused_by|replace("_", " ") }}</span>{% endif %}</p>
<p>{{ one.message|prose }}</p>
<p><strong>Try:</strong> {{ one.suggestion|prose }}</p>
{% if one.overrides %}<pre><code>{{ one.overrides|override_words }}</code></pre>{% endif %}
{% if one.observed is not none %}
<details><summary>Evidence</summary>
<p>Observed {{ one.observed|short }}, threshold {{ one.threshold|short }} ({{ one.unit }});
confidence {{ "%.0f"|format(100 * one.confidence) }} %.
{% if one.evidence.steps %}Rows in <code>{{ one.evidence.file }}</code> at steps
{{ one.evidence.steps|join(", ") }}.{% endif %}</p></details>
{% endif %}
</article>
{% endmacro %}
<header class="{{ verdict.state|replace(" ", "-") }}">
<p class="over">Training report <span>{{ title }}</span></p>
<h1>{{ verdict.headline }}</h1>
<p class="lead">{{ verdict.sentence|prose }}</p>
</header>
<main>
{% if first %}
<section aria-labelledby="todo"><h2 id="todo">What to do first</h2>
<div class="cards">{% for one in first %}{{ card(one, loop.index) }}{% endfor %}</div>
{% if more %}
<details class="more"><summary>{{ more|length }} more</summary>
<div class="cards">{% for one in more %}{{ card(one) }}{% endfor %}</div></details>
{% endif %}
</section>
{% endif %}
<section aria-labelledby="charts"><h2 id="charts">Charts</h2>
{% for one in first_figures %}{{ drawing(one) }}{% endfor %}
</section>
<section aria-labelledby="table"><h2 id="table">Gradients by component</h2>
{% if components %}
<p class="quiet">Norms before clipping, over all measured steps. An element is one number in a
parameter tensor.</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="table"><table>
<thead><tr><th scope="col">component</th><th scope="col">mean norm</th><th scope="col">std</th>
<th scope="col">max</th><th scope="col">min</th>
<th scope="col"><abbr title="norm over the root of the number of elements">rms</abbr></th>
<th scope="col"><abbr title="mean share of the squared norm">share</abbr></th>
<th scope="col">elements</th><th scope="col">tensors</th>
<th scope="col"><abbr title="trainable tensors without gradient">no gradient</abbr></th>
<th scope="col">frozen</th><th scope="col">rows</th>
<th scope="col"><abbr title="rows on which the norm was zero">zero</abbr></th>
<th scope="col"><abbr title="rows with NaN or infinity">NaN</abbr></th></tr></thead>
<tbody>
{% for one in components %}
<tr><th scope="row">{{ one.component }}</th>
<td>{{ one.mean|short }}</td><td>{{ one.std|short }}</td>
<td>{{ one.max|short }}</td><td>{{ one.min|short }}</td><td>{{ one.rms|short }}</td>
<td>{% if one.share is none %}-{% else %}{{ "%.1f"|format(100 * one.share) }} %{% endif %}</td>
<td>{{ "{:,}".format(one.elements) }}</td><td>{{ one.tensors }}</td>
<td{% if one.missing %} class="odd"{% endif %}>{{ one.missing }}</td><td>{{ one.frozen }}</td>
<td>{{ one.rows }}</td><td{% if one.zero_rows %} class="odd"{% endif %}>{{ one.zero_rows }}</td>
<td{% if one.nonfinite_rows %} class="odd"{% endif %}>{{ one.nonfinite_rows }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}<p>None were measured.</p>{% endif %}
</section>
{% for section in sections %}
<section aria-labelledby="section-{{ loop.index }}">
<h2 id="section-{{ loop.index }}">{{ section.title }}</h2>
{% set place = loop.index %}
{% for line in section.lines %}<p>{{ line|prose }}</p>
{% endfor %}
{% for name in section.charts %}{{ drawing(figures[name]) }}{% endfor %}
{% for table in section.tables %}
{% if table.title %}<h3>{{ table.title }}</h3>{% endif %}
<div class="scroll" tabindex="0" role="region" aria-labelledby="section-{{ place }}"><table>
<thead><tr>{% for name in table.columns %}
<th scope="col"{% if loop.index <= table.left %} class="name"{% endif %}>{{ name }}</th>
{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}
{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}
<td{% if loop.index <= table.left %} class="name"{% endif %}>{{ cell }}</td>{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
</section>
{% endfor %}
{% if noted %}
<section aria-labelledby="noted"><h2 id="noted">Noted</h2>
<p class="quiet">Worth knowing, but no alarm.</p>
<ul>{% for one in noted %}<li>{{ one.message|prose }}
<span class="quiet">{{ one.suggestion|prose }}</span></li>{% endfor %}</ul></section>
{% endif %}
<section aria-labelledby="cost"><h2 id="cost">Cost of watching</h2>
{% if costs %}
<div class="scroll" tabindex="0" role="region" aria-labelledby="cost"><table>
<thead><tr><th scope="col">diagnostic</th><th scope="col">share of training</th>
<th scope="col">host time</th><th scope="col">device time</th><th scope="col">measured</th>
<th scope="col">interval</th></tr></thead><tbody>
{% for one in costs %}
<tr><th scope="row">{{ one.diagnostic }}</th>
<td>{% if one.share is none %}-{% else %}{{ "%.2f"|format(100 * one.share) }} %{% endif %}</td>
<td>{% if one.seconds is none %}-{% else %}{{ "%.2f"|format(one.seconds) }} s{% endif %}</td>
<td>{% if one.device_seconds is none %}-{% else %}
{{ "%.2f"|format(one.device_seconds) }} s{% endif %}</td>
<td>{{ "-" if one.measured is none else one.measured }}</td>
<td>{{ "-" if one.every_n_steps is none else one.every_n_steps }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}<p>Not measured.</p>{% endif %}
</section>
{% if notes or torn %}
<section aria-labelledby="notes"><h2 id="notes">Notes of the diagnostics</h2>
<ul>{% for row in notes %}<li><span class="tag {{ row.severity }}">{{ row.severity }}</span>
{{ row.message|prose }} <span class="quiet">{{ row.diagnostic }}{% if row.step is not none %}, step
{{ row.step }}{% endif %}</span></li>{% endfor %}
{% if torn %}
<li>{{ torn }} torn line{{ "" if torn == 1 else "s" }} could not be read.</li>
{% endif %}
</ul></section>
{% endif %}
<section aria-labelledby="setup"><h2 id="setup">Configuration and versions</h2>
{% if facts %}
<dl>{% for key, value in facts.items() %}<div><dt>{{ key }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% endif %}
{% if has_config %}
<details><summary>Configuration</summary><pre><code>{{ config }}</code></pre></details>
{% else %}<p class="quiet">The run has no configuration.</p>{% endif %}
</section>
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

STYLE = """
:root { --ink: #1f2933; --quiet: #5b6875; --ground: #f5f6f8; --card: #ffffff; --line: #dfe3e8;
  --critical: #b42318; --warning: #a15c07; --healthy: #1a7f4b; --info: #31618f; --code: #eef1f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --quiet: #9fadba; --ground: #0f1317; --card: #161b21; --line: #2b343d;
    --critical: #ff8a7a; --warning: #f0b429; --healthy: #4fcf94; --info: #7db8ea; --code: #1f262d; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif;
  font-size: 16px; overflow-wrap: break-word; }
header, main, footer { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; padding-bottom: 8px; }
.over { margin: 0; color: var(--quiet); font-size: 14px; }
.over span::before { content: "· "; }
.over span { overflow-wrap: anywhere; }
h1 { margin: 6px 0 8px; font-size: 34px; line-height: 1.2; letter-spacing: -0.01em; }
h1::before { content: ""; display: inline-block; width: 0.55em; height: 0.55em; margin-right: 0.4em;
  border-radius: 50%; background: var(--warning); vertical-align: 0.08em; }
.healthy h1::before { background: var(--healthy); }
.critical h1::before { background: var(--critical); }
.nothing-measured h1::before, .too-little h1::before { background: var(--quiet); }
.lead { margin: 0; font-size: 18px; color: var(--quiet); max-width: 70ch; }
section { margin: 36px 0; }
h2 { margin: 0 0 12px; font-size: 20px; }
h3 { margin: 0; font-size: 17px; line-height: 1.35; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 78ch; }
.quiet, .quiet code { color: var(--quiet); }
.cards { display: grid; grid-template-columns: minmax(0, 1fr); gap: 14px; }
.card, figure, dl { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 16px 20px; border-left: 4px solid var(--info); }
.card.warning { border-left-color: var(--warning); }
.card.critical { border-left-color: var(--critical); }
.where { color: var(--quiet); font-weight: 500; }
.where::before { content: " in "; font-weight: 400; }
.number { display: inline-block; min-width: 1.6em; margin-right: 0.4em; border-radius: 0.8em;
  background: var(--code); text-align: center; font-size: 0.85em; font-weight: 600; }
.tags { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 4px 0 8px; font-size: 14px;
  color: var(--quiet); }
.tag { color: var(--info); font-weight: 600; }
.critical .tag, .tag.critical { color: var(--critical); }
.warning .tag, .tag.warning { color: var(--warning); }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.88em; overflow-wrap: anywhere; }
p code, li code { background: var(--code); border-radius: 4px; padding: 1px 5px; }
pre { margin: 10px 0; padding: 10px 14px; background: var(--code); border-radius: 8px;
  overflow-x: auto; }
pre code { overflow-wrap: normal; }
details { margin-top: 8px; }
summary { cursor: pointer; color: var(--quiet); font-size: 14px; }
.more > .cards { margin-top: 14px; }
figure { margin: 0 0 16px; padding: 16px 20px; overflow: hidden; }
figcaption strong { display: block; font-size: 16px; }
figcaption span { display: block; color: var(--quiet); font-size: 14px; overflow-wrap: anywhere; }
.chart { margin-top: 12px; width: 100%; }
.chart img, .chart svg { display: block; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 8px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--quiet); font-weight: 500; }
th.name, td.name { text-align: left; }
th:first-child { padding-left: 14px; text-align: left;
  position: sticky; left: 0; background: var(--card); }
tbody th { font-weight: 600; min-width: 9em; max-width: 260px; white-space: normal;
  overflow-wrap: anywhere; }
.odd { color: var(--critical); font-weight: 600; }
abbr { text-decoration: underline dotted; text-underline-offset: 3px; }
ul { margin: 0; padding-left: 20px; }
li { margin: 6px 0; max-width: 78ch; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 0 24px;
  margin: 0 0 12px; padding: 10px 20px; font-size: 14px; }
dl div { padding: 6px 0; min-width: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { padding-bottom: 32px; color: var(--quiet); font-size: 14px; }
#vg-tooltip-element.vg-tooltip { font-family: inherit; background: var(--card); color: var(--ink);
  border-color: var(--line); }
#vg-tooltip-element.vg-tooltip table tr td { color: inherit; border: 0; padding: 1px 4px; }
@media (max-width: 560px) {
  header, main, footer { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 27px; }
  .lead { font-size: 16px; }
  .card, figure { padding: 14px; }
  tbody th { max-width: 130px; }
}
@media print { body { background: #fff; } .card, figure { break-inside: avoid; } }
"""

SCRIPT = """
(function () {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();
  let drawn = 0;
  function size(spec, wide) {
    if (!spec.concat) {
      for (const panel of spec.vconcat || [spec]) panel.width = wide;
      return;
    }
    spec.columns = wide < 520 ? 1 : Math.min(spec.columns || 1, spec.concat.length);
    const each = (wide - 90 * (spec.columns - 1)) / spec.columns;
    for (const panel of spec.concat) {
      panel.width = each;
      if (panel.title && panel.title.limit) panel.title.limit = each;
    }
  }
  function draw(place) {
    const spec = read("spec-" + place.dataset.chart);
    const config = read(dark.matches ? "dark" : "light");
    const wide = Math.max(180, place.clientWidth - 96);
    size(spec, wide);
    config.legend.columns = Math.max(1, Math.floor(wide / 200));
    if (wide < 460) config.legend.layout = { bottom: { direction: "vertical" } };
    const frame = document.createElement("div");
    const options = { mode: "vega-lite", renderer: "svg", actions: false, config: config };
    return vegaEmbed(frame, spec, options).then((result) => {
      if (views.has(place)) views.get(place).finalize();
      views.set(place, result);
      place.replaceChildren(frame);
    });
  }
  function drawAll() {
    drawn = window.innerWidth;
    const places = document.querySelectorAll("[data-chart]");
    return Promise.allSettled([...places].map(draw)).then((all) => {
      all.filter((one) => one.status === "rejected").forEach((one) => console.error(one.reason));
    });
  }
  let timer = 0;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { if (window.innerWidth !== drawn) drawAll(); }, 150);
  });
  dark.addEventListener("change", drawAll);
  drawAll();
})();
"""
