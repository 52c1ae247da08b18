// What was drawn: the row of results, one of them compared with what it was drawn on, and the verdict on it.

import { bytes, get, post } from "./api.js";
import { box, cached } from "./arrays.js";
import { Comparison, through } from "./comparison.js";
import { REASONS } from "./reasons.js";

const find = (id) => document.getElementById(id);
const SIGNS = { new: "", accepted: "\u2713", rejected: "\u2717" };

export class Results {
  /** ``onChange()``: another result is shown, or judged, or listed. */
  constructor(app, guard, onChange) {
    Object.assign(this, { app, guard, onChange });
    this.items = []; // the newest first: as many as were looked at, of all that there are
    this.whole = false; // whether that is all
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
    const row = find("results");
    row.addEventListener("scroll", () => {
      if (row.scrollLeft + 2 * row.clientWidth > row.scrollWidth) guard(this.older());
    });
  }

  get(id) {
    return this.items.find((item) => item.id === id) ?? null;
  }

  /** The same, asked of the server where it is older than what is listed. */
  async find(id) {
    return this.get(id) ?? get(`/api/results/${id}`);
  }

  /** The results of one job, in the order in which they were drawn. */
  ofJob(job) {
    return this.items.filter((item) => item.job === job).sort((a, b) => a.variant - b.variant);
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
    if (item.id !== this.app.shown?.id) this.app.hush();
    this.app.shown = item;
    this.loaded = loaded;
    this.app.put(loaded.image, before);
    this.comparison.open(loaded.levels, through(area, loaded.image.width));
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
  async move(steps) {
    const place = this.items.findIndex((item) => item.id === this.app.shown?.id);
    if (place >= 0 && place + steps >= this.items.length) await this.older();
    const next = this.items[place < 0 ? 0 : place + steps];
    if (next) await this.show(next);
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
