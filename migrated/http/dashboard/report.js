// A report: one migration, from the data in this file.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const view = new MigrationView();
document.getElementById("detail").replaceChildren(view.node);
view.update(data.record);
view.setSeries(data.series);
view.setMap(data.map);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.restyle());
