"""How well a policy plays in the real environment: one function for trained agents, scripted players and random play.

Every policy meets the same episodes (their seeds depend on ``seed`` alone), so two policies can be compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import gymnasium
import numpy as np
from jaxtyping import Bool, Float, UInt8

from dreamer.data.actions import ActionCodec
from dreamer.envs.seeding import episode_seed
from dreamer.evaluation.intervals import Interval, mean_interval, share_interval
from dreamer.types import Env, Player


@runtime_checkable
class BatchPolicy(Protocol):
    """Acts in several environments at once; keeps one state a slot, forgotten where ``is_first`` is True."""

    name: str

    def reset(self, num_envs: int, seed: int) -> None: ...

    def act(self, frames: UInt8[np.ndarray, "B 3 H W"], is_first: Bool[np.ndarray, " B"]) -> Float[np.ndarray, "B A"]:
        """Rows of the environment's ``ActionSpace``, float32."""
        ...


@dataclass
class Slot:
    """One of the environments that are stepped side by side, with the episode that runs in it."""

    env: gymnasium.Env
    episode: int | None = None  # None: no episodes are left for this slot
    seed: int = 0
    frame: Any = None  # (H, W, 3)
    total: float = 0.0
    length: int = 0
    video: list[np.ndarray] = field(default_factory=list)


class PlayerPolicy:
    """Recorded players (scripted, noisy, random) as a :class:`BatchPolicy`: one player a slot."""

    def __init__(self, make_player: Callable[[], Player]) -> None:
        self.name = make_player().name
        self._make_player = make_player
        self._slots: Sequence[Slot] = ()

    def attach(self, slots: Sequence[Slot]) -> None:
        """Players look at their environment: ``evaluate_policy`` shows them the slots before ``reset``."""
        self._slots = slots
        self._codec = ActionCodec(slots[0].env.action_space)

    def reset(self, num_envs: int, seed: int) -> None:
        if len(self._slots) != num_envs:
            raise ValueError(f"player {self.name!r}: attached to {len(self._slots)} environments, reset for {num_envs}; call attach first")
        self._players = [self._make_player() for _ in self._slots]

    def act(self, frames: UInt8[np.ndarray, "B 3 H W"], is_first: Bool[np.ndarray, " B"]) -> Float[np.ndarray, "B A"]:
        rows = []
        for player, slot, first in zip(self._players, self._slots, is_first, strict=True):
            if first:
                player.reset(cast(Env, slot.env), slot.seed)
            rows.append(self._codec.encode(player.act(slot.frame)))
        return np.stack(rows)


class PolicyPlayer:
    """A trained policy as a player, so that its episodes can be recorded."""

    def __init__(self, policy: BatchPolicy) -> None:
        self.name, self._policy = policy.name, policy

    def reset(self, env: Env, seed: int) -> None:
        self._codec = ActionCodec(env.action_space)
        self._is_first = True
        self._policy.reset(1, seed)

    def act(self, frame: np.ndarray) -> Any:
        rows = self._policy.act(frame.transpose(2, 0, 1)[None], np.array([self._is_first]))
        self._is_first = False
        return self._codec.decode(rows[0])


_LISTS = ("returns", "lengths", "successes", "seeds")


@dataclass(frozen=True)
class AgentResult:
    """What a policy reached in each episode. ``successes`` is empty where success is not defined."""

    name: str
    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    successes: tuple[bool, ...]
    seeds: tuple[int, ...]
    videos: tuple[UInt8[np.ndarray, "_ H W 3"], ...] = field(default=(), compare=False, repr=False)

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def mean_return(self) -> Interval:
        """The mean with its 95 % bootstrap interval over episodes."""
        return mean_interval(np.array(self.returns, np.float64))

    @property
    def success_rate(self) -> Interval | None:
        return share_interval(np.array(self.successes, bool)) if self.successes else None

    def to_json(self) -> dict[str, Any]:
        """Everything but the videos, with the summary beside it."""
        own = {name: list(getattr(self, name)) for name in _LISTS}
        success_rate = self.success_rate
        summary = {"mean_return": self.mean_return.to_json(), "success_rate": success_rate.to_json() if success_rate else None}
        return {"name": self.name, **summary, **own}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AgentResult:
        return cls(data["name"], *(tuple(data[key]) for key in _LISTS))


def evaluate_policy(
    make_env: Callable[[], gymnasium.Env],
    policy: BatchPolicy,
    *,
    num_episodes: int,
    seed: int,
    num_envs: int = 16,
    success_return: float | None = None,
    num_videos: int = 0,
    codec: ActionCodec | None = None,
) -> AgentResult:
    """Play ``num_episodes`` whole episodes, ``num_envs`` side by side in this process.

    An episode succeeds if its last ``info["success"]`` says so; without one, if its return reaches ``success_return``.
    The frames of the first ``num_videos`` episodes are kept. ``codec`` turns the policy's rows into the environment's
    actions (default: the codec of its action space).
    """
    if num_episodes < 1 or num_envs < 1:
        raise ValueError(f"num_episodes is {num_episodes}, num_envs {num_envs}; expected at least 1 of each")
    slots = [Slot(make_env()) for _ in range(min(num_envs, num_episodes))]
    codec = codec or ActionCodec(slots[0].env.action_space)
    seeds = [episode_seed(seed, index, "evaluate") for index in range(num_episodes)]
    finished: dict[int, tuple[float, int, bool | None, list[np.ndarray]]] = {}
    if isinstance(policy, PlayerPolicy):
        policy.attach(slots)
    policy.reset(len(slots), seed)
    for index, slot in enumerate(slots):
        _start(slot, index, seeds, num_videos)
    num_started = len(slots)
    is_first = np.ones(len(slots), bool)
    while len(finished) < num_episodes:
        frames = np.stack([slot.frame.transpose(2, 0, 1) for slot in slots])
        rows = policy.act(frames, is_first)
        if rows.shape != (expected := (len(slots), codec.space.num_columns)):
            raise ValueError(f"policy {policy.name!r}: act gave an array of shape {rows.shape}; expected {expected}")
        is_first = np.zeros(len(slots), bool)
        for place, slot in enumerate(slots):
            if slot.episode is None:
                continue
            is_over, info = _step(slot, codec.decode(rows[place]), num_videos)
            if is_over:
                is_success = info.get("success", None if success_return is None else slot.total >= success_return)
                finished[slot.episode] = (slot.total, slot.length, is_success, slot.video)
                is_first[place] = num_started < num_episodes
                _start(slot, num_started if is_first[place] else None, seeds, num_videos)
                num_started += int(is_first[place])
    for slot in slots:
        slot.env.close()
    returns, lengths, successes, videos = zip(*(finished[index] for index in range(num_episodes)), strict=True)
    return AgentResult(
        name=policy.name,
        returns=returns,
        lengths=lengths,
        successes=() if None in successes else tuple(map(bool, successes)),
        seeds=tuple(seeds),
        videos=tuple(np.stack(video) for video in videos[:num_videos]),
    )


def _start(slot: Slot, episode: int | None, seeds: Sequence[int], num_videos: int) -> None:
    slot.episode = episode
    if episode is None:
        return
    slot.seed, slot.total, slot.length = seeds[episode], 0.0, 0
    slot.frame, _ = slot.env.reset(seed=slot.seed)
    slot.video = [slot.frame] if episode < num_videos else []


def _step(slot: Slot, action: Any, num_videos: int) -> tuple[bool, dict[str, Any]]:
    assert slot.episode is not None
    slot.frame, reward, terminated, truncated, info = slot.env.step(action)
    slot.total += float(reward)
    slot.length += 1
    if slot.episode < num_videos:
        slot.video.append(slot.frame)
    return bool(terminated or truncated), info


def difference_interval(a: AgentResult, b: AgentResult, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> Interval:
    """``a.mean - b.mean`` with its bootstrap interval: over pairs if both played the same episodes, else of independent means."""
    if a.seeds == b.seeds:
        return mean_interval(np.subtract(a.returns, b.returns), level=level, num_resamples=num_resamples, seed=seed)
    if min(len(a.returns), len(b.returns)) < 2:
        return Interval(a.mean - b.mean)
    rng = np.random.default_rng(seed)
    means = [rng.choice(result.returns, size=(num_resamples, len(result.returns))).mean(1) for result in (a, b)]
    low, high = np.quantile(means[0] - means[1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(a.mean - b.mean, float(low), float(high))
