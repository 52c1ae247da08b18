"""One small web server for all pages and for the endpoint: who may call, how much, and what a fault looks like.

The rules are here and nowhere else. Only this machine may call, or else whoever knows the token. The Host header has to
name this server, so that no name that an attacker resolves to 127.0.0.1 reaches it. What changes something needs a
header that a page of another server cannot send. Nothing is loaded from elsewhere, and nothing tells anybody anything.
"""

import asyncio
import errno
import hashlib
import hmac
import ipaddress
import logging
import math
import os
import secrets
import socket
import sys
import threading
import time
import webbrowser
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm.core.errors import MedSoftError, UsageError, first_line
from ldm.workbench.options import LOOPBACK, ServerOptions

log = logging.getLogger(__name__)

PAGES = Path(__file__).with_name("pages")
STOPPED = "the server is being stopped"
MOST_BYTES = 64 * 2**20  # of a request's body
GRACE = 2  # seconds in which requests that are being answered may end after Ctrl-C
PERIOD = 60.0  # seconds, of a Rate
WRONG_TOKENS = 10  # that an address may send in this time
ADDRESSES = 1024  # that are remembered
HEADER = "X-MedSoft"  # which every request that changes something carries, with the value 1
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Address:
    """Where a server listens and what a caller has to know: ``token``, or nothing if that is None."""

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None

    @classmethod
    def of(cls, options: ServerOptions) -> "Address":
        """As the flags say; a host that others can reach gets a random token if none is given."""
        token = options.token or (None if options.is_local else secrets.token_urlsafe(16))
        return cls(options.host, options.port, token)

    @property
    def url(self) -> str:
        """What to open in a browser."""
        shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(self.host, self.host)
        shown = f"[{shown}]" if ":" in shown else shown
        return f"http://{shown}:{self.port}/" + (f"?token={self.token}" if self.token else "")

    @property
    def cookie(self) -> str:
        """The name of the cookie with the token; browsers keep cookies by host, whatever the port.

        It holds a digest of the token: what a page of an earlier server at this port still sends is no wrong token.
        """
        return f"medsoft_{self.port}_{hashlib.sha256(str(self.token).encode()).hexdigest()[:8]}"

    def answers_to(self, name: str) -> bool:
        """Whether ``name``, of a Host header, without its port, means this server.

        A tunnel may have another port here than there, so that is not compared. A literal IP address is never a name
        that somebody else resolves.
        """
        if name in LOOPBACK or name == self.host:
            return True
        if self.host in LOOPBACK:
            return False
        return _is_ip(name) or name.casefold() in {socket.gethostname().casefold(), socket.getfqdn().casefold()}


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def fault(status: int, line: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """A fault as every route gives it."""
    return JSONResponse({"error": line}, status, headers)


class Rate:
    """How often something has happened in the last PERIOD: at most ``most`` times is the rule."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._events: deque[tuple[float, int]] = deque()  # when, and how many at once

    def wait(self, count: int = 1) -> int:
        """Seconds until ``count`` more are within the rule; 0: they are now."""
        now = time.monotonic()
        while self._events and self._events[0][0] <= now - PERIOD:
            self._events.popleft()
        left, seconds = self.most - sum(many for _, many in self._events), 0
        for when, many in self._events:
            if left >= count:
                break
            left, seconds = left + many, math.ceil(when + PERIOD - now)
        return seconds

    def add(self, count: int = 1) -> None:
        """Note that it has happened ``count`` times now."""
        self._events.append((time.monotonic(), count))


class Guesses:
    """Wrong tokens, by the address that they come from.

    An address that has sent too many is told to wait, and its next token is not looked at, so that its rate of guesses
    is bounded. From an address that has sent the right token before, every token is looked at: who is in stays in, even
    where somebody behind the same proxy guesses. So guesses from there are not bounded, and somebody who has never been
    in, and shares an address with a guesser alone, waits until a minute after the last guess.
    """

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, Rate] = OrderedDict()
        self._known: OrderedDict[str, None] = OrderedDict()

    def wait(self, address: str) -> int:
        """Seconds in which tokens from this address are wrong ones too many; 0: it may send one."""
        return self._wrong[address].wait() if address in self._wrong else 0

    def is_shut_out(self, address: str) -> bool:
        """Whether a token from this address is not looked at."""
        return address not in self._known and self.wait(address) > 0

    def right(self, address: str) -> None:
        """The right token has come from this address."""
        self._known[address] = None
        _bound(self._known)

    def wrong(self, address: str) -> None:
        """A wrong one has come from this address."""
        rate = self._wrong.setdefault(address, Rate(WRONG_TOKENS))
        _bound(self._wrong)
        if not rate.wait():
            rate.add()
            if rate.wait():
                log.warning("warning: %d wrong tokens in a minute from %s, which has to wait", WRONG_TOKENS, address)


def _bound(addresses: OrderedDict[str, Any]) -> None:
    while len(addresses) > ADDRESSES:
        addresses.popitem(last=False)


def _address_of(request: Request) -> str:
    """Where a request comes from; of IPv6 the network of 64 bits, all of which one caller may have."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:  # of IPv4
        return host
    if address.ipv4_mapped:  # as a socket of IPv6 names a caller of IPv4
        return str(address.ipv4_mapped)
    return host if address.scope_id else str(ipaddress.IPv6Network((int(address), 64), strict=False))


async def _body(request: Request) -> bytes:
    return await request.body()


RawBody = Annotated[bytes, Depends(_body)]  # of a route that takes an array


def raw(pixels: np.ndarray, headers: dict[str, str] | None = None) -> Response:
    """An array as a route gives it: row by row, uint8 or little-endian uint16, channels of a pixel together.

    bool becomes 0 and 255, and float in [0, 1] is rounded to k/255.
    """
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    elif pixels.dtype.kind == "f":
        pixels = np.rint(pixels * 255).astype(np.uint8)
    kind = pixels.dtype.newbyteorder("<")
    return Response(
        np.ascontiguousarray(pixels, kind).tobytes(), media_type="application/octet-stream", headers=headers
    )


def make_app(
    *routers: APIRouter,
    page: str | None,
    address: Address = Address(),
    for_programs: bool = False,
    debug: bool = False,
) -> FastAPI:
    """A server of ``routers``, of ``page`` (a file of ``pages/``) at ``/`` and of the other files there.

    ``for_programs``: programs that know nothing of our header may call too, web pages of other servers may not.
    ``debug``: an error that nobody foresaw is printed with its traceback.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for router in routers:
        app.include_router(router)
    if page is not None:
        app.add_api_route("/", lambda: FileResponse(PAGES / page), response_class=FileResponse)
        app.mount("/pages", StaticFiles(directory=PAGES))
    app.add_exception_handler(MedSoftError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_refusal)
    app.add_middleware(Guard, address=address, for_programs=for_programs, debug=debug)  # type: ignore[arg-type]
    return app


def _on_error(request: Request, error: Exception) -> Response:
    return fault(400, _one_line(str(error)))


def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    return fault(400, _one_line(f"{where or 'the request'}: {first['msg']}"))


def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    answer = fault(error.status_code, _one_line(str(error.detail)))
    answer.headers.update(error.headers or {})
    return answer


def _one_line(text: str) -> str:
    return " ".join(text.split())


class Guard:
    """Lets in who may come in, bounds what is sent, adds HEADERS, and makes one line of what nobody foresaw."""

    def __init__(self, app: ASGIApp, address: Address, for_programs: bool, debug: bool) -> None:
        self.app, self.address, self.for_programs, self.debug = app, address, for_programs, debug
        self.guesses = Guesses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every ASGI application."""
        if scope["type"] != "http":
            return
        request, started, taken = Request(scope), False, 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MOST_BYTES:
                raise HTTPException(413, _too_large(f"more than {MOST_BYTES}"))
            return message

        async def headed(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                given = {name.lower() for name, _ in message["headers"]}
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in more if pair[0] not in given)]
            await send(message)

        if refused := self.refusal(request):
            await refused(scope, receive, headed)
            return
        try:
            await self.app(scope, bounded, headed)
        except asyncio.CancelledError:  # Ctrl-C, and it took too long to end
            if not started:
                await fault(503, STOPPED)(scope, receive, headed)
        except Exception as error:
            log.error("error: %s %s: %s: %s", request.method, request.url.path, type(error).__name__, first_line(error))
            if self.debug:
                log.exception("its traceback:")
            if not started:
                line = f"{type(error).__name__}: {first_line(error)}; the terminal says it too"
                await fault(500, _one_line(line))(scope, receive, headed)

    def refusal(self, request: Request) -> Response | None:
        """The answer to somebody who may not call like this; None where the request goes on."""
        try:
            host = urlsplit(f"//{request.headers.get('host', '')}")
        except ValueError:  # half of a bracket
            host = urlsplit("")
        if not host.hostname or not self.address.answers_to(host.hostname):
            return fault(400, f"this server is not called {host.hostname or 'nothing'}; open {self.address.url}")
        if self.address.token and (asked := self._token_refusal(request)):
            return asked
        if request.method not in ("GET", "HEAD"):
            origin = request.headers.get("origin")
            if self.for_programs and origin not in (None, f"http://{host.netloc}"):
                return fault(403, "a page of another server may not ask for this")
            if not self.for_programs and request.headers.get(HEADER) != "1":
                return fault(403, f"the request has no header {HEADER}: 1, which shows that our own page has sent it")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MOST_BYTES:
            return fault(413, _too_large(length[:20]))
        return None

    def _token_refusal(self, request: Request) -> Response | None:
        """A redirect that keeps the token of the address as a cookie, None with the right one, else 401 or 429."""
        named = request.query_params.get("token") if request.method == "GET" else None
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        kept = request.cookies.get(self.address.cookie)
        caller, cure = _address_of(request), "open the address that the terminal shows, with ?token=..."
        given = [token for token in (named, kept, bearer) if token]
        if not given:
            return fault(401, f"the token is missing; {cure}")
        if not self.guesses.is_shut_out(caller):
            if self._is_token(named):
                self.guesses.right(caller)
                answer = RedirectResponse(request.url.path, 303)
                answer.set_cookie(self.address.cookie, str(self.address.token), httponly=True, samesite="strict")
                return answer
            if self._is_token(kept) or self._is_token(bearer):
                self.guesses.right(caller)
                return None
        wait = self.guesses.wait(caller)
        if wait:
            return fault(429, f"too many wrong tokens; in {wait} s {cure}", {"Retry-After": str(wait)})
        self.guesses.wrong(caller)
        return fault(401, f"the token is wrong; {cure}")

    def _is_token(self, given: str | None) -> bool:
        return given is not None and hmac.compare_digest(given.encode(), str(self.address.token).encode())


def _too_large(found: str) -> str:
    """What is said of a body of ``found`` bytes."""
    return f"the request has {found} bytes; at most {MOST_BYTES} ({MOST_BYTES >> 20} MiB) are taken; crop the image"


class _Server(uvicorn.Server):
    """Calls ``on_stop`` at the first signal to end, before it waits for the requests that are being answered."""

    on_stop: Callable[[], object] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn calls it."""
        if not self.should_exit:
            log.info("stopping")
        if self.on_stop is not None:
            self.on_stop()
        super().handle_exit(sig, frame)


def serve(
    app: Any,
    address: Address,
    open_browser: bool = True,
    listener: socket.socket | None = None,
    on_stop: Callable[[], object] | None = None,
) -> None:
    """Serve until Ctrl-C (KeyboardInterrupt) or SIGTERM. UsageError where the address or the port cannot be had.

    ``listener``: what ``listening`` has given before the app was made, where that takes long. ``on_stop`` is called
    first, and makes requests end that take long.
    """
    with listener or listening(address) as listener:
        config = uvicorn.Config(
            app, log_config=None, log_level="error", access_log=False, server_header=False, lifespan="off", ws="none"
        )  # it would warn of WebSockets, which nothing here has
        config.proxy_headers = False  # with which a caller could say that it is another one
        config.timeout_graceful_shutdown = GRACE
        log.info("open %s (Ctrl-C ends)", address.url)
        if open_browser and (sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            threading.Thread(target=webbrowser.open, args=(address.url,), daemon=True).start()
        server = _Server(config)
        server.on_stop = on_stop
        server.run(sockets=[listener])


def listening(address: Address) -> socket.socket:
    """A socket that listens at ``address``: a call is kept waiting from now on. UsageError where it cannot be had."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            if os.name != "nt":  # where it would let two servers have one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            cure = "perhaps by another medsoft; end that, or give another --port"
            raise UsageError(f"--port {address.port}: is in use on {address.host}, {cure}") from error
        cause = error.strerror or error
        raise UsageError(f"--host {address.host} --port {address.port}: cannot listen there ({cause})") from error
    return listener
