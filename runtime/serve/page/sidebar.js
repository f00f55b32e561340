// The list of conversations: search, rename, delete, export, import; and the theme.

import { $, button, choose, download, h, notify } from "./dom.js";
import * as store from "./store.js";

const THEMES = ["system", "light", "dark"];

/** act: { changed(conversation), imported(conversations), drop(conversation) }. Returns what draws the list. */
export function sidebar(conversations, act) {
  function rename(conversation) {
    const title = prompt("Name of the conversation", conversation.title)?.trim();
    if (title) act.changed(Object.assign(conversation, { title }));
  }

  function row(conversation) {
    const { id, title } = conversation, isShown = location.hash === `#${id}`;
    return h("li", {}, h("a", { href: `#${id}`, title, ariaCurrent: isShown ? "page" : null }, title),
      button("Rename", "edit", () => rename(conversation)),
      button("Export", "download", () => download(`${title}.json`, store.exported([conversation]))),
      button("Delete", "delete", () => confirm(`Delete "${title}"?`) && act.drop(conversation)));
  }

  function draw() {
    const words = $("search").value.trim().toLowerCase();
    const holds = ({ title, messages }) =>
      [title, ...messages.map(({ content }) => content)].some((text) => text.toLowerCase().includes(words));
    const found = [...conversations.values()].filter(holds).sort((a, b) => b.updated - a.updated);
    const none = h("li.hint", {}, words ? "Nothing found" : "No conversations yet");
    $("conversations").replaceChildren(...(found.length ? found.map(row) : [none]));
  }

  async function load([file]) {
    try {
      const read = store.imported(await file.text());
      const newer = read.filter(({ id, updated }) => !(conversations.get(id)?.updated >= updated));
      act.imported(newer);
      notify(`${newer.length} of ${read.length} conversations imported; the others are here already.`);
    } catch (error) {
      notify(`${file.name} was not imported: ${error.message}.`);
    }
  }

  function theme(by) {
    const { dataset } = document.documentElement;
    dataset.theme = THEMES[(THEMES.indexOf(dataset.theme) + by) % THEMES.length];
    localStorage.setItem("theme", dataset.theme);
    $("theme").title = $("theme").ariaLabel = `Theme: ${dataset.theme}`;
  }

  theme(0);
  $("theme").onclick = () => theme(1);
  $("search").oninput = draw;
  $("export").onclick = () => download("conversations.json", store.exported([...conversations.values()]));
  $("import").onclick = () => choose({ accept: ".json" }, load);
  $("menu").onclick = () => ($("sidebar").classList.add("shown"), $("hide").focus());
  $("hide").onclick = () => ($("sidebar").classList.remove("shown"), $("menu").focus());
  addEventListener("hashchange", () => $("sidebar").classList.remove("shown"));
  return draw;
}
