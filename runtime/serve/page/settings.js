// The settings of a conversation: system prompt, sampling, JSON schema.

import { $, h } from "./dom.js";
import { SETTINGS } from "./store.js";

const NUMBERS = [ // name, label, least, most, step, what it does
  ["temperature", "Temperature", 0, 5, "any", "0: the likeliest token"],
  ["top_p", "Top p", 0, 1, "any", "Tokens that make up this probability"],
  ["top_k", "Top k", 0, 1e6, 1, "So many of the likeliest tokens; 0: all"],
  ["min_p", "Min p", 0, 1, "any", "Tokens this likely beside the likeliest"],
  ["max_tokens", "Max tokens", 1, 1e7, 1, "An answer ends there"],
  ["seed", "Seed", 0, 2 ** 32 - 1, 1, "Makes an answer repeatable"],
];

/** current(): the conversation that is shown. changed(): its settings have changed. */
export function settings(current, changed) {
  for (const [name, label, min, max, step, hint] of NUMBERS) {
    const input = h("input", { id: name, type: "number", min, max, step, placeholder: "default" });
    input.onchange = () => {
      if (!input.reportValidity()) return;
      current().settings[name] = input.value === "" ? null : input.valueAsNumber;
      changed();
    };
    $("numbers").append(h("label", { htmlFor: name }, label, h("span.hint", {}, hint)), input);
  }
  $("system").onchange = ({ target }) => {
    current().messages[0].content = target.value.trim();
    changed();
  };
  $("schema").onchange = ({ target }) => {
    target.setCustomValidity("");
    try {
      if (target.value.trim()) JSON.parse(target.value);
      current().settings.schema = target.value.trim();
      changed();
    } catch (error) {
      target.setCustomValidity(`This is not JSON: ${error.message}`);
      target.reportValidity();
    }
  };
  const fill = () => {
    for (const name of Object.keys(SETTINGS)) $(name).value = current().settings[name] ?? "";
    $("schema").setCustomValidity("");
    $("system").value = current().messages[0].content;
  };
  $("reset").onclick = () => {
    Object.assign(current().settings, SETTINGS);
    current().messages[0].content = "";
    changed();
    fill();
  };
  $("open").onclick = () => (fill(), $("settings").showModal());
  $("settings").onclick = ({ target }) => {
    if (target === $("settings")) target.close(); // a click beside it
  };
}

/** Return the fields of a request that a conversation's settings ask for. */
export function asked({ settings: { schema, ...numbers } }) {
  const fields = Object.fromEntries(Object.entries(numbers).filter(([, value]) => value !== null));
  const json_schema = schema && { name: "answer", strict: true, schema: JSON.parse(schema) };
  return schema ? { ...fields, response_format: { type: "json_schema", json_schema } } : fields;
}
