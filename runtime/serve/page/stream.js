// Speaks to the server: OpenAI's protocol, over fetch.

/** askKey(refused) asks the user for a key and returns it, or null; refused: a key that the server did not take. */
export const user = { askKey: async (refused) => refused && null };

async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : Error("The server cannot be reached. Is it running?");
    });
    if (response.ok) return response;
    const said = messageOf(await response.text()) ?? `The server answered with status ${response.status}.`;
    const next = response.status === 401 ? await user.askKey(key) : null;
    if (next === null) throw Error(said);
    sessionStorage.setItem("key", next);
  }
}

function messageOf(text) {
  try {
    return JSON.parse(text).error.message;
  } catch { // not of the server, but of something before it
    return null;
  }
}

/** Return what to say while the server loads a model or is away, and null when it is ready. */
export async function loading() {
  const response = await fetch("health").catch(() => null);
  if (response === null) return "The server cannot be reached. Trying again…";
  return response.status === 503 ? messageOf(await response.text()) ?? "The model is loading…" : null;
}

/** Return the models: [{ id, max_model_len }]. */
export const models = async () => (await (await ask("v1/models")).json()).data;

/** Yield the chunks of an answer. Error: the server has said so, or the stream has ended too early. */
export async function* chat(body, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(request), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) throw Error("The connection was lost before the answer was complete.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) { // other lines keep the connection alive
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw Error(chunk.error.message ?? "The server failed.");
      yield chunk;
    }
  }
}
