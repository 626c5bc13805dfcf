/* The front page: runs as a chart and a table that know each other, and the courses of their training. */
(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("runs").textContent);
  const runs = data.rows.map((row) => Object.fromEntries(data.columns.map((name, i) => [name, name in data.words ? data.words[name][row[i]] : row[i]])));
  for (const run of runs) run.record = `${run.profile}/runs/${run.id}.json`;
  const NS = "http://www.w3.org/2000/svg", $ = (id) => document.getElementById(id);
  const FILTERS = ["profile", "network", "data", "target", "schedule", "seed"];
  const AXES = { removed: "parameters removed (%)", macs: "MACs removed (%)", minutes: "minutes of training" };
  let sorted = { by: "accuracy", down: true };

  function svg(name, attributes, text) {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }
  const unique = (values) => [...new Set(values)].sort((a, b) => (a > b ? 1 : a < b ? -1 : 0));
  function fill(select, values, first) {
    const before = select.value;
    select.replaceChildren(...(first ? [new Option(first, "")] : []), ...values.map((v) => new Option(v, v)));
    if ([...select.options].some((o) => o.value === before)) select.value = before;
  }
  const shown = () => runs.filter((run) => FILTERS.every((f) => !$(`f-${f}`).value || String(run[f]) === $(`f-${f}`).value));

  function ticks(low, high) {
    const step = 10 ** Math.floor(Math.log10((high - low) / 4 || 1)), by = [1, 2, 5, 10].map((k) => k * step).find((s) => (high - low) / s <= 6);
    const out = [];
    for (let t = Math.ceil(low / by) * by; t <= high + 1e-9; t += by) out.push(+t.toFixed(6));
    return out;
  }
  // Of what is removed, equal factors of what is left are equal steps: else all of a curve stands at the right edge.
  const LEFT = { of: (v) => -Math.log10(Math.max(1e-4, 1 - v / 100)), ticks: [0, 50, 75, 90, 95, 97, 99, 99.7] };
  const LINEAR = { of: (v) => v };
  function frame(box, x, y, xWords, yWords, scale = LINEAR) { // axes; returns the scales
    const w = Math.min(900, Math.max(330, box.clientWidth || 760)), h = Math.max(300, w / 2.1), m = { l: 58, r: 12, t: 12, b: 44 };
    box.setAttribute("viewBox", `0 0 ${w} ${h}`);
    box.replaceChildren();
    const pad = (r) => { const d = (r[1] - r[0]) * 0.06 || 1; return [r[0] - d, r[1] + d]; };
    const beside = scale.ticks && scale.ticks.filter((t) => t >= x[0] - 1e-9 && t <= x[1] + 1e-9);
    const marks = beside && beside.length > 1 ? beside : ticks(...(scale.ticks ? x : pad(x)));
    [x, y] = [pad(x.map(scale.of)), pad(y)];
    const sx = (v) => m.l + ((scale.of(v) - x[0]) / (x[1] - x[0])) * (w - m.l - m.r), sy = (v) => h - m.b - ((v - y[0]) / (y[1] - y[0])) * (h - m.t - m.b);
    for (const t of ticks(...y)) box.append(svg("line", { x1: m.l, x2: w - m.r, y1: sy(t), y2: sy(t), class: "grid" }), svg("text", { x: m.l - 6, y: sy(t) + 4, "text-anchor": "end" }, t));
    for (const t of marks) box.append(svg("text", { x: sx(t), y: h - m.b + 18, "text-anchor": "middle" }, t));
    box.append(svg("line", { x1: m.l, x2: w - m.r, y1: h - m.b, y2: h - m.b, class: "axis" }),
      svg("text", { x: (w + m.l) / 2, y: h - 6, "text-anchor": "middle" }, xWords),
      svg("text", { x: 14, y: h / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${h / 2})` }, yWords));
    return [sx, sy];
  }
  const range = (values) => [Math.min(...values), Math.max(...values)];
  const says = (run) => `${run.method}, ${run.network}, ${run.data}, ${run.removed.toFixed(2)} % of the parameters and ${run.macs.toFixed(2)} % of the MACs removed: ` +
    `${run.accuracy.toFixed(2)} % (${run.judged}), ${run.epochs} epochs, seed ${run.seed}, ${run.minutes.toFixed(1)} min on ${run.machine}. `;

  function tell(run) {
    const link = document.createElement("a");
    link.href = run.record; link.textContent = run.record;
    $("detail").replaceChildren(says(run) + "Record: ", link);
    document.querySelectorAll(".on").forEach((node) => node.classList.remove("on"));
    document.querySelectorAll(`[data-id="${run.key}"]`).forEach((node) => node.classList.add("on"));
    $("c-run").value = run.key; course();
  }
  function listen(node, run) {
    for (const event of ["pointerenter", "focus", "click"]) node.addEventListener(event, () => tell(run));
  }
  function chart() {
    const axis = $("axis").value, box = $("chart");
    let those = shown();
    $("machine").parentElement.hidden = axis !== "minutes";
    if (axis === "minutes") { // seconds of different conditions are never in one picture
      const counts = {};
      those.forEach((run) => (counts[run.machine] = (counts[run.machine] || 0) + 1));
      fill($("machine"), Object.keys(counts).sort((a, b) => counts[b] - counts[a]));
      those = those.filter((run) => run.machine === $("machine").value);
    }
    if (!those.length) return box.replaceChildren(svg("text", { x: 20, y: 40 }, "No run matches these filters."));
    const sets = new Set(those.map((r) => r.data)).size, mixed = sets > 1 ? `, ${sets} kinds of data: choose one above` : "";
    const [sx, sy] = frame(box, range(those.map((r) => r[axis])), range(those.map((r) => r.accuracy)), AXES[axis] + mixed, "accuracy (%)", axis === "minutes" ? LINEAR : LEFT);
    for (const run of those) {
      const mark = svg("circle", { cx: sx(run[axis]), cy: sy(run.accuracy), r: 5.5, fill: run.colour, tabindex: 0, "data-id": run.key, role: "img", "aria-label": says(run), class: run.schedule === "equal" ? "" : "hollow", stroke: run.colour });
      listen(mark, run);
      box.append(mark);
    }
    const names = new Map(those.map((r) => [r.method, r.colour]));
    $("legend").replaceChildren(...[...names].map(([name, colour]) => {
      const item = document.createElement("span"), dot = document.createElement("i");
      dot.style.background = colour; item.append(dot, name); return item;
    }));
  }
  const COLUMNS = [["method", "method"], ["network", "network"], ["accuracy", "accuracy (%)"], ["interval", "± (seeds)"], ["removed", "parameters removed (%)"], ["macs", "MACs removed (%)"], ["minutes", "minutes"], ["epochs", "epochs"], ["schedule", "schedule"], ["widths", "widths"], ["seed", "seed"], ["data", "data"], ["judged", "judged on"], ["machine", "timed on"], ["profile", "study"], ["record", "record"]];
  const DIGITS = { accuracy: 2, removed: 2, macs: 2, minutes: 1 };
  function table() {
    const rows = shown().sort((a, b) => { const [x, y] = [a[sorted.by], b[sorted.by]]; return (x > y ? 1 : x < y ? -1 : 0) * (sorted.down ? -1 : 1); });
    const head = document.createElement("tr");
    for (const [name, words] of COLUMNS) {
      const cell = document.createElement("th"), button = document.createElement("button");
      const here = sorted.by === name;
      button.textContent = words + (here ? (sorted.down ? " ▼" : " ▲") : ""); button.dataset.by = name;
      button.addEventListener("click", () => { sorted = { by: name, down: here ? !sorted.down : typeof runs[0][name] === "number" }; table(); $("board").querySelector(`[data-by="${name}"]`).focus(); });
      cell.setAttribute("aria-sort", here ? (sorted.down ? "descending" : "ascending") : "none");
      if (name in DIGITS) cell.className = "n";
      cell.append(button); head.append(cell);
    }
    $("board").tHead.replaceChildren(head);
    $("board").tBodies[0].replaceChildren(...rows.map((run) => {
      const line = document.createElement("tr");
      line.dataset.id = run.key; line.dataset.run = run.id; line.tabIndex = 0;
      for (const [name] of COLUMNS) {
        const cell = document.createElement("td");
        if (name in DIGITS) { cell.className = "n"; cell.textContent = run[name].toFixed(DIGITS[name]); }
        else if (name === "interval") cell.textContent = run.interval === null ? `(${run.repeats})` : `± ${run.interval.toFixed(2)} (${run.repeats})`;
        else if (name === "record") { const link = document.createElement("a"); link.href = run.record; link.textContent = run.id; cell.append(link); }
        else cell.textContent = run[name];
        line.append(cell);
      }
      listen(line, run);
      return line;
    }));
    $("count").textContent = `${rows.length} of ${runs.length} runs`;
  }
  const COURSES = [["train_accuracy", "training accuracy (%)", "#0072b2"], ["own_share", "own share (%)", "#d55e00"], ["churn", "kept filters replaced (%)", "#009e73"]];
  function course() {
    const run = runs.find((r) => r.key === +$("c-run").value), box = $("course");
    if (!run) return;
    const those = COURSES.filter(([name]) => run.course[name]);
    const [sx, sy] = frame(box, [1, run.course.train_accuracy.length], [0, 100], "epoch, all phases counted", "%");
    for (const [name, words, colour] of those) {
      const points = run.course[name].map((v, i) => (v === null ? null : [sx(i + 1), sy(v)])).filter(Boolean);
      box.append(svg("polyline", { points: points.map((p) => p.join()).join(" "), fill: "none", stroke: colour, "stroke-width": 2 }), ...points.map(([x, y]) => svg("circle", { cx: x, cy: y, r: 3, fill: colour })));
    }
    $("c-legend").replaceChildren(...those.map(([, words, colour]) => {
      const item = document.createElement("span"), dot = document.createElement("i");
      dot.style.background = colour; item.append(dot, words); return item;
    }));
    const last = run.course.train_accuracy.at(-1);
    $("c-said").textContent = `${run.method}, ${run.network}, seed ${run.seed}, ${run.profile}: training accuracy ${last.toFixed(1)} % in the last of ${run.course.train_accuracy.length} epochs` +
      (run.course.own_share ? `; a kept filter is ${run.course.own_share[0].toFixed(0)} % of its fused one at first, ${run.course.own_share.at(-1).toFixed(0)} % at last.` : ".");
  }
  function all() { chart(); table(); }
  for (const name of FILTERS) {
    fill($(`f-${name}`), unique(runs.map((r) => r[name])), "all");
    $(`f-${name}`).addEventListener("change", all);
  }
  $("f-profile").value = data.first;
  $("axis").addEventListener("change", chart);
  $("machine").addEventListener("change", chart);
  $("c-run").replaceChildren(...runs.map((r) => new Option(`${r.profile}: ${r.id}`, r.key)));
  $("c-run").value = (runs.find((r) => r.profile === data.first && r.course.own_share) || runs[0]).key;
  $("c-run").addEventListener("change", course);
  document.querySelectorAll(".scripted").forEach((node) => (node.hidden = false));
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; chart(); course(); } });
  all(); course();
})();
