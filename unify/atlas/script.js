// Theme, keys, search and filters, comparison. Every page reads without it; no page loads anything by it.
"use strict";

// --- theme: as the system has it, until the reader says otherwise ---------------------------------------------------

const THEME = "unify-atlas-theme";

function remembered() {
  try { return localStorage.getItem(THEME); } catch { return null; } // storage may be refused, as for files
}

function choose(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem(THEME, theme); } catch { /* it then holds for this page */ }
}

if (remembered()) document.documentElement.dataset.theme = remembered();

function dark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function themeButton() {
  const button = document.getElementById("theme");
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", `${button.textContent} theme`); };
  button.hidden = false;
  button.addEventListener("click", () => { choose(dark() ? "light" : "dark"); name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
}

// --- boxes that scroll can be reached by keyboard, others are no stop -------------------------------------------------

function scrollers() {
  for (const box of document.querySelectorAll("[data-label]:not(template)")) {
    const wide = box.scrollWidth > box.clientWidth;
    const role = box.matches("td") ? "cell" : "region";
    for (const [name, value] of [["tabindex", "0"], ["role", role], ["aria-label", `${box.dataset.label}, scrolls sideways`]]) {
      if (wide) box.setAttribute(name, value); else box.removeAttribute(name);
    }
  }
}

// --- keys -------------------------------------------------------------------------------------------------------------

function keys(event) {
  const search = document.getElementById("search");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    search.focus();
    search.select();
  } else if (event.key === "Escape" && event.target === search) {
    search.value = "";
    search.dispatchEvent(new Event("input"));
    search.blur();
  }
}

// --- the map: one stop for the keyboard, arrows walk it ---------------------------------------------------------------

function walk(svg) {
  const nodes = [...svg.querySelectorAll(".node")];
  const edges = [...svg.querySelectorAll(".edge")];
  const find = (name) => nodes.find((node) => node.dataset.model === name);
  const shown = (one) => !one.classList.contains("off");
  let here = null; // the model whose edges n and p walk through

  const settle = (node) => { for (const one of [...nodes, ...edges]) one.tabIndex = one === node ? 0 : -1; };
  const visit = (one) => { settle(one); one.focus(); };
  const middle = (one) => { const box = one.getBBox(); return [box.x + box.width / 2, box.y + box.height / 2]; };
  const touching = (node) => edges.filter((edge) => shown(edge) && [edge.dataset.parent, edge.dataset.child].includes(node.dataset.model));

  function beside(node, [dx, dy]) { // the nearest model in a direction, straight ahead counting as nearer
    const [x, y] = middle(node);
    let best = null, least = Infinity;
    for (const other of nodes.filter((one) => one !== node && shown(one))) {
      const [u, v] = middle(other);
      const ahead = (u - x) * dx + (v - y) * dy, aside = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
      if (ahead > 1 && ahead + 2.5 * aside < least) [best, least] = [other, ahead + 2.5 * aside];
    }
    return best;
  }

  function look(one) { // what is around a model or an edge stands out
    const near = new Set([one]);
    if (one?.matches(".node")) for (const edge of touching(one)) near.add(edge).add(find(edge.dataset.parent)).add(find(edge.dataset.child));
    if (one?.matches(".edge")) near.add(find(one.dataset.parent)).add(find(one.dataset.child));
    svg.classList.toggle("looking", Boolean(one));
    for (const each of [...nodes, ...edges]) each.classList.toggle("near", Boolean(one) && near.has(each));
  }

  svg.addEventListener("keydown", (event) => {
    const at = document.activeElement.closest(".node, .edge");
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!at) return;
    if (at.matches(".node")) here = at;
    if (arrow) {
      const next = at.matches(".edge") ? here ?? find(at.dataset.parent) : beside(at, arrow);
      if (next) visit(next);
    } else if ("np".includes(event.key)) {
      const mine = touching(here ?? find(at.dataset.parent));
      const n = mine.indexOf(at), step = event.key === "n" ? 1 : -1;
      if (mine.length) visit(mine[n < 0 ? (step > 0 ? 0 : mine.length - 1) : (n + step + mine.length) % mine.length]);
    } else if (event.key === "Escape") {
      if (at.matches(".edge")) visit(here ?? find(at.dataset.parent)); else { at.blur(); look(null); }
    } else return;
    event.preventDefault();
  });
  for (const [start, stop] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
    svg.addEventListener(start, (event) => look(event.target.closest(".node, .edge")));
    svg.addEventListener(stop, () => look(null));
  }
  settle(nodes[0]);
  return () => settle(nodes.find((node) => shown(node) && node.tabIndex === 0) ?? nodes.find(shown));
}

// --- search and filters -----------------------------------------------------------------------------------------------

function index() {
  const form = document.getElementById("filters"), search = document.getElementById("search");
  const models = [...document.querySelectorAll("#models tr[data-model]")];
  const pairs = [...document.querySelectorAll("#edges tr[data-parent]")];
  const svg = document.querySelector(".map svg"), reachable = walk(svg);
  const show = (one, wanted) => {
    one.classList.toggle("off", !wanted);
    if (one.matches("a")) one.setAttribute("aria-hidden", String(!wanted)); // a model stays on the map, as a shadow
  };

  function apply() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const asked = [...new FormData(form)].filter(([, value]) => value).map(([key, value]) => `${key}=${value}`);
    const says = (row) => words.every((word) => row.dataset.text.includes(word));
    const has = (row) => asked.every((one) => row.dataset.choices.split(" ").includes(one));
    const allowed = new Set(models.filter(has).map((row) => row.dataset.model));
    const zoo = new Set(models.map((row) => row.dataset.model));
    const open = (row) => !asked.length || [row.dataset.parent, row.dataset.child].every((name) => allowed.has(name) || !zoo.has(name));
    const found = pairs.filter((row) => open(row) && says(row));
    const named = new Set(models.filter((row) => allowed.has(row.dataset.model) && says(row)).map((row) => row.dataset.model));
    for (const row of models) show(row, named.has(row.dataset.model));
    for (const row of pairs) show(row, found.includes(row));
    const kept = new Set(found.map((row) => `${row.dataset.parent} ${row.dataset.child}`));
    const ends = new Set(words.length ? found.flatMap((row) => [row.dataset.parent, row.dataset.child]) : []);
    for (const node of svg.querySelectorAll(".node")) show(node, named.has(node.dataset.model) || (ends.has(node.dataset.model) && !named.size));
    for (const edge of svg.querySelectorAll(".edge")) {
      const both = [edge.dataset.parent, edge.dataset.child].every((name) => !svg.querySelector(`[data-model="${name}"]`).classList.contains("off"));
      show(edge, both && (named.size > 1 || kept.has(`${edge.dataset.parent} ${edge.dataset.child}`)));
    }
    for (const select of form.querySelectorAll("select")) select.classList.toggle("set", Boolean(select.value));
    const count = found.reduce((sum, row) => sum + Number(row.dataset.count), 0);
    const all = !words.length && !asked.length;
    document.getElementById("count").textContent = `${all ? "All " : ""}${named.size} ${all ? "" : `of ${models.length} `}models and ${count} edges.`;
    reachable();
    scrollers();
  }

  form.hidden = false;
  search.value = new URLSearchParams(location.search).get("q") ?? "";
  search.addEventListener("input", apply);
  search.form.addEventListener("submit", (event) => { event.preventDefault(); document.getElementById("models").scrollIntoView(); });
  form.addEventListener("change", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => { search.value = ""; setTimeout(apply); });
  apply();
}

// --- two models side by side ------------------------------------------------------------------------------------------

function element(tag, text = "", options = {}) {
  const made = Object.assign(document.createElement(tag), { textContent: text });
  for (const [name, value] of Object.entries(options)) made.setAttribute(name, value);
  return made;
}

function compare() {
  const form = document.getElementById("choose"), result = document.getElementById("result");
  const asked = new URLSearchParams(location.search);
  const names = [...form.elements.a.options].map((option) => option.value);
  const pick = (side, otherwise) => (names.includes(asked.get(side)) ? asked.get(side) : otherwise);
  const [a, b] = [pick("a", "mamba2"), pick("b", "palimpsa")];
  form.elements.a.value = a;
  form.elements.b.value = b;
  form.addEventListener("change", () => form.requestSubmit());
  const sides = [a, b].map((name) => document.getElementById(`model-${name}`));
  const rows = sides.map((side) => [...side.content.querySelectorAll("tr")]);
  const labels = sides.map((side) => side.dataset.label);

  const table = element("table", "", { role: "table" });
  table.append(element("caption", `${labels[0]} beside ${labels[1]}`, { class: "unseen" }), heading(sides));
  let different = 0, total = 0;
  for (const section of new Set(rows.flat().map((row) => row.dataset.section))) {
    const [left, right] = rows.map((some) => new Map(some.filter((row) => row.dataset.section === section).map((row) => [row.dataset.key, row])));
    const body = table.appendChild(element("tbody", "", { role: "rowgroup" }));
    body.append(element("tr", "", { role: "row" }));
    body.firstChild.append(element("th", section, { colspan: 3, scope: "colgroup", role: "columnheader" }));
    for (const key of new Set([...left.keys(), ...right.keys()])) {
      const line = body.appendChild(pairOf([left.get(key), right.get(key)], labels));
      total += 1;
      different += line.classList.contains("differs");
    }
  }
  const box = element("div", "", { class: "scroll", "data-label": "Comparison" });
  box.append(table);
  result.replaceChildren(box);
  verdict(a, b, labels, different, total);
  const only = document.getElementById("only");
  only.hidden = document.getElementById("explained").hidden = false;
  only.addEventListener("change", () => result.classList.toggle("only", only.querySelector("input").checked));
}

function heading(sides) {
  const head = element("thead", "", { role: "rowgroup" }), row = head.appendChild(element("tr", "", { role: "row" }));
  row.append(element("th", "", { scope: "col", role: "columnheader" }));
  row.lastChild.append(element("span", "What", { class: "unseen" }));
  for (const side of sides) {
    const cell = row.appendChild(element("th", "", { scope: "col", role: "columnheader" }));
    cell.append(element("a", side.dataset.label, { href: side.dataset.href }));
  }
  return head;
}

function pairOf(both, labels) { // a line of the comparison: sign and what, then the two cells
  const same = both[0] && both[1] && both[0].dataset.same === both[1].dataset.same;
  const line = element("tr", "", { class: same ? "alike" : "differs", role: "row" });
  const head = line.appendChild(element("th", "", { scope: "row", role: "rowheader" }));
  head.append(element("span", same ? "=" : "≠", { class: "sign", "aria-hidden": "true" }), element("span", same ? "same: " : "differs: ", { class: "unseen" }));
  head.append(...what(both.filter(Boolean).map((row) => row.querySelector("th"))));
  both.forEach((row, n) => {
    const cell = line.appendChild(element("td", row ? "" : "not in it", { role: "cell", "data-side": labels[n] }));
    if (!row) cell.classList.add("absent"); else cell.append(...row.querySelector("td").cloneNode(true).childNodes);
    if (row && !same) marked(cell, both[1 - n], labels[n]);
    if (cell.querySelector("math")) cell.dataset.label = labels[n];
  });
  return line;
}

function what(names) { // "predict S" beside "predict M" is said once: predict S / M
  const [first, second] = names.map((name) => name.textContent);
  if (names.length < 2 || first === second) return names[0].cloneNode(true).childNodes;
  const phase = `${first.split(" ")[0]} `;
  return [`${first} / ${second.startsWith(phase) ? second.slice(phase.length) : second}`];
}

function marked(cell, other, label) { // what the other does not have: term by term in a formula, else the whole cell
  const terms = [...cell.querySelectorAll("[data-term]")];
  const theirs = new Set([...(other?.querySelectorAll("[data-term]") ?? [])].map((term) => term.dataset.term));
  const own = terms.filter((term) => !theirs.has(term.dataset.term));
  if (!terms.length) {
    const mark = element("mark");
    mark.append(...cell.childNodes);
    cell.append(mark);
  }
  for (const term of own) term.classList.add("differs");
  if (own.length) cell.append(element("span", ` (${own.length === 1 ? "the underlined term is" : `${own.length} underlined terms are`} in ${label} only)`, { class: "unseen" }));
}

function verdict(a, b, labels, different, total) {
  const says = different ? `${labels[0]} and ${labels[1]} differ in ${different} of ${total} lines.` : `${labels[0]} and ${labels[1]} are the same in all ${total} lines.`;
  document.getElementById("verdict").textContent = says;
  document.title = `${labels.join(" and ")} · unify atlas`;
  const links = JSON.parse(document.getElementById("links").textContent), related = document.getElementById("related");
  for (const pair of [`${a} ${b}`, `${b} ${a}`].filter((key) => links[key])) {
    related.append(element("a", `${links[pair][0]}, proved`, { href: links[pair][1] }), " ");
  }
}

document.addEventListener("DOMContentLoaded", () => {
  themeButton();
  document.addEventListener("keydown", keys);
  if (document.getElementById("filters")) index();
  if (document.getElementById("choose")) compare();
  scrollers();
  addEventListener("resize", scrollers);
  document.addEventListener("toggle", scrollers, true);
});
