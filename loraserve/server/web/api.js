// Talks to the server: what there is, and one streamed answer.

export class ServerError extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

async function get(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return new ServerError(error.message, error.code);
  } catch {
    return new ServerError(`${response.status} ${response.statusText}`, null);
  }
}

/**
 * The base's card and a page of adapters.
 * @param {string} query part of their names, or ""
 * @param {string[]} wanted names to have in any case, whether the page has them or not
 */
export async function inventory(query, wanted) {
  const [models, page] = await Promise.all([
    get("v1/models?limit=1"),
    get(`v1/adapters?limit=100&q=${encodeURIComponent(query)}`),
  ]);
  const missing = wanted.filter((name) => !page.data.some((adapter) => adapter.id === name));
  const others = await Promise.all(missing.map((name) => get(`v1/adapters/${encodeURIComponent(name)}`).catch(() => null)));
  return { base: models.data[0], adapters: [...others.filter(Boolean), ...page.data], more: page.has_more };
}

/**
 * Stream one chat answer.
 * @param {object} body the request, without `stream`
 * @param {AbortSignal} signal
 * @yields {{reasoning?: string, content?: string, finish?: string, usage?: object, adapter: string}}
 */
export async function* streamAnswer(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message, event.error.code);
    const choice = event.choices[0];
    yield {
      adapter: event.adapter,
      reasoning: choice?.delta.reasoning_content,
      content: choice?.delta.content,
      finish: choice?.finish_reason,
      usage: event.usage,
    };
  }
  throw new ServerError(null, "interrupted");
}

async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const events = held.split("\n\n");
      held = events.pop();
      for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
