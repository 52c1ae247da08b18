// What is to be drawn: a real training sentence that is found by type, severity and level, or a free one; its tokens are
// counted by the server, with the tokenizer that the model has.

import { post } from "./api.js";

const find = (id) => document.getElementById(id);
const MENUS = { lesion_type: "lesion_type", severity: "severity", vertebra: "level" }; // the menus' ids, and their keys
const PAUSE = 250; // milliseconds without a key before the tokens are counted

export class Sentence {
  /** ``onChange()``: after each change. ``guard(promise)`` reports what fails. */
  constructor(guard, onChange) {
    Object.assign(this, { guard, onChange });
    this.prompts = [];
    this.tokens = null; // the server's answer for ``tokens.prompt``
    this.free = false; // written by hand: then no menu and no other image changes it
    this.written = null; // and the image that was shown then
    this.reading = false; // what the server says of it is on its way
    for (const id of Object.keys(MENUS)) find(id).addEventListener("change", () => this.pick());
    find("wording").addEventListener("click", () => this.pick(true));
    find("prompt").addEventListener("input", () => {
      this.free = true;
      this.written = this.image;
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
    this.prompts = sentences?.prompts ?? [];
    find("menus").hidden = find("wording").hidden = this.prompts.length === 0;
    const values = { lesion_type: sentences?.types, severity: sentences?.severities, vertebra: sentences?.levels };
    for (const id of Object.keys(MENUS)) {
      find(id).replaceChildren(new Option("any", ""), ...(values[id] ?? []).map((each) => new Option(each, each)));
      const asked = state?.menus[id];
      if (asked) find(id).value = asked;
      if (find(id).selectedIndex < 0) find(id).value = "";
    }
    if (!state) {
      const often = (type) => this.prompts.filter((each) => each.lesion_type === type).length;
      find("lesion_type").value = [...(values.lesion_type ?? [])].sort((a, b) => often(b) - often(a))[0] ?? "";
      if (values.severity?.includes("moderate")) find("severity").value = "moderate";
    }
    this.free = state?.free ?? false;
    this.written = state?.written ?? null;
    if (this.free || (state?.text && this.prompts.length === 0)) {
      find("prompt").value = state.text;
      this.changed();
    } else {
      if (state?.image !== image.id && values.vertebra?.includes(image.level)) find("vertebra").value = image.level;
      const kept = this.matching().some((each) => each.prompt === state?.text);
      if (kept) find("prompt").value = state.text;
      if (kept) this.changed();
      else this.pick();
    }
  }

  /** The sentence of an earlier drawing on the present image. */
  take(prompt) {
    Object.assign(this, { free: true, written: this.image });
    find("prompt").value = prompt;
    this.changed();
  }

  /** The training sentences of the menus' values. */
  matching(without = []) {
    const asked = Object.entries(MENUS).filter(([id]) => find(id).value && !without.includes(id));
    return this.prompts.filter((each) => asked.every(([id, key]) => each[key] === find(id).value));
  }

  /** Take a sentence of the menus' values: the first one, or with ``another`` the one after the present one. */
  pick(another = false) {
    if (!this.prompts.length) return;
    this.free = false;
    const level = find("vertebra").value;
    let found = this.matching().map((each) => each.prompt);
    this.borrowed = null;
    if (!found.length && level) { // no such sentence about this vertebra: one about another, with this one's name in it
      const named = new RegExp(`\\b${level}\\b`);
      const others = this.matching(["vertebra"]).filter((each) => each.level);
      found = others.map((each) => each.prompt.replace(new RegExp(`\\b${each.level}\\b`), level)).filter((text) => named.test(text));
      this.borrowed = found.length ? level : null;
    }
    this.nothing = found.length === 0;
    found = [...new Set(found)];
    if (found.length) find("prompt").value = found[another ? (found.indexOf(find("prompt").value) + 1) % found.length : 0];
    this.changed();
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
    if (!this.text) return `There is no sentence: write one${this.prompts.length ? ", or press Other wording for a training sentence" : ""}.`;
    return this.said?.fault ? `The sentence cannot be drawn: ${this.said.fault}.` : null;
  }

  /** Whether what the server will say may be needed before it is drawn: not of a training sentence about this vertebra. */
  get awaited() {
    return Boolean(this.reading) && (this.free || find("vertebra").value !== (this.level ?? find("vertebra").value));
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
      line.append(", unknown: ");
      for (const word of tokens.unknown) {
        const mark = document.createElement("mark");
        mark.textContent = word;
        line.append(mark, " ");
      }
    }
    if (this.free && this.written !== this.image) line.append("; you wrote it for another image");
    else if (this.free || tokens.fault) return;
    else if (this.nothing) line.append("; no training sentence has these values: write one");
    else if (this.borrowed) line.append(`, a training sentence with ${this.borrowed} put in`);
    else if (this.prompts.length) line.append(", a training sentence");
  }
}
