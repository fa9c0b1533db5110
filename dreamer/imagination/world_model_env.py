"""The world model as a Gymnasium environment: whatever acts in real environments can act in dreams."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field
from torch import Tensor

from dreamer.data.actions import ActionCodec
from dreamer.imagination.sampler import Sampler, SamplerConfig
from dreamer.imagination.tokenizers import decode_windows, decodes_windows, require_streaming
from dreamer.models import Agent
from dreamer.ops.spaces import gym_space
from dreamer.types import Batch, Config, Tokenizer


class WorldModelEnvConfig(Config):
    sampler: SamplerConfig = SamplerConfig()
    length: int = Field(default=64, ge=1)  # latent steps after which an episode is cut off
    ending: Literal["sample", "threshold"] = "sample"  # how the continue probability c ends an episode: with 1 - c, or below one half
    precision: Literal["fp32", "bf16"] = "fp32"  # of dynamics and decoder; bf16: autocast. Features are float32, and heads work in it


class WorldModelEnv(gymnasium.Env):
    """Dreams that start from recorded contexts.

    ``contexts``: a row for each start, all its latent steps are shown to the model. ``reset`` draws one (or takes
    ``options={"context": index}``) and gives its last frame; ``step`` dreams one latent step and gives its last frame, the predicted
    reward, whether the predicted continue ends the episode, and ``info``. There, after both, ``value``, ``continue`` and ``features``
    (D), the agent token's output that every head reads: ``agent.policy.now`` of it is what the agent would do here. After ``reset`` also
    ``context``, after ``step`` also ``frames`` (P H W C), all frames of the step.

    A model that takes P > 1 actions a latent step cannot dream its first frame before it knows the last action. So ``step`` takes the P
    actions together, a tuple with one for each frame, as ``action_space`` says: a person plays P frames while giving the next P actions.

    ``action_space``: the real environment's, of one action, if it should be spoken to in the same words. ``is_start``: which contexts begin
    their episode; a tokenizer of temporal stride above 1 must know, to decode them.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's class attribute)

    def __init__(
        self,
        agent: Agent,
        tokenizer: Tokenizer,
        contexts: Batch,
        config: WorldModelEnvConfig | None = None,
        action_space: gymnasium.Space[Any] | None = None,
        is_start: Bool[Tensor, " K"] | None = None,
    ) -> None:
        self.config = config or WorldModelEnvConfig()
        self.agent, self.tokenizer, self.contexts = agent, require_streaming(tokenizer, agent), contexts
        self.is_start = self._check_starts(is_start)
        steps, seen = contexts.latents.shape[1], agent.config.dynamics.transformer.context_length
        if steps > seen:
            raise ValueError(f"contexts hold {steps} steps; the dynamics sees at most {seen}")
        self.sampler = Sampler(agent.dynamics, self.config.sampler)
        self.render_mode = "rgb_array"
        one, num_actions = action_space or gym_space(agent.action_space), agent.dynamics.actions_per_step
        self.action_space = one if num_actions == 1 else gymnasium.spaces.Tuple([copy.deepcopy(one) for _ in range(num_actions)])
        self.codec = ActionCodec(one)  # of one action
        kinds = [[(c.kind, c.size) for c in space.components] for space in (self.codec.space, agent.action_space)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"action_space has the components {kinds[0]}; the agent was trained with {kinds[1]}")
        channels, height, width = tokenizer.frame_shape
        self.observation_space = gymnasium.spaces.Box(0, 255, (height, width, channels), np.uint8)
        self._num_steps: int | None = None  # None: no episode runs

    def _check_starts(self, is_start: Bool[Tensor, " K"] | None) -> Bool[Tensor, " K"]:
        """Raises ``ValueError`` if contexts cannot be decoded, or if it is not known how."""
        count, stride = len(self.contexts.latents), self.tokenizer.temporal_stride
        if not self.tokenizer.can_decode:
            raise ValueError("tokenizer: its latents cannot be decoded (can_decode is false), so that a dream has no frames")
        if is_start is None and stride > 1:
            raise ValueError(f"is_start is missing: with temporal stride {stride} it must be known which contexts begin their episode")
        known = torch.ones(count, dtype=torch.bool) if is_start is None else is_start
        if len(known) != count:
            raise ValueError(f"is_start has {len(known)} entries for {count} contexts; expected one for each")
        if not known.all() and not decodes_windows(self.tokenizer):
            within = int((~known).sum())
            raise ValueError(f"{within} of {count} contexts begin within an episode; this tokenizer decodes from an episode's start only")
        return known

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
        with self._autocast():
            self._state = self.sampler.start(1, task=row.task, generator=generator)
            self._decoder = self.tokenizer.new_cache(1, "decoder")
            features = self.sampler.observe(self._state, row.latents, row.prev_actions, row.prev_action_mask)
            decoded = decode_windows(self.tokenizer, row.latents, self.is_start[index : index + 1], cache=self._decoder)
        self._frame = _pictures(decoded)[-1]
        self._num_steps = 0
        return self._frame, self._info(features[:, -1]) | {"context": index}

    @torch.no_grad()
    def step(self, action: Any) -> tuple[UInt8[np.ndarray, "H W C"], float, bool, bool, dict[str, Any]]:
        if self._num_steps is None:
            raise ValueError("world model: step() needs a running episode; call reset() first")
        with self._autocast():
            latents, features = self.sampler.imagine(self._state, self._rows(action))
            frames = _pictures(self.tokenizer.decode(latents.unsqueeze(1), cache=self._decoder))
        self._frame = frames[-1]
        info = self._info(features) | {"frames": frames}
        limit = self.np_random.random() if self.config.ending == "sample" else 0.5
        is_terminated = bool(info["continue"] < limit)
        num_steps = self._num_steps + 1
        is_truncated = num_steps >= self.config.length
        self._num_steps = None if is_terminated or is_truncated else num_steps
        return self._frame, float(self.agent.reward.mean(features)), is_terminated, is_truncated, info

    def render(self) -> UInt8[np.ndarray, "H W C"]:
        return self._frame

    def _rows(self, action: Any) -> Float[Tensor, "1 P A"]:
        """The action, or the P actions, of a latent step."""
        num = self.agent.dynamics.actions_per_step
        actions = (action,) if num == 1 else action
        if not isinstance(actions, Sequence | np.ndarray) or len(actions) != num:
            raise ValueError(f"world model: step() got {action!r}; expected a sequence of {num} actions, one for each frame of a step")
        rows = np.stack([self.codec.encode(one) for one in actions])
        return torch.from_numpy(rows).unsqueeze(0).to(self.agent.dynamics.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.agent.dynamics.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _info(self, features: Float[Tensor, "1 D"]) -> dict[str, Any]:
        value, continues = float(self.agent.value.mean(features)), float(self.agent.continue_.mean(features))
        return {"value": value, "continue": continues, "features": features[0].cpu().numpy()}


def _pictures(frames: UInt8[Tensor, "1 F C H W"]) -> UInt8[np.ndarray, "F H W C"]:
    return np.ascontiguousarray(frames[0].cpu().numpy().transpose(0, 2, 3, 1))
