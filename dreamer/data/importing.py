"""Recordings to an episode store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamer.data.files import locked
from dreamer.data.readers import make_reader
from dreamer.data.shards import STORE_FILE
from dreamer.data.store import EpisodeStore, EpisodeWriter
from dreamer.interrupt import PATIENCE, deferred
from dreamer.types import ActionSpace, Reader


@dataclass(frozen=True)
class ImportReport:
    """What an import did. ``num_known`` recordings were in the store already; ``skipped`` says which the reader left out, and why."""

    path: Path
    num_episodes: int
    num_frames: int
    num_known: int
    skipped: tuple[str, ...] = ()


def import_recordings(
    path: Path | str,
    out: Path | str,
    reader_name: str,
    *,
    max_episodes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    options: Mapping[str, Any] | None = None,
    before_adding: Callable[[], None] | None = None,
) -> ImportReport:
    """Read every recording at ``path`` with the reader ``reader_name`` and append it to the store ``out``.

    Run again to go on: recordings that the store holds are skipped (each is known by its place below ``path``, kept as
    ``info["source"]``). ``options`` go to the reader. progress(done, total) is called after each recording; before_adding,
    once if there is something to add: it may raise.
    Raises ``ValueError`` naming the file at the first broken recording, and ``Interrupted`` after SIGINT or SIGTERM; what was read before
    is kept.
    """
    root, out = Path(path), Path(out)
    options = options or {}
    reader = make_reader(reader_name, root, **options)
    recordings = reader.find(root)[:max_episodes]
    sources = [recording_name(recording, root) for recording in recordings]
    with locked(out):
        known = {i.get("source") for i in EpisodeStore(out).infos} if (out / STORE_FILE).exists() else set()
        if before_adding and not known.issuperset(sources):
            before_adding()
        num_episodes = num_frames = num_known = 0
        extra = reader_facts(reader_name, options)
        writer = EpisodeWriter(out, reader.action_space, frames_per_second=reader.frames_per_second, extra=extra)
        with deferred("saving after this recording") as stop, writer:
            for done, (recording, source) in enumerate(zip(recordings, sources, strict=True), 1):
                if stop.is_wanted:
                    break
                if source in known:
                    num_known += 1
                else:
                    with stop.breakable(PATIENCE):
                        episode = reader.read(recording)
                    writer.add(dataclasses.replace(episode, info={**episode.info, "source": source}))
                    num_episodes, num_frames = num_episodes + 1, num_frames + len(episode)
                if progress:
                    progress(done, len(recordings))
        return ImportReport(out, num_episodes, num_frames, num_known, skipped_by(reader))


def reader_facts(reader_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The reader and its options as JSON values, kept with what was read."""
    given = {name: value.to_json() if isinstance(value, ActionSpace) else value for name, value in options.items()}
    return {"reader": reader_name} | ({"options": given} if given else {})


def recording_name(recording: Path, root: Path) -> str:
    """A recording's place below the folder that was searched."""
    return recording.relative_to(root).as_posix() if recording != root and recording.is_relative_to(root) else recording.name


def skipped_by(reader: Reader) -> tuple[str, ...]:
    """What the reader's last ``find`` left out, with the reasons. A reader keeps them in ``skipped``, if it leaves out anything."""
    return tuple(f"{path}: {reason}" for path, reason in getattr(reader, "skipped", {}).items())
