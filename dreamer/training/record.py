"""Players act in a real environment; what they see and do becomes an episode store.

Episode ``i`` is a pure function of (environment, players, seed, i): recording again where it stopped gives the same store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np

from dreamer.data.actions import ActionCodec, env_codec
from dreamer.data.alignment import episode_from_transitions
from dreamer.data.files import locked
from dreamer.data.shards import STORE_FILE
from dreamer.data.store import EpisodeStore, EpisodeWriter
from dreamer.envs import make_env, make_player
from dreamer.envs.seeding import episode_seed
from dreamer.interrupt import PATIENCE, deferred
from dreamer.types import Env, Episode, Player

PlayerShare = tuple[str, dict[str, Any], float]  # name, options, fraction of the episodes
PlayerMaker = Callable[..., Player]  # (name, env_name, **options)


def record(
    env_name: str,
    env_options: dict[str, Any],
    players: Sequence[PlayerShare],
    out: Path | str,
    num_episodes: int,
    seed: int,
    *,
    player_maker: PlayerMaker = make_player,
    shard_episodes: int = 32,
    progress: Callable[[int, int], None] | None = None,
    before_adding: Callable[[], None] | None = None,
) -> EpisodeStore:
    """Record until the store at ``out`` holds ``num_episodes``; goes on where an earlier call stopped.

    ``player_maker`` turns names and options into players (pass your own to record a trained agent). ``progress`` is called
    with (episodes done, ``num_episodes``); ``before_adding``, once if there is something to add: it may raise.
    Raises ``ValueError`` for unknown names and options, for fractions that do not sum to 1, and if ``out`` was recorded with
    other settings; nothing is written then. Raises ``Interrupted`` after SIGINT or SIGTERM, once the episodes that have ended are written.
    """
    if num_episodes < 1:
        raise ValueError(f"num_episodes is {num_episodes}; expected at least 1")
    schedule = player_schedule([fraction for _, _, fraction in players], num_episodes)
    env = make_env(env_name, **env_options)
    cast_of_players = [player_maker(name, env_name, **options) for name, options, _ in players]
    codec = env_codec(env)
    extra = {"env": env_name, "env_options": env_options, "players": [list(share) for share in players], "seed": seed}
    fps = float(env.metadata.get("render_fps") or 10)
    writer = EpisodeWriter(out, codec.space, frames_per_second=fps, shard_episodes=shard_episodes, extra=extra)
    with locked(Path(out)), deferred("saving after this episode") as stop, closing(env), writer:
        num_done = EpisodeStore(out).num_episodes if (Path(out) / STORE_FILE).exists() else 0
        if before_adding is not None and num_done < num_episodes:
            before_adding()
        for index in range(num_done, num_episodes):
            if stop.is_wanted:
                break
            with stop.breakable(PATIENCE):
                episode = play_episode(env, cast_of_players[schedule[index]], codec, episode_seed(seed, index, "record"))
            writer.add(episode)
            if progress is not None:
                progress(index + 1, num_episodes)
    return EpisodeStore(out)


def play_episode(env: gymnasium.Env, player: Player, codec: ActionCodec, seed: int) -> Episode:
    """One whole episode; ``info`` holds player, epsilon (None: the player has none), seed and return."""
    frame, _ = env.reset(seed=seed)
    player.reset(cast(Env, env), seed)
    frames, actions, rewards = [frame], [], []
    is_over = terminated = False
    while not is_over:
        action = player.act(frame)
        frame, reward, terminated, truncated, _ = env.step(action)
        frames.append(frame)
        actions.append(codec.encode(action))
        rewards.append(float(reward))
        is_over = bool(terminated or truncated)
    info = {"player": player.name, "epsilon": getattr(player, "epsilon", None), "seed": seed, "return": float(sum(rewards))}
    pictures = np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))
    return episode_from_transitions(pictures, np.stack(actions), np.array(rewards), bool(terminated), info=info)


def player_schedule(fractions: Sequence[float], num_episodes: int) -> list[int]:
    """Which player plays each episode: always the one furthest behind its share, so that every beginning is mixed as told."""
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"players: the fractions are {list(fractions)}; expected positive numbers that sum to 1")
    counts = np.zeros(len(fractions))
    schedule = []
    for index in range(num_episodes):
        behind = np.round(np.array(fractions) * (index + 1) - counts, 9)  # rounded: ties go to the first on every machine
        schedule.append(int(np.argmax(behind)))
        counts[schedule[-1]] += 1
    return schedule
