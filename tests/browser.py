"""A headless Chromium, driven over its DevTools protocol through two pipes: nothing but the standard library."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = """--headless=new --no-sandbox --disable-gpu --no-first-run --disable-extensions --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"""
PATIENCE = 120  # seconds: no test waits for this long unless something is wrong
NO_BUS = "unix:path=/dev/null"  # it would wait for a desktop's message bus


class Browser:
    """One page. ``requests``: the address of everything that it has asked for."""

    def __init__(self, downloads: Path, width: int = 1366, height: int = 768) -> None:
        self.downloads, self.size = downloads, (width, height)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.loaded: set[str] = set()  # every load that has come to its end
        self.number = 0

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (asked, ask), (hear, heard) = os.pipe(), os.pipe()
        window = f"--window-size={self.size[0]},{self.size[1]}"
        flags = [*FLAGS.split(), window, f"--user-data-dir={self.profile.name}", "about:blank"]
        line = f'exec "$@" 3<&{asked} 4>&{heard}'  # where Chromium reads commands, and answers
        environment = os.environ | {"DBUS_SESSION_BUS_ADDRESS": NO_BUS, "DBUS_SYSTEM_BUS_ADDRESS": NO_BUS}
        self.process = subprocess.Popen(
            ["bash", "-c", line, "bash", str(CHROMIUM), *flags],
            pass_fds=(asked, heard),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        for each in (asked, heard):
            os.close(each)
        self.out, self.back, self.unread = os.fdopen(ask, "wb", buffering=0), hear, b""
        self.session: str | None = None
        (target,) = [each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self._attach(target["targetId"])
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.out.close()
        os.close(self.back)
        self.profile.cleanup()

    def _attach(self, target: str) -> None:
        """All commands from here on are for this page."""
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    @contextmanager
    def tab(self) -> Iterator[None]:
        """A second page of the same browser, in a window of its own: inside, all commands are for it."""
        first, self.session = self.session, None
        target = self.call("Target.createTarget", url="about:blank", newWindow=True)["targetId"]
        self._attach(target)
        yield
        self.session = first
        self.call("Target.closeTarget", targetId=target)

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """One command of the protocol, and what it answers; LookupError for what is not there (any more)."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": given}
        message |= {"sessionId": self.session} if self.session else {}
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == self.number:
                if "error" in heard:
                    raise LookupError(heard["error"])
                return heard["result"]

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            assert select.select([self.back], [], [], PATIENCE)[0], f"Chromium has said nothing for {PATIENCE} seconds"
            more = os.read(self.back, 1 << 16)
            assert more, "Chromium has ended"
            self.unread += more
        data, _, self.unread = self.unread.partition(b"\0")
        heard = json.loads(data)
        if heard.get("method") == "Network.requestWillBeSent":
            self.requests.append(heard["params"]["request"]["url"])
        if heard.get("method") == "Page.lifecycleEvent" and heard["params"]["name"] == "load":
            self.loaded.add(heard["params"]["loaderId"])
        if heard.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(heard["params"]["exceptionDetails"]))
        return heard

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, address: str) -> None:
        """Load a page, or this one again, and wait until it is there: this load, not one that was asked for earlier."""
        found = self.call("Page.navigate", url=address)
        assert "errorText" not in found, (address, found)
        while found["loaderId"] not in self.loaded:
            self._hear()

    def wait(self, condition: str) -> None:
        """Wait until an expression is true in the page, which may be loading meanwhile."""
        end, found = time.monotonic() + PATIENCE, None
        while time.monotonic() < end:
            with suppress(LookupError):
                given = {"expression": f"Boolean({condition})", "returnByValue": True}
                answer = self.call("Runtime.evaluate", **given)
                found = answer.get("exceptionDetails", {}).get("exception", {}).get("description", "it is false")
                if answer["result"].get("value") is True:
                    return
            time.sleep(0.01)
        shown = self.run("`${location.href} shows:\\n${document.body.innerText.slice(0, 500)}`")
        raise AssertionError(f"waited too long for {condition}: {found}\n{shown}\nerrors: {self.errors}")

    def drag(self, *places: tuple[float, float], button: str = "left") -> None:
        """Press a button of the mouse at the first place (CSS pixels of the window), move through the others, release.

        With one place it is a click.
        """
        held = {"button": button, "clickCount": 1}
        (x, y), (end_x, end_y) = places[0], places[-1]
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **held)
        for next_x, next_y in places[1:]:
            buttons = {"left": 1, "right": 2, "middle": 4}[button]
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=next_x, y=next_y, button=button, buttons=buttons)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=end_x, y=end_y, **held)

    def press(self, key: str, shift: bool = False) -> None:
        """A key, down and up; ``shift``: that one is held meanwhile."""
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        codes = {"Enter": 13, "Escape": 27, "Delete": 46}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        about = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper())), "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def screenshot(self, path: Path) -> None:
        """The page as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
