// The window of a viewer (its centre and width) by sliders and presets, in the image's unit (value = level * value_scale + value_offset).

// Of computed tomography, [centre, width] in HU.
const HOUNSFIELD = { "Bone": [400, 1800], "Spine, soft tissue": [50, 350], "Wide": [300, 3000] };

const find = (id) => document.getElementById(id);

export class Windowing {
  /** ``onChange([low, high])``: the window, in levels, after each change by a person. */
  constructor(viewer, onChange) {
    Object.assign(this, { viewer, onChange });
    for (const name of ["level", "width"]) find(name).addEventListener("input", () => this.fromSliders());
    find("preset").addEventListener("change", () => this.fromPreset());
    viewer.onView.push(() => this.show());
  }

  /** ``image``: a DOC of the server. Its window (or the one that was kept) is not set here, only offered. */
  open(image) {
    this.scale = image.value_scale || 1;
    this.offset = image.value_offset || 0;
    this.unit = image.unit ?? "";
    const whole = image.range[1] > image.range[0] ? image.range : [0, 2 ** image.bits - 1];
    this.presets = new Map();
    this.presets.set("As the model sees it", image.window ?? [0, 2 ** image.bits - 1]); // 8 bits are read as they are
    this.presets.set("Full range", whole);
    if (this.unit === "HU") {
      for (const [name, [centre, width]] of Object.entries(HOUNSFIELD)) {
        this.presets.set(`${name} (${centre}, ${width})`, [centre - width / 2, centre + width / 2].map((value) => this.levelOf(value)));
      }
    }
    const names = [...this.presets.keys(), "By hand"];
    find("preset").replaceChildren(...names.map((name) => new Option(name, name)));
    const windows = [...this.presets.values()];
    const low = Math.min(...windows.map((each) => each[0])), high = Math.max(...windows.map((each) => each[1]));
    Object.assign(find("level"), { min: low, max: high });
    Object.assign(find("width"), { min: 1, max: Math.max(2, (high - low) * 1.5) });
    this.ready = true;
    this.show();
  }

  get first() {
    return this.presets.get("As the model sees it");
  }

  levelOf(value) {
    return Math.round((value - this.offset) / this.scale);
  }

  told(levels, offset) {
    const value = levels * this.scale + offset;
    return `${Math.abs(this.scale) < 0.1 ? value.toPrecision(3) : Math.round(value)}${this.unit ? ` ${this.unit}` : ""}`;
  }

  show() {
    if (!this.ready) return;
    const [low, high] = this.viewer.window;
    find("level").value = (low + high) / 2;
    find("width").value = high - low;
    find("level-told").textContent = this.told((low + high) / 2, this.offset);
    find("width-told").textContent = this.told(high - low, 0);
    const same = ([, window]) => window[0] === low && window[1] === high;
    find("preset").value = [...this.presets].find(same)?.[0] ?? "By hand";
  }

  set(low, high) {
    this.viewer.setWindow(low, high);
    this.onChange(this.viewer.window);
  }

  fromSliders() {
    const level = Number(find("level").value), width = Number(find("width").value);
    this.set(Math.round(level - width / 2), Math.round(level + width / 2));
  }

  fromPreset() {
    const window = this.presets.get(find("preset").value);
    if (window) this.set(...window);
  }
}
