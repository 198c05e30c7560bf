"use strict";
// Sorts the headline, shows and filters the cases, and offers the data as files. Texts become text nodes only.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50; // cases shown at once

function element(tag, style, ...content) {
  const made = document.createElement(tag);
  if (style) made.className = style;
  made.append(...content.filter((part) => part !== null && part !== undefined));
  return made;
}

// ---------------------------------------------------------------- headline

const table = document.querySelector(".headline");
const choice = document.querySelector(".sort");

function sortBy(column, sign) {
  const button = table.querySelector(`button[data-column="${column}"]`);
  const head = button.closest("th");
  const was = head.ariaSort;
  const first = sign > 0 ? "descending" : "ascending"; // the best on top
  const now = was === first ? (first === "ascending" ? "descending" : "ascending") : first;
  for (const other of table.querySelectorAll("th[aria-sort]")) other.ariaSort = "none";
  head.ariaSort = now;
  const turn = now === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what is not known is last
    return turn * (column === 0 ? x.localeCompare(y) : Number(x) - Number(y));
  });
  table.tBodies[0].append(...rows);
  choice.value = column;
}

for (const button of table.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(Number(button.dataset.column), Number(button.dataset.sign)));
}
choice.addEventListener("change", () => table.querySelector(`button[data-column="${choice.value}"]`).click());

// ---------------------------------------------------------------- cases

const form = document.querySelector(".filters");
const list = document.getElementById("list");
const more = document.getElementById("more");
const LONGEST = 4; // tokens; longer targets are one group
const length = (item) =>
  item.tokens === null ? "" : item.tokens < LONGEST ? String(item.tokens) : `${LONGEST} or more`;
let found = [];
let only = null; // the case that a link leads to

function fill(name, values) {
  const known = [...new Set(values.filter((value) => value))].sort();
  form[name].append(...known.map((value) => new Option(value, value)));
  form[name].parentElement.hidden = known.length < 2;
}

function fits(item) {
  if (only !== null) return item.id === only;
  const text = form.text.value.trim().toLowerCase();
  if (form.relation.value && item.relation !== form.relation.value) return false;
  if (form.tokens.value && length(item) !== form.tokens.value) return false;
  if (form.state.value) {
    const states = form.run.value === "" ? item.states : [item.states[form.run.value]];
    const test = { failed: (s) => s.worked === false, worked: (s) => s.worked === true, changed: (s) => s.kept === false };
    if (!states.some(test[form.state.value])) return false;
  }
  return !text || JSON.stringify([item.id, item.probes]).toLowerCase().includes(text);
}

function verdict(yes, right, wrong) {
  return yes === null ? null : element("span", `verdict ${yes ? "good" : "bad"}`, yes ? `✓ ${right}` : `✗ ${wrong}`);
}

function answer(run, given) {
  const text = given.text === null ? "–" : given.text;
  const kept = verdict(given.unchanged, "unchanged", "changed");
  return [element("dt", "", run.name), element("dd", "", text, verdict(given.correct, "correct", "incorrect"), kept)];
}

function probe(item) {
  const chosen = form.run.value;
  const rows = data.runs.flatMap((run, i) => (chosen === "" || chosen === String(i) ? answer(run, item.answers[i]) : []));
  const before = item.before === null ? [] : [element("dt", "soft", "before the edit"), element("dd", "", item.before)];
  return element("div", "probe",
    element("p", "soft", item.criterion),
    element("p", "", item.prompt),
    element("dl", "answers", element("dt", "soft", "expected"), element("dd", "", item.expected), ...before, ...rows));
}

function show(item) {
  const mark = (state) => element("span", state.worked ? "good" : "bad", state.worked === null ? "–" : state.worked ? "✓" : "✗");
  const link = element("a", "", "#");
  link.href = `#case=${encodeURIComponent(item.id)}`;
  link.title = "link to this case";
  const head = element("summary", "", element("span", "", item.id), link,
    element("span", "soft", item.relation), element("span", "marks", ...item.states.map(mark)));
  const made = element("details", "case", head);
  made.addEventListener("toggle", () => {
    if (made.open && made.children.length === 1) made.append(...item.probes.map(probe));
  });
  return made;
}

function refresh() {
  found = data.cases.filter(fits);
  form.querySelector("output").value = `${found.length} of ${data.cases.length} cases`;
  list.replaceChildren();
  showMore();
}

function showMore() {
  const from = list.children.length;
  list.append(...found.slice(from, from + PAGE).map(show));
  more.hidden = list.children.length >= found.length;
}

function select(values) {
  only = null;
  form.reset();
  for (const [name, value] of Object.entries(values)) if (form[name]) form[name].value = value;
  refresh();
}

function follow() { // a link to one case: report.html#case=ID
  if (!location.hash.startsWith("#case=")) return;
  const id = decodeURIComponent(location.hash.slice("#case=".length));
  if (!data.cases.some((item) => item.id === id)) return;
  form.reset();
  only = id;
  refresh();
  list.firstChild.open = true;
  list.scrollIntoView();
}

fill("relation", data.cases.map((item) => item.relation));
fill("tokens", data.cases.map(length));
form.addEventListener("input", () => { only = null; refresh(); });
form.addEventListener("submit", (event) => event.preventDefault());
form.querySelector("button").addEventListener("click", () => select({}));
more.addEventListener("click", showMore);
for (const link of document.querySelectorAll('a[href="#cases"]')) {
  link.addEventListener("click", () => select({ ...link.dataset }));
}
addEventListener("hashchange", follow);
refresh();
follow();

// ---------------------------------------------------------------- files

function asCsv(rows) {
  return rows.map((row) => row.map((cell) => `"${String(cell ?? "").replaceAll('"', '""')}"`).join(",")).join("\n") + "\n";
}

function answersCsv() {
  const rows = [["case", "relation", "run", "criterion", "prompt", "expected", "before", "answer", "correct", "unchanged"]];
  for (const item of data.cases) for (const asked of item.probes) {
    data.runs.forEach((run, i) => {
      const given = asked.answers[i];
      rows.push([item.id, item.relation, run.name, asked.criterion, asked.prompt, asked.expected, asked.before,
        given.text, given.correct, given.unchanged]);
    });
  }
  return asCsv(rows);
}

const FILES = {
  "report.csv": ["text/csv", () => data.csv],
  "cases.csv": ["text/csv", answersCsv],
  "report.json": ["application/json", () => JSON.stringify({ ...data, csv: undefined }, null, 1)],
};
for (const button of document.querySelectorAll("[data-file]")) {
  button.addEventListener("click", () => {
    const [type, write] = FILES[button.dataset.file];
    const link = element("a", "");
    link.href = URL.createObjectURL(new Blob([write()], { type }));
    link.download = button.dataset.file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
