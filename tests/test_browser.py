"""The browser that the tests of pages drive waits for the right load, and says what it saw when it waited in vain."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import browser as tool
import pytest
from browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome")


class Pages(BaseHTTPRequestHandler):
    """A page for every address; that of /slow has a picture that takes its time."""

    def do_GET(self) -> None:
        if self.path == "/picture":
            time.sleep(1)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(f"<p>page {self.path}</p>{'<img src=/picture>' if self.path == '/slow' else ''}".encode())

    def log_message(self, *words: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("downloads")) as made:
        yield made


def test_the_end_of_an_earlier_load_is_not_taken_for_that_of_a_later_one(browser: Browser, address: str) -> None:
    browser.open(f"{address}/quick")
    browser.run("void setTimeout(() => location.reload())")
    time.sleep(2)  # that load ends, and nobody has heard of it
    browser.open(f"{address}/slow")
    assert browser.run("[location.pathname, document.readyState]") == ["/slow", "complete"]


def test_a_wait_in_vain_says_what_the_page_shows(
    browser: Browser, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.open(f"{address}/quick")
    browser.run("void setTimeout(() => { throw new Error('a fault of the page') })")
    browser.wait("document.body")
    monkeypatch.setattr(tool, "PATIENCE", 5)
    with pytest.raises(AssertionError) as told:
        browser.wait("missing.length")
    for part in ("missing.length", "missing is not defined", f"{address}/quick", "page /quick", "a fault of the page"):
        assert part in str(told.value)


def test_a_second_tab_is_a_page_of_its_own(browser: Browser, address: str) -> None:
    browser.open(f"{address}/first")
    with browser.tab():
        browser.open(f"{address}/second")
        assert browser.run("location.pathname") == "/second"
    assert browser.run("location.pathname") == "/first"
