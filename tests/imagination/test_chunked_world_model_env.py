"""Dreams of a model with 8 frames a latent step, as an environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from dreamer.imagination import Sampler, SamplerConfig, WorldModelEnv, WorldModelEnvConfig
from dreamer.models import Agent, CosmosTokenizerWrapper
from dreamer.types import Batch

P = 8
STAY = {"move": 0, "jump": np.array([0], np.int8)}
GO = {"move": 3, "jump": np.array([1], np.int8)}
STEPS = SamplerConfig(num_steps=2)
MakeAgent, MakeBatch, MakeCosmos = Callable[..., Agent], Callable[..., Batch], Callable[..., CosmosTokenizerWrapper]


@pytest.fixture
def build(make_agent: MakeAgent, make_batch: MakeBatch, make_cosmos: MakeCosmos) -> Callable[..., WorldModelEnv]:
    def make(slots: int = P, is_start: Sequence[bool] | None = (True, False), **settings: Any) -> WorldModelEnv:
        torch.manual_seed(0)
        agent = make_agent(slots, channels=16)
        torch.nn.init.constant_(agent.continue_.mlp.out.bias, 100.0)
        torch.nn.init.normal_(agent.dynamics.latent_out.weight, std=0.3)
        config = WorldModelEnvConfig(sampler=STEPS, length=4)
        starts = None if is_start is None else torch.tensor(list(is_start))
        return WorldModelEnv(agent, make_cosmos(**settings), make_batch(2, 3, slots, channels=16), config, is_start=starts)

    return make


def test_it_takes_an_action_for_each_frame_of_a_step(build: Callable[..., WorldModelEnv]) -> None:
    env = build()
    check_env(env, skip_render_check=True)
    assert isinstance(env.action_space, gymnasium.spaces.Tuple) and len(env.action_space) == P
    env.action_space.seed(0)
    assert len({str(part) for part in env.action_space.sample()}) > 1
    env.reset(seed=0)
    frame, _, _, _, info = env.step(env.action_space.sample())
    assert info["frames"].shape == (P, 16, 16, 3) and np.array_equal(frame, info["frames"][-1]) and np.array_equal(frame, env.render())
    assert len(np.unique(info["frames"].reshape(P, -1), axis=0)) > 1
    assert [env.step((GO,) * P)[3] for _ in range(3)] == [False, False, True]  # its length counts latent steps


@pytest.mark.parametrize("context", [0, 1])
def test_its_frames_are_those_of_the_whole_dream(build: Callable[..., WorldModelEnv], context: int) -> None:
    env = build()
    chunks = [(GO, *[STAY] * 7), (*[STAY] * 7, GO)]
    first, _ = env.reset(seed=5, options={"context": context})
    frames = np.concatenate([first[None], *(env.step(chunk)[4]["frames"] for chunk in chunks)])

    env.reset(seed=5, options={"context": context})  # the dream again, all at once
    row = env.contexts[context : context + 1]
    rows = torch.tensor([[[3.0, 1]] + [[0, 0]] * 7, [[0, 0]] * 7 + [[3.0, 1]]])[None]
    dreamed = Sampler(env.agent.dynamics, STEPS).generate(
        row.latents,
        torch.cat([row.prev_actions, rows], dim=1),
        torch.cat([row.prev_action_mask, torch.ones(1, 2, P, dtype=torch.bool)], dim=1),
        generator=_as_at_reset(5, env),
    )
    assert isinstance(env.tokenizer, CosmosTokenizerWrapper)
    whole = env.tokenizer.decode(torch.cat([row.latents, dreamed], dim=1), is_start=context == 0)[0].numpy()
    assert len(whole) == 1 + 4 * P and len(frames) == 1 + 2 * P
    assert np.abs(whole[-17:].transpose(0, 2, 3, 1).astype(int) - frames).max() <= 1
    wrong = env.tokenizer.decode(torch.cat([row.latents, dreamed], dim=1), is_start=context != 0)[0].numpy()
    assert np.abs(wrong[-17:].transpose(0, 2, 3, 1).astype(int) - frames).max() > 1, "where the context begins must matter"


def _as_at_reset(seed: int, env: WorldModelEnv) -> torch.Generator:
    """The noise source that ``reset(seed=seed, options={"context": ...})`` makes."""
    numbers = gymnasium.utils.seeding.np_random(seed)[0]
    return torch.Generator(env.agent.dynamics.device).manual_seed(int(numbers.integers(2**31)))


@pytest.mark.parametrize("place", [0, 3, 7])
def test_the_dream_depends_on_each_of_the_actions(build: Callable[..., WorldModelEnv], place: int) -> None:
    env = build()
    env.reset(seed=0, options={"context": 0})
    stayed = env.step((STAY,) * P)[0]
    env.reset(seed=0, options={"context": 0})
    assert not np.array_equal(env.step(tuple(GO if i == place else STAY for i in range(P)))[0], stayed)


def test_an_only_action_is_held(build: Callable[..., WorldModelEnv]) -> None:
    env = build(slots=1)
    assert isinstance(env.action_space, gymnasium.spaces.Dict)
    env.reset(seed=0)
    assert env.step(GO)[4]["frames"].shape == (P, 16, 16, 3)


def test_bad_input_is_refused(build: Callable[..., WorldModelEnv]) -> None:
    env = build()
    env.reset(seed=0)
    for action in (GO, (GO,) * 7, 3):
        with pytest.raises(ValueError, match="expected a sequence of 8 actions, one for each frame of a step"):
            env.step(action)
    with pytest.raises(ValueError, match="is_start is missing: with temporal stride 8"):
        build(is_start=None)
    with pytest.raises(ValueError, match="is_start has 3 entries for 2 contexts"):
        build(is_start=[True] * 3)
    with pytest.raises(ValueError, match="cannot be decoded"):
        build(spatial_mode="mean", num_latent_tokens=4)


def test_contexts_that_begin_within_an_episode_need_a_tokenizer_that_decodes_them(
    build: Callable[..., WorldModelEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CosmosTokenizerWrapper, "can_decode_windows", False)
    build(is_start=[True, True])
    with pytest.raises(ValueError, match="1 of 2 contexts begin within an episode"):
        build()
