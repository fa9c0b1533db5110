"""Episodes or recordings to latents: the stage of a run, and recordings by themselves, alone or shared by several processes."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from dreamer.config import DreamerConfig
from dreamer.data import READERS, EpisodeSource, EpisodeStore, LatentStore, Recordings, guess_reader
from dreamer.data.files import read_json
from dreamer.data.pretokenize import GroupMaker, make_share
from dreamer.data.shards import STORE_FILE
from dreamer.data.sources import means_store
from dreamer.models import CosmosTokenizerWrapper, create_cosmos_tokenizer_from_config
from dreamer.pipeline.collect import ProgressBar
from dreamer.pipeline.run import Run, choose_device, provenance, write_json
from dreamer.training.distributed import Ranks, parse_share
from dreamer.training.models_io import AnyTokenizer

RECORD_FILE = "run.json"  # beside latents that were made without a run

_log = logging.getLogger(__name__)

# Settings that say where a tokenizer comes from, not what its latents are like.
PLACES = {"enabled", "checkpoint_path", "trust_torchscript", "checksums"}


def pretokenize_latents(run: Run) -> bool:
    """Encode every episode with the run's tokenizer; goes on where an earlier call stopped. Latents and episodes have the same numbers,
    so an episode that cannot be read is an error. Nothing to do where ``data.latents`` are learned from. Several processes share the
    groups of episodes."""
    if not run.has_episodes:
        return False
    store, tokenizer = run.episodes(), run.tokenizer()
    is_new = not (run.latents_path / STORE_FILE).exists()
    before = None if is_new else LatentStore(run.latents_path, allow_partial=True).source_fingerprint
    maker = GroupMaker(
        store,
        tokenizer,
        run.latents_path,
        strict=True,
        actions=run.config.data.actions,
        device=run.device,
        about=describe_tokenizer(tokenizer),
    )
    if len(maker.finished) < len(maker.groups):
        run.note_start()
    return _make(maker, (run.ranks.rank, run.ranks.world)).source_fingerprint != before


def encode(
    open_any: Callable[[torch.device], AnyTokenizer],
    data_path: Path,
    output_path: Path,
    *,
    engine: str,
    share: str | None,
    num_workers: int | None,
    device: str,
    command: str,
    **settings: Any,
) -> LatentStore:
    """Encode the recordings or the episode store at ``data_path`` with the tokenizer that ``open_any`` gives for a device: this process's
    ``share`` of it (engine: local), or all of it, by ``num_workers`` actors of a Ray cluster (ray). settings: those of ``open_groups``.

    ``RECORD_FILE`` beside the latents says, from the start, what ``command`` is making them, with what."""
    if engine == "local":
        if num_workers is not None:
            raise ValueError("--workers is for --engine ray; processes of your own: --shard i/n, or torchrun")
        shard = own_share(share)
        maker = open_groups(data_path, output_path, open_any(choose_device(device)), **settings)
        _note_start(maker, command)
        return _make(maker, shard)
    if share is not None:
        raise ValueError("--shard and --engine ray are both given; expected one of them: Ray hands out the work by itself")
    from dreamer.pipeline.pretokenize_ray import load_ray, pretokenize_on_ray

    load_ray()  # before anything is written
    open_maker = functools.partial(_open_groups_on, open_any=open_any, paths=(data_path, output_path), settings=settings)
    maker = open_maker(torch.device("cpu"))
    _note_start(maker, command)
    with ProgressBar("pretokenize") as bar:
        return pretokenize_on_ray(maker, open_maker, device, num_workers, bar)


def _open_groups_on(
    device: torch.device, *, open_any: Callable[[torch.device], AnyTokenizer], paths: tuple[Path, Path], settings: Mapping[str, Any]
) -> GroupMaker:
    """``open_groups`` as other processes can be told to call it."""
    return open_groups(*paths, open_any(device), **settings)


def _note_start(maker: GroupMaker, command: str) -> None:
    if len(maker.finished) < len(maker.groups):
        file = maker.path / RECORD_FILE
        earlier = read_json(file, "remove it and run again") if file.exists() else {}
        write_json(file, provenance(command, torch.device(maker.device), earlier))


def pretokenize_path(
    data_path: Path, output_path: Path, tokenizer: AnyTokenizer, *, shard: tuple[int, int] = (0, 1), **settings: Any
) -> LatentStore:
    """``make_share`` of what ``open_groups`` gives."""
    return _make(open_groups(data_path, output_path, tokenizer, **settings), shard)


def _make(maker: GroupMaker, shard: tuple[int, int]) -> LatentStore:
    with ProgressBar("pretokenize", is_shown=shard[0] == 0) as bar:
        return make_share(maker, shard, bar)


def open_groups(
    data_path: Path,
    output_path: Path,
    tokenizer: AnyTokenizer,
    *,
    reader: str | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: Literal["float32", "float16"] = "float16",
    batch_frames: int = 121,
    shard_episodes: int = 8,
    **settings: Any,
) -> GroupMaker:
    """What makes the latents of the recordings or the episode store at ``data_path``. reader, options: as ``open_source`` takes them.
    The others are those of ``GroupMaker``; batch_frames: here the window of Cosmos, so that each is encoded in one go."""
    return GroupMaker(
        open_source(data_path, tokenizer.frame_shape, reader, options or {}),
        tokenizer,
        output_path,
        dtype=dtype,
        batch_frames=batch_frames,
        shard_episodes=shard_episodes,
        device=tokenizer.device,
        about=describe_tokenizer(tokenizer),
        **settings,
    )


def open_source(path: Path, frame_shape: tuple[int, int, int], reader_name: str | None, options: Mapping[str, Any]) -> EpisodeSource:
    """An episode store, or recordings (reader_name: their format; default: guessed by the names of the files), scaled to ``frame_shape``
    where the reader can do that and ``options`` do not say otherwise."""
    if means_store(path, reader_name, options):
        return EpisodeStore(path)
    name = reader_name or guess_reader(path)
    scales = name in READERS and "size" in inspect.signature(READERS[name]).parameters
    recordings = Recordings(path, name, {**({"size": list(frame_shape[1:])} if scales else {}), **options})
    for skipped in recordings.skipped:
        _log.warning("left out: %s", skipped)
    return recordings


def open_tokenizer(config: DreamerConfig, device: torch.device) -> CosmosTokenizerWrapper:
    """The tokenizer of ``config.cosmos_tokenizer``, with the threads of ``config``. Raises ``ValueError`` if it is not enabled, or not
    fitted."""
    if not config.cosmos_tokenizer.enabled:
        raise ValueError(
            "no tokenizer: cosmos_tokenizer.enabled is false; set it to true, or give the folder of a trained one with --tokenizer DIR"
        )
    if config.cosmos_tokenizer.spatial_mode == "project":
        raise ValueError(
            "cosmos_tokenizer.spatial_mode is project, whose projection is fitted to frames first: with the settings of a run, "
            "dreamer record and dreamer train tokenizer; then give --tokenizer RUN_DIR/tokenizer in the place of settings"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return create_cosmos_tokenizer_from_config(config.cosmos_tokenizer, device)


def describe_tokenizer(tokenizer: AnyTokenizer) -> dict[str, Any]:
    """What is kept with the latents: the tokenizer's kind, settings and normalisation, as JSON values."""
    facts = {
        "kind": type(tokenizer).__name__,
        "settings": tokenizer.config.model_dump(mode="json", exclude=PLACES),
        "latent_mean": tokenizer.latent_mean.tolist(),
        "latent_std": tokenizer.latent_std.tolist(),
    }
    return {"tokenizer": facts}


def own_share(text: str | None) -> tuple[int, int]:
    """(i, n) from ``i/n``; None: from RANK and WORLD_SIZE, as torchrun sets them, else (0, 1)."""
    if text is not None:
        return parse_share(text, "--shard")
    ranks = Ranks.from_environment()
    return ranks.rank, ranks.world
