"""What a person could not press or read on the page in tests/browser.py, in windows of several sizes."""

from collections.abc import Iterator
from contextlib import contextmanager

from browser import Browser

SIZES = ((1280, 720), (1024, 700), (390, 800))  # the last one is a phone's

# A control is pressed in its middle and near its corners: what is hit there has to be the control, or lie in it.
UNREACHABLE = """(() => {
  const found = [], places = [[0.5, 0.5], [0, 0], [0, 1], [1, 0], [1, 1]];
  for (const each of document.querySelectorAll('button, input, select, textarea, a[href]')) {
    if (!each.checkVisibility() || each.closest('dialog')) continue;
    each.scrollIntoView({ block: 'nearest', inline: 'nearest' });
    const { x, y, width, height } = each.getBoundingClientRect();
    const points = places.map(([right, down]) => [x + 3 + (width - 6) * right, y + 3 + (height - 6) * down]);
    const hit = points.map((point) => document.elementFromPoint(...point));
    if (!hit.every((other) => each.contains(other))) found.push(each.id || each.textContent);
  }
  if (document.documentElement.scrollWidth > innerWidth) found.push('what lies beside the window');
  return found;
})()"""

# The contrast of text (in WCAG 2.2 at least 4.5) and of the edges of fields (3); colours lie over those below them.
FAINT = """(() => {
  const pen = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d');
  const light = (colours) => {
    for (const colour of colours) {
      pen.fillStyle = colour;
      pen.fillRect(0, 0, 1, 1);
    }
    const [red, green, blue] = Array.from(pen.getImageData(0, 0, 1, 1).data, (value) => {
      return value <= 10 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
  };
  const below = (each) => (each ? [...below(each.parentElement), getComputedStyle(each).backgroundColor] : ['black']);
  const found = [];
  const look = (what, ground, colour, least) => {
    const lights = [light(ground), light([...ground, colour])], ratio = Math.max(...lights) / Math.min(...lights);
    if (ratio < least) found.push(`${what}: ${ratio.toFixed(2)}`);
  };
  for (const each of document.body.querySelectorAll('*')) {
    if (!each.checkVisibility() || each.closest(':disabled, script')) continue;
    const field = each.matches('select, textarea, input:not([type=range], [type=checkbox])');
    const style = getComputedStyle(each), hint = getComputedStyle(each, '::placeholder').color;
    const name = `${each.tagName} ${each.id || each.textContent.trim()}`;
    if (field) look(`edge of ${name}`, below(each.parentElement), style.borderTopColor, 3);
    if (each.placeholder) look(`placeholder of ${name}`, below(each), hint, 4.5);
    const written = [...each.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (field || written) look(name, below(each), style.color, 4.5);
  }
  return found;
})()"""


@contextmanager
def window(browser: Browser, width: int, height: int) -> Iterator[None]:
    """Inside, the page has a window of this size."""
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    browser.wait(f"innerWidth === {width} && innerHeight === {height}")
    yield
    browser.call("Emulation.clearDeviceMetricsOverride")


def flaws(browser: Browser) -> list[str]:
    """The controls that cannot be pressed, since they lie out of the window or below something, and what is faint."""
    return [*browser.run(UNREACHABLE), *browser.run(FAINT)]
