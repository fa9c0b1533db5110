"""What a recording, a folder of recordings, an episode store or a latent store holds: in words, in numbers, and on one picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dreamer.data import EpisodeStore, LatentStore, guess_reader, make_reader
from dreamer.data.importing import recording_name, skipped_by
from dreamer.data.readers.files import load_json
from dreamer.data.shards import STORE_FILE
from dreamer.data.sources import means_store
from dreamer.data.tally import EpisodeTally
from dreamer.evaluation.contact_sheet import SheetRow, contact_sheet
from dreamer.evaluation.media import encode_png, write_atomic
from dreamer.types import ActionSpace, Episode

SHEET_ROWS, SHEET_COLUMNS = 4, 8
STILL_SHARE = 0.9  # of frames that repeat the one before: more is worth a look
STILL_LEVELS = 4  # grey levels by which a pixel of a still video changes: encoding noise (measured on MineRL's clips)
FLAT_DEVIATION = 0.05  # of a latent channel; normalised latents have about 1

# What readers note down in ``Episode.info``, as counts, in words.
NOTES = {
    "stuck_attack": "ticks of an attack that nobody pressed were released",
    "hotbar_by_wheel": "turns of the mouse wheel were taken as keys of the hotbar",
    "leading_frames_skipped": "frames before the beginning of an episode were skipped",
    "dropped.frames_without_row": "frames without a row of actions were dropped",
    "dropped.rows_without_frame": "rows of actions without a frame were dropped",
    "dropped.ticks": "ticks were left out, as the options of the reader say",
}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Inspection:
    """What was found. ``facts`` are titles and texts; ``problems`` is empty if nothing looks wrong; a latent store has no ``sheet``."""

    path: Path
    kind: str
    facts: list[tuple[str, str]]
    tally: EpisodeTally
    unit: str  # of the lengths
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sheet: UInt8[np.ndarray, "H2 W2 3"] | None = None

    def text(self) -> str:
        rows = [*self.facts, *self.tally.lines(self.unit)]
        rows += [("notes" if i == 0 else "", note) for i, note in enumerate(self.notes)]
        rows += [("problems" if i == 0 else "", problem) for i, problem in enumerate(self.problems or ["none found"])]
        width = max(len(title) for title, _ in rows) + 2
        return "\n".join([f"{self.path}: {self.kind}", *(f"{title:{width}}{text}".rstrip() for title, text in rows)])

    def to_json(self) -> dict[str, Any]:
        found = {"path": str(self.path), "kind": self.kind, "facts": dict(self.facts), "unit": self.unit}
        return found | self.tally.to_json() | {"notes": self.notes, "problems": self.problems}

    def write(self, out: Path) -> list[Path]:
        """inspect.json and, where there are frames, contact_sheet.png."""
        files = [write_atomic(out / "inspect.json", json.dumps(self.to_json(), indent=1).encode())]
        if self.sheet is not None:
            files.append(write_atomic(out / "contact_sheet.png", encode_png(self.sheet)))
        return files


def inspect_path(
    path: Path,
    reader_name: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    max_episodes: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look at everything at ``path``, or at ``max_episodes`` episodes spread evenly over it.

    reader_name, options: for recordings (default: guessed by the names of the files). progress(done, total) is called after each episode.
    Raises ``ValueError`` naming the path for what does not exist, is of no known kind, or cannot be read at all; single broken recordings
    and episodes become ``problems``.
    """
    if not path.exists():
        raise ValueError(f"{path}: does not exist")
    if max_episodes is not None and max_episodes < 1:
        raise ValueError(f"max_episodes is {max_episodes}; expected at least 1")
    if means_store(path, reader_name, options or {}):
        meta = load_json(path / STORE_FILE)
        if isinstance(meta, dict) and meta.get("kind") == LatentStore.kind:
            return _inspect_latents(LatentStore(path, allow_partial=True), max_episodes, progress)
        return _inspect_store(EpisodeStore(path), max_episodes, progress)
    if reader_name is None and (stores := [path / name for name in ("episodes", "latents") if (path / name / STORE_FILE).is_file()]):
        raise ValueError(f"{path}: is the folder of a run; inspect {' or '.join(map(str, stores))}")
    return _inspect_recordings(path, reader_name or guess_reader(path), options or {}, max_episodes, progress)


def _inspect_recordings(
    path: Path, name: str, options: Mapping[str, Any], max_episodes: int | None, progress: Progress | None
) -> Inspection:
    reader = make_reader(name, path, **options)
    recordings = reader.find(path)
    chosen, look = _evenly(len(recordings), max_episodes), _Look(reader.action_space)
    look.problems += skipped_by(reader)
    for done, index in enumerate(chosen, 1):
        try:
            episode = reader.read(recordings[index])
        except (ValueError, OSError) as error:
            look.problems.append(str(error))
        else:
            title, still = recording_name(recordings[index], path), _num_still(episode.frames)
            rows = (episode.actions, episode.action_mask, episode.rewards, episode.terminals, episode.has_rewards)
            look.add(title, rows, episode.info, still)
            if look.wants_row(done - 1, len(chosen)):
                look.rows.append(_sheet_row(title, episode))
        if progress:
            progress(done, len(chosen))
    if not look.tally.lengths:
        raise ValueError(f"{path}: none of {len(chosen)} recordings can be read; the first: {look.problems[-len(chosen)]}")
    shape = look.rows[0].frames.shape[1:] if look.rows else ()
    facts = [("episodes", _count(len(chosen), len(recordings), "recordings")), _frames_fact(shape, reader.frames_per_second, look.tally)]
    return look.inspection(path, f"recordings, read as {name}", facts)


def _inspect_store(store: EpisodeStore, max_episodes: int | None, progress: Progress | None) -> Inspection:
    _require_episodes(store)
    chosen, look = _evenly(len(store), max_episodes), _Look(store.action_space)
    for done, index in enumerate(chosen, 1):
        title = f"{index}: {store.infos[index].get('source') or store.infos[index].get('player') or 'episode'}"
        try:
            rows = store.arrays(index)
            same = rows["frame_checksums"][1:] == rows["frame_checksums"][:-1]
            row = _stored_row(title, store, index) if look.wants_row(done - 1, len(chosen)) else None
        except ValueError as error:
            look.problems.append(str(error))
        else:
            columns = (rows["actions"], rows["action_mask"], rows["rewards"], rows["terminals"], bool(store.has_rewards[index]))
            look.add(title, columns, store.infos[index], int(same.sum()))
            look.rows += [row] if row else []
        if progress:
            progress(done, len(chosen))
    if not look.tally.lengths:
        raise ValueError(f"{store.path}: none of {len(chosen)} episodes can be read; the first: {look.problems[0]}")
    facts = [("episodes", _count(len(chosen), len(store), "episodes")), _frames_fact(store.frame_shape, store.fps, look.tally)]
    facts.append(("made by", json.dumps(store.extra)))
    return look.inspection(store.path, "episode store", facts)


def _inspect_latents(store: LatentStore, max_episodes: int | None, progress: Progress | None) -> Inspection:
    _require_episodes(store)
    chosen, look = _evenly(len(store), max_episodes), _Look(store.action_space)
    if not store.is_complete:
        look.problems.append(f"incomplete: {len(store.finished)} of {store.num_groups} groups of episodes are there; run pretokenize again")
    look.problems += [f"{left_out['name']} was left out: {left_out['reason']}" for left_out in store.quarantine]
    sums = np.zeros((3, store.latent_channels))  # how many, their sum, the sum of their squares
    for done, index in enumerate(chosen, 1):
        try:
            rows = store.arrays(index)
        except ValueError as error:
            look.problems.append(str(error))
        else:
            values = rows["latents"].reshape(-1, store.latent_channels).astype(np.float64)
            sums += np.stack([np.full(store.latent_channels, len(values)), values.sum(0), np.square(values).sum(0)])
            actions, mask = rows["actions"].reshape(-1, store.action_space.num_columns), rows["action_mask"].reshape(-1)
            look.tally.add(actions, mask, rows["rewards"], rows["terminals"], bool(store.has_rewards[index]))
        if progress:
            progress(done, len(chosen))
    if not look.tally.lengths:
        raise ValueError(f"{store.path}: none of {len(chosen)} episodes can be read; the first: {look.problems[0]}")
    mean = sums[1] / sums[0]
    deviation = np.sqrt(np.maximum(sums[2] / sums[0] - mean**2, 0))
    flat = np.flatnonzero(deviation < FLAT_DEVIATION)
    if len(flat):
        look.problems.append(f"{len(flat)} of {len(mean)} channels hardly vary (deviation below {FLAT_DEVIATION}): {flat.tolist()[:16]}")
    grid = " x ".join(map(str, store.token_grid))
    facts = [
        ("episodes", _count(len(chosen), len(store), "episodes")),
        ("latents", f"{grid} tokens of {store.latent_channels}, {store.meta['dtype']}, {store.temporal_stride} frames a step"),
        ("channels", f"means {mean.min():.2f} to {mean.max():.2f}, deviations {deviation.min():.2f} to {deviation.max():.2f}"),
        ("tokenizer", store.tokenizer_fingerprint),
    ]
    return look.inspection(store.path, "latent store", facts, unit="latent steps")


class _Look:
    """What is gathered on the way through the episodes."""

    def __init__(self, space: ActionSpace) -> None:
        self.space, self.tally = space, EpisodeTally(space)
        self.rows: list[SheetRow] = []
        self.problems: list[str] = []
        self.counts: dict[str, int] = {}
        self.num_gui = self.num_still = 0

    def wants_row(self, index: int, total: int) -> bool:
        return index in _evenly(total, SHEET_ROWS) and len(self.rows) < SHEET_ROWS

    def add(
        self, title: str, rows: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool], info: Mapping[str, Any], still: int
    ) -> None:
        self.tally.add(*rows)
        length = self.tally.lengths[-1]
        self.num_still += still
        if length > SHEET_COLUMNS and still >= STILL_SHARE * (length - 1):
            self.problems.append(f"{title}: {still} of {length} frames are like the one before")
        for key, value in _flat(info):
            if isinstance(value, int) and (key in NOTES or key.startswith("dropped_actions.")):
                self.counts[key] = self.counts.get(key, 0) + value
            elif key == "gui_rows" and isinstance(value, list):
                self.num_gui += sum(stop - start for start, stop in value)

    def inspection(self, path: Path, kind: str, facts: list[tuple[str, str]], unit: str = "frames") -> Inspection:
        notes = [f"{self.counts[key]} {words}" for key, words in NOTES.items() if self.counts.get(key)]
        items = {key.removeprefix("dropped_actions."): n for key, n in sorted(self.counts.items()) if key not in NOTES}
        notes += [f"{n} uses of {name} were dropped" for name, n in items.items()]
        if self.num_still:
            notes.append(f"{self.num_still} frames show the same as the one before")
        if self.num_gui:
            notes.append(f"{self.num_gui} frames with a GUI open")
        sheet = contact_sheet(self.rows, self.space) if self.rows else None
        return Inspection(path, kind, facts, self.tally, unit, notes, self.problems, sheet)


def _flat(info: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The values of a dictionary and of the dictionaries in it, by dotted key."""
    inner = [(f"{key}.{name}", v) for key, value in info.items() if isinstance(value, Mapping) for name, v in value.items()]
    return [(key, value) for key, value in info.items() if not isinstance(value, Mapping)] + inner


def _evenly(total: int, most: int | None) -> list[int]:
    """At most ``most`` of ``total`` indices, spread evenly, the first and the last included."""
    return np.unique(np.linspace(0, total - 1, min(total, most or total)).round().astype(int)).tolist()


def _sheet_row(title: str, episode: Episode) -> SheetRow:
    steps = _evenly(len(episode), SHEET_COLUMNS)
    return SheetRow(title, steps, episode.frames[steps], episode.actions[steps], episode.action_mask[steps])


def _stored_row(title: str, store: EpisodeStore, index: int) -> SheetRow:
    """Only the frames that are shown are decoded."""
    steps, rows = _evenly(int(store.lengths[index]), SHEET_COLUMNS), store.arrays(index)
    frames = np.concatenate([store.frames(index, t, t + 1) for t in steps])
    return SheetRow(title, steps, frames, rows["actions"][steps], rows["action_mask"][steps])


def _num_still(frames: UInt8[np.ndarray, "F C H W"]) -> int:
    """How many show the one before, but for a video's noise."""
    return sum(int(np.abs(a.astype(np.int16) - b).max()) <= STILL_LEVELS for a, b in zip(frames[1:], frames[:-1], strict=True))


def _count(num: int, total: int, noun: str) -> str:
    return f"{num}" if num == total else f"{num} of {total} {noun}, spread evenly over them"


def _frames_fact(shape: Sequence[int], rate: float, tally: EpisodeTally) -> tuple[str, str]:
    seconds = round(sum(tally.lengths) / rate)
    duration = f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
    return "frames", f"{' x '.join(map(str, shape))} (C x H x W), {rate:g} a second, {duration} in all"


def _require_episodes(store: EpisodeStore | LatentStore) -> None:
    if not len(store):
        raise ValueError(f"{store.path}: holds no episodes")
