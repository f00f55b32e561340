// A message of the page.

import { button, copy, h } from "./dom.js";
import { Blocks } from "./markdown.js";
import { versions } from "./store.js";

const ENDS = { // why an answer is not whole
  length: "The answer has reached the limit of tokens.",
  stopped: "You stopped this answer.",
  "": "This answer was interrupted.",
};

const rate = (n, ms) => (ms > 0 ? `, ${((1000 * n) / ms).toFixed(1)} tok/s` : "");

/** Return "120 tokens, 31.2 tok/s ..." of an answer; while it is being made, the pieces that have come are counted. */
function speed(usage, isRunning) {
  if (isRunning) return usage.pieces > 1 ? `about ${usage.pieces} tokens${rate(usage.pieces - 1, usage.ms)}` : "";
  if (!usage?.answer) return "";
  const prompt = `prompt: ${usage.prompt} tokens${usage.cached ? `, ${usage.cached} cached` : ""}`;
  const answer = `${usage.answer} tokens${rate(usage.predicted_n, usage.predicted_ms)}`;
  return `${answer} · ${prompt}${rate(usage.prompt_n, usage.prompt_ms)}`;
}

export class MessageView {
  /** act: what its buttons do: { edit(place, text), again(place), show(place, label of the button) }. */
  constructor(conversation, place, act) {
    Object.assign(this, { conversation, place, act, message: conversation.messages[place], state: "" });
    for (const part of ["content", "calls", "note", "tools", "speed"]) this[part] = h(`div.${part}`);
    this.summary = h("summary");
    this.thoughts = h("div.plain");
    this.reasoning = h("details.reasoning", { hidden: true }, this.summary, this.thoughts);
    this.foot = h("footer", {}, this.tools, this.speed);
    this.blocks = new Blocks(this.content);
    this.element = h(`article.${this.message.role}`, { ariaLabel: this.message.role === "user" ? "You" : "Model" },
      this.reasoning, this.content, this.calls, this.note, this.foot);
  }

  /** Show the message as it is now. isRunning: the model is writing it. */
  update(isRunning) {
    const { role, content, reasoning, calls = [], files = [], error, finish, usage } = this.message;
    const all = versions(this.conversation, this.place), state = `${isRunning} ${all}`, isNew = state !== this.state;
    this.state = state;
    if (isNew) this.tools.replaceChildren(...this.buttons(all, isRunning)); // else they keep the focus
    if (isNew && role === "user") {
      const opened = (file) => h("details.file", {}, h("summary", {}, file.name), h("pre", {}, file.text));
      this.content.replaceChildren(...files.map(opened), h("div.plain", {}, content));
    }
    if (role === "user" || !(isNew || isRunning)) return;
    const isThinking = isRunning && !content && !calls.length;
    this.element.classList.toggle("waiting", isThinking && !reasoning);
    this.blocks.update(content, !isRunning);
    this.reasoning.hidden = !reasoning;
    const thought = usage?.thought_ms ? `Thought for ${(usage.thought_ms / 1000).toFixed(1)} s` : "Thoughts";
    this.summary.textContent = isThinking ? "Thinking…" : thought;
    this.thoughts.textContent = reasoning?.trim();
    this.calls.replaceChildren(...calls.map((call) => h("details.call", { open: true },
      h("summary", {}, "Calls ", h("code", {}, call.name)), h("pre", {}, call.arguments))));
    this.note.textContent = isRunning ? "" : error || ENDS[finish];
    this.note.classList.toggle("error", Boolean(error));
    this.speed.textContent = speed(usage, isRunning);
  }

  buttons(all, isRunning) {
    const { place, act, message } = this, at = all.indexOf(place);
    const step = (label, name, to) =>
      Object.assign(button(label, name, () => act.show(all[to], label)), { disabled: !(to in all) });
    const versions = all.length < 2 ? [] : [step("Previous version", "left", at - 1), `${at + 1}/${all.length}`,
      step("Next version", "right", at + 1)];
    if (isRunning) return versions;
    const again = message.role === "user" ? [] : [button("Answer again", "again", () => act.again(place))];
    return [...versions, button("Copy", "copy", () => copy(message.content)),
      button("Edit", "edit", () => this.edit()), ...again];
  }

  /** Let the user write the message anew: a new version of a question is sent, an answer is changed in its place. */
  edit() {
    const area = h("textarea", { value: this.message.content, ariaLabel: "New text", rows: 3 });
    const close = () => form.replaceWith(this.content);
    const done = (event) => (event.preventDefault(), close(), this.act.edit(this.place, area.value.trim()));
    const form = h("form.edit", { onsubmit: done }, area, h("div.bar", {},
      h("button.primary", {}, this.message.role === "user" ? "Send" : "Save"),
      h("button", { type: "button", onclick: close }, "Cancel")));
    form.onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === area) done(event);
      if (event.key === "Escape") (event.stopPropagation(), close());
    };
    this.content.replaceWith(form);
    area.focus();
  }
}
