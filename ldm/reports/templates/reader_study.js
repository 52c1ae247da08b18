"use strict";
// A reader's way through a study: who they are, one item after the other, a file of answers. Nothing leaves this computer.
const study = JSON.parse(document.getElementById("study").textContent);
const part = name => document.getElementById(name);
const pairs = study.design === "pairs";
const STEPS = ["certainly real", "probably real", "rather real", "rather drawn", "probably drawn", "certainly drawn"];
const CHOICES = pairs ? { left: "left is drawn", right: "right is drawn" }
  : Object.fromEntries(STEPS.map((words, place) => [place + 1, words]));
const KEEP = `reader-study ${study.study}`;  // the database of this study's answers in the browser
const CURRENT = "current reader";  // a key in it, beside the readers' codes, which have no space
const NOTHING = "This browser keeps nothing: do not close or reload this page before you have saved your answers.";
const MUTE = "This browser's storage does not answer: what you answered here before cannot be seen, and nothing is kept. Close all windows of "
  + "this browser and open this page again. Or go on, and do not close or reload this page before you have saved your answers.";
const MOMENT = 5000;  // milliseconds that an answer of the storage is waited for
const AHEAD = "This study was read further in another tab or window. This page goes on from there; please close the other one.";
// Where an arrow moves the picture, in shares of what is seen: away from what is to be seen then.
const MOVES = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
const FIRST = { zoom: 1, x: 0, y: 0, level: 0.5, width: 1 };  // the view of a new item; level and width: shares of the range

let state = null;  // what is kept and saved: see begin()
let turn = Promise.resolve();  // see inTurn()
let typed = null;  // a comment that has been typed in this page and is not kept yet
let isMute = false;  // the database has been given up on, and has not answered since
let view = { ...FIRST };
let chosen = null;
let shown = [];  // the pictures of the item on the screen
let since = null;  // when the clock of this item was started; null while it stands

// ---------------------------------------------------------------------------------------------- order, by the reader's code

function randomOf(text) {
  let hash = 2166136261;
  for (const letter of text) hash = Math.imul(hash ^ letter.codePointAt(0), 16777619);
  return () => {  // a number from 0 to below 1
    hash = hash + 0x6d2b79f5 | 0;
    let mixed = Math.imul(hash ^ hash >>> 15, 1 | hash);
    mixed = mixed + Math.imul(mixed ^ mixed >>> 7, 61 | mixed) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) / 4294967296;
  };
}

function shuffled(list, random) {
  const mixed = [...list];
  for (let last = mixed.length - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1));
    [mixed[last], mixed[other]] = [mixed[other], mixed[last]];
  }
  return mixed;
}

// Items that come twice stand in the first half, and come again in the last third: far apart, in places nobody can guess.
function orderFor(code) {
  const random = randomOf(`${study.study} ${code}`);
  const names = Object.keys(study.items), total = names.length;
  const special = new Set([...study.early, ...study.late]);
  const rest = shuffled(names.filter(name => !special.has(name)), random);
  const places = Array.from({ length: total }, (_, place) => place);
  const late = places.slice(total - Math.max(Math.floor(total / 3), study.late.length));
  const early = places.slice(0, Math.max(Math.floor(total / 2), study.early.length)).filter(place => !late.includes(place));
  const order = new Array(total).fill(null);
  for (const [list, where] of [[study.early, early], [study.late, late]]) {
    const free = shuffled(where, random);
    shuffled(list, random).forEach((name, number) => { order[free[number]] = name; });
  }
  return order.map(name => name || rest.pop());
}

// ------------------------------------------------------------------------------------------------------------ keeping answers

// One transaction on the database: the promise is kept, with what the request of `work` found, once all is on the disk.
// A database may also say nothing, neither yes nor no. It is waited for once; as long as it is mute nothing more is asked of it.
function stored(work) {
  return new Promise((resolve, reject) => {
    if (isMute) throw new Error(MUTE);
    const opening = indexedDB.open(KEEP, 1);
    let transaction = null;
    const waiting = setTimeout(() => {
      isMute = true;
      reject(new Error(MUTE));
      try {
        transaction?.abort();  // or it would write later what is known now
      } catch {}  // it is being written
    }, MOMENT);
    const answered = (settle, found) => {
      clearTimeout(waiting);
      isMute = false;
      settle(found);
    };
    opening.onupgradeneeded = () => opening.result.createObjectStore("readers");
    opening.onerror = () => answered(reject, opening.error);
    opening.onsuccess = () => {
      if (isMute) answered(reject, new Error(MUTE));  // too late for this one
      else {
        transaction = opening.result.transaction("readers", "readwrite", { durability: "strict" });
        const request = work(transaction.objectStore("readers"));
        transaction.oncomplete = () => answered(resolve, request.result);
        transaction.onabort = () => answered(reject, transaction.error);
      }
      opening.result.close();  // after this transaction; a page holds no connection that others would have to wait for
    };
  });
}

// What this page knows besides: the answers of a browser that keeps nothing, and at first what earlier versions of this page
// have kept in another place. There it stays, untouched.
const known = (() => {
  try {
    return JSON.parse(localStorage.getItem(KEEP)) || { current: null, readers: {} };
  } catch {
    return { current: null, readers: {} };
  }
})();

const unkept = error => say(error?.message === MUTE ? MUTE : NOTHING);
const isAhead = (one, other) => one && (!other || one.answers.length > other.answers.length);

async function recordOf(code) {
  const here = known.readers[code], there = await stored(store => store.get(code)).catch(unkept);
  return isAhead(here, there) ? here : there;
}

// Keeps this reader's record with these changes. No record is replaced that has more answers, such as another tab's: this
// page goes on from that one instead, without the changes, and the promise is true. The comment is the one typed last.
async function keep(changes = {}) {
  const { code } = state.reader, said = typed;
  try {
    const there = await stored(store => {
      const found = store.get(code);
      found.onsuccess = () => {
        const newest = isAhead(found.result, state) ? found.result : { ...state, ...changes };
        store.put({ ...newest, comment: said ?? (found.result ?? state).comment }, code);
      };
      return found;
    });
    const ahead = isAhead(there, state), comment = typed ?? (there ?? state).comment;  // more may have been typed meanwhile
    if (typed === said) typed = null;
    if (ahead) {
      state = known.readers[code] = { ...there, comment };
      say(AHEAD);
      return true;
    }
    state.comment = comment;
    if (changes.answers || [NOTHING, MUTE].includes(part("note").textContent)) say("");
  } catch (error) {
    unkept(error);
  }
  known.readers[code] = Object.assign(state, changes);  // the clock may have changed it meanwhile
  return false;
}

// What changes the record happens in turn: each action begins once the one before has been kept.
function inTurn(action) {
  turn = turn.then(action, action);
}

function begin(about) {
  return { format: 1, study: study.study, design: study.design, reader: about, started: new Date().toISOString(),
    finished: null, comment: "", order: orderFor(about.code), answers: [], spent: 0 };
}

function saved() {
  const { order, spent, ...rest } = state;
  return JSON.stringify({ ...rest, items: order.length, complete: state.answers.length === order.length }, null, 1) + "\n";
}

// ------------------------------------------------------------------------------------------------------------------- pictures

const waiting = {};  // name of a picture -> what to do with its PNG
function received(name, text) { waiting[name](text); }

const opened = new Map();
function picture(name) {
  if (!opened.has(name)) {
    opened.set(name, new Promise((resolve, reject) => {
      waiting[name] = text => resolve(decoded(text));
      const script = document.createElement("script");
      script.src = `pictures/${name}.js`;  // a damaged one is loaded without having called received()
      script.onload = script.onerror = () => reject(new Error(`pictures/${name}.js cannot be read: copy the whole folder again`));
      document.head.append(script);
    }));
  }
  return opened.get(name);
}

// The levels of a grey PNG of 8 or 16 bits whose rows have the filter "sub". A browser's own decoder would cut 16 bits to 8.
async function decoded(text) {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0)), numbers = new DataView(bytes.buffer);
  const side = numbers.getUint32(16), step = bytes[24] / 8, packed = [];
  for (let place = 8; place < bytes.length;) {
    const length = numbers.getUint32(place);
    if (numbers.getUint32(place + 4) === 0x49444154) packed.push(bytes.subarray(place + 8, place + 8 + length));  // IDAT
    place += length + 12;
  }
  const stream = new Blob(packed).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const levels = new Uint16Array(side * side), row = side * step + 1;
  for (let y = 0; y < side; y++) {
    const line = raw.subarray(y * row + 1, (y + 1) * row);
    for (let x = step; x < line.length; x++) line[x] += line[x - step];
    for (let x = 0; x < side; x++) levels[y * side + x] = step === 2 ? line[2 * x] << 8 | line[2 * x + 1] : line[x];
  }
  return levels;
}

function toned(levels, target) {
  const top = study.levels - 1, low = (view.level - view.width / 2) * top, scale = 255 / (view.width * top);
  const table = Uint8ClampedArray.from({ length: study.levels }, (_, level) => (level - low) * scale);
  const pixels = new ImageData(study.side, study.side);
  for (let k = 0; k < levels.length; k++) {
    pixels.data[4 * k] = pixels.data[4 * k + 1] = pixels.data[4 * k + 2] = table[levels[k]];
    pixels.data[4 * k + 3] = 255;
  }
  target.getContext("2d").putImageData(pixels, 0, 0);
}

function paint() {
  for (const each of shown) {
    const { canvas, native, levels } = each, box = canvas.getBoundingClientRect(), dense = window.devicePixelRatio || 1;
    canvas.width = Math.round(box.width * dense);
    canvas.height = Math.round(box.height * dense);
    if (each.tone !== `${view.level} ${view.width}`) {
      toned(levels, native);
      each.tone = `${view.level} ${view.width}`;
    }
    const pen = canvas.getContext("2d"), size = Math.min(canvas.width, canvas.height) * view.zoom;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(native, (canvas.width - size) / 2 + view.x * size, (canvas.height - size) / 2 + view.y * size, size, size);
  }
  part("level").value = view.level;
  part("width").value = 1 - view.width;
}

function look(change) {
  view = { ...view, ...change };
  view.zoom = Math.min(Math.max(view.zoom, 1), 12);
  const free = (1 - 1 / view.zoom) / 2;
  for (const axis of ["x", "y"]) view[axis] = Math.min(Math.max(view[axis], -free), free);
  view.level = Math.min(Math.max(view.level, 0), 1);
  view.width = Math.min(Math.max(view.width, 0.01), 1);
  requestAnimationFrame(paint);
}

function follow(canvas) {
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    look({ zoom: view.zoom * Math.exp(-event.deltaY / 500) });
  }, { passive: false });
  canvas.addEventListener("contextmenu", event => event.preventDefault());
  canvas.addEventListener("pointerdown", event => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", event => {
    if (!event.buttons) return;
    const box = canvas.getBoundingClientRect(), size = Math.min(box.width, box.height);
    if (event.buttons === 2 || event.shiftKey) {
      look({ level: view.level - event.movementY / size, width: view.width * Math.exp(-2 * event.movementX / size) });
    } else {
      look({ x: view.x + event.movementX / size / view.zoom, y: view.y + event.movementY / size / view.zoom });
    }
  });
}

// -------------------------------------------------------------------------------------------------------------------- reading

function show(section) {
  for (const name of ["welcome", "reading", "end"]) part(name).hidden = name !== section;
  if (section === "welcome") part("code").focus({ preventScroll: true });
}

function say(text) {
  part("note").textContent = text;
  requestAnimationFrame(paint);  // the line takes room from the pictures
}

// Only time during which the page can be seen counts.
function clock(running) {
  if (since !== null) state.spent += (performance.now() - since) / 1000;
  since = running ? performance.now() : null;
}

// From here on the item on the screen takes no answer.
function leave() {
  clock(false);
  shown = [];
}

async function next() {
  const place = state.answers.length;
  if (place === state.order.length) return finish();
  show("reading");
  since = null;  // where another tab has answered this item its time does not count
  shown = [];
  choose(null);
  part("who").textContent = state.reader.code;
  part("count").textContent = `${place + 1} of ${state.order.length}`;
  part("done").value = place / state.order.length;
  const stage = part("stage"), names = study.items[state.order[place]];
  stage.replaceChildren();
  try {
    const all = await Promise.all(names.map(picture));
    shown = all.map((levels, side) => {
      const canvas = document.createElement("canvas"), native = document.createElement("canvas");
      native.width = native.height = study.side;
      canvas.role = "img";
      canvas.ariaLabel = pairs ? `${["left", "right"][side]} picture` : "picture";
      follow(canvas);
      stage.append(canvas);
      return { canvas, native, levels, tone: "" };
    });
  } catch (error) {
    stage.textContent = `This picture cannot be shown (${error.message}). Please tell whoever gave you this study.`;
    return;
  }
  names.forEach(name => opened.delete(name));
  look(FIRST);
  if (place + 1 < state.order.length) study.items[state.order[place + 1]].forEach(name => picture(name).catch(() => {}));
  clock(!document.hidden);
}

function choose(answer) {
  if (answer !== null && !shown.length) return;
  chosen = answer;
  for (const button of part("choices").children) button.setAttribute("aria-pressed", String(button.value === String(answer)));
  shown.forEach(({ canvas }, place) => canvas.classList.toggle("chosen", pairs && answer === ["left", "right"][place]));
  part("next").disabled = answer === null;
}

function answer() {
  if (chosen === null || !shown.length) return;
  const place = state.answers.length, given = chosen;
  leave();
  inTurn(async () => {
    if (state.answers.length > place) return;  // by another tab, meanwhile
    const row = { item: state.order[place], answer: given, seconds: Math.round(state.spent * 1000) / 1000 };
    const finished = place + 1 === state.order.length ? new Date().toISOString() : null;
    await keep({ answers: [...state.answers, row], spent: 0, finished });
    await next();
  });
}

function pause() {
  leave();
  inTurn(finish);
}

async function finish() {
  leave();
  await keep();
  show("end");
  const left = state.order.length - state.answers.length;
  part("thanks").textContent = left ? "Paused." : "Thank you.";
  part("state").textContent = left ? `${state.answers.length} of ${state.order.length} are answered. Go on whenever you like, in this browser.`
    : "All are answered.";
  part("back").hidden = !left;
  part("when").textContent = left ? "Once all are answered, save them and send" : "Please save your answers and send";
  part("file").textContent = `answers_${state.reader.code}_${study.study}.json`;
  part("comment").value = state.comment;
  part("answers").value = saved();
}

async function download() {
  await finish();  // another tab may have gone further
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([saved()], { type: "application/json" }));
  link.download = part("file").textContent;
  link.click();
}

// ---------------------------------------------------------------------------------------------------------------------- start

for (const [value, words] of Object.entries(CHOICES)) {
  const button = document.createElement("button"), key = document.createElement("kbd");
  Object.assign(button, { type: "button", value });
  key.textContent = { left: "←", right: "→" }[value] || value;
  button.append(key, words);
  button.onclick = () => choose(pairs ? value : Number(value));
  part("choices").append(button);
}
part("next").onclick = answer;
part("reset").onclick = () => look(FIRST);
part("pause").onclick = pause;
part("back").onclick = () => inTurn(next);
part("save").onclick = () => inTurn(download);
part("other").onclick = () => inTurn(async () => {
  await stored(store => store.put(null, CURRENT)).catch(unkept);
  state = typed = null;
  part("about").reset();
  show("welcome");
});
part("level").oninput = event => look({ level: Number(event.target.value) });
part("width").oninput = event => look({ width: 1 - Number(event.target.value) });
part("comment").oninput = event => {
  state.comment = typed = event.target.value;
  part("answers").value = saved();
  inTurn(async () => {
    if (await keep()) await finish();
  });
};
part("about").onsubmit = event => {
  event.preventDefault();
  inTurn(async () => {
    const code = part("code").value.trim().toUpperCase();
    state = await recordOf(code)
      || begin({ code, years: Number(part("years").value), speciality: part("speciality").value, seen: part("seen").value });
    await keep();
    await stored(store => store.put(code, CURRENT)).catch(unkept);
    await next();
  });
};
document.addEventListener("keydown", event => {
  if (part("reading").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key, arrow = { ArrowLeft: "left", ArrowRight: "right" }[key], at = control => event.target.matches?.(control);
  if ((key === "Enter" && at("header button")) || (key.startsWith("Arrow") && at("input"))) return;  // it needs the key itself
  if (MOVES[key] && (event.shiftKey || !pairs)) {  // in pairs the arrows alone choose
    const [right, down] = MOVES[key];
    look({ x: view.x + right / view.zoom, y: view.y + down / view.zoom });
  } else if (event.repeat) return;
  else if (key === "Enter") answer();
  else if (pairs && arrow) choose(arrow);
  else if (!pairs && key >= "1" && key <= "6" && key.length === 1) choose(Number(key));
  else if (key === "+" || key === "=") look({ zoom: view.zoom * 1.25 });
  else if (key === "-") look({ zoom: view.zoom / 1.25 });
  else if (key === "0") look(FIRST);
  else return;
  event.preventDefault();
});
document.addEventListener("click", event => {  // what was clicked does not keep the keys
  if (event.detail > 0 && part("reading").contains(event.target)) document.activeElement.blur();
});
document.addEventListener("visibilitychange", () => {
  if (state && !part("reading").hidden && shown.length) clock(!document.hidden);
});
// Time is kept while the page is read, not when it is left: no browser lets a page that goes wait for a transaction.
setInterval(() => {
  if (since === null) return;
  clock(true);
  inTurn(async () => {
    if (await keep()) await next();
  });
}, 5000);
window.addEventListener("resize", () => requestAnimationFrame(paint));

if (typeof DecompressionStream === "undefined") {
  show("welcome");
  part("problem").textContent = "This browser is too old for this page; one from 2023 or later is needed (Chrome, Edge, Firefox, Safari).";
  part("start").disabled = true;
} else {
  inTurn(async () => {
    const last = await stored(store => store.get(CURRENT)).catch(unkept), code = last === undefined ? known.current : last;
    state = code && await recordOf(code);
    if (state) await next();
    else show("welcome");
  });
}
