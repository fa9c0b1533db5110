"""The page in a real browser. Nothing in it may need what its content security policy forbids: the policy is on in every test."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamer.data import EpisodeStore
from dreamer.player.source import DreamSource, open_source

pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")


def test_the_page_plays_at_the_recordings_rate(visit: Callable[..., Any], serve: Callable[..., Any], source: DreamSource) -> None:
    tab = visit(serve().link)
    assert tab.text("link") == "connected" and tab.text("name") == source.name
    tab.until(lambda: tab.index >= 15, "15 frames")
    assert float(tab.text("fps")) > 0 and tab.page.locator("#rate").input_value() == "10" and tab.seat.fps == source.fps == 10
    assert [tab.page.locator("#pad button").nth(i).text_content() for i in range(5)] == ["left←", "right→", "up↑", "down↓", "doE"]
    assert tab.page.locator("#signals .signal").count() == 3
    assert tab.page.locator("#real-figure").is_visible() and tab.page.locator("#offers img").count() == 12
    assert tab.picture().std() > 5 and np.abs(tab.picture().astype(int) - tab.picture("real")).mean() > 0


def test_keys_change_the_dream(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
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


def test_a_key_is_answered_and_the_delay_is_shown(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link)
    for _ in range(3):
        tab.press("e")
        tab.page.wait_for_timeout(150)
    tab.until(lambda: tab.text("latency").endswith("ms"), "delay")
    assert int(tab.text("latency").split()[0]) > 0


def test_typing_a_number_is_not_playing(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
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
    tab.until(lambda: tab.seat.fps == 20 and tab.seat.dream.settings.seed == 5 and tab.seat.dream.settings.num_steps == 1, "settings")
    assert tab.page.locator("#rate").input_value() == "20" and tab.page.locator("#seed").input_value() == "5"


def test_after_a_click_on_a_control_the_keys_play(visit: Callable[..., Any], serve: Callable[..., Any], tmp_path: Path) -> None:
    tab = visit(serve().link)
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")

    def plays() -> None:
        """The agent is given control by key and the way back; the space bar does what it says."""
        for who in ("agent plays", "you play"):
            tab.press("m")
            tab.until(lambda who=who: tab.text("who") == who, who)
        for is_paused in (True, False):
            tab.press("Space")
            tab.until(lambda wanted=is_paused: ("paused" in tab.text("notice")) is wanted, "pause, and its end")

    tab.page.locator("#record").click()
    plays()
    assert tab.seat.dream.is_recording  # the space bar did not press the button again
    tab.page.locator("#beside").click()
    plays()
    with tab.page.expect_file_chooser() as chooser:
        tab.page.locator("label[for=image]").click()
    chooser.value.set_files(tmp_path / "black.png")
    tab.until(lambda: tab.text("start") == "from your image", "image")
    plays()
    tab.page.locator("#mode").click()
    tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("Enter")
    plays()
    tab.page.locator("#seed").click()
    tab.page.locator("#seed").fill("7")
    tab.press("Enter")
    tab.until(lambda: tab.seat.dream.settings.seed == 7, "seed")
    plays()
    tab.page.locator("#pause").focus()  # who comes by keyboard stays where he is
    tab.press("Space")
    tab.until(lambda: "paused" in tab.text("notice"), "pause by the button")
    tab.press("Space")
    tab.until(lambda: "paused" not in tab.text("notice"), "its end by the button")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("seed", "-3", "Seed: "), ("seed", "9999999999", "Seed: "), ("context", "99", "Context: "), ("rate", "500", "Frames/s: ")],
)
def test_settings_that_cannot_be_are_said_and_put_back(
    visit: Callable[..., Any], serve: Callable[..., Any], name: str, value: str, said: str
) -> None:
    tab = visit(serve().link)
    field = tab.page.locator(f"#{name}")
    before = field.input_value()
    field.fill(value)
    tab.press("Enter")
    assert tab.text("problem").startswith(said) and "must be" in tab.text("problem") and field.input_value() == before
    tab.page.locator("#episode").fill("9999999999")  # the browser says why this is not sent
    tab.page.locator("#place-step").fill("0")
    tab.page.get_by_role("button", name="Go").click()
    index = tab.index
    tab.until(lambda: tab.index > index, "frame")
    assert tab.text("link") == "connected"


def test_the_policy_takes_over_and_gives_back(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link)
    tab.press("m")
    tab.until(lambda: tab.text("who") == "agent plays", "hand-over")
    tab.until(lambda: tab.page.locator("#pad button.on").count() == 1, "the agent's keys")
    tab.page.get_by_role("button", name="Take over").click()
    tab.until(lambda: tab.text("who") == "you play", "the way back")


def test_a_world_model_without_an_agent_says_so(visit: Callable[..., Any], serve: Callable[..., Any], run_path: Path) -> None:
    tab = visit(serve(open_source(run_path / "phase1")).link)
    assert tab.text("signals") == "Phase 1 trains no reward, value or continue."
    assert tab.page.locator("#policy").is_disabled()
    tab.press("m")
    assert tab.text("problem") == "Phase 1 trains no agent that could play." and tab.text("who") == "you play"


def test_an_agent_that_is_let_play_ends_the_pause(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link)
    tab.pause()
    left = tab.index
    tab.page.get_by_role("button", name="Let the agent play").click()
    tab.until(lambda: tab.index >= left + 3, "frames of the agent")
    assert tab.text("who") == "agent plays" and not tab.page.locator("#notice").is_visible()


def test_steps_context_and_seed_make_another_dream(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link)
    tab.pause()
    tab.page.locator("#episode").fill("2")
    tab.page.locator("#place-step").fill("7")
    tab.page.get_by_role("button", name="Go").click()
    tab.until(lambda: tab.text("start") == "from episode 2, step 7", "the start")

    def second_frame() -> np.ndarray:
        tab.page.locator("#dream").click()  # away from what is typed in
        tab.restart()
        tab.step(1)
        tab.step(2)
        return tab.picture()

    first = second_frame()
    assert np.array_equal(first, second_frame())
    for name, value in {"context": "6", "seed": "9"}.items():
        before = tab.page.locator(f"#{name}").input_value()
        tab.page.locator(f"#{name}").fill(value)
        assert not np.array_equal(first, second_frame()), name
        tab.page.locator(f"#{name}").fill(before)
    tab.page.locator("#num_steps").select_option("8")
    assert not np.array_equal(first, second_frame())


def test_what_the_model_expects_is_drawn_live(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link)
    tab.until(lambda: tab.index >= 6, "six frames")
    signals = tab.page.locator("#signals .signal")
    names = [signals.nth(i).text_content() for i in range(3)]
    assert [name.rstrip("-.0123456789–") for name in names] == ["reward", "value", "continue"]
    tab.pause()

    def drawn() -> list[np.ndarray]:
        shots = [Image.open(io.BytesIO(signals.nth(i).locator("canvas").screenshot())) for i in range(3)]
        return [np.asarray(shot.convert("RGB")) for shot in shots]

    before = drawn()
    numbers = [float(signals.nth(i).locator("b").text_content()) for i in range(3)]
    assert numbers[2] == 1 and numbers[1] != 0  # made to go on; an untrained value
    tab.step(tab.index + 1)
    assert all(not np.array_equal(a, b) for a, b in zip(before, drawn(), strict=True))  # each has grown by a point


def test_the_real_environment_can_be_put_away_and_back(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
    tab = visit(serve().link)
    tab.page.locator("#beside").uncheck()
    tab.until(lambda: not tab.page.locator("#real-figure").is_visible(), "a dream alone")
    tab.page.locator("#beside").check()
    tab.until(lambda: tab.page.locator("#real-figure").is_visible(), "both")
    tab.until(lambda: tab.index >= 2, "frames of both")


def test_a_recording_is_downloaded_and_stored(visit: Callable[..., Any], serve: Callable[..., Any], source: DreamSource) -> None:
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


def test_starts_are_chosen(visit: Callable[..., Any], serve: Callable[..., Any], tmp_path: Path) -> None:
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


def test_two_tabs_play_two_dreams(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
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


def test_a_lost_connection_comes_back_to_the_same_dream(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
    here = serve()
    wire = Wire(here.host)
    tab = visit(f"http://{wire.host}/#{here.token}")
    tab.page.keyboard.down("ArrowLeft")
    tab.until(lambda: tab.index >= 5, "five frames")
    wire.cut()
    tab.until(lambda: tab.text("link") == "reconnecting", "loss")
    tab.until(lambda: tab.seat.connection is None, "the server's notice of it")
    assert tab.page.locator("#pad button.on").count() == 0
    here.player._workers.submit(int).result()  # the frame that was being made
    left = tab.seat.dream.now.index
    tab.page.wait_for_timeout(600)
    assert tab.seat.dream.now.index == left and list(here.player.seats.values()) == [tab.seat]
    wire.is_cut = False
    tab.until(lambda: tab.text("link") == "connected", "connection")
    tab.until(lambda: tab.index > left, "frame")
    assert list(here.player.seats.values()) == [tab.seat]  # it went on where it was
    tab.complaints.clear()  # the browser notes every attempt that failed
    wire.close()


def test_a_reload_comes_back_to_the_same_dream(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
    here = serve()
    tab = visit(here.link)
    tab.pause()
    tab.step(tab.index + 1)
    left, picture = tab.index, tab.picture()
    tab.page.reload()
    tab.until(lambda: tab.index == left, "the same frame")
    assert np.array_equal(tab.picture(), picture) and len(here.player.seats) == 1


def test_an_old_link_is_explained(visit: Callable[..., Any], serve: Callable[..., Any], browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"http://{serve().host}/#an-old-token")
    page.get_by_text("is the server running, and this its newest link").wait_for(timeout=60_000)
    page.close()


def test_a_server_that_ended_is_said(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
    here = serve()
    tab = visit(here.link)
    here.stop()
    tab.until(lambda: tab.text("link") == "reconnecting", "loss")
    tab.until(lambda: "is the server running, and this its newest link" in tab.text("link"), "explanation")
    tab.complaints.clear()  # the browser notes every attempt that failed


def test_a_phone_has_buttons_to_touch(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
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
def test_memory_stays_flat_over_a_long_play(visit: Callable[..., Any], serve: Callable[..., Any]) -> None:
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
