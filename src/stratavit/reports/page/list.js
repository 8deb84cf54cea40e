// The dropout list as a heat map: when does which unit of which site leave?
const ROW = 17;
const SCALE = ["#f5e14b", "#cbba69", "#a69d75", "#86847a", "#656b7a", "#3d5680", "#183a75"]; // cividis
const NEVER = "#c0448f";
const leaves = data.sites.map(([, , steps]) => new Array(steps.length - 1).fill(0)); // position from which a unit is gone; 0: never
const left = leaves.map((units) => units.length); // units that have not left yet
let cursor = null; // [row, unit]

data.entries.forEach(([site, width], number) => {
  while (left[site] > 0 && data.sites[site][2][left[site] - 1] >= width) {
    left[site] -= 1;
    leaves[site][left[site]] = number + 1;
  }
});

function mixed(share) {
  const scaled = Math.min(1, Math.max(0, share)) * (SCALE.length - 1);
  const low = Math.min(SCALE.length - 2, Math.floor(scaled));
  const channel = (text, i) => parseInt(text.slice(1 + 2 * i, 3 + 2 * i), 16);
  const blend = (i) => Math.round(channel(SCALE[low], i) + (scaled - low) * (channel(SCALE[low + 1], i) - channel(SCALE[low], i)));
  return `rgb(${blend(0)} ${blend(1)} ${blend(2)})`;
}

const colour = (when) => (when === 0 ? NEVER : mixed((when - 1) / Math.max(1, last - 1)));

function drawList() {
  const canvas = at("heat");
  const width = canvas.clientWidth;
  const scale = Math.max(2, window.devicePixelRatio || 1);
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(ROW * leaves.length * scale);
  canvas.style.height = `${ROW * leaves.length}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  leaves.forEach((units, row) => {
    const each = width / units.length;
    const gap = each > 4 ? 1 : 0;
    units.forEach((when, unit) => {
      pen.fillStyle = colour(when);
      pen.fillRect(unit * each, row * ROW + 1, each - gap, ROW - 2);
    });
  });
  boundary(pen, width);
  if (cursor !== null && document.activeElement === canvas) frame(pen, width, ...cursor);
}

// What the size shown keeps: units to the left of this line.
function boundary(pen, width) {
  for (const [colour, thickness] of [["#ffffff", 5], ["#000000", 2]]) {
    pen.beginPath();
    leaves.forEach((units, row) => {
      const kept = units.filter((when) => when === 0 || when > position).length;
      const x = Math.min(width - 2.5, Math.max(2.5, (kept / units.length) * width - 0.5));
      if (row === 0) pen.moveTo(x, 0);
      else pen.lineTo(x, row * ROW);
      pen.lineTo(x, (row + 1) * ROW);
    });
    pen.strokeStyle = colour;
    pen.lineWidth = thickness;
    pen.lineJoin = "round";
    pen.stroke();
  }
}

function frame(pen, width, row, unit) {
  const each = width / leaves[row].length;
  for (const [colour, thickness] of [["#ffffff", 4], ["#000000", 2]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = thickness;
    pen.strokeRect(unit * each + 1, row * ROW + 2, Math.max(2, each - 3), ROW - 4);
  }
}

function describeUnit(row, unit) {
  const [name, kind, steps, heads] = data.sites[row];
  const when = leaves[row][unit];
  const inside = heads ? `coordinates of each of ${heads} heads` : "heads";
  const what = { attention: inside, mlp: "hidden channels", tokens: "patch tokens" }[kind];
  return [
    `${name}, unit ${unit + 1} of ${leaves[row].length}`,
    `${what}: ${steps[unit]} to ${steps[unit + 1] - 1}`,
    when === 0 ? "never leaves" : `leaves at position ${when} of ${last}, ${percent(shareOf(when))} of the MACs`,
  ];
}

function point(row, unit, x, y) {
  cursor = [row, unit];
  const lines = describeUnit(row, unit);
  at("heat-status").textContent = lines.join("; ");
  tell(lines, x, y);
}

function hover(event) {
  const { left, top, width, height } = at("heat").getBoundingClientRect();
  const row = Math.min(leaves.length - 1, Math.max(0, Math.floor(((event.clientY - top) / height) * leaves.length)));
  const count = leaves[row].length;
  const unit = Math.min(count - 1, Math.max(0, Math.floor(((event.clientX - left) / width) * count)));
  point(row, unit, event.clientX, event.clientY);
}

function step(event) {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const move = moves[event.key];
  if (move === undefined) return;
  event.preventDefault();
  const [row, unit] = cursor === null ? [0, 0] : cursor;
  const next = cursor === null ? 0 : Math.min(leaves.length - 1, Math.max(0, row + move[0]));
  const along = (unit + 0.5) / leaves[row].length; // rows differ in units
  const moved = move[0] !== 0 ? Math.floor(along * leaves[next].length) : unit + (cursor === null ? 0 : move[1]);
  const column = Math.min(leaves[next].length - 1, Math.max(0, moved));
  const { left, top, width } = at("heat").getBoundingClientRect();
  point(next, column, left + ((column + 0.5) / leaves[next].length) * width, top + (next + 0.5) * ROW);
  drawList();
}

function startList() {
  const canvas = at("heat");
  const never = leaves.flat().filter((when) => when === 0).length;
  canvas.setAttribute("aria-label", `Dropout list: ${leaves.length} modules, ${leaves.flat().length} units, ${never} of which never leave`);
  for (const [name] of data.sites) at("heat-names").append(element("div", { title: name }, name));
  at("heat-scale").style.background = `linear-gradient(to right, ${SCALE.join(", ")})`;
  at("heat-never").style.background = NEVER;
  at("heat-never-text").textContent = never === 1 ? "never (1 unit)" : `never (${never} units)`;
  canvas.addEventListener("pointermove", hover);
  canvas.addEventListener("pointerdown", hover);
  canvas.addEventListener("pointerleave", hush);
  canvas.addEventListener("keydown", step);
  canvas.addEventListener("blur", () => { hush(); drawList(); });
  watchers.push(drawList);
  new ResizeObserver(drawList).observe(canvas.parentElement);
}
