// The dashboard: follows the agent's events, lists the migrations and shows the selected one.
"use strict";

const $ = (id) => document.getElementById(id);
const SAMPLES = 1200; // that the page keeps of the selected migration

const records = new Map();
let order = []; // ids as the agent lists them, oldest first
let agent = null;
let view = null; // of the selected migration
let selected = "";
let series = null;
let mapBusy = false;
const changed = new Set();
let drawing = 0;

// ---------------------------------------------------------------- events

function listen() {
  const events = new EventSource("v1/events");
  events.addEventListener("agent", (event) => {
    agent = JSON.parse(event.data);
    order = agent.migrations;
    const known = new Set(order);
    for (const id of records.keys()) if (!known.has(id)) records.delete(id);
    drawSoon();
  });
  events.addEventListener("record", (event) => {
    const record = JSON.parse(event.data), before = records.get(record.id);
    records.set(record.id, record);
    changed.add(record.id);
    if (before && before.state !== record.state) setText($("announce"), `${record.guest}: ${record.state}`);
    if (record.id === selected) follow(record, before);
    drawSoon();
  });
  events.onopen = () => { $("lost").hidden = true; };
  events.onerror = () => {
    setText($("lost"), "The connection to the agent is lost; what you see is old. Trying again.");
    $("lost").hidden = false;
    $("health").dataset.tone = "warn";
    setText($("health"), "unknown");
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 3000); // refused: the browser does not try again
  };
}

function drawSoon() {
  if (!drawing) drawing = requestAnimationFrame(() => { drawing = 0; draw(); });
}

async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

// ---------------------------------------------------------------- lists

const LISTS = {
  active: {
    wanted: (record) => !ENDED.has(record.state),
    cells: (record) => [percent(done(record)), left(record) === null ? "–" : span(left(record))],
  },
  ended: {
    wanted: (record) => ENDED.has(record.state),
    cells: (record) => [record.ended_at ? clock(record.ended_at) : "–", span(record.downtime_seconds)],
  },
};
const rows = { active: new Map(), ended: new Map() };

function makeRow(id) {
  const link = el("a", { href: `#/${id}` }), state = badge(""), first = el("td", { class: "number" }), second = el("td", { class: "number" });
  const node = el("tr", { "data-id": id }, el("th", { scope: "row" }, link, " ", state), first, second);
  node.addEventListener("click", () => { location.hash = `#/${id}`; });
  return { node, link, state, first, second };
}

function drawList(name, shown) {
  const list = LISTS[name], mine = rows[name], body = $(name).tBodies[0];
  const wanted = shown.filter((record) => list.wanted(record)).reverse();
  const ids = new Set(wanted.map((record) => record.id));
  for (const [id, row] of mine) if (!ids.has(id)) { row.node.remove(); mine.delete(id); }
  let place = body.firstElementChild;
  for (const record of wanted) {
    let row = mine.get(record.id);
    const fresh = !row;
    if (fresh) mine.set(record.id, row = makeRow(record.id));
    if (fresh || changed.has(record.id)) {
      setText(row.link, record.guest);
      setBadge(row.state, record.state);
      const [first, second] = list.cells(record);
      setText(row.first, first);
      setText(row.second, second);
    }
    const here = record.id === selected;
    if (here !== row.here) {
      row.here = here;
      row.node.classList.toggle("selected", here);
      if (here) row.link.setAttribute("aria-current", "true"); else row.link.removeAttribute("aria-current");
    }
    if (row.node === place) place = place.nextElementSibling; else body.insertBefore(row.node, place);
  }
  $(name).hidden = !wanted.length;
  const none = $(`${name}-none`);
  none.hidden = wanted.length > 0;
  return wanted.length;
}

function drawHeader() {
  document.title = `${agent.name} · migrated ${agent.role}`;
  setText($("who"), `${agent.role} on ${agent.name}, version ${agent.version}`);
  const [word, tone] = !agent.healthy ? ["✕ unhealthy", "bad"] : agent.ready ? ["✓ ready", "good"] : ["■ not ready", "warn"];
  setText($("health"), agent.reasons.length ? `${word}: ${agent.reasons.join("; ")}` : word);
  $("health").dataset.tone = tone;
}

function draw() {
  if (!agent) return;
  drawHeader();
  const words = $("filter").value.trim().toLowerCase();
  const all = order.map((id) => records.get(id)).filter(Boolean);
  const shown = all.filter((record) => !words || [record.guest, record.state, record.peer, record.id].some((text) => text.toLowerCase().includes(words)));
  drawList("active", shown);
  drawList("ended", shown);
  const guests = agent.guests.length ? `Guests here: ${agent.guests.join(", ")}.` : "There are no guests in the configuration.";
  setText($("active-none"), words ? "None matches the filter." : `No migration is running. ${agent.role === "source" ? guests : ""}`.trim());
  setText($("ended-none"), words ? "None matches the filter." : "No migration has ended yet.");
  changed.clear();
  if (!selected && all.length) select(preferred(all));
  drawDetail();
}

// ---------------------------------------------------------------- the selected migration

// The running one that began last, else the one that ended last.
function preferred(all) {
  const active = all.filter((record) => !ENDED.has(record.state));
  return (active.length ? active : all).at(-1).id;
}

function drawDetail() {
  const record = records.get(selected);
  if (!record) {
    view = null;
    const text = selected ? "This agent knows no such migration." : "Migrations appear here when they begin.";
    const page = el("p", { class: "soft empty" }, text);
    if ($("detail").textContent !== text) $("detail").replaceChildren(page);
    return;
  }
  if (!view) {
    view = new MigrationView();
    const back = el("a", { class: "back", href: "#" }, "← All migrations");
    $("detail").replaceChildren(back, view.node);
    view.update(record);
    loadSeries(record.id);
    loadMap(record.id);
  }
  view.update(record);
}

function select(id) {
  if (id === selected) return;
  selected = id;
  view = null;
  series = null;
}

async function loadSeries(id) {
  try {
    const found = await get(`v1/migrations/${id}/series`);
    if (id !== selected || !view) return;
    series = found;
    view.setSeries(series);
  } catch (error) {
    console.warn(error.message); // the next event tries again
  }
}

async function loadMap(id) {
  if (mapBusy) return;
  mapBusy = true;
  try {
    const { map } = await get(`v1/migrations/${id}/map`);
    if (id === selected && view) view.setMap(map);
  } catch (error) {
    console.warn(error.message);
  } finally {
    mapBusy = false;
  }
  if (id !== selected && selected) loadMap(selected);
}

function follow(record, before) {
  if (!view) return;
  if (ENDED.has(record.state)) {
    if (before && ENDED.has(before.state)) return;
    // The last figures, and the last page map, which the agent makes as it lets go of the guest.
    for (const pause of [0, 1000, 3000]) {
      setTimeout(() => { if (record.id === selected) { loadSeries(record.id); loadMap(record.id); } }, pause);
    }
    return;
  }
  loadMap(record.id);
  if (!series) { loadSeries(record.id); return; }
  const sample = {
    at: Date.now() / 1000, transferred_bytes: record.transferred_bytes, remaining_bytes: record.remaining_bytes,
    throughput_bytes_per_second: record.throughput_bytes_per_second, dirty_bytes_per_second: record.dirty_bytes_per_second,
    faults: FAULT_KINDS.reduce((sum, kind) => sum + record.faults[kind], 0),
  };
  // The clocks of the agent and of this computer may differ: times never run backwards.
  sample.at = Math.max(sample.at, (series.at.at(-1) || 0) + 0.001);
  for (const [name, value] of Object.entries(sample)) series[name].push(value);
  if (series.at.length > SAMPLES) { loadSeries(record.id); return; } // the agent has thinned its own
  view.record = record;
  view.setSeries(series);
}

// ---------------------------------------------------------------- address, theme, filter

function route() {
  const id = location.hash.startsWith("#/") ? decodeURIComponent(location.hash.slice(2)) : "";
  document.body.classList.toggle("chosen", Boolean(id));
  if (id) select(id);
  drawSoon();
}

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  setText($("theme"), `Theme: ${theme}`);
  if (view) view.restyle();
}

$("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  localStorage.setItem("theme", next);
  setTheme(next);
});
$("filter").addEventListener("input", drawSoon);
window.addEventListener("hashchange", route);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (view) view.restyle(); });
setTheme(THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto");
route();
listen();
