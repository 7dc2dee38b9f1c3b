// The server's JSON interface. Every failure is an Error whose message is one line, fit to be shown.

export class Refused extends Error {}

const at = (name, ...rest) => ["/api/collections", encodeURIComponent(name), ...rest].join("/");

export const listCollections = () => ask("/api/collections");
export const describe = (name) => ask(at(name));
export const papers = (name, filter, start) => ask(`${at(name, "papers")}?${new URLSearchParams({ filter, start })}`);
export const paper = (name, number) => ask(at(name, "papers", number));
export const neighbours = (name, row, others) => ask(`${at(name, "neighbours", row)}?others=${others ? 1 : 0}`);
export const search = (name, text) => ask(at(name, "search"), { text });
export const compute = (name) => ask(at(name, "compute"), {});

async function ask(url, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let response, answer;
  try {
    response = await fetch(url, options);
    answer = await response.json();
  } catch {
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new Refused(answer.error);
  return answer;
}
