// The page of `medsoft review`: one drawn image at a time beside its parent, and the verdict on it. What is judged is kept
// by the server before the next image is shown; this page keeps nothing.

import { Fault, bytes, get, post } from "./api.js";
import { box, cached } from "./arrays.js";
import { Comparison, through } from "./comparison.js";
import { listen } from "./keys.js";
import { navigate } from "./navigation.js";
import { Reasons } from "./reasons.js";
import { command, term } from "./text.js";
import { Viewer } from "./viewer.js";
import { Windowing } from "./windowing.js";

const find = (id) => document.getElementById(id);
const ORANGE = [242, 163, 60], CYAN = [65, 199, 217];
const WORDS = { accept: "accepted", reject: "rejected", flag: "flagged" };
const SIGNS = { accept: "good", reject: "fault", flag: "hint" };
const FILTERS = { todo: "to do", all: "all", accept: "accepted", reject: "rejected", flag: "flagged" };

const viewer = new Viewer(find("canvas"));
const app = {
  state: { items: [], reviewer: null }, // the server's answer: the images in this reviewer's order
  verdicts: new Map(), // [verdict, reason] by the item's id
  filter: "todo",
  item: null, // what is shown; null before the first one and at the end
  trail: [], // what was shown before it, for the way back
  loaded: null,
  round: 0, // after a change on the disk everything is loaded again
  close: false, // the lesion is shown large, from image to image
  busy: false, // while a verdict is on its way or an image is loaded: keys that come too early judge nothing
  windows: new Map(), // by hand, of 16-bit images of one unit
  watch: { seconds: 0, since: null }, // how long the image has been looked at
};

function say(text, kind = "") {
  find("status").textContent = text;
  find("status").className = kind;
}

/** Do one thing after the other; a fault goes to the status line, and what is shown stays. */
async function guard(work) {
  if (app.busy) return;
  app.busy = true;
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Fault)) throw error;
    say(error.message, "fault");
    if (error.status === 409 && app.item) {
      app.round++;
      await show(app.item, error.message).catch(() => {});
    }
  } finally {
    app.busy = false;
  }
}

// ------------------------------------------------------------------------------------------------ which image

const verdictOf = (item) => app.verdicts.get(item.id)?.[0] ?? null;

function fits(item, filter = app.filter) {
  return filter === "all" || (filter === "todo" ? verdictOf(item) === null : verdictOf(item) === filter);
}

/** The nearest image after (or before) the one that is shown that fits the filter, going round once; null without one. */
function neighbour(step, filter = app.filter) {
  const { items } = app.state, count = items.length;
  const place = app.item ? items.indexOf(app.item) : step > 0 ? -1 : count;
  for (let k = 1; k <= count; k++) {
    const at = place + step * k, item = items[((at % count) + count) % count];
    if (step < 0 && at < 0) return null; // back ends at the first one
    if (item !== app.item && fits(item, filter)) return item;
  }
  return null;
}

/** Show the next image, from which the way back leads to this one. */
async function go(item) {
  const from = app.item;
  await show(item);
  if (from) app.trail.push(from);
}

async function forward() {
  const item = neighbour(1);
  if (item) await go(item);
  else if (app.item && fits(app.item) && app.filter !== "todo") say(`There is no other image that is ${FILTERS[app.filter]}.`);
  else if (app.item && app.filter === "todo" && verdictOf(app.item) === null) say("This is the last image to judge.");
  else summarise();
}

async function back() {
  const item = app.trail.at(-1) ?? neighbour(-1, app.filter === "todo" ? "all" : app.filter);
  if (!item) return say("This is the first image.");
  await show(item);
  app.trail.pop();
}

// ------------------------------------------------------------------------------------------------- one image

const remembered = cached(6, async (key) => {
  const path = `/api/items/${key.split(" ")[0]}`, image = await get(path);
  const optional = (there, what, bits) => (there ? bytes(`${path}/${what}`, bits) : null);
  const [levels, parent, mask, soft] = await Promise.all([
    bytes(`${path}/levels`, image.bits),
    optional(image.has_parent, "parent", image.bits),
    optional(image.has_mask, "mask"),
    optional(image.has_soft, "soft"),
  ]);
  return { image, levels, parent, mask, soft };
});
const load = (id) => remembered(`${id} ${app.round}`);

async function show(item, told = "") {
  const loaded = await load(item.id);
  Object.assign(app, { item, loaded });
  find("summary").hidden = true;
  document.querySelector("main").classList.remove("ended");
  find("item").hidden = false;
  reasons.arm(false);
  const { image, levels, parent, mask } = loaded, area = mask && box(mask, image.width);
  viewer.setImage({ ...image, levels: parent ?? levels }, app.windows.get(kind(image)) ?? image.window);
  windowing.open({ ...image, window: image.window ?? [0, 2 ** image.bits - 1] }); // 8 bits are read as they are
  comparison.open(parent && levels, through(area, image.width));
  overlay();
  if (app.close) {
    viewer.fit();
    viewer.closeUp(lesion());
  }
  find("canvas").setAttribute("aria-label", `${item.sample_id}: ${item.prompt}`);
  find("prompt").textContent = `\u201c${item.prompt}\u201d`;
  const facts = { type: item.lesion_type, severity: item.severity, level: item.level, name: item.sample_id };
  find("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => [term("dt", name), term("dd", value)]));
  find("fault").hidden = !image.fault;
  find("fault").textContent = image.fault ?? "";
  app.watch = { seconds: 0, since: document.hidden ? null : performance.now() };
  tell();
  say(told, told ? "fault" : "");
  const next = neighbour(1);
  if (next) load(next.id).catch(() => {}); // ready when it is asked for
}

const kind = (image) => `${image.bits} ${image.unit ?? ""}`;

function overlay() {
  const { loaded } = app, shown = [];
  if (!loaded) return;
  if (find("show-soft").checked && loaded.soft) shown.push({ mask: loaded.soft, color: CYAN, alpha: 0.4 });
  if (find("show-mask").checked && loaded.mask) shown.push({ mask: loaded.mask, color: ORANGE, alpha: 0, outline: true });
  viewer.setOverlays(shown);
}

const lesion = () => app.loaded?.mask && box(app.loaded.mask, app.loaded.image.width);

/** The lesion large in the middle, or the whole image; the next images are shown so too. */
function closeUp() {
  viewer.closeUp(lesion());
  app.close = !viewer.fitted;
}

const windowing = new Windowing(viewer, (window) => app.loaded && app.windows.set(kind(app.loaded.image), window));
const comparison = new Comparison(viewer);
const hand = navigate(viewer, {
  onWindow: (low, high) => windowing.set(low, high),
  onSlider: (position) => comparison.slide(position),
});

// ------------------------------------------------------------------------------------------------- the verdict

const reasons = new Reasons(
  (reason) => guard(() => judge("reject", reason)),
  (armed) => find("reject").setAttribute("aria-expanded", String(armed)),
);

function seconds() {
  const { seconds: before, since } = app.watch;
  return before + (since === null ? 0 : (performance.now() - since) / 1000);
}

async function judge(verdict, reason = "") {
  const { item, loaded, state } = app;
  if (!item) return;
  const content = { reviewer: state.reviewer, sha256: loaded.image.sha256, verdict, reason, seconds: seconds() };
  take(await post(`/api/items/${item.id}/verdict`, content));
  const next = neighbour(1);
  if (next) await go(next);
  else summarise();
  say(`${item.sample_id} ${WORDS[verdict]}${reason ? `: ${reason}` : ""}. Left arrow: back to it.`, verdict === "accept" ? "good" : "");
}

function take({ verdicts }) {
  app.verdicts = new Map(Object.entries(verdicts));
  tell();
}

function counted() {
  const counts = { todo: 0, all: app.state.items.length, accept: 0, reject: 0, flag: 0 };
  for (const item of app.state.items) counts[verdictOf(item) ?? "todo"]++;
  return counts;
}

/** Progress, filter and the verdict of the image that is shown. */
function tell() {
  const counts = counted(), done = counts.all - counts.todo;
  Object.assign(find("bar"), { max: Math.max(counts.all, 1), value: done });
  find("progress").textContent = `${done} of ${counts.all}`;
  for (const option of find("filter").options) option.textContent = `${FILTERS[option.value]} (${counts[option.value]})`;
  const said = app.item && app.verdicts.get(app.item.id);
  find("verdict").className = said ? SIGNS[said[0]] : "hint";
  find("verdict").textContent = said ? `You have ${WORDS[said[0]]} it${said[1] ? `: ${said[1]}` : ""}.` : "Not judged yet.";
  for (const name of Object.keys(WORDS)) find(name).setAttribute("aria-pressed", String(said?.[0] === name));
  reasons.mark(said?.[0] === "reject" ? said[1] : null);
}

// --------------------------------------------------------------------------------------------------- the end

function row(cells, name = "td") {
  const made = document.createElement("tr");
  made.append(...cells.map((text) => term(name, text)));
  return made;
}

/** Nothing is left that fits the filter: what was said, by lesion type and reason. */
function summarise() {
  const counts = counted(), { items, file, reviewer, results } = app.state;
  if (app.item) app.trail.push(app.item);
  Object.assign(app, { item: null, loaded: null });
  document.querySelector("main").classList.add("ended");
  find("item").hidden = true;
  find("summary").hidden = false;
  find("summary-title").textContent = counts.todo ? `Nothing is ${FILTERS[app.filter]}` : "All images are judged";
  find("summary-text").textContent = `${counts.accept} accepted, ${counts.reject} rejected, ${counts.flag} flagged${counts.todo ? `, ${counts.todo} to do` : ""}. Kept in ${file}.`;
  const kinds = [...new Set(items.map((item) => item.lesion_type ?? "unknown"))].sort();
  const count = (kind, verdict) => items.filter((item) => (item.lesion_type ?? "unknown") === kind && verdictOf(item) === verdict).length;
  const rows = kinds.map((name) => row([name, ...Object.keys(WORDS).map((verdict) => count(name, verdict))]));
  find("counts").replaceChildren(row(["type", ...Object.values(WORDS)], "th"), ...rows);
  const reasons = new Map();
  for (const [verdict, reason] of app.verdicts.values()) if (verdict === "reject") reasons.set(reason, (reasons.get(reason) ?? 0) + 1);
  const sorted = [...reasons].sort((a, b) => b[1] - a[1]);
  find("why").replaceChildren(...(sorted.length ? [row(["rejected because", "images"], "th"), ...sorted.map((each) => row(each))] : []));
  command(find("use"), ["medsoft", "classify", "args1.json", "--review", file]);
  command(find("agree"), ["medsoft", "review", results, "--review", file, "--agreement"]);
  viewer.setOverlays([]);
  tell();
  say(`${reviewer}: ${counts.all - counts.todo} of ${counts.all} images are judged.`, counts.todo ? "" : "good");
}

// ------------------------------------------------------------------------------------------------- the beginning

async function begin(code) {
  const state = await get(`/api/review?reviewer=${encodeURIComponent(code)}`);
  if (state.reviewer === null) return ask();
  Object.assign(app, { state, item: null, trail: [] });
  take(state);
  find("asking").close();
  find("about").textContent = state.name;
  find("who").textContent = state.reviewer;
  history.replaceState(null, "", `?reviewer=${encodeURIComponent(state.reviewer)}`); // a reload knows who it is
  await forward();
}

function ask(fault = "") {
  find("code-fault").textContent = fault;
  if (!find("asking").open) find("asking").showModal();
}

find("code-form").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(find("code").value).catch((error) => ask(error.message));
});
find("who").addEventListener("click", () => ask());

const filters = Object.keys(FILTERS).map((value) => new Option(FILTERS[value], value));
find("filter").replaceChildren(...filters);
find("filter").addEventListener("change", () => {
  app.filter = find("filter").value;
  find("filter").blur();
  guard(async () => {
    if (!app.item || !fits(app.item)) await forward();
    else tell();
  });
});
const toggle = (id) => {
  find(id).checked = !find(id).checked;
  overlay();
};
const actions = {
  accept: () => guard(() => judge("accept")),
  flag: () => guard(() => judge("flag")),
  reject: () => app.item && reasons.press(),
  previous: () => guard(back),
  next: () => guard(forward),
  help: () => find("keys").showModal(),
  "close-up": closeUp,
};
for (const [id, act] of Object.entries(actions)) find(id).addEventListener("click", act);
for (const id of ["show-mask", "show-soft"]) find(id).addEventListener("change", overlay);
listen({
  hand, viewer, comparison, reasons,
  own: {
    f: [actions.flag, "flag: not sure, somebody should look again"],
    ArrowLeft: [actions.previous, "as P, also to judge it anew"], ArrowRight: [actions.next, "as N, without a verdict"],
    Escape: [() => reasons.arm(false), "do not reject"],
  },
  shared: { ...actions, closeUp, outline: () => toggle("show-mask"), softMask: () => toggle("show-soft") },
  undo: actions.previous, redo: actions.next, space: () => comparison.flicker(),
});
document.addEventListener("visibilitychange", () => {
  app.watch = { seconds: seconds(), since: document.hidden ? null : performance.now() };
  if (!document.hidden && app.state.reviewer && !app.busy) { // another tab may have judged meanwhile
    get(`/api/verdicts?reviewer=${encodeURIComponent(app.state.reviewer)}`).then(take).catch((error) => say(error.message, "fault"));
  }
});
guard(() => begin(new URLSearchParams(location.search).get("reviewer") ?? ""));
window.review = Object.assign(app, { viewer }); // for whoever looks into the page
