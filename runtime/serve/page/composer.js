// Where a message is written, with the text files that go with it.

import { $, button, choose, h, notify } from "./dom.js";

const MOST_BYTES = 1 << 20;

/** send({ content, files }) takes the message, or returns false where it may not be sent now. */
export function composer(send) {
  const input = $("input");
  let files = [];

  function draw() {
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight}px`;
    const leave = (file) => () => ((files = files.filter((other) => other !== file)), draw(), input.focus());
    const chip = (file) => h("span.chip", {}, file.name, button(`Remove ${file.name}`, "close", leave(file)));
    $("files").replaceChildren(...files.map(chip));
  }

  function submit(event) {
    event.preventDefault();
    const content = input.value.trim();
    if ((!content && !files.length) || send({ content, files }) === false) return;
    input.value = "";
    files = [];
    draw();
  }

  async function read(file) {
    if (/^(image|audio|video)\//.test(file.type)) throw Error("the model reads text only");
    if (file.size > MOST_BYTES) throw Error(`a file may have ${MOST_BYTES >> 20} MB`);
    const bytes = await file.arrayBuffer();
    try {
      files.push({ name: file.name, text: new TextDecoder("utf-8", { fatal: true }).decode(bytes) });
    } catch {
      throw Error("it is not text");
    }
  }

  async function attach(list) {
    for (const file of list) {
      await read(file).catch(({ message }) => notify(`${file.name} was not attached: ${message}.`));
    }
    draw();
  }

  function drop(event) {
    const list = [...(event.dataTransfer ?? event.clipboardData).files];
    if (list.length) (event.preventDefault(), attach(list));
  }

  input.oninput = draw;
  input.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  $("composer").onsubmit = submit;
  $("attach").onclick = () => choose({ multiple: true }, attach);
  addEventListener("paste", drop);
  addEventListener("drop", drop);
  addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
}
