// What is to be drawn: a real training sentence that the server finds by type, severity and level, or a free one; its tokens
// are counted by the server, with the tokenizer that the model has.

import { get, post } from "./api.js";

const find = (id) => document.getElementById(id);
const MENUS = { lesion_type: "lesion_type", severity: "severity", vertebra: "level" }; // the menus' ids, and their keys
const PAUSE = 250; // milliseconds without a key before the tokens are counted

export class Sentence {
  /** ``onChange()``: after each change. ``guard(promise)`` reports what fails. */
  constructor(guard, onChange) {
    Object.assign(this, { guard, onChange });
    this.known = 0; // how many training sentences there are
    this.found = { asked: null, prompts: [] }; // the first of those of the menus' values, and what the server says of them
    this.picking = null; // the server looks for them
    this.tokens = null; // the server's answer for ``tokens.prompt``
    this.free = false; // written by hand: then no menu and no other image changes it
    this.written = null; // and the image that was shown then
    this.reading = false; // what the server says of it is on its way
    for (const id of Object.keys(MENUS)) find(id).addEventListener("change", () => this.pick());
    find("wording").addEventListener("click", () => this.pick({ another: true }));
    find("prompt").addEventListener("input", () => {
      Object.assign(this, { free: true, written: this.image, picking: null });
      this.changed(PAUSE);
    });
  }

  get text() {
    return find("prompt").value.trim();
  }

  /** What to keep over a reload, and take from it. */
  get state() {
    const menus = Object.fromEntries(Object.keys(MENUS).map((id) => [id, find(id).value]));
    return { free: this.free, text: find("prompt").value, menus, image: this.image, written: this.written };
  }

  /** ``sentences`` of the server's state, the open image, and an earlier ``state`` or null. */
  open(sentences, image, state) {
    Object.assign(this, { image: image.id, level: image.level });
    this.known = sentences?.count ?? 0;
    this.picking = null;
    find("menus").hidden = find("wording").hidden = this.known === 0;
    const values = { lesion_type: sentences?.types, severity: sentences?.severities, vertebra: sentences?.levels };
    for (const id of Object.keys(MENUS)) {
      find(id).replaceChildren(new Option("any", ""), ...(values[id] ?? []).map((each) => new Option(each, each)));
      const asked = state?.menus[id];
      if (asked) find(id).value = asked;
      if (find(id).selectedIndex < 0) find(id).value = "";
    }
    if (!state) {
      find("lesion_type").value = values.lesion_type?.[0] ?? ""; // the most frequent one
      if (values.severity?.includes("moderate")) find("severity").value = "moderate";
    }
    if (state?.image !== image.id && values.vertebra?.includes(image.level)) find("vertebra").value = image.level;
    this.free = state?.free ?? false;
    this.written = state?.written ?? null;
    if (this.free || (state?.text && this.known === 0)) {
      find("prompt").value = state.text;
      this.changed();
    } else this.pick({ kept: state?.text });
  }

  /** The sentence of an earlier drawing on the present image. */
  take(prompt) {
    Object.assign(this, { free: true, written: this.image, picking: null });
    find("prompt").value = prompt;
    this.changed();
  }

  /** Take a sentence of the menus' values: ``kept`` if it is one, else the first, or ``another``, the one after the present. */
  pick({ another = false, kept = null } = {}) {
    if (!this.known) return this.changed();
    this.free = false;
    const picking = (this.picking = this.search().then((found) => {
      if (this.picking !== picking) return; // something else was asked for or written meanwhile
      Object.assign(this, { found, picking: null });
      const { prompts } = found, box = find("prompt");
      if (prompts.includes(kept)) box.value = kept;
      else if (prompts.length) box.value = prompts[another ? (prompts.indexOf(box.value) + 1) % prompts.length : 0];
      this.changed();
    }));
    this.onChange();
    this.guard(picking.finally(() => {
      if (this.picking !== picking) return;
      this.picking = null; // it has failed
      this.onChange();
    }));
  }

  /** The training sentences of the menus' values: those that are there already, or those that the server finds. */
  async search() {
    const values = Object.entries(MENUS).map(([id, key]) => [key, find(id).value]);
    const asked = new URLSearchParams(values.filter(([, value]) => value)).toString();
    if (asked === this.found.asked) return this.found;
    const level = find("vertebra").value, { count, sentences, borrowed } = await get(`/api/sentences?${asked}`);
    return { asked, count, prompts: sentences.map((each) => each.prompt), borrowed: borrowed ? level : null };
  }

  changed(pause = 0) {
    clearTimeout(this.timer);
    const asked = (this.reading = this.timer = setTimeout(() => {
      this.guard(this.count().finally(() => {
        if (this.reading !== asked) return; // something else was written meanwhile
        this.reading = false;
        this.onChange();
      }));
    }, pause));
    this.onChange();
  }

  /** What the server has said of this sentence on this image, or null. */
  get said() {
    return this.tokens?.prompt === this.text && this.tokens.image === this.image ? this.tokens : null;
  }

  /** Why this sentence cannot be drawn, and what to do, or null. */
  get fault() {
    if (this.picking) return null;
    if (!this.text) return `There is no sentence: write one${this.known ? ", or press Other wording for a training sentence" : ""}.`;
    return this.said?.fault ? `The sentence cannot be drawn: ${this.said.fault}.` : null;
  }

  /** Whether what the server will say may be needed before it is drawn: not of a training sentence about this vertebra. */
  get awaited() {
    const { value } = find("vertebra");
    return Boolean(this.picking) || (Boolean(this.reading) && (this.free || value !== (this.level ?? value)));
  }

  /** In what it contradicts the image, or null. */
  get against() {
    return (this.text && this.said?.contradiction) || null;
  }

  async count() {
    const { text: prompt, image } = this;
    if (prompt && !this.said) {
      const answer = await post("/api/tokens", { prompt, document: image });
      if (prompt !== this.text || image !== this.image) return;
      this.tokens = { prompt, image, ...answer };
    }
    this.show();
  }

  show() {
    const line = find("tokens"), tokens = this.text && this.said;
    line.replaceChildren();
    line.classList.toggle("fault", Boolean(tokens && tokens.fault));
    if (!tokens) return;
    line.append(tokens.limit ? `${tokens.count} of ${tokens.limit} tokens` : `${tokens.count} word${tokens.count === 1 ? "" : "s"}`);
    if (tokens.unknown.length) {
      line.append(", unknown:");
      for (const word of tokens.unknown) {
        const mark = document.createElement("mark");
        mark.textContent = word;
        line.append(" ", mark);
      }
    }
    if (this.free && this.written !== this.image) line.append("; you wrote it for another image");
    else if (this.free || tokens.fault || !this.known) return;
    else line.append(this.origin);
  }

  /** Where a sentence that was picked comes from. */
  get origin() {
    const { count, prompts, borrowed } = this.found;
    if (!prompts.length) return "; no training sentence has these values: write one";
    if (borrowed) return `, a training sentence with ${borrowed} put in`;
    return `, a training sentence${count > prompts.length ? `: W goes through the ${prompts.length} most frequent of ${count}` : ""}`;
  }
}
