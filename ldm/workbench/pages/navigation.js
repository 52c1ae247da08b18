// Moving about in a viewer, the same on every page: wheel to zoom, right button to window, middle button or space to pan,
// the slider of a comparison by its handle. What else the left button does is the page's.

const HANDLE = 16; // CSS pixels beside the slider's line that still take hold of it

/**
 * ``begin(event, place)``: a press of the left button (or finger, or pen) at ``place`` in pixels; it returns an object with
 * ``move(event, place)`` and ``end(event, place)``, or null to pan. ``hover(place)``: the pointer moves, or has left (null).
 * ``onWindow(low, high)``, ``onSlider(position)``: what the pointer has changed; without them the viewer is changed itself.
 */
export function navigate(viewer, { begin = () => null, hover = () => {}, onWindow = null, onSlider = null } = {}) {
  const { canvas } = viewer;
  const held = { drag: null, space: false };
  const setWindow = onWindow ?? ((low, high) => viewer.setWindow(low, high));
  const setSlider = onSlider ?? ((at) => viewer.setComparison(viewer.other.sizes[0].levels, "slider", at));

  const panning = (event) => {
    let { clientX: x, clientY: y } = event;
    return {
      move(next) {
        viewer.pan(next.clientX - x, next.clientY - y);
        [x, y] = [next.clientX, next.clientY];
      },
      end() {},
    };
  };
  const windowing = (event) => {
    const [low, high] = viewer.window, step = Math.max(high - low, 2 ** viewer.bits / 256) / 300;
    return {
      move(next) {
        const level = (low + high) / 2 + (next.clientY - event.clientY) * step;
        const width = Math.max(1, high - low + (next.clientX - event.clientX) * step * 2);
        setWindow(Math.round(level - width / 2), Math.round(level + width / 2));
      },
      end() {},
    };
  };
  const sliding = {
    move: (event, place) => setSlider(Math.min(1, Math.max(0, place.x / viewer.width))),
    end() {},
  };
  const onHandle = (event) => {
    if (viewer.mode !== "slider") return false;
    const at = viewer.toCanvas(viewer.position * viewer.width, 0).x + canvas.getBoundingClientRect().left;
    return Math.abs(event.clientX - at) <= HANDLE;
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (held.drag || !viewer.picture) return;
    canvas.focus({ preventScroll: true });
    if (event.button === 2) held.drag = windowing(event);
    else if (event.button === 1 || held.space) held.drag = panning(event);
    else if (event.button === 0) {
      if (onHandle(event)) held.drag = sliding;
      else held.drag = begin(event, viewer.toImage(event.clientX, event.clientY)) ?? panning(event);
    } else return;
    held.pointer = event.pointerId;
    canvas.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!viewer.picture) return;
    if (!held.drag) {
      canvas.classList.toggle("on-handle", onHandle(event));
      return hover(viewer.toImage(event.clientX, event.clientY));
    }
    if (event.pointerId !== held.pointer) return;
    const steps = event.getCoalescedEvents?.() ?? [];
    for (const each of steps.length ? steps : [event]) held.drag.move(each, viewer.toImage(each.clientX, each.clientY));
    hover(viewer.toImage(event.clientX, event.clientY));
  });
  const release = (event) => {
    if (!held.drag || event.pointerId !== held.pointer) return;
    const { drag } = held;
    held.drag = null;
    drag.end(event, viewer.toImage(event.clientX, event.clientY));
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => !held.drag && hover(null));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    viewer.zoom(Math.exp(-Math.max(-100, Math.min(100, event.deltaY)) / 400), event.clientX, event.clientY);
  }, { passive: false });
  return {
    /** While ``on``, the left button pans. */
    hold(on) {
      held.space = on;
      canvas.classList.toggle("panning", on);
    },
    /** Whether a drag is going on. */
    get busy() {
      return held.drag !== null;
    },
  };
}
