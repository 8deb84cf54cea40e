// The slider, the numbers of the size that it stands at, and the width of every module.

// Width of every site once the first `position` entries of the list are dropped.
function widthsAt(position) {
  const widths = data.sites.map(([, , steps]) => steps[steps.length - 1]);
  for (const [site, width] of data.entries.slice(0, position)) widths[site] = width;
  return widths;
}

function nearest(position) {
  const away = (point) => Math.abs(point.macs - data.macs[position]);
  return points.reduce((best, point) => (best === null || away(point) < away(best) ? point : best), null);
}

function tellSize(position) {
  const slider = at("slider");
  const share = percent(shareOf(position));
  slider.value = stops.length - 1 - stops.indexOf(position);
  slider.setAttribute("aria-valuetext", `${share} of the MACs, position ${position} of ${last}`);
  const point = nearest(position);
  const where = point === null || point.position === position ? "" : ` at ${percent(point.share)}`;
  const measured = point === null ? "" : ` · top-1 ${point.top1.toFixed(1)} %${where}`;
  at("strip-text").textContent = `${share} of MACs · ${human(data.macs[position])} · ${human(data.params[position])} params${measured}`;
  if (document.activeElement !== at("share")) at("share").value = (100 * shareOf(position)).toFixed(1);
  at("position").textContent = position;
  at("position-of").textContent = `of ${last}; 0 is the full model`;
  at("macs").textContent = exact(data.macs[position]);
  at("macs-human").textContent = `${share} of the dense model's`;
  at("params").textContent = exact(data.params[position]);
  at("params-human").textContent = `${percent(data.params[position] / data.params[0])} of the dense model's`;
  at("command").textContent = `${data.extract} --position ${position} --out small`;
  tellNearest(position);
}

function tellNearest(position) {
  const point = nearest(position);
  if (point === null) {
    at("nearest").textContent = "none";
    at("nearest-more").textContent = "accuracy was not measured";
    return;
  }
  const ms = point.ms === null ? "" : `, ${point.ms.toFixed(2)} ms`;
  at("nearest").textContent = `top-1 ${point.top1.toFixed(2)} %${ms}`;
  const where = point.position === position ? "exactly this size" : `at ${percent(point.share)} of the MACs, position ${point.position}`;
  at("nearest-more").textContent = where;
}

const KINDS = ["attention", "mlp", ...(data.list === "both" ? ["tokens"] : [])];

// One row for each block, attention, MLP and tokens side by side; `whole` modules are named, too.
function bars() {
  const rows = [];
  const byName = new Map();
  const put = (name, kind, content) => {
    const block = name.includes(".") ? name.slice(0, name.lastIndexOf(".")) : name;
    let row = byName.get(block);
    if (row === undefined || row[kind] !== undefined) {
      row = { name: row === undefined ? block : name };
      byName.set(row.name, row);
      rows.push(row);
    }
    row[kind] = content;
  };
  data.sites.forEach(([name, kind], site) => put(name, kind, { site, name, kind }));
  for (const name of Object.keys(data.whole)) put(name, /attn|attention/.test(name.slice(name.lastIndexOf(".") + 1)) ? "attention" : "mlp", null);
  const cells = [];
  for (const row of rows) {
    const line = element("div", { class: "row", role: "listitem" }, element("span", { class: "name" }, row.name));
    for (const kind of KINDS) line.append(...cell(row[kind], kind, cells));
    at("bars").append(line);
  }
  return cells;
}

function cell(content, kind, cells) {
  if (!content) return [element("span", { class: "cell" }, content === null ? "left whole" : "")];
  const fill = element("i", { class: kind });
  const kept = element("span", { class: "kept", "data-site": content.name });
  cells.push({ site: content.site, fill, kept });
  return [element("span", { class: "bar", "aria-hidden": "true" }, fill), kept];
}

function startSizes() {
  at("bars").style.setProperty("--kinds", KINDS.length);
  for (const key of document.querySelectorAll(".tokens-only")) key.hidden = data.list !== "both";
  const cells = bars();
  const slider = at("slider");
  slider.max = stops.length - 1;
  slider.addEventListener("input", () => show(stops[stops.length - 1 - Number(slider.value)]));
  const byShare = () => {
    if (at("share").value !== "" && at("share").checkValidity()) show(within(Number(at("share").value) / 100));
  };
  at("share").addEventListener("input", byShare);
  at("share").addEventListener("blur", () => show(position)); // what was got
  watchers.push(tellSize, (position) => {
    const widths = widthsAt(position);
    for (const { site, fill, kept } of cells) {
      const full = data.sites[site][2][data.sites[site][2].length - 1];
      fill.style.width = `${(100 * widths[site]) / full}%`;
      kept.textContent = `${widths[site]} of ${full}`;
    }
  });
}
