(function () {
  "use strict";
  const get = (id) => document.getElementById(id);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map(); // of Vega, by the id of the figure
  const shown = new Map(); // what each figure shows: version, run, ground and width
  const near = new Set(); // figures in view, or nearly so
  const rows = []; // of the table of runs
  const beside = new Set(); // runs to compare with the chosen one
  const MOST = 4; // runs side by side
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

  const OVER = ["ended", "failed", "interrupted", "killed"];

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

  // what did not change is left alone: it may be selected, or being read aloud
  function write(place, text) {
    if (place.textContent !== text) place.textContent = text;
  }

  // children by key: those that stay are not touched
  function arrange(home, wanted) {
    const had = new Map([...home.children].map((child) => [child.dataset.key, child]));
    wanted.forEach(([key, make], place) => {
      let child = had.get(key);
      if (!child) { child = make(); child.dataset.key = key; }
      had.delete(key);
      if (home.children[place] !== child) home.insertBefore(child, home.children[place] || null);
    });
    for (const child of had.values()) child.remove();
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
      : warning ? `${warning} warning${warning > 1 ? "s" : ""}`
        : OVER.includes(run.summary.state) ? "nothing wrong found" : "nothing wrong so far";
    const known = run.summary.step !== null;
    write(get("headline"), known ? `${word}: ${found}` : word);
    const lines = [run.summary.reason, reason].filter(Boolean);
    if (run.summary.behind) lines.push("Older rows are still being read.");
    if (run.summary.torn) lines.push(`Lines that could not be read: ${short(run.summary.torn)}.`);
    write(get("lead"), clipped(lines.join(" ")));
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
    const left = run.summary.remaining_seconds;
    const said = percent === null ? "" : left === null ? `${percent} % done`
      : `${percent} % done, about ${duration(left)} left`;
    bar.setAttribute("aria-valuetext", said);
    get("done").hidden = !said;
    write(get("done"), said);
  }

  function numbers(run) {
    const one = run.summary;
    const step = one.planned_steps ? `${short(one.step)} of ${short(one.planned_steps)}` : short(one.step);
    const pairs = [
      ["step", step], ["training loss", short(one.loss)],
      ["best validation loss", short(one.best_val_loss)], ["learning rate", short(one.learning_rate)],
      ["samples per second", short(one.samples_per_second)], ["time so far", duration(one.elapsed_seconds)],
    ];
    arrange(get("numbers"), pairs.map(([name]) =>
      [name, () => element("div", {}, element("dt", { text: name }), element("dd"))]));
    pairs.forEach(([, value], place) => write(get("numbers").children[place].lastElementChild, value));
  }

  function card(one) {
    const where = one.component === null ? "whole model" : clipped(one.component);
    const title = element("h3", { text: one.issue }, element("span", { class: "where", text: where }));
    const tags = element("p", { class: "tags" }, element("span", { class: "tag", text: one.severity }));
    if (one.first_step !== null) tags.append(element("span", { text: `since step ${one.first_step}` }));
    if (one.caused_by) tags.append(element("span", { text: `caused by: ${one.caused_by.replaceAll("_", " ")}` }));
    const said = one.suggestion.replace(/^Try (.)/, (_, letter) => letter.toUpperCase());
    const attempt = element("p", {}, element("strong", { text: "Try: " }), ...prose(said));
    return element("article", { class: `card ${one.severity}` }, title, tags,
      element("p", {}, ...prose(one.message)), attempt);
  }

  // of the chosen run, and below them those of the runs beside it
  function findings() {
    const runs = columns().map((number) => state.runs[number]).filter((run) => run && run.charts);
    const wanted = runs.flatMap((run) => {
      const name = runs.length > 1 ? `run ${clipped(run.summary.name)}` : "";
      const title = [[`${name} title`, () => element("p", { class: "of", text: name })]];
      return [...(name ? title : []), ...found(run, name)];
    });
    arrange(get("findings"), wanted);
  }

  function found(run, name) {
    const grave = run.findings.filter((one) => one.severity !== "info");
    const noted = run.findings.filter((one) => one.severity === "info");
    const wanted = grave.map((one) => [name + JSON.stringify(one), () => card(one)]);
    if (!grave.length) {
      const text = noted.length ? "Nothing to be alarmed at." : "None.";
      wanted.push([name + text, () => element("p", { class: "quiet", text })]);
    }
    if (noted.length) {
      const before = [...get("findings").querySelectorAll("details")].find((one) => one.dataset.of === name);
      const open = before && before.open ? { open: "" } : {};
      const list = () => element("ul", {}, ...noted.map((one) => element("li", {}, ...prose(one.message))));
      const count = `${noted.length} noted, no alarm`;
      wanted.push([name + JSON.stringify(noted),
        () => element("details", { ...open, "data-of": name }, element("summary", { text: count }), list())]);
    }
    return wanted;
  }

  function tableRow(number) {
    const button = element("button", { class: "run", type: "button" });
    button.addEventListener("click", () => { chosen = number; again(); });
    const box = element("input", { type: "checkbox" });
    box.addEventListener("change", () => {
      if (box.checked) beside.add(number); else beside.delete(number);
      again();
    });
    const cells = ["name", "", "", "", "", ""].map((kind) => element("td", kind ? { class: kind } : {}));
    return element("tr", {}, element("th", { scope: "row" }, button),
      element("td", { class: "name" }, box), ...cells);
  }

  function sweep() {
    get("sweep").hidden = state.runs.length < 2;
    if (state.runs.length < 2) return;
    while (rows.length < state.runs.length) {
      rows.push(tableRow(rows.length));
      get("runs").append(rows[rows.length - 1]);
    }
    const full = columns().length >= MOST;
    state.runs.forEach(({ summary: one }, number) => {
      const [head, box, ...cells] = rows[number].children;
      const name = clipped(one.name);
      const button = head.firstElementChild;
      write(button, name);
      button.setAttribute("aria-pressed", String(number === chosen));
      const tick = box.firstElementChild;
      tick.setAttribute("aria-label", `compare ${name}`);
      tick.checked = number === chosen || beside.has(number);
      tick.disabled = number === chosen || (full && !beside.has(number));
      rows[number].className = number === chosen ? "chosen" : "";
      const unread = one.behind && one.step === null;
      const told = [unread ? "Reading" : STATES[one.state][0],
        one.progress === null ? "–" : `${Math.round(100 * one.progress)} %`, short(one.loss),
        short(one.best_val_loss), short(one.counts.critical), short(one.counts.warning)];
      told.forEach((text, place) => write(cells[place], text));
      cells[4].className = one.counts.critical ? "odd" : "";
    });
  }

  // the chosen run, and those to compare it with
  function columns() {
    return [chosen, ...[...beside].filter((n) => n !== chosen).sort((a, b) => a - b)].slice(0, MOST);
  }

  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) near.add(entry.target.id); else near.delete(entry.target.id);
    }
    if (state) charts();
  }, { rootMargin: "300px" });

  // where charts stand in columns, each begins right below the one above it
  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      target.style.gridRowEnd = `span ${Math.ceil((target.offsetHeight + 16) / 8)}`;
    }
  });

  function figure(id, key) {
    const made = element("figure", { id }, element("figcaption", {}, element("small"), element("strong"), element("span")),
      element("div", { class: "chart", role: "img", "aria-label": `${key}, not drawn yet` }));
    observer.observe(made);
    sizes.observe(made);
    return made;
  }

  async function draw(made, spec) {
    const { title, config: _, $schema: __, ...drawn } = structuredClone(spec);
    const said = typeof title === "string" ? { text: title } : title || { text: "" };
    made.querySelector("strong").textContent = said.text;
    made.querySelector("span").textContent = [said.subtitle || []].flat().join(" ");
    const place = made.querySelector(".chart");
    const of = made.querySelector("small").textContent;
    const words = (spec.description || said.text).slice(0, 2000);
    place.setAttribute("aria-label", of ? `${of}: ${words}` : words);
    const config = structuredClone(theme[dark.matches ? "dark" : "light"]);
    const wide = Math.max(180, place.clientWidth - 96);
    size(drawn, wide);
    config.legend.columns = Math.max(1, Math.floor(wide / 210));
    config.legend.labelLimit = wide / config.legend.columns - 30;
    config.axis.labelSeparation = 8;
    if (wide < 460) config.legend.layout = { bottom: { direction: "vertical" } };
    const frame = element("div");
    const options = { mode: "vega-lite", renderer: "svg", actions: false, config };
    const result = await vegaEmbed(frame, drawn, options);
    if (views.has(made.id)) views.get(made.id).finalize();
    views.set(made.id, result);
    place.replaceChildren(frame);
  }

  // charts are drawn for the report: here they are as wide as there is room
  function size(drawn, wide) {
    if (!drawn.concat) {
      for (const panel of drawn.vconcat || [drawn]) panel.width = wide;
      return;
    }
    drawn.columns = wide < 520 ? 1 : Math.min(drawn.columns || 1, drawn.concat.length);
    const each = (wide - 90 * (drawn.columns - 1)) / drawn.columns;
    for (const panel of drawn.concat) {
      panel.width = each;
      if (panel.title && panel.title.limit) panel.title.limit = each;
    }
  }

  function drop(made) {
    if (views.has(made.id)) views.get(made.id).finalize();
    views.delete(made.id);
    shown.delete(made.id);
    near.delete(made.id);
    observer.unobserve(made);
    sizes.unobserve(made);
    made.remove();
  }

  async function one(id, path, version) {
    const key = `${path} ${version} ${dark.matches} ${window.innerWidth}`;
    if (!near.has(id) || shown.get(id) === key) return;
    const spec = await ask(path);
    const made = get(id);
    if (spec === null || !made) return;
    shown.set(id, key);
    await draw(made, spec);
  }

  // a row of figures for each chart, a column for each run
  function plan() {
    const shownRuns = columns().filter((number) => state.runs[number] && state.runs[number].charts);
    const known = new Map();
    for (const number of shownRuns) {
      for (const name of Object.keys(state.runs[number].charts)) known.set(name, true);
    }
    const order = state.order.filter((name) => known.has(name));
    const all = state.runs.length > 1 && state.version > state.runs.length
      ? [{ id: "chart-of-all", key: "losses of all runs", home: "together", version: state.version,
        path: `/api/together${beside.size ? `?runs=${columns()}` : ""}` }] : [];
    return [...all, ...order.flatMap((name) => shownRuns.map((number, place) => ({
      id: place ? `chart-${name}-${place}` : `chart-${name}`, key: name.replaceAll("_", " "),
      home: "charts", path: `/api/chart/${number}/${name}`, version: state.runs[number].charts[name] || 0,
      of: shownRuns.length > 1 ? `run ${clipped(state.runs[number].summary.name)}` : "",
    })))];
  }

  function place(planned) {
    for (const home of ["together", "charts"]) {
      const own = planned.filter((one) => one.home === home);
      const wanted = new Set(own.map((one) => one.id));
      for (const made of [...get(home).children]) if (!wanted.has(made.id)) drop(made);
      arrange(get(home), own.map((one) => [one.id, () => figure(one.id, one.key)]));
      for (const one of own) write(get(one.id).querySelector("small"), one.of || "");
    }
    get("charts").className = columns().length > 1 ? "beside" : "";
    get("charts").style.setProperty("--beside", columns().length);
    get("no-charts").hidden = get("charts").children.length > 0;
  }

  let busy = Promise.resolve();
  let waiting = false;
  function charts() {
    // drawn one after another, and from what is known when their turn comes
    if (waiting) return busy;
    waiting = true;
    busy = busy.then(async () => {
      waiting = false;
      const planned = plan();
      place(planned);
      for (const { id, path, version } of planned) await one(id, path, version);
    }).catch((error) => console.error(error));
    return busy;
  }

  function show() {
    const run = state.runs[chosen];
    if (!run || !run.charts) return;
    headline(run);
    numbers(run);
    sweep();
    findings();
    charts();
  }

  let clock = 0;
  let asked = 0;
  async function look() {
    const number = ++asked;
    let wait = 2000;
    try {
      theme = theme || await ask("/api/theme");
      const found = await ask(`/api/state?runs=${columns()}`);
      if (number !== asked) return;
      state = found;
      wait = state.behind ? 100 : 1000 * state.interval;
      show();
      const now = new Date().toLocaleTimeString("en", { hour12: false });
      write(get("foot"), `Last look at ${now}, every ${short(state.interval)} s.`);
    } catch (error) {
      if (number !== asked) return;
      write(get("foot"), "The monitor does not answer; was it closed? Trying again.");
    }
    clock = setTimeout(look, wait);
  }

  function again() {
    clearTimeout(clock);
    if (state) sweep();
    look();
  }

  let timer = 0;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (state && window.innerWidth !== width) { width = window.innerWidth; charts(); }
    }, 150);
  });
  dark.addEventListener("change", () => { if (state) charts(); });
  look();
})();
