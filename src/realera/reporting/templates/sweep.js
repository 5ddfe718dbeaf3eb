// Rotating surfaces: drag, or use the arrow keys. Each is drawn as SVG from its JSON; the table below it has the same numbers.
(() => {
  const NS = "http://www.w3.org/2000/svg", W = 440, H = 350, FINE = 4;
  const mix = (a, b, t) => a + (b - a) * t;
  const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
  const node = (name, at, parent) => {
    const made = document.createElementNS(NS, name);
    for (const key in at) made.setAttribute(key, at[key]);
    return parent.appendChild(made);
  };
  for (const figure of document.querySelectorAll("figure.surface")) {
    const d = JSON.parse(figure.querySelector("script").textContent);
    const svg = figure.querySelector("svg"), readout = figure.querySelector(".readout");
    const nx = d.x.labels.length, ny = d.y.labels.length;
    const [low, high] = d.span, z0 = d.z.ticks[0][0], z1 = d.z.ticks[d.z.ticks.length - 1][0];
    const stops = d.colours.map(rgb);
    const colour = (v) => {
      const t = high > low ? (v - low) / (high - low) * (stops.length - 1) : (stops.length - 1) / 2;
      const i = Math.max(0, Math.min(stops.length - 2, Math.floor(t)));
      return `rgb(${stops[i].map((c, k) => Math.round(mix(c, stops[i + 1][k], t - i)))})`;
    };
    let turn = -0.65, tilt = 0.5;
    const place = (i, j, v) => {  // 2D and depth of a point of the grid
      const x = nx > 1 ? 2 * i / (nx - 1) - 1 : 0, y = ny > 1 ? 2 * j / (ny - 1) - 1 : 0;
      const z = (v - z0) / (z1 - z0) - 0.5, c = Math.cos(turn), s = Math.sin(turn);
      const across = x * c - y * s, deep = x * s + y * c;
      return [W / 2 + 112 * across, H / 2 - 14 - 175 * z * Math.cos(tilt) - 112 * deep * Math.sin(tilt), deep];
    };
    const text = (at, words, extra = {}) =>
      (node("text", { x: at[0], y: at[1], "text-anchor": "middle", ...extra }, svg).textContent = words);
    const draw = () => {
      svg.replaceChildren();
      const line = (a, b, kind) => node("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1], class: kind }, svg);
      // Back walls, floor and front ticks.
      const backX = Math.sin(turn) > 0 ? nx - 1 : 0, backY = Math.cos(turn) > 0 ? ny - 1 : 0;
      const frontX = nx - 1 - backX, frontY = ny - 1 - backY;
      for (const [v, words] of d.z.ticks) {
        line(place(0, backY, v), place(nx - 1, backY, v), "wall");
        line(place(backX, 0, v), place(backX, ny - 1, v), "wall");
      }
      for (let i = 0; i < nx; i++) line(place(i, 0, z0), place(i, ny - 1, z0), "wall");
      for (let j = 0; j < ny; j++) line(place(0, j, z0), place(nx - 1, j, z0), "wall");
      const faces = [];
      for (let j = 0; j + 1 < ny; j++) for (let i = 0; i + 1 < nx; i++) {
        const corners = [d.values[j][i], d.values[j][i + 1], d.values[j + 1][i], d.values[j + 1][i + 1]];
        if (corners.some((c) => c === null)) continue;
        const [a, b, c, e] = corners.map((cell) => cell[0]);
        const at = (s, t) => mix(mix(a, b, s), mix(c, e, s), t);
        for (let q = 0; q < FINE; q++) for (let p = 0; p < FINE; p++) {
          const s = p / FINE, t = q / FINE, u = 1 / FINE;
          const points = [[s, t], [s + u, t], [s + u, t + u], [s, t + u]].map(([m, n]) => place(i + m, j + n, at(m, n)));
          const depth = points.reduce((sum, point) => sum + point[2], 0);
          faces.push([depth, points, colour(at(s + u / 2, t + u / 2))]);
        }
      }
      faces.sort((one, other) => other[0] - one[0]);
      for (const [, points, fill] of faces)
        node("polygon", { points: points.map((p) => `${p[0].toFixed(1)},${p[1].toFixed(1)}`).join(" "), fill, stroke: fill }, svg);
      d.values.forEach((cells, j) => cells.forEach((cell, i) => {
        if (!cell) return;
        line(place(i, j, cell[1]), place(i, j, cell[2]), "whisker");
        const at = place(i, j, cell[0]);
        node("circle", { cx: at[0], cy: at[1], r: 2.6, class: "vertex" }, svg);
        const aim = node("circle", { cx: at[0], cy: at[1], r: 12, fill: "transparent" }, svg);
        aim.addEventListener("pointerenter", () => say(i, j));
        aim.addEventListener("click", () => say(i, j));
      }));
      // Labels are outside the floor's front edges, so that the two labels at the shared corner do not overlap.
      const out = (front, count, share) => front + (front ? 1 : -1) * share * Math.max(1, count - 1);
      const label = (at, words, kind = {}) => text([at[0], at[1] + 4], words, kind);
      d.x.labels.forEach((words, i) => label(place(i, out(frontY, ny, 0.12), z0), words));
      d.y.labels.forEach((words, j) => label(place(out(frontX, nx, 0.12), j, z0), words));
      label(place((nx - 1) / 2, out(frontY, ny, 0.3), z0), d.x.name, { class: "name" });
      label(place(out(frontX, nx, 0.3), (ny - 1) / 2, z0), d.y.name, { class: "name" });
      const posts = [[backX, frontY], [frontX, backY]].sort((a, b) => place(...a, z0)[0] - place(...b, z0)[0]);
      for (const [v, words] of d.z.ticks) { const at = place(...posts[0], v); text([at[0] - 7, at[1] + 4], words, { "text-anchor": "end" }); }
    };
    const say = (i, j) => {
      const [v, l, h] = d.values[j][i].map((number) => number.toFixed(d.digits));
      readout.textContent = `${d.x.name} ${d.x.labels[i]}, ${d.y.name} ${d.y.labels[j]}: ${v} [${l}, ${h}]`;
    };
    let held = null;
    svg.addEventListener("pointerdown", (event) => { held = [event.clientX, event.clientY]; });
    svg.addEventListener("pointermove", (event) => {
      if (!held || !event.buttons) return;
      turn += (event.clientX - held[0]) / 120;
      tilt = Math.max(0.05, Math.min(1.4, tilt + (event.clientY - held[1]) / 160));
      held = [event.clientX, event.clientY];
      draw();
    });
    for (const name of ["pointerup", "pointercancel"]) svg.addEventListener(name, () => { held = null; });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
      if (!step) return;
      event.preventDefault();
      turn += step[0];
      tilt = Math.max(0.05, Math.min(1.4, tilt + step[1]));
      draw();
    });
    for (const cell of figure.querySelectorAll("td[data-at]")) {
      const [i, j] = cell.dataset.at.split(",").map(Number);
      cell.addEventListener("pointerenter", () => say(i, j));
      cell.addEventListener("click", () => say(i, j));
    }
    draw();
  }
})();
