// What every script of the page uses: elements, and numbers as people read them.
"use strict";

const ENDED = new Set(["completed", "aborted", "failed"]);
// A sign beside each state, so that colour is never the only difference.
const TONES = {
  completed: ["good", "✓"], failed: ["bad", "✕"], aborted: ["warn", "■"],
  "postcopy-paused": ["warn", "‖"], recovering: ["warn", "↻"],
};

// Everything the agent says goes into the page as text, never as markup.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function scaled(value, base, units) {
  let index = 0;
  while (Math.round(value) >= base && index < units.length - 1) { value /= base; index += 1; }
  const digits = index && value < 100 ? value.toPrecision(3) : String(Math.round(value));
  return `${digits} ${units[index]}`;
}
const size = (bytes) => scaled(bytes, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
const rate = (bytes) => scaled(bytes, 1000, ["B/s", "KB/s", "MB/s", "GB/s"]);
function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return share >= 0.9995 ? "100 %" : `${(100 * share).toFixed(1)} %`;
}

function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds === 0) return "0 s";
  if (seconds < 1e-3) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${(seconds * 1e3).toPrecision(3)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s`;
  return `${Math.floor(seconds / 3600)} h ${String(Math.floor(seconds % 3600 / 60)).padStart(2, "0")} min`;
}

// A step of the downtime: to a tenth of a millisecond, however long the others are.
const tenths = (seconds) => `${(seconds * 1e3).toFixed(1)} ms`;

function clock(unixSeconds) {
  const date = new Date(unixSeconds * 1000);
  const two = (number) => String(number).padStart(2, "0");
  const time = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
  const today = new Date().toDateString() === date.toDateString();
  return today ? time : `${date.getFullYear()}\u2011${two(date.getMonth() + 1)}\u2011${two(date.getDate())} ${time}`;
}

// The share of the memory that is up to date on the target.
function done(record) {
  if (record.state === "completed") return 1;
  if (!record.total_bytes) return 0;
  return 1 - Math.min(record.remaining_bytes, record.total_bytes) / record.total_bytes;
}

// Seconds left at the present pace, less what the guest changes meanwhile; null if there is no end.
function left(record) {
  let pace = record.throughput_bytes_per_second;
  if (record.state === "precopy") pace -= record.dirty_bytes_per_second;
  return pace > 0 ? record.remaining_bytes / pace : null;
}

function badge(state) {
  const node = el("span", { class: "badge" });
  setBadge(node, state);
  return node;
}

function setBadge(node, state) {
  const [tone, sign] = TONES[state] || ["plain", "▶"];
  node.dataset.tone = tone;
  setText(node, `${sign} ${state}`);
}

// A colour of the style sheet as the canvas needs it: resolved for the present theme.
function colour(name) {
  const probe = el("span", { hidden: "" });
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
