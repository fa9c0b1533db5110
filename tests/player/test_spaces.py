"""Keys, buttons and mouse of other action spaces in a real browser: what is pressed there is what the model is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import crafter
import numpy as np
import pytest

from dreamer.data import EpisodeStore
from dreamer.data.actions import env_codec
from dreamer.envs import make_env
from dreamer.ops.minecraft import CAMERA, MINERL, MINERL_KEYS, VPT, VPT_KEYS
from dreamer.player.source import DreamSource
from dreamer.types import ActionComponent, ActionSpace

pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")

CAMERA_COLUMN = len(MINERL_KEYS)
CRAFTER = ActionSpace((ActionComponent("action", "categorical", len(crafter.constants.actions), labels=tuple(crafter.constants.actions)),))


class Played:
    """A page, and the action of every dreamt frame as it comes to the dynamics."""

    def __init__(self, source: DreamSource, visit: Callable[..., Any], serve: Callable[..., Any], **settings: Any) -> None:
        self.source, self.rows = source, []
        self._hook = source.agent.dynamics.action_embedding.register_forward_pre_hook(self._hear)
        self.tab = visit(serve(source).link, until_index=0, **settings)
        self.page = self.tab.page

    def _hear(self, module: Any, arguments: Any) -> None:
        self.rows.append(arguments[0][0, -1, 0].numpy().copy())

    def until(self, is_it: Callable[[np.ndarray], bool], what: str) -> None:
        """Until an action that begins from now on is as it should be."""
        first = len(self.rows)
        self.tab.until(lambda: any(is_it(row) for row in self.rows[first:]), f"{what}; last {self.rows[-1]}")

    def rest(self, ticks: int = 4) -> np.ndarray:
        """All actions of the next frames."""
        index = self.tab.index
        self.tab.until(lambda: self.tab.index >= index + 2, "frames")  # what was under way
        first = len(self.rows)
        index = self.tab.index
        self.tab.until(lambda: self.tab.index >= index + ticks, "frames")
        return np.stack(self.rows[first:])

    def catch_mouse(self) -> None:
        self.page.locator("#dream").click()
        self.tab.until(lambda: "Escape" in self.tab.text("hint"), "hold of the mouse")

    def close(self) -> None:
        self._hook.remove()


@pytest.fixture
def play(
    of_space: Callable[[ActionSpace], DreamSource], visit: Callable[..., Any], serve: Callable[..., Any]
) -> Iterator[Callable[..., Played]]:
    opened: list[Played] = []

    def start(space: ActionSpace, **settings: Any) -> Played:
        opened.append(Played(of_space(space), visit, serve, **settings))
        return opened[-1]

    yield start
    for played in opened:
        played.close()


def camera(row: np.ndarray) -> str:
    return CAMERA.labels[int(row[-1])]


def test_the_mouse_turns_minecrafts_camera_until_escape(play: Callable[..., Played]) -> None:
    played = play(MINERL)
    page, tab = played.page, played.tab
    tab.pause()
    box = page.locator("#dream").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def after(right: int, down: int, is_heard: bool = True) -> np.ndarray:
        """What the model is told in the next frame when the mouse has moved by so many pixels."""
        nonlocal x, y
        x, y = x + right, y + down
        page.mouse.move(x, y)
        if is_heard:  # turns are sent with the next picture that the browser draws
            tab.until(lambda: tab.seat.hands.is_busy, "turn")
        tab.step(tab.index + 1)
        return played.rows[-1]

    page.mouse.move(x, y)
    assert camera(after(40, 0, is_heard=False)) == "still"  # not before it was caught
    played.catch_mouse()
    x -= 40  # it clicks the middle
    assert camera(after(20, 0)) == "right 3.2" == tab.text("turn")  # 0.15 degrees a pixel: 3 of them
    assert camera(after(-68, -12)) == "up 1.6 left 10" == tab.text("turn")
    assert camera(after(0, 0, is_heard=False)) == "still" and not tab.page.locator("#turn").is_visible()
    page.mouse.down()
    assert after(0, 0)[:CAMERA_COLUMN].tolist() == [float(key == "attack") for key in MINERL_KEYS]
    page.keyboard.press("Escape")
    tab.until(lambda: "Click the dream" in tab.text("hint"), "the mouse free again")
    free = after(-60, 0, is_heard=False)
    assert camera(free) == "still" and not free[:CAMERA_COLUMN].any()  # and the attack was let go
    page.mouse.up()


def test_minecraft_keys_are_held_together_and_let_go(play: Callable[..., Played]) -> None:
    played = play(VPT)
    page, forward, jump, use = played.page, *(VPT_KEYS.index(key) for key in ("forward", "jump", "use"))
    labels = page.locator("#pad button").all_text_contents()
    assert {"forwardW", "jumpspace", "sneakshift", "inventoryE", "hotbar.11", "hotbar.99", "look left←"} <= set(labels)
    page.keyboard.down("w")
    page.keyboard.down("Space")
    played.until(lambda row: row[forward] == row[jump] == 1 and row[:-1].sum() == 2, "a jump forward")
    page.keyboard.up("Space")
    played.until(lambda row: row[forward] == 1 and row[:-1].sum() == 1, "the walk")
    page.keyboard.up("w")
    assert not played.rest()[:, :-1].any() and "paused" not in played.tab.text("notice")  # the space bar is the jump's
    page.keyboard.down("ArrowDown")
    played.until(lambda row: camera(row) == "down 3.2", "a look by key")
    page.keyboard.up("ArrowDown")
    played.catch_mouse()
    page.mouse.down(button="right")
    played.until(lambda row: row[use] == 1 and row[:-1].sum() == 1, "the use")
    page.mouse.up(button="right")
    assert not played.rest()[:, :-1].any()


def test_on_a_phone_minecraft_has_its_buttons_and_a_finger_turns_the_camera(play: Callable[..., Played]) -> None:
    played = play(MINERL, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page, tab = played.page, played.tab
    assert "Drag over the dream" in tab.text("hint")
    for button in page.locator("#pad button").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 740 and box["height"] >= 44
    page.locator("#pause").tap()
    tab.until(lambda: "paused" in tab.text("notice"), "pause")
    box, tools = page.locator("#dream").bounding_box(), page.context.new_cdp_session(page)
    for kind, right in (("touchStart", 0), ("touchMove", 30), ("touchMove", 66), ("touchEnd", None)):
        points = [] if right is None else [{"x": box["x"] + 100 + right, "y": box["y"] + 100}]
        tools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    tab.until(lambda: tab.seat.hands.is_busy, "turn")
    tab.step(tab.index + 1)
    assert camera(played.rows[-1]).startswith("right")


@pytest.mark.parametrize(
    ("name", "keys", "has_idle"),
    [
        ("minigrid", {"ArrowLeft": "left", "w": "forward", "e": "pickup", "f": "toggle"}, False),
        ("crafter-chop", {"ArrowUp": "up", "d": "right", "e": "do"}, True),
        ("crafter", {"ArrowUp": "move_up", "a": "move_left", "e": "do", "1": "sleep"}, True),
    ],
)
def test_the_keys_of_a_space_are_shown_and_recorded(play: Callable[..., Played], name: str, keys: dict[str, str], has_idle: bool) -> None:
    space = CRAFTER if name == "crafter" else env_codec(make_env(name)).space
    played = play(space)
    tab, (component,) = played.tab, space.components
    shown = tab.page.locator("#pad button").all_text_contents()
    assert len(shown) == component.size - has_idle and all(any(s.startswith(label) for s in shown) for label in keys.values())
    assert ("Nothing moves until you press a key" in tab.text("hint")) is not has_idle
    tab.pause()
    tab.page.locator("#record").click()
    tab.until(lambda: "Recording" in tab.text("recorded"), "recording")
    for key in keys:
        tab.page.keyboard.down(key)
        tab.step(tab.index + 1)
        tab.page.keyboard.up(key)
    tab.page.locator("#record").click()
    tab.page.locator("#store").click()
    tab.until(lambda: "Stored as episode 0" in tab.text("stored"), "the store")
    episode = EpisodeStore(played.source.run.path / "played").episode(0)
    expected = [component.labels.index(label) for label in keys.values()]
    assert episode.actions[:-1, 0].tolist() == expected
    assert [int(row[0]) for row in played.rows if row[0] in expected][-1] == expected[-1]  # as the dynamics was told
