// Provenance and all else that is known, as a table; and the summary on top.
const LONG = 160; // characters that a cell shows at once

function cellOf(value) {
  const flat = Array.isArray(value) && value.every((one) => one === null || typeof one !== "object");
  const text = typeof value === "string" ? value : flat ? value.join(", ") : JSON.stringify(value);
  if (text.length <= LONG) return [text === "null" ? "–" : text];
  const about = Array.isArray(value) ? `${value.length} items` : typeof value === "object" ? `${Object.keys(value).length} entries` : `${text.length} characters`;
  const whole = typeof value === "string" ? value : JSON.stringify(value, null, 1);
  return [element("details", {}, element("summary", {}, about), element("pre", {}, whole))];
}

function startFacts() {
  const body = at("facts").tBodies[0];
  const row = (name, value) => body.append(element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, ...cellOf(value))));
  const section = (name) => body.append(element("tr", {}, element("th", { scope: "rowgroup", colspan: 2 }, name)));
  for (const [name, value] of Object.entries(data.facts)) {
    section(name);
    if (value !== null && typeof value === "object" && !Array.isArray(value)) for (const [key, one] of Object.entries(value)) row(key, one);
    else row("", value);
  }
  if (Object.keys(data.whole).length > 0) {
    section("modules that are left whole");
    for (const [name, reason] of Object.entries(data.whole)) row(name, reason);
  }
}

const LOSS = 2; // points of top-1 that the size in the headline may lose

// The smallest measured size that loses little, else the one below the largest.
function headline() {
  const [dense, ...cut] = points;
  if (cut.length === 0) return;
  const near = cut.filter((point) => point.top1 >= dense.top1 - LOSS);
  const best = near.length > 0 ? near[near.length - 1] : cut[0];
  at("headline").textContent = `Top-1 ${best.top1.toFixed(1)} % at ${Math.round(100 * best.share)} % of the MACs; ${dense.top1.toFixed(1)} % at ${Math.round(100 * dense.share)} %.`;
  at("headline").hidden = false;
}

function startSummary() {
  headline();
  const smallest = stops[stops.length - 1];
  const cards = [
    ["dense model", `${human(data.macs[0])} MACs`, `${human(data.params[0])} parameters`],
    ["smallest size", `${human(data.macs[smallest])} MACs`, `${percent(shareOf(smallest))} of the dense model's`],
    ["sizes", exact(stops.length), `along a list of ${exact(last)} entries`],
    ["modules that are cut", exact(data.sites.filter(([, kind]) => kind !== "tokens").length), `${data.method} method`],
  ];
  for (const [name, value, more] of cards)
    at("summary").append(element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, more))));
}
