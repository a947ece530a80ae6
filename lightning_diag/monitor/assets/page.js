(function () {
  "use strict";
  const get = (id) => document.getElementById(id);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();
  const shown = new Map();
  let theme = null;
  let state = null;
  let chosen = 0;
  let width = window.innerWidth;

  const STATES = {
    waiting: ["Waiting", "The run has not begun: its folder is not there yet."],
    running: ["Training", ""],
    silent: ["Silent", "Nothing was written for minutes: the run may be stuck, or its machine gone."],
    ended: ["Ended", ""],
    failed: ["Failed", "The run ended with an error."],
    interrupted: ["Interrupted", "The run was broken off."],
    killed: ["Killed", "The process that trained is gone, and left no word."],
    gone: ["Gone", "The folder of the run was deleted; what was read of it is lost."],
  };

  function element(name, options, ...children) {
    const made = document.createElement(name);
    const { text, ...rest } = options || {};
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(rest)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function short(value) {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
    return String(Number(value.toPrecision(4)));
  }

  function duration(seconds) {
    if (seconds === null || seconds === undefined) return "–";
    const whole = Math.round(seconds);
    const [h, m, s] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
    return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
  }

  // names stand between backticks in the sentences of findings
  function prose(sentence) {
    const parts = sentence.split("`");
    if (parts.length % 2 === 0) return [sentence];
    return parts.map((part, place) => (place % 2 ? element("code", { text: part }) : part));
  }

  function clipped(name) {
    return name.length > 120 ? name.slice(0, 119) + "…" : name;
  }

  async function ask(path) {
    const answer = await fetch(path);
    if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
    return answer.json();
  }

  function headline(run) {
    const [word, reason] = STATES[run.summary.state];
    const { critical, warning } = run.summary.counts;
    const found = critical
      ? `${critical} critical finding${critical > 1 ? "s" : ""}`
      : warning ? `${warning} warning${warning > 1 ? "s" : ""}` : "nothing wrong so far";
    const known = run.summary.step !== null;
    get("headline").textContent = known ? `${word}: ${found}` : word;
    const lines = [run.summary.reason, reason].filter(Boolean);
    if (run.summary.behind) lines.push("Older rows are still being read.");
    get("lead").textContent = clipped(lines.join(" "));
    const grave = critical ? "critical" : warning ? "warning" : known ? "healthy" : "waiting";
    get("head").className = run.summary.state === "gone" ? "gone" : grave;
    document.title = `${word}: ${clipped(run.summary.name)}`;
    get("title").textContent = clipped(run.summary.name);
    const percent = run.summary.progress === null ? null : Math.round(100 * run.summary.progress);
    const bar = get("bar");
    bar.hidden = percent === null;
    bar.firstElementChild.style.width = `${percent || 0}%`;
    if (percent === null) bar.removeAttribute("aria-valuenow");
    else bar.setAttribute("aria-valuenow", percent);
  }

  function numbers(run) {
    const one = run.summary;
    const step = one.planned_steps ? `${short(one.step)} of ${short(one.planned_steps)}` : short(one.step);
    const rows = [
      ["step", step], ["training loss", short(one.loss)],
      ["best validation loss", short(one.best_val_loss)], ["learning rate", short(one.learning_rate)],
      ["samples per second", short(one.samples_per_second)], ["time so far", duration(one.elapsed_seconds)],
      ["time left", duration(one.remaining_seconds)],
    ];
    get("numbers").replaceChildren(...rows.map(([name, value]) =>
      element("div", {}, element("dt", { text: name }), element("dd", { text: value }))));
  }

  function card(one) {
    const where = one.component === null ? "whole model" : clipped(one.component);
    const title = element("h3", { text: one.issue }, element("span", { class: "where", text: where }));
    const tags = element("p", { class: "tags" }, element("span", { class: "tag", text: one.severity }));
    if (one.first_step !== null) tags.append(element("span", { text: `since step ${one.first_step}` }));
    if (one.caused_by) tags.append(element("span", { text: `caused by: ${one.caused_by.replaceAll("_", " ")}` }));
    const attempt = element("p", {}, element("strong", { text: "Try: " }), ...prose(one.suggestion));
    return element("article", { class: `card ${one.severity}` }, title, tags,
      element("p", {}, ...prose(one.message)), attempt);
  }

  function findings(run) {
    const text = JSON.stringify(run.findings);
    if (shown.get("findings") === text) return;
    shown.set("findings", text);
    const grave = run.findings.filter((one) => one.severity !== "info");
    const noted = run.findings.filter((one) => one.severity === "info");
    const cards = grave.map(card);
    if (!grave.length) cards.push(element("p", { class: "quiet", text: "None above a note." }));
    if (noted.length) {
      const list = element("ul", {}, ...noted.map((one) => element("li", {}, ...prose(one.message))));
      const count = `${noted.length} noted, no alarm`;
      cards.push(element("details", {}, element("summary", { text: count }), list));
    }
    get("findings").replaceChildren(...cards);
  }

  function sweep() {
    get("sweep").hidden = state.runs.length < 2;
    if (state.runs.length < 2) return;
    const rows = state.runs.map((run, number) => {
      const one = run.summary;
      const name = clipped(one.name);
      const button = element("button", { class: "run", type: "button", text: name,
        "aria-pressed": String(number === chosen) });
      button.addEventListener("click", () => { chosen = number; shown.clear(); show(); });
      const progress = one.progress === null ? "–" : `${Math.round(100 * one.progress)} %`;
      const row = element("tr", {}, element("th", { scope: "row" }, button),
        element("td", { class: "name", text: STATES[one.state][0] }), element("td", { text: progress }),
        element("td", { text: short(one.loss) }), element("td", { text: short(one.best_val_loss) }),
        element("td", { text: short(one.counts.critical) }), element("td", { text: short(one.counts.warning) }));
      if (number === chosen) row.className = "chosen";
      return row;
    });
    const focused = document.activeElement && document.activeElement.closest("#runs tr");
    const place = focused ? [...get("runs").children].indexOf(focused) : -1;
    get("runs").replaceChildren(...rows);
    if (place >= 0 && rows[place]) rows[place].querySelector("button").focus();
  }

  function figure(id, home) {
    let made = get(id);
    if (!made) {
      made = element("figure", { id }, element("figcaption", {}, element("strong"), element("span")),
        element("div", { class: "chart", role: "img" }));
      home.append(made);
    }
    return made;
  }

  async function draw(made, spec) {
    const { title, config: _, $schema: __, ...drawn } = structuredClone(spec);
    const said = typeof title === "string" ? { text: title } : title || { text: "" };
    made.querySelector("strong").textContent = said.text;
    made.querySelector("span").textContent = [said.subtitle || []].flat().join(" ");
    const place = made.querySelector(".chart");
    place.setAttribute("aria-label", spec.description || said.text);
    const config = structuredClone(theme[dark.matches ? "dark" : "light"]);
    const wide = Math.max(180, place.clientWidth - 96);
    for (const panel of drawn.vconcat || [drawn]) panel.width = wide;
    config.legend.columns = Math.max(1, Math.floor(wide / 200));
    if (wide < 460) config.legend.layout = { bottom: { direction: "vertical" } };
    const frame = element("div");
    const options = { mode: "vega-lite", renderer: "svg", actions: false, config };
    const result = await vegaEmbed(frame, drawn, options);
    if (views.has(made.id)) views.get(made.id).finalize();
    views.set(made.id, result);
    place.replaceChildren(frame);
  }

  function drop(made) {
    if (views.has(made.id)) views.get(made.id).finalize();
    views.delete(made.id);
    shown.delete(made.id);
    made.remove();
  }

  async function one(id, home, path, version) {
    const key = `${version} ${dark.matches} ${window.innerWidth}`;
    if (shown.get(id) === key) return;
    const spec = await ask(path);
    if (spec === null) return;
    shown.set(id, key);
    await draw(figure(id, home), spec);
  }

  async function charts(run) {
    const home = get("charts");
    const names = Object.keys(run.charts);
    for (const made of [...home.children]) {
      if (!names.includes(made.id.slice("chart-".length))) drop(made);
    }
    for (const name of names) {
      const version = `${chosen} ${run.charts[name]}`;
      await one(`chart-${name}`, home, `/api/chart/${chosen}/${name}`, version);
    }
    get("no-charts").hidden = home.children.length > 0;
    if (state.runs.length > 1) await one("chart-of-all", get("together"), "/api/together", state.version);
  }

  let busy = null;
  function show() {
    const run = state.runs[chosen];
    if (!run) return Promise.resolve();
    headline(run);
    numbers(run);
    sweep();
    findings(run);
    busy = (busy || Promise.resolve()).then(() => charts(run)).catch((error) => console.error(error));
    return busy;
  }

  async function look() {
    let wait = 2000;
    try {
      theme = theme || await ask("/api/theme");
      state = await ask("/api/state");
      wait = 1000 * state.interval;
      await show();
      const now = new Date().toLocaleTimeString("en", { hour12: false });
      get("foot").textContent = `Last look at ${now}, every ${short(state.interval)} s.`;
    } catch (error) {
      get("foot").textContent = "The monitor does not answer; was it closed? Trying again.";
    }
    setTimeout(look, wait);
  }

  let timer = 0;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (state && window.innerWidth !== width) { width = window.innerWidth; show(); }
    }, 150);
  });
  dark.addEventListener("change", () => { if (state) show(); });
  look();
})();
