"""Folders of NumPy files, one folder per episode::

    <anywhere>/<episode>/frames.npy    uint8 (F, H, W, 3)
                         actions.npz   one array per component, named "camera" or "action$camera"; or actions.npy (F, A)
                         rewards.npy   (F,)
                         metadata.json optional, kept with the episode

Actions and rewards lead from their frame to the next one. There may be one of each for every frame, or one fewer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from pydantic import PositiveFloat

from dreamer.data.alignment import episode_from_steps, episode_from_transitions
from dreamer.data.checks import check_episode
from dreamer.data.readers.options import ActionSpaceOption, check_options
from dreamer.types import ActionComponent, ActionSpace, Episode

KEYS = ("forward", "back", "left", "right", "jump", "sneak", "sprint", "attack")
# camera = pitch bin * 11 + yaw bin; 60 is no movement
KEYBOARD_CAMERA = ActionSpace((ActionComponent("keyboard", "binary", 8, labels=KEYS), ActionComponent("camera", "categorical", 121)))
CAMERA_DEGREES = ActionComponent("camera", "continuous", 2, -180.0, 180.0, labels=("pitch", "yaw"))


class NpyReader:
    """Reads the layout above. Without ``action_space`` it is derived from the first recording's actions: keyboard (F, 8) and
    camera (F,) of 121 classes, or MineRL's own keys (0 or 1) with the camera in degrees (F, 2)."""

    name = "npy"

    @check_options
    def __init__(self, path: Path | str, *, action_space: ActionSpaceOption | None = None, frames_per_second: PositiveFloat = 20.0) -> None:
        self.frames_per_second = frames_per_second
        self.action_space = action_space or _derive_space(self.find(Path(path))[0])

    def find(self, path: Path) -> list[Path]:
        """Every folder at or below ``path`` that holds frames.npy. Raises ``ValueError`` if there is none."""
        found = sorted(p.parent for p in path.rglob("frames.npy"))
        if not found:
            raise ValueError(f"{path}: no recordings here; expected folders that hold frames.npy, actions.npz and rewards.npy")
        return found

    def read(self, recording: Path) -> Episode:
        """One episode. Raises ``ValueError`` naming the file for anything missing, unreadable, of another shape, or NaN."""
        frames = _load(recording / "frames.npy")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
            _refuse(recording / "frames.npy", f"{frames.dtype} {frames.shape}", "uint8 (F, H, W, 3)")
        actions = self._columns(recording)
        rewards = _load(recording / "rewards.npy")
        if rewards.ndim != 1 or rewards.dtype.kind not in "fiub":
            _refuse(recording / "rewards.npy", f"{rewards.dtype} {rewards.shape}", "numbers (F,)")
        if not np.isfinite(rewards).all():
            _refuse(recording / "rewards.npy", "NaN or infinity", "finite numbers")
        if len(actions) != len(rewards) or len(frames) - len(actions) not in (0, 1):
            got = f"{len(frames)} frames, {len(actions)} actions, {len(rewards)} rewards"
            _refuse(recording, f"lengths that disagree: {got}", "the same number of each, or one frame more")
        info = _metadata(recording)
        chw = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
        if len(frames) == len(actions):
            episode = episode_from_steps(chw, actions, rewards, info=info)
        else:
            episode = episode_from_transitions(chw, actions, rewards, False, info=info)
        check_episode(episode, self.action_space, str(recording))
        return episode

    def _columns(self, recording: Path) -> np.ndarray:
        file, arrays = _load_actions(recording)
        if isinstance(arrays, np.ndarray):
            if arrays.ndim != 2 or arrays.shape[1] != self.action_space.num_columns:
                _refuse(file, f"shape {arrays.shape}", f"(F, {self.action_space.num_columns})")
            return arrays
        names = [c.name for c in self.action_space.components]
        if sorted(arrays) != sorted(names):
            _refuse(file, f"the actions {sorted(arrays)}", f"{sorted(names)}")
        columns = []
        for component in self.action_space.components:
            array = arrays[component.name]
            array = array[:, None] if array.ndim == 1 else array
            if array.ndim != 2 or array.shape[1] != component.num_columns or len(array) != len(arrays[names[0]]):
                expected = f"({len(arrays[names[0]])}, {component.num_columns}), as many as {names[0]}"
                _refuse(file, f"{component.name} of shape {array.shape}", expected)
            columns.append(array)
        return np.concatenate(columns, 1)


def _refuse(file: Path, got: object, expected: str) -> NoReturn:
    raise ValueError(f"{file}: got {got}; expected {expected}. Repair the recording or move it away")


def _load(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except Exception as error:  # numpy's parsers raise a dozen kinds, tokenize's among them; all mean a broken file
        raise ValueError(f"{file}: cannot be read ({error}); expected an array that numpy.save wrote") from error
    if not isinstance(array, np.ndarray):
        _refuse(file, type(array).__name__, "one array")
    return array


def _load_actions(recording: Path) -> tuple[Path, np.ndarray | dict[str, np.ndarray]]:
    """The file, and its one array (actions.npy) or its arrays by component (actions.npz)."""
    file = recording / "actions.npz"
    if not file.exists():
        file = recording / "actions.npy"
        array = _load(file)
        if array.dtype.kind not in "fiub":
            _refuse(file, array.dtype, "numbers")
        return file, array
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key.removeprefix("action$"): archive[key] for key in archive.files}
    except Exception as error:  # as in _load
        raise ValueError(f"{file}: cannot be read ({error}); expected arrays that numpy.savez wrote") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.ndim == 0 or array.dtype.kind not in "fiub":
            _refuse(file, f"{name} of {getattr(array, 'dtype', type(array))}", "numbers, one row per frame")
    return file, arrays


def _derive_space(recording: Path) -> ActionSpace:
    file, arrays = _load_actions(recording)
    remedy = "an action space that is known; give the reader's option action_space"
    if isinstance(arrays, np.ndarray):
        if arrays.ndim == 2 and arrays.shape[1] == KEYBOARD_CAMERA.num_columns:
            return KEYBOARD_CAMERA
        _refuse(file, f"actions of shape {arrays.shape}", remedy)
    if set(arrays) == {"keyboard", "camera"}:
        return KEYBOARD_CAMERA
    components = []
    for name, array in sorted(arrays.items()):
        if name == "camera" and array.ndim == 2 and array.shape[1] == 2:
            components.append(CAMERA_DEGREES)
        elif name in KEYS and array.ndim == 1:
            components.append(ActionComponent(name, "binary", 1))
        else:
            _refuse(file, f"action {name!r} of shape {array.shape}", remedy)
    if not components:
        _refuse(file, "no actions", remedy)
    return ActionSpace(tuple(components))


def _metadata(recording: Path) -> dict[str, Any]:
    file = recording / "metadata.json"
    if not file.exists():
        return {}

    def refuse_nan(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        metadata = json.loads(file.read_text(), parse_constant=refuse_nan)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    return {"metadata": metadata}
