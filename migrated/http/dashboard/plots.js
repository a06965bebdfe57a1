// Plots over time (uPlot), the histogram of fault latencies, and the time line.
"use strict";

const FAULT_KINDS = ["current", "stale", "missing"];

// Steps of an axis in bytes.
const BINARY = Array.from({ length: 50 }, (_, power) => 2 ** power);

class TimePlot {
  // lines: [{label, field, colour, dash?, fill?}]; format: a value for people.
  constructor(title, lines, format) {
    this.lines = lines;
    this.format = format;
    this.box = el("div", { class: "plot" });
    this.caption = el("figcaption", {}, title);
    this.node = el("figure", { role: "group", "aria-label": title }, this.caption, this.legend(), this.box);
    this.title = title;
    this.data = null;
    new ResizeObserver(() => this.fit()).observe(this.box);
  }

  legend() {
    this.values = this.lines.map(() => el("span", { class: "value" }));
    return el("p", { class: "keys" }, ...this.lines.map((line, index) =>
      el("span", {}, el("span", { class: "line", "data-line": line.colour, "data-dash": line.dash ? "yes" : null }),
        `${line.label} `, this.values[index])));
  }

  set(series, start, marks) {
    this.marks = marks;
    // A target does not know how fast the guest changes its memory at the source: no line is better than a zero.
    const known = this.lines.map((line) => series[line.field].some((value) => value > 0));
    this.values.forEach((value, index) => { value.parentElement.hidden = !known[index]; });
    this.data = [series.at.map((at) => at - start), ...this.lines.map((line, index) => (known[index] ? series[line.field] : series.at.map(() => null)))];
    const last = series.at.length - 1;
    const said = this.lines.map((line) => {
      const column = series[line.field];
      return `${line.label}: last ${this.format(column[last] || 0)}, at most ${this.format(Math.max(0, ...column))}`;
    });
    this.node.setAttribute("aria-label", `${this.title}. ${said.join("; ")}`);
    this.show(last);
    if (this.plot) this.plot.setData(this.data); else this.fit();
  }

  show(index) {
    this.lines.forEach((line, which) => {
      const value = this.data[which + 1][index];
      setText(this.values[which], value === undefined || value === null ? "–" : this.format(value));
    });
  }

  restyle() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
    this.fit();
  }

  fit() {
    const width = this.box.clientWidth, height = 170;
    if (!this.data || !width) return;
    if (this.plot) {
      if (this.plot.width !== width) this.plot.setSize({ width, height });
      return;
    }
    const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    this.plot = new uPlot({
      width, height, legend: { show: false }, padding: [8, 12, 0, 0],
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { x: { time: false }, y: { range: (_plot, _low, high) => [0, high > 0 ? high * 1.08 : 1] } },
      axes: [
        { ...axis, size: 28, values: (_plot, ticks) => ticks.map((tick) => seconds(tick)) },
        { ...axis, size: 74, incrs: this.format === size ? BINARY : undefined, values: (_plot, ticks) => ticks.map((tick) => this.format(tick)) },
      ],
      series: [{}, ...this.lines.map((line) => ({
        label: line.label, stroke: colour(line.colour), width: 2, dash: line.dash, points: { show: false },
        fill: line.fill ? colour(line.fill) : undefined,
      }))],
      hooks: {
        draw: [(plot) => this.drawMarks(plot)],
        setCursor: [(plot) => this.show(plot.cursor.idx ?? this.data[0].length - 1)],
      },
    }, this.data, this.box);
    // The picture is described by the figure; uPlot's elements say nothing by themselves.
    this.plot.root.setAttribute("aria-hidden", "true");
  }

  // A line where each state begins.
  drawMarks(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = colour("soft");
    ctx.lineWidth = 1;
    ctx.setLineDash([2, 4]);
    for (const mark of this.marks) {
      const x = Math.round(plot.valToPos(mark, "x", true)) + 0.5;
      if (x <= bbox.left + 1 || x >= bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }
}

function seconds(value) {
  if (value >= 120) return `${+(value / 60).toFixed(1)} min`;
  return `${+value.toFixed(2)} s`;
}

// The histogram of fault latencies: bars by power of two, stacked by kind of page.
class Histogram {
  constructor() {
    this.chart = el("div", {});
    this.keys = el("p", { class: "keys" });
    this.rows = el("tbody", {});
    const head = el("tr", {}, el("th", { scope: "col" }, "Latency"), ...FAULT_KINDS.map((kind) => el("th", { scope: "col", class: "number" }, kind)));
    this.node = el("div", {}, this.keys, this.chart,
      el("details", {}, el("summary", {}, "Numbers"), el("table", { class: "numbers" },
        el("caption", { class: "unseen" }, "Faults by latency and kind of page"), el("thead", {}, head), this.rows)));
    this.drawn = "";
  }

  set(record) {
    const drawn = JSON.stringify([record.faults_by_kind_us, record.faults]);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const series = FAULT_KINDS.map((kind) => record.faults_by_kind_us[kind] || []);
    const end = Math.max(0, ...series.map((counts) => counts.findLastIndex((count) => count > 0) + 1));
    const sums = Array.from({ length: end }, (_, index) => series.reduce((sum, counts) => sum + (counts[index] || 0), 0));
    const first = Math.max(0, sums.findIndex((count) => count > 0));
    this.keys.replaceChildren(...FAULT_KINDS.map((kind) => el("span", {},
      el("span", { class: "swatch", "data-fault": kind }), `${kind} `, el("span", { class: "value" }, String(record.faults[kind])))));
    this.chart.replaceChildren(this.bars(series, sums, first, end, record));
    const name = (index) => `${index === 0 ? "0" : span(2 ** index / 1e6)} to ${span(2 ** (index + 1) / 1e6)}`;
    this.rows.replaceChildren(...sums.map((sum, index) => [sum, index]).filter(([sum]) => sum).map(([, index]) => el("tr", {},
      el("th", { scope: "row" }, name(index)), ...series.map((counts) => el("td", { class: "number" }, String(counts[index] || 0))))));
  }

  bars(series, sums, first, end, record) {
    // At least eight bars wide, so that a single one is not a wall.
    const shown = Math.max(8, end - first), width = 480 / shown, top = Math.max(1, ...sums), high = 110;
    const latency = record.fault_seconds;
    const chart = svg("svg", {
      viewBox: `0 0 480 ${high + 20}`, role: "img", class: "histogram",
      "aria-label": `Fault latency: half below ${span(latency.p50)}, 99 % below ${span(latency.p99)}, longest ${span(latency.max)}`,
    });
    const step = Math.ceil(shown / 6);
    for (let slot = 0; slot < shown; slot += 1) {
      const index = first + slot, x = slot * width;
      let y = high;
      FAULT_KINDS.forEach((kind, which) => {
        const count = series[which][index] || 0;
        if (!count) return;
        const height = Math.max(2, (high - 6) * count / top);
        y -= height;
        chart.append(svg("rect", { "data-fault": kind, x: x + 1, y, width: width - 2, height }));
      });
      if (slot % step === 0 && x < 428) chart.append(svg("text", { x: x + 1, y: high + 15 }, span(2 ** index / 1e6)));
    }
    chart.append(svg("line", { x1: 0, x2: 480, y1: high + 0.5, y2: high + 0.5 }));
    return chart;
  }
}

// A bar whose parts are [name, seconds, tone], and a list of the same.
function partsBar(parts, label) {
  const total = parts.reduce((sum, [, length]) => sum + length, 0) || 1;
  const bar = el("div", { class: "parts", role: "img", "aria-label": `${label}: ${parts.map(([name, length]) => `${name} ${span(length)}`).join(", ")}` });
  for (const [name, length, tone] of parts) {
    const part = el("span", { "data-part": tone, title: `${name}: ${span(length)}` });
    part.style.flexGrow = String(length / total);
    if (length / total > 0.12) part.append(name);
    bar.append(part);
  }
  return bar;
}
