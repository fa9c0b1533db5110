"""OpenAI's recordings of contractors who play Minecraft (arXiv 2206.11795; openai/Video-Pre-Training), two files each::

    <anywhere>/<name>.mp4    640x360, 20 frames a second, at most 5 minutes; the cursor is not in the picture
               <name>.jsonl  one row a tick: mouse, keyboard, hotbar, isGuiOpen, ...; row i is the action taken at frame i

Rewards are not known. Actions become ``VPT``: 23 keys and the camera as one of 121 classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from dreamer.data.alignment import episode_without_rewards
from dreamer.data.checks import check_episode
from dreamer.data.readers.files import load_jsonl
from dreamer.data.readers.frames import check_size, decode_frames
from dreamer.ops.minecraft import VPT, VPT_KEYS, encode_camera
from dreamer.types import Episode

DEGREES_PER_PIXEL = 360 / 2400
WINDOW_HEIGHT = 720  # of the game's window: the cursor's place is in its pixels, whatever the size of the video
GUI_SCALES = {"5.7": 0.5, "5.8": 0.5, "6.7": 2.0, "6.8": 2.0, "6.9": 2.0}  # of the mouse in a GUI, by version of the recorder; else 1

_KEYBOARD = {
    **{"w": "forward", "s": "back", "a": "left", "d": "right", "space": "jump", "left.shift": "sneak", "left.control": "sprint"},
    **{"q": "drop", "e": "inventory", "f": "swapHands", "escape": "ESC"},
    **{str(i): f"hotbar.{i}" for i in range(1, 10)},
}
_MOUSE = {0: "attack", 1: "use", 2: "pickItem"}
KEY_COLUMNS = {f"key.keyboard.{key}": VPT_KEYS.index(name) for key, name in _KEYBOARD.items()}
BUTTON_COLUMNS = {button: VPT_KEYS.index(name) for button, name in _MOUSE.items()}
ATTACK, PICK_ITEM, HOTBAR = (VPT_KEYS.index(name) for name in ("attack", "pickItem", "hotbar.1"))

_ARROW = """
    X.........  XX........  X*X.......  X**X......  X***X.....  X****X....  X*****X...  X******X..
    X*******X.  X****XXXXX  X**X*X....  X*X.X*X...  XX..X*X...  X....X*X..  .....XXX..
"""
CURSOR = np.array([[".X*".index(c) for c in row] for row in _ARROW.split()])  # 0: nothing, 1: black, 2: white


@dataclass(frozen=True)
class Rows:
    """What a .jsonl file says, tick by tick."""

    keys: Bool[np.ndarray, "F 23"]  # as they are held down, in the order of VPT_KEYS
    degrees: Float64[np.ndarray, "F 2"]  # by which the camera turns: pitch, yaw
    is_gui: Bool[np.ndarray, " F"]
    cursor: Float64[np.ndarray, "F 2"]  # x, y in a window 720 pixels high
    num_stuck: int  # ticks of an attack that nobody pressed, released here
    num_scrolled: int  # changes of the hotbar without a key, pressed here

    def __len__(self) -> int:
        return len(self.keys)


class VPTReader:
    """Reads the layout above, each frame scaled to ``size`` (height, width).

    gui: what becomes of the ticks with a GUI open, where the camera's columns move a cursor. "keep": they stay, with a cursor drawn
    on their frames; "mask": so do the frames, but the actions there are not known; "cut": only the longest stretch without a GUI
    stays. ``info["gui_rows"]`` lists them in any case, as [first, one past the last] of the episode's frames.
    skip_first: leading ticks to leave out, for recordings that begin with a stale screen. recorder_version: scales the mouse in GUIs
    (``GUI_SCALES``; default: the name of the folder, where it is a version such as 6.9). max_frames: longer recordings are refused.
    """

    name = "vpt"
    action_space = VPT
    frames_per_second = 20.0

    def __init__(
        self,
        path: Path | str,
        *,
        size: Sequence[int] = (64, 64),
        gui: str = "keep",
        skip_first: int = 0,
        recorder_version: str | float | None = None,
        max_frames: int = 10_000,
    ) -> None:
        if gui not in ("keep", "mask", "cut"):
            raise ValueError(f"gui is {gui!r}; expected keep, mask or cut")
        if skip_first < 0:
            raise ValueError(f"skip_first is {skip_first}; expected at least 0")
        self.size, self.gui, self.skip_first, self.max_frames = check_size(size), gui, skip_first, max_frames
        self.recorder_version = None if recorder_version is None else str(recorder_version)
        self.skipped: dict[Path, str] = {}  # files that ``find`` left out, with the reason

    def find(self, path: Path) -> list[Path]:
        """Every .mp4 at or below ``path`` with a .jsonl beside it; a file without its other half is put in ``skipped``. Raises
        ``ValueError`` if there is none."""
        files = [path.with_suffix(".mp4"), path.with_suffix(".jsonl")] if path.is_file() else [*path.rglob("*.mp4"), *path.rglob("*.jsonl")]
        halves = {".mp4": ".jsonl", ".jsonl": ".mp4"}
        lonely = [file for file in files if not file.with_suffix(halves[file.suffix]).is_file()]
        self.skipped = {file: f"no {halves[file.suffix]} beside it" for file in sorted(lonely) if file.is_file()}
        found = sorted(file for file in files if file.suffix == ".mp4" and file.is_file() and file not in self.skipped)
        if not found:
            raise ValueError(f"{path}: no recordings here; expected .mp4 files, each with a .jsonl of the same name beside it")
        return found

    def read(self, recording: Path) -> Episode:
        """One episode of the ticks that have both a frame and a row. Raises ``ValueError`` naming the file for what cannot be decoded,
        for rows that are cut or not as the recorder writes them, and if nothing is left."""
        rows = read_rows(recording.with_suffix(".jsonl"), self.max_frames, self._gui_scale(recording))

        def paint(t: int, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"] | None:
            is_shown = t < len(rows) and rows.is_gui[t]
            return draw_cursor(frame.to_ndarray(format="rgb24"), *rows.cursor[t].tolist()) if is_shown else None

        frames = decode_frames(recording, self.size, self.max_frames, paint)
        num = min(len(frames), len(rows))
        start, stop = min(self.skip_first, num), num
        if self.gui == "cut":
            start, stop = max(runs(~rows.is_gui[start:stop], start), key=lambda run: run[1] - run[0], default=(num, num))
        if start == stop:
            raise ValueError(f"{recording}: of {num} ticks none is left (skip_first is {self.skip_first}, gui is {self.gui})")
        kept, gui = slice(start, stop), rows.is_gui[start:stop]
        dropped = {"frames_without_row": len(frames) - num, "rows_without_frame": len(rows) - num, "ticks": num - (stop - start)}
        counts = {"stuck_attack": rows.num_stuck, "hotbar_by_wheel": rows.num_scrolled}
        episode = episode_without_rewards(
            frames[kept],
            np.column_stack([rows.keys[kept], encode_camera(rows.degrees[kept])]),
            action_mask=~gui if self.gui == "mask" else None,
            info={"gui_rows": runs(gui), "dropped": {k: n for k, n in dropped.items() if n}, **{k: n for k, n in counts.items() if n}},
        )
        check_episode(episode, self.action_space, str(recording))
        return episode

    def _gui_scale(self, recording: Path) -> float:
        folder = recording.absolute().parent.name
        version = self.recorder_version or (folder if re.fullmatch(r"\d+\.\d+", folder) else "")
        return GUI_SCALES.get(version, 1.0)


def read_rows(file: Path, max_rows: int, gui_scale: float = 1.0) -> Rows:
    """The rows of a .jsonl file, put right where the recorder is known to be wrong. ``gui_scale`` multiplies the mouse's way in GUIs.

    Raises ``ValueError`` naming the file and the line for what cannot be read, and for an empty file.
    """
    ticks: list[_Tick] = []
    for number, row in enumerate(load_jsonl(file, max_rows), start=1):
        try:
            ticks.append(_tick(row))
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{file}: line {number} is no row of a VPT recording ({problem}); repair it or move it away") from error
    if not ticks:
        raise ValueError(f"{file}: holds no rows; expected one JSON object a line")
    is_gui = np.array([t.is_gui for t in ticks])
    keys = np.zeros((len(ticks), len(VPT_KEYS)), bool)
    for row, tick in zip(keys, ticks, strict=True):
        row[tick.pressed] = True
    num_stuck = _release_attack(keys, [t.new_buttons for t in ticks])
    return Rows(
        keys=keys,
        degrees=np.array([t.turn for t in ticks]) * DEGREES_PER_PIXEL * np.where(is_gui, gui_scale, 1.0)[:, None],
        is_gui=is_gui,
        cursor=np.array([t.cursor for t in ticks]),
        num_stuck=num_stuck,
        num_scrolled=_press_hotbar(keys, np.array([t.hotbar for t in ticks])),
    )


def draw_cursor(image: UInt8[np.ndarray, "H W 3"], x: float, y: float) -> UInt8[np.ndarray, "H W 3"]:
    """The image with an arrow whose tip is at (x, y) of a window 720 pixels high; parts outside the image are left out."""
    image, scale = image.copy(), image.shape[0] / WINDOW_HEIGHT
    left, top = int(x * scale), int(y * scale)
    first_row, first_column = max(top, 0), max(left, 0)
    inside = image[first_row : max(top + CURSOR.shape[0], 0), first_column : max(left + CURSOR.shape[1], 0)]
    arrow = CURSOR[first_row - top :, first_column - left :][: inside.shape[0], : inside.shape[1]]
    inside[arrow == 1], inside[arrow == 2] = 0, 255
    return image


def runs(marks: Bool[np.ndarray, " F"], offset: int = 0) -> list[list[int]]:
    """Where ``marks`` is True, as [first, one past the last], counted from ``offset``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(np.int8)))
    return (edges.reshape(-1, 2) + offset).tolist()


@dataclass(frozen=True)
class _Tick:
    pressed: list[int]  # columns of VPT_KEYS
    new_buttons: list[Any]
    turn: tuple[float, float]  # of the mouse in pixels: down, right
    cursor: tuple[float, float]
    is_gui: bool
    hotbar: int


def _tick(row: Any) -> _Tick:
    """One row as the recorder writes it; KeyError, TypeError or ValueError for anything else."""
    mouse, names = row["mouse"], row["keyboard"]["keys"]
    buttons, new_buttons, is_gui, hotbar = mouse["buttons"], mouse["newButtons"], row["isGuiOpen"], row["hotbar"]
    for name, value in (("keyboard.keys", names), ("mouse.buttons", buttons), ("mouse.newButtons", new_buttons)):
        if not isinstance(value, list):
            raise ValueError(f"{name} is no list")
    if not isinstance(is_gui, bool) or type(hotbar) is not int or not 0 <= hotbar < 9:
        raise ValueError("isGuiOpen is not true or false, or hotbar not 0 to 8")
    dx, dy, x, y = (_number(mouse, name) for name in ("dx", "dy", "x", "y"))
    pressed = [KEY_COLUMNS[key] for key in names if key in KEY_COLUMNS]  # other keys mean nothing in the game
    pressed += [BUTTON_COLUMNS[button] for button in buttons if button in BUTTON_COLUMNS]
    return _Tick(pressed, new_buttons, (dy, dx), (x, y), is_gui, hotbar)


def _number(mouse: dict[str, Any], name: str) -> float:
    value = mouse[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e6:
        raise ValueError(f"mouse.{name} is {str(value)[:40]}")
    return float(value)


def _release_attack(keys: Bool[np.ndarray, "F K"], new_buttons: list[list[Any]]) -> int:
    """Some recordings begin with the attack held down by nobody: it counts only from its first press on. Returns the ticks released."""
    if new_buttons[0] != [0]:
        return 0
    first_press = next((i for i, new in enumerate(new_buttons) if i > 0 and 0 in new), len(keys))
    num_stuck = int(keys[:first_press, ATTACK].sum())
    keys[:first_press, ATTACK] = False
    return num_stuck


def _press_hotbar(keys: Bool[np.ndarray, "F K"], hotbar: Int64[np.ndarray, " F"]) -> int:
    """The mouse wheel changes the slot without a key: the slot's key is pressed in the tick before the change is seen (VPT's own loader
    presses it a tick later, with its effect). Returns how often."""
    before = np.flatnonzero(np.diff(hotbar))
    caused = keys[before, HOTBAR : HOTBAR + 9].any(1) | keys[before, PICK_ITEM]
    scrolled = before[~caused]
    keys[scrolled, HOTBAR + hotbar[scrolled + 1]] = True
    return len(scrolled)
