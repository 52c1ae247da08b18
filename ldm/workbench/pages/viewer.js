// A picture on a canvas: 8 and 16 bits, grey and RGB, window, zoom and pan, masks over it, and a second picture of the
// same size to compare it with. Levels stay as they are; the window acts through a lookup table when they are painted.
//
// "Pixel" below is a pixel of the picture, "dot" one of the screen (there are devicePixelRatio dots to a CSS pixel).

const OPAQUE = 0xff000000;
const FULL_COLOUR = 0.25; // a difference of this share of the window is red (brighter) or blue (darker) at its fullest
const CRISP = 3; // from this many dots to a pixel on, pixels are shown as squares
const MARGIN = 12; // dots around a fitted picture

/** The grey level or colour component (0 to 255) of every level (0 to 2 ** bits - 1) under a window. */
export function lookup(bits, low, high) {
  const table = new Uint8Array(1 << bits);
  const scale = 255 / Math.max(high - low, 1e-6);
  for (let level = 0; level < table.length; level++) {
    table[level] = Math.min(255, Math.max(0, (level - low) * scale + 0.5));
  }
  return table;
}

/** The same picture with half as many rows and columns (rounded up), each pixel the mean of four. */
function halved({ width, height, channels, levels }) {
  const [w, h] = [(width + 1) >> 1, (height + 1) >> 1];
  const small = new levels.constructor(w * h * channels);
  for (let y = 0, to = 0; y < h; y++) {
    const above = 2 * y * width, below = Math.min(2 * y + 1, height - 1) * width;
    for (let x = 0; x < w; x++) {
      const left = 2 * x, right = Math.min(left + 1, width - 1);
      for (let c = 0; c < channels; c++, to++) {
        const at = (row, column) => levels[(row + column) * channels + c];
        small[to] = (at(above, left) + at(above, right) + at(below, left) + at(below, right) + 2) >> 2;
      }
    }
  }
  return { width: w, height: h, channels, levels: small };
}

/** A canvas that is not on the page, and its pixels as 32-bit words. */
class Sheet {
  constructor(width, height) {
    this.canvas = document.createElement("canvas");
    this.canvas.width = width;
    this.canvas.height = height;
    this.context = this.canvas.getContext("2d");
    this.image = this.context.createImageData(width, height);
    this.words = new Uint32Array(this.image.data.buffer);
  }

  show(x = 0, y = 0, width = this.canvas.width, height = this.canvas.height) {
    this.context.putImageData(this.image, 0, 0, x, y, width, height);
  }
}

/** Levels and their halved versions, painted under a window when they are needed, and only then again. */
class Picture {
  constructor(width, height, channels, bits, levels) {
    this.bits = bits;
    this.sizes = [{ width, height, channels, levels }];
    this.sheets = [];
    this.painted = [];
  }

  size(step) {
    while (this.sizes.length <= step) this.sizes.push(halved(this.sizes.at(-1)));
    return this.sizes[step];
  }

  /** The canvas of one size. ``name`` says what ``paint`` makes of it: the same name means the same canvas. */
  sheet(step, name, paint) {
    const { width, height } = this.size(step);
    this.sheets[step] ??= new Sheet(width, height);
    if (this.painted[step] !== name) {
      paint(this.sheets[step].words);
      this.sheets[step].show();
      this.painted[step] = name;
    }
    return this.sheets[step].canvas;
  }

  windowed(step, low, high) {
    return this.sheet(step, `${low} ${high}`, (words) => {
      const { channels, levels } = this.size(step), table = lookup(this.bits, low, high);
      if (channels === 1) {
        const greys = Uint32Array.from(table, (grey) => OPAQUE | (grey * 0x010101));
        for (let i = 0; i < words.length; i++) words[i] = greys[levels[i]];
      } else {
        for (let i = 0, at = 0; i < words.length; i++, at += 3) {
          words[i] = OPAQUE | (table[levels[at + 2]] << 16) | (table[levels[at + 1]] << 8) | table[levels[at]];
        }
      }
    });
  }
}

/** ``after`` minus ``before``: black where they are equal, red where it is brighter, blue where it is darker. */
class Difference extends Picture {
  constructor(before, after) {
    const { width, height, channels } = before.sizes[0];
    super(width, height, channels, before.bits, new Uint8Array(0));
    Object.assign(this, { before, after });
  }

  size(step) {
    return this.before.size(step);
  }

  windowed(step, low, high) {
    return this.sheet(step, `${low} ${high}`, (words) => {
      const { channels, levels } = this.before.size(step), others = this.after.size(step).levels;
      const scale = 255 / (channels * FULL_COLOUR * Math.max(high - low, 1e-6));
      for (let i = 0, at = 0; i < words.length; i++) {
        let change = 0;
        for (let c = 0; c < channels; c++, at++) change += others[at] - levels[at];
        const strong = Math.min(255, Math.abs(change) * scale) | 0, pale = strong >> 2;
        words[i] = OPAQUE | (change > 0 ? (pale << 16) | (pale << 8) | strong : (strong << 16) | (pale << 8) | pale);
      }
    });
  }
}

export class Viewer {
  /** Draws on ``canvas``, which fills its parent; the parent must be positioned (``position: relative``). */
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.glass = document.createElement("canvas"); // what follows the pointer: painted without the picture
    this.glass.className = "glass";
    this.glass.setAttribute("aria-hidden", "true");
    canvas.after(this.glass);
    this.picture = this.other = this.difference = null;
    this.window = [0, 255];
    this.mode = "off";
    this.position = 0.5;
    this.overlays = [];
    this.view = { scale: 1, x: 0, y: 0 }; // a pixel at (px, py) is shown at dot (scale * px + x, scale * py + y)
    this.fitted = true;
    this.onPaint = []; // functions of (the glass's 2-d context, this viewer), in CSS pixels, after each paint
    this.onView = []; // functions of this viewer, when zoom or window have changed
    this.dots = window.devicePixelRatio || 1; // dots to a CSS pixel
    this.dirty = null;
    this.waiting = 0;
    this.timings = []; // the milliseconds of the last paints
    new ResizeObserver(() => this.resize()).observe(canvas.parentElement);
    this.resize();
  }

  // ------------------------------------------------------------------------------------------- what is shown

  /** ``levels``: row-major, channels interleaved, a Uint8Array or Uint16Array. ``window``: [low, high] in levels. */
  setImage({ width, height, channels, bits, levels }, window = null) {
    const resized = width !== this.width || height !== this.height;
    Object.assign(this, { width, height, channels, bits });
    this.picture = new Picture(width, height, channels, bits, levels);
    this.other = this.difference = null;
    this.mode = "off";
    this.overlays = [];
    this.overlay = null;
    this.setWindow(...(window ?? [0, 2 ** bits - 1]));
    if (resized) this.fit();
    this.repaint();
  }

  setWindow(low, high) {
    this.window = [low, Math.max(high, low + 1)];
    for (const each of this.onView) each(this);
    this.repaint();
  }

  /** Compare the image with the levels of another of its size. ``position``: where the slider parts them, 0 (left) to
   * 1 (right), the other one right of it; a flicker shows the other one from 0.5 on. */
  setComparison(levels, mode = "off", position = this.position) {
    if (levels !== (this.other?.sizes[0].levels ?? null)) {
      this.other = levels && new Picture(this.width, this.height, this.channels, this.bits, levels);
      this.difference = levels && new Difference(this.picture, this.other);
    }
    this.mode = levels ? mode : "off";
    this.position = position;
    this.repaint();
  }

  /** ``mask``: Uint8Array, 0 to 255, of the image's size; 255 is shown with ``alpha`` (0 to 1). With ``outline`` its edge
   * is drawn and its inside is paler. The arrays may change afterwards: ``touch`` says where. */
  setOverlays(overlays) {
    this.overlays = overlays;
    this.overlay = overlays.length ? (this.overlay ?? new Sheet(this.width, this.height)) : null;
    if (this.overlay) this.touch(0, 0, this.width, this.height);
    this.repaint();
  }

  /** The masks of the overlays have changed in this rectangle of pixels; nothing else is painted again. */
  touch(x, y, width, height) {
    if (!this.overlay) return;
    const more = this.edge + 1; // the outline of what lies beside it may change too
    const left = Math.max(0, Math.floor(x) - more), top = Math.max(0, Math.floor(y) - more);
    const right = Math.min(this.width, Math.ceil(x + width) + more), bottom = Math.min(this.height, Math.ceil(y + height) + more);
    if (right <= left || bottom <= top) return;
    this.colour(left, top, right, bottom);
    this.overlay.show(left, top, right - left, bottom - top);
    const { scale, x: dx, y: dy } = this.view;
    this.soil(left * scale + dx - 2, top * scale + dy - 2, right * scale + dx + 2, bottom * scale + dy + 2);
  }

  /** The width of an outline in pixels: a bit more than a dot on the screen. */
  get edge() {
    return Math.max(1, Math.round((1.5 * this.dots) / this.view.scale));
  }

  colour(left, top, right, bottom) {
    const { words } = this.overlay, { width, height } = this, wide = (this.coloured = this.edge);
    for (let y = top; y < bottom; y++) words.fill(0, y * width + left, y * width + right);
    for (const { mask, color, alpha, outline } of this.overlays) {
      const colour = (color[2] << 16) | (color[1] << 8) | color[0];
      const edge = (i, x, y) =>
        x < wide || y < wide || x >= width - wide || y >= height - wide ||
        !mask[i - wide] || !mask[i + wide] || !mask[i - wide * width] || !mask[i + wide * width];
      for (let y = top; y < bottom; y++) {
        for (let x = left, i = y * width + left; x < right; x++, i++) {
          if (mask[i] === 0) continue;
          const strong = outline && edge(i, x, y) ? 0.95 : alpha * (mask[i] / 255);
          if (strong * 255 >= words[i] >>> 24) words[i] = (Math.round(strong * 255) << 24) | colour; // the stronger one shows
        }
      }
    }
  }

  // ---------------------------------------------------------------------------------------- where it is shown

  resize() {
    const { clientWidth, clientHeight } = this.canvas.parentElement, dots = (this.dots = window.devicePixelRatio || 1);
    for (const each of [this.canvas, this.glass]) {
      each.width = Math.max(1, Math.round(clientWidth * dots));
      each.height = Math.max(1, Math.round(clientHeight * dots));
    }
    if (this.fitted) this.fit();
    this.repaint(true);
  }

  /** The whole image, in the middle. */
  fit() {
    this.fitted = true;
    if (!this.picture) return;
    const { width, height } = this.canvas, room = MARGIN * this.dots;
    const scale = Math.max(Math.min((width - 2 * room) / this.width, (height - 2 * room) / this.height), 0.01);
    this.look(scale, (width - scale * this.width) / 2, (height - scale * this.height) / 2);
  }

  /** ``area``, of ``box``, large in the middle; the whole image where that is shown so already, or null. */
  closeUp(area) {
    if (!area || !this.fitted) return this.fit();
    const { width, height } = this.canvas, scale = Math.min(width / area.width, height / area.height) / 3;
    this.fitted = false;
    this.look(scale, width / 2 - scale * (area.x + area.width / 2), height / 2 - scale * (area.y + area.height / 2));
  }

  /** Closer (a factor over 1) or farther; what is at (x, y), in CSS pixels of the window, stays there. */
  zoom(factor, clientX, clientY) {
    if (!this.picture) return;
    const box = this.canvas.getBoundingClientRect(), { scale, x, y } = this.view;
    const dotX = clientX === undefined ? this.canvas.width / 2 : (clientX - box.left) * this.dots;
    const dotY = clientY === undefined ? this.canvas.height / 2 : (clientY - box.top) * this.dots;
    const whole = Math.min(this.canvas.width / this.width, this.canvas.height / this.height);
    const next = Math.min(Math.max(scale * factor, whole / 4), 64 * this.dots);
    this.fitted = false;
    this.look(next, dotX - ((dotX - x) * next) / scale, dotY - ((dotY - y) * next) / scale);
  }

  /** Move the image by CSS pixels. */
  pan(dx, dy) {
    if (!this.picture) return;
    const { scale, x, y } = this.view, room = 40 * this.dots;
    const within = (value, length, extent) => Math.min(Math.max(value, room - extent), length - room);
    this.fitted = false;
    this.look(
      scale,
      within(x + dx * this.dots, this.canvas.width, scale * this.width),
      within(y + dy * this.dots, this.canvas.height, scale * this.height),
    );
  }

  look(scale, x, y) {
    this.view = { scale, x: Math.round(x), y: Math.round(y) };
    if (this.overlay && this.edge !== this.coloured) this.touch(0, 0, this.width, this.height);
    for (const each of this.onView) each(this);
    this.repaint();
  }

  /** The place in the image, in pixels (the first one lies between 0 and 1), of a place in the window. */
  toImage(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect(), { scale, x, y } = this.view;
    return { x: ((clientX - box.left) * this.dots - x) / scale, y: ((clientY - box.top) * this.dots - y) / scale };
  }

  /** The place on the canvas, in CSS pixels, of a place in the image. */
  toCanvas(pixelX, pixelY) {
    const { scale, x, y } = this.view;
    return { x: (pixelX * scale + x) / this.dots, y: (pixelY * scale + y) / this.dots };
  }

  // -------------------------------------------------------------------------------------------------- painting

  /** Paint everything again before the next frame; ``now``: at once, so that a new size does not flash. */
  repaint(now = false) {
    this.soil(0, 0, this.canvas.width, this.canvas.height);
    if (now) this.paint();
  }

  /** Paint the glass again: the pointer has moved. */
  refresh() {
    this.waiting ||= requestAnimationFrame(() => this.paint());
  }

  soil(left, top, right, bottom) {
    const old = this.dirty ?? [left, top, right, bottom];
    this.dirty = [Math.min(old[0], left), Math.min(old[1], top), Math.max(old[2], right), Math.max(old[3], bottom)];
    this.refresh();
  }

  paint() {
    cancelAnimationFrame(this.waiting);
    this.waiting = 0;
    const began = performance.now();
    if (this.dirty) {
      const left = Math.max(0, Math.floor(this.dirty[0])), top = Math.max(0, Math.floor(this.dirty[1]));
      const right = Math.min(this.canvas.width, Math.ceil(this.dirty[2]));
      const bottom = Math.min(this.canvas.height, Math.ceil(this.dirty[3]));
      this.dirty = null;
      this.context.save();
      this.context.beginPath();
      this.context.rect(left, top, right - left, bottom - top);
      this.context.clip();
      this.context.clearRect(left, top, right - left, bottom - top);
      if (this.picture) this.paintPictures();
      this.context.restore();
    }
    const glass = this.glass.getContext("2d");
    glass.setTransform(1, 0, 0, 1, 0, 0);
    glass.clearRect(0, 0, this.glass.width, this.glass.height);
    glass.setTransform(this.dots, 0, 0, this.dots, 0, 0);
    if (this.mode === "slider") this.paintHandle(glass);
    for (const each of this.onPaint) each(glass, this);
    this.timings.push(performance.now() - began);
    if (this.timings.length > 1000) this.timings.shift();
  }

  paintPictures() {
    const { context, view } = this, { scale, x, y } = view;
    const step = Math.min(4, Math.max(0, Math.floor(Math.log2(1 / scale))));
    const place = (picture, from, to) => {
      const sheet = picture.windowed(step, ...this.window);
      context.save();
      context.beginPath(); // a halved picture may reach half a pixel beyond the image
      context.rect(x + from * scale * this.width, y, (to - from) * scale * this.width, scale * this.height);
      context.clip();
      context.imageSmoothingEnabled = scale < CRISP * this.dots;
      context.drawImage(sheet, x, y, sheet.width * scale * 2 ** step, sheet.height * scale * 2 ** step);
      context.restore();
    };
    if (this.mode === "difference") place(this.difference, 0, 1);
    else if (this.mode === "flicker") place(this.position >= 0.5 ? this.other : this.picture, 0, 1);
    else {
      const parted = this.mode === "slider" ? this.position : 1;
      if (parted > 0) place(this.picture, 0, parted);
      if (parted < 1) place(this.other, parted, 1);
    }
    if (this.overlay) {
      context.imageSmoothingEnabled = scale < 1;
      context.drawImage(this.overlay.canvas, x, y, this.width * scale, this.height * scale);
    }
  }

  paintHandle(glass) {
    const { x, y } = this.toCanvas(this.position * this.width, 0), bottom = this.toCanvas(0, this.height).y;
    const middle = (Math.max(0, y) + Math.min(bottom, this.glass.height / this.dots)) / 2;
    glass.lineWidth = 1.5;
    glass.strokeStyle = "#fff";
    glass.fillStyle = "#222";
    glass.beginPath();
    glass.moveTo(x, y);
    glass.lineTo(x, bottom);
    glass.stroke();
    glass.beginPath();
    glass.arc(x, middle, 13, 0, 2 * Math.PI);
    glass.fill();
    glass.stroke();
    glass.beginPath();
    for (const side of [-1, 1]) {
      glass.moveTo(x + 4 * side, middle - 5);
      glass.lineTo(x + 8 * side, middle);
      glass.lineTo(x + 4 * side, middle + 5);
    }
    glass.stroke();
  }
}
