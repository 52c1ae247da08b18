"""What the editor costs, for docs/workbench.md: first use, painting, opening, memory of a session of drawings.

    PYTHONPATH=.:tests python tests/workbench/measure.py demo_output    # needs Chromium; about four minutes

Starts `tool/edit.py` on the folder, in a scratch folder of its own, and prints seconds as a user waits for them.
"""

import argparse
import base64
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from browser import Browser
from tiny import ROOT

from ldm.data.png import write_png

SIDE = 2048
VARIANTS = 4
READY = "window.medsoft && medsoft.placing.facts && medsoft.sentence.tokens"
# Medians and 95th percentiles of milliseconds. Reading a pixel back waits until the canvas has been painted.
PAINTING = """(() => {
  const { viewer, tools } = medsoft, found = {};
  const painted = () => viewer.context.getImageData(0, 0, 1, 1);
  const time = (count, act) => {
    painted();
    const taken = Array.from({ length: count }, (_, k) => {
      const start = performance.now();
      act(k); viewer.paint(); painted();
      return performance.now() - start;
    }).sort((a, b) => a - b);
    return [taken[count >> 1], taken[Math.floor(count * 0.95)]];
  };
  const size = document.getElementById("brush-size");
  size.value = 60;
  size.dispatchEvent(new Event("input"));
  tools.choose("brush");
  viewer.fit(); viewer.paint();
  const stroke = tools.begin({ altKey: false }, { x: 800, y: 900 });
  found["one move of a brush"] = time(100, (k) => stroke.move({}, { x: 800 + 3 * k, y: 900 + (11 * k) % 90 }));
  stroke.end();
  found["another window"] = time(40, (k) => viewer.setWindow(500 + k, 2500 + 3 * k));
  found["everything once more"] = time(20, () => viewer.repaint());
  return found;
})()"""


class Editor:
    """A running `tool/edit.py`."""

    def __init__(self, folder: Path, output_dir: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, str(ROOT / "tool" / "edit.py"), str(folder), "--output_dir", str(output_dir)]
        self.start = time.monotonic()
        self.process = subprocess.Popen([*command, "--port", str(self.port), "--no_browser"], stdout=subprocess.PIPE)

    def said(self, word: str) -> float:
        """Seconds from the start until the terminal said ``word``."""
        assert self.process.stdout
        while word.encode() not in (line := self.process.stdout.readline()):
            assert line, "tool/edit.py has ended"
        return self.passed()

    def passed(self) -> float:
        return time.monotonic() - self.start

    def ask(self, route: str, body: Any = None) -> bytes:
        """What a route answers; a body is sent, as JSON unless it is bytes."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"X-MedSoft": "1", "Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.address}/api/{route}", content, headers)) as found:
            return found.read()

    def json(self, route: str, body: Any = None) -> Any:
        return json.loads(self.ask(route, body))

    def memory(self) -> int:
        """MiB of the server that are in memory (Linux)."""
        (line,) = [
            each for each in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if "VmRSS" in each
        ]
        return int(line.split()[1]) // 1024

    def processor(self) -> float:
        """Seconds of processor time that the server has taken (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def editor(folder: Path, output_dir: Path) -> Iterator[Editor]:
    """One that is ended at the end."""
    made = Editor(folder, output_dir)
    try:
        yield made
    finally:
        made.process.send_signal(signal.SIGINT)
        made.process.wait(120)


def first_use(server: Editor, browser: Browser) -> None:
    """The orange button twice, from the command to the first accepted drawing."""
    print(f"{server.said('open http'):6.1f} s  the terminal gives the address")
    browser.open(server.address)
    browser.wait(READY)
    print(f"{server.passed():6.1f} s  image, suggestion and sentence are there")
    browser.run("document.getElementById('act').click()")
    browser.wait("medsoft.app.shown")
    print(f"{server.passed():6.1f} s  drawn and shown")
    browser.wait("!document.getElementById('act').disabled")
    browser.run("document.getElementById('act').click()")
    browser.wait("medsoft.app.shown.state == 'accepted'")
    print(f"{server.passed():6.1f} s  accepted")


def large(server: Editor, browser: Browser, scratch: Path) -> None:
    """A slice of 2048 x 2048 pixels of 16 bits: opened three times, then painted on."""
    pixels = np.random.default_rng(0).integers(500, 3500, (SIDE, SIDE), dtype=np.uint16)
    write_png(scratch / "large.png", pixels)
    taken = []
    for _ in range(3):
        start = time.monotonic()
        document = server.json("open", {"path": str(scratch / "large.png")})["document"]
        levels = server.ask(f"documents/{document['id']}/levels")
        taken.append(time.monotonic() - start)
        assert np.array_equal(np.frombuffer(levels, "<u2").reshape(SIDE, SIDE), pixels)
    print(f"{statistics.median(taken):6.2f} s  {SIDE} x {SIDE}, 16 bits: opened by the server, pixels sent")
    path = json.dumps(str(scratch / "large.png"))
    browser.run(f"(document.getElementById('path').value = {path}, document.getElementById('open').click())")
    browser.wait(f"medsoft.app.document.width == {SIDE} && !medsoft.app.opening")
    for what, (median, most) in browser.run(PAINTING).items():
        print(f"{median:6.1f} ms {what} (95 %: {most:.1f} ms)")


def session(server: Editor, first: str, drawings: int) -> None:
    """Images one after the other, in each a suggested mask and four variants, one accepted and one rejected.

    ``first``: a document of the collection.
    """
    print(f"{server.memory():6d} MiB with the model loaded")
    before, done = server.processor(), 0
    prompts = [each["prompt"] for each in server.json("sentences")["sentences"]]
    while done < drawings:
        place = server.json("go", {"index": done // VARIANTS, "document": first})["document"]["id"]
        sought = {"size": [0.35, 0.35], "side": None, "irregularity": None, "seed": done}
        mask = base64.b64encode(server.ask(f"documents/{place}/suggestion", sought)).decode()
        asked = {"document": place, "mask": mask, "prompt": prompts[done % len(prompts)], "feather_mm": None}
        job = server.json("draw", {**asked, "n": VARIANTS, "seed": done})
        while job["state"] in ("queued", "running"):
            time.sleep(0.05)
            job = server.json(f"jobs/{job['id']}")
        assert job["state"] == "done", job
        server.ask(f"results/{job['results'][0]}/accept", {})
        server.ask(f"results/{job['results'][1]}/reject", {"reason": "seam"})
        done += VARIANTS
        if done in (VARIANTS, drawings // 2):
            print(f"{server.memory():6d} MiB after {done} drawings; the state has {len(server.ask('state'))} bytes")
    each = (server.processor() - before) / done
    print(f"{server.memory():6d} MiB after {done} drawings, {each:.2f} s of processor time each")
    print(f"{len(server.ask('state')):6d} bytes of the state then")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `make demo` has left")
    parser.add_argument("--drawings", type=int, default=200, help="of the session (default: 200)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, editor(options.folder, Path(scratch) / "edited") as server:
        with Browser(Path(scratch)) as browser:
            first_use(server, browser)
            first: str = browser.run("medsoft.app.document.id")
            large(server, browser, Path(scratch))
        session(server, first, options.drawings)


if __name__ == "__main__":
    main()
