"""Who may talk to the server: this machine's names only, our own page only, and only with the token of the link."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware. Refuses, before anything else is looked at,

    - a Host that is no name of this machine (DNS rebinding: a foreign name that was made to mean 127.0.0.1),
    - an Origin that is not the page's own; websockets and POST must have one,
    - whatever is not one of the ``open_paths`` and comes without the token.

    And puts ``HEADERS`` on every answer.
    """

    def __init__(self, app: ASGIApp, *, token: str, open_paths: frozenset[str]) -> None:
        self.app, self.token, self.open_paths = app, token, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        status, why = self._refusal(scope)
        if not status:
            await self.app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await receive()  # websocket.connect
            await send({"type": "websocket.close", "code": 1008, "reason": why})  # before accept: the handshake ends with 403
        else:
            await PlainTextResponse(why, status)(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        headers = Headers(scope=scope)
        host, origins = headers.get("host", ""), headers.getlist("origin")
        if len(headers.getlist("host")) != 1 or host_name(host) not in HOSTS:
            return 400, "this server is for this machine only"
        is_acting = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD")
        if origins != [f"http://{host}"] and (origins or is_acting):
            return 403, "this page is not ours"
        if scope["path"] not in self.open_paths and not is_token(self._given(scope, headers), self.token):
            return 403, "wrong token: open the link that dreamer play printed"
        return 0, ""

    @staticmethod
    def _given(scope: Scope, headers: Headers) -> str:
        """A page cannot put headers on a websocket: there the token is part of the address, which nobody logs."""
        if scope["type"] == "websocket":
            return parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return headers.get("authorization", "").removeprefix("Bearer ")


def host_name(host: str) -> str:
    """Without the port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isascii() and port.isdigit() else host).lower()


def is_token(given: str, token: str) -> bool:
    """Takes as long whatever is wrong."""
    return secrets.compare_digest(given.encode(), token.encode())


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return sending


class Rate:
    """A bucket of ``burst`` messages that fills again with ``per_second``."""

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self.burst, self._clock = per_second, burst, clock
        self._left, self._at = burst, clock()

    def allows_one_more(self) -> bool:
        now = self._clock()
        self._left = min(self.burst, self._left + (now - self._at) * self.per_second)
        self._at = now
        self._left -= 1
        return self._left >= 0
