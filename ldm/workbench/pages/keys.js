// The keyboard: single keys act unless something is being typed; a control that has the focus keeps the keys it needs.
// The same table binds the keys that both pages have and is their help.

import { MODES } from "./comparison.js";
import { term } from "./text.js";

const TYPED = "textarea, select, input:not([type=range]):not([type=checkbox])";
const PRESSED = "button, input[type=checkbox], summary, a";

/** What both pages do, by key: the name of the page's function, and what the help says of it. */
const SHARED = {
  a: ["accept", "accept"],
  r: ["reject", "reject: then a number, or R and words"],
  n: ["next", "next image"],
  p: ["previous", "previous image"],
  z: ["closeUp", "lesion large, whole image"],
  m: ["outline", "outline on and off"],
  s: ["softMask", "soft mask on and off"],
  "+": ["closer", "zoom in (or the wheel)"],
  "-": ["farther", "zoom out"],
  "?": ["help", "this list"],
};
const REST = [
  ["Shift arrow", "move the image"],
  ["1 to 4", "slider, before, after, difference"],
  ["Space", "flicker between before and after"],
  ["right button", "drag: window width, centre"],
  ["middle button", "drag: move the image"],
];
// Where an arrow moves the image, in CSS pixels: away from what is to be seen then.
const STEPS = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
const NAMES = { ArrowLeft: "\u2190", ArrowRight: "\u2192", Escape: "Esc", Delete: "Del" };

/** Fill the dialog #keys, and have each dialog that can be left closed by a click beside it. */
function explain(own) {
  const rows = [...Object.entries(own), ...Object.entries(SHARED)].map(([key, [, told]]) => [NAMES[key] ?? (key.length === 1 ? key.toUpperCase() : key), told]);
  const terms = [...rows, ...REST].filter(([, told]) => told).map(([key, told]) => {
    const row = document.createElement("div"), name = document.createElement("dt");
    name.append(term("kbd", key));
    row.append(name, term("dd", told));
    return row;
  });
  document.querySelector("#keys dl").replaceChildren(...terms);
  for (const dialog of document.querySelectorAll("dialog.light")) {
    dialog.addEventListener("pointerdown", (event) => {
      const { left, right, top, bottom } = dialog.getBoundingClientRect();
      if (event.clientX < left || event.clientX > right || event.clientY < top || event.clientY > bottom) dialog.close();
    });
  }
}

/**
 * ``own``: [function, help or null] by key, of this page alone; ``shared``: the functions that SHARED names. ``comparison``
 * and ``reasons`` take the digits, ``viewer`` is zoomed; ``undo``, ``redo``; ``hand``, of navigation.js, pans while the
 * space bar is held, and ``space()`` is a short press of it.
 */
export function listen({ own, shared, comparison, reasons, viewer, undo, redo, space, hand }) {
  const { canvas } = viewer;
  const actions = { ...shared, closer: () => viewer.zoom(1.25), farther: () => viewer.zoom(0.8), help: () => document.getElementById("keys").showModal() };
  const keys = {
    "=": actions.closer,
    ...Object.fromEntries(Object.entries(SHARED).map(([key, [name]]) => [key, actions[name]])),
    ...Object.fromEntries(Object.entries(own).map(([key, [act]]) => [key, act])),
  };
  for (let digit = 1; digit <= 9; digit++) {
    keys[digit] = () => (reasons.armed ? reasons.choose(digit) : MODES[digit - 1] && comparison.setMode(MODES[digit - 1]));
  }
  explain(own);
  let held = false, moved = false, clicked = false;

  addEventListener("keydown", (event) => {
    const { target, key } = event, at = (selector) => target.matches?.(selector);
    if (document.querySelector("dialog[open]")) return;
    if (at(TYPED)) {
      if (key === "Escape") target.blur();
      return;
    }
    if (event.ctrlKey || event.metaKey) {
      if (key.toLowerCase() === "z") (event.shiftKey ? redo : undo)();
      else if (key.toLowerCase() === "y") redo();
      else return;
      return event.preventDefault();
    }
    if (event.altKey || hand.busy) return;
    if ((key === "Enter" || key === " ") && at(PRESSED)) return;
    if (key.startsWith("Arrow") && at("input[type=range]")) return;
    if (key === " ") {
      if (!held) [held, moved] = [true, false];
      hand.hold(true);
      return event.preventDefault();
    }
    if (event.shiftKey && STEPS[key]) {
      viewer.pan(...STEPS[key]);
      return event.preventDefault();
    }
    const act = keys[key.length === 1 ? key.toLowerCase() : key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  addEventListener("pointerdown", () => (moved = clicked = true));
  addEventListener("keydown", () => (clicked = false), true);
  addEventListener("change", ({ target }) => { // a menu in which something was clicked does not keep the keys either
    if (clicked && target.matches?.("main select")) canvas.focus({ preventScroll: true });
  });
  addEventListener("click", (event) => { // a button that was clicked does not keep the keys from the image
    const button = event.target.closest?.("button");
    if (event.detail > 0 && button && document.activeElement === button) canvas.focus({ preventScroll: true });
  });
  addEventListener("keyup", (event) => {
    if (event.key !== " " || !held) return;
    held = false;
    hand.hold(false);
    if (!moved) space();
  });
  addEventListener("blur", () => {
    held = false;
    hand.hold(false);
  });
}
