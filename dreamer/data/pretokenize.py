"""Episodes to latents, once, before training.

A group of episodes becomes one shard, whose bytes depend on these episodes and on the tokenizer alone (``dreamer/data/groups.py``).
So it does not matter which process makes a shard, nor how often the work was cut off: what is finished is skipped, the rest is made.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from dreamer.data.alignment import chunk_actions, chunk_rewards, chunk_terminals, linspace_actions, num_latent_steps
from dreamer.data.files import atomic_file, machine_fault
from dreamer.data.groups import Groups, Source, plan_groups
from dreamer.data.prefetch import Prefetcher
from dreamer.data.shards import STORE_FILE
from dreamer.data.sources import EpisodeSource
from dreamer.data.store import LatentStore, LatentWriter
from dreamer.interrupt import PATIENCE, Stop, deferred
from dreamer.types import Episode, Tokenizer

CHOOSE_ACTIONS = {"all": chunk_actions, "linspace": linspace_actions}
QUARANTINE_FILE = "quarantine.json"
Actions = Literal["all", "linspace"]


def pretokenize(
    source: EpisodeSource,
    tokenizer: Tokenizer,
    path: Path | str,
    *,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> LatentStore:
    """Encode the episodes of an ``EpisodeStore`` or of ``Recordings`` and write a ``LatentStore``.

    Run again after an interruption, or after episodes were added: finished groups of ``shard_episodes`` are skipped, the last one is made
    again if it has grown. The result is the same as without the interruption, byte for byte. shard: (i, n) makes every n-th group from the
    i-th on; n processes with i = 0 .. n - 1 and the same folder share the work, and the last one completes the store.

    What is broken is left out and listed in quarantine.json; strict: it is an error. What cannot be read for a reason that may pass (too
    many open files, a network disk that is away) is never left out: ``OSError``, to run again. settings: those of ``GroupMaker``.
    progress(done, total) is called after each episode.

    Raises ``ValueError`` if nothing can be read, if the latents there were made by another tokenizer, with other settings or from other
    episodes, and if the tokenizer's output has another shape than it promises; ``Interrupted`` after SIGINT or SIGTERM, at the end of a
    group or, if that takes long, without it.
    """
    return make_share(GroupMaker(source, tokenizer, Path(path), **settings), shard, progress)


def make_share(maker: GroupMaker, shard: tuple[int, int], progress: Callable[[int, int], None] | None) -> LatentStore:
    """Make what is not finished of every n-th group from the i-th on; shard: (i, n). ``pretokenize`` says the rest."""
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard is {rank} of {world}; expected i of n with 0 <= i < n")
    own = range(rank, len(maker.groups), world)
    todo = [number for number in own if number not in maker.finished]
    total = sum(len(maker.groups[number]) for number in own)
    done = itertools.count(total - sum(len(maker.groups[number]) for number in todo) + 1)
    with deferred("saving after this group of episodes") as stop:
        maker.make(todo, lambda: progress(next(done), total) if progress else None, stop)
    return write_quarantine(maker.path)


@dataclass
class GroupMaker:
    """Plans the groups of a latent store and makes those that it is told to. ``pretokenize`` says which, or who hands them out.

    ``groups``: all that there are; ``finished``: numbers of those that were done when this was made. Raises what ``pretokenize`` raises.
    """

    source: EpisodeSource
    tokenizer: Tokenizer
    path: Path
    strict: bool = False  # what is broken is an error
    actions: Actions = "all"  # of a latent step's frames, or one a step as ``linspace_actions`` chooses it
    batch_frames: int = 256  # of an episode, encoded at once; a tokenizer that streams takes longer ones piece by piece, another one whole
    batch_episodes: int = 1  # encoded side by side, the shorter ones filled up
    device: torch.device | str = "cpu"
    dtype: Literal["float32", "float16"] = "float32"
    shard_episodes: int = 32  # of a group
    max_episodes: int | None = None  # plan no more
    about: Mapping[str, Any] | None = None  # JSON values to keep with the latents

    def __post_init__(self) -> None:
        self._check_numbers()
        self._fingerprint = self.tokenizer.fingerprint()
        sources = list(self.source.sources)
        found = _open_found(self.path, self.tokenizer, self.actions)
        self._open_writer()  # raises if the latents there were made with other settings
        if found is None or not len(found):  # before anything is written
            _require_readable(self.source, sources[: self.max_episodes], self.tokenizer)
        self._places = {name: place for place, (name, _) in enumerate(sources)}
        # the others were moved away since
        self._left_out = {} if found is None else {entry["name"]: entry["reason"] for entry in found.quarantine}
        self.groups = plan_groups(
            self.path,
            sources,
            self.source.path,
            shard_episodes=self.shard_episodes,
            max_episodes=self.max_episodes,
            left_out=self._left_out,
        )
        self.finished = _finished(found, self.groups, self.strict)

    def make(self, numbers: Sequence[int], tick: Callable[[], None], stop: Stop | None = None) -> None:
        """Make these groups, whether they are finished or not, until ``stop`` is wanted; ``tick`` is called after each episode."""
        reads = (self._read(name) for number in numbers for name, _ in self.groups[number])
        with self._open_writer() as writer, Prefetcher(reads, max(2, self.batch_episodes)) as decoded:  # decodes ahead of the tokenizer
            encoder = _Encoder(self.tokenizer, writer, self.actions, self.batch_frames, self.batch_episodes, self.device)
            for number in numbers:
                if stop is not None and stop.is_wanted:
                    break
                quarantine = []
                with nullcontext() if stop is None else stop.breakable(PATIENCE):
                    for (name, _), read in zip(self.groups[number], decoded, strict=False):  # those of this group
                        if isinstance(read, Episode):
                            encoder.add(name, read)
                        else:
                            quarantine.append({"name": name, "reason": read})
                        tick()
                    encoder.flush()
                writer.write_group(number, self.groups.fingerprint(number), quarantine)

    def _read(self, name: str) -> Episode | str:
        """An episode, or why it is left out."""
        if name not in self._places:
            return self._left_out[name]
        return _read(self.source, self._places[name], name, self.tokenizer, self.strict)

    def _check_numbers(self) -> None:
        stride, numbers = self.tokenizer.temporal_stride, (self.batch_frames, self.batch_episodes, self.shard_episodes, self.max_episodes)
        if self.batch_frames < stride or any(number is not None and number < 1 for number in numbers):
            raise ValueError(
                f"batch_frames {self.batch_frames}, batch_episodes {self.batch_episodes}, shard_episodes {self.shard_episodes}, "
                f"max_episodes {self.max_episodes}; expected at least 1 of each, and of batch_frames at least the temporal stride {stride}"
            )
        if self.batch_episodes > 1 and not self.tokenizer.can_stream:
            raise ValueError(
                f"batch_episodes is {self.batch_episodes}; a tokenizer that cannot stream may look ahead, so it takes one episode at a time"
            )

    def _open_writer(self) -> LatentWriter:
        stride = self.tokenizer.temporal_stride
        used = {"actions": self.actions, "batch_frames": self.batch_frames, "batch_episodes": self.batch_episodes}
        return LatentWriter(
            self.path,
            action_space=self.source.action_space,
            tokenizer_fingerprint=self._fingerprint,
            token_grid=self.tokenizer.token_grid,
            latent_channels=self.tokenizer.latent_channels,
            temporal_stride=stride,
            actions_per_step=1 if self.actions == "linspace" else stride,
            source_fingerprint="",  # each group has its own
            dtype=self.dtype,
            shard_episodes=None,
            extra={"frames_per_second": self.source.fps, "source": self.source.extra, "pretokenize": used, **(self.about or {})},
        )


def _open_found(path: Path, tokenizer: Tokenizer, actions: Actions) -> LatentStore | None:
    """What an earlier call has finished. Raises ``ValueError`` if that was done with another tokenizer or other ``actions``."""
    if not (path / STORE_FILE).exists():
        return None
    found = LatentStore(path, allow_partial=True)
    found.check_tokenizer(tokenizer.fingerprint())
    found.check_actions(actions)
    return found


def _require_readable(source: EpisodeSource, sources: list[Source], tokenizer: Tokenizer) -> None:
    """Raise ``ValueError`` if no source can be read, or if the first that can has other frames than the tokenizer takes."""
    first: Exception | None = None
    for place, (name, _) in enumerate(sources):
        try:
            episode = _episode(source, place, name)
        except ValueError as error:
            first = first or error
        else:
            return _check_frames(episode, tokenizer, f"{source.path}: {name}")
    reason = f"; the first: {first}" if first else ""
    raise ValueError(f"{source.path}: none of {len(sources)} episodes can be read{reason}") from first


def _check_frames(episode: Episode, tokenizer: Tokenizer, where: str) -> None:
    if episode.frames.shape[1:] != tuple(tokenizer.frame_shape):
        raise ValueError(
            f"{where}: frames of shape {episode.frames.shape[1:]}; the tokenizer takes {tuple(tokenizer.frame_shape)}: resize the frames, "
            "or take a tokenizer for their size"
        )


def _read(source: EpisodeSource, place: int, name: str, tokenizer: Tokenizer, strict: bool) -> Episode | str:
    """An episode, or why it is left out."""
    try:
        episode = _episode(source, place, name)
        _check_frames(episode, tokenizer, name)
    except ValueError as error:
        if strict:
            raise
        return str(error)
    return episode


def _episode(source: EpisodeSource, place: int, name: str) -> Episode:
    """Raises ``ValueError`` if the episode is at fault, ``OSError`` if the machine is: then it must not be left out for good."""
    try:
        return source.episode(place)
    except (ValueError, OSError) as error:
        if fault := machine_fault(error):
            raise OSError(
                f"{source.path}: {name} could not be read now ({fault}), which is no fault of the recording; run again"
            ) from error
        raise ValueError(str(error)) from error


def _finished(found: LatentStore | None, groups: Groups, strict: bool) -> set[int]:
    """The groups whose shards are there as they should be; ``strict``: and lack nothing that was to be in them."""
    if found is None:
        return set()
    headers = {shard.number: shard.header for shard in found.shards}
    return {
        number
        for number in range(len(groups))
        if number in headers
        and headers[number]["source_fingerprint"] == groups.fingerprint(number)
        and not (strict and headers[number]["quarantine"])
    }


@dataclass
class _Encoder:
    """Collects episodes and encodes ``batch_episodes`` of them side by side."""

    tokenizer: Tokenizer
    writer: LatentWriter
    actions: Actions
    batch_frames: int
    batch_episodes: int
    device: torch.device | str
    waiting: list[tuple[str, Episode]] = field(default_factory=list)

    def add(self, name: str, episode: Episode) -> None:
        self.waiting.append((name, episode))
        if len(self.waiting) == self.batch_episodes:
            self.flush()

    def flush(self) -> None:
        """Encode what waits, and hand it to the writer."""
        if not self.waiting:
            return
        latents = encode_frames(self.tokenizer, [episode.frames for _, episode in self.waiting], self.batch_frames, self.device)
        stride = self.tokenizer.temporal_stride
        for (name, episode), rows in zip(self.waiting, latents, strict=True):
            self.writer.add(
                rows,
                *CHOOSE_ACTIONS[self.actions](episode.actions, episode.action_mask, stride),
                chunk_rewards(episode.rewards, stride),
                chunk_terminals(episode.terminals, stride),
                episode.task,
                episode.has_rewards,
                name,
            )
        self.waiting.clear()


@torch.no_grad()
def encode_frames(
    tokenizer: Tokenizer, episodes: list[UInt8[np.ndarray, "_ C H W"]], batch_frames: int, device: torch.device | str = "cpu"
) -> list[Float32[np.ndarray, "_ N Z"]]:
    """The latents of episodes that are encoded side by side, at most ``batch_frames`` frames of each at once if the tokenizer streams.

    Shorter episodes repeat their last frame until the longest ends. What that adds is cut off again; as latents depend on no later frame,
    nothing else changes. Raises ``ValueError`` if the tokenizer's output has another shape than it promises.
    """
    stride, (rows, columns) = tokenizer.temporal_stride, tokenizer.token_grid
    lengths = [len(frames) for frames in episodes]
    longest = max(lengths)
    streaming: Any = tokenizer if tokenizer.can_stream and longest > batch_frames else None
    cuts = [0, longest]
    if streaming is not None:  # steps end at the frames 0, P, 2P, ...
        first, hop = 1 + (batch_frames - 1) // stride * stride, batch_frames // stride * stride
        cuts = [0, *range(first, longest, hop), longest]
        cache = streaming.new_cache(len(episodes), "encoder")
    parts: list[np.ndarray] = []
    for start, stop in itertools.pairwise(cuts):
        index = np.arange(start, stop)
        piece = torch.from_numpy(np.stack([frames[np.minimum(index, len(frames) - 1)] for frames in episodes])).to(device)
        latents = tokenizer.encode(piece) if streaming is None else streaming.encode(piece, cache)
        steps = num_latent_steps(stop, stride) - (num_latent_steps(start, stride) if start else 0)
        expected = (len(episodes), steps, rows * columns, tokenizer.latent_channels)
        if tuple(latents.shape) != expected:
            raise ValueError(f"tokenizer: {len(index)} frames gave latents of shape {tuple(latents.shape)}; expected {expected}")
        parts.append(latents.float().cpu().numpy())
    whole = np.concatenate(parts, axis=1)
    return [latents[: num_latent_steps(length, stride)] for latents, length in zip(whole, lengths, strict=True)]


def write_quarantine(path: Path) -> LatentStore:
    """Write down what all shards say was left out; again if another process has finished one meanwhile. So the last process, whichever
    it is, has seen them all."""
    store = LatentStore(path, allow_partial=True)
    while True:
        with atomic_file(path / QUARANTINE_FILE) as tmp:
            tmp.write_text(json.dumps(store.quarantine, indent=1) + "\n")
        again = LatentStore(path, allow_partial=True)
        if again.quarantine == store.quarantine:
            return again
        store = again
