"""The player's server: one page and one websocket, for people on this machine. ``security.py`` decides who may come in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from dreamer.player.controls import Controls
from dreamer.player.images import MAX_UPLOAD, decode_upload
from dreamer.player.protocol import MAX_MESSAGE, parse
from dreamer.player.seat import Seat
from dreamer.player.security import Guard, Rate
from dreamer.player.source import DreamSource

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
FILES = {f"/{'' if path.name == 'index.html' else path.name}": path for path in sorted(STATIC.iterdir()) if path.suffix in TYPES}

MAX_SEATS = 4
LINGER = 120.0  # seconds that a dream is kept after its connection was lost
RATE, BURST = 240.0, 480.0  # messages a second from one page
# What a closed websocket says; the page knows these numbers.
BAD_MESSAGE, TOO_BIG, TOO_MANY, FULL, TAKEN, FAILED = 4400, 1009, 4429, 4503, 4409, 4500


class Player:
    """The application: its seats, and what is served."""

    def __init__(self, source: DreamSource, token: str, *, max_seats: int = MAX_SEATS, linger: float = LINGER) -> None:
        self.source, self.controls = source, Controls(source.agent.action_space)
        self.max_seats, self.linger = max_seats, linger
        self.seats: dict[str, Seat] = {}
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="dreams")
        self._encoder = asyncio.Semaphore(1)
        routes = [Route(path, self._file(file)) for path, file in FILES.items()]
        routes += [
            Route("/image", self.upload, methods=["POST"]),
            Route("/recording.mp4", self.download),
            WebSocketRoute("/dream", self.connect),
        ]
        guard = Middleware(Guard, token=token, open_paths=frozenset(FILES))
        self.app = Starlette(routes=routes, middleware=[guard], lifespan=self._lifespan)

    @staticmethod
    def _file(path: Path) -> Callable[[Request], Response]:
        data, kind = path.read_bytes(), TYPES[path.suffix]

        def serve(request: Request) -> Response:
            return Response(data, media_type=kind)

        return serve

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(self._sweep)
            yield
            group.cancel_scope.cancel()
        for seat in self.seats.values():
            await seat.close()
        self._workers.shutdown()

    async def _sweep(self) -> None:
        while True:
            await anyio.sleep(min(5.0, self.linger))
            await self._drop(lambda seat: time.monotonic() - seat.left_at > self.linger)

    async def _drop(self, is_old: Callable[[Seat], bool]) -> None:
        """Of the seats that nobody sits in. While one is closed, somebody may come back to the next, or drop it, too."""
        for seat in list(self.seats.values()):
            if seat.id in self.seats and seat.connection is None and is_old(seat):
                del self.seats[seat.id]
                await seat.close()

    # ---- the websocket

    async def connect(self, ws: WebSocket) -> None:
        await ws.accept()
        seat = self.seats.get(ws.query_params.get("session", ""))
        is_resumed = seat is not None
        if seat is None:
            seat = await self._new_seat(ws)
            if seat is None:
                return
        elif seat.connection is not None:  # the newer window has it; the older one is told so
            seat.connection.cancel()
        seat.connection = scope = anyio.CancelScope()
        try:
            with scope:
                await seat.greet(is_resumed)
                broken = await self._serve(seat, ws)
                if broken is not None:
                    await _close(ws, *broken)
            if scope.cancelled_caught:
                await _close(ws, TAKEN, "this dream was opened in another window")
        finally:
            if seat.connection is scope:
                seat.leave()

    async def _new_seat(self, ws: WebSocket) -> Seat | None:
        while len(self.seats) >= self.max_seats and (left := [s.left_at for s in self.seats.values() if s.connection is None]):
            oldest = min(left)  # while it is closed, another page may take the place: then the next one goes
            await self._drop(lambda seat, oldest=oldest: seat.left_at == oldest)
        if len(self.seats) >= self.max_seats:
            await _close(ws, FULL, f"all {self.max_seats} dreams of this server are played in; close one of them")
            return None
        seat = Seat(self.source, self.controls, self._workers)
        self.seats[seat.id] = seat
        try:
            await seat.open()
        except BaseException as error:
            del self.seats[seat.id]
            if not isinstance(error, ValueError | OSError):
                raise
            await _close(ws, FAILED, str(error))
            return None
        return seat

    async def _serve(self, seat: Seat, ws: WebSocket) -> tuple[int, str] | None:
        """Until the page leaves, or breaks a rule: then the code and the reason to close with."""
        async with anyio.create_task_group() as group:
            group.start_soon(seat.play)
            group.start_soon(seat.send, ws)
            broken = await self._receive(seat, ws)
            group.cancel_scope.cancel()
        return broken

    async def _receive(self, seat: Seat, ws: WebSocket) -> tuple[int, str] | None:
        rate = Rate(RATE, BURST)
        while True:
            message = await ws.receive()
            if message["type"] == "websocket.disconnect":
                return None
            text = message.get("text")
            if not rate.allows_one_more():
                return TOO_MANY, f"more than {RATE:g} messages a second"
            if text is None:
                return BAD_MESSAGE, "expected JSON text"
            if len(text) > MAX_MESSAGE:
                return TOO_BIG, f"a message of more than {MAX_MESSAGE} bytes"
            try:
                seat.take(parse(text))
            except ValueError as error:
                return BAD_MESSAGE, str(error)

    # ---- plain requests

    async def upload(self, request: Request) -> Response:
        """Begin the dream of ``?session=`` anew from the image in the body."""
        seat = self.seats.get(request.query_params.get("session", ""))
        if seat is None:
            return PlainTextResponse("no such session", 404)
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MAX_UPLOAD:
                return PlainTextResponse(f"image: more than {MAX_UPLOAD >> 20} MB; save it smaller", 413)
        try:
            async with self._encoder:
                picture = await asyncio.to_thread(decode_upload, bytes(data), self.source.tokenizer.frame_shape)
            await seat.begin(picture)
        except ValueError as error:
            return PlainTextResponse(str(error), 422)
        return Response(status_code=204)

    async def download(self, request: Request) -> Response:
        """The recording of ``?session=`` as mp4."""
        seat = self.seats.get(request.query_params.get("session", ""))
        if seat is None:
            return PlainTextResponse("no such session", 404)
        try:
            async with self._encoder:
                data = await seat.mp4()
        except ValueError as error:
            return PlainTextResponse(str(error), 409)
        return Response(data, media_type="video/mp4", headers={"Content-Disposition": 'attachment; filename="dream.mp4"'})


async def _close(ws: WebSocket, code: int, reason: str) -> None:
    """``reason`` may have 123 bytes on the wire."""
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the other side was faster
        await ws.close(code, reason.encode()[:120].decode(errors="ignore"))


def serve(source: DreamSource, *, port: int, say: Callable[[str], None], token: str | None = None) -> None:
    """Serve on 127.0.0.1 until Ctrl-C; ``port`` 0: any that is free. ``say`` is told the link.

    Raises ``ValueError`` for a port that is taken.
    """
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise ValueError(f"port {port}: {os.strerror(error.errno or 0)}; choose another with --port, 0 for any that is free") from error
    token = token or secrets.token_urlsafe(24)
    config = uvicorn.Config(
        Player(source, token).app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE,
        ws_per_message_deflate=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=2,
    )
    with listener:
        say(f"http://127.0.0.1:{listener.getsockname()[1]}/#{token}")
        uvicorn.Server(config).run(sockets=[listener])
