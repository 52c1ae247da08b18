// A mask that is painted: 0 or 255 for each pixel, with undo and redo over every tool. Each change happens inside a
// rectangle {x, y, width, height} of pixels; only that is copied.

const UNDOS = 200;

export class Mask {
  /** ``onChange(rectangle, finished)``: after each change; ``finished`` is false while a stroke is still going on. */
  constructor(width, height, onChange) {
    Object.assign(this, { width, height, onChange });
    this.pixels = new Uint8Array(width * height);
    this.before = new Uint8Array(width * height); // as it was after the last finished change
    this.stroke = null;
    this.done = [];
    this.undone = [];
    this.count = 0; // pixels that are set, after the last finished change
  }

  get empty() {
    return this.count === 0;
  }

  get whole() {
    return { x: 0, y: 0, width: this.width, height: this.height };
  }

  inside(left, top, right, bottom) {
    const x = Math.max(0, Math.floor(left)), y = Math.max(0, Math.floor(top));
    const width = Math.min(this.width, Math.ceil(right)) - x, height = Math.min(this.height, Math.ceil(bottom)) - y;
    return width > 0 && height > 0 ? { x, y, width, height } : null;
  }

  // ------------------------------------------------------------------------------------------------ painting

  /** A round brush drawn from one place to another: every pixel whose centre lies within ``radius`` of the line. */
  line(from, to, radius, value) {
    const area = this.inside(
      Math.min(from.x, to.x) - radius, Math.min(from.y, to.y) - radius,
      Math.max(from.x, to.x) + radius + 1, Math.max(from.y, to.y) + radius + 1,
    );
    if (!area) return;
    const dx = to.x - from.x, dy = to.y - from.y, length = dx * dx + dy * dy, reach = Math.max(radius, 0.5) ** 2;
    for (let row = area.y; row < area.y + area.height; row++) {
      for (let column = area.x; column < area.x + area.width; column++) {
        const x = column + 0.5 - from.x, y = row + 0.5 - from.y;
        const along = length ? Math.min(1, Math.max(0, (x * dx + y * dy) / length)) : 0;
        const offX = x - along * dx, offY = y - along * dy;
        if (offX * offX + offY * offY <= reach) this.pixels[row * this.width + column] = value;
      }
    }
    this.changed(area);
  }

  /** The inside of a polygon (even-odd): every pixel whose centre lies in it. */
  polygon(points, value) {
    const xs = points.map((p) => p.x), ys = points.map((p) => p.y);
    const area = this.inside(Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys));
    if (!area) return;
    for (let row = area.y; row < area.y + area.height; row++) {
      const y = row + 0.5, cuts = [];
      for (let i = 0; i < points.length; i++) {
        const a = points[i], b = points[(i + 1) % points.length];
        if (a.y <= y !== b.y <= y) cuts.push(a.x + ((y - a.y) / (b.y - a.y)) * (b.x - a.x));
      }
      cuts.sort((a, b) => a - b);
      for (let i = 0; i + 1 < cuts.length; i += 2) {
        const first = Math.max(0, Math.ceil(cuts[i] - 0.5)), end = Math.min(this.width, Math.ceil(cuts[i + 1] - 0.5));
        if (end > first) this.pixels.fill(value, row * this.width + first, row * this.width + end);
      }
    }
    this.changed(area);
  }

  /** Another mask in its place. */
  replace(pixels) {
    this.pixels.set(pixels);
    this.changed(this.whole);
  }

  changed({ x, y, width, height }) {
    const old = this.stroke ?? { x, y, width, height };
    const left = Math.min(old.x, x), top = Math.min(old.y, y);
    this.stroke = {
      x: left,
      y: top,
      width: Math.max(old.x + old.width, x + width) - left,
      height: Math.max(old.y + old.height, y + height) - top,
    };
    this.onChange({ x, y, width, height }, false);
  }

  /** The stroke is finished: from now on it can be undone. */
  finish() {
    const area = this.stroke;
    this.stroke = null;
    if (!area) return;
    const change = { area, old: this.copy(this.before, area), now: this.copy(this.pixels, area) };
    if (!change.old.every((value, i) => value === change.now[i])) {
      this.done.push(change);
      if (this.done.length > UNDOS) this.done.shift();
      this.undone = [];
    }
    this.settle(change.old, change.now, area);
  }

  // -------------------------------------------------------------------------------------------- undo and redo

  undo() {
    const change = this.done.pop();
    if (!change) return;
    this.undone.push(change);
    this.put(change.old, change.area);
    this.settle(change.now, change.old, change.area);
  }

  redo() {
    const change = this.undone.pop();
    if (!change) return;
    this.done.push(change);
    this.put(change.now, change.area);
    this.settle(change.old, change.now, change.area);
  }

  settle(old, now, area) {
    for (let row = 0; row < area.height; row++) {
      const at = (area.y + row) * this.width + area.x;
      this.before.set(this.pixels.subarray(at, at + area.width), at);
    }
    for (let i = 0; i < now.length; i++) this.count += (now[i] !== 0) - (old[i] !== 0);
    this.onChange(area, true);
  }

  copy(source, { x, y, width, height }) {
    const made = new Uint8Array(width * height);
    for (let row = 0; row < height; row++) {
      const at = (y + row) * this.width + x;
      made.set(source.subarray(at, at + width), row * width);
    }
    return made;
  }

  put(values, { x, y, width, height }) {
    for (let row = 0; row < height; row++) {
      this.pixels.set(values.subarray(row * width, (row + 1) * width), (y + row) * this.width + x);
    }
  }
}

// ------------------------------------------------------------------------------------------- small enough to keep

/** The lengths of the runs of a mask, beginning with one of zeros, as text. */
export function packed(pixels) {
  const runs = [];
  for (let at = 0, value = 0; at < pixels.length; value = 255 - value) {
    const end = pixels.indexOf(255 - value, at), next = end < 0 ? pixels.length : end;
    runs.push(next - at);
    at = next;
  }
  return runs.join(" ");
}

/** The mask of ``packed``, or null if it is not of that many pixels. */
export function unpacked(text, length) {
  const pixels = new Uint8Array(length);
  let at = 0, value = 0;
  for (const run of text.split(" ").map(Number)) {
    pixels.fill(value, at, at + run);
    at += run;
    value = 255 - value;
  }
  return at === length ? pixels : null;
}
