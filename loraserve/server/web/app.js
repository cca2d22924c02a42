// The page: settings, language and theme, keys, and keeping the list of adapters fresh.

import { inventory } from "./api.js";
import { clearChat, drawChat, isRunning, savedChat, send, startChat, stop } from "./chat.js";
import { currentFilter, currentSpec, drawVoices, savedVoices, startVoices, updateVoices, wantedVoices } from "./voices.js";
import { drawing } from "./drawing.js";
import { currentLanguage, say, setLanguage } from "./words.js";

const REFRESH_MS = 10_000;
const STORE = "loraserve";
const PICTURES = {
  person: [290, "M12 12a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM5 20a7 7 0 0 1 14 0"],
  rain: [245, "M7 15a4 4 0 1 1 .6-7.9A5.2 5.2 0 0 1 17.7 9 3.1 3.1 0 0 1 17 15zM8.5 18l-1 2.5M12.5 18l-1 2.5M16.5 18l-1 2.5"],
  moon: [75, "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5z"],
  cup: [165, "M5 10h12v5a5 5 0 0 1-5 5h-2a5 5 0 0 1-5-5zM17 11.5h1.2a2.4 2.4 0 0 1 0 4.8H17M8.5 4v2.5M12.5 4v2.5"],
};
const DEFAULTS = { temperature: 0.7, maxTokens: "", system: "" };

const $ = (id) => document.getElementById(id);
const input = $("input");
const saved = load();
let settings = { ...DEFAULTS, ...saved.settings };

function load() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

function save() {
  const messages = savedChat().map(({ node, ...message }) => message);
  const state = { messages, settings, voices: savedVoices(), language: currentLanguage(), theme: document.documentElement.dataset.theme };
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // full or forbidden: the page works, it only forgets
  }
}

function request() {
  const limit = Number.parseInt(settings.maxTokens, 10);
  return {
    spec: currentSpec(),
    temperature: settings.temperature,
    system: settings.system.trim(),
    ...(limit > 0 ? { max_tokens: limit } : {}),
  };
}

let asked = 0;

async function refresh() {
  const status = $("status");
  const turn = ++asked;
  try {
    const { base, adapters, more } = await inventory(currentFilter(), wantedVoices());
    if (turn !== asked) return; // somebody has typed on meanwhile
    $("base-name").textContent = base.id;
    status.title = `${base.id} · ${base.max_model_len} ${say("tokens")}`;
    status.dataset.state = "ready";
    updateVoices(adapters, more);
  } catch {
    status.dataset.state = "lost";
    status.title = say("unreachable");
  }
}

function drawWords() {
  $("language").textContent = say("otherLanguage");
  $("examples").replaceChildren(
    ...say("examples").map(([picture, text]) => {
      const [hue, path] = PICTURES[picture];
      const card = document.createElement("button");
      card.type = "button";
      card.style.setProperty("--hue", hue);
      card.append(drawing(path), text);
      card.addEventListener("click", () => send(text));
      return card;
    }),
  );
  showRunning(isRunning());
}

function switchLanguage(code) {
  setLanguage(code);
  drawWords();
  drawVoices();
  if (!isRunning()) drawChat();
}

function showRunning(running) {
  $("composer").classList.toggle("running", running);
  $("send").title = $("send").ariaLabel = say(running ? "stop" : "send");
  $("send").disabled = !running && !input.value.trim();
}

function fit() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 180)}px`;
  showRunning(isRunning());
}

function submit() {
  if (isRunning()) return stop();
  const text = input.value.trim();
  if (!text) return;
  input.value = "";
  fit();
  send(text);
}

function showSettings() {
  $("temperature").value = settings.temperature;
  $("temperature-value").textContent = Number(settings.temperature).toFixed(2);
  $("temperature").style.setProperty("--fill", `${(settings.temperature / 2) * 100}%`);
  $("max-tokens").value = settings.maxTokens;
  $("system-prompt").value = settings.system;
}

function changeSettings(change) {
  settings = { ...settings, ...change };
  save();
}

setLanguage(saved.language ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"));
if (saved.theme) document.documentElement.dataset.theme = saved.theme;
startVoices(saved.voices, save, refresh);
startChat(saved.messages, { request, changed: save, running: showRunning });
drawWords();
showSettings();
refresh().then(drawChat);

setInterval(() => document.hidden || refresh(), REFRESH_MS);
addEventListener("focus", refresh);

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
input.addEventListener("input", fit);
input.addEventListener("keydown", (event) => {
  const composing = event.isComposing || event.keyCode === 229; // Enter that picks a Chinese word sends nothing
  if (event.key !== "Enter" || event.shiftKey || composing) return;
  event.preventDefault();
  if (!isRunning()) submit();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && isRunning() && !$("settings").open) stop();
});
$("clear").addEventListener("click", () => {
  clearChat();
  input.focus();
});
$("language").addEventListener("click", () => {
  switchLanguage(currentLanguage() === "zh" ? "en" : "zh");
  save();
});
$("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  save();
});
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("click", (event) => {
  if (event.target === $("settings")) $("settings").close(); // a click beside the drawer
});
$("temperature").addEventListener("input", (event) => {
  changeSettings({ temperature: Number(event.target.value) });
  showSettings();
});
$("max-tokens").addEventListener("input", (event) => changeSettings({ maxTokens: event.target.value }));
$("system-prompt").addEventListener("input", (event) => changeSettings({ system: event.target.value }));
$("reset").addEventListener("click", () => {
  changeSettings(DEFAULTS);
  showSettings();
});
