// Elements with text in them.

export function term(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

/** Show a command in an element; a line of it ends only between two words. */
export function command(element, words) {
  element.replaceChildren(...words.map((word) => term("span", `${word} `)));
}
