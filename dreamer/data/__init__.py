"""Recordings -> episodes -> latents -> batches."""

from dreamer.data.actions import ActionCodec, action_space_from_gym, decode_action, encode_action
from dreamer.data.alignment import (
    chunk_actions,
    chunk_rewards,
    chunk_terminals,
    episode_from_steps,
    episode_from_transitions,
    episode_without_actions,
    episode_without_rewards,
    linspace_actions,
    mtp_targets,
    num_latent_steps,
    shift_actions,
)
from dreamer.data.importing import ImportReport, import_recordings
from dreamer.data.predecessor import convert_predecessor, open_latents
from dreamer.data.prefetch import Prefetcher, map_ahead
from dreamer.data.pretokenize import pretokenize
from dreamer.data.pretokenized_dataset import (
    PretokenizedDataset,
    PretokenizedLoader,
    batches,
    create_pretokenized_dataloader,
    frame_batches,
)
from dreamer.data.readers import READERS, guess_reader, make_reader
from dreamer.data.sources import EpisodeSource, Recordings
from dreamer.data.store import EpisodeStore, EpisodeWriter, LatentStore, LatentWriter, split_episodes
from dreamer.data.windows import WindowSampler

__all__ = [
    "READERS",
    "ActionCodec",
    "EpisodeSource",
    "EpisodeStore",
    "EpisodeWriter",
    "ImportReport",
    "LatentStore",
    "LatentWriter",
    "Prefetcher",
    "PretokenizedDataset",
    "PretokenizedLoader",
    "Recordings",
    "WindowSampler",
    "action_space_from_gym",
    "batches",
    "chunk_actions",
    "chunk_rewards",
    "chunk_terminals",
    "convert_predecessor",
    "create_pretokenized_dataloader",
    "decode_action",
    "encode_action",
    "episode_from_steps",
    "episode_from_transitions",
    "episode_without_actions",
    "episode_without_rewards",
    "frame_batches",
    "guess_reader",
    "import_recordings",
    "linspace_actions",
    "make_reader",
    "map_ahead",
    "mtp_targets",
    "num_latent_steps",
    "open_latents",
    "pretokenize",
    "shift_actions",
    "split_episodes",
]
