"""The page in a real browser. Nothing in it may need what its content security policy forbids: the policy is on in every test."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamer.data import EpisodeStore
from dreamer.player.source import DreamSource

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """A page, with what tests ask it. Playwright's own functions that evaluate text in the page are what the policy forbids."""

    def __init__(self, context: Any, link: str) -> None:
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(link)
        self.until(lambda: self.index >= 1, "the first dreamt frame")

    def until(self, is_it: Callable[[], bool], what: str, seconds: float = 8) -> None:
        deadline = time.monotonic() + seconds
        while not is_it():
            assert time.monotonic() < deadline, f"no {what} in {seconds} s; problem: {self.text('problem')!r}; {self.complaints}"
            self.page.wait_for_timeout(20)

    @property
    def index(self) -> int:
        return int(self.page.locator("body").get_attribute("data-index") or -1)

    def text(self, name: str) -> str:
        return self.page.locator(f"#{name}").text_content() or ""

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def picture(self, name: str = "dream") -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.page.locator(f"#{name}").screenshot())).convert("RGB"))

    def step(self, index: int) -> None:
        self.press("n")
        self.until(lambda: self.index == index, f"frame {index}")

    def pause(self) -> None:
        self.press("p")
        self.until(lambda: "paused" in self.text("notice"), "pause")
        self.page.wait_for_timeout(200)  # a frame may still be on its way

    def restart(self) -> None:
        self.press("r")
        self.until(lambda: self.index == 0, "restart")


@pytest.fixture
def visit(browser: Any, serve: Callable[..., Any]) -> Iterator[Callable[..., Tab]]:
    contexts, tabs = [], []

    def open_tab(link: str, context: Any = None, **settings: Any) -> Tab:
        if context is None:
            contexts.append(context := browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | settings))
        tabs.append(Tab(context, link))
        return tabs[-1]

    yield open_tab  # pages close before servers do
    for context in contexts:
        context.close()
    assert [tab.complaints for tab in tabs if tab.complaints] == []


def test_the_page_plays_at_the_recordings_rate(visit: Callable[..., Tab], serve: Callable[..., Any], source: DreamSource) -> None:
    tab = visit(serve().link)
    assert tab.text("link") == "connected" and tab.text("name") == source.name
    tab.until(lambda: tab.index >= 15, "15 frames")
    assert 8 < float(tab.text("fps")) < 12
    assert [tab.page.locator("#pad button").nth(i).text_content() for i in range(5)] == ["left←", "right→", "up↑", "down↓", "doE"]
    assert tab.page.locator("#signals .signal").count() == 3
    assert tab.page.locator("#real-figure").is_visible() and tab.page.locator("#offers img").count() == 12
    assert tab.picture().std() > 5 and np.abs(tab.picture().astype(int) - tab.picture("real")).mean() > 0


def test_keys_change_the_dream(visit: Callable[..., Tab], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link)
    tab.pause()

    def after(key: str) -> np.ndarray:
        tab.restart()
        tab.page.keyboard.down(key)
        assert tab.page.locator("#pad button.on").count() == 1
        tab.step(1)
        tab.step(2)
        tab.page.keyboard.up(key)
        return tab.picture()

    left, right, again = after("ArrowLeft"), after("d"), after("a")
    assert np.array_equal(left, again) and not np.array_equal(left, right)
    assert tab.page.locator("#pad button.on").count() == 0


def test_a_key_is_answered_and_the_delay_is_shown(visit: Callable[..., Tab], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link)
    for _ in range(3):
        tab.press("e")
        tab.page.wait_for_timeout(150)
    tab.until(lambda: tab.text("latency").endswith("ms"), "delay")
    assert 0 < int(tab.text("latency").split()[0]) < 1000


def test_typing_a_number_is_not_playing(visit: Callable[..., Tab], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link)
    tab.page.locator("#seed").click()
    tab.press("m")
    tab.page.locator("#seed").fill("5")
    tab.press("Enter")
    tab.page.locator("#num_steps").select_option("1")
    tab.page.locator("#rate").fill("20")
    tab.page.locator("#dream").click()
    assert tab.text("who") == "you play"
    tab.press("r")
    tab.until(lambda: tab.text("start") != "" and tab.page.locator("#seed").input_value() == "5", "settings")
    tab.until(lambda: tab.text("fps") != "–" and float(tab.text("fps")) > 14, "faster clock")


def test_the_policy_takes_over_and_gives_back(visit: Callable[..., Tab], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link)
    tab.press("m")
    tab.until(lambda: tab.text("who") == "agent plays", "hand-over")
    tab.until(lambda: tab.page.locator("#pad button.on").count() == 1, "the agent's keys")
    tab.page.get_by_role("button", name="Take over").click()
    tab.until(lambda: tab.text("who") == "you play", "the way back")


def test_a_recording_is_downloaded_and_stored(visit: Callable[..., Tab], serve: Callable[..., Any], source: DreamSource) -> None:
    tab = visit(serve().link)
    tab.pause()
    tab.page.locator("#record").click()
    tab.until(lambda: "Recording" in tab.text("recorded"), "recording")
    for _ in range(3):
        tab.step(tab.index + 1)
    tab.page.locator("#record").click()
    tab.until(lambda: tab.text("recorded") == "4 frames recorded.", "its end")
    with tab.page.expect_download() as download:
        tab.page.locator("#download").click()
    assert download.value.suggested_filename == "dream.mp4" and Path(download.value.path()).read_bytes()[4:8] == b"ftyp"
    tab.page.locator("#store").click()
    tab.until(lambda: "Stored as episode 0" in tab.text("stored"), "the store")
    assert len(EpisodeStore(source.run.path / "played").episode(0)) == 4


def test_starts_are_chosen(visit: Callable[..., Tab], serve: Callable[..., Any], tmp_path: Path) -> None:
    tab = visit(serve().link)
    tab.pause()
    tab.page.locator("#offers button").nth(3).click()
    title = tab.page.locator("#offers button").nth(3).get_attribute("title")
    tab.until(lambda: tab.text("start") == f"from {title}", title)
    tab.page.locator("#episode").fill("2")
    tab.page.locator("#place-step").fill("7")
    tab.page.get_by_role("button", name="Go").click()
    tab.until(lambda: tab.text("start") == "from episode 2, step 7", "episode 2")
    tab.page.locator("#place-step").fill("99")
    tab.page.get_by_role("button", name="Go").click()
    tab.until(lambda: "step is 99" in tab.text("problem"), "complaint")
    tab.page.locator("#environment").click()
    tab.until(lambda: "new episode" in tab.text("start"), "real episode")
    Image.new("RGB", (90, 60), (200, 30, 30)).save(tmp_path / "red.png")
    tab.page.locator("#image").set_input_files(tmp_path / "red.png")
    tab.until(lambda: tab.text("start") == "from your image", "image")
    tab.until(lambda: not tab.page.locator("#real-figure").is_visible(), "a dream without a real environment")
    (tmp_path / "bad.png").write_bytes(b"no image")
    tab.page.locator("#image").set_input_files(tmp_path / "bad.png")
    tab.until(lambda: "no known format" in tab.text("problem"), "complaint")
    tab.complaints.clear()  # the browser notes that the server said 422


def test_two_tabs_play_two_dreams(visit: Callable[..., Tab], serve: Callable[..., Any]) -> None:
    here = serve()
    one = visit(here.link)
    two = visit(here.link, context=one.page.context)
    one.page.bring_to_front()
    one.pause()
    two.page.bring_to_front()
    index = two.index
    two.until(lambda: two.index >= index + 5, "five frames more")
    assert "paused" in one.text("notice") and "paused" not in two.text("notice") and len(here.player.seats) == 2


class Wire:
    """Passes bytes on to a server, until it is cut."""

    def __init__(self, host: str) -> None:
        self._to = host.rpartition(":")[0], int(host.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self.is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.is_cut:
                near.close()
                continue
            far = socket.create_connection(self._to)
            self._ends += [near, far]
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the wire is cut
            while data := source.recv(65536):
                sink.sendall(data)

    def cut(self) -> None:
        self.is_cut = True
        for end in self._ends:
            with contextlib.suppress(OSError):  # it is closed already
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self._listener.close()


def test_a_lost_connection_comes_back_to_the_same_dream(visit: Callable[..., Tab], serve: Callable[..., Any]) -> None:
    here = serve()
    wire = Wire(here.host)
    tab = visit(f"http://{wire.host}/#{here.token}")
    tab.page.keyboard.down("ArrowLeft")
    tab.until(lambda: tab.index >= 5, "five frames")
    wire.cut()
    tab.until(lambda: tab.text("link") == "reconnecting", "loss")
    left = tab.index
    assert tab.page.locator("#pad button.on").count() == 0
    tab.page.wait_for_timeout(600)
    assert tab.index == left and len(here.player.seats) == 1
    wire.is_cut = False
    tab.until(lambda: tab.text("link") == "connected", "connection")
    tab.until(lambda: tab.index > left, "frame")
    assert tab.index < left + 10 and len(here.player.seats) == 1  # it went on where it was
    tab.complaints.clear()  # the browser notes every attempt that failed
    wire.close()


def test_a_reload_comes_back_to_the_same_dream(visit: Callable[..., Tab], serve: Callable[..., Any]) -> None:
    here = serve()
    tab = visit(here.link)
    tab.pause()
    tab.step(tab.index + 1)
    left, picture = tab.index, tab.picture()
    tab.page.reload()
    tab.until(lambda: tab.index == left, "the same frame")
    assert np.array_equal(tab.picture(), picture) and len(here.player.seats) == 1


def test_an_old_link_is_explained(visit: Callable[..., Tab], serve: Callable[..., Any], browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"http://{serve().host}/#an-old-token")
    page.get_by_text("is the server running, and this its newest link").wait_for(timeout=8000)
    page.close()


def test_a_phone_has_buttons_to_touch(visit: Callable[..., Tab], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    for button in tab.page.get_by_role("button").all():
        if box := button.bounding_box():
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    lowest = [tab.page.locator(f"#{name}").bounding_box() for name in ("dream", "pad", "pause")]
    assert all(box["y"] + box["height"] <= 740 for box in lowest)  # what playing needs is there without scrolling
    for button in tab.page.locator("#pad button").all():
        assert button.bounding_box()["height"] >= 44
    tab.page.locator("#pause").tap()
    tab.until(lambda: "paused" in tab.text("notice"), "pause")
    tab.page.locator("#pad button").first.tap()
    assert tab.page.locator("#pad button.on").count() == 0  # let go again


@pytest.mark.slow
@pytest.mark.skipif("DREAMER_SOAK_SECONDS" not in os.environ, reason="minutes of play; make soak")
def test_memory_stays_flat_over_a_long_play(visit: Callable[..., Tab], serve: Callable[..., Any]) -> None:
    """Kilobytes of the server's process and of the page's heap, after a first tenth of the time and at the end."""
    tab = visit(serve().link)
    tab.page.locator("#rate").fill("60")
    tab.page.locator("#dream").click()
    tab.press("m")
    tools = tab.page.context.new_cdp_session(tab.page)
    tools.send("Performance.enable")

    def kilobytes() -> tuple[int, int]:
        tools.send("HeapProfiler.collectGarbage")
        metrics = {m["name"]: m["value"] for m in tools.send("Performance.getMetrics")["metrics"]}
        resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(resident.split()[1]), int(metrics["JSHeapUsedSize"] / 1024)

    seconds = float(os.environ["DREAMER_SOAK_SECONDS"])
    tab.page.wait_for_timeout(100 * seconds)
    before, first = kilobytes(), tab.index
    tab.page.wait_for_timeout(900 * seconds)
    after = kilobytes()
    print(f"\n{tab.index - first} frames: server {before[0]} -> {after[0]} kB, page {before[1]} -> {after[1]} kB")
    assert tab.index > first and after[0] < before[0] + 20_000 and after[1] < before[1] + 2_000
