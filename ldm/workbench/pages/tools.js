// The tools of the left button: brush and eraser, polygon, box, and moving about. They paint on a Mask and show on the
// viewer's glass what they are about to do.

const LONGEST_CLICK = 4; // CSS pixels that a click may move

export class Tools {
  /** ``mask()``: the Mask to paint on, or null where nothing may be painted. ``onTool(name)``: another tool is chosen.
   * ``onCorner()``: a polygon has another corner, or is closed or dropped. */
  constructor(viewer, mask, onTool, onCorner) {
    Object.assign(this, { viewer, mask, onTool, onCorner });
    this.name = "brush";
    this.diameter = 8; // pixels of the image
    this.points = []; // of the polygon that is being drawn
    this.pointer = null;
    this.corner = null;
    viewer.onPaint.push((glass) => this.paint(glass));
  }

  choose(name) {
    this.points = [];
    this.corner = null;
    this.name = name;
    this.onTool(name);
    this.viewer.refresh();
  }

  hover(place) {
    this.pointer = place;
    this.viewer.refresh();
  }

  /** A press of the left button; what navigation.js asks for. */
  begin(event, place) {
    const mask = this.mask();
    if (!mask || this.name === "move") return null;
    const value = (this.name === "eraser") !== event.altKey ? 0 : 255;
    if (this.name === "polygon") return this.corners(event, value);
    return this.name === "box" ? this.box(mask, place, value) : this.stroke(mask, place, value);
  }

  stroke(mask, place, value) {
    let last = place;
    const paint = (next) => {
      mask.line(last, next, this.diameter / 2, value);
      last = next;
    };
    paint(place);
    return { move: (event, next) => paint(next), end: () => mask.finish() };
  }

  box(mask, place, value) {
    this.corner = place;
    return {
      move: (event, next) => this.hover(next),
      end: (event, next) => {
        this.corner = null;
        const [left, right] = [place.x, next.x].sort((a, b) => a - b).map(Math.round);
        const [top, bottom] = [place.y, next.y].sort((a, b) => a - b).map(Math.round);
        if (right > left && bottom > top) {
          mask.polygon([{ x: left, y: top }, { x: right, y: top }, { x: right, y: bottom }, { x: left, y: bottom }], value);
          mask.finish();
        }
        this.viewer.refresh();
      },
    };
  }

  /** A click adds a corner; one on the first or the last corner (a double click) closes the polygon. A drag draws freely. */
  corners(event, value) {
    let from = event;
    return {
      move: (next, place) => {
        if (Math.hypot(next.clientX - from.clientX, next.clientY - from.clientY) < LONGEST_CLICK) return;
        if (from === event) this.points.push(this.viewer.toImage(event.clientX, event.clientY));
        from = next;
        this.points.push(place);
        this.viewer.refresh();
      },
      end: (next, place) => {
        if (from !== event) return this.close(value);
        const now = this.viewer.toCanvas(place.x, place.y);
        const near = (corner, reach) => {
          const at = this.viewer.toCanvas(corner.x, corner.y);
          return Math.hypot(at.x - now.x, at.y - now.y) < reach;
        };
        const again = this.points.length > 0 && near(this.points.at(-1), LONGEST_CLICK);
        if (this.points.length > 2 && (again || near(this.points[0], 10))) return this.close(value);
        if (!again) this.points.push(place);
        this.onCorner();
        this.viewer.refresh();
      },
    };
  }

  /** Fill the polygon that was drawn so far, if it has three corners. */
  close(value = 255) {
    const mask = this.mask(), { points } = this;
    this.points = [];
    if (mask && points.length > 2) {
      mask.polygon(points, value);
      mask.finish();
    }
    this.onCorner();
    this.viewer.refresh();
  }

  /** Whether there was something to drop: a polygon that is not closed yet. */
  drop() {
    const had = this.points.length > 0;
    this.points = [];
    this.onCorner();
    this.viewer.refresh();
    return had;
  }

  // ---------------------------------------------------------------------------------------------- on the glass

  paint(glass) {
    if (!this.mask()) return;
    const at = (place) => this.viewer.toCanvas(place.x, place.y);
    const twice = (path) => { // dark and bright, so that it is seen on any ground
      for (const [colour, width] of [["#000b", 3], ["#fff", 1.2]]) {
        glass.strokeStyle = colour;
        glass.lineWidth = width;
        glass.beginPath();
        path();
        glass.stroke();
      }
    };
    if (this.points.length) {
      const all = this.pointer ? [...this.points, this.pointer] : this.points;
      twice(() => all.forEach((place, i) => glass[i ? "lineTo" : "moveTo"](at(place).x, at(place).y)));
      const first = at(this.points[0]);
      twice(() => glass.arc(first.x, first.y, 4, 0, 2 * Math.PI));
    }
    if (!this.pointer) return;
    const here = at(this.pointer);
    if (this.corner) {
      const start = at(this.corner);
      twice(() => glass.rect(start.x, start.y, here.x - start.x, here.y - start.y));
    } else if (this.name === "brush" || this.name === "eraser") {
      const radius = (this.diameter / 2) * (at({ x: 1, y: 0 }).x - at({ x: 0, y: 0 }).x);
      twice(() => glass.arc(here.x, here.y, Math.max(radius, 2), 0, 2 * Math.PI));
    }
  }
}
