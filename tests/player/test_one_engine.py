"""Everything that dreams or acts does so through ``Sampler.observe`` and ``Sampler.imagine``: no pass of the dynamics goes another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dreamer.data import PretokenizedDataset
from dreamer.evaluation.open_loop import draw_windows, predict
from dreamer.imagination import AgentPolicy, ImaginationRollout, RolloutConfig, Sampler, SamplerConfig, WorldModelEnv
from dreamer.imagination.sampler import SamplerState
from dreamer.player.engine import DreamSession, DreamSettings
from dreamer.player.rollouts import roll_out
from dreamer.player.source import DreamSource

CONFIG = SamplerConfig(num_steps=2)


def evaluation(source: DreamSource) -> None:
    assert source.episodes is not None
    ids = source.run.split(len(source.latents))[0]
    windows = draw_windows(source.episodes, source.latents, ids, tokenizer=source.tokenizer, num_steps=6, num_windows=4, seed=0)
    predict(source.agent, source.tokenizer, Sampler(source.agent.dynamics, CONFIG), windows, 4, 0)


def phase3(source: DreamSource) -> None:
    batch = PretokenizedDataset(source.latents, 4, [0, 1]).batch([(0, 0), (1, 0)])
    ImaginationRollout(source.agent, RolloutConfig(context=4, horizon=2, sampler=CONFIG))(batch)


def agent_policy(source: DreamSource) -> None:
    policy = AgentPolicy(source.agent, source.tokenizer, CONFIG, mode="sampled", name="agent")
    policy.reset(2, 0)
    for is_first in (True, False):
        policy.act(np.zeros((2, 3, 64, 64), np.uint8), np.full(2, is_first))


def world_model_env(source: DreamSource) -> None:
    env = WorldModelEnv(source.agent, source.tokenizer, PretokenizedDataset(source.latents, 4, [0]).batch([(0, 0)]))
    env.reset(seed=0)
    env.step(env.action_space.sample())


def player(source: DreamSource) -> None:
    session = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(num_steps=2, context=4))
    session.tick(np.array([1], np.float32))
    session.mode = "sampled"
    session.tick(np.array([1], np.float32))


def dream_verb(source: DreamSource) -> None:
    roll_out(source, (1, 6), "recorded", 3, DreamSettings(num_steps=2, context=4))


@pytest.mark.parametrize("use", [evaluation, phase3, agent_policy, world_model_env, player, dream_verb], ids=lambda use: use.__name__)
def test_one_engine_serves_all(source: DreamSource, use: Callable[[DreamSource], None], monkeypatch: pytest.MonkeyPatch) -> None:
    depth, inside, outside = 0, 0, 0

    def entered(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Sampler, state: SamplerState, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return method(self, state, *args, **kwargs)
            finally:
                depth -= 1

        return call

    def passed(module: torch.nn.Module, args: Any) -> None:
        nonlocal inside, outside
        inside, outside = inside + (depth > 0), outside + (depth == 0)

    for name in ("observe", "imagine"):
        monkeypatch.setattr(Sampler, name, entered(getattr(Sampler, name)))
    hook = source.agent.dynamics.transformer.register_forward_pre_hook(passed)
    try:
        use(source)
    finally:
        hook.remove()
    assert inside > 0 and outside == 0
