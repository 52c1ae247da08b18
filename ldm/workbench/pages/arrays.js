// Small helpers for arrays that come from the server.

/** The smallest rectangle of pixels around what is not zero in a mask of that width, or null. */
export function box(pixels, width) {
  let [left, right, top, bottom] = [width, -1, -1, -1];
  for (let at = 0, y = 0; at < pixels.length; at += width, y++) {
    const row = pixels.subarray(at, at + width), first = row.findIndex((value) => value !== 0);
    if (first < 0) continue;
    if (top < 0) top = y;
    bottom = y;
    left = Math.min(left, first);
    right = Math.max(right, row.findLastIndex((value) => value !== 0));
  }
  return top < 0 ? null : { x: left, y: top, width: right - left + 1, height: bottom - top + 1 };
}

/** ``make(key)``, a promise, remembered for the last ``most`` keys; one that fails is forgotten. */
export function cached(most, make) {
  const known = new Map();
  return (key) => {
    const found = known.get(key) ?? make(key);
    known.delete(key);
    known.set(key, found);
    if (known.size > most) known.delete(known.keys().next().value);
    found.catch(() => known.delete(key));
    return found;
  };
}
