// Everything about one migration, on the dashboard and in a report.
"use strict";

class MigrationView {
  constructor() {
    this.map = new PageMap();
    this.speed = new TimePlot("Throughput and dirty rate", [
      { label: "moved", field: "throughput_bytes_per_second", colour: "blue" },
      { label: "changed by the guest", field: "dirty_bytes_per_second", colour: "orange", dash: [6, 4] },
    ], rate);
    this.remaining = new TimePlot("Remaining memory", [
      { label: "remaining", field: "remaining_bytes", colour: "blue", fill: "wash" },
    ], size);
    this.histogram = new Histogram();
    this.title = el("h2", { id: "migration-title" });
    this.badge = el("span", { class: "badge" });
    this.about = el("p", { class: "soft about" });
    this.bar = el("progress", { max: "1", "aria-label": "Memory up to date" });
    this.outlook = el("p", { class: "outlook" });
    this.error = el("div", { class: "error", role: "alert" });
    this.figures = el("dl", { class: "figures" });
    this.values = {};
    this.timeline = el("div", {});
    this.downtime = el("div", {});
    this.parts = {
      map: this.card("Page map", this.map.node),
      speed: this.card(null, this.speed.node),
      remaining: this.card(null, this.remaining.node),
      faults: this.card("Fault latency", this.histogram.node),
      timeline: this.card("Time line", this.timeline),
      downtime: this.card("Downtime", this.downtime),
    };
    this.node = el("article", { class: "migration", "aria-labelledby": "migration-title" },
      el("header", {}, el("div", { class: "head" }, this.title, this.badge), this.about, this.bar, this.outlook, this.error),
      this.figures,
      el("div", { class: "cards" }, ...Object.values(this.parts)));
    this.drawnSteps = "";
  }

  card(title, content) {
    return el("section", { class: "card" }, ...(title ? [el("h3", {}, title)] : []), content);
  }

  update(record) {
    this.record = record;
    const over = ENDED.has(record.state);
    setText(this.title, record.guest);
    setBadge(this.badge, record.state);
    const peer = record.peer ? `${record.role === "source" ? "to" : "from"} ${record.peer}` : record.role;
    setText(this.about, [`${record.mode} ${peer}`, record.driver && `${record.driver} guest`, `id ${record.id}`].filter(Boolean).join(" · "));
    this.bar.hidden = over || !record.total_bytes;
    this.bar.value = done(record);
    setText(this.outlook, this.outlookOf(record, over));
    this.setError(record.error);
    this.setFigures(record, over);
    this.parts.faults.hidden = !FAULT_KINDS.some((kind) => record.faults[kind]);
    this.histogram.set(record);
    this.setSteps(record, over);
  }

  outlookOf(record, over) {
    if (over) {
      const took = `${record.state} after ${span(Math.max(0, record.ended_at - record.started_at))}`;
      return record.downtime_seconds === null ? took : `${took}, downtime ${span(record.downtime_seconds)}`;
    }
    if (!record.total_bytes) return "preparing";
    const share = `${percent(done(record))} of ${size(record.total_bytes)} up to date`;
    if (record.state === "setup") return "preparing";
    if (record.state === "postcopy-paused") return `${share}; waiting for the other agent`;
    const time = left(record);
    return `${share}; ${time === null ? "no end in sight at this pace" : `about ${span(time)} left`}`;
  }

  setError(error) {
    this.error.hidden = !error;
    const text = error ? JSON.stringify(error) : "";
    if (this.errorText === text) return;
    this.errorText = text;
    this.error.replaceChildren(...(error ? [el("strong", {}, error.message), " ", el("code", {}, error.code),
      ...(error.hint ? [el("p", {}, `What to do: ${error.hint}`)] : [])] : []));
  }

  setFigures(record, over) {
    const faults = FAULT_KINDS.reduce((sum, kind) => sum + record.faults[kind], 0);
    const figures = [["Moved", size(record.transferred_bytes)], ["Memory", size(record.total_bytes)]];
    if (!over) {
      figures.push(["Throughput", rate(record.throughput_bytes_per_second)]);
      if (record.role === "source") figures.push(["Dirty rate", rate(record.dirty_bytes_per_second)]);
      figures.push(["Remaining", size(record.remaining_bytes)]);
    }
    if (record.role === "source") figures.push(["Round", String(record.round)]);
    if (record.stale_pages) figures.push(["Stale at switchover", `${record.stale_pages} pages`]);
    if (record.page_size) figures.push(["Page size", size(record.page_size)]);
    if (record.max_bandwidth_bytes_per_second) figures.push(["Bandwidth limit", rate(record.max_bandwidth_bytes_per_second)]);
    figures.push(["Downtime", span(record.downtime_seconds)]);
    figures.push([over ? "Took" : "Running for", span(Math.max(0, (record.ended_at || Date.now() / 1000) - record.started_at))]);
    if (faults) {
      figures.push(["Faults", String(faults)], ["Latency p50", span(record.fault_seconds.p50)],
        ["Latency p99", span(record.fault_seconds.p99)], ["Longest stall", span(record.fault_seconds.max)]);
    }
    const names = figures.map(([name]) => name).join();
    if (this.names !== names) {
      this.names = names;
      this.values = Object.fromEntries(figures.map(([name]) => [name, el("dd", {})]));
      this.figures.replaceChildren(...figures.map(([name]) => el("div", {}, el("dt", {}, name), this.values[name])));
    }
    for (const [name, value] of figures) setText(this.values[name], value);
  }

  // The states with their lengths, and what the downtime was made of.
  setSteps(record, over) {
    const steps = record.timeline.map((step, index) => {
      const next = record.timeline[index + 1];
      const end = next ? next.at : record.ended_at || Date.now() / 1000;
      return [step.state, Math.max(0, end - step.at), step.at - record.started_at];
    });
    const drawn = JSON.stringify([record.timeline.length, record.downtime_breakdown, over || Math.floor(Date.now() / 1000)]);
    if (drawn === this.drawnSteps) return;
    this.drawnSteps = drawn;
    const lasting = steps.filter(([state]) => !ENDED.has(state));
    this.timeline.replaceChildren(
      partsBar(lasting.map(([state, length]) => [state, length, state]), "States"),
      el("ol", { class: "steps" }, ...steps.map(([state, length, begin]) => el("li", {}, badge(state),
        el("span", { class: "number" }, `at ${span(Math.max(0, begin))}`),
        el("span", { class: "number soft" }, ENDED.has(state) ? "" : `for ${span(length)}`)))));
    const breakdown = Object.entries(record.downtime_breakdown);
    this.parts.downtime.hidden = record.downtime_seconds === null;
    this.downtime.replaceChildren(
      el("p", { class: "big" }, span(record.downtime_seconds)),
      partsBar(breakdown.map(([step, length], index) => [step, length, `step-${index % 2}`]), "Downtime"),
      el("table", { class: "numbers" }, el("caption", { class: "unseen" }, "Steps of the downtime"),
        el("tbody", {}, ...breakdown.map(([step, length]) => el("tr", {}, el("th", { scope: "row" }, step), el("td", { class: "number" }, tenths(length)),
          el("td", { class: "number soft" }, percent(length / (record.downtime_seconds || 1))))))));
  }

  setSeries(series) {
    const enough = series.at.length > 1;
    this.parts.speed.hidden = this.parts.remaining.hidden = !enough;
    if (!enough) return;
    const start = this.record.started_at, marks = this.record.timeline.map((step) => step.at - start);
    this.speed.set(series, start, marks);
    this.remaining.set(series, start, marks);
  }

  setMap(map) { this.map.set(map); }

  restyle() {
    this.map.draw();
    this.speed.restyle();
    this.remaining.restyle();
  }
}
