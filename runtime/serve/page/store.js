// Conversations as trees of messages, kept in the browser's IndexedDB, one record each.
//
// conversation: { id, title, updated (ms), settings, messages }
// message: { role, parent, next, content, ... }; parent and next are places in `messages`. Message 0 is the system
// prompt and the root; `next` is the child that is shown. Versions of a message are children of one parent.

const FORMAT = "gguf-run conversations";
const NUMBERS = { temperature: null, top_p: null, top_k: null, min_p: null, max_tokens: null, seed: null };
export const SETTINGS = { ...NUMBERS, schema: "" };

const opened = new Promise((resolve, reject) => {
  const request = indexedDB.open("gguf-run", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

async function run(mode, use) {
  const transaction = (await opened).transaction("conversations", mode);
  const request = use(transaction.objectStore("conversations"));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

export const all = () => run("readonly", (store) => store.getAll());
export const put = (conversation) => run("readwrite", (store) => store.put(conversation));
export const remove = (id) => run("readwrite", (store) => store.delete(id));

/** Make a conversation with the system prompt and the settings of another one. */
export function create(like) {
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const root = { role: "system", parent: null, next: null, content: like?.messages[0].content ?? "" };
  return { id, title: "", updated: 0, settings: { ...SETTINGS, ...like?.settings }, messages: [root] };
}

/** Add a child to message `parent` and show it; return its place. */
export function add({ messages }, parent, message) {
  messages[parent].next = messages.length;
  return messages.push({ ...message, parent, next: null }) - 1;
}

/** Return the places of the messages that are shown, from the root. */
export function path({ messages }) {
  const places = [];
  for (let place = 0; place !== null; place = messages[place].next) places.push(place);
  return places;
}

/** Return the places of all versions of a message. */
export function versions({ messages }, place) {
  return [...messages.keys()].filter((other) => messages[other].parent === messages[place].parent);
}

export const exported = (conversations) => JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);

/** Read an exported text: only what this page knows, and only in the form that it expects. Error: it is none. */
export function imported(text) {
  let read;
  try { read = JSON.parse(text); } catch { /* said below */ }
  if (read?.format !== FORMAT || !Array.isArray(read.conversations)) throw Error("it is no export of this page");
  return read.conversations.map(checked);
}

const list = (value) => (Array.isArray(value) ? value : []);
const number = (value) => (Number.isFinite(value) ? value : null);
const numbers = (read, names) => Object.fromEntries(names.map((name) => [name, number(read?.[name])]));
const texts = (read, ...names) => Object.fromEntries(names.map((name) => [name, String(read?.[name] ?? "")]));

function checked(read) {
  const messages = list(read?.messages).map((message, place, all) => ({
    ...texts(message, "content", "reasoning", "model", "error", "finish"),
    role: place === 0 ? "system" : message?.role === "user" ? "user" : "assistant",
    parent: place === 0 ? null : number(message?.parent),
    next: all[message?.next]?.parent === place && message.next > place ? Number(message.next) : null,
    calls: list(message?.calls).map((call) => texts(call, "name", "arguments")),
    files: list(message?.files).map((file) => texts(file, "name", "text")),
    usage: numbers(message?.usage, Object.keys(message?.usage ?? {})),
  }));
  const isBelow = ({ parent }, place) => place === 0 || (Number.isInteger(parent) && parent >= 0 && parent < place);
  if (!messages.length || !read.id || !messages.every(isBelow)) throw Error("one of its conversations is damaged");
  const settings = { ...numbers(read.settings, Object.keys(NUMBERS)), ...texts(read.settings, "schema") };
  return { ...texts(read, "id", "title"), updated: number(read.updated) ?? 0, settings, messages };
}
