// Accuracy against MACs, parameters or milliseconds.
const AXES = {
  macs: { label: "MACs", title: "MACs per image (linear count)", of: (point) => point.macs, at: (position) => data.macs[position] },
  params: { label: "parameters", title: "parameters", of: (point) => point.params, at: (position) => data.params[position] },
  ms: { label: "latency", title: "milliseconds per batch", of: (point) => point.ms, at: () => null },
};
const MARGIN = { left: 44, right: 16, top: 22, bottom: 44 };
const largest = (list) => data.points.filter(list).sort((a, b) => a.position - b.position); // first
const points = largest((point) => point.axes === data.list);
const others = largest((point) => point.axes !== data.list); // of the list that the page does not show
let axis = AXES.macs;
let place = null; // of the mark of the size that is shown

// Of the top-1 of a point, in points of accuracy: so far it may be off because there are only so many images.
const standardError = (point) => Math.sqrt((point.top1 * (100 - point.top1)) / point.n);

function describe(point) {
  const lines = [
    `top-1 ${point.top1.toFixed(2)} % ± ${standardError(point).toFixed(1)}`,
    `MACs ${exact(point.macs)} (${percent(point.share)})`,
    `parameters ${exact(point.params)}`,
  ];
  if (point.before !== null) lines[0] += `, before ${point.before.toFixed(2)} %`;
  if (point.ms !== null) lines.push(`${point.ms.toFixed(2)} ms`);
  if (point.top5 !== null) lines.push(`top-5 ${point.top5.toFixed(2)} %`);
  if (point.loss !== null) lines.push(`loss ${point.loss.toFixed(3)}`);
  if (others.length > 0) lines.push(`cut along ${NAMES[point.axes]}`);
  return [...lines, `asked ${point.asked}, ${exact(point.n)} images, position ${point.position}`];
}

// Round numbers from 0 to at least `highest`, about so many.
function ticks(highest, about) {
  const raw = highest / about;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 2.5, 5, 10].find((factor) => factor * unit >= raw * 0.999);
  return Array.from({ length: Math.ceil(highest / step - 1e-9) + 1 }, (_, i) => Number((i * step).toPrecision(6)));
}

function drawCurve() {
  const box = at("curve");
  const width = Math.max(260, Math.floor(box.clientWidth));
  const height = Math.round(Math.min(380, Math.max(250, width * 0.46)));
  const bottom = height - MARGIN.bottom;
  const highest = Math.max(axis.at(0), ...data.points.map(axis.of)) * 1.04;
  const levels = ticks(Math.max(1, ...data.points.map((point) => Math.max(point.top1, point.before))), 5);
  const x = (value) => MARGIN.left + (value / highest) * (width - MARGIN.left - MARGIN.right);
  const y = (value) => bottom - (value / levels[levels.length - 1]) * (bottom - MARGIN.top);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `top-1 against ${axis.title}, ${points.length} points` });
  const line = (kind, x1, y1, x2, y2) => svg.appendChild(drawn("line", { class: kind, x1, y1, x2, y2 }));

  for (const level of levels) {
    line(level === 0 ? "axis" : "gridline", MARGIN.left, y(level), width - MARGIN.right, y(level));
    svg.append(drawn("text", { x: MARGIN.left - 8, y: y(level) + 4, "text-anchor": "end" }, `${level}`));
  }
  for (const value of ticks(highest, width / 110).filter((tick) => tick <= highest)) {
    line("axis", x(value), bottom, x(value), bottom + 5);
    svg.append(drawn("text", { x: x(value), y: bottom + 19, "text-anchor": "middle" }, human(value)));
  }
  svg.append(drawn("text", { x: width - MARGIN.right, y: height - 6, "text-anchor": "end" }, axis.title));
  svg.append(drawn("text", { x: 4, y: 12 }, `top-1 %, ${exact(points[0].n)} images`));
  line("dense", MARGIN.left, y(points[0].top1), width - MARGIN.right, y(points[0].top1));
  place = { x, mark: line("here", 0, MARGIN.top, 0, bottom) };
  for (const [kind, list] of [["curve other", others], ["curve", points]])
    svg.append(drawn("polyline", { class: kind, points: list.map((p) => `${x(axis.of(p))},${y(p.top1)}`).join(" ") }));
  const earlier = points.filter((point) => point.before !== null);
  if (earlier.length > 0) svg.append(drawn("polyline", { class: "curve before", points: earlier.map((p) => `${x(axis.of(p))},${y(p.before)}`).join(" ") }));
  for (const point of data.points) {
    const off = standardError(point);
    line("error", x(axis.of(point)), y(Math.max(0, point.top1 - off)), x(axis.of(point)), y(Math.min(levels[levels.length - 1], point.top1 + off)));
  }
  for (const point of others) svg.append(dot(point, x(axis.of(point)), y(point.top1)));
  labels(svg, x, y);
  for (const point of points) svg.append(dot(point, x(axis.of(point)), y(point.top1)));
  box.replaceChildren(svg);
  mark();
}

// The value at every point, to its upper left, where the line is not; left out where it would lie on another.
function labels(svg, x, y) {
  const taken = [];
  for (const point of points) {
    const [left, top] = [x(axis.of(point)) - 7, y(point.top1) - 8];
    if (taken.some(([a, b]) => Math.abs(a - left) < 34 && Math.abs(b - top) < 14)) continue;
    taken.push([left, top]);
    svg.append(drawn("text", { class: "value", x: left, y: top }, point.top1.toFixed(1)));
  }
}

function dot(point, x, y) {
  const chosen = point.axes === data.list; // others are not sizes of this page
  const role = chosen ? { class: "point", role: "button", "data-position": point.position } : { class: "point other", role: "img" };
  const label = describe(point).join(", ") + (chosen ? "; show this size" : "");
  const group = drawn("g", { ...role, tabindex: 0, "aria-label": label });
  group.append(drawn("circle", { class: "hit", cx: x, cy: y, r: 12 }), drawn("circle", { class: "dot", cx: x, cy: y, r: 5.5 }));
  const tellHere = () => {
    const { left, top, width, height } = group.getBoundingClientRect();
    tell(describe(point), left + width / 2, top + height / 2);
  };
  group.addEventListener("pointerenter", tellHere);
  group.addEventListener("pointerleave", hush);
  group.addEventListener("focus", () => requestAnimationFrame(() => { // after scrolling there
    if (document.activeElement === group) tellHere();
  }));
  group.addEventListener("blur", hush);
  if (!chosen) return group;
  group.addEventListener("click", () => show(point.position));
  group.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    show(point.position);
  });
  return group;
}

function mark() {
  if (place === null) return;
  const value = axis.at(position);
  place.mark.style.display = value === null ? "none" : "";
  if (value === null) return;
  place.mark.setAttribute("x1", place.x(value));
  place.mark.setAttribute("x2", place.x(value));
}

function axisChoice() {
  for (const [name, one] of Object.entries(AXES)) {
    if (name === "ms" && data.latency === null) continue;
    const button = element("input", { type: "radio", name: "axis", value: name });
    button.checked = one === axis;
    button.addEventListener("change", () => {
      axis = one;
      hush();
      drawCurve();
    });
    at("axes").append(element("label", {}, button, one.label));
  }
  at("axes").hidden = false;
}

function curveTable() {
  const columns = [["asked", (p) => p.asked], ["share", (p) => percent(p.share)], ["MACs", (p) => exact(p.macs)], ["parameters", (p) => exact(p.params)]];
  if (data.latency !== null) columns.push(["ms", (p) => p.ms.toFixed(2)]);
  const measured = (value, digits) => (value === null ? "" : value.toFixed(digits));
  columns.push(["top-1 %", (p) => p.top1.toFixed(2)], ["top-5 %", (p) => measured(p.top5, 2)], ["loss", (p) => measured(p.loss, 3)]);
  if (data.points.some((p) => p.before !== null)) columns.push(["before %", (p) => measured(p.before, 2)]);
  if (others.length > 0) columns.unshift(["cut along", (p) => NAMES[p.axes]]);
  const head = element("tr", {}, ...columns.map(([name]) => element("th", { scope: "col" }, name)));
  const rows = [...points, ...others].map((point) => element("tr", {}, ...columns.map(([, text]) => element("td", {}, text(point)))));
  at("curve-table").querySelector("div").append(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
  at("curve-table").hidden = false;
}

function startCurve() {
  const note = at("curve-note");
  if (points.length === 0) {
    const report = data.extract.replace("extract", "report").replace(" --axes both", "");
    const curve = element("code", {}, `${data.curve} --data DIR --out curve`);
    note.append("Accuracy was not measured, so this page shows sizes only. To add it: ", curve, ", then ", element("code", {}, `${report} --curve curve`), ".");
    return;
  }
  note.append("Point at a dot for its numbers; choose it to show that size below. The upright line is the size shown, the dashed one the largest measured; bars are one standard error of so many images.");
  if (others.length > 0) note.append(` Grey: cut along ${NAMES[others[0].axes]} alone.`);
  if (points.some((point) => point.before !== null)) note.append(" Dotted: before the network was recovered or trained.");
  if (data.latency !== null) note.append(` Latency: ${data.latency}.`);
  axisChoice();
  curveTable();
  watchers.push(mark);
  new ResizeObserver(drawCurve).observe(at("curve"));
  drawCurve();
}
