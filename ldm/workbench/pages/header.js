// The header: which image is shown, of which collection, its plane and slice, and the ways to another one.

import { get } from "./api.js";

const find = (id) => document.getElementById(id);
const PAUSE = 150; // milliseconds without a key before the list is asked for

export class Header {
  /** ``go(path, content)`` opens another image; ``guard(promise)`` reports what fails. */
  constructor(guard, go) {
    Object.assign(this, { guard, go, image: null });
    find("previous").addEventListener("click", () => this.step(-1));
    find("next").addEventListener("click", () => this.step(1));
    find("open-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const path = find("path").value.trim();
      if (path) go("/api/open", { path });
      else find("path").focus();
    });
    const slice = () => go("/api/open", { path: this.image.path, plane: find("plane").value, slice: Number(find("slice").value) });
    find("slice").addEventListener("change", slice);
    find("plane").addEventListener("change", () => go("/api/open", { path: this.image.path, plane: find("plane").value }));
    find("volume").addEventListener("submit", (event) => event.preventDefault());
    this.listing();
  }

  /** Name the image that is on the stage; ``drawn``: a result is shown beside it. */
  show(image, drawn = false) {
    this.image = image;
    const { collection, volume, spacing_mm: spacing } = image ?? {};
    find("collection").hidden = !collection;
    if (collection) {
      find("place").textContent = `${collection.index + 1} of ${collection.count}`;
      find("place").title = `${collection.name}: list of the images (O)`;
      find("previous").disabled = !this.has(-1);
      find("next").disabled = !this.has(1);
    }
    find("volume").hidden = !volume;
    find("about-name").textContent = find("about-kind").textContent = find("about").title = "";
    if (!image) return;
    if (volume) {
      find("plane").replaceChildren(...volume.planes.map((plane) => new Option(plane, plane, false, plane === volume.plane)));
      Object.assign(find("slice"), { value: volume.index, max: volume.count - 1 });
      find("slices").textContent = `0 to ${volume.count - 1}`;
    }
    const kind = `${image.width} x ${image.height}, ${image.bits} bit${image.channels === 3 ? " RGB" : ""}`;
    const millimetres = spacing ? `, ${Number(spacing[0].toPrecision(3))}${spacing[0] === spacing[1] ? "" : ` x ${Number(spacing[1].toPrecision(3))}`} mm` : "";
    find("about-name").textContent = `${drawn ? "Drawn on " : ""}${image.name}`;
    find("about-kind").textContent = `: ${kind}${millimetres}`;
    find("about").title = `${image.path}\n${kind}${millimetres}\n${image.prompt ? `its own sentence: ${image.prompt}` : ""}`;
    const what = drawn ? "with what was drawn on it" : "paint the lesion on it, or press L for a suggestion";
    find("canvas").setAttribute("aria-label", `Image ${image.name}, ${kind}; ${what}`);
  }

  /** Whether the collection has an image so many places on. */
  has(by) {
    const { collection } = this.image ?? {};
    return Boolean(collection) && collection.index + by >= 0 && collection.index + by < collection.count;
  }

  step(by) {
    if (this.has(by)) this.goTo(this.image.collection.index + by);
  }

  goTo(index) {
    return this.go("/api/go", { index, document: this.image.id });
  }

  // ------------------------------------------------------------------------------------ the list of a collection

  listing() {
    find("place").addEventListener("click", () => this.list());
    find("words").addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.guard(this.filter()), PAUSE);
    });
    find("words").addEventListener("keydown", (event) => {
      if (event.key !== "ArrowDown") return;
      event.preventDefault();
      find("entries").focus();
    });
    find("finder").querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.choose();
    });
    find("entries").addEventListener("click", (event) => event.target.matches("option") && this.choose());
    find("entries").addEventListener("keydown", (event) => event.key === "Enter" && this.choose());
  }

  /** Open the list of the collection that the shown image is of. */
  list() {
    if (!this.image?.collection) return;
    find("finder").showModal();
    find("words").select();
    this.guard(this.filter());
  }

  async filter() {
    const words = find("words").value, { id, collection } = this.image;
    const { count, items } = await get(`/api/collection?document=${id}&words=${encodeURIComponent(words)}`);
    if (words !== find("words").value) return; // more was typed meanwhile
    find("entries").replaceChildren(...items.map(({ index, name, level, about }) => {
      return new Option([`${index + 1}`, name, level, about].filter(Boolean).join(" \u00b7 "), index, false, index === collection.index);
    }));
    if (find("entries").selectedIndex < 0) find("entries").selectedIndex = 0;
    const listed = count > items.length ? `, the first ${items.length} are listed` : "";
    find("found").textContent = count ? `${count} of ${collection.count}${listed}. Enter or a click opens one.` : `None of the ${collection.count} has these words.`;
  }

  choose() {
    const { value } = find("entries");
    if (value === "") return;
    find("finder").close();
    this.goTo(Number(value));
  }
}
