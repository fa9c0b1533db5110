"""Who may talk to the player's server, and what is refused: every attack that it is meant to withstand."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra play: pip install 'dreamer4[play]'")
pytest.importorskip("websockets", reason="needs the extra play: pip install 'dreamer4[play]'")

import websockets.sync.client
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from dreamer.player import server
from dreamer.player.protocol import MAX_MESSAGE, parse
from dreamer.player.seat import MAX_COMMANDS
from dreamer.player.security import HEADERS, Rate, host_name
from dreamer.player.server import Player
from dreamer.player.source import DreamSource

TOKEN, HOST = "secret", "127.0.0.1:9999"
WS = f"ws://{HOST}/dream"
OURS = {"origin": f"http://{HOST}"}
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def client(source: DreamSource) -> Iterator[TestClient]:
    with TestClient(Player(source, TOKEN).app, base_url=f"http://{HOST}") as client:
        yield client


def refusal(client: TestClient, address: str = f"{WS}?token={TOKEN}", **headers: str) -> str:
    """Why a handshake is refused."""
    with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect(address, headers=headers):
        pass
    return caught.value.reason


# ---- who may come in


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:9999", "10.0.0.1:9999", "localhost.", "", "127.0.0.1@evil.example"]
)
def test_foreign_names_are_refused_whatever_else_is_right(client: TestClient, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}"} | BEARER
    assert client.get("/", headers=headers).status_code == 400  # DNS rebinding
    assert "this machine only" in refusal(client, **headers)


@pytest.mark.parametrize("host", ["127.0.0.1:9999", "localhost:9999", "LOCALHOST", "[::1]:9999"])
def test_names_of_this_machine_are_known(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1:1234", "https://127.0.0.1:9999", "null", "http://localhost:9999"]
)
def test_foreign_pages_are_refused(client: TestClient, origin: str) -> None:
    assert "not ours" in refusal(client, origin=origin)
    assert client.post("/image", headers=BEARER | {"origin": origin}).status_code == 403
    assert client.get("/recording.mp4", headers=BEARER | {"origin": origin}).status_code == 403


def test_a_websocket_and_a_post_without_an_origin_are_refused(client: TestClient) -> None:
    assert "not ours" in refusal(client)
    assert client.post("/image", headers=BEARER).status_code == 403


@pytest.mark.parametrize("token", ["", "secreT", "secret2", "secre", "é", "%FF", "x&token=secret"])
def test_wrong_tokens_are_refused(client: TestClient, token: str) -> None:
    assert "wrong token" in refusal(client, f"{WS}?token={token}", **OURS)  # of two, the first counts
    given = {"authorization": f"Bearer {token}".encode()}
    assert client.get("/recording.mp4", headers=given).status_code == 403
    assert client.post("/image", headers=given | OURS).status_code == 403


def test_what_is_not_there_is_not_told_without_the_token(client: TestClient) -> None:
    assert client.get("/../config.yaml").status_code == client.get("/nothing").status_code == 403
    assert client.get("/nothing", headers=BEARER).status_code == 404
    assert client.get("/server.py", headers=BEARER).status_code == 404
    assert client.get("/recording.mp4?session=guess", headers=BEARER).status_code == 404
    assert client.post("/image?session=guess", headers=BEARER | OURS).status_code == 404


def test_the_page_is_whole_and_every_answer_has_the_headers(client: TestClient) -> None:
    for path in ("/", "/main.js", "/hands.js", "/lines.js", "/link.js", "/player.css", "/nothing"):
        answer = client.get(path)
        assert answer.status_code == (403 if path == "/nothing" else 200)
        assert all(answer.headers[name] == value for name, value in HEADERS.items())
    page = client.get("/").text
    assert "style=" not in page and "<script>" not in page and "//" not in page.replace("<!--", "")  # what the policy forbids, and no CDN
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_host_names_lose_their_port() -> None:
    assert [host_name(h) for h in ("a:1", "a", "[::1]:80", "[::1]", "a:b", "A:9")] == ["a", "a", "[::1]", "[::1]", "a:b", "a"]


# ---- what is refused once inside


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Invalid JSON"),
        ("not JSON", "Invalid JSON"),
        ("[]", "valid dict|object"),
        ("{}", "discriminator"),
        ('{"type": "shutdown"}', "does not match"),
        ('{"type": "pause"}', "pause.value: Field required"),
        ('{"type": "pause", "value": 1}', "valid boolean"),
        ('{"type": "pause", "value": true, "sudo": true}', "pause.sudo: Extra inputs are not permitted"),
        ('{"type": "settings", "fps": NaN}', "fps"),
        ('{"type": "settings", "fps": 1e9}', "less than or equal to 120"),
        ('{"type": "settings", "seed": -1}', "greater than or equal to 0"),
        ('{"type": "input", "number": 1, "pressed": [-1]}', "greater than or equal to 0"),
        ('{"type": "input", "number": 1, "turn": [Infinity, 0]}', "turn"),
        (json.dumps({"type": "input", "number": 1, "pressed": [0] * 65}), "at most 64"),
        (json.dumps({"type": "restart", "where": "same", "x": "y" * MAX_MESSAGE}), f"more than {MAX_MESSAGE} bytes"),
        ("[" * 4000, "Invalid JSON"),
    ],
)
def test_messages_that_mean_nothing(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("send", "code"),
    [
        (lambda ws: ws.send_text("not JSON"), server.BAD_MESSAGE),
        (lambda ws: ws.send_text('{"type": "pause", "value": true, "sudo": 1}'), server.BAD_MESSAGE),
        (lambda ws: ws.send_text('{"type": "input", "number": 1, "pressed": [63]}'), server.BAD_MESSAGE),
        (lambda ws: ws.send_bytes(b'{"type": "step"}'), server.BAD_MESSAGE),
        (lambda ws: ws.send_text("x" * (MAX_MESSAGE + 1)), server.TOO_BIG),
    ],
    ids=["not json", "unknown field", "no such button", "bytes", "too large"],
)
def test_a_page_that_breaks_the_rules_is_shown_out(client: TestClient, send: Callable[[WebSocketTestSession], Any], code: int) -> None:
    with client.websocket_connect(f"{WS}?token={TOKEN}", headers=OURS) as socket:
        send(socket)
        assert shown_out(socket)["code"] == code


def shown_out(socket: WebSocketTestSession) -> dict[str, Any]:
    """What closes the connection."""
    while (message := socket.receive())["type"] != "websocket.close":
        pass
    assert message["reason"]
    return dict(message)


def test_more_messages_than_allowed(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "RATE", 1e-6)  # in no time that a test takes does the bucket fill again
    with client.websocket_connect(f"{WS}?token={TOKEN}", headers=OURS) as socket:
        for _ in range(int(server.BURST) + 1):
            socket.send_text('{"type": "seen", "frame": 0}')
        assert shown_out(socket)["code"] == server.TOO_MANY


def test_more_commands_than_can_be_done(source: DreamSource) -> None:
    player, is_over = Player(source, TOKEN), threading.Event()
    with TestClient(player.app, base_url=f"http://{HOST}") as client:
        with client.websocket_connect(f"{WS}?token={TOKEN}", headers=OURS) as socket:
            while not socket.receive().get("bytes"):
                pass
            player._workers.submit(is_over.wait)  # from now on nothing gets done
            for _ in range(MAX_COMMANDS + 2):  # one is being done
                socket.send_text('{"type": "restart", "where": "random"}')
            message = shown_out(socket)
            assert message["code"] == server.BAD_MESSAGE and "commands wait" in message["reason"]
        is_over.set()


def test_rates_are_a_bucket() -> None:
    now = [0.0]
    rate = Rate(10.0, 3.0, clock=lambda: now[0])
    assert [rate.allows_one_more() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.25  # 2.5 more, and one is owed
    assert [rate.allows_one_more() for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["GET / HTTP/1.1", "Host: {host}"], 200),
        (["GET / HTTP/1.0"], 400),
        (["GET / HTTP/1.1", "Host: {host}", "Host: evil.example"], 400),
        (["GET / HTTP/1.1", "Host: evil.example", "X-Forwarded-Host: {host}"], 400),
        (["GET http://evil.example/ HTTP/1.1", "Host: evil.example"], 400),
        (["GET /../config.yaml HTTP/1.1", "Host: {host}"], 403),
        (["GET /..%2fconfig.yaml HTTP/1.1", "Host: {host}", "Authorization: Bearer {token}"], 404),
        (["GET /recording.mp4?token={token} HTTP/1.1", "Host: {host}"], 403),
        (["POST /image HTTP/1.1", "Host: {host}", "Authorization: Bearer {token}", "Content-Length: 0"], 403),
        (["not HTTP"], 400),
    ],
)
def test_requests_over_a_real_connection(serve: Callable[..., Any], lines: list[str], status: int) -> None:
    here = serve()
    request = "".join(f"{line}\r\n" for line in [*lines, "Connection: close", ""]).format(host=here.host, token=here.token)
    with socket.create_connection(("127.0.0.1", int(here.host.rpartition(":")[2])), timeout=60) as wire:
        wire.sendall(request.encode())
        answer = b""
        while b"\r\n" not in answer and (part := wire.recv(4096)):
            answer += part
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_nobody_but_this_machine_is_listened_to(source: DreamSource, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = []

    def run(self: Any, sockets: list[socket.socket]) -> None:
        bound.extend(listener.getsockname()[0] for listener in sockets)

    monkeypatch.setattr("uvicorn.Server.run", run)
    server.serve(source, port=0, say=lambda link: None)
    assert bound == ["127.0.0.1"]


def test_a_handshake_and_a_message_too_large_over_a_real_connection(serve: Callable[..., Any]) -> None:
    here = serve()
    address = f"ws://{here.host}/dream?token={here.token}"
    for wrong in ({"origin": "http://evil.example"}, {"origin": None}):
        with pytest.raises(InvalidStatus) as refused:
            websockets.sync.client.connect(address, **wrong)
        assert refused.value.response.status_code == 403
    with websockets.sync.client.connect(address, origin=f"http://{here.host}") as ws:
        ws.send("x" * (1 << 20))
        assert closing_code(ws) == server.TOO_BIG
    with websockets.sync.client.connect(address, origin=f"http://{here.host}") as ws:
        with contextlib.suppress(ConnectionClosed):  # it may be closed before all parts are sent
            ws.send(["x" * 2000] * 5)
        assert closing_code(ws) == server.TOO_BIG
    with websockets.sync.client.connect(address, origin=f"http://{here.host}") as ws:
        with contextlib.suppress(ConnectionClosed):
            while True:
                ws.send('{"type": "seen", "frame": 0}')
        assert closing_code(ws) == server.TOO_MANY


def closing_code(ws: Any) -> int:
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            ws.recv(timeout=60)
    return closed.value.rcvd.code
