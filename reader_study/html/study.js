"use strict";
// The course of a study: start, training cases, cases, pairs, end. The state is one object, which is stored in the
// browser after every answer and is what the exported file holds.

const FORMAT = "medvolume reader study: answers";
const PLACE = `${FORMAT}/${CONTENT.study}/${CONTENT.reader}`;
const MOST_EVENTS = 2000; // of one item's log
const element = (id) => document.getElementById(id);
const waiting = new Map();
const state = {
  format: FORMAT, version: 1, study: CONTENT.study, reader: CONTENT.reader, years: null, started: null, saved: null,
  screen: [window.innerWidth, window.innerHeight], position: 0, answers: {},
};
let viewers = [];
let asking = 0;
let since = null; // when the shown item came into view; null while the page is hidden
let keptHere = true;

// Volumes: a file cannot be fetched from file://, but a script can be loaded.
window.receiveVolume = (name, text) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  waiting.get(name)?.resolve(bytes);
};
function load(name) {
  if (!waiting.has(name)) {
    const entry = {};
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    waiting.set(name, entry);
    const script = document.createElement("script");
    script.src = `volumes/${name}.js`;
    script.onload = () => script.remove();
    script.onerror = () => { waiting.delete(name); entry.reject(new Error(`volumes/${name}.js is missing from this folder`)); };
    document.head.append(script);
  }
  return waiting.get(name).promise;
}

const item = () => CONTENT.items[state.position];
const questions = (one) => CONTENT.questions[one.section === "pair" ? "pair" : "single"];
function answer(one) {
  return state.answers[one.id] ??= { answers: {}, comment: "", milliseconds: 0, visits: 0, done: false, log: [], dropped: 0 };
}
const complete = (one) => questions(one).every((question) => question.name in answer(one).answers);

function store() {
  try {
    localStorage.setItem(PLACE, JSON.stringify(state));
    keptHere = localStorage.getItem(PLACE) !== null;
  } catch { keptHere = false; }
}
function recover() {
  try { return JSON.parse(localStorage.getItem(PLACE)); } catch { return null; }
}
function take(saved) {
  if (!saved || saved.format !== FORMAT || saved.study !== CONTENT.study || saved.reader !== CONTENT.reader) return false;
  Object.assign(state, saved);
  state.position = Math.min(Math.max(Number(state.position) || 0, 0), CONTENT.items.length);
  return true;
}

// Time counts while the item is in view and the page is visible.
function tick() {
  if (since !== null) answer(item()).milliseconds += Math.round(performance.now() - since);
  since = document.hidden || state.position >= CONTENT.items.length || element("reading").hidden ? null : performance.now();
}
function log(kind, values) {
  const one = answer(item());
  const time = one.milliseconds + (since === null ? 0 : Math.round(performance.now() - since));
  const last = one.log.at(-1);
  const same = last && last[1] === kind && (kind !== "slice" || last[2] === values[0]);
  if (same && time - last[0] < 100) one.log.pop(); // a drag: its last place counts
  if (one.log.length < MOST_EVENTS) one.log.push([time, kind, ...values]);
  else one.dropped += 1;
}
function changed(viewer, kind, values) {
  log(kind, values);
  for (const other of viewers.filter((one) => one !== viewer)) { // the two of a pair move together
    if (kind === "slice") other.go(values[0], values[1], true);
    if (kind === "window") other.setWindow(values[0], values[1], true);
    if (kind === "plane") other.choose(values[0], true);
    if (kind === "large") other.toggleLarge(true);
    if (kind === "zoom") other.setZoom(other.views.find((view) => view.plane.axis === values[0]), values[1], values.slice(2), true);
  }
}

function page(name) {
  for (const id of ["start", "reading", "end"]) element(id).hidden = id !== name;
  const at = Math.min(state.position, CONTENT.items.length);
  element("progress").value = at / CONTENT.items.length;
  element("count").textContent = name === "reading" ? `${at + 1} of ${CONTENT.items.length}` : "";
}

function option(question, number, isList) {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("role", "radio");
  button.dataset.key = question.keys[number];
  button.append(Object.assign(document.createElement("kbd"), { textContent: question.keys[number] }), question.options[number]);
  button.addEventListener("click", () => choose(question, question.keys[number]));
  return button;
}
function buildForm(one) {
  element("form").replaceChildren(...questions(one).map((question, number) => {
    const group = document.createElement("fieldset");
    const options = document.createElement("div");
    const isList = question.keys[0] === "A";
    options.className = `options ${isList ? "list" : question.name === "confidence" ? "narrow" : ""}`;
    options.setAttribute("role", "radiogroup");
    options.setAttribute("aria-label", question.text);
    options.append(...question.keys.map((_, index) => option(question, index, isList)));
    group.append(Object.assign(document.createElement("legend"), { textContent: question.text }), options);
    group.addEventListener("focusin", () => { asking = number; mark(); });
    return group;
  }));
}
function mark() {
  const one = item();
  const { answers } = answer(one);
  [...element("form").children].forEach((group, number) => {
    const question = questions(one)[number];
    group.classList.toggle("active", number === asking);
    for (const button of group.querySelectorAll("button")) {
      button.setAttribute("aria-checked", String(answers[question.name] === button.dataset.key));
    }
  });
  const locked = one.truth && answer(one).done;
  element("next").disabled = !complete(one);
  element("back").disabled = state.position === 0;
  const right = one.truth === answers.decision ? "Right" : "Not so";
  element("truth").textContent = locked ? `${right}: this volume is ${one.truth === "R" ? "real" : "generated"}. Enter: next` : "\u00a0";
}
function choose(question, key) {
  const one = item();
  if (one.truth && answer(one).done) return; // the truth is shown
  answer(one).answers[question.name] = key;
  log("answer", [question.name, key]);
  const all = questions(one);
  const open = all.findIndex((other, number) => number > all.indexOf(question) && !(other.name in answer(one).answers));
  asking = open >= 0 ? open : Math.max(all.findIndex((other) => !(other.name in answer(one).answers)), -1);
  if (asking < 0) asking = all.indexOf(question);
  mark();
  tick();
  store();
}

async function show() {
  if (state.position >= CONTENT.items.length) {
    page("end");
    store();
    return;
  }
  page("reading");
  const one = item();
  const home = element("viewers");
  home.className = one.section === "pair" ? "pair" : "";
  viewers.forEach((viewer) => viewer.observer.disconnect());
  home.replaceChildren();
  const titles = one.section === "pair" ? ["left", "right"] : [""];
  viewers = titles.map((title) => new Viewer(home, CONTENT.shape, CONTENT.spacing, title, changed));
  element("stage").textContent = { training: "Training: this answer does not count", single: "\u00a0", pair: "Two volumes of one mask, moving together" }[one.section];
  element("comment").value = answer(one).comment;
  buildForm(one);
  asking = Math.max(questions(one).findIndex((question) => !(question.name in answer(one).answers)), 0);
  mark();
  try {
    const shown = await Promise.all(one.volumes.map(load));
    if (one !== item()) return;
    viewers.forEach((viewer, number) => viewer.show(shown[number]));
  } catch (error) { element("stage").textContent = error.message; return; }
  for (const name of one.volumes) waiting.delete(name);
  answer(one).visits += 1;
  since = null;
  tick();
  store();
  CONTENT.items[state.position + 1]?.volumes.forEach((name) => load(name).catch(() => {}));
}
function next() {
  const one = item();
  if (!complete(one)) return;
  tick();
  const first = !answer(one).done;
  answer(one).done = true;
  if (one.truth && first) { mark(); store(); return; } // Enter once more leaves it
  since = null;
  state.position += 1;
  show();
}
function back() {
  if (state.position === 0) return;
  tick();
  since = null;
  state.position -= 1;
  show();
}

function save() {
  state.saved = new Date().toISOString();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(state)], { type: "application/json" }));
  link.download = `answers_${CONTENT.reader}_${CONTENT.study.slice(0, 8)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  element("saved").textContent = `Saved as ${link.download} in the folder of your downloads.`;
}
function begin() {
  state.years = element("years").value === "" ? null : Number(element("years").value);
  state.started ??= new Date().toISOString();
  store();
  show();
}

const VIEW_KEYS = {
  ArrowUp: (v) => v.step(1), ArrowDown: (v) => v.step(-1), PageUp: (v) => v.step(5), PageDown: (v) => v.step(-5),
  ArrowLeft: (v) => v.choose(v.active - 1), ArrowRight: (v) => v.choose(v.active + 1), m: (v) => v.toggleLarge(),
  "+": (v) => v.zoomBy(1.25), "=": (v) => v.zoomBy(1.25), "-": (v) => v.zoomBy(0.8), "[": (v) => v.widen(-8), "]": (v) => v.widen(8),
  ",": (v) => v.brighten(-8), ".": (v) => v.brighten(8),
};
function resetViews() {
  viewers.forEach((viewer) => viewer.reset());
  log("reset", []);
}
function questionOf(key) {
  const all = questions(item());
  if (all[asking]?.keys.includes(key)) return all[asking];
  return all.find((question) => question.keys.includes(key) && question.keys[0] !== "A") ?? (all[asking + 1]?.keys.includes(key) ? all[asking + 1] : undefined);
}
document.addEventListener("keydown", (event) => {
  if (element("keys").open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === element("comment")) {
    if (event.key === "Escape") element("comment").blur();
    return;
  }
  if (event.key === "?") element("keys").showModal();
  else if (event.key === "Enter" && !element("start").hidden && event.target.tagName !== "BUTTON") begin();
  else if (event.key === "Enter" && !element("end").hidden && event.target.tagName !== "BUTTON") save();
  else if (!element("reading").hidden) readingKey(event);
});
function readingKey(event) {
  const key = event.key.length === 1 ? event.key.toUpperCase() : event.key;
  const question = questionOf(key);
  if (event.key === "Enter") next();
  else if (question) choose(question, key);
  else if (key === "P") back();
  else if (key === "N") element("comment").focus();
  else if (key === "S") save();
  else if (key === "0") resetViews();
  else if (key === "Backspace") { asking = Math.max(asking - 1, 0); mark(); }
  else if (VIEW_KEYS[event.key] ?? VIEW_KEYS[event.key.toLowerCase()]) (VIEW_KEYS[event.key] ?? VIEW_KEYS[event.key.toLowerCase()])(viewers[0]);
  else return;
  event.preventDefault();
}

element("comment").addEventListener("input", () => { answer(item()).comment = element("comment").value; store(); });
element("begin").addEventListener("click", begin);
element("next").addEventListener("click", next);
element("back").addEventListener("click", back);
element("export").addEventListener("click", save);
element("reopen").addEventListener("click", back);
element("help").addEventListener("click", () => element("keys").showModal());
element("close").addEventListener("click", () => element("keys").close());
element("import").addEventListener("click", () => element("file").click());
element("file").addEventListener("change", async () => {
  let saved = null;
  try { saved = JSON.parse(await element("file").files[0].text()); } catch { /* said below */ }
  if (take(saved)) { store(); show(); }
  else element("said").textContent = "This file holds no answers of this reader and study.";
});
document.addEventListener("visibilitychange", () => {
  if (element("reading").hidden) return;
  log(document.hidden ? "away" : "here", []);
  tick();
  store();
});
window.addEventListener("pagehide", () => { if (!element("reading").hidden) { tick(); store(); } });
window.addEventListener("beforeunload", (event) => { if (!keptHere && state.started) event.preventDefault(); });

const found = take(recover());
const parts = [["training", "training cases"], ["single", "volumes"], ["pair", "pairs of volumes"]];
for (const [section, text] of parts) {
  const count = CONTENT.items.filter((one) => one.section === section).length;
  if (count) element("plan").append(Object.assign(document.createElement("li"), { textContent: `${count} ${text}` }));
}
if (found) element("years").value = state.years ?? "";
if (found && state.started) show();
else {
  store();
  page("start");
  if (!keptHere) element("said").textContent = "This browser keeps nothing for pages of folders: press S to save the answers as a file before closing it.";
  element("begin").focus();
}
