"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const cells = new Map(all("td.c").map((cell) => [cell.dataset.i + "," + cell.dataset.t, cell]));
  const slider = document.getElementById("loop");
  const detail = document.getElementById("detail");
  const table = document.getElementById("table");
  let chosen = { i: data.tokens.length - 1, t: data.loops };
  let hovered = null;
  let touched = false;
  // drawn in the order of the tokens and the loops; paths begin at h_0
  for (const svg of all("svg.paths, svg.changes"))
    for (const kind of [".way", ".name"])
      svg.querySelectorAll(kind).forEach((node, i) => {
        node.dataset.i = i;
        node.querySelectorAll("circle").forEach((dot, t) => { dot.dataset.t = t + svg.matches(".changes"); });
      });

  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const percent = (p) =>
    p === null ? "not finite" : p < 0.0005 ? "<0.1 %" : (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toFixed(1)) + " %";

  function describe({ i, t }) {
    const token = data.tokens[i];
    const title = element("h3", null);
    title.append(element("code", token.text), ", loop " + t);
    const list = element("ol", null);
    for (const [, text, p] of token.predictions[t - 1]) {
      const item = element("li", null, { style: "--p:" + p });
      item.append(element("code", text), element("span", percent(p)));
      list.append(item);
    }
    const facts = element("dl", null);
    const fact = (name, value) => facts.append(element("dt", name), element("dd", value));
    if (token.goal !== null) fact("expected", token.goal + ", " + percent(token.goal_probability[t - 1]));
    fact("relative change", percent(token.change[t - 1]));
    if (token.experts.length) fact("experts", token.experts[t - 1].map((e) => e.join(" ")).join(" / "));
    if (token.exit !== null) fact("exit", token.exit < data.loops ? "loop " + token.exit : "none");
    detail.replaceChildren(title, list, facts);
  }

  function show() {
    const at = hovered || chosen;
    describe(at);
    const experts = (data.tokens[at.i].experts[at.t - 1] || []);
    const same = (node, key, value) => node.dataset[key] === String(value);
    for (const node of all("tr[data-i], .way, .name")) node.classList.toggle("now", same(node, "i", at.i));
    for (const node of all("th[data-t], .way circle")) node.classList.toggle("now", same(node, "t", at.t));
    for (const [key, cell] of cells) {
      const now = key === at.i + "," + at.t;
      cell.classList.toggle("now", now);
      cell.tabIndex = key === chosen.i + "," + chosen.t ? 0 : -1;
    }
    for (const node of all(".hops td"))
      node.classList.toggle("now", same(node, "i", at.i) && same(node, "t", at.t));
    all(".experts table").forEach((made, layer) => {
      const picked = data.tokens[at.i].experts;
      for (const row of [...made.rows].slice(1))
        for (const node of [...row.cells].slice(1))
          node.classList.toggle("now", picked[row.rowIndex - 1][layer].includes(node.cellIndex - 1));
    });
    // all paths look the same until one is selected
    for (const svg of all("svg.paths, svg.changes")) svg.classList.toggle("picked", touched || hovered !== null);
    slider.value = at.t;
    document.getElementById("loop-now").textContent = at.t;
  }

  function choose(i, t, focus) {
    chosen = { i: Math.max(0, Math.min(data.tokens.length - 1, i)), t: Math.max(1, Math.min(data.loops, t)) };
    hovered = null;
    touched = true;
    show();
    const cell = cells.get(chosen.i + "," + chosen.t);
    if (focus) cell.focus();
    // scroll the column into view, right of the sticky first column
    const fixed = table.querySelector("th.word").offsetWidth;
    const left = cell.offsetLeft - fixed;
    const right = cell.offsetLeft + cell.offsetWidth - table.clientWidth;
    table.scrollLeft = Math.max(right, Math.min(left, table.scrollLeft));
  }

  const place = (node) => ({ i: Number(node.dataset.i), t: Number(node.dataset.t) });
  table.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("td.c");
    hovered = cell && event.pointerType === "mouse" ? place(cell) : null;
    show();
  });
  table.addEventListener("pointerleave", () => { hovered = null; show(); });
  table.addEventListener("click", (event) => {
    const cell = event.target.closest("td.c");
    const row = event.target.closest("tr[data-i]");
    if (cell) choose(place(cell).i, place(cell).t, false);
    else if (row) choose(place(row).i, chosen.t, false);
  });
  table.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(chosen.i + step[0], chosen.t + step[1], true);
  });
  slider.addEventListener("input", () => choose(chosen.i, Number(slider.value), false));
  for (const way of all(".way, .hops td"))
    way.addEventListener("click", () => choose(place(way).i, place(way).t || chosen.t, false));

  document.documentElement.classList.add("script");
  show();
})();
