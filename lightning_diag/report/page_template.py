"""Style and script of report.html."""

__all__ = ["SCRIPT", "STYLE"]

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
header, main, footer { max-width: 1160px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 18px; padding-bottom: 0; }
header + main > section:first-child { margin-top: 14px; }
#todo { margin-bottom: 6px; font-size: 17px; }
.over { margin: 0; color: var(--quiet); font-size: 14px; }
.over span::before { content: "· "; }
.over span { overflow-wrap: anywhere; }
h1 { margin: 2px 0 4px; font-size: 27px; overflow-wrap: anywhere; line-height: 1.2;
  letter-spacing: -0.01em; }
h1::before { content: ""; display: inline-block; width: 0.55em; height: 0.55em; margin-right: 0.4em;
  border-radius: 50%; background: var(--warning); vertical-align: 0.08em; }
.healthy h1::before { background: var(--healthy); }
.critical h1::before { background: var(--critical); }
.nothing-measured h1::before, .too-little h1::before { background: var(--quiet); }
.lead { margin: 0; font-size: 15px; color: var(--quiet); max-width: 110ch; }
section { margin: 36px 0; }
h2 { margin: 0 0 12px; font-size: 20px; }
h3 { margin: 0; font-size: 17px; line-height: 1.35; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 78ch; }
.quiet, .quiet code { color: var(--quiet); }
.finding { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 6px 28px;
  align-items: start; padding: 11px 20px; font-size: 15px; line-height: 1.45; }
.finding.alone { grid-template-columns: minmax(0, 1fr); }
.finding figure { margin: 0; padding: 0; border: 0; background: none; }
.finding figcaption > * { display: inline; margin-right: 6px; }
.finding figcaption strong { font-size: 14px; }
.finding figcaption span { font-size: 13px; }
.finding .chart { margin-top: 2px; }
.finding p { margin: 5px 0; }
.finding h3 { margin-bottom: 2px; }
.finding .tags { margin: 0 0 4px; }
.extras { display: flex; flex-wrap: wrap; gap: 0 20px; }
.extras details { margin-top: 4px; }
.extras details[open], .extras .wide { flex-basis: 100%; }
.finding pre { margin: 5px 0; padding: 4px 12px; }
.try { font-weight: 600; }
.apply { margin: 14px 0 0; padding: 12px 20px; background: var(--card); border: 1px solid
  var(--line); border-radius: 10px; }
.apply p { margin: 0 0 6px; max-width: none; }
.apply pre { margin: 0; white-space: pre-wrap; }
.apply pre code { overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 28px 0 0; padding: 12px 0;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); font-size: 14px; }
nav a { color: var(--info); }
.answers dt { color: var(--ink); font-weight: 600; }
dl.answers { display: block; padding: 8px 20px; font-size: 15px; }
.answers dd { max-width: 84ch; }
.cards { display: grid; grid-template-columns: minmax(0, 1fr); gap: 10px; }
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
@media (max-width: 860px) { .finding { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 560px) {
  header, main, footer { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 24px; }
  .lead { font-size: 15px; }
  .finding { padding: 12px 14px; }
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
    // one after the other, so that those on the first screen are there first
    let last = Promise.resolve();
    for (const place of document.querySelectorAll("[data-chart]")) {
      last = last.then(() => draw(place)).catch((error) => console.error(error));
    }
    return last;
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
