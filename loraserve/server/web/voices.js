// Who answers: the base, one adapter, or a blend. Owns the chips, the mixer and the colours.

import { say } from "./words.js";

const HUES = [290, 50, 175, 0, 245, 145, 85, 25, 325, 210]; // of oklch, where all are equally bright
const FILTER_FROM = 9;
const TYPING_MS = 200;
const BLEND = "+";

const nodes = Object.fromEntries(
  ["voices", "voice-filter", "blend", "mixer", "spec", "composer"].map((id) => [id, document.getElementById(id)]),
);

let adapters = []; // those on show: the first that match the filter, and whoever is picked
let more = false; // there are others that match
const hues = new Map(); // by name, in order of appearance
let picked = "base"; // "base", an adapter's name, or BLEND
let scales = {}; // of the blend
let changed = () => {};

/** Begin with what was picked last time; `onChange` is called whenever the pick changes, `onFilter` with the filter. */
export function startVoices(saved, onChange, onFilter) {
  picked = saved?.picked ?? "base";
  scales = saved?.scales ?? {};
  changed = onChange;
  let typing;
  nodes["voice-filter"].addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(onFilter, TYPING_MS);
  });
  nodes["voice-filter"].addEventListener("keydown", (event) => {
    if (event.key === "Enter") event.preventDefault(); // it would send the message
  });
}

/** What adapters' names must contain to be on show. */
export function currentFilter() {
  return nodes["voice-filter"].value.trim();
}

/** The names that must be on show, whatever the filter is. */
export function wantedVoices() {
  if (picked === BLEND) return Object.keys(scales).filter((name) => scales[name]);
  return picked === "base" ? [] : [picked];
}

/** Take the server's list of adapters. Draws only what changed, so that an open mixer is not disturbed. */
export function updateVoices(list, hasMore) {
  const facts = (adapters) => JSON.stringify(adapters.map((a) => [a.id, a.status]));
  const same = facts(adapters) === facts(list) && more === hasMore && nodes.voices.childElementCount;
  adapters = list;
  more = hasMore;
  for (const { id } of list) if (!hues.has(id)) hues.set(id, HUES[hues.size % HUES.length]);
  const usable = usableNames();
  if (picked !== "base" && picked !== BLEND && !usable.includes(picked)) pick("base");
  if (picked === BLEND && !canBlend()) pick("base");
  if (!same) drawVoices();
}

export function drawVoices() {
  const strip = document.createElement("div");
  strip.className = "strip";
  strip.append(chip("base", say("base"), "base"), ...adapters.map((a) => chip(a.id, a.id, a.id, a)));
  strip.addEventListener("wheel", (event) => (strip.scrollLeft += event.deltaY), { passive: true });
  nodes.voices.replaceChildren(strip);
  if (canBlend()) nodes.voices.append(chip(BLEND, say("blend"), usableNames().slice(0, 4).join("+") || "base"));
  if (more) strip.append(hint("moreAdapters"));
  else if (!adapters.length) strip.append(hint(currentFilter() ? "noMatch" : "noAdapters"));
  nodes["voice-filter"].hidden = !more && adapters.length < FILTER_FROM && !currentFilter();
  const checked = strip.querySelector(":checked")?.parentElement;
  if (checked) strip.scrollLeft = checked.offsetLeft + checked.offsetWidth - strip.clientWidth + 40;
  nodes.blend.hidden = picked !== BLEND;
  drawMixer();
  tint();
}

function hint(word) {
  const node = document.createElement("span");
  node.className = "hint";
  node.textContent = say(word);
  return node;
}

function canBlend() {
  return usableNames().length > 1 || Boolean(currentFilter());
}

/** The SPEC to ask for. */
export function currentSpec() {
  if (picked !== BLEND) return picked;
  const usable = usableNames();
  const parts = Object.entries(scales).filter(([name, scale]) => scale && usable.includes(name));
  return parts.map(([name, scale]) => (scale === 1 ? name : `${name}:${scale}`)).join("+") || "base";
}

export function savedVoices() {
  return { picked, scales };
}

/** A chip that says who answered. */
export function badge(spec) {
  const node = document.createElement("span");
  node.className = "badge";
  node.dataset.spec = spec;
  paint(node, spec);
  const dot = document.createElement("i");
  paintDot(dot, spec);
  const label = spec === "base" ? say("base") : terms(spec).map(({ name, scale }) => (scale === 1 ? name : `${name} ${scale}`)).join(" + ");
  node.append(dot, label);
  return node;
}

/** Give a node the colour of whoever weighs most in a SPEC. */
export function paint(node, spec) {
  const heaviest = terms(spec).sort((a, b) => Math.abs(b.scale) - Math.abs(a.scale))[0];
  node.classList.toggle("neutral", !heaviest);
  node.style.setProperty("--hue", heaviest ? hueOf(heaviest.name) : 290);
}

function paintDot(dot, spec) {
  const parts = terms(spec);
  if (parts.length < 2) return;
  const total = parts.reduce((sum, part) => sum + Math.abs(part.scale), 0) || 1;
  let at = 0;
  const stops = parts.map((part) => {
    const from = at;
    at += (Math.abs(part.scale) / total) * 100;
    return `oklch(0.69 0.16 ${hueOf(part.name)}) ${from}% ${at}%`;
  });
  dot.style.background = `conic-gradient(${stops.join(",")})`;
}

function terms(spec) {
  if (spec === "base") return [];
  return spec.split("+").map((part) => {
    const [name, scale] = part.split(":");
    return { name, scale: scale === undefined ? 1 : Number(scale) };
  });
}

function hueOf(name) {
  return hues.get(name) ?? HUES[[...name].reduce((sum, letter) => sum + letter.codePointAt(0), 0) % HUES.length];
}

function usableNames() {
  return adapters.filter((adapter) => adapter.status === "ready").map((adapter) => adapter.id);
}

function chip(value, text, spec, adapter) {
  const label = document.createElement("label");
  label.className = "chip";
  paint(label, value === BLEND ? "base" : spec);
  const input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "voice", value, checked: value === picked });
  const dot = document.createElement("i");
  paintDot(dot, spec);
  label.append(input, dot, text);
  if (adapter && adapter.status !== "ready") {
    input.disabled = true;
    label.title = `${adapter.id} ${say("refused")}: ${adapter.problems.join("; ")}`;
  } else if (adapter) {
    label.title = [adapter.description, `r=${adapter.rank}`, adapter.version && `v${adapter.version}`].filter(Boolean).join(" · ");
  }
  input.addEventListener("change", () => pick(value));
  return label;
}

function pick(value) {
  if (value === BLEND && currentBlendIsEmpty()) {
    const names = usableNames();
    const first = names.includes(picked) ? picked : names[0];
    const second = names.find((name) => name !== first);
    scales = { ...(first && { [first]: second ? 0.6 : 1 }), ...(second && { [second]: 0.4 }) };
  }
  picked = value;
  for (const input of nodes.voices.querySelectorAll("input")) input.checked = input.value === value;
  nodes.blend.hidden = value !== BLEND;
  drawMixer();
  tint();
  changed();
}

function currentBlendIsEmpty() {
  const usable = usableNames();
  return !Object.entries(scales).some(([name, scale]) => scale && usable.includes(name));
}

function drawMixer() {
  if (picked !== BLEND) return;
  nodes.mixer.replaceChildren(...usableNames().map(slider));
  showSpec();
}

function slider(name) {
  const row = document.createElement("label");
  row.className = "fader";
  paint(row, name);
  const title = document.createElement("span");
  title.append(document.createElement("i"), name);
  const range = document.createElement("input");
  Object.assign(range, { type: "range", min: 0, max: 1.5, step: 0.05, value: scales[name] ?? 0 });
  range.dataset.adapter = name;
  const value = document.createElement("output");
  const show = () => {
    value.textContent = Number(range.value).toFixed(2);
    row.classList.toggle("off", Number(range.value) === 0);
    range.style.setProperty("--fill", `${(range.value / 1.5) * 100}%`);
  };
  range.addEventListener("input", () => {
    scales = { ...scales, [name]: Number(range.value) };
    show();
    showSpec();
    tint();
    changed();
  });
  show();
  row.append(title, range, value);
  return row;
}

function showSpec() {
  const spec = currentSpec();
  nodes.spec.textContent = spec === "base" ? say("blendEmpty") : spec;
}

/** The composer wears the colour of whoever is picked. */
function tint() {
  paint(nodes.composer, currentSpec());
}
