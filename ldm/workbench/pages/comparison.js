// How an image is compared with what it was drawn on: the buttons in #modes, the hint below them, the caption on the image.

const find = (id) => document.getElementById(id);
const HINTS = {
  slider: "Drag the line. Left of it before, right of it after.",
  before: "Space flickers between before and after.",
  after: "Space flickers between before and after.",
  difference: "Red: brighter than before; blue: darker.",
};
export const MODES = Object.keys(HINTS);
const CAPTIONS = { slider: "before | after", before: "before", after: "after", difference: "difference" };

/** Where the slider goes through the middle of the lesion: ``area``, of ``box``, in an image of that width. */
export function through(area, width) {
  return area ? (area.x + area.width / 2) / width : 0.5;
}

export class Comparison {
  constructor(viewer) {
    Object.assign(this, { viewer, mode: "slider", levels: null, position: 0.5 });
    for (const button of find("modes").children) button.addEventListener("click", () => this.setMode(button.dataset.mode));
  }

  /** ``levels``: of what was drawn on the viewer's image, or null; ``position``: of the slider, 0 (left) to 1. */
  open(levels, position = this.position) {
    Object.assign(this, { levels, position });
    this.setMode(this.mode === "before" ? "after" : this.mode); // nobody is asked about what they cannot see
  }

  setMode(mode) {
    this.mode = mode;
    const { position } = this;
    const how = { before: ["flicker", 0], after: ["flicker", 1], difference: ["difference", position], slider: ["slider", position] }[mode];
    this.viewer.setComparison(this.levels, ...how);
    for (const button of find("modes").children) {
      button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
      button.disabled = this.levels === null;
    }
    find("mode-hint").textContent = this.levels ? HINTS[mode] : "";
    find("caption").hidden = this.levels === null;
    find("caption").textContent = CAPTIONS[mode];
  }

  slide(position) {
    this.position = position;
    this.viewer.setComparison(this.levels, "slider", position);
  }

  flicker() {
    this.setMode(this.mode === "after" ? "before" : "after");
  }
}
