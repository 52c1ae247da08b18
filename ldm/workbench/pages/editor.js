// The page of `medsoft edit`: what belongs together of image, mask, sentence, drawing and results, and the next step.

import { Fault, bytes, get, keep, kept, post } from "./api.js";
import { cached } from "./arrays.js";
import { MODES } from "./comparison.js";
import { Drawing } from "./drawing.js";
import { listen } from "./keys.js";
import { Mask, packed, unpacked } from "./mask.js";
import { navigate } from "./navigation.js";
import { Placing, anySeed } from "./placing.js";
import { Results } from "./results.js";
import { Sentence } from "./sentence.js";
import { Tools } from "./tools.js";
import { Viewer } from "./viewer.js";
import { Windowing } from "./windowing.js";

const find = (id) => document.getElementById(id);
const ORANGE = [242, 163, 60], CYAN = [65, 199, 217];
const SIZE_STEPS = 5; // of the brush's slider (0 to 100), at a press of [ or ]

const app = {
  state: null, // the server's answer about this tab's image
  document: null, // the image that is painted on
  levels: null,
  mask: null,
  soft: null,
  packed: "", // the mask, as it is kept
  opening: false, // another image is on its way
  shown: null, // the result that is looked at, or null while painting
  drawn: null, // what the last drawing was begun with
  show: { mask: true, soft: true }, // overlays while painting
  look: { mask: false, soft: false }, // and while looking at a result
  viewer: new Viewer(find("canvas")),
  say,
  hush,
  put,
  compose,
  documentOf,
  levelsOf,
};
const { viewer } = app;

// ------------------------------------------------------------------------------------------------ what is told

function say(text, kind = "") {
  find("status").textContent = text;
  find("status").className = kind;
}

/** What was told of something else is old now; a fault stays. */
function hush() {
  if (find("status").className !== "fault") say("");
}

/** Wait for a promise; a fault goes to the status line. */
async function guard(promise) {
  try {
    await promise;
  } catch (error) {
    if (!(error instanceof Fault)) throw error;
    say(error.message, "fault");
  }
}

// ------------------------------------------------------------------------------------------------ the parts

const windowing = new Windowing(viewer, (window) => keep(`window.${shownImage().id}`, window));
const sentence = new Sentence(guard, changed);
const placing = new Placing(app, guard, changed);
const results = new Results(app, guard, render);
const tools = new Tools(viewer, () => (app.shown || app.opening ? null : app.mask), showTool);
const drawing = new Drawing(app, {
  onProgress: render,
  onResults: () => results.refresh(),
  async onEnd(job) {
    await results.refresh();
    if (job.state === "failed") return say(job.error ?? "The drawing failed.", "fault");
    const first = job.results.length ? await results.find(job.results[0]) : null;
    if (first && job.document === app.document?.id) await results.show(first);
    if (job.state === "cancelled") say("Cancelled. Your mask and sentence are as they were.");
  },
});
const hand = navigate(viewer, {
  begin: (event, place) => tools.begin(event, place),
  hover: (place) => tools.hover(place),
  onWindow: (low, high) => windowing.set(low, high),
  onSlider: (position) => results.comparison.slide(position),
});

const imageOf = cached(8, (id) => get(`/api/documents/${id}`));
const levelsById = cached(4, async (id) => bytes(`/api/documents/${id}/levels`, (await imageOf(id)).bits));

async function documentOf(item) {
  if (!item.document) throw new Fault(`${item.name}: nothing says what it was drawn on, so there is nothing to compare it with. It lies in ${item.folder}`, 410);
  return imageOf(item.document);
}

function levelsOf(id) {
  return levelsById(id);
}

function shownImage() {
  return app.onStage ?? app.document;
}

// ------------------------------------------------------------------------------------------------ the image

/** Put an image on the stage, with its window, unless it is there. */
function put(image, levels) {
  if (app.onStage?.id === image.id) return;
  app.onStage = image;
  windowing.open(image);
  const window = kept(`window.${image.id}`, windowing.first);
  viewer.setImage({ ...image, levels }, window);
}

/** Show the image that is painted on, and the mask over it. */
function compose() {
  if (!app.document) return;
  put(app.document, app.levels);
  results.comparison.open(null);
  overlay();
}

function overlay() {
  const shown = app.shown ? app.look : app.show, layers = [];
  const { mask, soft } = app.shown ? results.loaded : { mask: app.mask?.pixels, soft: app.soft };
  find("show-mask").checked = shown.mask;
  find("show-soft").checked = shown.soft;
  if (mask && shown.soft) layers.push({ mask: soft, color: CYAN, alpha: 0.5 });
  if (mask && shown.mask) layers.push({ mask, color: ORANGE, alpha: app.shown ? 0 : 0.22, outline: true });
  viewer.setOverlays(layers);
}

/** The server's answer about an image: show it, with what this tab has kept of it. */
async function open(state) {
  const { document: image } = state, asked = (app.asked = Symbol("an image"));
  app.opening = true;
  render();
  try {
    const levels = image && (await levelsOf(image.id));
    if (asked !== app.asked) return; // another one was asked for meanwhile
    Object.assign(app, { state, document: image, levels, shown: null, onStage: null });
    results.take(state.history);
    find("empty").hidden = Boolean(image);
    describe(state);
    if (image) await begin(state);
    const { passed } = state;
    if (passed.length) say(`Passed over: ${passed.length > 1 ? `${passed.length} damaged images, the first ` : ""}${passed[0]}`);
  } finally {
    if (asked === app.asked) app.opening = false;
    render();
  }
}

/** What belongs to an image that is painted on: its own mask, or the one that this tab has kept, or a suggestion. */
async function begin({ document: image, feather, sentences }) {
  keep("document", image.id);
  app.soft = new Uint8Array(image.width * image.height);
  app.mask = new Mask(image.width, image.height, painted);
  app.packed = "";
  app.drawn = kept(`drawn.${image.id}`, null);
  placing.open(image, feather);
  sentence.open(sentences, image, kept("sentence", null));
  resize();
  compose();
  const old = kept(`mask.${image.id}`, null), pixels = old === null ? null : unpacked(old, app.mask.pixels.length);
  if (pixels) {
    app.mask.replace(pixels);
    app.mask.finish();
  } else await placing.first();
}

function describe({ document: image, collection, model, output_dir: folder }) {
  find("model").textContent = model.name.split(/[\\/]/).slice(-2).join("/");
  find("model").title = `Model ${model.name}: ${model.image_size} pixels, ${model.steps} steps, on ${model.device}. Results: ${folder}`;
  if (model.error) say(model.error, "fault");
  find("collection").hidden = !collection;
  if (collection) {
    find("place").textContent = `${(collection.index ?? -1) + 1} of ${collection.count}`;
    find("place").title = collection.name;
    find("previous").disabled = !(collection.index > 0);
    find("next").disabled = !((collection.index ?? -1) < collection.count - 1);
  }
  find("volume").hidden = !image?.volume;
  find("about").textContent = find("about").title = "";
  if (!image) return;
  const { volume, spacing_mm: spacing } = image;
  if (volume) {
    find("plane").replaceChildren(...volume.planes.map((plane) => new Option(plane, plane, false, plane === volume.plane)));
    Object.assign(find("slice"), { value: volume.index, max: volume.count - 1 });
    find("slices").textContent = `of ${volume.count - 1}`;
  }
  const kind = `${image.width} x ${image.height}, ${image.bits} bit${image.channels === 3 ? " RGB" : ""}`;
  const millimetres = spacing ? `, ${Number(spacing[0].toPrecision(3))}${spacing[0] === spacing[1] ? "" : ` x ${Number(spacing[1].toPrecision(3))}`} mm` : "";
  find("about").textContent = `${image.name}: ${kind}${millimetres}`;
  find("about").title = `${image.path}\n${image.prompt ? `its own sentence: ${image.prompt}` : ""}`;
  find("canvas").setAttribute("aria-label", `Image ${image.name}, ${kind}; paint the lesion on it, or press L for a suggestion`);
}

/** Ask for another image; what is painted on this one is kept. */
function go(path, content) {
  return guard((async () => {
    say("");
    await open(await post(path, content));
  })());
}

const step = (by) => {
  const { collection } = app.state ?? {};
  const index = collection ? (collection.index ?? -1) + by : -1;
  if (collection && index >= 0 && index < collection.count) go("/api/go", { index, document: app.document?.id });
};

// ------------------------------------------------------------------------------------------------ painting

function painted({ x, y, width, height }, finished) {
  if (!app.shown) viewer.touch(x, y, width, height);
  if (!finished) return;
  app.packed = app.mask.empty ? "" : packed(app.mask.pixels);
  keep(`mask.${app.document.id}`, app.packed || packed(app.mask.pixels));
  placing.soften();
}

function clear() {
  app.mask.replace(new Uint8Array(app.mask.pixels.length));
  app.mask.finish();
}

function showTool(name) {
  if (app.shown) results.hide();
  for (const button of find("tools").querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === name));
  find("canvas").classList.toggle("painting", name === "brush" || name === "eraser");
  find("canvas").classList.toggle("pointing", name === "polygon" || name === "box");
  keep("tool", name);
}

/** The diameter of the brush: from one pixel to half the image, each step of the slider by the same factor. */
function resize(by = 0) {
  const slider = find("brush-size");
  slider.value = Number(slider.value) + by;
  const { width, height } = app.document ?? { width: 128, height: 128 };
  tools.diameter = Math.max(1, Math.min(width, height) / 2) ** (slider.value / 100);
  find("brush-size-told").textContent = `${tools.diameter < 10 ? tools.diameter.toFixed(1) : Math.round(tools.diameter)} px`;
  keep("brush", slider.value);
  viewer.refresh();
}

// ------------------------------------------------------------------------------------------------ the next step

const number = (id) => Math.max(Number(find(id).min), Math.floor(Number(find(id).value) || 0));

function request() {
  return { document: app.document.id, prompt: sentence.text, n: number("n"), seed: number("seed"), feather_mm: placing.feather };
}

const signature = () => JSON.stringify([request(), app.packed]);

function draw() {
  if (!app.document || app.opening || app.mask.empty || sentence.fault || drawing.job) return;
  if (app.drawn === signature()) find("seed").value = anySeed(); // the same again would be the same picture
  changed();
  app.drawn = signature();
  keep(`drawn.${app.document.id}`, app.drawn);
  if (app.shown) results.hide();
  guard(drawing.begin({ ...request(), mask: app.mask.pixels }));
}

/** What the page offers as next step: a hint, a button (label and action), and sometimes a second one. */
function nextStep() {
  const { document: image, shown, mask } = app, { collection } = app.state ?? {};
  const more = collection && (collection.index ?? -1) < collection.count - 1;
  const open = { label: "Next image", act: () => step(1) }, back = { label: "Back to the mask", act: () => results.hide() };
  if (drawing.job) return { hint: drawing.told, second: { label: "Cancel", act: () => guard(drawing.cancel()) } };
  if (shown?.state === "new") {
    return { hint: "Does it look right?", primary: { label: "Accept", act: () => guard(results.accept()) }, second: more ? open : null };
  }
  if (shown) {
    const told = shown.state === "accepted" ? "Accepted, as a sample folder." : "Rejected.";
    const { undecided } = results, accept = { label: "Accept after all", act: () => guard(results.accept()) };
    const primary = undecided ? { label: "Next result", act: () => guard(results.show(undecided)) } : more ? open : back;
    return { hint: told, primary, second: shown.state === "rejected" ? accept : null };
  }
  if (app.opening) return { hint: "Opening the image" };
  if (!image) return { hint: "Open an image to draw on.", primary: { label: "To the path", act: () => find("path").focus() } };
  if (mask.empty) {
    const suggest = { label: "Suggest a place", act: () => placing.another() };
    const hint = image.has_body ? "Paint where the lesion is to be, or take a suggestion." : "Paint where the lesion is to be.";
    return { hint, primary: image.has_body ? suggest : null };
  }
  if (sentence.fault) return { hint: sentence.fault };
  const n = number("n"), again = app.drawn === signature();
  const what = again ? "Draw with another seed" : n > 1 ? `Draw ${n} variants` : "Draw";
  return { hint: again ? "Drawn already with this seed." : "The sentence is drawn inside the outline.", primary: { label: what, act: draw } };
}

function changed() {
  if (!app.document) return;
  keep("sentence", sentence.state);
  keep("form", { n: find("n").value, seed: find("seed").value, feather: find("feather").value, placing: placing.settings });
  render();
}

function render() {
  const { hint, primary, second } = nextStep(), { job } = drawing;
  find("compose").hidden = Boolean(app.shown);
  find("judge").hidden = !app.shown;
  find("canvas").classList.toggle("judging", Boolean(app.shown));
  find("hint").textContent = hint;
  for (const [id, what] of [["act", primary], ["second", second]]) {
    find(id).hidden = !what;
    if (what) find(id).textContent = what.label;
    find(id).onclick = what ? what.act : null;
  }
  find("progress").hidden = !job;
  if (job?.state === "running") find("progress").value = drawing.share;
  else find("progress").removeAttribute("value");
  find("undo").disabled = !app.mask?.done.length;
  find("redo").disabled = !app.mask?.undone.length;
  find("clear").disabled = !app.mask || app.mask.empty;
  if (app.shown && app.overlaid !== app.shown.id) overlay();
  app.overlaid = app.shown?.id ?? null;
}

// ------------------------------------------------------------------------------------------------ the controls

function controls() {
  for (const button of find("tools").querySelectorAll("[data-tool]")) button.addEventListener("click", () => tools.choose(button.dataset.tool));
  find("undo").addEventListener("click", () => app.mask?.undo());
  find("redo").addEventListener("click", () => app.mask?.redo());
  find("clear").addEventListener("click", () => app.mask && clear());
  find("brush-size").addEventListener("input", () => resize());
  find("fit").addEventListener("click", () => viewer.fit());
  find("back").addEventListener("click", () => results.hide());
  for (const [id, name] of [["show-mask", "mask"], ["show-soft", "soft"]]) {
    find(id).addEventListener("change", () => {
      (app.shown ? app.look : app.show)[name] = find(id).checked;
      overlay();
    });
  }
  for (const id of ["n", "seed"]) find(id).addEventListener("input", changed);
  find("dice").addEventListener("click", dice);
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  find("open-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const path = find("path").value.trim();
    if (path) go("/api/open", { path });
    else find("path").focus();
  });
  const slice = () => go("/api/open", { path: app.document.path, plane: find("plane").value, slice: Number(find("slice").value) });
  find("slice").addEventListener("change", slice);
  find("plane").addEventListener("change", () => go("/api/open", { path: app.document.path, plane: find("plane").value }));
  find("volume").addEventListener("submit", (event) => event.preventDefault());
  find("help").addEventListener("click", () => find("keys").showModal());
  document.addEventListener("visibilitychange", () => !document.hidden && guard(results.refresh()));
}

function dice() {
  find("seed").value = anySeed();
  changed();
}

const toggle = (id) => find(id).click();

listen({
  hand,
  canvas: find("canvas"),
  keys: {
    "?": () => find("keys").showModal(),
    b: () => tools.choose("brush"), e: () => tools.choose("eraser"), g: () => tools.choose("polygon"), x: () => tools.choose("box"), v: () => tools.choose("move"),
    "[": () => resize(-SIZE_STEPS), "]": () => resize(SIZE_STEPS),
    l: () => !app.shown && placing.another(), w: () => !app.shown && sentence.pick(true), r: () => !app.shown && dice(), d: draw,
    Delete: () => !app.shown && app.mask && clear(), Backspace: () => !app.shown && app.mask && clear(),
    a: () => app.shown && app.shown.state !== "accepted" && guard(results.accept()),
    j: () => app.shown && find("reason").focus(),
    ...Object.fromEntries(MODES.map((mode, place) => [place + 1, () => results.comparison.setMode(mode)])),
    ArrowLeft: () => guard(results.move(-1)), ArrowRight: () => guard(results.move(1)),
    p: () => step(-1), n: () => step(1),
    m: () => toggle("show-mask"), s: () => toggle("show-soft"),
    f: () => viewer.fit(), "+": () => viewer.zoom(1.25), "=": () => viewer.zoom(1.25), "-": () => viewer.zoom(0.8),
    Escape: () => tools.drop() || (app.shown && results.hide()),
    Enter: () => (tools.points.length ? tools.close() : find("act").hidden || find("act").click()),
  },
  undo: () => !app.shown && app.mask?.undo(),
  redo: () => !app.shown && app.mask?.redo(),
  space: () => app.shown && results.comparison.flicker(),
});

async function start() {
  const form = kept("form", {}), tab = kept("document", null);
  find("n").value = form.n ?? 1;
  find("seed").value = form.seed ?? 1;
  find("feather").value = form.feather ?? "";
  placing.settings = form.placing ?? {};
  find("brush-size").value = kept("brush", 50);
  controls();
  tools.choose(kept("tool", "brush"));
  const state = await get(tab ? `/api/state?document=${encodeURIComponent(tab)}` : "/api/state");
  await open(state);
  await drawing.pickUp(state.job);
}

window.medsoft = { app, viewer, tools, results, drawing, sentence, placing }; // for whoever wants to look, and the tests
guard(start());
