"""The world model as a Gymnasium environment: whatever acts in real environments can act in dreams."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor

from dreamer.data.actions import ActionCodec
from dreamer.imagination.policy import require_streaming
from dreamer.imagination.sampler import Sampler, SamplerConfig
from dreamer.models import Agent
from dreamer.ops.spaces import gym_space
from dreamer.types import Batch, Config, Tokenizer


class WorldModelEnvConfig(Config):
    sampler: SamplerConfig = SamplerConfig()
    length: int = Field(default=64, ge=1)  # steps after which an episode is cut off
    ending: Literal["sample", "threshold"] = "sample"  # how the continue probability c ends an episode: with 1 - c, or below one half


class WorldModelEnv(gymnasium.Env):
    """Dreams that start from recorded contexts.

    ``contexts``: a row for each start, all its latent steps are shown to the model. ``reset`` draws one (or takes
    ``options={"context": index}``) and gives its last frame; ``step`` gives the next dreamed frame, the predicted reward, whether the
    predicted continue ends the episode, and ``info`` with ``value`` and ``continue``. ``action_space``: the real environment's, if it
    should be spoken to in the same words.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's class attribute)

    def __init__(
        self,
        agent: Agent,
        tokenizer: Tokenizer,
        contexts: Batch,
        config: WorldModelEnvConfig | None = None,
        action_space: gymnasium.Space[Any] | None = None,
    ) -> None:
        self.config = config or WorldModelEnvConfig()
        self.agent, self.tokenizer, self.contexts = agent, require_streaming(tokenizer, agent), contexts
        steps, seen = contexts.latents.shape[1], agent.config.dynamics.transformer.context_length
        if steps > seen:
            raise ValueError(f"contexts hold {steps} steps; the dynamics sees at most {seen}")
        self.sampler = Sampler(agent.dynamics, self.config.sampler)
        self.render_mode = "rgb_array"
        self.action_space = action_space or gym_space(agent.action_space)
        self.codec = ActionCodec(self.action_space)
        kinds = [[(c.kind, c.size) for c in space.components] for space in (self.codec.space, agent.action_space)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"action_space has the components {kinds[0]}; the agent was trained with {kinds[1]}")
        channels, height, width = tokenizer.frame_shape
        self.observation_space = gymnasium.spaces.Box(0, 255, (height, width, channels), np.uint8)
        self._num_steps: int | None = None  # None: no episode runs

    @torch.no_grad()
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[UInt8[np.ndarray, "H W C"], dict[str, Any]]:
        super().reset(seed=seed)
        count = len(self.contexts.latents)
        index = int(self.np_random.integers(count)) if options is None or "context" not in options else int(options["context"])
        if not 0 <= index < count:
            raise ValueError(f"context is {index}; expected 0 to {count - 1}")
        device = self.agent.dynamics.device
        generator = torch.Generator(device).manual_seed(int(self.np_random.integers(2**31)))
        row = self.contexts[index : index + 1].to(device)
        self._state = self.sampler.start(1, task=row.task, generator=generator)
        self._decoder = self.tokenizer.new_cache(1, "decoder")
        features = self.sampler.observe(self._state, row.latents, row.prev_actions, row.prev_action_mask)
        self._frame = self._picture(self.tokenizer.decode(row.latents, cache=self._decoder))
        self._num_steps = 0
        return self._frame, self._info(features[:, -1]) | {"context": index}

    @torch.no_grad()
    def step(self, action: Any) -> tuple[UInt8[np.ndarray, "H W C"], float, bool, bool, dict[str, Any]]:
        if self._num_steps is None:
            raise ValueError("world model: step() needs a running episode; call reset() first")
        row = torch.from_numpy(self.codec.encode(action)).to(self.agent.dynamics.device)
        latents, features = self.sampler.imagine(self._state, row.reshape(1, 1, -1))
        self._frame = self._picture(self.tokenizer.decode(latents.unsqueeze(1), cache=self._decoder))
        info = self._info(features)
        limit = self.np_random.random() if self.config.ending == "sample" else 0.5
        is_terminated = bool(info["continue"] < limit)
        num_steps = self._num_steps + 1
        is_truncated = num_steps >= self.config.length
        self._num_steps = None if is_terminated or is_truncated else num_steps
        return self._frame, float(self.agent.reward.mean(features)), is_terminated, is_truncated, info

    def render(self) -> UInt8[np.ndarray, "H W C"]:
        return self._frame

    def _info(self, features: Tensor) -> dict[str, Any]:
        return {"value": float(self.agent.value.mean(features)), "continue": float(self.agent.continue_.mean(features))}

    @staticmethod
    def _picture(frames: Tensor) -> UInt8[np.ndarray, "H W C"]:
        return np.ascontiguousarray(frames[0, -1].cpu().numpy().transpose(1, 2, 0))
