"""The rules of the one server: who may call, how much may be sent, and what a fault looks like."""

import http.client
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import APIRouter, HTTPException
from fastapi.testclient import TestClient
from pydantic import BaseModel

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError
from ldm.workbench import options, server
from ldm.workbench.options import ServerOptions
from ldm.workbench.server import Address, RawBody, listening, make_app, serve
from tool import edit

OWN = {"X-MedSoft": "1"}


class Asked(BaseModel):
    number: int


def client(host: str = "127.0.0.1", address: Address | None = None, **flags: Any) -> TestClient:
    router = APIRouter(prefix="/api")

    @router.get("/fine")
    def fine() -> dict[str, bool]:
        return {"fine": True}

    @router.post("/size")
    def size(body: RawBody) -> dict[str, int]:
        return {"size": len(body)}

    @router.post("/number")
    def number(asked: Asked) -> int:
        return asked.number

    @router.get("/faults/{kind}")
    def faulty(kind: str) -> None:
        kinds = {"data": MedSoftError("x.png: is\n  damaged"), "usage": UsageError("no"), "bug": ValueError("a bug")}
        raise kinds.get(kind) or HTTPException(404, "nothing there")

    app = make_app(router, page=flags.pop("page", None), address=address or Address(), **flags)
    return TestClient(app, base_url=f"http://{host}:7860", raise_server_exceptions=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_this_machine_is_called_by_its_names_through_any_port(host: str) -> None:
    found = client(host).get("/api/fine")
    assert found.json() == {"fine": True}
    assert found.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' data: blob:;")
    assert "access-control-allow-origin" not in found.headers
    assert client(host).get("/api/fine", headers={"Host": f"{host}:1234"}).status_code == 200  # a tunnel


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "[::1"])
def test_another_name_for_this_machine_is_refused(host: str) -> None:
    found = client().get("/api/fine", headers={"Host": host})
    assert found.status_code == 400
    assert found.json()["error"].startswith("this server is not called ")


def test_what_changes_something_needs_our_header() -> None:
    found = client().post("/api/size", content=b"abc")
    assert (found.status_code, list(found.json())) == (403, ["error"])
    assert client().post("/api/size", content=b"abc", headers=OWN).json() == {"size": 3}


def test_programs_need_no_header_but_pages_of_others_are_refused() -> None:
    caller = client(for_programs=True)
    assert caller.post("/api/size", content=b"abc").json() == {"size": 3}
    for origin in ("https://evil.example", "null"):
        assert caller.post("/api/size", content=b"abc", headers={"Origin": origin}).status_code == 403


def test_a_token_once_as_address_then_as_cookie_or_as_header() -> None:
    address = Address("0.0.0.0", 7860, "a-long-token")
    caller = client("192.168.1.7", address)
    for wrong in ("/api/fine", "/api/fine?token=another", "/api/fine?token=", "/"):
        found = caller.get(wrong)
        assert (found.status_code, list(found.json())) == (401, ["error"])
    bearer = {"Authorization": "Bearer a-long-token"}
    assert caller.get("/api/fine", headers=bearer).status_code == 200
    assert caller.get("/api/fine", headers={"Authorization": "Bearer another"}).status_code == 401
    entered = caller.get("/api/fine?token=a-long-token", follow_redirects=False)
    assert entered.status_code == 303
    assert {"HttpOnly", "SameSite=strict"} <= set(entered.headers["set-cookie"].split("; "))
    assert "token" not in entered.headers["location"]
    assert caller.get("/api/fine").status_code == 200  # by the cookie
    assert client("evil.example", address).get("/api/fine", headers=bearer).status_code == 400


def test_wrong_tokens_are_bounded_and_right_ones_never(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = client("10.0.0.1", Address("0.0.0.0", 7860, "a-long-token")).app

    def asked(who: str, token: str) -> Any:
        caller = TestClient(app, "http://10.0.0.1:7860", client=(who, 50000))
        return caller.get("/api/fine", headers={"Authorization": f"Bearer {token}"} if token else {})

    assert asked("10.0.0.2", "a-long-token").status_code == 200
    for who in ("10.0.0.2", "2001:db8::1"):
        codes = [asked(who, f"guess{k}").status_code for k in range(server.WRONG_TOKENS + 1)]
        assert codes == [401] * server.WRONG_TOKENS + [429]
    assert len([text for text in caplog.messages if "10 wrong tokens in a minute from" in text]) == 2
    shut_out = asked("2001:db8::2", "a-long-token")  # the same network of IPv6; a right guess does not show
    assert (shut_out.status_code, shut_out.headers["retry-after"]) == (429, "60")
    assert "too many wrong tokens; in 60 s open the address" in shut_out.json()["error"]
    assert asked("2001:db8::2", "").status_code == 401
    for who in ("10.0.0.2", "10.0.0.3", "2001:db8:1::1"):  # one that knew it before, and others
        assert asked(who, "a-long-token").status_code == 200
    later = time.monotonic() + server.PERIOD
    monkeypatch.setattr(server.time, "monotonic", lambda: later)
    assert asked("2001:db8::1", "a-long-token").status_code == 200


def test_a_page_that_asks_on_after_a_restart_shuts_nobody_out() -> None:
    earlier, now = (Address("0.0.0.0", 7860, token) for token in ("an-earlier-token", "a-long-token"))
    caller = client("10.0.0.1", now)
    caller.cookies.set(earlier.cookie, str(earlier.token))
    codes = [caller.get("/api/fine").status_code for _ in range(server.WRONG_TOKENS + 2)]
    assert codes == [401] * len(codes)
    assert caller.get("/api/fine?token=a-long-token").status_code == 200


def test_callers_of_ipv4_are_told_apart_where_ipv6_is_listened_to() -> None:
    app = client("10.0.0.1", Address("::", 7860, "a-long-token")).app

    def asked(who: str, token: str) -> int:
        caller = TestClient(app, "http://10.0.0.1:7860", client=(f"::ffff:{who}", 50000))
        return caller.get("/api/fine", headers={"Authorization": f"Bearer {token}"}).status_code

    assert asked("10.0.0.2", "a-long-token") == 200
    for k in range(server.WRONG_TOKENS):
        asked("10.0.0.3", f"guess{k}")
    assert asked("10.0.0.3", "a-long-token") == 429  # although another one has known it
    assert asked("10.0.0.4", "a-long-token") == 200


def test_a_host_that_others_reach_gets_a_token_of_its_own() -> None:
    made = [Address.of(ServerOptions("0.0.0.0", 7860)) for _ in range(2)]
    assert made[0].token != made[1].token
    assert f"?token={made[0].token}" in made[0].url
    assert Address.of(ServerOptions()).token is None
    with pytest.raises(UsageError, match="--token: expected 8 to 128"):
        ServerOptions(token="a b").check_token()


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_BYTES", 1000)

    def chunks() -> Iterator[bytes]:
        for _ in range(11):
            yield b"x" * 100

    assert client().post("/api/size", content=b"x" * 1000, headers=OWN).json() == {"size": 1000}
    for content, size in ((b"x" * 1001, "1001"), (chunks(), "more than 1000")):
        found = client().post("/api/size", content=content, headers=OWN)
        assert (found.status_code, list(found.json())) == (413, ["error"])
        assert found.json()["error"].startswith(f"the request has {size} bytes; at most 1000 (0 MiB) are taken; ")


@pytest.mark.parametrize(
    ("path", "status", "line"),
    [
        ("/api/faults/data", 400, "x.png: is damaged"),
        ("/api/faults/usage", 400, "no"),
        ("/api/faults/other", 404, "nothing there"),
        ("/api/faults/bug", 500, "ValueError: a bug; the terminal says it too"),
        ("/docs", 404, "Not Found"),
        ("/openapi.json", 404, "Not Found"),
        ("/api/size", 405, "Method Not Allowed"),
    ],
)
def test_a_fault_is_one_line(path: str, status: int, line: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, server.__name__):
        found = client().get(path)
    assert (found.status_code, found.json()) == (status, {"error": line})
    assert [record.getMessage() for record in caplog.records] == (
        ["error: GET /api/faults/bug: ValueError: a bug"] if status == 500 else []
    )


@pytest.mark.parametrize("body", ['{"number": "many"}', "{}", "no JSON"])
def test_a_request_of_another_form_is_refused_in_one_line(body: str) -> None:
    found = client().post("/api/number", content=body, headers=OWN | {"Content-Type": "application/json"})
    assert (found.status_code, list(found.json())) == (400, ["error"])
    assert "\n" not in found.json()["error"]


def test_pages_come_from_their_folder_and_from_nowhere_else() -> None:
    caller = client(page="edit.html")
    assert caller.get("/").headers["content-type"].startswith("text/html")
    assert caller.get("/pages/viewer.js").headers["content-type"].startswith("text/javascript")
    for path in ("/pages/..%2Fserver.py", "/pages/none.js", "/server.py"):
        assert caller.get(path).status_code == 404


def test_a_port_in_use_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--port {port}: is in use on 127\.0\.0\.1, perhaps .*another --port"):
            listening(Address(port=port))
    with pytest.raises(UsageError, match=r"--host no\.such\.host\.invalid --port 7860: cannot listen there"):
        listening(Address("no.such.host.invalid"))


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as in a terminal; a shell's background job ignores it from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def served(call: Callable[[http.client.HTTPConnection], None], token: str | None = None) -> Address:
    """Where a server was that has answered ``call``, in a thread, until Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = Address(port=other.getsockname()[1], token=token)

    def interrupt() -> None:
        call(http.client.HTTPConnection("127.0.0.1", address.port, timeout=10))
        os.kill(os.getpid(), signal.SIGINT)

    with listening(address) as listener:  # whoever calls from now on waits
        caller = threading.Thread(target=interrupt)
        caller.start()
        with pytest.raises(KeyboardInterrupt):
            serve(make_app(page="edit.html", address=address), address, False, listener)
    caller.join()
    return address


@pytest.mark.usefixtures("_interrupts")
def test_ctrl_c_ends_the_server_and_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    """Before that a call that asks for a WebSocket is answered as any other, and nothing is said of it."""
    caplog.set_level(logging.INFO)
    answers = []

    def call(caller: http.client.HTTPConnection) -> None:
        caller.request("GET", "/pages/viewer.js", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
        answers.append(caller.getresponse().status)

    address = served(call)
    assert answers == [200]
    assert [each.getMessage() for each in caplog.records] == [f"open {address.url} (Ctrl-C ends)", "stopping"]


@pytest.mark.usefixtures("_interrupts")
def test_nobody_can_say_that_a_wrong_token_comes_from_elsewhere() -> None:
    answers = []

    def call(caller: http.client.HTTPConnection) -> None:
        for k in range(server.WRONG_TOKENS + 1):
            names = {"X-Forwarded-For": f"10.0.0.{k}", "Forwarded": f"for=10.0.0.{k}"}
            caller.request("GET", "/", headers=names | {"Authorization": f"Bearer guess{k}"})
            answer = caller.getresponse()
            answer.read()
            answers.append(answer.status)

    served(call, "a-long-token")
    assert answers == [401] * server.WRONG_TOKENS + [429]


def test_without_the_extra_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # else later tests' threads log to a closed stream
    with pytest.raises(SystemExit) as left:
        cli.run(edit.build_parser(), edit.main, [])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "in the repository's folder run python -m pip install -e '.[edit]'" in error
    assert error.count("\n") == 1
