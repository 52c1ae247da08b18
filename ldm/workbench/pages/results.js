// What was drawn: the row of results, one of them compared with what it was drawn on, and the verdict on it.

import { bytes, get, post } from "./api.js";
import { box, cached } from "./arrays.js";
import { Comparison, beside } from "./comparison.js";
import { REASONS } from "./reasons.js";

const find = (id) => document.getElementById(id);
const SIGNS = { new: "", accepted: "\u2713", rejected: "\u2717" };

/** The history as the server tells it, the oldest first, in the order in which the page shows it. */
export const newestFirst = (items) => [...items].reverse();

export class Results {
  /** ``onChange()``: another result is shown, or judged, or listed. */
  constructor(app, guard, onChange) {
    Object.assign(this, { app, guard, onChange });
    this.items = [];
    this.comparison = new Comparison(app.viewer);
    this.load = cached(4, (id) => this.fetch(id));
    find("reasons").replaceChildren(...REASONS.map((reason) => {
      const button = document.createElement("button");
      button.textContent = reason;
      button.addEventListener("click", () => guard(this.reject(reason)));
      return button;
    }));
    find("reject-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const reason = find("reason").value.trim();
      if (reason) guard(this.reject(reason));
      else find("reason").focus();
    });
  }

  get(id) {
    return this.items.find((item) => item.id === id) ?? null;
  }

  /** The results of one job, in the order in which they were drawn. */
  ofJob(job) {
    return this.items.filter((item) => item.job === job).sort((a, b) => a.variant - b.variant);
  }

  // -------------------------------------------------------------------------------------------- the list

  async refresh() {
    this.list(newestFirst(await get("/api/history")));
  }

  /** ``items``: the whole history, newest first. */
  list(items) {
    this.items = items;
    const row = find("results"), old = new Map([...row.children].map((each) => [each.dataset.id, each]));
    const wanted = this.items.map((item) => this.tile(item, old.get(item.id)));
    for (const [i, each] of wanted.entries()) if (row.children[i] !== each) row.insertBefore(each, row.children[i] ?? null);
    while (row.children.length > wanted.length) row.lastChild.remove();
    find("no-results").hidden = this.items.length > 0;
    if (this.app.shown) this.app.shown = this.get(this.app.shown.id) ?? this.app.shown;
    this.onChange();
  }

  tile(item, old) {
    const tile = old ?? document.createElement("li");
    if (!old) {
      tile.dataset.id = item.id;
      const button = document.createElement("button"), picture = new Image(), state = document.createElement("span");
      picture.src = item.thumbnail;
      picture.alt = "";
      picture.loading = "lazy";
      state.className = "state";
      button.append(picture, state);
      button.addEventListener("click", () => this.guard(this.show(this.get(item.id))));
      tile.append(button);
    }
    const [button] = tile.children, told = item.state === "rejected" && item.reason ? `rejected: ${item.reason}` : item.state;
    button.title = `${item.name}\n${item.prompt}\nseed ${item.seed}, ${told}`;
    button.setAttribute("aria-label", `Result ${item.name}, ${item.prompt}, seed ${item.seed}, ${told}`);
    button.setAttribute("aria-current", String(this.app.shown?.id === item.id));
    const state = button.querySelector(".state");
    state.textContent = SIGNS[item.state];
    state.hidden = !SIGNS[item.state];
    state.classList.toggle("good", item.state === "accepted");
    state.classList.toggle("fault", item.state === "rejected");
    return tile;
  }

  // ----------------------------------------------------------------------------------------- one of them

  async fetch(id) {
    const item = this.get(id), image = await this.app.documentOf(item), path = `/api/results/${id}`;
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
    if (item.id !== this.app.shown?.id) this.app.hush();
    this.app.shown = item;
    this.loaded = loaded;
    this.app.put(loaded.image, before);
    this.comparison.open(loaded.levels, beside(area, loaded.image.width));
    this.list(this.items);
    this.tell();
    find("results").querySelector('[aria-current="true"]')?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Back to the painting. */
  hide() {
    this.asked = null;
    this.app.shown = null;
    this.app.compose();
    this.list(this.items);
  }

  tell() {
    const item = this.app.shown;
    if (!item) return;
    const variants = this.ofJob(item.job), place = variants.findIndex((each) => each.id === item.id) + 1;
    find("result-title").textContent = variants.length > 1 ? `Result ${place} of ${variants.length}` : "Result";
    find("result-prompt").textContent = `\u201c${item.prompt}\u201d`;
    find("result-about").textContent = `${item.name}, seed ${item.seed}`;
    const verdict = find("verdict");
    verdict.className = { accepted: "good", rejected: "fault", new: "hint" }[item.state];
    verdict.textContent = {
      new: "",
      accepted: `Accepted: ${item.folder}`,
      rejected: `Rejected${item.reason ? `: ${item.reason}` : ""}. It can still be accepted.`,
    }[item.state];
    const title = { new: "Not good? Reject it, because", accepted: "Changed your mind? Reject it, because", rejected: "Rejected, because" };
    find("reject-title").textContent = title[item.state];
    for (const button of find("reasons").children) {
      button.setAttribute("aria-pressed", String(item.state === "rejected" && item.reason === button.textContent));
    }
  }

  /** The result ``steps`` places to the right in the row. */
  move(steps) {
    const place = this.items.findIndex((item) => item.id === this.app.shown?.id);
    const next = this.items[place < 0 ? 0 : place + steps];
    if (next) this.guard(this.show(next));
  }

  // ---------------------------------------------------------------------------------------------- judged

  async accept() {
    const judged = await post(`/api/results/${this.app.shown.id}/accept`);
    this.judged(judged);
    this.app.say(`Accepted: ${judged.folder}`, "good");
  }

  async reject(reason) {
    this.judged(await post(`/api/results/${this.app.shown.id}/reject`, { reason }));
    find("reason").value = "";
    this.app.say(`Rejected: ${reason}. It stays among the results and can still be accepted.`);
  }

  judged(item) {
    if (this.app.shown?.id === item.id) this.app.shown = item;
    this.list(this.items.map((each) => (each.id === item.id ? item : each)));
    this.tell();
  }

  /** Another result of the same job that nobody has judged yet, or null. */
  get undecided() {
    const { shown } = this.app;
    return shown ? (this.ofJob(shown.job).find((item) => item.state === "new" && item.id !== shown.id) ?? null) : null;
  }
}
