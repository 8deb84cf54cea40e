// The data, elements, numbers as text, the tooltip, and the position that is shown.
const data = JSON.parse(document.getElementById("data").textContent);
const last = data.entries.length; // the smallest size; 0 is the full model
const stops = data.stops || Array.from({ length: last + 1 }, (_, p) => p);
const at = (id) => document.getElementById(id);

// An element with attributes and children; strings become text, never markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function drawn(tag, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

function human(count) {
  for (const [suffix, unit] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["K", 1e3]])
    if (count >= unit) return `${Number((count / unit).toPrecision(4))}${suffix}`;
  return `${Number(count.toPrecision(4))}`;
}

const exact = (count) => String(count).replace(/\B(?=(\d{3})+$)/g, ",");
const NAMES = { width: "width", both: "width and tokens" }; // of the lists
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const shareOf = (position) => data.macs[position] / data.macs[0];

// ---- the tooltip ----

function tell(lines, x, y) {
  const tip = at("tip");
  tip.replaceChildren(...lines.map((line) => element("div", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, x + 14), document.documentElement.clientWidth - width - 4);
  const below = y + 16 + height > window.innerHeight;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, below ? y - height - 12 : y + 16)}px`;
}

const hush = () => { at("tip").hidden = true; };

// ---- the position ----

let position = 0;
const watchers = []; // called with every new position

function show(wanted) {
  position = wanted;
  for (const watcher of watchers) watcher(position);
}

// The largest size within a share of the MACs, or the smallest there is.
function within(share) {
  const limit = Math.floor(Math.round(share * data.macs[0] * 1000) / 1000);
  const found = stops.find((stop) => data.macs[stop] <= limit);
  return found === undefined ? stops[stops.length - 1] : found;
}
