// Where it is to be drawn: a suggestion inside the vertebra, and the soft mask with which the painted one will act.

import { bits, bytes, postForBytes } from "./api.js";

const find = (id) => document.getElementById(id);
const PAUSE = 200; // milliseconds after a stroke before the soft mask is asked for
const SPREAD = 0.15; // a suggestion's diameter lies within this share of what is asked for
const SEEDS = 10 ** 6; // few enough digits to be read and copied by eye

export const anySeed = () => Math.floor(Math.random() * SEEDS);

export class Placing {
  /** ``app``: document, mask, soft and viewer; ``guard(promise)`` reports what fails; ``onChange()`` after each answer. */
  constructor(app, guard, onChange) {
    Object.assign(this, { app, guard, onChange });
    this.seed = 1;
    this.suggestible = false;
    find("suggest").addEventListener("click", () => this.another());
    for (const id of ["size", "irregularity", "side"]) {
      find(id).addEventListener("input", () => {
        clearTimeout(this.sliding);
        this.sliding = setTimeout(() => guard(this.suggest()), 60);
      });
    }
    find("feather").addEventListener("input", () => this.soften());
  }

  get settings() {
    return Object.fromEntries(["size", "irregularity", "side"].map((id) => [id, find(id).value]).concat([["seed", this.seed]]));
  }

  set settings(kept) {
    for (const id of ["size", "irregularity", "side"]) if (kept[id] !== undefined) find(id).value = kept[id];
    this.seed = kept.seed ?? this.seed;
  }

  /** A new image: what can be suggested and measured on it. */
  open(image, feather) {
    clearTimeout(this.timer);
    clearTimeout(this.sliding);
    this.facts = null;
    this.due = false; // the server has not said yet how the present mask will act
    this.suggestible = image.has_body;
    for (const each of find("suggesting").querySelectorAll("input, select")) each.disabled = !image.has_body;
    find("suggest").disabled = !image.has_body;
    const why = "This image has no mask of its vertebra (anatomy.png), so none can be suggested: paint the lesion yourself.";
    find("no-body").hidden = image.has_body;
    find("no-body").textContent = image.has_body ? "" : why;
    const spaced = Boolean(image.spacing_mm);
    find("feather").disabled = !spaced;
    find("feather").placeholder = !spaced ? "auto" : feather?.unit === "mm" ? String(feather.value) : "auto";
    const model = feather ? { diameter: `${100 * feather.value} % of the diameter`, mm: `${feather.value} mm`, pixels: `${feather.value} pixels` }[feather.unit] : "";
    find("feather").title = spaced
      ? `Width of the soft border in mm; empty: as in training (${model})`
      : `The image has no pixel spacing, so millimetres mean nothing here; as in training: ${model}`;
    find("feather-unit").textContent = spaced ? "mm" : "(no pixel spacing)";
    this.show();
  }

  // --------------------------------------------------------------------------------------------- suggestion

  another() {
    if (!this.suggestible) return;
    this.seed = anySeed();
    this.guard(this.suggest());
  }

  /** The suggestion of the present settings, in place of what is painted. */
  async suggest() {
    const { document: image } = this.app;
    if (!image?.has_body) return;
    const size = Number(find("size").value) / 100, asked = (this.asked = (this.asked ?? 0) + 1);
    const { mask } = await postForBytes(`/api/documents/${image.id}/suggestion`, {
      size: [size * (1 - SPREAD), size * (1 + SPREAD)],
      side: find("side").value || null,
      irregularity: Number(find("irregularity").value) / 100,
      seed: this.seed,
    });
    if (asked !== this.asked || image !== this.app.document) return; // a later one is on its way
    this.app.mask.replace(mask);
    this.app.mask.finish();
  }

  /** The mask that the image came with, or else a suggestion. */
  async first() {
    const { document: image } = this.app;
    if (image.has_mask) {
      const mask = await bytes(`/api/documents/${image.id}/mask`);
      if (image !== this.app.document) return;
      this.app.mask.replace(mask);
      this.app.mask.finish();
    } else await this.suggest();
  }

  // ---------------------------------------------------------------------------------------------- soft mask

  /** The painted mask or the feather has changed. */
  soften() {
    clearTimeout(this.timer);
    this.abort?.abort();
    this.due = true;
    this.timer = setTimeout(() => this.guard(this.askSoft()), PAUSE);
    this.onChange();
  }

  /** Once the server has said how the present mask will act. */
  async measured() {
    if (!this.due) return;
    clearTimeout(this.timer);
    this.abort?.abort();
    await this.guard(this.askSoft());
  }

  /** What speaks against drawing inside the mask, or null. */
  get against() {
    return this.facts?.note ?? null;
  }

  get feather() {
    const text = find("feather").value;
    return find("feather").disabled || text === "" ? null : Math.max(0, Number(text));
  }

  async askSoft() {
    const { document: image, mask } = this.app;
    if (!image || !mask) return;
    if (mask.empty) {
      this.facts = null;
      this.put(new Uint8Array(mask.pixels.length));
    } else {
      const { signal } = (this.abort = new AbortController());
      const query = this.feather === null ? "" : `?feather_mm=${this.feather}`;
      try {
        const answer = await postForBytes(`/api/documents/${image.id}/soft${query}`, bits(mask.pixels), signal);
        if (signal.aborted || image !== this.app.document) return;
        this.facts = answer.facts;
        this.put(answer.mask);
      } catch (error) {
        if (error.name === "AbortError") return;
        this.due = false;
        this.facts = null;
        this.put(new Uint8Array(mask.pixels.length));
        throw error;
      }
    }
    this.due = false;
    this.show();
    this.onChange();
  }

  put(soft) {
    this.app.soft.set(soft);
    if (!this.app.shown) this.app.viewer.touch(0, 0, this.app.document.width, this.app.document.height);
  }

  show() {
    const { facts } = this, spacing = this.app.document?.spacing_mm;
    const number = (value) => (value >= 100 ? Math.round(value) : Number(value.toPrecision(3)));
    if (!facts) find("facts").textContent = "\u00a0";
    else if (spacing) {
      const mm = Math.sqrt(spacing[0] * spacing[1]);
      find("facts").textContent =
        `${number(facts.area_mm2)} mm\u00b2, diameter ${number(facts.diameter_px * mm)} mm (${number(facts.diameter_px)} pixels), ` +
        `soft border ${number(facts.feather_px * mm)} mm`;
    } else find("facts").textContent = `${facts.pixels} pixel${facts.pixels === 1 ? "" : "s"}, diameter ${number(facts.diameter_px)}, soft border ${number(facts.feather_px)} pixels`;
  }
}
