"""Folders of NumPy files, one folder per episode::

    <anywhere>/<episode>/frames.npy    uint8 (F, H, W, 3)
                         actions.npz   one array per component, named "camera" or "action$camera"; or actions.npy (F, A)
                         rewards.npy   (F,)
                         metadata.json optional, kept with the episode

This is also how MineRL recordings look once extracted (``data/mineRL_extracted/<Env>/<episode>/``); their observations.npz is not read.
Actions and rewards lead from their frame to the next one. There may be one of each for every frame, or one fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.data.actions import as_action_space
from dreamer.data.alignment import episode_from_steps, episode_from_transitions
from dreamer.data.checks import check_episode
from dreamer.data.minecraft import is_minerl, minerl_columns
from dreamer.data.readers.files import first_readable, load_json, load_npy, load_npz, refuse
from dreamer.ops.minecraft import ITEM_ACTIONS, MINERL, MINERL_ITEMS, MINERL_KEYS
from dreamer.types import ActionComponent, ActionSpace, Episode

CAMERA_DEGREES = ActionComponent("camera", "continuous", 2, -180.0, 180.0, labels=("pitch", "yaw"))


class NpyReader:
    """Reads the layout above.

    action_space: as ``as_action_space`` takes it. By default it is derived from the actions of the first recording where that works.
    ``MINERL`` stands for ``keyboard`` (F, 8) with ``camera`` (F,) of 121 classes, for the same nine columns in actions.npy, and for
    MineRL's own eight keys with the camera in degrees (F, 2), which is then put into its classes; items that are placed or crafted are
    dropped and counted in ``info["dropped_actions"]``, unless ``action_space`` is ``"minerl_items"``. Fewer of MineRL's keys stay a
    component each.
    """

    name = "npy"

    def __init__(
        self,
        path: Path | str,
        *,
        action_space: ActionSpace | str | Sequence[Any] | None = None,
        frames_per_second: float = 20.0,
    ) -> None:
        self.frames_per_second = frames_per_second
        self.action_space = first_readable(_derive_space, self.find(Path(path))) if action_space is None else as_action_space(action_space)

    def find(self, path: Path) -> list[Path]:
        """Every folder at or below ``path`` that holds frames.npy. Raises ``ValueError`` if there is none."""
        found = sorted(p.parent for p in path.rglob("frames.npy"))
        if not found:
            raise ValueError(f"{path}: no recordings here; expected folders that hold frames.npy, actions.npz and rewards.npy")
        return found

    def read(self, recording: Path) -> Episode:
        """One episode. Raises ``ValueError`` naming the file for anything missing, unreadable, of another shape, or NaN."""
        frames = load_npy(recording / "frames.npy")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
            refuse(recording / "frames.npy", f"{frames.dtype} {frames.shape}", "uint8 (F, H, W, 3)")
        actions, dropped = self._columns(recording)
        rewards = load_npy(recording / "rewards.npy")
        if rewards.ndim != 1 or rewards.dtype.kind not in "fiub":
            refuse(recording / "rewards.npy", f"{rewards.dtype} {rewards.shape}", "numbers (F,)")
        if not np.isfinite(rewards).all():
            refuse(recording / "rewards.npy", "NaN or infinity", "finite numbers")
        if len(actions) != len(rewards) or len(frames) - len(actions) not in (0, 1):
            got = f"{len(frames)} frames, {len(actions)} actions, {len(rewards)} rewards"
            refuse(recording, f"lengths that disagree: {got}", "the same number of each, or one frame more")
        info = _metadata(recording) | ({"dropped_actions": dropped} if dropped else {})
        chw = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
        if len(frames) == len(actions):
            episode = episode_from_steps(chw, actions, rewards, info=info)
        else:
            episode = episode_from_transitions(chw, actions, rewards, False, info=info)
        check_episode(episode, self.action_space, str(recording))
        return episode

    def _columns(self, recording: Path) -> tuple[np.ndarray, dict[str, int]]:
        """The columns of the actions, and how often each kind of action was used that has none."""
        file, arrays = _load_actions(recording)
        if isinstance(arrays, np.ndarray):
            columns = arrays[:, None] if arrays.ndim == 1 else arrays
            if columns.ndim != 2 or columns.shape[1] != self.action_space.num_columns:
                refuse(file, f"shape {arrays.shape}", f"(F, {self.action_space.num_columns})")
            return columns, {}
        if self.action_space in (MINERL, MINERL_ITEMS) and is_minerl(set(arrays)):
            return minerl_columns(arrays, str(file), item_actions=self.action_space == MINERL_ITEMS)
        names = [c.name for c in self.action_space.components]
        if sorted(arrays) != sorted(names):
            refuse(file, f"the actions {sorted(arrays)}", f"{sorted(names)}")
        columns = []
        for component in self.action_space.components:
            array = arrays[component.name]
            array = array[:, None] if array.ndim == 1 else array
            if array.ndim != 2 or array.shape[1] != component.num_columns or len(array) != len(arrays[names[0]]):
                expected = f"({len(arrays[names[0]])}, {component.num_columns}), as many as {names[0]}"
                refuse(file, f"{component.name} of shape {array.shape}", expected)
            if array.dtype.kind not in "fiub":
                refuse(file, f"{component.name} of {array.dtype}", "numbers")
            columns.append(array)
        return np.concatenate(columns, 1), {}


def _load_actions(recording: Path) -> tuple[Path, np.ndarray | dict[str, np.ndarray]]:
    """The file, and its one array (actions.npy) or its arrays by component (actions.npz)."""
    file = recording / "actions.npz"
    if not file.exists():
        file = recording / "actions.npy"
        array = load_npy(file)
        if array.dtype.kind not in "fiub" or array.ndim == 0:
            refuse(file, f"{array.dtype} {array.shape}", "numbers, one row per frame")
        return file, array
    arrays = {key.removeprefix("action$"): array for key, array in load_npz(file).items()}
    for name, array in arrays.items():
        if array.ndim == 0 or array.dtype.kind not in ("fiubUS" if name in ITEM_ACTIONS else "fiub"):
            refuse(file, f"{name} of {array.dtype} {array.shape}", "numbers, one row per frame")
    return file, arrays


def _derive_space(recording: Path) -> ActionSpace:
    file, arrays = _load_actions(recording)
    remedy = (
        "an action space that is known; give the reader's option, with the arrays' names: "
        "action_space=[{name: move, kind: categorical, size: 3}]"
    )
    if isinstance(arrays, np.ndarray):
        if arrays.ndim == 2 and arrays.shape[1] == MINERL.num_columns:
            return MINERL
        refuse(file, f"actions of shape {arrays.shape}", remedy)
    if set(arrays) == {"keyboard", "camera"} or is_minerl(set(arrays)):
        return MINERL
    components = []
    for name, array in sorted(arrays.items()):
        if name == "camera" and array.ndim == 2 and array.shape[1] == 2:
            components.append(CAMERA_DEGREES)
        elif name in MINERL_KEYS and array.ndim == 1:
            components.append(ActionComponent(name, "binary", 1))
        else:
            refuse(file, f"action {name!r} of shape {array.shape}", remedy)
    if not components:
        refuse(file, "no actions", remedy)
    return ActionSpace(tuple(components))


def _metadata(recording: Path) -> dict[str, Any]:
    file = recording / "metadata.json"
    return {"metadata": load_json(file)} if file.exists() else {}
