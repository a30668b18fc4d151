// The page of the studio. What it shows of the server is in `state`; each viewer is a `Pane`.
import { Niivue } from "./niivue.js";
import { connected, signedDistance } from "./regions.js";

const $ = (id) => document.getElementById(id);
const COLORS = ["#ff5c5c", "#4cc3ff", "#ffd84c", "#63e077", "#c88bff", "#ff9d42", "#53e0d2", "#ff7ec8", "#b8d94a"];
const UNDO_BYTES = 256 * 2 ** 20;
const NIFTI_OFFSET = 352;
const BLINK_MS = 600;

const state = {
  model: null, // what the server says of the chosen pipeline
  models: new Map(), // by name: title, about (what the server says, once it was loaded), fields (steps and guidance, once it was left), refused
  masks: new Map(), images: new Map(), results: new Map(), examples: [],
  mask: null, // the mask that is painted on
  job: null,
  tool: "pen", label: 1, blinking: null,
};

// ---- the server

async function ask(method, path, body) {
  const raw = body instanceof Blob || body instanceof Uint8Array;
  const init = body === undefined ? { method } : { method, body: raw ? body : JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, init);
  } catch {
    throw new Error("The studio does not answer; was it ended?");
  }
  if (response.status === 403) throw new Error("This session has ended; open the address with the token again.");
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error || `The studio answered ${response.status}.`);
  return response;
}
const askJson = async (...args) => (await ask(...args)).json();
const askBytes = async (path) => new Uint8Array(await (await ask("GET", path)).arrayBuffer());

function say(text, bad = false) {
  $("message").textContent = text;
  $("message").title = text;
  $("message").classList.toggle("bad", bad);
}

// Runs what a button does; what goes wrong is said, and nothing else happens.
const doing = (work) => async (...args) => {
  try {
    await work(...args);
  } catch (error) {
    say(error.message, true);
    if (!(error instanceof Error) || error instanceof TypeError) console.error(error);
  }
};

// ---- the viewers

class Pane {
  constructor(name) {
    this.name = name;
    this.grid = null;
    this.shows = "";
    this.turn = Promise.resolve(); // one change after the other
    this.nv = new Niivue({
      backColor: [0, 0, 0, 1], crosshairColor: [0.35, 0.75, 1, 0.8], crosshairWidth: 0.25, fontColor: [1, 0.85, 0.35, 1],
      isRadiologicalConvention: true, multiplanarShowRender: 1, multiplanarLayout: 2, multiplanarEqualSize: false,
      dragAndDropEnabled: false, isColorbar: false, loadingText: "", clipPlaneHotKey: "", viewModeHotKey: "",
      cycleClipPlaneHotKey: "", dragMode: 1, show3Dcrosshair: true, fontMinPx: 12, fontSizeScaling: 0.3, isResizeCanvas: true,
      drawingEnabled: false, logLevel: "warn", tileMargin: 2, renderOverlayBlend: 1,
    });
    this.nv.onLocationChange = (location) => this.where(location);
  }

  async attach() {
    await this.nv.attachToCanvas($(`${this.name}-canvas`), false);
    this.nv.setSliceType(3);
  }

  // Shows volumes, [{url, window}], with a drawing (bytes) over them.
  show(key, grid, volumes, drawing, { paint = false, opacity = 0.6 } = {}) {
    this.turn = this.turn.then(() => this.drawnOnce(async () => {
      const nv = this.nv;
      const kept = sameGrid(this.grid, grid) ? [...nv.scene.crosshairPos] : null;
      const azimuth = [nv.scene.renderAzimuth, nv.scene.renderElevation];
      nv.setDrawingEnabled(false);
      nv.drawBitmap = null;
      unlink();
      nv.screenSlices = []; // until the volumes are there, a click would meet none
      await nv.loadVolumes(volumes.map(({ url, window, shown = 1 }) => ({
        url, name: "volume.nii", colormap: "gray", opacity: shown,
        ...(window ? { cal_min: window[0], cal_max: window[1] } : {}),
      })));
      this.grid = grid;
      this.shows = key;
      nv.createEmptyDrawing();
      if (drawing) nv.drawBitmap.set(drawing);
      nv.setDrawColormap(lut());
      nv.setDrawOpacity(opacity);
      nv.refreshDrawing(true, false);
      if (kept) nv.scene.crosshairPos = kept;
      if (kept) [nv.scene.renderAzimuth, nv.scene.renderElevation] = azimuth;
      nv.setDrawingEnabled(paint && draws());
      link();
    })).catch((error) => say(error.message, true));
    return this.turn;
  }

  // Draws once, after several changes: NiiVue draws after each, which software renderers take long for.
  async drawnOnce(changes) {
    const { nv } = this, draw = nv.drawScene;
    nv.drawScene = () => {};
    try {
      await changes();
    } finally {
      nv.drawScene = draw;
      nv.drawScene();
    }
  }

  where(location) {
    const [i, j, k] = location.vox ?? [];
    if (!this.grid || i === undefined) return;
    const mm = this.grid.affine.slice(0, 3).map((row) => row[0] * i + row[1] * j + row[2] * k + row[3]);
    const code = this.nv.drawBitmap?.[i + this.grid.shape[0] * (j + this.grid.shape[1] * k)];
    const label = code && this === left ? ` · ${labelName(code)}` : "";
    $(`${this.name}-where`).textContent = `${mm.map((one) => one.toFixed(0)).join(" ")} mm${label}`;
  }
}

const left = new Pane("left");
const right = new Pane("right");
const undo = { past: [], future: [], now: null };

const sameGrid = (a, b) => !!a && !!b && ["shape", "spacing"].every((key) => String(a[key]) === String(b[key]));

// Moves the crosshairs of both views as one, where both show volumes of one grid.
function link() {
  const together = sameGrid(left.grid, right.grid) && left.nv.volumes.length > 0 && right.nv.volumes.length > 0;
  left.nv.broadcastTo(together ? [right.nv] : [], { "2d": true, "3d": true });
  right.nv.broadcastTo(together ? [left.nv] : [], { "2d": true, "3d": true });
}

// Moves each crosshair alone: NiiVue would look for a place in volumes that are not loaded yet.
function unlink() {
  left.nv.broadcastTo([]);
  right.nv.broadcastTo([]);
}

const colorOf = (code) => (code >= state.model.unknown ? "#8a8f98" : COLORS[(code - 1) % COLORS.length]);
const labelName = (code) =>
  code === state.model.outside ? "outside the field of view"
    : code === state.model.unknown ? "unknown" : state.model.labels[code]?.name ?? "";

function lut() {
  const channels = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
  for (let code = 1; code < 256; code++) {
    const value = parseInt(colorOf(code).slice(1), 16);
    channels.R.push(value >> 16); channels.G.push((value >> 8) & 255); channels.B.push(value & 255);
    channels.A.push(255); channels.I.push(code); channels.labels.push("");
  }
  return channels;
}

// ---- painting

function startUndo(bytes) {
  undo.past = []; undo.future = []; undo.now = bytes.slice();
  undoButtons();
}

function undoButtons() {
  $("undo").disabled = undo.past.length === 0;
  $("redo").disabled = undo.future.length === 0;
}

// Called when a stroke ends: what was painted becomes one step of undo.
function keepStroke() {
  const bytes = left.nv.drawBitmap;
  if (!painting() || !undo.now || !bytes || bytes.length !== undo.now.length) return;
  if (bytes.every((code, at) => code === undo.now[at])) return;
  undo.past.push(undo.now);
  while (undo.past.length * bytes.length > UNDO_BYTES) undo.past.shift();
  undo.future = [];
  undo.now = bytes.slice();
  undoButtons();
}

function step(from, to) {
  keepStroke();
  if (!from.length || !painting()) return;
  to.push(undo.now);
  undo.now = from.pop();
  setDrawing(undo.now);
  undoButtons();
}

function setDrawing(bytes) {
  left.nv.drawBitmap.set(bytes);
  left.nv.refreshDrawing(true, false);
}

const painting = () => state.mask !== null && left.shows.startsWith("paint");
const draws = () => !["move", "grow"].includes(state.tool); // a stroke of the mouse paints

function setTool(tool) {
  state.tool = tool;
  document.querySelectorAll("[data-tool]").forEach((one) => one.setAttribute("aria-checked", one.dataset.tool === tool));
  left.nv.setPenValue(tool === "erase" ? 0 : state.label, tool === "fill");
  left.nv.opts.penSize = Number($("size").value);
  left.nv.setDrawingEnabled(painting() && draws());
  document.querySelectorAll("[data-for]").forEach((one) => (one.hidden = (one.dataset.for === "grow") !== (tool === "grow")));
}

function setLabel(code) {
  state.label = code;
  document.querySelectorAll("[data-code]").forEach((one) => one.setAttribute("aria-checked", Number(one.dataset.code) === code));
  setTool(["fill", "pen", "grow"].includes(state.tool) ? state.tool : "pen");
}

function setSize(size) {
  $("size").value = size;
  $("size-shown").textContent = $("size").value;
  setTool(state.tool);
}

function setTolerance(percent) {
  $("tolerance").value = percent;
  $("tolerance-shown").textContent = `${$("tolerance").value} %`;
}

const larger = (by) => (state.tool === "grow" ? setTolerance(Number($("tolerance").value) + by) : setSize(Number($("size").value) + by));

// Fills the gaps of the chosen label between axial slices: by the mean of the signed distances to its border in the two
// slices around a gap (Raya and Udupa 1990). Only background is painted over. NiiVue's own interpolation changes all
// labels in these slices.
function fillBetween() {
  keepStroke();
  if (!painting()) return;
  const [x, y, z] = left.grid.shape, bytes = left.nv.drawBitmap, plane = x * y;
  const holds = (k) => bytes.subarray(k * plane, (k + 1) * plane).includes(state.label);
  const slices = [...Array(z).keys()].filter(holds);
  const gaps = slices.slice(1).map((high, at) => [slices[at], high]).filter(([low, high]) => high - low > 1);
  if (!gaps.length) throw new Error(`Paint ${labelName(state.label)} on two axial slices that are not neighbors first.`);
  for (const [low, high] of gaps) {
    const [below, above] = [low, high].map((k) => signedDistance(bytes.subarray(k * plane, (k + 1) * plane), x, y, state.label));
    for (let k = low + 1; k < high; k++) {
      const share = (k - low) / (high - low);
      for (let at = 0; at < plane; at++) {
        if (bytes[k * plane + at] === 0 && (1 - share) * below[at] + share * above[at] > 0) bytes[k * plane + at] = state.label;
      }
    }
  }
  left.nv.refreshDrawing(true, false);
  keepStroke();
}

// Gives the chosen label to what is joined to a clicked voxel. NiiVue's own tool (clickToSegment) takes everything
// brighter or darker than the click, paints over other labels, and takes the wheel, which goes through the slices here.
function growAt(event) {
  const nv = left.nv, [x, y] = [event.offsetX * nv.uiData.dpr, event.offsetY * nv.uiData.dpr], tile = nv.tileIndex(x, y);
  if (tile < 0 || nv.screenSlices[tile].axCorSag > 2) return; // beside the slices, or in the 3-D view
  const [i, j, k] = nv.frac2vox(nv.screenXY2TextureFrac(x, y, tile, false)), [nx, ny, nz] = left.grid.shape;
  if (![[i, nx], [j, ny], [k, nz]].every(([at, side]) => at >= 0 && at < side)) return;
  keepStroke();
  const bytes = nv.drawBitmap, { img, cal_min: low, cal_max: high } = nv.volumes[0], from = i + nx * (j + ny * k);
  if (bytes[from] === 255) throw new Error("This is outside the field of view; click inside.");
  if (bytes[from] === state.label) throw new Error(`This voxel is ${labelName(state.label)} already; click beside it.`);
  const tolerance = (Number($("tolerance").value) / 100) * (high - low);
  const found = connected(bytes, img, left.grid.shape, from, tolerance);
  for (const at of found) bytes[at] = state.label;
  nv.refreshDrawing(true, false);
  keepStroke();
  say(`${labelName(state.label)} grew by ${found.length} voxels.`);
}

// ---- what is shown

async function showLeft(key) {
  stopBlinking();
  keepStroke();
  const [kind, under] = key.split(":");
  if (kind === "result") {
    await showResult(left, state.results.get(under), 0);
    $("no-mask").hidden = true;
  } else {
    if (!state.mask) return;
    const bytes = undo.now ?? await askBytes(`/api/masks/${state.mask.id}/drawing`);
    if (!undo.now) startUndo(bytes);
    const result = state.results.get(under), image = state.images.get(under);
    const url = result ? `/api/results/${under}/view` : image ? `/api/images/${under}/view` : `/api/masks/${state.mask.id}/view`;
    await left.show(key, state.mask, [{ url, window: result ? state.model.windows[0] : image ? null : [0, 1] }], bytes,
      { paint: true, opacity: result || image ? 0.45 : 0.85 });
    setTool(state.tool);
  }
  $("left").value = key;
  markCards();
}

async function showResult(pane, result, channel, extra = []) {
  const overlay = result.maps
    ? await askBytes(`/api/results/${result.id}/drawing`)
    : result.mask && state.masks.has(result.mask) ? await askBytes(`/api/masks/${result.mask}/drawing`) : null;
  const url = `/api/results/${result.id}/view?channel=${channel}`;
  const window = result.maps ? [1e6, 2e6] : windowOf(result, channel);
  await pane.show(`result:${result.id}`, result, [{ url, window }, ...extra], overlay,
    { opacity: result.maps ? 0.85 : Number($("overlay").value) / 100 });
}

function windowOf(result, channel) {
  const name = result.channels[channel];
  return state.model.windows[name === undefined ? channel : state.model.channels.indexOf(name)];
}

async function showRight(id) {
  stopBlinking();
  const result = state.results.get(id);
  if (!result) return;
  const channels = result.channels.length > 1 ? result.channels : [];
  if ($("channel").dataset.of !== id) {
    options($("channel"), channels.map((name, number) => [String(number), name]));
    $("channel").dataset.of = id;
  }
  $("channel").hidden = channels.length === 0;
  $("nothing").hidden = true;
  await showResult(right, result, Number($("channel").value || 0));
  $("right").value = id;
  markCards();
}

const shownId = (pane) => (pane.shows.startsWith("result:") ? pane.shows.slice(7) : null);

function canBlink() {
  const [a, b] = [shownId(left), shownId(right)];
  return a && b && a !== b && sameGrid(left.grid, right.grid);
}

async function blink() {
  if (state.blinking) {
    const id = shownId(right);
    stopBlinking();
    await showRight(id);
    return;
  }
  if (!canBlink()) throw new Error("Choose a volume of the same grid in the left view first, then blink.");
  const other = state.results.get(shownId(left)), mine = state.results.get(shownId(right));
  const channel = Number($("channel").value || 0);
  await showResult(right, mine, channel, [
    { url: `/api/results/${other.id}/view?channel=${channel}`, window: windowOf(other, channel), shown: 0 },
  ]);
  let on = false;
  state.blinking = setInterval(() => {
    on = !on;
    right.nv.setOpacity(1, on ? 1 : 0);
  }, BLINK_MS);
  $("blink").setAttribute("aria-pressed", "true");
}

// The right volume minus the left one, in the right view: where they are equal, it is gray.
async function difference() {
  if (right.shows === "difference") return showRight($("right").value);
  if (!canBlink()) throw new Error("Choose another volume of the same grid in the left view first.");
  stopBlinking();
  const channel = Number($("channel").value || 0), mine = state.results.get(shownId(right));
  const [a, b] = await Promise.all([left, right].map((pane) => askBytes(`/api/results/${shownId(pane)}/view?channel=${channel}`)));
  const values = new Float32Array(b.buffer, NIFTI_OFFSET), other = new Float32Array(a.buffer, NIFTI_OFFSET);
  let most = 0;
  for (let at = 0; at < values.length; at++) {
    values[at] -= other[at];
    most = Math.max(most, Math.abs(values[at]));
  }
  const url = URL.createObjectURL(new Blob([b]));
  await right.show("difference", mine, [{ url, window: [-most || -1, most || 1] }], null);
  URL.revokeObjectURL(url);
  $("difference").setAttribute("aria-pressed", "true");
  say(most ? `#${mine.number} minus the left one: up to ${most.toPrecision(3)}` : "The two volumes are equal.");
  markCards();
}

function stopBlinking() {
  clearInterval(state.blinking);
  state.blinking = null;
  $("blink").setAttribute("aria-pressed", "false");
  $("difference").setAttribute("aria-pressed", "false");
}

// ---- lists

function options(select, pairs, groups = false) {
  const make = ([value, text]) => Object.assign(document.createElement("option"), { value, textContent: text });
  select.replaceChildren(...(groups ? pairs.filter(([, inner]) => inner.length).map(([name, inner]) => {
    const group = Object.assign(document.createElement("optgroup"), { label: name });
    group.replaceChildren(...inner.map(make));
    return group;
  }) : pairs.map(make)));
}

const nameOf = (result) => result.name.replace(/_000$/, "");
const title = (result) => `#${result.number} ${nameOf(result)}`;
// The model comes first: of a long text in a list the end is cut off, and volumes of one mask are told apart by it.
const titleWithModel = (result) => (state.models.size > 1
  ? `#${result.number} ${state.models.get(result.model).title} · ${nameOf(result)}` : title(result));

function lists() {
  const model = state.model, results = [...state.results.values()], fits = (one) => sameGrid(one, state.mask);
  const used = new Set([...state.masks.values()].map((mask) => mask.name));
  options($("mask"), [
    ["This session", [...state.masks.values()].map((mask) => [`mask:${mask.id}`, mask.name])],
    ["Without", model.mask === "optional" ? [["none", "No mask"]] : []],
    ["Examples", state.examples.map((one, number) => [`example:${number}`, one.name]).filter(([, name]) => !used.has(name))],
  ], true);
  $("mask").value = state.mask ? `mask:${state.mask.id}` : "none";
  showConditions();
  const images = [...state.images.values()].filter(fits), shown = left.shows;
  options($("left"), [
    ["Paint", state.mask ? [["paint", "Paint the mask"]] : []],
    ["Paint over", state.mask && !model.maps ? [
      ...images.map((image) => [`paint:${image.id}`, image.name]),
      ...results.filter(fits).map((result) => [`paint:${result.id}`, `over ${title(result)}`]),
    ] : []],
    ["Compare", results.map((result) => [`result:${result.id}`, titleWithModel(result)])],
  ], true);
  if (shown) $("left").value = shown;
  const before = shownId(right) ?? $("right").value;
  options($("right"), results.length ? results.map((result) => [result.id, titleWithModel(result)]) : [["", "No volume yet"]]);
  if (state.results.has(before)) $("right").value = before;
  const bases = state.mask ? results.filter((result) => result.mask && fits(result)) : [], chosen = $("edit").value;
  options($("edit"), [["", "Everything"], ...bases.map((result) => [result.id, `Keep #${result.number} but for my changes`])]);
  $("edit").value = model.edits && bases.some((result) => result.id === chosen) ? chosen : "";
  $("editing").hidden = !model.edits;
  $("strength-field").hidden = $("edit").value === "";
  $("save-mask").href = state.mask ? `/api/masks/${state.mask.id}/file` : "";
  const accepted = results.filter((result) => result.accepted).length;
  $("accepted").textContent = accepted;
  $("zip").setAttribute("aria-disabled", accepted === 0);
  $("nnunet").setAttribute("aria-disabled", accepted === 0 || results.some((result) => result.accepted && !result.mask));
}

function markCards() {
  document.querySelectorAll(".card").forEach((card) =>
    card.classList.toggle("shown", [shownId(left), shownId(right)].includes(card.dataset.id)));
  for (const id of ["left", "right"]) $(id).title = $(id).selectedOptions[0]?.textContent ?? "";
  $("blink").disabled = !canBlink();
  $("difference").disabled = !canBlink() && right.shows !== "difference";
}

function addCard(result) {
  const card = document.createElement("div");
  card.className = "card";
  card.dataset.id = result.id;
  const guidance = typeof result.guidance === "number" ? `guidance ${result.guidance}` : "";
  card.innerHTML = `<canvas width="76" height="76" tabindex="0" role="button"></canvas><div>
    <b></b><small></small><small></small><small class="of"></small><div class="row"><button data-do="accept">Accept</button>
    <button data-do="again" title="Copy as Python, copy as command">Copy as</button><a class="button" title="Mask, volume and record">Zip</a></div></div>`;
  const [name, ...lines] = card.querySelectorAll("b, small");
  name.textContent = title(result);
  lines[0].textContent = `seed ${result.seed} · ${result.steps} steps`;
  const time = Object.assign(document.createElement("span"), { className: "time", textContent: `${result.seconds.toFixed(1)} s ` });
  lines[1].append(time, result.edited ? "edited" : guidance);
  lines[2].textContent = state.models.get(result.model).title;
  lines[2].hidden = state.models.size === 1;
  card.title = [title(result), result.model, ...result.warnings].join("\n");
  card.querySelector("a").href = `/api/results/${result.id}/download`;
  const show = doing(() => showRight(result.id));
  card.querySelector("canvas").onclick = show;
  card.querySelector("canvas").onkeydown = (event) => event.key === "Enter" && show();
  const accept = card.querySelector("[data-do=accept]");
  const mark = () => {
    accept.setAttribute("aria-pressed", result.accepted);
    accept.textContent = result.accepted ? "Accepted" : "Accept";
  };
  accept.onclick = doing(async () => {
    Object.assign(result, await askJson("POST", `/api/results/${result.id}/accept`, { accepted: !result.accepted }));
    mark();
    lists();
  });
  mark();
  card.querySelector("[data-do=again]").onclick = doing(async () => {
    const text = await askJson("GET", `/api/results/${result.id}/again`);
    $("again-command").textContent = text.command;
    $("again-python").textContent = text.python;
    $("again").showModal();
  });
  $("results").prepend(card);
  thumbnail(card.querySelector("canvas"), result).catch((error) => say(error.message, true));
}

// The middle coronal slice, from the voxels of the view.
async function thumbnail(canvas, result) {
  const bytes = await askBytes(result.maps ? `/api/results/${result.id}/drawing` : `/api/results/${result.id}/view`);
  const values = result.maps ? bytes : new Float32Array(bytes.buffer, NIFTI_OFFSET);
  const [x, y, z] = result.shape, [mx, , mz] = result.spacing, [low, high] = windowOf(result, 0);
  const small = new OffscreenCanvas(x, z), pixels = new ImageData(x, z), j = y >> 1;
  for (let k = 0; k < z; k++) {
    for (let i = 0; i < x; i++) {
      const value = values[i + x * (j + y * k)], at = 4 * ((z - 1 - k) * x + (x - 1 - i));
      const color = result.maps ? parseInt(colorOf(value).slice(1), 16) : null;
      const gray = 255 * (value - low) / (high - low);
      pixels.data.set(result.maps ? (value ? [color >> 16, (color >> 8) & 255, color & 255, 255] : [0, 0, 0, 255])
        : [gray, gray, gray, 255], at);
    }
  }
  small.getContext("2d").putImageData(pixels, 0, 0);
  const scale = Math.min(76 / (x * mx), 76 / (z * mz)), [width, height] = [x * mx * scale, z * mz * scale];
  canvas.getContext("2d").drawImage(small, (76 - width) / 2, (76 - height) / 2, width, height);
}

// ---- masks and files

async function chooseMask(mask) {
  keepStroke();
  if (mask) state.masks.set(mask.id, mask);
  state.mask = mask;
  undo.now = null;
  if (mask) left.shows = "";
  lists();
  $("no-mask").hidden = mask !== null;
  if (mask) await showLeft("paint");
  else setTool(state.tool);
}

// Chooses the newest mask of the session, or an example, or an empty one.
async function firstMask() {
  const body = state.examples.length ? { example: 0 } : {};
  await chooseMask([...state.masks.values()].at(-1) ?? (await askJson("POST", "/api/masks", body)).mask);
}

async function upload(files) {
  const { upload: id } = await askJson("POST", "/api/uploads");
  for (const [number, file] of files.entries()) {
    say(`Uploading ${file.name}${files.length > 1 ? ` (${number + 1} of ${files.length})` : ""} …`);
    await ask("PUT", `/api/uploads/${id}?name=${encodeURIComponent(file.name)}`, file);
  }
  say("Reading …");
  return id;
}

async function openMask(files) {
  if (!files.length) return;
  const { mask, warnings } = await askJson("POST", "/api/masks", { upload: await upload(files) });
  await chooseMask(mask);
  say(warnings.join(" · ") || `${mask.name} is open.`, warnings.length > 0);
}

async function openImage(files) {
  if (!files.length) return;
  const { image, warnings } = await askJson("POST", "/api/images", { upload: await upload(files) });
  state.images.set(image.id, image);
  if (!sameGrid(image, state.mask)) await chooseMask((await askJson("POST", "/api/masks", { image: image.id })).mask);
  lists();
  await showLeft(`paint:${image.id}`);
  say(warnings.join(" · ") || `${image.name} is under the mask.`, warnings.length > 0);
  return image;
}

function pick(then) {
  $("file").value = "";
  $("file").onchange = doing(() => then([...$("file").files]));
  $("file").click();
}

// ---- conditions

function conditionFields() {
  const model = state.model, fields = document.createElement("div");
  fields.className = "fields";
  const add = (name, field) => {
    field.id = `condition-${name}`;
    fields.append(Object.assign(document.createElement("label"), { textContent: name, htmlFor: field.id }), field);
  };
  for (const [name, values] of Object.entries(model.classes)) {
    const field = document.createElement("select");
    options(field, [...(model.optional.includes(name) ? [["", "any"]] : []), ...values.map((value) => [value, value])]);
    field.dataset.class = name;
    add(name, field);
  }
  for (const [name, { low, high, mean }] of Object.entries(model.numbers)) {
    const field = Object.assign(document.createElement("input"), { type: "number", step: "any" });
    field.placeholder = `${+low.toPrecision(3)} to ${+high.toPrecision(3)}${model.optional.includes(name) ? ", or none" : ""}`;
    if (!model.optional.includes(name)) field.value = +mean.toPrecision(4);
    field.dataset.number = name;
    add(name, field);
  }
  for (const name of model.images) {
    const field = Object.assign(document.createElement("button"), { textContent: "Open …" });
    field.dataset.image = name;
    field.onclick = () => pick(async (files) => {
      const { image } = await askJson("POST", "/api/images", { upload: await upload(files) });
      state.images.set(image.id, image);
      field.dataset.id = image.id;
      field.textContent = image.name;
      say(`${image.name} is the ${name}.`);
      lists();
    });
    add(name, field);
  }
  if (model.mask !== "required" && !model.draws_shape) {
    const field = document.createElement("span");
    field.append(...model.shape.map((side, axis) => Object.assign(document.createElement("input"),
      { type: "number", min: 1, step: 1, value: side, title: ["to the right", "to the front", "upward"][axis], className: "side" })));
    add("voxels", field);
  }
  for (const field of fields.querySelectorAll("[id]")) keepGiven(field, document.getElementById(field.id));
  $("condition-fields").replaceChildren(fields);
}

// Takes over what was given in the field of another model, where this one takes it.
function keepGiven(field, before) {
  if (before?.tagName !== field.tagName) return;
  if (field.dataset.image && before.dataset.id) {
    field.dataset.id = before.dataset.id;
    field.textContent = before.textContent;
  }
  if (field.dataset.number || [...(field.options ?? [])].some((one) => one.value === before.value)) field.value = before.value;
}

// The number of voxels is asked for where no mask sets it.
function showConditions() {
  const field = $("condition-voxels"), fields = $("condition-fields").firstChild;
  if (field) field.hidden = field.previousSibling.hidden = state.mask !== null;
  $("conditions").hidden = ![...fields.children].some((one) => !one.hidden);
}

function conditions() {
  const values = (kind, get) => Object.fromEntries([...document.querySelectorAll(`[data-${kind}]`)]
    .map((field) => [field.dataset[kind], get(field)]).filter(([, value]) => value !== null && value !== undefined));
  return {
    classes: values("class", (field) => field.value || null),
    numbers: values("number", (field) => numberIn(field)),
    images: values("image", (field) => field.dataset.id),
  };
}

function numberIn(field) {
  if (field.value.trim() === "") return null;
  return Number(field.value);
}

// ---- generation

const generate = () => running(async () => {
  const body = { model: state.model.name, ...conditions(), seed: numberIn($("seed")) ?? 0, steps: numberIn($("steps")), guidance: numberIn($("guidance")) };
  if (state.mask) {
    const { mask } = await askJson("POST", `/api/masks/${state.mask.id}/paint`, undo.now);
    if (mask.id !== state.mask.id) { // it was painted on, and is a new version
      state.masks.set(mask.id, mask);
      state.mask = mask;
      lists();
    }
    body.mask = mask.id;
    if ($("edit").value) body.edit = { result: $("edit").value, strength: numberIn($("strength")) };
  } else {
    const sides = [...document.querySelectorAll(".side")].map(numberIn);
    if (sides.length) body.shape = sides;
  }
  return body;
});

// Runs a job of the server, whose request `body` returns.
async function running(body) {
  if ($("generate").disabled) return;
  keepStroke();
  $("generate").disabled = true;
  try {
    state.job = await askJson("POST", "/api/jobs", await body());
    await follow();
  } finally {
    state.job = null;
    $("generate").disabled = false;
    $("cancel").disabled = true;
    $("progress").value = 0;
  }
}

async function follow() {
  $("generate").disabled = true;
  $("cancel").disabled = false;
  const started = performance.now();
  for (;;) {
    const job = state.job = await askJson("GET", `/api/jobs/${state.job.id}`);
    const seconds = `${((performance.now() - started) / 1000).toFixed(0)} s`;
    if (job.state === "queued") progress(0, job.position ? `${job.position} before this one in the queue` : "Starting …");
    if (job.state === "running" && job.loading) progress(0, `Loading the model ${job.loading} … · ${seconds}`);
    else if (job.state === "running") {
      progress(job.steps ? job.step / job.steps : 0, job.step < job.steps || !job.steps ? `Step ${job.step} of ${job.steps || "…"} · ${seconds}` : `Decoding · ${seconds}`);
    }
    if (job.state === "canceled") { progress(0, "Canceled"); return; }
    if (job.state === "failed") { progress(0, "Nothing was generated"); throw new Error(job.message); }
    if (job.state === "done" && job.mask) {
      progress(1, "Done");
      await chooseMask(job.mask);
      say(`${job.mask.name} is open.`);
      return;
    }
    if (job.state === "done" && !job.result) { progress(1, "The model is loaded"); return; }
    if (job.state === "done") {
      progress(1, `Done in ${job.result.seconds.toFixed(1)} s`);
      state.results.set(job.result.id, job.result);
      addCard(job.result);
      lists();
      await showRight(job.result.id);
      say(job.result.warnings.join(" · ") || `${title(job.result)} is done.`, job.result.warnings.length > 0);
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, 60));
  }
}

function progress(share, text) {
  $("progress").value = share;
  $("progress-text").textContent = text;
}

async function cancel() {
  if (state.job) await ask("DELETE", `/api/jobs/${state.job.id}`);
}

// ---- models

// Everything on the page that depends on the chosen model.
function useModel(model) {
  const before = state.models.get(state.model?.name), entry = state.models.get(model.name);
  if (before) before.fields = [$("steps").value, $("guidance").value];
  state.model = entry.about = model;
  $("model").textContent = model.name.replace(/\/$/, "").split("/").slice(-2).join("/");
  $("model").title = $("models").title = model.description || model.name;
  $("model-list").value = model.name;
  [$("steps").value, $("guidance").value] = entry.fields ?? [model.steps, typeof model.guidance === "number" ? model.guidance : ""];
  $("guidance").disabled = !model.guides;
  $("masks").hidden = $("paint").hidden = model.mask === "none";
  const unknown = model.partial ? [{ code: model.unknown, name: "unknown: the model chooses" }] : [];
  $("labels").replaceChildren(...[...model.labels.slice(1), ...unknown].map(({ code, name }) => {
    const button = document.createElement("button");
    button.dataset.code = code;
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", code === state.label);
    button.title = code < 10 ? `${name} (${code})` : name;
    button.innerHTML = `<i style="background:${colorOf(code)}"></i>`;
    button.append(name);
    button.onclick = () => setLabel(code);
    return button;
  }));
  conditionFields();
}

// Changes to a model, which is loaded first if the page knows nothing of it yet.
async function chooseModel(name) {
  const entry = state.models.get(name), about = () => askJson("GET", `/api/model?name=${encodeURIComponent(name)}`);
  const busy = $("generate").disabled;
  $("model-list").value = name;
  try {
    entry.about ??= (await about()).pipeline;
    if (!entry.about) {
      if (busy) throw new Error("This model has to be loaded; wait for the volume, or cancel it first.");
      await running(() => ({ model: name, load: true }));
      entry.about = (await about()).pipeline;
    }
    if (!entry.about || $("model-list").value !== name) return; // it was canceled, or another was chosen meanwhile
    useModel(entry.about);
    if (state.label === entry.about.unknown && !entry.about.partial) setLabel(1);
    if (entry.about.mask === "none" && state.mask) await chooseMask(null);
    else if (entry.about.mask === "required" && !state.mask) await firstMask();
    else lists();
    entry.refused = false;
    say(`${entry.title} generates the next volume.`);
  } catch (error) {
    entry.refused = !busy;
    throw error;
  } finally {
    $("model-list").value = state.model.name;
  }
}

function nextModel() {
  const names = [...state.models.keys()].filter((name) => name === state.model.name || !state.models.get(name).refused);
  if (names.length > 1) return chooseModel(names[(names.indexOf(state.model.name) + 1) % names.length]);
}

// ---- keys and buttons

const KEYS = {
  p: () => setTool("pen"), f: () => setTool("fill"), e: () => setTool("erase"), v: () => setTool("move"),
  w: () => setTool("grow"), "[": () => larger(-1), "]": () => larger(1),
  i: () => fillBetween(), g: () => generate(), escape: () => cancel(), r: () => dice(), k: () => blink(), d: () => difference(),
  m: () => toggleOverlay(), n: () => nextModel(), "?": () => $("keys").showModal(),
};

function dice() {
  $("seed").value = Math.floor(Math.random() * 1e6);
}

function toggleOverlay() {
  const slider = $("overlay");
  const before = slider.dataset.before ?? "30";
  slider.dataset.before = slider.value === "0" ? before : slider.value;
  slider.value = slider.value === "0" ? before : "0";
  right.nv.setDrawOpacity(Number(slider.value) / 100);
}

function listen() {
  const on = (id, work) => ($(id).onclick = doing(work));
  on("help", () => $("keys").showModal());
  on("end", async () => {
    if (!confirm("Remove the masks and volumes of this session from the server?")) return;
    await ask("DELETE", "/api/session");
    document.body.innerHTML = "<p style='grid-column:1/3;padding:40px'>The session has ended, and its files are removed. You can close this page.</p>";
  });
  on("open-mask", () => pick(openMask));
  on("open-image", () => pick(openImage));
  on("empty", async () => chooseMask((await askJson("POST", "/api/masks", state.mask ? { mask: state.mask.id } : {})).mask));
  on("new-mask", () => running(() => ({ new_mask: true, seed: numberIn($("seed")) ?? 0 })));
  on("undo", () => step(undo.past, undo.future));
  on("redo", () => step(undo.future, undo.past));
  on("between", fillBetween);
  on("dice", dice);
  on("generate", generate);
  on("cancel", cancel);
  on("blink", blink);
  on("difference", difference);
  $("mask").onchange = doing(async () => {
    const [kind, id] = $("mask").value.split(":");
    if (kind === "mask") return chooseMask(state.masks.get(id));
    if (kind === "none") return chooseMask(null);
    const example = state.examples[Number(id)];
    for (const [name, value] of [...Object.entries(example.classes), ...Object.entries(example.numbers)]) {
      if ($(`condition-${name}`)) $(`condition-${name}`).value = value;
    }
    await chooseMask((await askJson("POST", "/api/masks", { example: Number(id) })).mask);
  });
  $("model-list").onchange = doing(() => chooseModel($("model-list").value));
  $("edit").onchange = () => ($("strength-field").hidden = $("edit").value === "");
  $("left").onchange = doing(() => showLeft($("left").value));
  $("right").onchange = doing(() => showRight($("right").value));
  $("channel").onchange = doing(() => showRight(shownId(right)));
  $("size").oninput = () => setSize($("size").value);
  $("tolerance").oninput = () => setTolerance($("tolerance").value);
  let pressed = null; // a drag ends in a click, too
  $("left-canvas").addEventListener("pointerdown", (event) => (pressed = event));
  $("left-canvas").addEventListener("click", doing((event) => {
    const moved = pressed && Math.hypot(event.clientX - pressed.clientX, event.clientY - pressed.clientY) > 3;
    if (state.tool === "grow" && painting() && !moved) growAt(event);
  }));
  $("overlay").oninput = () => right.nv.setDrawOpacity(Number($("overlay").value) / 100);
  document.querySelectorAll("[data-tool]").forEach((one) => (one.onclick = () => setTool(one.dataset.tool)));
  document.querySelectorAll("[data-copy]").forEach((one) => (one.onclick = doing(async () => {
    await navigator.clipboard.writeText($(one.dataset.copy).textContent);
    one.textContent = "Copied";
    setTimeout(() => (one.textContent = "Copy"), 1500);
  })));
  $("zip").href = "/api/collection.zip";
  $("nnunet").href = "/api/nnunet.zip";
  // NiiVue may paint the end of a stroke after its event; a slow renderer takes seconds.
  addEventListener("pointerup", () => [60, 300, 1000, 3000, 8000].forEach((wait) => setTimeout(keepStroke, wait)));
  addEventListener("keydown", (event) => {
    if (event.target.matches("input[type=number], select, textarea") || document.querySelector("dialog[open]")) return;
    const key = event.key.toLowerCase();
    if ((event.ctrlKey || event.metaKey) && key === "z") {
      event.preventDefault();
      return event.shiftKey ? step(undo.future, undo.past) : step(undo.past, undo.future);
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^[1-9]$/.test(key) && Number(key) < state.model?.labels.length) return setLabel(Number(key));
    if (KEYS[key] && state.model) doing(KEYS[key])();
  });
  let inside = 0;
  addEventListener("dragenter", (event) => { event.preventDefault(); inside++; $("drop").hidden = !state.model || state.model.mask === "none"; });
  addEventListener("dragleave", () => { if (--inside <= 0) $("drop").hidden = true; });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", doing(async (event) => {
    event.preventDefault();
    inside = 0;
    $("drop").hidden = true;
    if (state.model && state.model.mask !== "none") await openMask([...event.dataTransfer.files]);
  }));
}

// ---- the beginning

async function begin() {
  let first = await askJson("GET", "/api/state");
  while (!first.ready) {
    await new Promise((resolve) => setTimeout(resolve, 300));
    first = await askJson("GET", "/api/state");
  }
  const model = first.pipeline, several = first.models.length > 1;
  for (const { name, title } of first.models) state.models.set(name, { title, about: null, fields: null, refused: false });
  state.examples = model.examples;
  options($("model-list"), first.models.map(({ name, title }) => [name, title]));
  $("models").hidden = !several;
  $("model").hidden = several;
  document.body.classList.toggle("several", several);
  useModel(model);
  $("new-mask").hidden = !first.new_masks;
  $("seed").value = 0;
  for (const kind of ["masks", "images", "results"]) for (const one of first[kind]) state[kind].set(one.id, one);
  await Promise.all([left.attach(), right.attach()]);
  for (const result of state.results.values()) addCard(result);
  lists();
  $("generate").disabled = false;
  say("Paint or open a mask, then generate.");
  if (model.mask !== "none") {
    await firstMask();
    setLabel(1);
    setTool("pen");
  } else {
    await chooseMask(null);
    say("Generate a volume.");
  }
  const newest = [...state.results.values()].at(-1);
  if (newest) await showRight(newest.id);
  document.body.dataset.ready = "true";
  if (first.jobs.length) {
    state.job = first.jobs[0];
    try {
      await follow();
    } finally {
      $("generate").disabled = false;
      $("cancel").disabled = true;
    }
  }
}

listen();
doing(begin)();
window.studio = { state, left, right, undo }; // for tests
