// Draws the page from GET /network, anew every few seconds. All text goes in as text, never as HTML.

const EVERY = 5000, PATIENCE = 10000, STALE = 15000, HISTORY = 60;
const SVG = "http://www.w3.org/2000/svg";
const lang = document.documentElement.lang;
const locale = lang === "zh" ? "zh-CN" : "en-GB";
const $ = (id) => document.getElementById(id);

let words = {};
let last = null; // the document that is shown
let lastAt = 0; // when it came, by this browser's clock
let before = new Map(); // states of nodes as they were announced
const opened = new Set(); // models whose sites are shown
const history = new Map(); // by region ("" for all), bytes a second of the last answers

// Words and figures

const t = (key, values = {}) =>
  (words[key]?.[lang] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");

const counts = new Intl.NumberFormat(locale);
const three = new Intl.NumberFormat(locale, { maximumSignificantDigits: 3 });
const percents = new Intl.NumberFormat(locale, { style: "percent", maximumFractionDigits: 1 });
const clock = new Intl.DateTimeFormat(locale, { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
const date = new Intl.DateTimeFormat(locale, { dateStyle: "medium", timeStyle: "medium", hour12: false });
const NONE = "–";

function bytes(size) {
  if (size === null || size === undefined) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let place = 0;
  while (Math.abs(size) >= 999.5 && place < units.length - 1) { size /= 1000; place += 1; }
  return `${three.format(size)}\u00a0${units[place]}`;
}
const rate = (value) => (value === null || value === undefined ? NONE : t("per_second", { size: bytes(value) }));
const number = (value) => (value === null || value === undefined ? NONE : counts.format(value));
const percent = (value) => (value === null || value === undefined ? NONE : percents.format(value));
const part = (a, whole) => (whole > 0 ? a / whole : null);

function duration(seconds) {
  const [value, unit] =
    seconds < 90 ? [seconds, "second"] : seconds < 5400 ? [seconds / 60, "minute"]
      : seconds < 129600 ? [seconds / 3600, "hour"] : [seconds / 86400, "day"];
  return new Intl.NumberFormat(locale, { style: "unit", unit, unitDisplay: "short", maximumFractionDigits: 0 }).format(value);
}
function when(seconds) { // from now; negative is past
  const size = Math.abs(seconds);
  const [value, unit] = size < 90 ? [seconds, "second"] : size < 5400 ? [seconds / 60, "minute"]
    : size < 129600 ? [seconds / 3600, "hour"] : [seconds / 86400, "day"];
  return new Intl.RelativeTimeFormat(locale, { numeric: "auto", style: "short" }).format(Math.round(value), unit);
}
const short = (digest) => String(digest ?? "").replace(/^sha256:/, "").slice(0, 10);
const roundState = (state) => (words[`round_${state}`] ? t(`round_${state}`) : state ?? "");
const modelName = (name) => (name === "other" ? t("other_models") : name === "(private)" ? t("private_models") : name);

// Elements

function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}
function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A state is a shape, a word and a colour, in that order of importance.
const SHAPES = {
  well: ["circle", { cx: 6, cy: 6, r: 4.5 }],
  draining: ["path", { d: "M6 1.2a4.8 4.8 0 1 1 0 9.600a4.800 4.800 0 1 1 0-9.600zM6 2.700a3.300 3.300 0 0 0 0 6.600z", "fill-rule": "evenodd" }],
  failing: ["path", { d: "M6 1 11.300 10.500H.7z" }],
  impaired: ["path", { d: "M6 1 11.300 10.500H.7z" }],
  ejected: ["path", { d: "M2 2l8 8M10 2l-8 8", class: "line" }],
  lost: ["path", { d: "M2 2l8 8M10 2l-8 8", class: "line" }],
  away: ["circle", { cx: 6, cy: 6, r: 4, class: "line" }],
};
function stateMark(state, more = "") {
  const [shape, attributes] = SHAPES[state] ?? SHAPES.away;
  return el("span", { class: `state ${state}` },
    svg("svg", { viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true" }, svg(shape, attributes)),
    el("span", {}, t(state)), more ? el("small", {}, more) : null);
}

function sparkline(values) {
  if (values.length < 2) return null;
  const width = 72, height = 18, top = Math.max(...values, 1);
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "spark", "aria-hidden": "true" });
  const x = (index) => (width - (values.length - 1 - index) * (width / (HISTORY - 1))).toFixed(1);
  const y = (value) => (height - 1 - (value / top) * (height - 3)).toFixed(1);
  drawn.append(svg("path", { class: "base", d: `M0 ${height - 0.5}H${width}` }),
    svg("polyline", { points: values.map((value, index) => `${x(index)},${y(value)}`).join(" ") }));
  return drawn;
}

// A region's ring laid flat: each node's part is where the parts before it end.
function ringBar(parts, only = null) {
  const drawn = svg("svg", { class: "ring", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
  drawn.append(svg("rect", { x: 0, y: 0, width: 100, height: 8, class: "track" }));
  let x = 0;
  parts.forEach((one, index) => {
    const width = one.share * 100;
    if (only === null || one.id === only)
      drawn.append(svg("rect", { x, y: 0, width: Math.max(width - 0.6, 0.4), height: 8, class: `c${index % 4} ${one.state}` }));
    x += width;
  });
  return drawn;
}

function meter(used, budget) {
  const drawn = svg("svg", { class: "meter", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" });
  drawn.append(svg("rect", { width: 100, height: 4, class: "track" }),
    svg("rect", { width: budget ? Math.min(100, (used / budget) * 100) : 0, height: 4, class: "fill" }));
  return drawn;
}

// Tables keep their roles when a phone shows their rows as cards.
function table(label, columns, bodies) {
  const head = el("tr", { role: "row" }, columns.map(([key, kind]) =>
    el("th", { role: "columnheader", scope: "col", class: kind }, t(key))));
  return el("table", { role: "table", "aria-label": label }, el("thead", { role: "rowgroup" }, head), bodies);
}
const cell = (column, kind, ...children) =>
  el("td", { role: "cell", class: kind, "data-label": t(column) }, ...children);

// The parts of the page

function drawTotal(now) {
  const { total } = now, today = total.today;
  const figure = (key, value, sub, extra = null, kind = "") =>
    el("div", { class: kind }, el("dt", {}, t(key)), el("dd", {}, el("b", {}, value), el("span", {}, sub), extra));
  $("total").replaceChildren(
    figure("nodes_up", t("of", { part: number(total.up), whole: number(total.nodes) }),
      total.state === "empty" ? "" : stateMark(total.state)),
    figure("served_today", bytes(today?.served), today ? t("n_requests", { n: number(today.requests) }) : ""),
    figure("link", bytes(today?.link), today?.served ? t("of_served", { share: percent(part(today.link, today.served)) }) : ""),
    figure("spared", bytes(today?.spared),
      today?.served && today.spared > 0 ? t("not_crossed", { share: percent(part(today.spared, today.served)) }) : "",
      today?.saved ? el("span", {}, t("by_deltas", { size: bytes(today.saved) })) : null, "first"),
    figure("hit_ratio", percent(today?.hit_ratio), today?.requests ? t("from_cache") : ""),
    figure("now", rate(total.rate), t("now_sub", { n: number(total.in_flight) }), sparkline(history.get("") ?? [])),
  );
}

function why(node) {
  if (node.state === "ejected" && node.health) return t("ejected_for", { time: duration(node.health.seconds_left) });
  if (node.state === "failing" && node.health) return t("failed_probes", { n: number(node.health.failures) });
  if (node.trouble && node.heard === null) return t("silent", { code: node.trouble });
  if (node.heard !== null && node.heard > 30) return t("old", { time: duration(node.heard) });
  return "";
}

// What a node alone has saved says little: what one fetched, its peers had from it. So that is told of regions.
function figures(one, region) {
  const today = one.today;
  const share = today && today.served > 0 && today.spared > 0 ? percent(part(today.spared, today.served)) : "";
  return [
    cell("in_flight", "n busy", number(one.in_flight)),
    cell("served", "n", bytes(today?.served)),
    cell("link", "n", bytes(today?.link)),
    region ? cell("spared_short", "n", bytes(today?.spared), share ? el("small", {}, share) : null)
      : el("td", { role: "cell", class: "n bare" }),
    cell("hit_ratio", "n", percent(today?.hit_ratio)),
  ];
}

function drawNodes(now) {
  const wanted = $("filter").value.trim().toLowerCase();
  const place = $("nodes");
  if (!now.nodes.length) {
    place.replaceChildren(el("div", { class: "none" }, el("p", {}, t("no_nodes")), el("p", {}, t("no_nodes_hint")),
      el("pre", { tabindex: 0 }, "nearshard enroll --data /var/cache/nearshard --router " + location.origin)));
    return;
  }
  const bodies = [];
  for (const region of now.regions) {
    const nodes = now.nodes.filter((node) => node.region === region.region);
    const shown = nodes.filter((node) =>
      !wanted || [node.id, node.region, node.url, node.state, t(node.state)].some((text) => text.toLowerCase().includes(wanted)));
    if (!shown.length && wanted) continue;
    const summary = el("tr", { role: "row", class: "region" },
      el("th", { role: "rowheader", scope: "rowgroup", class: "name" }, region.region,
        el("small", {}, t("nodes_of", { part: number(region.up), whole: number(region.nodes) }))),
      cell("state", "state-cell", stateMark(region.state)),
      cell("ring", "ring-cell", ringBar(nodes)),
      cell("disk", "disk-cell"),
      figures(region, true),
      cell("now", "n now", el("span", {}, rate(region.rate)), sparkline(history.get(region.region) ?? [])));
    const rows = shown.map((node) => el("tr", { role: "row", class: node.state },
      el("th", { role: "rowheader", scope: "row", class: "name", title: node.url }, node.id),
      cell("state", "state-cell", stateMark(node.state, why(node))),
      cell("ring", "ring-cell", ringBar(nodes, node.id), el("span", { class: "share" },
        node.state === "away" ? NONE : percent(node.share))),
      cell("disk", "disk-cell", node.disk ? bytes(node.disk.used) : NONE,
        node.disk ? el("small", {}, `/ ${bytes(node.disk.budget)}`) : null,
        node.disk ? meter(node.disk.used, node.disk.budget) : null),
      figures(node, false),
      cell("now", "n now", rate(node.rate))));
    bodies.push(el("tbody", { role: "rowgroup" }, summary, rows));
  }
  const columns = [["node", "name"], ["state", ""], ["ring", ""], ["disk", ""], ["in_flight", "n"], ["served", "n"],
    ["link", "n"], ["spared_short", "n"], ["hit_ratio", "n"], ["now", "n"]];
  place.replaceChildren(
    bodies.length ? table(t("regions_and_nodes"), columns, bodies) : el("p", { class: "none" }, t("no_match")),
    now.left_off ? el("p", { class: "none" }, t("left_off", { n: number(now.left_off) })) : "");
}

function trafficCells(one, largest = 0) {
  return [
    cell("served", "n", bytes(one.served)),
    cell("link", "n", bytes(one.link)),
    cell("spared", "n saved-cell", el("span", {}, bytes(one.spared)), largest ? meter(Math.max(0, one.spared), largest) : null),
    cell("hit_ratio", "n", percent(one.hit_ratio)),
    cell("requests", "n", number(one.requests)),
    cell("errors", one.errors ? "n bad" : "n", number(one.errors)),
  ];
}

function drawModels(now) {
  const models = now.models.filter((one) => one.requests || one.served || one.link);
  if (!models.length) { $("models").replaceChildren(el("p", { class: "none" }, t("no_traffic"))); return; }
  const largest = Math.max(...models.map((one) => one.spared), 1);
  const bodies = models.map((one, index) => {
    const open = opened.has(one.model), id = `sites-${index}`;
    const button = el("button", { type: "button", class: "more", "aria-expanded": String(open), "aria-controls": id,
      "data-key": `model:${one.model}`, "aria-label": t("show_sites", { model: modelName(one.model) }) },
      one.sites.length === 1 ? t("one_site") : t("sites", { n: number(one.sites.length) }));
    button.addEventListener("click", () => {
      if (!opened.delete(one.model)) opened.add(one.model);
      draw(last);
    });
    const name = el("th", { role: "rowheader", scope: "row", class: "name" }, el("span", {}, modelName(one.model)), button);
    const sites = open ? one.sites.map((site) => el("tr", { role: "row", class: "site" },
      el("th", { role: "rowheader", scope: "row", class: "name" }, site.region), trafficCells(site))) : [];
    return el("tbody", { role: "rowgroup", id }, el("tr", { role: "row" }, name, trafficCells(one, largest)), sites);
  });
  const columns = [["model", "name"], ["served", "n"], ["link", "n"], ["spared", "n"], ["hit_ratio", "n"],
    ["requests", "n"], ["errors", "n"]];
  $("models").replaceChildren(table(t("models_today"), columns, bodies));
}

function drawRollouts(now) {
  if (!now.rollouts.length) { $("rollouts").replaceChildren(el("p", { class: "none" }, t("no_rollouts"))); return; }
  $("rollouts").replaceChildren(...now.rollouts.map((one) => {
    const to = [one.percent ? t("to_percent", { n: number(one.percent) }) : "",
      one.sites?.length ? t("to_sites", { sites: one.sites.join(", ") }) : ""].filter(Boolean).join(" · ");
    const rows = one.results.map((seen) => {
      const candidate = seen.revision === one.revision;
      return el("tr", { role: "row" },
        el("th", { role: "rowheader", scope: "row", class: "name" }, seen.site,
          el("small", {}, `${t(candidate ? "candidate" : "current")} ${short(seen.revision)}`)),
        cell("requests", "n", number(seen.requests)),
        cell("errors", seen.errors ? "n bad" : "n", number(seen.errors),
          seen.errors ? el("small", {}, percent(part(seen.errors, seen.requests))) : null),
        cell("ready", "n", seen.ready_p50_ms === null ? NONE : `${number(Math.round(seen.ready_p50_ms))}\u00a0ms`));
    });
    const columns = [["site", "name"], ["requests", "n"], ["errors", "n"], ["ready", "n"]];
    return el("article", {},
      el("h3", {}, `${one.model}@${one.ref}`),
      el("p", {}, el("code", {}, short(one.means)), " → ", el("code", {}, short(one.revision)), to ? ` · ${to}` : ""),
      rows.length ? table(`${one.model}@${one.ref}`, columns, el("tbody", { role: "rowgroup" }, rows))
        : el("p", { class: "quiet" }, t("no_results")));
  }));
}

function drawFederated(now) {
  if (!now.federated.length) { $("federated").replaceChildren(el("p", { class: "none" }, t("no_federated"))); return; }
  $("federated").replaceChildren(...now.federated.map((one) => {
    const parts = [el("h3", {}, one.model)], open = one.open;
    if (open) {
      const ends = Date.parse(open.deadline ?? "");
      parts.push(el("p", {}, el("b", {}, t("round", { n: number(open.number) })), ` · ${roundState(open.state)}`,
        Number.isNaN(ends) ? "" : ` · ${t("deadline", { time: when(ends / 1000 - now.time) })}`));
      parts.push(meter(open.counted ?? 0, open.sites ?? 0));
      parts.push(el("p", { class: "quiet" }, t("counted",
        { part: number(open.counted), whole: number(open.sites), least: number(open.min_sites) })));
    }
    if (one.last.length)
      parts.push(el("ol", { class: "past" }, one.last.map((past) => el("li", {}, t("round", { n: number(past.number) }),
        el("span", {}, roundState(past.state)), el("span", {}, t("n_counted", { n: number(past.counted) })),
        past.revision ? el("code", {}, short(past.revision)) : null))));
    return el("article", {}, ...parts);
  }));
}

function drawErrors(now) {
  if (!now.errors.length) { $("errors").replaceChildren(el("p", { class: "none" }, t("no_errors"))); return; }
  $("errors").replaceChildren(el("ul", { class: "events" }, now.errors.map((one) => el("li", { class: one.level },
    el("time", { datetime: new Date(one.time * 1000).toISOString(), title: date.format(one.time * 1000) },
      when(Math.min(0, one.time - now.time))),
    el("span", { class: "from" }, one.from || t("router")),
    el("span", { class: "what" }, svgLevel(one.level), el("span", { lang: "en" }, one.event),
      [one.code, one.node, one.region].filter(Boolean).map((text) => el("code", {}, text)),
      one.count > 1 ? el("small", {}, t("times", { n: number(one.count) })) : null)))));
}
function svgLevel(level) {
  const [shape, attributes] = SHAPES[level === "error" ? "ejected" : "failing"];
  const drawn = svg("svg", { viewBox: "0 0 12 12", width: 12, height: 12, role: "img", "aria-label": level });
  drawn.append(svg(shape, attributes));
  return drawn;
}

function drawRouter(now) {
  $("host").textContent = location.host;
  const trust = now.trust ?? {};
  $("router").textContent = [t("about_router", { membership: now.membership, epoch: number(now.epoch) }),
    trust.expires_in > 0 ? t("metadata_expires", { time: duration(trust.expires_in) }) : ""].join(" ");
  const notices = [now.degraded ? t("degraded", { why: now.degraded }) : "",
    trust.stale ? t("metadata_stale", { why: trust.error ?? "" }) : ""].filter(Boolean);
  $("notice").hidden = !notices.length;
  if ($("notice").textContent !== notices.join(" ")) $("notice").textContent = notices.join(" ");
}

function announce(now) {
  const states = new Map(now.nodes.map((node) => [node.id, node.state]));
  for (const region of now.regions) states.set(region.region + "/", region.state);
  const changed = before.size ? [...states].filter(([name, state]) => before.has(name) && before.get(name) !== state) : [];
  if (changed.length)
    $("news").textContent = changed.slice(0, 8).map(([name, state]) =>
      t("became", { name: name.replace(/\/$/, ""), state: t(state) })).join(". ");
  before = states;
}

function draw(now) {
  const chosen = getSelection();
  if (chosen && !chosen.isCollapsed && $("main").contains(chosen.anchorNode)) return; // somebody copies from it
  const focused = document.activeElement?.dataset?.key;
  drawTotal(now); drawNodes(now); drawModels(now); drawRollouts(now); drawFederated(now); drawErrors(now); drawRouter(now);
  if (focused) [...document.querySelectorAll("[data-key]")].find((one) => one.dataset.key === focused)?.focus({ preventScroll: true });
}

function remember(now) {
  const add = (name, value) => history.set(name, [...(history.get(name) ?? []), value ?? 0].slice(-HISTORY));
  add("", now.total.rate);
  for (const region of now.regions) add(region.region, region.rate);
  const there = new Set(["", ...now.regions.map((region) => region.region)]);
  for (const name of history.keys()) if (!there.has(name)) history.delete(name);
}

// News

let timer = 0, asking = false;

async function ask() {
  clearTimeout(timer);
  if (asking) return;
  asking = true;
  try {
    const answer = await fetch("/network", { signal: AbortSignal.timeout(PATIENCE), cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    const now = await answer.json();
    last = now; lastAt = Date.now();
    remember(now); announce(now); draw(now);
    document.documentElement.dataset.ready = "1";
  } catch (error) {
    console.warn("nearshard:", error);
  } finally {
    asking = false;
    tell();
    if (!document.hidden) timer = setTimeout(ask, EVERY);
  }
}

function tell() {
  const old = lastAt ? Date.now() - lastAt : Infinity;
  const state = old >= STALE ? "stale" : "live";
  if (!lastAt && !document.documentElement.dataset.tried) { document.documentElement.dataset.tried = "1"; return; }
  $("live").dataset.state = state;
  $("live-text").textContent = state === "live" ? `${t("live")} · ${when(-Math.round(old / 1000 + (last.age ?? 0)))}` : t("not_live");
  $("stale").hidden = state === "live";
  const said = !lastAt ? t("never") : t("stale", { time: duration(old / 1000), when: clock.format(lastAt) });
  if (state !== "live" && $("stale").textContent !== said) $("stale").textContent = said;
}

async function start() {
  words = await (await fetch("/dashboard/words.json")).json();
  const theme = $("theme");
  theme.value = document.documentElement.dataset.theme ?? "";
  theme.addEventListener("change", () => {
    if (theme.value) document.documentElement.dataset.theme = theme.value;
    else delete document.documentElement.dataset.theme;
    try { localStorage.setItem("nearshard-theme", theme.value); } catch { /* it holds for this page then */ }
  });
  $("filter").addEventListener("input", () => last && drawNodes(last));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      $("filter").focus();
    }
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : ask()));
  setInterval(tell, 1000);
  await ask();
}

start();
