// Why drawings are rejected, on both pages: a short list, so that reasons can be counted, and one's own words.

import { term } from "./text.js";

const find = (id) => document.getElementById(id);

export const REASONS = ["nothing to see", "another type", "another severity", "seam", "anatomy broken", "artefact", "wrong place"];

export class Reasons {
  /** ``onReason(reason)``: one of #reasons was chosen, or written into #reject-form. ``onArm(armed)``: see ``arm``. */
  constructor(onReason, onArm = () => {}) {
    Object.assign(this, { onReason, onArm, armed: false });
    find("reasons").replaceChildren(...REASONS.map((reason, place) => {
      const made = document.createElement("li"), button = document.createElement("button");
      button.dataset.reason = reason;
      button.append(term("kbd", place + 1), reason);
      button.addEventListener("click", () => onReason(reason));
      made.append(button);
      return made;
    }));
    find("reject-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const reason = find("reason").value.trim();
      if (reason) onReason(reason);
      else find("reason").focus();
    });
  }

  /** While it is ``on``, a digit chooses a reason. */
  arm(on) {
    this.armed = on;
    find("rejecting").classList.toggle("armed", on);
    if (on) find("rejecting").scrollIntoView({ block: "nearest" });
    else {
      find("reason").value = "";
      find("reason").blur();
    }
    this.onArm(on);
  }

  /** The key of rejecting: the first press arms, the second one goes to one's own words. */
  press() {
    if (this.armed) find("reason").focus();
    else this.arm(true);
  }

  choose(place) {
    if (REASONS[place - 1]) this.onReason(REASONS[place - 1]);
  }

  /** Show which one was given. */
  mark(reason) {
    for (const button of find("reasons").querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.reason === reason));
  }
}
