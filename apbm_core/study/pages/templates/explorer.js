/* Sliders on one layer; fusion.js does the arithmetic. A box .explorer holds a <script type="application/json">. */
(function () {
  "use strict";
  const NS = "http://www.w3.org/2000/svg";
  const CHOICES = { metric: ["euclidean", "cosine"], score: ["relative-entropy", "entropy", "l1", "order"],
    mass: ["all", "unimportant", "assigned"] };

  function tag(name, attributes, ...inside) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
    node.append(...inside);
    return node;
  }
  function field(words, control) { return tag("label", {}, words + " ", control); }
  function select(values, name) {
    return tag("select", { name }, ...values.map((v) => tag("option", { value: v }, v)));
  }
  function heat(canvas, values, rows, columns, most) { // 0: paper, 1: the strongest
    canvas.width = columns; canvas.height = rows;
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    for (let k = 0; k < rows * columns; k++) {
      const v = Math.min(1, Math.max(0, values(k) / most));
      image.data.set([213 * v + 20 * (1 - v), 94 * v + 24 * (1 - v), 40 * (1 - v), 255 * (0.08 + 0.92 * v)], 4 * k);
    }
    context.putImageData(image, 0, 0);
  }

  function start(box) {
    const data = JSON.parse(box.querySelector("script[type='application/json']").textContent);
    const layer = select(data.layers.map((l) => l.name), "layer"), moment = select(Object.keys(data.layers[0].moments), "moment");
    moment.value = Object.keys(data.layers[0].moments).at(-1);
    const tau = tag("input", { type: "range", name: "tau", min: 0.1, max: 3, step: 0.05, value: 1 });
    const kept = tag("input", { type: "range", name: "kept", min: 1, max: 64, step: 1, value: 8 });
    const tauSaid = tag("output"), keptSaid = tag("output");
    const choices = Object.fromEntries(Object.entries(CHOICES).map(([k, v]) => [k, select(v, k)]));
    const controls = tag("div", { class: "controls" }, field("layer", layer), field("weights", moment),
      tag("label", {}, "tau ", tau, tauSaid), tag("label", {}, "kept filters ", kept, keptSaid),
      ...Object.entries(choices).map(([k, v]) => field({ metric: "distance" }[k] || k, v)));
    controls.querySelectorAll("input, select").forEach((node) => node.setAttribute("data-lm-suppress-shortcuts", "true")); // JupyterLab takes the arrow keys otherwise
    const said = tag("p", { class: "said", role: "status", "aria-live": "polite" });
    const left = tag("canvas", { role: "img", "aria-label": "similarity distributions, a row a filter" });
    const bars = document.createElementNS(NS, "svg");
    bars.setAttribute("role", "img");
    const right = tag("canvas", { role: "img", "aria-label": "the mixing matrix P, a row a kept filter" });
    const panel = (words, node) => tag("figure", {}, node, tag("figcaption", {}, words));
    const scoreSaid = tag("span");
    const middle = tag("figure", {}, bars, tag("figcaption", {}, scoreSaid));
    box.append(controls, said, tag("div", { class: "panels" }, panel("similarity distributions: row i says whom filter i resembles", left),
      middle, panel("P: row k is what makes up fused filter k", right)));
    const unpacked = {};
    function current() {
      const key = layer.value + moment.value;
      return (unpacked[key] ||= APBM.unpack(data.layers.find((l) => l.name === layer.value).moments[moment.value]));
    }
    function draw() {
      const began = performance.now(), now = current(), n = now.n;
      kept.max = n;
      const setting = { tau: +tau.value, m: +kept.value, ...Object.fromEntries(Object.entries(choices).map(([k, v]) => [k, v.value])) };
      const seen = APBM.look(now, setting);
      tauSaid.value = setting.tau.toFixed(2); keptSaid.value = `${setting.m} of ${n}`;
      heat(left, (k) => Math.exp(seen.logP[k]), n, n, 1);
      heat(right, (k) => seen.P[k], setting.m, n, 1);
      const low = Math.min(0, ...seen.scores), high = Math.max(...seen.scores, low + 1e-12), keeps = new Set(seen.kept);
      bars.setAttribute("viewBox", `0 0 ${n} 40`); bars.setAttribute("preserveAspectRatio", "none");
      bars.innerHTML = seen.scores.map((s, i) => {
        const h = 39 * (s - low) / (high - low) + 1;
        return `<rect x="${i + 0.08}" y="${40 - h}" width="0.84" height="${h}" class="${keeps.has(i) ? "kept" : "other"}"/>`;
      }).join("");
      bars.setAttribute("aria-label", `importance of ${n} filters by ${setting.score}, kept ones marked`);
      scoreSaid.textContent = `importance by ${setting.score}; orange: kept`;
      said.textContent = `${setting.m} of ${n} filters kept. A kept filter is ${(100 * seen.ownShare).toFixed(1)} % of its fused one; ` +
        `self-mass ${(100 * seen.selfMass).toFixed(1)} %; mean entropy ${seen.entropy.toFixed(2)} of at most ${Math.log(n).toFixed(2)} nats.`;
      box.dataset.ms = (performance.now() - began).toFixed(2);
      box.dataset.ownShare = seen.ownShare;
    }
    function half() { kept.max = current().n; kept.value = Math.round(current().n / 2); draw(); }
    controls.addEventListener("input", (event) => (event.target === layer ? half() : draw()));
    half();
  }
  document.querySelectorAll(".explorer:not([data-ms])").forEach(start);
})();
