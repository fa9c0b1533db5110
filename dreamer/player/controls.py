"""What a person can press: buttons and keys made from an action space, and what is held turned into actions.

The page knows buttons by their place in ``Controls.buttons``, and nothing of columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from dreamer.ops.minecraft import CAMERA, CAMERA_MAX, CAMERA_STILL, decode_camera, encode_camera
from dreamer.types import ActionComponent, ActionSpace

NOTHING = ("noop", "none", "nothing", "idle", "still", "stay")  # labels of a category that does nothing
RESERVED = ("KeyP", "KeyM", "KeyN", "KeyR")  # pause, policy, next frame, restart: the page's own keys
# Keys that players expect, by label; names are those of KeyboardEvent.code.
EXPECTED = {
    "left": ("ArrowLeft", "KeyA"),
    "right": ("ArrowRight", "KeyD"),
    "up": ("ArrowUp", "KeyW"),
    "forward": ("ArrowUp", "KeyW"),
    "down": ("ArrowDown", "KeyS"),
    "back": ("ArrowDown", "KeyS"),
    "backward": ("ArrowDown", "KeyS"),
    "jump": ("Space",),
    "fire": ("Space",),
    "do": ("KeyE", "KeyX"),
    "attack": ("KeyJ",),
    "use": ("KeyK",),
    "pickitem": ("KeyL",),
    "inventory": ("KeyE",),
    "drop": ("KeyQ",),
    "swaphands": ("KeyF",),
    "sneak": ("ShiftLeft",),
    "sprint": ("KeyC",),  # Ctrl with W would close the tab
    "esc": ("KeyZ",),
    "pickup": ("KeyE",),
    "toggle": ("KeyF",),
    "done": ("KeyX",),
}
MOUSE = {"attack": 0, "use": 2, "pickitem": 1}  # buttons of the mouse, where it turns a camera
SPARE = tuple(f"Digit{d}" for d in "1234567890") + tuple(f"Key{c}" for c in "EFQZXCVBGTYUIOJKLH")
DIRECTIONS = {"ArrowLeft": "left", "KeyA": "left", "ArrowRight": "right", "KeyD": "right"}
DIRECTIONS |= {"ArrowUp": "up", "KeyW": "up", "ArrowDown": "down", "KeyS": "down"}
LOOK = 4.0  # degrees a tick that an arrow key turns the camera
LOOKS = {
    "look left": ("ArrowLeft", (0.0, -LOOK)),
    "look right": ("ArrowRight", (0.0, LOOK)),
    "look up": ("ArrowUp", (-LOOK, 0.0)),
    "look down": ("ArrowDown", (LOOK, 0.0)),
}


@dataclass(frozen=True)
class Button:
    """Sets one column of the action to a value while it is held, or turns the camera by (pitch, yaw) degrees a tick."""

    component: str
    label: str
    column: int
    value: float
    keys: tuple[str, ...] = ()
    mouse: int | None = None
    turn: tuple[float, float] | None = None

    @property
    def direction(self) -> str | None:
        """Where it belongs on a pad of four."""
        return next((DIRECTIONS[key] for key in self.keys if key in DIRECTIONS), None)


class Controls:
    """Buttons of an action space. ``rest``: the columns while nothing is pressed. ``idle``: the same, None where that is no action."""

    def __init__(self, space: ActionSpace) -> None:
        self.space = space
        self.camera: int | None = None  # its column
        self.rest = np.zeros(space.num_columns, np.float32)
        buttons, has_idle = [], True
        for component, columns in space.slices():
            if component.kind == "categorical" and component.labels == CAMERA.labels:
                self.camera = columns.start
                self.rest[columns] = CAMERA_STILL
                buttons += [Button(component.name, label, columns.start, 0.0, turn=turn) for label, (_, turn) in LOOKS.items()]
            elif component.kind == "categorical":
                index = _nothing(component)
                has_idle = has_idle and index is not None
                self.rest[columns] = index or 0
                buttons += [_button(component, columns.start, i, float(i)) for i in range(component.size) if i != index]
            elif component.kind == "binary":
                buttons += [_button(component, columns.start + i, i, 1.0) for i in range(component.size)]
            else:
                self.rest[columns] = np.clip(0, component.low, component.high)
                buttons += _axis(component, columns.start)
        self.buttons = tuple(_with_keys(_told_apart(buttons), self.camera is not None))
        self.idle: Float[np.ndarray, " A"] | None = self.rest.copy() if has_idle else None

    def row(self, pressed: Sequence[int], turn: tuple[float, float] = (0.0, 0.0)) -> Float[np.ndarray, " A"] | None:
        """The action of these buttons; of two that exclude each other the later one counts. None if nothing is pressed, where that is no
        action."""
        pitch, yaw = turn
        row = self.rest.copy()
        for index in pressed:
            button = self.buttons[index]
            if button.turn is None:
                row[button.column] = button.value
            else:
                pitch, yaw = pitch + button.turn[0], yaw + button.turn[1]
        if self.camera is not None:
            row[self.camera] = encode_camera(np.array([pitch, yaw]))
        return None if self.idle is None and not pressed else row

    def buttons_of(self, row: Float[np.ndarray, " A"]) -> list[int]:
        """Which buttons an action amounts to; turns of the camera are told by ``camera_of``."""
        return [i for i, b in enumerate(self.buttons) if b.turn is None and row[b.column] == b.value != self.rest[b.column]]

    def camera_of(self, row: Float[np.ndarray, " A"]) -> str | None:
        return None if self.camera is None else CAMERA.labels[int(row[self.camera])]

    def named(self, words: str) -> Float[np.ndarray, " A"]:
        """The action that labels joined by ``+`` name, such as ``forward+jump``; ``noop`` is to press nothing.

        A label that several components have is told by ``component=label``. Raises ``ValueError`` with the labels that there are.
        """
        row = self.rest.copy()
        for word in filter(lambda word: word not in NOTHING, words.split("+")):
            found = [
                (columns.start, i) if c.kind == "categorical" else (columns.start + i, 1)
                for c, columns in self.space.slices()
                for i, label in enumerate(_labels(c))
                if c.kind != "continuous" and word in (label, f"{c.name}={label}")
            ]
            if len(found) != 1:
                known = ", ".join(f"{c.name}={label}" for c in self.space.components if c.kind != "continuous" for label in _labels(c)[:24])
                raise ValueError(f"action {word!r} means {len(found)} things; expected one of {known}")
            row[found[0][0]] = found[0][1]
        if self.idle is None and np.array_equal(row, self.rest) and set(words.split("+")) <= set(NOTHING):
            raise ValueError(f"action {words!r}: in this action space nobody can do nothing; name an action")
        return row

    def to_json(self) -> dict[str, Any]:
        buttons = [dataclasses.asdict(b) | {"direction": b.direction} for b in self.buttons]
        return {"buttons": buttons, "has_camera": self.camera is not None, "has_idle": self.idle is not None}


class Hands:
    """What is held between two ticks. A tap that ends before the tick counts for one tick, and turns of the mouse add up."""

    def __init__(self, controls: Controls) -> None:
        self.controls = controls
        self.input = 0  # number of the last message that was taken in
        self._held: tuple[int, ...] = ()
        self._tapped: list[int] = []
        self._turn = np.zeros(2)

    def hold(self, number: int, pressed: Sequence[int], turn: tuple[float, float]) -> None:
        """Raises ``ValueError`` for a button that is not there."""
        if any(index >= len(self.controls.buttons) for index in pressed):
            raise ValueError(f"pressed is {list(pressed)}; there are {len(self.controls.buttons)} buttons")
        self._tapped += [index for index in pressed if index not in self._held and index not in self._tapped]
        self.input, self._held = number, tuple(pressed)
        self._turn = np.clip(self._turn + turn, -2 * CAMERA_MAX, 2 * CAMERA_MAX)

    def release(self) -> None:
        self._held = ()
        self.forget()

    def forget(self) -> None:
        """Taps and turns since the last tick; what is held stays held."""
        self._tapped, self._turn = [], np.zeros(2)

    @property
    def is_fresh(self) -> bool:
        """Whether something was pressed since the last tick."""
        return bool(self._tapped)

    @property
    def is_busy(self) -> bool:
        return bool(self._held or self._tapped or self._turn.any())

    def take(self) -> Float[np.ndarray, " A"] | None:
        """The action of this tick."""
        pressed = [index for index in self._held if index not in self._tapped] + self._tapped
        row = self.controls.row(pressed, (float(self._turn[0]), float(self._turn[1])))
        if self.controls.camera is None or row is None:
            self._turn[:] = 0
        else:  # what the coarse bins leave of a turn is not lost
            self._turn -= decode_camera(encode_camera(self._turn))
            self._turn[np.abs(self._turn) < 0.3] = 0
        self._tapped = []
        return row


def _labels(component: ActionComponent) -> tuple[str, ...]:
    return component.labels or tuple(map(str, range(component.size)))


def _nothing(component: ActionComponent) -> int | None:
    return next((i for i, label in enumerate(component.labels) if label.lower() in NOTHING), None)


def _button(component: ActionComponent, column: int, index: int, value: float) -> Button:
    return Button(component.name, _labels(component)[index], column, value)


def _axis(component: ActionComponent, start: int) -> list[Button]:
    """Full left and full right of each column, say."""
    names = component.labels or (
        (component.name,) if component.size == 1 else tuple(f"{component.name} {i}" for i in range(component.size))
    )
    ends = ((component.low, "−"), (component.high, "+"))
    return [Button(component.name, f"{name} {sign}", start + i, float(end)) for i, name in enumerate(names) for end, sign in ends]


def _told_apart(buttons: Sequence[Button]) -> list[Button]:
    """A label that several components have gets its component's name."""
    labels = [button.label for button in buttons]
    return [dataclasses.replace(b, label=f"{b.component} {b.label}") if labels.count(b.label) > 1 else b for b in buttons]


def _with_keys(buttons: Sequence[Button], has_camera: bool) -> list[Button]:
    """Each button with the keys that people expect, or the next spare one; none where they have run out."""
    arrows = {key for key, _ in LOOKS.values()} if has_camera else set()
    used, out = {*RESERVED, *arrows}, []
    wanted = [EXPECTED.get(_plain(button.label), ()) for button in buttons]
    wanted = [(f"Digit{b.label[-1]}",) if _plain(b.label).startswith("hotbar") else w for b, w in zip(buttons, wanted, strict=True)]
    taken = {key for keys in wanted for key in keys}
    for button, keys in zip(buttons, wanted, strict=True):
        if button.turn is not None:
            out.append(dataclasses.replace(button, keys=(LOOKS[button.label][0],)))
            continue
        free = [key for key in keys if key not in used] or [key for key in SPARE if key not in used and key not in taken][:1]
        used |= set(free)
        mouse = MOUSE.get(_plain(button.label)) if has_camera else None
        out.append(dataclasses.replace(button, keys=tuple(free), mouse=mouse))
    return out


def _plain(label: str) -> str:
    """``move_left`` and ``turn left`` are ``left``."""
    words = label.lower().replace("_", " ").split()
    return words[-1] if words and words[0] in ("move", "turn", "go") else "".join(words)
