// The keyboard: single keys act unless something is being typed; a control that has the focus keeps the keys it needs.

const TYPED = "textarea, select, input:not([type=range]):not([type=checkbox])";
const PRESSED = "button, input[type=checkbox], summary, a";

/** ``keys``: functions by key; ``space()``: a short press of the space bar; ``hand``: of navigation.js, pans while it is held. */
export function listen({ keys, undo, redo, space, hand, canvas }) {
  let held = false, moved = false;

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
    const act = keys[key.length === 1 ? key.toLowerCase() : key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  addEventListener("pointerdown", () => (moved = true));
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
