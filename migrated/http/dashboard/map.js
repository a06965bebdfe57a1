// The page map: a canvas for the eye, a table of the same numbers, and a line about the cell under the pointer or the
// keyboard's cursor.
"use strict";

// In the order in which they are stacked in a cell, the most finished at the bottom.  Those with a pattern are hatched.
const PAGE_STATES = [
  ["mapped", "in use by the guest", ""],
  ["current", "as on the source", ""],
  ["sent", "as it was at the last scan", ""],
  ["received", "received, may have changed since", ""],
  ["stale", "changed, not here yet", "stripes"],
  ["dirty", "to be sent", "stripes"],
  ["requested", "a guest thread waits for it", "cross"],
  ["poisoned", "lost", "dots"],
  ["absent", "empty, or nothing of it has arrived", ""],
];

function hatched(context, fill, kind, ink) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const pen = tile.getContext("2d");
  pen.fillStyle = fill;
  pen.fillRect(0, 0, 6, 6);
  pen.strokeStyle = pen.fillStyle = ink;
  pen.lineWidth = 1.2;
  pen.beginPath();
  if (kind === "dots") pen.fillRect(2, 2, 2, 2);
  if (kind !== "dots") { pen.moveTo(-1, 7); pen.lineTo(7, -1); }
  if (kind === "cross") { pen.moveTo(-1, -1); pen.lineTo(7, 7); }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

class PageMap {
  constructor() {
    this.canvas = el("canvas", {
      role: "img", tabindex: "0", "aria-label": "Page map", "aria-describedby": "map-numbers", class: "map",
    });
    this.spoken = el("p", { class: "soft cell", role: "status" });
    this.rows = el("tbody", {});
    const head = el("tr", {}, el("th", { scope: "col" }, "Page state"), el("th", { scope: "col", class: "number" }, "Memory"),
      el("th", { scope: "col", class: "number" }, "Share"));
    this.table = el("table", { id: "map-numbers", class: "legend" },
      el("caption", { class: "unseen" }, "Memory by page state"), el("thead", {}, head), this.rows);
    this.empty = el("p", { class: "soft" }, "There is no page map of this migration.");
    this.node = el("div", {}, this.empty, this.canvas, this.spoken, this.table);
    this.cursor = null;
    this.set(null);
    new ResizeObserver(() => this.draw()).observe(this.node);
    this.canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  set(map) {
    this.map = map;
    this.empty.hidden = Boolean(map);
    for (const node of [this.canvas, this.spoken, this.table]) node.hidden = !map;
    if (!map) return;
    this.present = PAGE_STATES.filter(([state]) => map.bytes_by_state[state]);
    this.cells = Object.fromEntries(this.present.map(([state]) =>
      [state, Uint8Array.from(atob(map.cells[state]), (letter) => letter.charCodeAt(0))]));
    this.count = Math.max(0, ...Object.values(this.cells).map((cells) => cells.length));
    this.total = Object.values(map.bytes_by_state).reduce((sum, bytes) => sum + bytes, 0);
    const shares = this.present.map(([state]) => `${percent(map.bytes_by_state[state] / this.total)} ${state}`);
    this.canvas.setAttribute("aria-label", `Page map of ${size(this.total)}: ${shares.join(", ")}. Arrow keys move through the cells.`);
    this.rows.replaceChildren(...this.present.map(([state, meaning, pattern]) => el("tr", {},
      el("th", { scope: "row" }, el("span", { class: "swatch", "data-state": state, "data-pattern": pattern }), `${state} `,
        el("span", { class: "soft meaning" }, meaning)),
      el("td", { class: "number" }, size(map.bytes_by_state[state])),
      el("td", { class: "number" }, percent(map.bytes_by_state[state] / this.total)))));
    this.draw();
    this.point(this.cursor);
  }

  shape() {
    const width = this.node.clientWidth;
    const pitch = Math.max(4, Math.floor(width / Math.sqrt(this.count * (width > 600 ? 3.2 : 1.4))));
    const columns = Math.min(this.count, Math.floor(width / pitch));
    return { columns, pitch, rows: Math.ceil(this.count / columns) };
  }

  draw() {
    if (!this.map || !this.count || !this.node.clientWidth) return;
    const { columns, pitch, rows } = this.shape();
    const dots = window.devicePixelRatio || 1, gap = pitch > 5 ? 1 : 0;
    this.canvas.width = columns * pitch * dots;
    this.canvas.height = rows * pitch * dots;
    this.canvas.style.width = `${columns * pitch}px`;
    this.canvas.style.height = `${rows * pitch}px`;
    const context = this.canvas.getContext("2d");
    context.scale(dots, dots);
    const ink = colour("hatch");
    const fills = this.present.map(([state, , pattern]) =>
      [this.cells[state], pattern ? hatched(context, colour(`page-${state}`), pattern, ink) : colour(`page-${state}`)]);
    const side = pitch - gap;
    for (let cell = 0; cell < this.count; cell += 1) {
      const x = cell % columns * pitch, y = Math.floor(cell / columns) * pitch;
      let bottom = y + side, sum = 0;
      for (const [shares] of fills) sum += shares[cell];
      for (const [shares, fill] of fills) {
        if (!shares[cell]) continue;
        // What is there is seen, however little: a waiting guest thread is a single page.
        const height = Math.min(bottom - y, Math.max(1.5, side * shares[cell] / sum));
        context.fillStyle = fill;
        context.fillRect(x, bottom - height, side, height);
        bottom -= height;
      }
    }
    if (this.cursor !== null) {
      context.strokeStyle = colour("ink");
      context.lineWidth = 2;
      context.strokeRect(this.cursor % columns * pitch - 1, Math.floor(this.cursor / columns) * pitch - 1, pitch + 1, pitch + 1);
    }
  }

  cellAt(event) {
    const { columns, pitch } = this.shape(), box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / pitch), row = Math.floor((event.clientY - box.top) / pitch);
    const cell = row * columns + column;
    return column >= 0 && column < columns && cell >= 0 && cell < this.count ? cell : null;
  }

  key(event) {
    const { columns } = this.shape();
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    const ends = { Home: 0, End: this.count - 1 };
    if (event.key in ends) this.point(ends[event.key]);
    else if (event.key in steps) {
      const next = this.cursor === null ? 0 : this.cursor + steps[event.key];
      if (next >= 0 && next < this.count) this.point(next);
    } else return;
    event.preventDefault();
  }

  point(cell) {
    const moved = cell !== this.cursor;
    this.cursor = cell !== null && cell < this.count ? cell : null;
    if (this.cursor === null) {
      setText(this.spoken, `Each cell is ${size(this.map ? this.map.cell_bytes : 0)} of guest memory.`);
    } else {
      const sum = this.present.reduce((all, [state]) => all + this.cells[state][cell], 0);
      const parts = this.present.filter(([state]) => this.cells[state][cell])
        .map(([state]) => `${percent(this.cells[state][cell] / sum)} ${state}`);
      setText(this.spoken, `At ${size(cell * this.map.cell_bytes)}: ${parts.join(", ")}`);
    }
    if (moved) this.draw();
  }
}
