// LaTeX as it stands in statements: prose with lists, emphasis and accents around mathematics, which KaTeX sets.
// The result is made of nodes; no text of a statement is ever read as HTML.

const DEEPEST = 40; // groups and lists inside each other; what is deeper stays as it was written
const UNKNOWN_MACROS = 12; // of one formula

// Names that papers define for themselves. Any other is set as an operator, under the name it has.
const MACROS = {
  "\\colim": "\\operatorname*{colim}",
  "\\etale": "\\text{étale}",
  "\\proetale": "\\text{pro-étale}",
  "\\SheafHom": "\\mathop{\\mathcal{H}\\!\\mathit{om}}\\nolimits",
  "\\SheafExt": "\\mathop{\\mathcal{E}\\!\\mathit{xt}}\\nolimits",
  "\\NL": "N\\!L",
  "\\linebreak": "",
};
const LISTS = { enumerate: "ol", itemize: "ul", description: "ul" };
const DISPLAYS = {
  equation: ["", ""], displaymath: ["", ""], math: ["", ""],
  align: ["\\begin{aligned}", "\\end{aligned}"], gather: ["\\begin{gathered}", "\\end{gathered}"],
  multline: ["\\begin{gathered}", "\\end{gathered}"], eqnarray: ["\\begin{array}{rcl}", "\\end{array}"],
};
const STYLES = {
  it: "em", em: "em", sl: "em", bf: "strong", tt: "code", rm: "span", sc: "span",
  emph: "em", textit: "em", textsl: "em", textbf: "strong", texttt: "code", text: "span", textrm: "span",
};
const ACCENTS = {
  "'": "\u0301", "`": "\u0300", '"': "\u0308", "^": "\u0302", "~": "\u0303", "=": "\u0304", ".": "\u0307",
  v: "\u030c", c: "\u0327", H: "\u030b", u: "\u0306", r: "\u030a", k: "\u0328",
};
const CHARACTERS = {
  ss: "ß", o: "ø", O: "Ø", ae: "æ", AE: "Æ", aa: "å", AA: "Å", l: "ł", L: "Ł", i: "ı", S: "§", ldots: "…", dots: "…",
  noindent: "", medskip: "", smallskip: "", bigskip: "", par: "", romannumeral: "", centering: "",
  " ": " ", "\n": " ", ",": "\u2009", "\\": "\n", "-": "\u00ad", "/": "", "(": "", ")": "", "[": "", "]": "",
};
const REFERENCES = new Set(["ref", "eqref", "cite", "citep", "citet", "url"]);
const DROPPED_WITH_GROUP = new Set(["label", "vspace", "hspace", "index", "setcounter"]);

/** The text as nodes. */
export function setLatex(text) {
  const result = document.createDocumentFragment();
  new Reader(text).prose(result, "", 0);
  return result;
}

class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
  }

  /** The match of a sticky expression at this place, which is then behind us; or null. */
  take(expression) {
    expression.lastIndex = this.at;
    const match = expression.exec(this.text);
    if (match) this.at = expression.lastIndex;
    return match;
  }

  sees(text) {
    return this.text.startsWith(text, this.at);
  }

  /** Reads into `parent` until `stop` stands here, or the text ends; the items of a list stop each other. */
  prose(parent, stop, depth) {
    while (this.at < this.text.length) {
      if (stop && this.sees(stop)) return;
      if (stop.startsWith("\\end") && this.sees("\\item")) return;
      let match;
      if ((match = this.take(/[^\\${}~]+/y))) appendWords(parent, match[0]);
      else if ((match = this.take(/\$\$([^]*?)\$\$|\\\[([^]*?)\\\]/y))) parent.append(formula(match[1] ?? match[2], true));
      else if ((match = this.take(/\$((?:[^$\\]|\\[^])+)\$|\\\(([^]*?)\\\)/y))) parent.append(formula(match[1] ?? match[2], false));
      else if ((match = this.take(/\\begin\{([a-zA-Z]+)(\*?)\}/y))) this.environment(parent, match, depth);
      else if (this.sees("{") && depth < DEEPEST) this.group(parent, depth);
      else if (this.take(/~/y)) parent.append("\u00a0");
      else if ((match = this.take(/\\([a-zA-Z]+)\*?[ \n]*|\\([^])/y))) this.command(parent, match, depth);
      else parent.append(this.take(/[^]/y)[0].replace(/[{}]/, "")); // a lone dollar or brace
    }
  }

  /** `{...}`, with `{\it ...}` and its like as what they mean. */
  group(parent, depth) {
    this.at += 1;
    const style = this.take(/\s*\\(it|em|sl|bf|tt|rm|sc)(?![a-zA-Z])\s*/y);
    const inside = style ? element(STYLES[style[1]]) : document.createDocumentFragment();
    this.prose(inside, "}", depth + 1);
    this.at += 1;
    parent.append(inside);
  }

  environment(parent, [source, name, star], depth) {
    const end = `\\end{${name}${star}}`;
    if (name in DISPLAYS) {
      const stop = this.text.indexOf(end, this.at);
      const body = this.text.slice(this.at, stop < 0 ? undefined : stop);
      this.at = stop < 0 ? this.text.length : stop + end.length;
      parent.append(formula(DISPLAYS[name].join(body.replace(/\\label\{[^}]*\}|\\nonumber/g, "")), true));
    } else if (depth >= DEEPEST) {
      parent.append(unknown(source));
    } else if (name in LISTS) {
      parent.append(this.list(LISTS[name], end, depth));
    } else {
      const block = element("div", "environment", element("span", "environment-name", name));
      this.prose(block, `\\end{${name}`, depth + 1);
      this.take(/\\end\{[a-zA-Z]+\*?\}/y);
      parent.append(block);
    }
  }

  list(kind, end, depth) {
    const list = element(kind);
    this.prose(document.createDocumentFragment(), end, depth + 1); // what stands before the first item is layout
    while (this.take(/\\item(?![a-zA-Z])\s*/y)) {
      const item = element("li");
      const label = this.take(/\[([^\]]*)\]/y);
      if (label) item.prepend(element("span", "item-label", setLatex(label[1])));
      item.classList.toggle("labelled", Boolean(label));
      this.prose(item, end, depth + 1);
      list.append(item);
    }
    if (this.sees(end)) this.at += end.length;
    return list;
  }

  command(parent, [source, word, sign], depth) {
    const name = word ?? sign;
    if (name in ACCENTS && (sign || this.sees("{") || source.endsWith(" "))) this.accent(parent, name);
    else if (name in CHARACTERS) parent.append(CHARACTERS[name]);
    else if (sign) parent.append(sign); // \% \& \$ \# \_ \{ \}
    else if (name === "footnote" || name in STYLES) this.styled(parent, name, depth);
    else if (name === "href") this.take(/\{[^}]*\}/y); // and its text follows
    else if (REFERENCES.has(name)) {
      const match = this.take(/(\[[^\]]*\])?\{([^}]*)\}/y);
      parent.append(element("span", "reference", match ? match[2] : source));
    } else if (DROPPED_WITH_GROUP.has(name)) this.take(/(\{[^}]*\})+/y);
    else parent.append(unknown(source));
  }

  styled(parent, name, depth) {
    const inside = name === "footnote" ? element("small", "footnote") : element(STYLES[name]);
    if (this.sees("{") && depth < DEEPEST) this.group(inside, depth);
    parent.append(inside);
  }

  accent(parent, name) {
    const match = this.take(/\s*\{\s*\\?([^{}\\])\s*\}|\s*\\?([^{}\\$])/y);
    if (match) parent.append(((match[1] ?? match[2]) + ACCENTS[name]).normalize("NFC"));
  }
}

/** One formula as KaTeX sets it; as its source where KaTeX cannot. */
function formula(source, display) {
  const macros = { ...MACROS };
  const result = element("span", display ? "display" : "inline");
  for (let tries = 0; tries <= UNKNOWN_MACROS; tries += 1) {
    try {
      const options = { displayMode: display, throwOnError: true, strict: "ignore", trust: false, maxSize: 20, maxExpand: 500 };
      window.katex.render(source, result, { ...options, macros: { ...macros } });
      return result;
    } catch (error) {
      const missing = /Undefined control sequence: (\\[a-zA-Z]+)/.exec(error.message)?.[1];
      if (!missing || missing === "\\xymatrix" || missing in macros) break;
      macros[missing] = `{\\operatorname{${missing.slice(1)}}}`; // in braces, for D_\\QCoh
    }
  }
  const diagram = source.includes("\\xymatrix");
  const code = element(display ? "pre" : "code", "source", source.trim());
  if (diagram) code.title = "A diagram in Xy-pic, which this page cannot draw";
  return code;
}

function appendWords(parent, text) {
  const words = text.replace(/---/g, "—").replace(/--/g, "–").replace(/``/g, "“").replace(/''/g, "”").replace(/`/g, "‘");
  const point = /^[.,;:)]*/.exec(words)[0];
  const before = parent.lastChild;
  if (point && before?.className === "inline" && before.querySelectorAll(".base").length === 1) {
    before.append(point); // or a line could begin with the point after a formula
  } else {
    parent.append(point);
  }
  words.slice(point.length).split(/\n\s*\n/).forEach((paragraph, i) => {
    if (i) parent.append(element("span", "paragraph"));
    parent.append(paragraph);
  });
}

const unknown = (source) => element("code", "unknown", source);

/** A new element with a class and children, which may be texts. */
export function element(tag, className = "", ...children) {
  const result = document.createElement(tag);
  if (className) result.className = className;
  result.append(...children);
  return result;
}
