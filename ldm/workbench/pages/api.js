// The server's routes. A fault that the server tells is thrown as a Fault, whose message is one line for the status line.

export class Fault extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // 0: the server did not answer
  }
}

async function answer(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("The server does not answer. Is its command still running in the terminal? What you painted is kept here.", 0);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Fault(told.error ?? `The server answered ${response.status} to ${path}.`, response.status);
}

export async function get(path) {
  return (await answer(path)).json();
}

/** Send JSON, get JSON. */
export async function post(path, content = {}) {
  const headers = { "X-MedSoft": "1", "Content-Type": "application/json" };
  return (await answer(path, { method: "POST", headers, body: JSON.stringify(content) })).json();
}

/** Raw bytes of ``path``: a Uint8Array, or a Uint16Array where a level has 16 bits. */
export async function bytes(path, bits = 8) {
  const buffer = await (await answer(path)).arrayBuffer();
  return bits === 16 ? new Uint16Array(buffer) : new Uint8Array(buffer);
}

/** Send JSON or raw bytes, get raw bytes and the facts that came with them. */
export async function postForBytes(path, content, signal) {
  const raw = content instanceof Uint8Array;
  const headers = { "X-MedSoft": "1", "Content-Type": raw ? "application/octet-stream" : "application/json" };
  const body = raw ? content : JSON.stringify(content);
  const response = await answer(path, { method: "POST", headers, body, signal });
  const facts = JSON.parse(response.headers.get("X-Facts") ?? "null");
  return { mask: new Uint8Array(await response.arrayBuffer()), facts };
}

/** A mask with one bit a pixel, eight in a byte, the first one in its highest bit: an eighth of what it is in bytes. */
export function bits(mask) {
  const made = new Uint8Array(Math.ceil(mask.length / 8));
  for (let i = 0; i < mask.length; i++) if (mask[i]) made[i >> 3] |= 128 >> (i & 7);
  return made;
}

/** Base64 of raw bytes. */
export function base64(array) {
  let text = "";
  for (let i = 0; i < array.length; i += 0x8000) text += String.fromCharCode(...array.subarray(i, i + 0x8000));
  return btoa(text);
}

// ------------------------------------------------------------------- what a tab keeps over a reload, and only that tab

const PREFIX = "medsoft.";

export function kept(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function keep(name, value) {
  const text = JSON.stringify(value);
  for (;;) {
    try {
      return sessionStorage.setItem(PREFIX + name, text);
    } catch { // full: the mask that was kept first makes room
      const oldest = Object.keys(sessionStorage).find((key) => key.startsWith(`${PREFIX}mask.`) && key !== PREFIX + name);
      if (oldest === undefined) return;
      sessionStorage.removeItem(oldest);
    }
  }
}
