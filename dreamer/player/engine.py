"""A dream that somebody plays in, a frame at a time: the world model as an environment, hands or policy on the controls, and the real
environment beside it. Shape letters: P frames and A columns of an action, as everywhere.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dreamer.imagination import Sampler, SamplerConfig, WorldModelEnv, WorldModelEnvConfig
from dreamer.imagination.policy import Mode
from dreamer.player.recording import Recording
from dreamer.player.source import DreamSource, Picture, RealEnv, Start
from dreamer.types import Config

ENDLESS = 2**62  # latent steps: the person decides when it is enough


class DreamSettings(Config):
    num_steps: int = Field(default=4, ge=1)  # K: denoising steps a latent step; holds from the next step on
    context: int = Field(default=8, ge=1)  # recorded latent steps that the model is shown; holds from the next start on
    seed: int = Field(default=0, ge=0, lt=2**31)  # of noise and policy; holds from the next start on


@dataclass(frozen=True)
class Moment:
    """A frame of the dream, and what the model makes of it."""

    index: int  # frames since the start, which is 0
    picture: Picture
    value: float | None  # None: the head was not trained
    reward: float | None = None
    continues: float | None = None  # probability that the episode goes on
    row: Float[np.ndarray, " A"] | None = None  # the action that led here
    is_by_policy: bool = False
    is_over: bool = False  # the model says that the episode has ended
    real: Picture | None = None
    real_reward: float | None = None
    real_is_over: bool = False


@dataclass(frozen=True)
class _Played:
    """What was done in one tick and what it did to the real environment, until the dream's frame is shown. Fields are those of Moment."""

    row: Float[np.ndarray, " A"]
    is_by_policy: bool
    real: Picture | None
    real_reward: float | None
    real_is_over: bool


def default_settings(source: DreamSource) -> DreamSettings:
    """Those of the run's evaluation."""
    config = source.run.config
    context = min(config.evaluation.world_model.context, source.most_context)
    return DreamSettings(num_steps=config.evaluation.sampler.num_steps, context=context, seed=config.seed)


def check_settings(source: DreamSource, settings: DreamSettings) -> None:
    """Raises ``ValueError`` for what the model cannot do."""
    if settings.num_steps not in source.denoise_steps:
        known = ", ".join(map(str, source.denoise_steps))
        raise ValueError(f"denoising steps K is {settings.num_steps}; expected one of {known}, which this model was trained for")
    if not 1 <= settings.context <= source.most_context:
        raise ValueError(f"context is {settings.context}; expected 1 to {source.most_context} latent steps, what this model sees")
    if not 0 <= settings.seed < 2**31:
        raise ValueError(f"seed is {settings.seed}; expected 0 to {2**31 - 1}")


class DreamSession:
    """One person's dream.

    ``tick`` takes the action of one frame and gives one frame. Where a latent step is P > 1 frames and takes P actions, their frames are
    known when the last of them is: every frame is shown P - 1 ticks after its action, the real one too. An agent of one action a step
    holds the first of P.
    """

    def __init__(self, source: DreamSource, start: Start, settings: DreamSettings, *, has_real: bool = False) -> None:
        check_settings(source, settings)
        self.source, self.settings = source, settings
        self.mode: Mode | None = None  # how the policy acts; None: a person does
        self.real: RealEnv | None = None
        self.recording: Recording | None = None
        self.is_recording = False
        self._stride, self._num_actions = source.tokenizer.temporal_stride, source.agent.dynamics.actions_per_step
        self.put_beside(has_real)
        self.begin(start)

    def set(self, settings: DreamSettings) -> None:
        """``ValueError`` for what the model cannot do; nothing changes then."""
        check_settings(self.source, settings)
        self._dream.sampler = Sampler(self.source.agent.dynamics, self._sampler_config(settings))
        self.settings = settings

    def _sampler_config(self, settings: DreamSettings) -> SamplerConfig:
        base = self.source.run.config.evaluation.sampler.model_dump()
        return SamplerConfig.model_validate(base | {"num_steps": settings.num_steps})

    @torch.no_grad()
    def begin(self, start: Start) -> Moment:
        """Dream on from ``start``, and bring the real environment there if it is beside. A recording ends here."""
        self.is_recording = False
        self.start = start
        source, sampler = self.source, self._sampler_config(self.settings)
        config = WorldModelEnvConfig(sampler=sampler, length=ENDLESS, ending="threshold", precision=source.precision)
        self._dream = WorldModelEnv(source.agent, source.tokenizer, start.batch, config, is_start=torch.tensor([start.is_start]))
        picture, info = self._dream.reset(seed=self.settings.seed, options={"context": 0})
        self._features = self._on_device(info["features"])
        self._generator = torch.Generator(self.source.device).manual_seed(self.settings.seed)
        self._given: list[np.ndarray] = []
        self._plan: np.ndarray | None = None  # the policy's actions of this latent step
        self._played: deque[_Played] = deque()
        self._ready: deque[Moment] = deque()
        self._place = 0
        self._has_ended = False
        self.real_problem: str | None = None
        real = self._begin_real()
        self.now = Moment(0, picture, info["value"] if self.source.has_value else None, real=real)
        return self.now

    def _begin_real(self) -> Picture | None:
        if self.real is None:
            return None
        try:
            return self.real.begin(self.start)
        except ValueError as problem:
            self.real_problem = str(problem)
            return None

    def put_beside(self, is_wanted: bool) -> None:
        """Whether the real environment goes along; holds from the next start on."""
        if is_wanted and self.real is None:
            self.real = RealEnv(self.source)
        elif not is_wanted and self.real is not None:
            self.real.close()
            self.real = None

    def tick(self, row: Float[np.ndarray, " A"]) -> Moment:
        """The next frame. ``row`` is not looked at while the policy acts. Raises ``ValueError`` for an action outside the action space, and
        after the end."""
        if self.now.is_over:
            raise ValueError("the dream is over; begin another one")
        if not self._has_ended:
            self._act(row)
        if self._ready:
            self._show(self._ready.popleft())
        return self.now

    def _act(self, row: Float[np.ndarray, " A"]) -> None:
        is_by_policy = self.mode is not None
        if self._place < self._num_actions:
            chosen = self._planned() if is_by_policy else np.asarray(row, np.float32)
            self.source.agent.action_space.validate(chosen[None], "action")
            self._given.append(chosen)
        chosen = self._given[-1]
        real = real_reward = None
        if self.real is not None and self.real_problem is None:
            real, real_reward = self.real.step(chosen)
        self._played.append(_Played(chosen, is_by_policy, real, real_reward, bool(self.real and self.real.is_over)))
        if self._place == self._num_actions - 1:
            self._dream_on()
        self._place = (self._place + 1) % self._stride
        if self._place == 0:
            self._given, self._plan = [], None

    def _planned(self) -> Float[np.ndarray, " A"]:
        if self._plan is None:
            if not self.source.has_policy:
                raise ValueError(f"{self.source.name}: phase 1 trains no policy; play a checkpoint of phase 2 or 3")
            with torch.no_grad():
                policy = self.source.agent.policy.now(self._features)
                rows = policy.mode() if self.mode == "argmax" else policy.sample(self._generator)
            self._plan = rows[0].cpu().numpy()
        return self._plan[self._place]

    def _dream_on(self) -> None:
        """One latent step: P frames."""
        actions = tuple(self._dream.codec.decode(row) for row in self._given)
        _, reward, self._has_ended, _, info = self._dream.step(actions if self._num_actions > 1 else actions[0])
        self._features = self._on_device(info["features"])
        value = info["value"] if self.source.has_value else None
        continues = info["continue"] if self.source.has_policy else None
        for place, picture in enumerate(info["frames"]):
            is_last = place == self._stride - 1  # the reward of a step is put on its last frame
            known = (reward if is_last else 0.0) if self.source.has_policy else None
            self._ready.append(Moment(0, picture, value, known, continues, is_over=is_last and self._has_ended))

    def _on_device(self, features: Float[np.ndarray, " D"]) -> Float[Tensor, "1 D"]:
        return torch.from_numpy(features).to(self.source.device).unsqueeze(0)

    def _show(self, dreamt: Moment) -> None:
        now = self.now = dataclasses.replace(dreamt, index=self.now.index + 1, **vars(self._played.popleft()))
        if self.is_recording and self.recording and now.row is not None:
            self.recording.add(now.row, now.picture, now.real, now.reward or 0.0, now.is_over)
            self.is_recording = not (now.is_over or self.recording.is_full)

    def record(self, is_wanted: bool) -> None:
        """Begin a recording with the frame that is shown, in the place of an earlier one; or end it, and keep it."""
        if is_wanted:
            info = {"player": "person or policy", "source": "dream", "model": self.source.name, "start": self.start.label}
            self.recording = Recording(self.now.picture, self.now.real, info | self.settings.model_dump())
        self.is_recording = is_wanted

    def close(self) -> None:
        self.put_beside(False)
