"""Which episodes make up which shard of a latent store, so that each shard can be made by itself, by any process, again and again.

``sources.json`` lists the sources (recordings, or episodes of a store) in the order of the latents; it only ever grows at its end. Group
g is the g-th run of ``shard_episodes`` sources and becomes the shard of that number. A group is finished when that shard's header
carries the group's fingerprint: after a source was added to it, or has changed, it is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamer.data.files import atomic_file
from dreamer.data.shards import canonical

SOURCES_FILE = "sources.json"
Source = tuple[str, str]  # its name, and what changes with its content


@dataclass(frozen=True)
class Groups:
    shard_episodes: int
    sources: tuple[Source, ...]

    def __len__(self) -> int:
        return -(-len(self.sources) // self.shard_episodes)

    def __getitem__(self, number: int) -> tuple[Source, ...]:
        return self.sources[number * self.shard_episodes : (number + 1) * self.shard_episodes]

    def fingerprint(self, number: int) -> str:
        """Hash of what the group's shard is made from."""
        return hashlib.sha256(canonical(self[number], SOURCES_FILE).encode()).hexdigest()[:32]

    def text(self) -> str:
        return json.dumps({"shard_episodes": self.shard_episodes, "sources": self.sources}, indent=1) + "\n"


def read_groups(folder: Path) -> Groups | None:
    """The groups of a latent store; None if it has none. Raises ``ValueError`` naming a file that does not list them."""
    file = folder / SOURCES_FILE
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
        groups = Groups(int(found["shard_episodes"]), tuple((str(name), str(stamp)) for name, stamp in found["sources"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error!r}); pretokenize into another folder") from error
    if groups.shard_episodes < 1:
        raise ValueError(f"{file}: shard_episodes is {groups.shard_episodes}; expected at least 1")
    return groups


def plan_groups(
    folder: Path,
    sources: Sequence[Source],
    origin: Path,
    *,
    shard_episodes: int,
    max_episodes: int | None = None,
    left_out: Collection[str] = (),
) -> Groups:
    """The groups of a latent store, written down: what was planned before, in its order, then those of ``sources`` that are new.

    ``max_episodes``: plan no more; what was planned before stays. ``left_out``: names that may be missing by now. Processes that plan
    at the same time, from the same sources, write the same. Raises ``ValueError`` if ``sources`` (found at ``origin``) lack what was
    planned before, or for other ``shard_episodes``.
    """
    known = read_groups(folder)
    found = {name: stamp for name, stamp in (known.sources if known else ()) if name in left_out} | dict(sources)
    names = [] if known is None else [name for name, _ in known.sources]
    if known is not None and known.shard_episodes != shard_episodes:
        raise ValueError(
            f"{folder / SOURCES_FILE}: shard_episodes is {known.shard_episodes}; cannot go on with {shard_episodes}. Use another folder"
        )
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{folder}: holds latents of other episodes than {origin}, where {missing[0]!r} is not found ({len(missing)} of {len(names)} "
            "are missing); pretokenize into another folder"
        )
    old = set(names)
    names += [name for name in found if name not in old]
    if max_episodes is not None:
        names = names[: max(max_episodes, len(old))]
    groups = Groups(shard_episodes, tuple((name, found[name]) for name in names))
    if groups != known:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / SOURCES_FILE) as tmp:
            tmp.write_text(groups.text())
    return groups
