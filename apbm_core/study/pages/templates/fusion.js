/* The arithmetic of one layer: similarity.py, and the choice and mixing of fusion.py and variants.py, on small matrices.
   A layer is {n, distance: Float64Array(n*n) Euclidean, norm: [n] of length 2, l1: [n]}. */
(function (root) {
  "use strict";

  function unpack(layer) { // what explorer.py packs: the upper triangle as float32 in base64
    const bytes = Uint8Array.from(atob(layer.triangle), (c) => c.charCodeAt(0));
    const triangle = new Float32Array(bytes.buffer), n = layer.n, distance = new Float64Array(n * n);
    for (let i = 0, k = 0; i < n; i++) for (let j = i + 1; j < n; j++, k++)
      distance[i * n + j] = distance[j * n + i] = triangle[k];
    return { n, distance, norm: layer.norm, l1: layer.l1 };
  }

  function distances(layer, metric) { // cosine: of the filters at unit length, from |a - b| and both lengths
    if (metric !== "cosine") return layer.distance;
    const { n, distance, norm } = layer, out = new Float64Array(n * n);
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) {
      if (i === j) continue;
      const a = norm[i], b = norm[j], d = distance[i * n + j];
      out[i * n + j] = a && b ? Math.sqrt(Math.max(0, 2 - (a * a + b * b - d * d) / (a * b))) : +(a > 0 || b > 0);
    }
    return out;
  }

  function scaleFree(distance, n) { // in units of the layer's mean distance between two filters
    let sum = 0;
    for (const d of distance) sum += d;
    const mean = sum / (n * (n - 1));
    return mean > 0 ? distance.map((d) => d / mean) : distance;
  }

  function logSimilarity(distance, n, temperature) {
    const out = new Float64Array(n * n);
    for (let i = 0; i < n; i++) {
      let top = -Infinity, sum = 0;
      for (let j = 0; j < n; j++) top = Math.max(top, (out[i * n + j] = -temperature * distance[i * n + j]));
      for (let j = 0; j < n; j++) sum += Math.exp(out[i * n + j] - top);
      const norm = top + Math.log(sum);
      for (let j = 0; j < n; j++) out[i * n + j] -= norm;
    }
    return out;
  }

  function entropy(logP, n) {
    return Array.from({ length: n }, (_, i) => {
      let sum = 0;
      for (let j = 0; j < n; j++) sum -= Math.exp(logP[i * n + j]) * logP[i * n + j];
      return sum;
    });
  }

  function relativeEntropy(logP, n) {
    const mean = new Float64Array(n);
    for (let k = 0; k < n; k++) for (let j = 0; j < n; j++) mean[j] += logP[k * n + j] / n;
    return Array.from({ length: n }, (_, i) => {
      let sum = 0;
      for (let j = 0; j < n; j++) sum += Math.exp(logP[i * n + j]) * (logP[i * n + j] - mean[j]);
      return n * sum;
    });
  }

  function importance(layer, logP, score) {
    const n = layer.n;
    if (score === "entropy") return entropy(logP, n).map((h) => -h);
    if (score === "l1") return Array.from(layer.l1);
    if (score === "order") return Array.from({ length: n }, (_, i) => -i);
    return relativeEntropy(logP, n);
  }

  function chosen(values, m) {
    const order = values.map((v, i) => i).sort((a, b) => values[b] - values[a] || a - b);
    return order.slice(0, m).sort((a, b) => a - b);
  }

  function mixture(logP, n, kept, mass) { // P, a row for each kept filter
    const is = new Uint8Array(n), m = kept.length, P = new Float64Array(m * n);
    kept.forEach((i) => (is[i] = 1));
    if (mass === "assigned") {
      kept.forEach((i, r) => (P[r * n + i] = 1));
      for (let j = 0; j < n; j++) {
        if (is[j]) continue;
        let sum = 0;
        const top = Math.max(...kept.map((i) => logP[j * n + i]));
        kept.forEach((i) => (sum += Math.exp(logP[j * n + i] - top)));
        kept.forEach((i, r) => (P[r * n + j] = Math.exp(logP[j * n + i] - top) / sum));
      }
    } else
      kept.forEach((i, r) => {
        for (let j = 0; j < n; j++)
          if (mass === "all" || j === i || !is[j]) P[r * n + j] = Math.exp(logP[i * n + j]);
      });
    if (mass !== "all")
      for (let r = 0; r < m; r++) {
        let sum = 0;
        for (let j = 0; j < n; j++) sum += P[r * n + j];
        for (let j = 0; j < n; j++) P[r * n + j] /= sum;
      }
    return P;
  }

  /* Everything at one setting {tau, m, metric, score, mass}. */
  function look(layer, setting) {
    const n = layer.n;
    const distance = scaleFree(distances(layer, setting.metric), n);
    const logP = logSimilarity(distance, n, setting.tau * Math.log(Math.max(n, 2)));
    const scores = importance(layer, logP, setting.score), kept = chosen(scores, setting.m);
    const P = mixture(logP, n, kept, setting.mass), H = entropy(logP, n);
    const share = kept.map((i, r) => {
      let sum = 0;
      for (let j = 0; j < n; j++) sum += P[r * n + j];
      return P[r * n + i] / sum;
    });
    let self = 0;
    for (let i = 0; i < n; i++) self += Math.exp(logP[i * n + i]) / n;
    const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
    return { logP, scores, kept, P, share, ownShare: mean(share), selfMass: self, entropy: mean(H) };
  }

  root.APBM = { unpack, distances, scaleFree, logSimilarity, entropy, relativeEntropy, importance, mixture, look };
})(globalThis);
