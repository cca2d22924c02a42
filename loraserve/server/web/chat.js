// The conversation: its messages, their bubbles, and the one answer that may be on its way.
// Text of models and users only ever enters the page as textContent.

import { ServerError, streamAnswer } from "./api.js";
import { drawing } from "./drawing.js";
import { badge, paint } from "./voices.js";
import { say } from "./words.js";

const log = document.getElementById("log");
const empty = document.getElementById("empty");
const scroller = document.getElementById("scroller");
const toEnd = document.getElementById("to-end");

let messages = []; // {role, content, reasoning?, adapter?, note?, forgot?, stats?, error?}
let running = null; // the AbortController of the answer on its way
let hooks = { request: () => ({}), changed: () => {}, running: () => {} };
let following = true;

/**
 * @param {Array} saved messages of the last visit
 * @param {{request: Function, changed: Function, running: Function}} given `request()` returns spec and sampling fields
 */
export function startChat(saved, given) {
  hooks = given;
  messages = Array.isArray(saved) ? saved : [];
  scroller.addEventListener("scroll", () => {
    following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
    toEnd.hidden = following;
  });
  toEnd.addEventListener("click", () => follow(true));
  new ResizeObserver(() => follow()).observe(scroller);
  drawChat();
  follow(true);
}

export function savedChat() {
  return messages.filter((message) => !message.error);
}

export function isRunning() {
  return running !== null;
}

export function stop() {
  running?.abort();
}

export function clearChat() {
  stop();
  messages = [];
  drawChat();
  hooks.changed();
}

export function drawChat() {
  log.replaceChildren(...messages.map((message) => (message.node = bubble(message)).root));
  empty.hidden = messages.length > 0;
  markLast();
}

/** Send what the user wrote, or, without text, answer the last message again. */
export async function send(text) {
  if (running) return;
  if (text) {
    add({ role: "user", content: text });
  } else {
    while (messages.at(-1)?.role === "assistant") messages.pop().node.root.remove();
    if (!messages.length) return;
  }
  const { spec, system, ...sampling } = hooks.request();
  const history = messages.filter((m) => !m.error && (m.content || m.role === "user"));
  running = new AbortController();
  const answer = add({ role: "assistant", content: "", adapter: spec });
  hooks.running(true);
  answer.node.root.classList.add("writing");
  try {
    await ask(answer, history, system, { ...sampling, adapter: spec });
  } catch (error) {
    fail(answer, error);
  }
  running = null;
  show(answer);
  answer.node.root.classList.remove("writing");
  settle(answer);
  markLast();
  hooks.running(false);
  hooks.changed();
}

/** Ask with as much of the conversation as the context holds. */
async function ask(answer, history, system, fields) {
  const opening = system ? [{ role: "system", content: system }] : [];
  for (;;) {
    const turns = history.map(({ role, content }) => ({ role, content }));
    try {
      return await receive(answer, { ...fields, messages: [...opening, ...turns] }, running.signal);
    } catch (error) {
      if (error.code !== "context_length_exceeded" || history.length < 3) throw error;
      history = history.slice(history[1].role === "user" ? 1 : 2);
      answer.forgot = true;
    }
  }
}

async function receive(answer, body, signal) {
  const start = performance.now();
  for await (const part of streamAnswer(body, signal)) {
    if (part.adapter !== answer.adapter) setAdapter(answer, part.adapter);
    answer.reasoning = (answer.reasoning ?? "") + (part.reasoning ?? "");
    answer.content += part.content ?? "";
    schedule(answer);
    if (part.finish === "length") answer.note = "cutOff";
    if (part.usage) {
      const count = part.usage.completion_tokens;
      answer.stats = { count, rate: (1000 * count) / Math.max(performance.now() - start, 1) };
    }
  }
}

/** Show what has come, once per frame: tokens may come faster than a page can be laid out. */
function schedule(answer) {
  answer.node.frame ??= requestAnimationFrame(() => show(answer));
}

function show(answer) {
  const { node } = answer;
  cancelAnimationFrame(node.frame);
  node.frame = null;
  node.thoughts.hidden = !answer.reasoning;
  extend(node.reasoning, answer.reasoning ?? "");
  extend(node.text, answer.content);
  follow();
}

function extend(node, text) {
  node.firstChild ?? node.append("");
  node.firstChild.appendData(text.slice(node.firstChild.length));
}

function fail(answer, error) {
  if (error.name === "AbortError") {
    answer.note = "stopped";
    return;
  }
  if (!answer.content && !answer.reasoning) {
    messages.pop();
    answer.node.root.remove();
  } else {
    answer.note = "stopped";
  }
  const known = error instanceof ServerError;
  const text = known && error.code === "interrupted" ? say("interrupted") : known ? error.message : say("unreachable");
  add({ role: "assistant", content: text, error: true });
}

function add(message) {
  message.node = bubble(message);
  messages.push(message);
  log.append(message.node.root);
  empty.hidden = true;
  markLast();
  follow(message.role === "user");
  return message;
}

function bubble(message) {
  const root = element("article", `message ${message.error ? "error" : message.role}`);
  const text = element("div", "text", message.content);
  const node = { root, text };
  if (message.role === "user") {
    root.append(text);
    return node;
  }
  if (message.error) {
    const retry = button(say("retry"), "plain", () => send());
    retry.textContent = say("retry");
    root.role = "alert";
    root.append(text, retry);
    return node;
  }
  node.head = element("header");
  node.thoughts = element("details", "thoughts");
  node.thoughts.hidden = !message.reasoning;
  node.reasoning = element("div", "reasoning", message.reasoning ?? "");
  node.thoughts.append(element("summary", "", say("thinking")), node.reasoning);
  node.stats = element("span", "stats");
  const copy = button(say("copy"), "icon", () => copyText(message, copy), "M9 9h10v11H9zM5 15V4h10");
  const again = button(say("regenerate"), "icon again", () => send(), "M19.5 12a7.5 7.5 0 1 1-2.2-5.3L20 9M20 4v5h-5");
  const foot = element("footer");
  foot.append(node.stats, copy, again);
  const body = element("div", "body");
  body.append(node.thoughts, text);
  root.append(node.head, body, foot);
  message.node = node;
  setAdapter(message, message.adapter);
  if (message.content || !running) settle(message);
  return node;
}

function setAdapter(message, adapter) {
  message.adapter = adapter;
  message.node.head.replaceChildren(badge(adapter));
  paint(message.node.root, adapter);
}

/** What stands below a finished answer. */
function settle(message) {
  if (!message.node?.stats) return;
  const parts = [];
  if (message.stats) {
    const { count, rate } = message.stats;
    parts.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate)} ${say("perSecond")}`, `${count} ${say("tokens")}`);
  }
  if (message.note) parts.push(say(message.note));
  if (message.forgot) parts.push(say("forgot"));
  message.node.stats.textContent = parts.join(" · ");
  const blank = !message.content && !message.reasoning;
  message.node.text.classList.toggle("blank", blank);
  if (blank) message.node.text.textContent = say("emptyAnswer");
}

function markLast() {
  for (const message of messages) message.node.root.classList.toggle("last", message === messages.at(-1));
}

function follow(force = false) {
  if (force) following = true;
  if (following) scroller.scrollTop = scroller.scrollHeight;
  toEnd.hidden = following;
}

async function copyText(message, node) {
  await navigator.clipboard?.writeText(message.content);
  node.title = say("copied");
  node.classList.add("done");
  setTimeout(() => {
    node.title = say("copy");
    node.classList.remove("done");
  }, 1200);
}

function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

function button(title, className, onClick, path = null) {
  const node = element("button", className);
  Object.assign(node, { type: "button", title, ariaLabel: title });
  node.addEventListener("click", onClick);
  if (path) node.append(drawing(path));
  return node;
}
