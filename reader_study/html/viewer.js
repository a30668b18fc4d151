"use strict";
// A viewer of one volume: three planes on canvases, with scrolling, window, zoom, and a crosshair.
// Voxels are uint8, x fastest; x grows to the patient's right, y to the front, z upward. Images are shown as
// radiologists see them: the patient's right is on the left.

const PLANES = [
  { name: "axial", axis: 2, across: 0, up: 1, left: "R", top: "A" },
  { name: "coronal", axis: 1, across: 0, up: 2, left: "R", top: "S" },
  { name: "sagittal", axis: 0, across: 1, up: 2, left: "A", top: "S" },
];
const FULL_WINDOW = [0, 255];

class Viewer {
  constructor(home, shape, spacing, title, onChange) {
    Object.assign(this, { shape, spacing, onChange, voxels: null, active: 0, large: false });
    this.root = document.createElement("div");
    this.root.className = "viewer";
    home.append(this.root);
    this.views = PLANES.map((plane, number) => this.addPlane(plane, number));
    this.facts = document.createElement("div");
    this.facts.className = "facts";
    this.root.append(this.facts);
    if (title) this.root.append(Object.assign(document.createElement("b"), { textContent: title }));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.root);
    this.reset();
  }

  addPlane(plane, number) {
    const box = document.createElement("div");
    box.className = "plane";
    const canvas = document.createElement("canvas");
    const texts = {};
    for (const key of ["name", "at", "l", "t"]) {
      texts[key] = Object.assign(document.createElement("span"), { className: key });
    }
    texts.name.textContent = plane.name;
    texts.l.textContent = plane.left;
    texts.t.textContent = { A: "P", S: "I" }[plane.top];
    box.append(canvas, ...Object.values(texts));
    this.root.append(box);
    const source = document.createElement("canvas");
    source.width = this.shape[plane.across];
    source.height = this.shape[plane.up];
    const view = { plane, box, canvas, texts, source, zoom: 1, pan: [0, 0] };
    this.listen(view, number);
    return view;
  }

  reset() {
    this.at = this.shape.map((size) => Math.floor(size / 2));
    this.window = [...FULL_WINDOW];
    for (const view of this.views) Object.assign(view, { zoom: 1, pan: [0, 0] });
    this.draw();
  }

  show(voxels) {
    this.voxels = voxels;
    this.reset();
  }

  // Changes: each is logged by `onChange(kind, values)`, and may be applied to a linked viewer.
  go(axis, slice, quiet) {
    const inside = Math.min(Math.max(Math.round(slice), 0), this.shape[axis] - 1);
    if (inside === this.at[axis]) return;
    this.at[axis] = inside;
    this.draw();
    if (!quiet) this.onChange(this, "slice", [axis, inside]);
  }

  setWindow(low, high, quiet) {
    const middle = Math.min(Math.max((low + high) / 2, 0), 255);
    const half = Math.min(Math.max((high - low) / 2, 4), 255);
    this.window = [Math.round(middle - half), Math.round(middle + half)];
    this.draw();
    if (!quiet) this.onChange(this, "window", this.window);
  }

  setZoom(view, zoom, pan, quiet) {
    view.zoom = Math.min(Math.max(zoom, 1), 12);
    view.pan = view.zoom === 1 ? [0, 0] : pan;
    this.draw();
    if (!quiet) this.onChange(this, "zoom", [view.plane.axis, Number(view.zoom.toFixed(2)), ...view.pan.map(Math.round)]);
  }

  step(count) { this.go(PLANES[this.active].axis, this.at[PLANES[this.active].axis] + count); }
  zoomBy(factor) { const view = this.views[this.active]; this.setZoom(view, view.zoom * factor, view.pan); }
  widen(by) { this.setWindow(this.window[0] - by, this.window[1] + by); }
  brighten(by) { this.setWindow(this.window[0] - by, this.window[1] - by); }
  choose(number, quiet) {
    this.active = (number + 3) % 3;
    this.draw();
    if (!quiet) this.onChange(this, "plane", [this.active]);
  }
  toggleLarge(quiet) {
    this.large = !this.large;
    this.root.classList.toggle("large", this.large);
    this.draw();
    if (!quiet) this.onChange(this, "large", [Number(this.large)]);
  }

  // The place of a slice on its canvas, in canvas pixels.
  frame(view) {
    const { plane, canvas } = view;
    const wide = this.shape[plane.across] * this.spacing[plane.across];
    const high = this.shape[plane.up] * this.spacing[plane.up];
    const scale = 0.96 * Math.min(canvas.width / wide, canvas.height / high) * view.zoom;
    return { x: (canvas.width - wide * scale) / 2 + view.pan[0], y: (canvas.height - high * scale) / 2 + view.pan[1], w: wide * scale, h: high * scale };
  }

  draw() {
    this.views.forEach((view, number) => {
      view.box.classList.toggle("active", number === this.active);
      const size = view.box.getBoundingClientRect();
      const ratio = window.devicePixelRatio || 1;
      const wide = Math.max(1, Math.round(size.width * ratio));
      const high = Math.max(1, Math.round(size.height * ratio));
      if (view.canvas.width !== wide || view.canvas.height !== high) Object.assign(view.canvas, { width: wide, height: high });
      view.texts.at.textContent = `${this.at[view.plane.axis] + 1}/${this.shape[view.plane.axis]}`;
      if (size.width) this.paint(view);
    });
    const [low, high] = this.window;
    this.facts.textContent = `window ${low} to ${high}, zoom ${this.views[this.active].zoom.toFixed(1)}`;
  }

  paint(view) {
    const { plane, source, canvas } = view;
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (!this.voxels) return;
    const strides = [1, this.shape[0], this.shape[0] * this.shape[1]];
    const start = this.at[plane.axis] * strides[plane.axis];
    const image = new ImageData(source.width, source.height);
    const pixels = new Uint32Array(image.data.buffer);
    const [low, high] = this.window;
    const shades = Uint32Array.from({ length: 256 }, (_, value) => {
      const shade = Math.round(Math.min(Math.max((value - low) / (high - low), 0), 1) * 255);
      return (255 << 24 | shade << 16 | shade << 8 | shade) >>> 0;
    });
    let to = 0;
    for (let j = source.height - 1; j >= 0; j--) {
      const row = start + j * strides[plane.up];
      for (let i = source.width - 1; i >= 0; i--) pixels[to++] = shades[this.voxels[row + i * strides[plane.across]]];
    }
    source.getContext("2d").putImageData(image, 0, 0);
    const { x, y, w, h } = this.frame(view);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(source, x, y, w, h);
    const cross = [x + (1 - (this.at[plane.across] + 0.5) / source.width) * w, y + (1 - (this.at[plane.up] + 0.5) / source.height) * h];
    context.strokeStyle = "rgba(108, 182, 255, 0.35)";
    context.beginPath();
    context.moveTo(cross[0], 0); context.lineTo(cross[0], canvas.height);
    context.moveTo(0, cross[1]); context.lineTo(canvas.width, cross[1]);
    context.stroke();
  }

  aim(view, event) {
    const ratio = window.devicePixelRatio || 1;
    const size = view.canvas.getBoundingClientRect();
    const { x, y, w, h } = this.frame(view);
    const { plane, source } = view;
    this.go(plane.across, (1 - ((event.clientX - size.left) * ratio - x) / w) * source.width - 0.5);
    this.go(plane.up, (1 - ((event.clientY - size.top) * ratio - y) / h) * source.height - 0.5);
  }

  listen(view, number) {
    const { canvas } = view;
    const fingers = new Map();
    let drag = null;
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("dblclick", () => { this.choose(number); this.toggleLarge(); });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (number !== this.active) this.choose(number);
      if (event.ctrlKey) this.zoomBy(event.deltaY < 0 ? 1.15 : 1 / 1.15);
      else this.step(event.deltaY < 0 ? 1 : -1);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      if (number !== this.active) this.choose(number);
      fingers.set(event.pointerId, event);
      drag = { x: event.clientX, y: event.clientY, moved: false, at: this.at[view.plane.axis], window: [...this.window], zoom: view.zoom, pan: [...view.pan], gap: gap(fingers) };
      if (event.pointerType === "mouse" && event.button === 0 && !event.shiftKey) this.aim(view, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!drag || !fingers.has(event.pointerId)) return;
      fingers.set(event.pointerId, event);
      const dx = event.clientX - drag.x, dy = event.clientY - drag.y, ratio = window.devicePixelRatio || 1;
      drag.moved ||= Math.hypot(dx, dy) > 6;
      const moved = [drag.pan[0] + dx * ratio, drag.pan[1] + dy * ratio];
      if (fingers.size === 2) this.setZoom(view, drag.zoom * gap(fingers) / drag.gap, moved);
      else if (event.pointerType !== "mouse") this.go(view.plane.axis, drag.at - dy / 8);
      else if (event.buttons & 2) this.setWindow(drag.window[0] - dx / 2 + dy / 2, drag.window[1] + dx / 2 + dy / 2);
      else if (event.shiftKey) this.setZoom(view, view.zoom, moved);
      else this.aim(view, event);
    });
    const release = (event) => {
      if (event.pointerType !== "mouse" && drag && !drag.moved && fingers.size === 1) this.aim(view, event);
      fingers.delete(event.pointerId);
      if (!fingers.size) drag = null;
    };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
  }
}

function gap(fingers) {
  const [a, b] = [...fingers.values()];
  return b ? Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) : 1;
}
