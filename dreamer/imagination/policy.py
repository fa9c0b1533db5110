"""A trained agent that acts on real frames: tokenizer, dynamics and policy head, a latent step at a time.

Shape letters: B environments, b those of a group, P frames per latent step, C H W pixels, A action columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dreamer.imagination.sampler import Sampler, SamplerConfig, SamplerState
from dreamer.imagination.tokenizers import StreamCache, require_streaming
from dreamer.models import Agent
from dreamer.types import Tokenizer

Mode = Literal["sampled", "argmax"]


@dataclass
class _Group:
    """Environments whose episodes began at the same frame, and what the models remember of them."""

    slots: Int[np.ndarray, " b"]
    encoder: StreamCache
    dream: SamplerState
    frames: list[UInt8[Tensor, "b 3 H W"]] = field(default_factory=list)  # seen since the last latent step

    def without(self, left: Bool[np.ndarray, " b"]) -> _Group:
        rows = torch.from_numpy(np.flatnonzero(~left))
        state, here = self.dream, rows.to(self.dream.task.device)
        dream = SamplerState(state.cache.rows(rows), state.generator, state.task[here])
        return _Group(self.slots[~left], self.encoder.rows(rows), dream, [frame[here] for frame in self.frames])


class AgentPolicy:
    """Implements ``evaluation.agent.BatchPolicy``: several environments at once, each with its own past.

    With P frames a latent step, step t is finished at frame Pt (step 0 is frame 0 alone). There the agent looks and chooses the actions of
    the frames Pt .. Pt+P-1, which are played without looking again; an agent of one action a step holds it for the P frames.

    Environments that started together share one batch, so that the usual case (episodes of one length) costs one pass a step.
    """

    def __init__(self, agent: Agent, tokenizer: Tokenizer, sampler: SamplerConfig, *, mode: Mode, name: str, task: int = 0) -> None:
        self.agent, self.tokenizer = agent, require_streaming(tokenizer, agent)
        self.sampler = Sampler(agent.dynamics, sampler)
        self.mode, self.name, self.task = mode, name, task
        self.device = agent.dynamics.device

    def reset(self, num_envs: int, seed: int) -> None:
        num_actions = self.agent.dynamics.actions_per_step
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._groups: list[_Group] = []
        self._actions = torch.zeros(num_envs, num_actions, self.agent.action_space.num_columns, device=self.device)
        self._known = torch.zeros(num_envs, num_actions, dtype=torch.bool, device=self.device)

    @torch.no_grad()
    def act(self, frames: UInt8[np.ndarray, "B 3 H W"], is_first: Bool[np.ndarray, " B"]) -> Float[np.ndarray, "B A"]:
        """One action a slot, as rows of the agent's action space."""
        self._regroup(is_first)
        pictures = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device)
        out = np.zeros((len(frames), self.agent.action_space.num_columns), np.float32)
        stride = self.tokenizer.temporal_stride
        for group in self._groups:
            slots = torch.from_numpy(group.slots).to(self.device)
            group.frames.append(pictures[slots])
            is_start = group.dream.cache.num_steps == 0
            if len(group.frames) == (1 if is_start else stride):
                self._decide(group, slots)
            place = len(group.frames) * self._actions.shape[1] // stride  # an only action is held
            out[group.slots] = self._actions[slots, place].cpu().numpy()
        return out

    def _decide(self, group: _Group, slots: Int[Tensor, " b"]) -> None:
        """Take in the latent step that the group's frames make, with the actions that led there, and choose those that follow."""
        latents = self.tokenizer.encode(torch.stack(group.frames, dim=1), cache=group.encoder)
        group.frames = []
        features = self.sampler.observe(group.dream, latents, self._actions[slots].unsqueeze(1), self._known[slots].unsqueeze(1))
        policy = self.agent.policy.now(features[:, 0])
        self._actions[slots] = policy.mode() if self.mode == "argmax" else policy.sample(self._generator)
        self._known[slots] = True

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
