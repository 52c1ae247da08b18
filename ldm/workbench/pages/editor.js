// The page of `medsoft edit`: what belongs together of image, mask, sentence, drawing and results, and the next step.

import { Fault, bytes, get, keep, kept, post } from "./api.js";
import { box, cached } from "./arrays.js";
import { Drawing } from "./drawing.js";
import { Header } from "./header.js";
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
const DEAF = 500; // milliseconds that a button takes no press after it has become another one
const CAREFUL = "Careful:";
const MANY = 8; // variants that are drawn without asking

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
  begun: false, // a drawing was asked for and has not ended
  show: { mask: true, soft: true }, // overlays while painting
  look: { mask: false, soft: false }, // and while looking at a result
  viewer: new Viewer(find("canvas")),
  say,
  hush,
  put,
  compose,
  again,
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
const tools = new Tools(viewer, () => (app.shown || app.opening ? null : app.mask), showTool, render);
const header = new Header(guard, go);
const drawing = new Drawing(app, {
  onProgress: render,
  onResults: () => results.refresh(),
  async onEnd(job) {
    await results.refresh();
    const there = job.results.length;
    if (job.state === "failed") return say(job.error ?? "The drawing failed.", "fault");
    if (job.state === "cancelled") {
      if (app.shown) results.hide();
      const ready = there ? ` ${there === 1 ? "One variant was ready: it is" : `${there} variants were ready: they are`} among the results below.` : "";
      return say(`Cancelled. Your mask and sentence are as they were.${ready}`);
    }
    const busy = hand.busy || job.document !== app.document?.id || (app.drawn && app.drawn !== signature());
    if (busy) say("It is drawn: see the results below."); // somebody paints on: the mask is not taken from under the hand
    else await results.show(await results.find(job.results[0]));
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

/** Put an image on the stage, with its window, unless it is there; the header names it. */
function put(image, levels) {
  header.show(image, app.shown !== null);
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

/** The server's answer about an image: show it, with what this tab has kept of it. ``warning``: what is said then. */
async function open(state, warning = "") {
  const { document: image } = state, asked = (app.asked = Symbol("an image"));
  app.opening = true;
  render();
  try {
    const levels = image && (await levelsOf(image.id));
    if (asked !== app.asked) return; // another one was asked for meanwhile
    Object.assign(app, { state, document: image, levels, shown: null, onStage: null });
    results.together = null;
    results.take(state.history);
    find("empty").hidden = Boolean(image);
    describe(state);
    header.show(image);
    if (image) await begin(state);
    const { passed } = state;
    const over = passed.length ? `Passed over: ${passed.length > 1 ? `${passed.length} damaged images, the first ` : ""}${passed[0]}` : "";
    if (warning || over) say([warning, over].filter(Boolean).join(" "), warning && "warning");
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

function describe({ passed, model, output_dir: folder }) {
  find("model").textContent = model.name.split(/[\\/]/).slice(-2).join("/");
  find("model").title = `Model ${model.name}: ${model.image_size} pixels, ${model.steps} steps, on ${model.device}. Results: ${folder}`;
  if (model.error) say(model.error, "fault");
}

/** Ask for another image; what is painted on this one is kept, and what is drawn on it and not judged is named. */
function go(path, content) {
  return guard((async () => {
    say("");
    const from = [app.document?.id, app.shown?.document], state = await post(path, content);
    await open(state, from.includes(state.document?.id) ? "" : leaving(results.undecidedOn(from)));
  })());
}

function leaving(count) {
  if (!count) return "";
  const [told, which] = count === 1 ? ["One drawing that you leave is", "it stays"] : [`${count} drawings that you leave are`, "they stay"];
  return `${told} neither accepted nor rejected: ${which} among the results below.`;
}

/** Paint with all that a result was drawn with: its image, mask, sentence, seed and soft border. */
async function again(item, mask) {
  await documentOf(item); // a fault if it is gone
  if (item.document !== app.document?.id) await open(await get(`/api/state?document=${item.document}`));
  else results.hide();
  app.mask.replace(mask);
  app.mask.finish();
  Object.assign(find("n"), { value: item.variant + 1 });
  find("seed").value = item.seed;
  find("feather").value = item.feather_mm ?? "";
  sentence.take(item.prompt);
  app.drawn = signature();
  placing.soften();
  say(`With this ${item.name} was drawn${item.variant ? `, as variant ${item.variant + 1}` : ""}. Undo brings back the mask that you had painted here.`);
}

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
  if (app.shown && name !== "move") results.hide();
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

/** What is to be known of mask and sentence before they are drawn, or nothing. */
const doubts = () => [placing.against, sentence.against].filter(Boolean).join("; ");

function draw() {
  const { primary } = nextStep(), n = number("n");
  if (drawing.job || app.begun) return;
  if (app.shown) return results.hide(); // to what would be drawn
  if (!primary?.draws || primary.disabled) { // the hint says what is missing: it lights up
    find("hint").animate([{ background: "#7a5a12" }, { background: "transparent" }], 900);
    return;
  }
  if (n > MANY && !confirm(`Draw ${n} variants?`)) return;
  app.begun = true;
  guard(begun().finally(() => (app.begun = false)));
}

async function begun() {
  const before = doubts(), { document: image } = app;
  await placing.measured();
  if (doubts() !== before || image !== app.document || app.shown) return; // the press did not mean what is there now
  if (app.drawn === signature()) find("seed").value = anySeed(); // the same again would be the same picture
  changed();
  app.drawn = signature();
  keep(`drawn.${app.document.id}`, app.drawn);
  await drawing.begin({ ...request(), mask: app.mask.pixels });
}

const closeUp = () => viewer.closeUp(box(app.shown ? results.loaded.mask : (app.mask?.pixels ?? []), viewer.width));
const judgeable = (act) => () => app.shown && guard(act());

/** What the page offers as next step: a hint, a button (label and action), and sometimes a second one. */
function nextStep() {
  const { document: image, shown, mask } = app;
  const next = header.has(1) ? { label: "Next image", act: () => header.step(1) } : null;
  const back = { label: "Back to the mask", act: () => results.hide() };
  if (drawing.job) return { hint: drawing.told, primary: { label: "Drawing", disabled: true } };
  if (results.together) return { hint: "A click on a variant opens it.", primary: { label: "Close the variants", act: () => results.sideBySide() } };
  const accept = (label) => ({ label, act: judgeable(() => results.accept()), disabled: !results.ready });
  if (shown?.state === "new") return { hint: "Does it look right?", primary: accept("Accept"), second: next };
  if (shown) {
    const told = shown.state === "accepted" ? "Accepted, as a sample folder." : "Rejected.";
    const { undecided } = results, undo = { label: "Undo", act: judgeable(() => results.undo()) };
    const primary = undecided ? { label: "Next result", act: () => guard(results.show(undecided)) } : (next ?? back);
    return { hint: told, primary, second: shown.state === "rejected" ? accept("Accept after all") : undo };
  }
  if (app.opening) return { hint: "Opening the image" };
  if (!image) return { hint: "Open an image to draw on.", primary: { label: "To the path", act: () => find("path").focus() } };
  if (tools.points.length) {
    const close = { label: "Close the polygon", act: () => tools.close(), disabled: tools.points.length < 3 };
    return { hint: "Click its corners; a double click or Enter closes it, Esc drops it.", primary: close };
  }
  if (mask.empty) {
    const suggest = { label: "Suggest a place", act: () => placing.another() };
    const hint = image.has_body ? "Paint where the lesion is to be, or take a suggestion." : "Paint where the lesion is to be.";
    return { hint, primary: image.has_body ? suggest : null };
  }
  return drawStep();
}

/** The mask is there: whether the sentence can be drawn, and what is to be known before. */
function drawStep() {
  const n = number("n"), again = app.drawn === signature(), draws = true, told = doubts();
  const label = told ? "Draw all the same" : again ? "Draw with another seed" : n > 1 ? `Draw ${n} variants` : "Draw";
  if (sentence.fault) return { hint: sentence.fault, primary: { label: "Draw", draws, disabled: true } };
  if (sentence.awaited) return { hint: "The sentence is being read.", primary: { label, draws, disabled: true } };
  const hint = told ? `${CAREFUL} ${told}.` : again ? "Drawn already with this seed." : "The sentence is drawn inside the outline.";
  return { hint, primary: { label, draws, act: draw } };
}

function changed() {
  if (!app.document) return;
  keep("sentence", sentence.state);
  keep("form", { n: find("n").value, seed: find("seed").value, feather: find("feather").value, placing: placing.settings });
  render();
}

/** Show a button of the next step. One that has become another one is deaf for a moment: a press meant what was there. */
function offer(button, what) {
  const kind = what?.label.split(" ")[0] ?? "";
  if (button.dataset.kind !== kind) {
    button.dataset.kind = kind;
    button.since = performance.now();
    setTimeout(render, DEAF + 20);
  }
  button.hidden = !what;
  button.textContent = what?.label ?? "";
  button.onclick = what?.act ?? null;
  button.disabled = Boolean(what?.disabled) || performance.now() - button.since < DEAF;
}

function render() {
  const { hint, primary, second } = nextStep(), { job } = drawing, elsewhere = app.onStage && app.document && app.onStage.id !== app.document.id;
  find("compose").hidden = find("amount").hidden = Boolean(app.shown);
  find("judge").hidden = !app.shown;
  find("sheet").hidden = !results.together;
  find("back").textContent = elsewhere ? "Back to your image" : "Back to the mask";
  find("back").title = `${elsewhere ? `Back to ${app.document.name}, on which you paint` : "Back to the mask"} (Esc)`;
  find("canvas").classList.toggle("judging", Boolean(app.shown));
  find("hint").textContent = hint;
  find("hint").classList.toggle("warning", hint.startsWith(CAREFUL));
  offer(find("act"), primary);
  offer(find("second"), second);
  find("cancel").hidden = !job;
  find("progress").classList.toggle("resting", !job);
  if (job?.state === "running") find("progress").value = drawing.share;
  else find("progress").removeAttribute("value");
  const hidden = !app.mask || app.shown; // what is not seen is not changed
  find("undo").disabled = hidden || !app.mask.done.length;
  find("redo").disabled = hidden || !app.mask.undone.length;
  find("clear").disabled = hidden || app.mask.empty;
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
  find("close-up").addEventListener("click", closeUp);
  find("cancel").addEventListener("click", () => guard(drawing.cancel()));
  find("back").addEventListener("click", () => results.hide());
  for (const [id, name] of [["show-mask", "mask"], ["show-soft", "soft"]]) {
    find(id).addEventListener("change", () => {
      (app.shown ? app.look : app.show)[name] = find(id).checked;
      overlay();
    });
  }
  for (const id of ["n", "seed"]) {
    find(id).addEventListener("input", changed);
    find(id).addEventListener("focus", () => find(id).select());
  }
  find("dice").addEventListener("click", dice);
  find("help").addEventListener("click", () => find("keys").showModal());
  document.addEventListener("visibilitychange", () => !document.hidden && guard(results.refresh()));
}

function dice() {
  find("seed").value = anySeed();
  changed();
}

const toggle = (id) => find(id).click();

const painting = (act) => () => !app.shown && app.mask && act();
const tool = (name) => () => tools.choose(name);

listen({
  hand, viewer, comparison: results.comparison, reasons: results.reasons,
  own: {
    Enter: [() => (tools.points.length ? tools.close() : find("act").hidden || find("act").click()), "the orange button: the next step"],
    b: [tool("brush"), "brush (Alt: the opposite)"], e: [tool("eraser"), "eraser"],
    g: [tool("polygon"), "polygon"], x: [tool("box"), "box"], v: [tool("move"), "move the image"],
    "[": [() => resize(-SIZE_STEPS), "smaller brush"], "]": [() => resize(SIZE_STEPS), "larger brush"],
    l: [painting(() => placing.another()), "another suggestion"], Delete: [painting(clear), "empty mask"], Backspace: [painting(clear), null],
    w: [painting(() => sentence.pick({ another: true })), "another wording"], t: [painting(dice), "another seed"], d: [draw, "draw"],
    ArrowLeft: [() => guard(results.move(-1)), "result to the left"], ArrowRight: [() => guard(results.move(1)), "result to the right"],
    c: [() => app.shown && results.sideBySide(), "variants side by side"],
    Escape: [escape, "back to the mask"], o: [() => header.list(), "list of the images"], "Ctrl Z": [null, "undo; with Shift redo"],
  },
  shared: {
    accept: judgeable(() => app.shown.state !== "accepted" && results.accept()), reject: () => app.shown && results.reasons.press(),
    next: () => header.step(1), previous: () => header.step(-1), closeUp, outline: () => toggle("show-mask"), softMask: () => toggle("show-soft"),
  },
  undo: () => (app.shown ? guard(results.undo()) : app.mask?.undo()),
  redo: () => !app.shown && app.mask?.redo(),
  space: () => app.shown && results.comparison.flicker(),
});

function escape() {
  if (tools.drop() || !app.shown) return;
  if (results.reasons.armed) results.reasons.arm(false);
  else if (results.together) results.sideBySide();
  else results.hide();
}

async function start() {
  const form = kept("form", {}), tab = kept("document", null);
  find("seed").value = form.seed ?? 1;
  find("feather").value = form.feather ?? "";
  placing.settings = form.placing ?? {};
  find("brush-size").value = kept("brush", 50);
  controls();
  tools.choose(kept("tool", "brush"));
  const state = await get(tab ? `/api/state?document=${encodeURIComponent(tab)}` : "/api/state");
  find("n").value = kept("server", null) === state.model.started ? (form.n ?? 1) : 1; // as many again are asked for anew
  keep("server", state.model.started);
  await open(state);
  await sentence.picking?.catch(() => null); // with another one it would seem that somebody paints on
  await drawing.pickUp(state.job);
}

window.medsoft = { app, viewer, tools, results, drawing, sentence, placing }; // for whoever wants to look, and the tests
guard(start());
