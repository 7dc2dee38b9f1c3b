// What the page shows, as nodes: statements, papers, notices. Nothing here asks the server or listens to keys.

import { element, setLatex } from "/latex.js";

const LONG = 4000; // characters beyond which a statement is cut until it is asked for
const LONGEST_SET = 20000; // and beyond which its LaTeX is shown as written

export const links = {
  collection: (name) => `#/${encodeURIComponent(name)}`,
  paper: (name, number) => `#/${encodeURIComponent(name)}/paper/${number}`,
  near: (name, row) => `#/${encodeURIComponent(name)}/near/${row}`,
  search: (name, text) => `#/${encodeURIComponent(name)}/search/${encodeURIComponent(text)}`,
};

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** A list of statements. Each can be focused, and is a way to its neighbours; with `titles`, to its paper too. */
export function statementList(name, statements, titles) {
  const list = element("ol", "statements");
  for (const statement of statements) list.append(element("li", "", statementCard(name, statement, titles)));
  return list;
}

export function statementCard(name, statement, titles) {
  const card = element("article", "statement");
  card.tabIndex = 0;
  Object.assign(card.dataset, { row: statement.row, paper: statement.paper });
  const head = element("header", "", element("span", "kind", statement.type));
  if (titles) head.append(link(links.paper(name, statement.paper), "from", setLatex(titleOf(statement))));
  if (titles && statement.title) head.append(element("span", "identifier", statement.arxiv_id));
  if (statement.score !== undefined) head.append(scoreMark(statement.score));
  const near = link(links.near(name, statement.row), "near", "Neighbours");
  near.tabIndex = -1; // Enter on the statement does the same
  head.append(near);
  card.append(head, statementText(statement.text));
  return card;
}

/** The text of a statement, set; a very long one in part, with a button for the rest. */
export function statementText(text) {
  const body = element("div", "text");
  if (text.length <= LONG) {
    body.append(setLatex(text));
    return body;
  }
  body.append(element("span", "cut", `${text.slice(0, LONG / 4)} …`));
  const more = element("button", "more", `Show all ${text.length.toLocaleString("en")} characters`);
  more.type = "button";
  more.addEventListener("click", (event) => {
    event.stopPropagation();
    body.replaceChildren(text.length <= LONGEST_SET ? setLatex(text) : element("pre", "source", text));
    body.closest(".statement")?.focus();
  });
  body.append(more);
  return body;
}

export function paperItem(name, paper) {
  const item = link(links.paper(name, paper.paper), "paper", "");
  item.dataset.paper = paper.paper;
  item.replaceChildren(
    element("span", "title", setLatex(titleOf(paper))),
    element("span", "identifier", paper.title ? paper.arxiv_id : ""),
    element("span", "size", String(paper.count)),
  );
  item.lastChild.title = count(paper.count, "statement");
  return element("li", "", item);
}

export function heading(...children) {
  return element("h2", "", ...children);
}

export function notice(kind, title, ...lines) {
  return element("section", `notice ${kind}`, heading(title), ...lines.map((line) => element("p", "", line)));
}

/** How far the computation of a collection is. */
export function progress(name, done, total) {
  const bar = element("progress");
  bar.setAttribute("aria-label", `Embedding the statements of ${name}`);
  if (total) Object.assign(bar, { max: total, value: done });
  const words = total ? `${done.toLocaleString("en")} of ${count(total, "statement")}` : "Opening the model and the file";
  return element("section", "notice", heading("Embedding ", element("cite", "", name)), bar, element("p", "", words));
}

export const titleOf = ({ title, arxiv_id, paper }) => title || arxiv_id || `Paper ${paper + 1}`;

function link(href, className, inside) {
  const result = element("a", className, inside);
  result.href = href;
  return result;
}

function scoreMark(score) {
  const mark = element("span", "score", score.toFixed(3));
  mark.title = "Cosine of the two vectors";
  mark.dataset.level = String(Math.max(0, Math.min(10, Math.round(score * 10))));
  return mark;
}
