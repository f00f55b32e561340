// A model's text as a document. Nothing that a model writes may run, load, or look like a part of the page:
// HTML is shown as text, images are links, what is left goes through DOMPurify, and the server forbids the rest.

import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";
import { button, copy, h } from "./dom.js";

const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
const HARMLESS = /^<\/?(br|sub|sup|kbd|b|i)\s*\/?>$/i;

const marked = new Marked({
  gfm: true,
  breaks: true, // as the writers of verses and addresses mean it
  renderer: {
    html({ raw, block: isBlock }) {
      if (HARMLESS.test(raw.trim())) return raw;
      return isBlock ? `<p class="html">${escaped(raw.trim())}</p>` : escaped(raw);
    },
    image: ({ href, text }) => `<a href="${escaped(href)}">image: ${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const ALLOWED_TAGS = (
  "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i kbd li ol p pre span strong sub sup " +
  "table tbody td th thead tr ul"
).split(" ");
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") Object.assign(node, { target: "_blank", rel: "noopener noreferrer nofollow" });
});

const purified = (html) => DOMPurify.sanitize(html, {
  ALLOWED_TAGS, ALLOWED_ATTR: ["align", "class", "href", "start", "title"], ALLOW_DATA_ATTR: false,
  ADD_URI_SAFE_ATTR: ["align", "start"], ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i, RETURN_DOM_FRAGMENT: true,
});

let library;

/** Colour the text of a <code> element. The library is loaded when the first block of code comes. */
async function colour(code, language) {
  library ??= import("./vendor/highlight.js");
  const { default: highlighter } = await library;
  const text = code.textContent;
  if (!highlighter.getLanguage(language) || text.length > 50_000) return;
  code.replaceChildren(purified(highlighter.highlight(text, { language, ignoreIllegals: true }).value));
}

function block(token) {
  const element = h("div.block", {}, purified(marked.parser([token])));
  for (const code of element.querySelectorAll("pre > code")) {
    const language = code.className.replace("language-", "");
    const head = h("div.codehead", {}, language || "text", button("Copy code", "copy", () => copy(code.textContent)));
    code.parentElement.replaceWith(h("div.codeblock", {}, head, h("pre", { tabIndex: 0 }, code)));
    if (language) colour(code, language);
  }
  for (const table of element.querySelectorAll("table")) {
    const scroll = h("div.scroll", { tabIndex: 0 });
    table.replaceWith(scroll);
    scroll.append(table);
  }
  return element;
}

/** The blocks of a text (paragraphs, lists, tables, code) as children of `element`. */
export class Blocks {
  constructor(element) {
    this.element = element;
    this.restart();
  }

  restart() {
    this.element.replaceChildren();
    this.nBlocks = this.nDone = 0; // blocks that cannot change any more, and the length of their text
  }

  /** Show a text that continues the last one: only its last block is made again, or all of them at its end. */
  update(text, isOver) {
    if (isOver) this.restart(); // a definition at the end may be used at the start
    while (this.element.childElementCount > this.nBlocks) this.element.lastChild.remove();
    let tokens;
    try {
      tokens = marked.lexer(text.slice(this.nDone));
      this.element.append(...tokens.filter(({ type }) => type !== "space" && type !== "def").map(block));
    } catch { // nested too deep
      this.element.append(h("pre", { textContent: text.slice(this.nDone) }));
      return;
    }
    const last = tokens.findLastIndex(({ type }) => type !== "space");
    for (const { type, raw } of tokens.slice(0, Math.max(0, last))) {
      this.nDone += raw.length;
      this.nBlocks += type !== "space" && type !== "def";
    }
  }
}
