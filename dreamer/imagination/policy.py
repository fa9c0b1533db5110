"""A trained agent that acts on real frames: tokenizer, dynamics and policy head, a step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dreamer.imagination.sampler import Sampler, SamplerConfig, SamplerState
from dreamer.models import Agent
from dreamer.models.transformer import TimeCache
from dreamer.types import Tokenizer

Mode = Literal["sampled", "argmax"]


@runtime_checkable
class StreamingTokenizer(Tokenizer, Protocol):
    """A tokenizer that encodes and decodes long videos piece by piece; ``cache`` holds what came before."""

    def encode(self, frames: UInt8[Tensor, "B F C H W"], cache: Any = None) -> Float[Tensor, "B T N Z"]: ...

    def decode(self, latents: Float[Tensor, "B T N Z"], cache: Any = None) -> UInt8[Tensor, "B F C H W"]: ...

    def new_cache(self, batch_size: int, part: Literal["encoder", "decoder"]) -> TimeCache: ...


def require_streaming(tokenizer: Tokenizer, agent: Agent) -> StreamingTokenizer:
    """The same tokenizer. Raises ``ValueError`` unless it can follow a video frame by frame, one action each."""
    if tokenizer.temporal_stride != 1 or agent.dynamics.actions_per_step != 1 or not tokenizer.can_stream:
        raise ValueError(
            f"tokenizer: temporal stride {tokenizer.temporal_stride}, streaming {tokenizer.can_stream}, {agent.dynamics.actions_per_step} "
            "actions a latent step; acting frame by frame needs stride 1, streaming and one action a step"
        )
    return cast(StreamingTokenizer, tokenizer)


@dataclass
class _Group:
    """Environments whose episodes began at the same step, and what the models remember of them."""

    slots: Int[np.ndarray, " b"]
    encoder: TimeCache
    dream: SamplerState

    def without(self, left: Bool[np.ndarray, " b"]) -> _Group:
        rows = torch.from_numpy(np.flatnonzero(~left))
        state = self.dream
        return _Group(
            self.slots[~left],
            _rows(self.encoder, rows, len(left)),
            SamplerState(_rows(state.cache, rows, len(left)), state.generator, state.task[rows.to(state.task.device)]),
        )


def _rows(cache: TimeCache, rows: Tensor, batch_size: int) -> TimeCache:
    """The cache of some rows of a batch. A tokenizer may split each row into several: these follow one another."""
    rows = rows.to(cache.slot_step.device)
    keys, values = ([x.unflatten(0, (batch_size, -1))[rows].flatten(0, 1) for x in part] for part in (cache.keys, cache.values))
    return TimeCache(keys, values, cache.slot_step.clone(), cache.next_step)


class AgentPolicy:
    """Implements ``evaluation.agent.BatchPolicy``: several environments at once, each with its own past.

    Environments that started together share one batch, so that the usual case (episodes of one length) costs one pass a step.
    """

    def __init__(self, agent: Agent, tokenizer: Tokenizer, sampler: SamplerConfig, *, mode: Mode, name: str, task: int = 0) -> None:
        self.agent, self.tokenizer = agent, require_streaming(tokenizer, agent)
        self.sampler = Sampler(agent.dynamics, sampler)
        self.mode, self.name, self.task = mode, name, task
        self.device = agent.dynamics.device

    def reset(self, num_envs: int, seed: int) -> None:
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._groups: list[_Group] = []
        self._actions = torch.zeros(num_envs, 1, self.agent.action_space.num_columns, device=self.device)
        self._known = torch.zeros(num_envs, 1, dtype=torch.bool, device=self.device)

    @torch.no_grad()
    def act(self, frames: UInt8[np.ndarray, "B 3 H W"], is_first: Bool[np.ndarray, " B"]) -> Float[np.ndarray, "B A"]:
        """One action a slot, as rows of the agent's action space."""
        self._regroup(is_first)
        pictures = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device)
        out = np.zeros((len(frames), self.agent.action_space.num_columns), np.float32)
        for group in self._groups:
            slots = torch.from_numpy(group.slots).to(self.device)
            latents = self.tokenizer.encode(pictures[slots].unsqueeze(1), cache=group.encoder)
            features = self.sampler.observe(group.dream, latents, self._actions[slots].unsqueeze(1), self._known[slots].unsqueeze(1))
            policy = self.agent.policy.now(features[:, 0])
            actions = policy.mode() if self.mode == "argmax" else policy.sample(self._generator)
            self._actions[slots], self._known[slots] = actions, True
            out[group.slots] = actions[:, 0].cpu().numpy()
        return out

    def _regroup(self, is_first: Bool[np.ndarray, " B"]) -> None:
        """Slots whose episode begins leave their group and form a new one."""
        if not is_first.any():
            return
        groups = [group.without(is_first[group.slots]) if is_first[group.slots].any() else group for group in self._groups]
        self._groups = [group for group in groups if len(group.slots)]
        new = np.flatnonzero(is_first)
        self._known[torch.from_numpy(new).to(self.device)] = False
        task = torch.full((len(new),), self.task, device=self.device)
        state = self.sampler.start(len(new), task=task, generator=self._generator)
        self._groups.append(_Group(new, self.tokenizer.new_cache(len(new), "encoder"), state))
