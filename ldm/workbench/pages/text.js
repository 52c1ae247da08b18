// Elements with text in them.

export function term(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

/** Show a command in an element, as a shell takes it; a line of it ends only between two words. */
export function command(element, words) {
  element.replaceChildren(...words.map((word) => term("span", `${quoted(word)} `)));
}

const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\"'\"'")}'`);
