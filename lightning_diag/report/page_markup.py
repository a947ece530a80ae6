"""Markup of report.html."""

__all__ = ["TEMPLATE"]

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
<img src="data:image/{{ figure.kind }};base64,{{ figure.picture }}"
alt="{{ figure.described }}"></div>
</figure>
{% endmacro %}
{% macro also(one, group) %}
{% set when = since(one, until) %}
<li>{{ one|what_is_wrong|capital|prose }}{% if when %}, {{ when }}{% endif %}.
<span class="quiet">{{ group.told(one)|prose }}</span>
{% if one.overrides %}<code>{{ one.overrides|override_words }}</code>{% endif %}</li>
{% endmacro %}
{% macro card(group, number=none) %}
{% set one = group.first %}
{% set figure = figures[evidence ~ number] if number else none %}
{% set first, rest = one.suggestion|first_sentence %}
<article class="card finding {{ group.severity }}{% if not figure %} alone{% endif %}">
<div>
<h3>{% if number %}<span class="number" aria-hidden="true">{{ number }}</span>{% endif %}
{{ one|what_is_wrong|capital|prose }}</h3>
<p class="tags"><span class="tag">{{ group.severity }}</span>
{% set when = since(one, until) %}{% if when %}<span>{{ when }}</span>{% endif %}
{% if one.component and "`" not in one|what_is_wrong %}<span>{{ one.component }}</span>{% endif %}
</p>
<p>{{ one.message|prose }}</p>
<p><span class="try">Try first:</span> {{ first|to_try|prose }}</p>
{% if one.overrides %}
<pre aria-label="override"><code>{{ one.overrides|override_words }}</code></pre>
{% endif %}
<div class="extras">
{% if group.consequences %}
<details class="wide"><summary>{{ group.consequences|length }}
consequence{{ "" if group.consequences|length == 1 else "s" }}:
{% for effect in group.consequences[:shown] %}{{ effect|what_is_wrong|prose }}
{%- if not loop.last %}, {% endif %}{% endfor %}
{{ "and more" if group.consequences|length > shown }}</summary>
<ul>{% for effect in group.consequences %}{{ also(effect, group) }}{% endfor %}</ul></details>
{% endif %}
{% if group.elsewhere %}
<details><summary>The same in {{ group.elsewhere|length }} other
part{{ "" if group.elsewhere|length == 1 else "s" }}</summary>
<ul>{% for other in group.elsewhere %}{{ also(other, group) }}{% endfor %}</ul></details>
{% endif %}
<details><summary>{{ "What to try next, and the numbers" if rest else "The numbers" }}</summary>
{% if rest %}<p>{{ rest|prose }}</p>{% endif %}
<p>{% if one.observed is not none %}Observed {{ one.observed|short }}
{%- if one.threshold is not none %}, threshold {{ one.threshold|short }}{% endif %}
{%- if one.unit %} ({{ one.unit }}){% endif %}; {% endif %}
confidence {{ "%.0f"|format(100 * one.confidence) }} %; rule <code>{{ one.rule }}</code>.
{% if one.evidence.steps %}Rows in <code>{{ one.evidence.file }}</code> at steps
{{ one.evidence.steps|join(", ") }}.{% endif %}</p></details></div>
{% if number and not figure %}
<p class="quiet">No rows of this run can be drawn to show it.</p>
{% endif %}
</div>
{% if figure %}{{ drawing(figure) }}{% endif %}
</article>
{% endmacro %}
<header class="{{ verdict.state|replace(" ", "-") }}">
<p class="over">Training report <span>{{ title }}</span></p>
<h1>{{ verdict.headline }}</h1>
<p class="lead">{{ verdict.sentence|prose }}</p>
</header>
<main>
{% if first %}
<section aria-labelledby="todo"><h2 id="todo">What is wrong, and what to try</h2>
<div class="cards">{% for one in first %}{{ card(one, loop.index) }}{% endfor %}</div>
{% if command %}
<div class="apply"><p>Make an experiment with these changes:</p>
<pre><code>{{ command }}</code></pre></div>
{% endif %}
{% if more %}
<details class="more"><summary>{{ more|length }} more</summary>
<div class="cards">{% for one in more %}{{ card(one) }}{% endfor %}</div></details>
{% endif %}
</section>
{% endif %}
<nav aria-label="Contents">
{% for one in questions %}<a href="#questions">{{ one.title }}</a>{% endfor %}
<a href="#loss">Loss</a><a href="#table">Gradients</a>
{% for section in sections %}<a href="#section-{{ loop.index }}">{{ section.title }}</a>{% endfor %}
{% if noted %}<a href="#noted">Noted</a>{% endif %}
<a href="#cost">Cost of watching</a>
{% if notes or torn %}<a href="#notes">Notes</a>{% endif %}
<a href="#setup">Configuration</a></nav>
{% for section in questions %}
<section aria-labelledby="questions"><h2 id="questions">{{ section.title }}</h2>
<dl class="answers">{% for line in section.lines %}{% set question, answer = line|question %}
<div><dt>{{ question }}</dt><dd>{{ answer|prose }}</dd></div>{% endfor %}</dl>
{% for name in section.charts %}{{ drawing(figures[name]) }}{% endfor %}
</section>
{% endfor %}
<section aria-labelledby="loss"><h2 id="loss">Loss and learning rate</h2>
{{ drawing(figures["training"]) }}</section>
<section aria-labelledby="table"><h2 id="table">Gradients by component</h2>
{{ drawing(figures["gradient_flow"]) }}
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
<ul>{% for one in noted %}<li>{{ one|noted|prose }}
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
