"""Minari datasets (https://minari.farama.org), the standard format of offline reinforcement learning, if their observations are images.

A dataset is a folder ``<name>-v<n>/data`` with metadata.json and one file or folder of episodes, in HDF5, Arrow or Parquet. It is read
through the package ``minari``, the extra of that name. A recording is one episode: ``<folder>/episode_00003``, a path that need not exist.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import UInt8

from dreamer.data.actions import ActionCodec
from dreamer.data.alignment import episode_from_transitions
from dreamer.data.checks import check_episode
from dreamer.data.readers.files import load_json, refuse
from dreamer.data.readers.frames import check_size, resize_frames
from dreamer.data.readers.hdf5 import check_episode_group
from dreamer.types import Episode

MAX_EPISODES = 10_000_000


class MinariReader:
    """Reads every dataset at or below a folder; all must have the same action space.

    image: which entry of a dictionary of observations to see (default: the only one that is an image). size: (height, width) that frames
    are scaled to (default: as they are). frames_per_second: Minari does not say; nothing but playback depends on it.
    """

    name = "minari"

    def __init__(
        self, path: Path | str, *, image: str | None = None, size: Sequence[int] | None = None, frames_per_second: float = 10.0
    ) -> None:
        self.image, self.size = image, None if size is None else check_size(size)
        self.frames_per_second = frames_per_second
        self._storages: dict[Path, Any] = {}
        folder = self.find(Path(path))[0].parent
        self._gym_space = self._open(folder).action_space
        try:
            self._codec = ActionCodec(self._gym_space)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self.action_space = self._codec.space

    def find(self, path: Path) -> list[Path]:
        """The episodes of every dataset at or below ``path``. Raises ``ValueError`` if there is none."""
        found: list[Path] = []
        for file in sorted(path.rglob("metadata.json")):
            metadata = load_json(file)
            if isinstance(metadata, dict) and "data_format" in metadata:
                num = metadata.get("total_episodes")
                if type(num) is not int or not 0 <= num <= MAX_EPISODES:
                    refuse(file, f"total_episodes = {num!r}", f"a whole number up to {MAX_EPISODES}")
                found += [file.parent / f"episode_{i:05d}" for i in range(num)]
        if not found:
            raise ValueError(f"{path}: no episodes here; expected a Minari dataset, a folder <name>-v<n>/data with metadata.json")
        return found

    def read(self, recording: Path) -> Episode:
        """One episode. Raises ``ValueError`` naming it if it cannot be read, shows no image, or acts otherwise than the first dataset."""
        storage = self._open(recording.parent)
        if storage.action_space != self._gym_space:
            got = f"{recording}: actions are {storage.action_space}, those of the first dataset {self._gym_space}"
            raise ValueError(f"{got}; import it into another store")
        try:
            number = int(recording.name.removeprefix("episode_"))
            if (file := recording.parent / "main_data.hdf5").exists():
                check_episode_group(file, f"episode_{number}")
            (episode,) = storage.get_episodes([number])
            frames = _frames(storage.observation_space, episode["observations"], self.image)
            rewards = np.asarray(episode["rewards"])
            actions = [self._codec.encode(_at(episode["actions"], t)) for t in range(len(rewards))]
            chw = np.ascontiguousarray(frames.transpose(0, 3, 1, 2)) if self.size is None else resize_frames(frames, self.size)
            has_ended = bool(np.asarray(episode["terminations"])[-1])
            info = {"dataset": recording.parent.parent.name}
            loaded = episode_from_transitions(chw, np.stack(actions), rewards, has_ended, info=info)
        except Exception as error:  # minari, h5py and pyarrow raise dozens of kinds; all mean an episode that cannot be used
            raise ValueError(f"{recording}: cannot be read ({error}); repair the dataset or move it away") from error
        check_episode(loaded, self.action_space, str(recording))
        return loaded

    def _open(self, folder: Path) -> Any:
        """Minari's storage. Its metadata must describe the spaces: without them minari would import the environment that the file names."""
        if folder not in self._storages:
            metadata = load_json(folder / "metadata.json")
            for name in ("observation_space", "action_space"):
                if not isinstance(metadata, dict) or not isinstance(metadata.get(name), str):
                    refuse(folder / "metadata.json", f"no {name}", "a dataset of Minari 0.5 or newer, which describes its spaces")
            storage = _minari_storage()
            try:
                self._storages[folder] = storage.read(folder)
            except ImportError as error:  # each format has a package of its own
                raise ValueError(f"{folder}: {error}") from error
            except Exception as error:  # as in read
                raise ValueError(f"{folder}: cannot be opened ({error}); repair the dataset or move it away") from error
        return self._storages[folder]


def _minari_storage() -> Any:
    try:
        return importlib.import_module("minari.dataset.minari_storage").MinariStorage
    except ImportError as error:
        remedy = "install the package's extra: pip install -e '.[minari]'"
        raise ValueError(f"the reader 'minari' needs the package minari ({error}); {remedy}") from error


def _at(values: Any, t: int) -> Any:
    """Row t of an array, or of every array of a dictionary."""
    return {key: _at(value, t) for key, value in values.items()} if isinstance(values, Mapping) else values[t]


def _frames(space: gym.Space[Any], observations: Any, name: str | None) -> UInt8[np.ndarray, "F H W 3"]:
    """The images among the observations, in colour."""
    if isinstance(space, gym.spaces.Dict):
        images = [key for key, part in space.items() if _is_image(part)]
        if name is None and len(images) != 1:
            raise ValueError(f"observations {sorted(space)} hold {len(images)} images; name one with the option image")
        key = images[0] if name is None else name
        if key not in images:
            raise ValueError(f"image is {key!r}; the observations that are images are {images}")
        space, observations = space[key], observations[key]
    if not _is_image(space):
        raise ValueError(f"observations are {space}; expected uint8 images (H, W, 3), (3, H, W), (H, W, 1), (1, H, W) or (H, W)")
    frames = np.asarray(observations)
    if frames.dtype != np.uint8 or frames.shape[1:] != space.shape:
        raise ValueError(f"observations are {frames.dtype} {frames.shape}; expected uint8 (F, {', '.join(map(str, space.shape or ()))})")
    if frames.ndim == 3:
        frames = frames[..., None]
    elif frames.shape[-1] not in (1, 3):
        frames = frames.transpose(0, 2, 3, 1)
    return np.broadcast_to(frames, (*frames.shape[:3], 3))


def _is_image(space: gym.Space[Any]) -> bool:
    if not isinstance(space, gym.spaces.Box) or space.dtype != np.uint8:
        return False
    shape = space.shape
    return (len(shape) == 2 or (len(shape) == 3 and (shape[-1] in (1, 3) or shape[0] in (1, 3)))) and min(shape) > 0
