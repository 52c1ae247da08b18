// What was drawn: the row of results, one of them compared with what it was drawn on, and the verdict on it.

import { bytes, get, post } from "./api.js";
import { box, cached } from "./arrays.js";
import { Comparison, through } from "./comparison.js";
import { Reasons } from "./reasons.js";
import { command, term } from "./text.js";

const find = (id) => document.getElementById(id);
const DEAF = 500; // milliseconds that a result is on show before it can be judged: a press may have meant what was there before
const LARGE = 384; // pixels of a variant beside the others
const SIGNS = { new: "", accepted: "\u2713", rejected: "\u2717" };

export class Results {
  /** ``onChange()``: another result is shown, or judged, or listed. */
  constructor(app, guard, onChange) {
    Object.assign(this, { app, guard, onChange });
    this.items = []; // the newest first: as many as were looked at, of all that there are
    this.whole = false; // whether that is all
    this.comparison = new Comparison(app.viewer);
    this.load = cached(4, (id) => this.fetch(id));
    this.together = null; // the results that are shown side by side
    this.reasons = new Reasons((reason) => guard(this.reject(reason)), (armed) => armed || (find("judge").scrollTop = 0));
    find("again").addEventListener("click", () => guard(this.again()));
    find("all").addEventListener("click", () => this.sideBySide());
    const row = find("results");
    row.addEventListener("scroll", () => {
      if (row.scrollLeft + 2 * row.clientWidth > row.scrollWidth) guard(this.older());
    });
    document.addEventListener("visibilitychange", () => this.appeared()); // nobody has seen it meanwhile
    row.addEventListener("wheel", (event) => {
      event.preventDefault();
      row.scrollLeft += event.deltaX || event.deltaY;
    }, { passive: false });
  }

  get(id) {
    return this.items.find((item) => item.id === id) ?? null;
  }

  /** The same, asked of the server where it is older than what is listed. */
  async find(id) {
    return this.get(id) ?? get(`/api/results/${id}`);
  }

  /** The results as they stand in the row: the newest drawing first, the variants of each as they were drawn. */
  get row() {
    return this.groups.flat();
  }

  get groups() {
    const groups = new Map();
    for (const item of this.items) {
      const drawing = item.id.replace(/-\d+$/, ""); // the same of one image, mask, sentence and seed
      groups.set(drawing, [...(groups.get(drawing) ?? []), item]);
    }
    return [...groups.values()].map((group) => group.sort((a, b) => a.variant - b.variant));
  }

  // -------------------------------------------------------------------------------------------- the list

  async refresh() {
    this.take(await get("/api/history"));
  }

  /** The newest results as the server tells them, the oldest of them first; older ones that are listed stay. */
  take(newest) {
    const items = [...newest].reverse(), last = this.items.findIndex((item) => item.id === newest[0]?.id);
    if (last < 0) this.whole = false;
    this.list([...items, ...(last < 0 ? [] : this.items.slice(last + 1))]);
  }

  /** List some more, older than those that are listed. */
  async older() {
    const last = this.items.at(-1)?.id;
    if (this.whole || last === undefined || last === this.askedBefore) return;
    this.askedBefore = last;
    try {
      const found = await get(`/api/history?before=${last}`);
      if (last !== this.items.at(-1).id) return; // others are listed meanwhile
      this.whole = found.length === 0;
      this.list([...this.items, ...found.reverse()]);
    } finally {
      this.askedBefore = undefined;
    }
  }

  /** ``items``: those to list, newest first. */
  list(items) {
    this.items = items;
    const row = find("results"), old = new Map([...row.children].map((each) => [each.dataset.id, each]));
    const wanted = this.groups.flatMap((each) => each.map((item) => this.tile(item, old.get(item.id), each.length > 1 ? item.variant + 1 : "")));
    for (const [i, each] of wanted.entries()) if (row.children[i] !== each) row.insertBefore(each, row.children[i] ?? null);
    while (row.children.length > wanted.length) row.lastChild.remove();
    find("no-results").hidden = this.items.length > 0;
    if (this.app.shown) this.app.shown = this.get(this.app.shown.id) ?? this.app.shown;
    this.onChange();
  }

  /** ``number``: which one of several variants it is, or nothing. */
  tile(item, old, number) {
    const tile = old ?? document.createElement("li");
    if (!old) {
      tile.dataset.id = item.id;
      const button = document.createElement("button"), picture = new Image(), state = document.createElement("span"), variant = document.createElement("span");
      picture.src = item.thumbnail;
      picture.alt = "";
      picture.loading = "lazy";
      state.className = "state";
      variant.className = "variant";
      button.append(picture, state, variant);
      button.addEventListener("click", () => this.guard(this.show(this.get(item.id))));
      tile.append(button);
    }
    const [button] = tile.children, told = item.state === "rejected" && item.reason ? `rejected: ${item.reason}` : item.state;
    button.title = `${item.name}\n${item.prompt}\nseed ${item.seed}, ${told}`;
    button.setAttribute("aria-label", `Result ${number} ${item.name}, ${item.prompt}, seed ${item.seed}, ${told}`);
    button.setAttribute("aria-current", String(this.app.shown?.id === item.id));
    const state = button.querySelector(".state"), variant = button.querySelector(".variant");
    variant.textContent = number;
    variant.hidden = !number;
    state.textContent = SIGNS[item.state];
    state.hidden = !SIGNS[item.state];
    state.classList.toggle("good", item.state === "accepted");
    state.classList.toggle("fault", item.state === "rejected");
    return tile;
  }

  // ----------------------------------------------------------------------------------------- one of them

  async fetch(id) {
    const image = await this.app.documentOf(await this.find(id)), path = `/api/results/${id}`;
    const [levels, mask, soft] = await Promise.all([bytes(`${path}/levels`, image.bits), bytes(`${path}/mask`), bytes(`${path}/soft`)]);
    return { image, levels, mask, soft };
  }

  /** Show a result beside what it was drawn on; what is painted stays as it is. */
  async show(item) {
    if (!item) return;
    const asked = (this.asked = item.id), loaded = await this.load(item.id);
    if (asked !== this.asked) return; // another one was clicked meanwhile
    const before = await this.app.levelsOf(item.document);
    if (asked !== this.asked) return;
    const area = box(loaded.mask, loaded.image.width);
    this.together = null;
    if (item.id !== this.app.shown?.id) {
      this.app.hush();
      this.reasons.arm(false);
      this.appeared();
    }
    this.app.shown = item;
    this.loaded = loaded;
    this.app.put(loaded.image, before);
    this.comparison.open(loaded.levels, through(area, loaded.image.width));
    this.list(this.items);
    this.tell();
    find("results").querySelector('[aria-current="true"]')?.scrollIntoView({ block: "nearest", inline: "center" });
  }

  /** From now on the shown result is on show. */
  appeared() {
    this.since = performance.now();
    setTimeout(() => this.onChange(), DEAF + 20);
  }

  /** Whether the result was on show long enough to be judged. */
  get ready() {
    return this.app.shown !== null && performance.now() - this.since >= DEAF;
  }

  /** Back to the painting. */
  hide() {
    this.asked = this.app.shown = this.together = null;
    this.reasons.arm(false);
    this.app.compose();
    this.list(this.items);
  }

  tell() {
    const item = this.app.shown;
    if (!item) return;
    const { variants } = this;
    find("all").hidden = variants.length < 2;
    find("all").textContent = `All ${variants.length}`;
    find("result-title").textContent = variants.length > 1 ? `Variant ${item.variant + 1} of ${variants.at(-1).variant + 1}` : "Result";
    find("result-prompt").textContent = `\u201c${item.prompt}\u201d`;
    find("result-about").textContent = `${item.name}, seed ${item.seed}`;
    const verdict = find("verdict");
    find("judged").hidden = item.state === "new";
    verdict.className = { accepted: "good", rejected: "fault", new: "hint" }[item.state];
    verdict.textContent = {
      new: "",
      accepted: "Accepted. The same again, bit for bit, by:",
      rejected: `Rejected${item.reason ? `: ${item.reason}` : ""}. It can still be accepted.`,
    }[item.state];
    const title = { new: "Not good? Reject it, because", accepted: "Reject it after all, because", rejected: "Rejected, because" };
    find("reject-title").textContent = title[item.state];
    find("replay").hidden = item.state !== "accepted";
    command(find("replay"), ["medsoft", "draw", "--replay", `${item.folder}/meta.json`, "--output_dir", "again"]);
    this.reasons.mark(item.state === "rejected" ? item.reason : null);
  }

  /** The result ``steps`` places to the right in the row. */
  async move(steps) {
    const place = this.row.findIndex((item) => item.id === this.app.shown?.id);
    if (place >= 0 && place + steps >= this.items.length) await this.older();
    const next = this.row[place < 0 ? 0 : place + steps];
    if (next) await this.show(next);
  }

  /** The variants of the drawing that the shown one is of, as they were drawn. */
  get variants() {
    return this.groups.find((each) => each.some((item) => item.id === this.app.shown?.id)) ?? [];
  }

  /** Show all variants of the drawing side by side, or the one again. */
  sideBySide() {
    const { variants } = this;
    this.together = this.together || variants.length < 2 ? null : variants;
    if (this.together) {
      find("sheet").style.setProperty("--columns", Math.ceil(Math.sqrt(variants.length)));
      find("sheet").replaceChildren(...variants.map((item) => {
        const button = document.createElement("button"), picture = new Image();
        picture.src = `${item.thumbnail}?longer=${LARGE}`;
        picture.alt = "";
        button.setAttribute("aria-label", `Variant ${item.variant + 1}, ${item.state}`);
        button.setAttribute("aria-current", String(item.id === this.app.shown.id));
        button.append(picture, term("span", `${item.variant + 1} ${SIGNS[item.state]}`));
        button.addEventListener("click", () => this.guard(this.show(this.get(item.id))));
        return button;
      }));
    }
    this.onChange();
  }

  /** Back to the painting with all that the shown one was drawn with. */
  async again() {
    const { app, loaded } = this;
    if (app.shown) await app.again(app.shown, loaded.mask);
  }

  // ---------------------------------------------------------------------------------------------- judged

  async accept() {
    if (!this.ready) return;
    const judged = await post(`/api/results/${this.app.shown.id}/accept`);
    this.judged(judged);
    this.app.say(`Accepted: ${judged.folder}`, "good");
  }

  async reject(reason) {
    if (!this.ready) return;
    this.judged(await post(`/api/results/${this.app.shown.id}/reject`, { reason }));
    this.reasons.arm(false);
    this.app.say(`Rejected: ${reason}. It stays among the results and can still be accepted.`);
  }

  /** Take back what was said of the shown one. */
  async undo() {
    if (this.app.shown.state === "new") return;
    this.judged(await post(`/api/results/${this.app.shown.id}/undo`));
    this.app.say("Taken back: it is neither accepted nor rejected.");
  }

  judged(item) {
    if (this.app.shown?.id === item.id) this.app.shown = item;
    this.list(this.items.map((each) => (each.id === item.id ? item : each)));
    this.tell();
  }

  /** How many drawings on these images nobody has judged yet, of those that are listed. */
  undecidedOn(ids) {
    return this.items.filter((item) => item.state === "new" && ids.includes(item.document)).length;
  }

  /** Another result of the same job that nobody has judged yet, or null. */
  get undecided() {
    const { shown } = this.app;
    return shown ? (this.variants.find((item) => item.state === "new" && item.id !== shown.id) ?? null) : null;
  }
}
