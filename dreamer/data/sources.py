"""What can be pretokenized: an episode store, or recordings that are decoded when their turn comes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dreamer.data.checks import check_episode
from dreamer.data.groups import Source
from dreamer.data.importing import reader_facts, recording_name, skipped_by
from dreamer.data.readers import make_reader
from dreamer.data.shards import STORE_FILE
from dreamer.types import ActionSpace, Episode

STAMP_BYTES = 64 << 10  # read at each end of a file


@runtime_checkable
class EpisodeSource(Protocol):
    """Episodes by number. ``EpisodeStore`` is one.

    sources: the name of each episode, which never changes, and a text that changes with its content. extra: JSON values that say where the
    episodes come from, kept with their latents.
    """

    path: Path
    action_space: ActionSpace
    fps: float
    extra: dict[str, Any]

    @property
    def sources(self) -> Sequence[Source]: ...

    def episode(self, index: int) -> Episode:
        """Raises ``ValueError`` or ``OSError`` for an episode that cannot be read."""
        ...


def means_store(path: Path, reader_name: str | None, options: Mapping[str, Any]) -> bool:
    """Whether ``path`` is a store, rather than recordings for a reader that is named. Raises ``ValueError`` if a store is given options."""
    if reader_name is not None or not (path / STORE_FILE).is_file():
        return False
    if options:
        raise ValueError(f"{path}: is a store, which takes no options; got {', '.join(options)}")
    return True


class Recordings:
    """The recordings at ``path``, in the order of their names, as the reader ``reader_name`` finds and reads them.

    ``skipped`` says which it left out, and why. Raises ``ValueError`` if there are none, and for an unknown reader or option.
    """

    def __init__(self, path: Path | str, reader_name: str, options: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.reader = make_reader(reader_name, self.path, **(options or {}))
        self.recordings = self.reader.find(self.path)
        self.action_space, self.fps = self.reader.action_space, self.reader.frames_per_second
        self.extra = reader_facts(reader_name, options or {})
        self.skipped = skipped_by(self.reader)
        names = [recording_name(recording, self.path) for recording in self.recordings]
        self.sources = list(zip(names, _stamps(self.recordings), strict=True))

    def episode(self, index: int) -> Episode:
        """Errors name files by their place below ``path``, so that they read the same wherever that is."""
        name, _ = self.sources[index]
        try:
            episode = self.reader.read(self.recordings[index])
            check_episode(episode, self.action_space, name)
        except (ValueError, OSError) as error:
            text = str(error).replace(str(self.recordings[index]), name).replace(f"{self.path}{os.sep}", "")
            raise ValueError(text if text.startswith(name) else f"{name}: {text}") from error
        return episode


def _stamps(recordings: Sequence[Path]) -> list[str]:
    """The files of each recording, those in its folder or those with its name, each with what shows that it was changed."""
    listed: dict[Path, dict[str, list[Path]]] = {}

    def files(folder: Path) -> dict[str, list[Path]]:
        if folder not in listed:
            listed[folder] = {}
            for file in sorted(folder.iterdir()):
                if file.is_file():
                    listed[folder].setdefault(file.stem, []).append(file)
        return listed[folder]

    def own(recording: Path) -> list[Path]:
        return sum(files(recording).values(), []) if recording.is_dir() else files(recording.parent).get(recording.stem, [])

    return [", ".join(f"{file.name} {_stamp(file)}" for file in own(recording)) for recording in recordings]


def _stamp(file: Path) -> str:
    """Size, and hash of the beginning and the end: cheap for thousands of videos. A change in between that keeps the size is missed."""
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(STAMP_BYTES))
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(STAMP_BYTES, size - STAMP_BYTES))
        digest.update(stream.read(STAMP_BYTES))
    return f"{size} {digest.hexdigest()[:16]}"
