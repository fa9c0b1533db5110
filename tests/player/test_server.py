"""The server: who may come in, what is refused, and what survives a lost connection."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs the extra play: pip install 'dreamer4[play]'")
pytest.importorskip("websockets", reason="needs the extra play: pip install 'dreamer4[play]'")

from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from dreamer.data import EpisodeStore
from dreamer.player import server
from dreamer.player.protocol import unpack
from dreamer.player.server import Player
from dreamer.player.source import DreamSource

TOKEN, HOST = "secret", "127.0.0.1:9999"
WS = f"ws://{HOST}/dream"
OURS = {"origin": f"http://{HOST}"}
BEARER = {"authorization": f"Bearer {TOKEN}"}


@contextmanager
def visiting(source: DreamSource, **limits: Any) -> Iterator[Any]:
    player = Player(source, TOKEN, **limits)
    with TestClient(player.app, base_url=f"http://{HOST}") as client:
        client.player = player
        yield client


@pytest.fixture
def client(source: DreamSource) -> Iterator[Any]:
    with visiting(source) as client:
        yield client


def connect(client: TestClient, session: str = "", **headers: str) -> WebSocketTestSession:
    return client.websocket_connect(f"{WS}?token={TOKEN}&session={session}", headers=OURS | headers)


class Page:
    """What the page does: reads everything, and says which frames it has seen."""

    def __init__(self, socket: WebSocketTestSession) -> None:
        self.socket, self.texts, self.frames = socket, [], []

    def read(self) -> dict[str, Any]:
        message = self.socket.receive()
        if message["type"] == "websocket.close":
            raise WebSocketDisconnect(message["code"], message["reason"])
        if message.get("text"):
            self.texts.append(json.loads(message["text"]))
            return self.texts[-1]
        header, pictures = unpack(message["bytes"])
        self.frames.append((header, [np.asarray(Image.open(io.BytesIO(p)).convert("RGB")) for p in pictures]))
        self.say(type="seen", frame=header["frame"])
        return {"type": "frame"} | header

    def until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        for _ in range(300):
            if is_it(message := self.read()):
                return message
        raise AssertionError(f"it did not come; last {self.texts[-1]}")

    def of(self, kind: str) -> dict[str, Any]:
        return self.until(lambda message: message["type"] == kind)

    def say(self, **message: Any) -> None:
        self.socket.send_text(json.dumps(message))


# ---- how many dreams


def test_a_dream_that_cannot_begin_says_why(source: DreamSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> None:
        raise ValueError("shard-000000: is damaged")

    with visiting(source, max_seats=1) as client:
        with monkeypatch.context() as patch:
            patch.setattr(source, "recorded", lost)
            with pytest.raises(WebSocketDisconnect) as caught, connect(client) as socket:
                Page(socket).of("hello")
            assert caught.value.code == server.FAILED and "is damaged" in caught.value.reason
        with connect(client) as socket:  # its place is free
            Page(socket).of("hello")


def test_dreams_are_limited_and_places_become_free(source: DreamSource) -> None:
    with visiting(source, max_seats=2, linger=60.0) as client, connect(client) as first:
        with connect(client) as second:
            Page(first).of("hello")
            Page(second).of("hello")
            with pytest.raises(WebSocketDisconnect) as caught, connect(client) as third:
                Page(third).of("hello")
            assert caught.value.code == server.FULL and "all 2 dreams" in caught.value.reason
        with connect(client) as fourth:  # the second has left: its dream makes room
            assert not Page(fourth).of("hello")["resumed"]


# ---- playing


def test_hello_says_what_a_page_needs(client: TestClient, source: DreamSource) -> None:
    with connect(client) as socket:
        page = Page(socket)
        hello = page.of("hello")
        assert hello["name"] == source.name and hello["fps"] == 10 and hello["shape"] == [64, 64] and not hello["resumed"]
        assert [b["label"] for b in hello["controls"]["buttons"]] == ["left", "right", "up", "down", "do"]
        assert hello["num_steps"] == [1, 2, 4, 8] and hello["most_context"] == 8 and len(hello["offers"]) == 12
        state = page.of("state")
        assert not state["paused"] and state["policy"] is None and state["settings"] == {"num_steps": 2, "context": 3, "seed": 0, "fps": 10}
        page.of("frame")
        assert [p.shape for p in page.frames[0][1]] == [(64, 64, 3)] * 2  # the dream, and the real environment beside it


def test_keys_reach_the_dream(client: TestClient) -> None:
    with connect(client) as socket:
        page = Page(socket)
        page.say(type="input", number=7, pressed=[4])
        header = page.until(lambda m: m["type"] == "frame" and m["input"] == 7 and m["index"] > 0)
        assert header["buttons"] == [4] and not header["policy"]
        page.say(type="input", number=8, pressed=[])
        assert page.until(lambda m: m["type"] == "frame" and m["input"] == 8)["buttons"] == []


def test_a_key_that_is_held_is_held_in_the_next_dream_and_a_tap_before_it_is_not(client: TestClient) -> None:
    with connect(client) as socket:
        page = Page(socket)
        page.say(type="pause", value=True)
        page.until(lambda m: m["type"] == "state" and m["paused"])
        page.say(type="input", number=1, pressed=[0])
        page.say(type="input", number=2, pressed=[2])
        page.say(type="restart", where="recorded", episode=2, step=5)
        page.say(type="step")
        assert page.until(lambda m: m["type"] == "frame" and m["index"] == 1 and m["input"] == 2)["buttons"] == [2]
        page.say(type="input", number=3, pressed=[0])
        page.say(type="input", number=4, pressed=[])
        page.say(type="restart", where="same")
        page.say(type="step")
        assert page.until(lambda m: m["type"] == "frame" and m["index"] == 1 and m["input"] == 4)["buttons"] == []


def test_pause_step_restart_and_hand_over(client: TestClient) -> None:
    with connect(client) as socket:
        page = Page(socket)
        page.say(type="pause", value=True)
        page.until(lambda m: m["type"] == "state" and m["paused"])
        page.say(type="restart", where="recorded", episode=2, step=5)
        page.until(lambda m: m["type"] == "state" and m["start"] == "episode 2, step 5")
        page.say(type="step")
        assert page.until(lambda m: m["type"] == "frame" and m["index"] > 0)["index"] == 1
        page.say(type="policy", mode="argmax")  # who lets the agent play wants to see it play
        page.until(lambda m: m["type"] == "state" and m["policy"] == "argmax" and not m["paused"])
        assert page.until(lambda m: m["type"] == "frame" and m["index"] == 4)["policy"]
        page.say(type="step")
        page.until(lambda m: m["type"] == "state" and m["paused"])
        page.say(type="policy", mode="sampled")  # it played already: still one frame at a time
        assert page.until(lambda m: m["type"] == "state" and m["policy"] == "sampled")["paused"]
        page.say(type="policy", mode=None)
        assert page.until(lambda m: m["type"] == "state" and m["policy"] is None)["paused"]
        page.say(type="restart", where="same")
        assert page.until(lambda m: m["type"] == "frame" and m["index"] < 2)["index"] == 0
        page.say(type="restart", where="environment")
        page.until(lambda m: m["type"] == "state" and m["start"] == "new episode, seed 0")
        page.say(type="step")
        assert page.until(lambda m: m["type"] == "frame" and m["index"] == 1)["policy"] is False


def test_the_same_settings_give_the_same_frames(client: TestClient) -> None:
    def third_frame(seed: int) -> np.ndarray:
        page.say(type="settings", seed=seed)
        page.say(type="restart", where="recorded", episode=2, step=5)
        for _ in range(3):
            page.say(type="step")
        page.until(lambda m: m["type"] == "frame" and m["index"] == 3)
        return page.frames[-1][1][0]

    with connect(client) as socket:
        page = Page(socket)
        page.say(type="pause", value=True)
        page.until(lambda m: m["type"] == "state" and m["paused"])
        one, again, other = third_frame(1), third_frame(1), third_frame(2)
        assert np.array_equal(one, again) and not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"type": "settings", "num_steps": 3}, "expected one of 1, 2, 4, 8"),
        ({"type": "settings", "context": 100}, "expected 1 to 8 latent steps"),
        ({"type": "restart", "where": "recorded", "episode": 1000, "step": 0}, "episode is 1000"),
        ({"type": "restart", "where": "recorded"}, "an episode and a step"),
        ({"type": "store"}, "there is no recording"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_dream_goes_on(client: TestClient, message: dict[str, Any], said: str) -> None:
    with connect(client) as socket:
        page = Page(socket)
        page.say(**message)
        assert said in page.of("problem")["text"]
        index = page.of("frame")["index"]
        page.until(lambda m: m["type"] == "frame" and m["index"] > index)


def test_a_recording_is_downloaded_and_stored(client: TestClient, source: DreamSource) -> None:
    with connect(client) as socket:
        page = Page(socket)
        session = page.of("hello")["session"]
        where = f"/recording.mp4?session={session}"
        assert client.get(where, headers=BEARER).status_code == 409
        page.say(type="pause", value=True)
        page.say(type="record", value=True)
        page.say(type="step")
        page.say(type="step")
        page.say(type="record", value=False)
        page.until(lambda m: m["type"] == "state" and m["recorded"] == 3)
        assert client.get(where, headers={"host": "evil.example"} | BEARER).status_code == 400
        video = client.get(where, headers=BEARER)
        assert video.status_code == 200 and video.content[4:8] == b"ftyp" and "attachment" in video.headers["content-disposition"]
        page.say(type="store")
        assert "episode 0 of" in page.of("stored")["text"]
    assert len(EpisodeStore(source.run.path / "played").episode(0)) == 3


def test_an_image_becomes_the_start(client: TestClient) -> None:
    grey = io.BytesIO()
    Image.new("RGB", (200, 100), (90, 90, 90)).save(grey, "PNG")
    with connect(client) as socket:
        page = Page(socket)
        where = f"/image?session={page.of('hello')['session']}"
        assert client.post(where, content=grey.getvalue(), headers=BEARER | OURS).status_code == 204
        page.until(lambda m: m["type"] == "state" and m["start"] == "your image")
        cut = client.post(where, content=grey.getvalue()[:-30], headers=BEARER | OURS)
        assert cut.status_code == 422 and "cannot be decoded" in cut.text
        assert client.post(where, content=b"GIF89a", headers=BEARER | OURS).status_code == 422
        assert client.post(where, content=bytes(5 << 20), headers=BEARER | OURS).status_code == 413
    assert client.post(where, content=grey.getvalue(), headers=BEARER | OURS).status_code == 422  # nobody is connected


def test_where_nothing_is_no_action_the_dream_waits_for_a_key(source: DreamSource) -> None:
    player = Player(source, TOKEN)
    player.controls.idle = None
    with TestClient(player.app, base_url=f"http://{HOST}") as client, connect(client) as socket:
        page = Page(socket)
        assert page.of("hello")["controls"]["has_idle"] is False
        assert page.of("frame")["index"] == 0
        time.sleep(0.4)
        page.say(type="input", number=1, pressed=[2])
        assert page.of("frame")["index"] == 1  # four frames would have passed
        page.say(type="input", number=2, pressed=[])
        page.say(type="step")
        assert "hold a key" in page.of("problem")["text"]
        page.say(type="pause", value=False)
        page.say(type="policy", mode="argmax")  # the agent always has something to do
        page.until(lambda m: m["type"] == "frame" and m["policy"] and m["index"] > 5)


# ---- connections that are lost, slow, or two


def test_a_lost_connection_keeps_its_dream_and_time_stands_still(client: Any, wait_for: Callable[..., None]) -> None:
    with connect(client) as socket:
        page = Page(socket)
        session = page.of("hello")["session"]
        page.say(type="input", number=1, pressed=[0])
        page.until(lambda m: m["type"] == "frame" and m["index"] >= 3)
    (seat,) = client.player.seats.values()
    wait_for(lambda: seat.connection is None, "notice of the loss")
    client.player._workers.submit(int).result()  # the frame that was being made
    left = seat.dream.now.index
    time.sleep(0.5)
    with connect(client, session) as socket:
        page = Page(socket)
        assert page.of("hello")["resumed"]
        header = page.of("frame")
        assert header["index"] == left >= 3
        later = page.until(lambda m: m["type"] == "frame" and m["index"] > header["index"])
        assert later["buttons"] == []  # nothing is held any more


def test_forgotten_dreams_are_cleared_away(source: DreamSource, wait_for: Callable[..., None]) -> None:
    with visiting(source, linger=0.1) as client:
        with connect(client) as socket:
            session = Page(socket).of("hello")["session"]
        wait_for(lambda: not client.player.seats, "end of the dream")
        with connect(client, session) as socket:
            hello = Page(socket).of("hello")
            assert not hello["resumed"] and hello["session"] != session


def test_who_comes_back_while_dreams_are_cleared_away_keeps_his(source: DreamSource, wait_for: Callable[..., None]) -> None:
    with visiting(source) as client:
        sessions, is_over = [], threading.Event()
        for _ in range(2):
            with connect(client) as socket:
                sessions.append(Page(socket).of("hello")["session"])
        seats = client.player.seats
        wait_for(lambda: all(seat.connection is None for seat in seats.values()), "two left dreams")
        client.player._workers.submit(is_over.wait)  # the first takes its time to close
        sweeps = [client.portal.start_task_soon(client.player._drop, lambda seat: True)]
        wait_for(lambda: list(seats) == sessions[1:], "sweep")
        with connect(client, sessions[1]) as socket:
            sweeps.append(client.portal.start_task_soon(client.player._drop, lambda seat: True))
            is_over.set()
            assert Page(socket).of("hello")["resumed"]
            for sweep in sweeps:
                sweep.result()
            assert list(seats) == sessions[1:]


def test_two_pages_that_come_at_once_get_the_places_of_two_that_left(source: DreamSource, wait_for: Callable[..., None]) -> None:
    with visiting(source, max_seats=2) as client:
        for _ in range(2):
            with connect(client) as socket:
                Page(socket).of("hello")
        wait_for(lambda: all(seat.connection is None for seat in client.player.seats.values()), "two left dreams")
        is_over = threading.Event()
        client.player._workers.submit(is_over.wait)  # places take their time to become free
        with connect(client) as one:
            wait_for(lambda: len(client.player.seats) == 1, "place that becomes free")
            with connect(client) as two:
                wait_for(lambda: len(client.player.seats) == 2, "other page that takes it")
                is_over.set()
                assert {Page(one).of("hello")["session"], Page(two).of("hello")["session"]} == set(client.player.seats)


def test_a_second_window_takes_the_dream_over(client: TestClient) -> None:
    with connect(client) as first:
        page = Page(first)
        session = page.of("hello")["session"]
        with connect(client, session) as second:
            assert Page(second).of("hello")["resumed"]
            with pytest.raises(WebSocketDisconnect) as caught:
                page.until(lambda message: False)
            assert caught.value.code == server.TAKEN
            Page(second).of("frame")


def test_a_page_that_sees_nothing_gets_two_frames_and_then_the_newest(client: Any, wait_for: Callable[..., None]) -> None:
    with connect(client) as socket:
        page = Page(socket)
        page.of("hello")
        page.say(type="settings", fps=60)
        numbers = []
        while len(numbers) < 2:
            message = socket.receive()
            if message.get("bytes"):
                numbers.append(unpack(message["bytes"])[0]["frame"])
        (seat,) = client.player.seats.values()
        wait_for(lambda: seat.dream.now.index > 8, "dream that goes on; two frames are on their way, unseen")
        page.say(type="seen", frame=numbers[-1])
        header = page.of("frame")
        assert header["frame"] > numbers[-1] + 2 and header["dropped"] > 0


def test_two_dreams_do_not_know_each_other(client: TestClient) -> None:
    with connect(client) as a, connect(client) as b:
        one, two = Page(a), Page(b)
        assert one.of("hello")["session"] != two.of("hello")["session"]
        one.say(type="pause", value=True)
        one.until(lambda m: m["type"] == "state" and m["paused"])
        two.say(type="input", number=5, pressed=[2])
        assert two.until(lambda m: m["type"] == "frame" and m["input"] == 5)["buttons"] == [2]
        one.say(type="step")
        assert one.until(lambda m: m["type"] == "frame" and m["index"] > 0)["buttons"] == []


def test_a_port_that_is_taken_is_named(source: DreamSource, serve: Callable[..., Any]) -> None:
    port = int(serve().host.rpartition(":")[2])
    with pytest.raises(ValueError, match=f"port {port}: Address already in use; choose another with --port"):
        server.serve(source, port=port, say=print)
