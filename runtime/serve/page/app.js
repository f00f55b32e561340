// The page: which conversation is shown, what the model is asked, and what becomes of its answer. Start here.

import { composer } from "./composer.js";
import { $, h, icon, notify, throttled } from "./dom.js";
import { asked, settings } from "./settings.js";
import { sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { chat, loading, models, user } from "./stream.js";
import { MessageView } from "./view.js";

const conversations = new Map(); // by id: those that are kept
const running = new Map(); // by id of the conversation: { controller, place } of the answer that is being made
const tabs = new BroadcastChannel("conversations"); // tells the other tabs of this page that something has changed
let current, views, sizes = {}; // views by place, sizes of contexts by model
const UNKEPT = "This browser keeps no conversations: ";
let sticks = true; // the newest text stays in sight

async function keep(conversation) {
  conversations.set(conversation.id, conversation);
  await store.put(conversation).catch(({ message }) => notify(UNKEPT + message));
}

function changed(conversation) {
  conversation.updated = Date.now();
  keep(conversation).then(() => tabs.postMessage(null));
  drawList();
}

function drop({ id }) {
  running.get(id)?.controller.abort();
  conversations.delete(id);
  store.remove(id).then(() => tabs.postMessage(null));
  if (current.id === id) location.hash = "";
  drawList();
}

const drawList = sidebar(conversations, { changed, drop, imported: (read) => Promise.all(read.map(keep)).then(show) });

/** Read what this browser keeps, and show it. */
async function load() {
  const kept = await store.all().catch((error) => (notify(UNKEPT + error.message), []));
  conversations.clear();
  for (const conversation of kept) conversations.set(conversation.id, conversation);
  show();
}

/** Show the conversation that the address names, or a new one. */
function show() {
  const newest = [...conversations.values()].reduce((a, b) => (a?.updated > b.updated ? a : b), current);
  current = conversations.get(location.hash.slice(1)) ?? store.create(newest);
  views = new Map();
  $("log").replaceChildren();
  sticks = true;
  drawList();
  draw();
  if (matchMedia("(hover: hover)").matches) $("input").focus();
}

function draw() {
  const now = running.get(current.id), places = store.path(current).slice(1), log = $("log");
  places.forEach((place, at) => {
    if (!views.has(place)) views.set(place, new MessageView(current, place, act));
    const view = views.get(place);
    view.update(now?.place === place);
    // What stays is not moved: it keeps the focus.
    if (log.children[at] !== view.element) log.insertBefore(view.element, log.children[at] ?? null);
  });
  while (log.childElementCount > places.length) log.lastChild.remove();
  $("empty").hidden = places.length > 0;
  $("send").hidden = Boolean(now);
  $("stop").hidden = !now;
  document.title = current.title || "gguf-run";
  const usage = places.map((place) => current.messages[place].usage).findLast((usage) => usage?.prompt);
  const size = sizes[$("model").value], n = usage ? usage.prompt + usage.answer : 0;
  $("context").textContent = size ? `${n.toLocaleString("en")} / ${size.toLocaleString("en")}` : "";
  $("context").style.setProperty("--used", `${Math.min(100, (100 * n) / size)}%`);
  follow();
}

function follow() {
  if (sticks) $("scroll").scrollTop = $("scroll").scrollHeight;
}

const drawAnswer = throttled(() => {
  const place = running.get(current.id)?.place;
  views.get(place)?.update(true);
  follow();
}, 50);

/** Return the message at `place` and those above it, for the server. Templates want roles that alternate. */
function messagesTo({ messages }, place) {
  const asked = [];
  for (let at = place; at !== null; at = messages[at].parent) {
    const { role, content, files = [] } = messages[at];
    const attached = files.map(({ name, text }) => `${name}:\n~~~~~~\n${text}\n~~~~~~`);
    const text = [...attached, content].filter(Boolean).join("\n\n");
    if (asked[0]?.role === role) asked[0].content = `${text}\n\n${asked[0].content}`;
    else if (text) asked.unshift({ role, content: text });
  }
  return asked;
}

/** Add a chunk of the stream to a message; `now` is in ms. */
function take(message, { choices, usage, timings }, now) {
  const { delta = {}, finish_reason } = choices?.[0] ?? {}, known = message.usage, calls = delta.tool_calls ?? [];
  message.content += (delta.content ?? "").replaceAll("\r", "");
  message.reasoning += delta.reasoning_content ?? "";
  for (const { index = 0, function: called } of calls) {
    const call = (message.calls[index] ??= { name: "", arguments: "" });
    call.name += called?.name ?? "";
    call.arguments += called?.arguments ?? "";
  }
  if (delta.content || delta.reasoning_content || calls.length) {
    known.start ??= now;
    Object.assign(known, { pieces: (known.pieces ?? 0) + 1, ms: now - known.start });
    if (message.reasoning && !delta.reasoning_content) known.thought_ms ??= known.ms;
  }
  message.finish = finish_reason ?? message.finish;
  const { prompt_tokens: prompt, completion_tokens: answer, prompt_tokens_details: details } = usage ?? {};
  Object.assign(known, timings, usage && { prompt, answer, cached: details?.cached_tokens ?? 0 });
}

/** Let the model answer the message at `parent`. */
async function answer(conversation, parent) {
  const empty = { role: "assistant", content: "", reasoning: "", calls: [], finish: "", usage: {} };
  const controller = new AbortController(), place = store.add(conversation, parent, empty);
  const message = conversation.messages[place], isKept = () => conversations.get(conversation.id) === conversation;
  const save = throttled(() => isKept() && keep(conversation), 1000);
  running.set(conversation.id, { controller, place });
  sticks = true;
  changed(conversation);
  draw();
  $("said").textContent = "The model is answering.";
  try {
    if (!$("model").value) await fillModels();
    message.model = $("model").value;
    const request = { model: message.model, messages: messagesTo(conversation, parent), ...asked(conversation) };
    for await (const chunk of chat(request, controller.signal)) {
      take(message, chunk, performance.now());
      save();
      drawAnswer();
    }
  } catch (error) {
    if (controller.signal.aborted) message.finish = "stopped";
    else message.error = error.message;
  }
  running.delete(conversation.id);
  $("said").textContent = message.error ?? "The answer is complete.";
  if (isKept()) changed(conversation); // it has not been deleted
  draw();
}

function isFree() {
  if (running.has(current.id)) notify("The model is still answering: stop it first.");
  return !running.has(current.id);
}

const act = { // what the buttons of a message do
  edit(place, content) {
    const { role, parent, files } = current.messages[place];
    if (role === "user") {
      if (isFree()) answer(current, store.add(current, parent, { role, content, files }));
      return;
    }
    current.messages[place].content = content;
    views.delete(place);
    changed(current);
    draw();
  },
  again: (place) => isFree() && ($("input").focus(), answer(current, current.messages[place].parent)),
  show(place, label) {
    current.messages[current.messages[place].parent].next = place;
    keep(current);
    sticks = false;
    draw();
    const { tools } = views.get(place);
    (tools.querySelector(`[title="${label}"]:enabled`) ?? tools.querySelector(":enabled")).focus();
  },
};

async function fillModels() {
  const found = await models(), last = localStorage.getItem("model");
  sizes = Object.fromEntries(found.map(({ id, max_model_len }) => [id, max_model_len]));
  $("model").replaceChildren(...found.map(({ id }) => h("option", { value: id, selected: id === last }, id)));
  draw();
}

let asking = null;
user.askKey = (refused) => asking ??= new Promise((resolve) => {
  $("refused").textContent = refused ? "The server refused this key" : "This server asks for a key";
  $("login").returnValue = "";
  $("login").onclose = () => ((asking = null), resolve($("login").returnValue && $("key").value.trim() || null));
  $("login").showModal();
});

async function start() {
  const banner = (text) => Object.assign($("banner"), { hidden: !text, textContent: text });
  await load();
  for (let said; (said = await loading()); await new Promise((resolve) => setTimeout(resolve, 1000))) banner(said);
  await fillModels().then(() => banner(""), ({ message }) => banner(message));
}

composer(({ content, files }) => {
  if (!isFree()) return false;
  current.title ||= (content || files[0].name).split("\n")[0].slice(0, 60);
  history.replaceState(null, "", `#${current.id}`);
  answer(current, store.add(current, store.path(current).at(-1), { role: "user", content, files }));
  return true;
});
settings(() => current, () => conversations.has(current.id) && changed(current));
for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
tabs.onmessage = () => running.size || load();
$("stop").onclick = () => running.get(current.id)?.controller.abort();
$("model").onchange = () => (localStorage.setItem("model", $("model").value), draw());
$("scroll").onscroll = ({ target }) => (sticks = target.scrollHeight - target.scrollTop - target.clientHeight < 40);
addEventListener("hashchange", show);
addEventListener("resize", follow);
addEventListener("keydown", ({ key }) => {
  if (key !== "Escape" || document.querySelector("dialog[open]")) return;
  if ($("sidebar").classList.contains("shown")) $("hide").click();
  else $("stop").click();
});
start();
