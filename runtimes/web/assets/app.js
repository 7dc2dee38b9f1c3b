// Addresses become views, and keys and clicks become addresses. The address (its part after #) is all the state there is.

import * as api from "/api.js";
import { element, setLatex } from "/latex.js";
import { count, heading, links, notice, paperItem, progress, statementCard, statementList, titleOf } from "/views.js";

const POLL_MS = 400;
const TYPING_MS = 150;
const STATES = { uncomputed: "no vectors yet", computing: "embedding", broken: "broken" };
const [content, main, status, picker, query, filter, papersBox, paperList, morePapers, showPapers] = [
  "content", "main", "status", "collection", "query", "filter", "papers", "paper-list", "more-papers", "show-papers",
].map((id) => document.getElementById(id));

let question = 0; // the number of the view that was asked for last; an answer to an older one is dropped
let steps = 0; // views that Escape can go back over
let address = location.hash;
let listed = ""; // the collection whose papers are listed
const focused = new Map(); // address -> the row that had the focus there

function route() {
  const [name = "", view = "", ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  return { name: decode(name), view, argument: decode(rest.join("/")) };
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // an address that somebody typed
  }
}

function go(hash) {
  if (location.hash === hash) show();
  else location.hash = hash;
}

// Views: each gives its nodes, and in one line what they are.

const VIEWS = { "": overview, paper: showPaper, near: showNeighbours, search: showSearch };

async function overview(name, _, { rows, papers }) {
  const says = `${count(rows, "statement")} in ${count(papers, "paper")}`;
  const hint = "Words and LaTeX both do: what counts is what a statement says.";
  return { says, nodes: [notice("quiet", "Pick a paper, or search by meaning", hint)] };
}

async function showPaper(name, number) {
  const paper = await api.paper(name, number);
  const says = count(paper.statements.length, "statement");
  const identifier = paper.title ? [element("span", "identifier", paper.arxiv_id)] : [];
  return { says, nodes: [heading(setLatex(titleOf(paper)), ...identifier), statementList(name, paper.statements, false)] };
}

async function showNeighbours(name, argument) {
  const [row, others] = argument.split("/");
  const { statement, hits } = await api.neighbours(name, row, Boolean(others));
  const says = `${count(hits.length, "neighbour")}, the closest first`;
  const box = element("input");
  Object.assign(box, { type: "checkbox", checked: Boolean(others), id: "others" });
  box.addEventListener("change", () => go(links.near(name, row) + (box.checked ? "/others" : "")));
  const asked = statementCard(name, statement, true);
  asked.classList.add("asked");
  const option = element("label", "option", box, " only from other papers");
  return { says, nodes: [heading("Neighbours of"), asked, option, statementList(name, hits, true)] };
}

async function showSearch(name, text) {
  query.value = text;
  const { hits } = await api.search(name, text);
  const says = `${count(hits.length, "statement")}, the closest first`;
  const words = element("span", "asked-words");
  words.append(text.length <= 300 ? setLatex(text) : `${text.slice(0, 300)} …`);
  return { says, nodes: [heading("Closest to ", words), statementList(name, hits, true)] };
}

async function show() {
  const mine = (question += 1);
  const current = () => mine === question;
  main.setAttribute("aria-busy", "true");
  try {
    const found = await viewOf(route(), current);
    if (current() && found) place(found);
  } catch (error) {
    if (!(error instanceof api.Refused)) throw error;
    if (current()) fail(error.message);
  }
}

async function viewOf({ name, view, argument }, current) {
  if (!name) return start();
  if (!picker.options.length) await fillPicker();
  picker.value = name;
  let found = await api.describe(name);
  if (found.state === "uncomputed") {
    found = await api.compute(name);
    await fillPicker();
  }
  while (found.state === "computing" && current()) {
    clearPapers();
    content.replaceChildren(progress(name, found.done, found.total));
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    found = await api.describe(name);
    if (found.state !== "computing") await fillPicker();
  }
  if (!current()) return null;
  if (found.reason) throw new api.Refused(found.reason);
  await listPapers(name);
  if (!current()) return null;
  document.title = `${name} · Statements`;
  return (VIEWS[view] ?? overview)(name, argument, found);
}

/** The first collection that is ready; nothing is computed unasked. */
async function start() {
  const collections = await fillPicker();
  const ready = collections.find(({ state }) => state === "ready");
  picker.value = ready?.name ?? "";
  if (ready) location.replace(links.collection(ready.name));
  if (ready) return null;
  const hint = collections.length
    ? notice("quiet", "Pick a collection", "None is ready. One without vectors gets them when you pick it.")
    : notice("quiet", "No collections here", "Precompute one, or put a .jsonl file of statements into the folder.");
  return { says: "", nodes: [hint] };
}

function place({ says, nodes }) {
  main.removeAttribute("aria-busy");
  say(says);
  content.replaceChildren(...nodes);
  const { view, argument } = route();
  for (const item of paperList.querySelectorAll("a")) {
    if (view === "paper" && item.dataset.paper === argument) item.setAttribute("aria-current", "page");
    else item.removeAttribute("aria-current");
  }
  window.scrollTo(0, 0);
  const row = focused.get(location.hash);
  const target = content.querySelector(`.statements .statement${row ? `[data-row="${row}"]` : ""}`);
  if (steps > 0 && document.activeElement !== filter) (target ?? main).focus({ preventScroll: !row });
}

function fail(message) {
  if (listed && listed !== route().name) clearPapers();
  place({ says: "", nodes: [notice("wrong", "This cannot be shown", message)] });
}

const say = (line) => { status.textContent = line; };

// The list of papers.

async function listPapers(name) {
  if (listed === name) return;
  filter.value = "";
  await fillPapers(name, 0);
  if (name === route().name) listed = name;
}

async function fillPapers(name, start) {
  const wanted = filter.value;
  const { total, papers } = await api.papers(name, wanted, start);
  const late = start && start !== paperList.children.length; // another click was faster
  if (wanted !== filter.value || name !== route().name || late) return;
  if (!start) paperList.replaceChildren();
  paperList.append(...papers.map((paper) => paperItem(name, paper)));
  papersBox.hidden = false;
  document.getElementById("paper-count").textContent = count(total, "paper");
  morePapers.hidden = start + papers.length >= total;
}

function clearPapers() {
  listed = "";
  paperList.replaceChildren();
  papersBox.hidden = true;
}

async function fillPicker() {
  const { collections } = await api.listCollections();
  const chosen = route().name;
  picker.replaceChildren(...collections.map(({ name, state, rows }) => {
    const option = element("option", "", `${name} (${STATES[state] ?? rows.toLocaleString("en")})`);
    option.value = name;
    return option;
  }));
  picker.value = chosen;
  return collections;
}

const attempt = (act) => act().catch((error) => {
  if (!(error instanceof api.Refused)) throw error;
  fail(error.message);
});

// Hands: clicks, typing, keys.

picker.addEventListener("change", () => go(links.collection(picker.value)));
morePapers.addEventListener("click", () => attempt(() => fillPapers(listed, paperList.children.length)));
showPapers.addEventListener("click", () => unfoldPapers(showPapers.getAttribute("aria-expanded") !== "true"));

function unfoldPapers(open) {
  showPapers.setAttribute("aria-expanded", String(open));
  showPapers.parentElement.classList.toggle("open", open);
}

let typing = 0;
filter.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => listed && attempt(() => fillPapers(listed, 0)), TYPING_MS);
});

document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = query.value.trim();
  if (!text) say("Type a few words or a formula first.");
  else if (picker.value) go(links.search(picker.value, text));
});

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is the view's
  main.focus();
});

content.addEventListener("click", (event) => {
  const card = event.target.closest(".statements .statement");
  const chosen = String(getSelection()); // who marks words to copy them does not want to leave
  if (card && !event.target.closest("a, button") && !chosen) openNeighbours(card);
});

content.addEventListener("focusin", (event) => {
  const card = event.target.closest(".statements .statement");
  if (card) focused.set(location.hash, card.dataset.row);
});

const openNeighbours = (card) => go(links.near(route().name, card.dataset.row));
const openPaper = (card) => go(links.paper(route().name, card.dataset.paper));
const atCard = () => document.activeElement?.closest(".statement");

/** The focus on the next or previous statement, or paper where the focus is among the papers. */
function move(by) {
  const among = document.activeElement?.closest("#papers") ? paperList.querySelectorAll("a") : content.querySelectorAll(".statement");
  const all = [...among];
  const now = all.indexOf(document.activeElement);
  const next = all[now < 0 ? 0 : Math.max(0, Math.min(all.length - 1, now + by))];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

function back() {
  if (steps > 0) {
    steps -= 2; // going back is a step too
    history.back();
  } else if (route().view) go(links.collection(route().name));
}

const KEYS = {
  "/": () => query.select(),
  j: () => move(1),
  k: () => move(-1),
  ArrowDown: () => move(1),
  ArrowUp: () => move(-1),
  Escape: back,
  p: () => atCard() && openPaper(atCard()),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typed = event.target.closest("input[type=search], select");
  if (typed) {
    if (event.key === "Escape" || (event.key === "ArrowDown" && typed !== picker)) {
      event.preventDefault();
      typed.blur();
      if (typed === filter && event.key === "ArrowDown") paperList.querySelector("a")?.focus();
      else (content.querySelector(".statement") ?? main).focus();
    }
  } else if (event.key === "Enter" && event.target.matches(".statement")) {
    openNeighbours(event.target);
  } else if (event.key in KEYS) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

window.addEventListener("hashchange", () => {
  steps += 1;
  if (address !== location.hash && route().view !== "search") query.value = "";
  address = location.hash;
  unfoldPapers(false);
  show();
});

// Light and dark: the system's choice until the button is used.

const theme = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const kept = localStorage.getItem("theme");
if (kept) document.documentElement.dataset.theme = kept;
theme.addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  localStorage.setItem("theme", (document.documentElement.dataset.theme = now === "dark" ? "light" : "dark"));
});

show();
