"""The world model as an environment: Gymnasium's contract, seeds, and what its outputs depend on."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from dreamer.imagination import SamplerConfig, WorldModelEnv, WorldModelEnvConfig
from dreamer.models import Agent, CausalTokenizer, CausalTokenizerConfig, TransformerConfig
from dreamer.types import Batch, Env

STAY = {"move": 0, "jump": np.array([0], np.int8)}
GO = {"move": 3, "jump": np.array([1], np.int8)}


@pytest.fixture
def env(make_agent, make_batch) -> WorldModelEnv:
    return build(make_agent(), make_batch(batch=3, time=4), length=5)


def build(agent: Agent, contexts: Batch, **config: Any) -> WorldModelEnv:
    torch.manual_seed(0)
    small = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=2, time_every=2)
    made = CausalTokenizerConfig(patch_size=4, token_grid=(2, 2), latent_channels=3, encoder=small, decoder=small)
    tokenizer = CausalTokenizer(made, (3, 8, 8)).eval()
    return WorldModelEnv(agent, tokenizer, contexts, WorldModelEnvConfig(sampler=SamplerConfig(num_steps=2), **config))


def episode(env: WorldModelEnv, action: Any, seed: int, steps: int = 3) -> list[Any]:
    out = [env.reset(seed=seed, options={"context": 0})]
    for _ in range(steps):
        out.append(env.step(action))
        if out[-1][2]:
            break
    return out


def test_it_keeps_gymnasiums_contract(env: WorldModelEnv) -> None:
    assert isinstance(env, Env)
    check_env(env, skip_render_check=True)
    assert isinstance(env.action_space, gymnasium.spaces.Dict) and list(env.action_space) == ["move", "jump"]


def test_same_seed_same_dream(env: WorldModelEnv) -> None:
    first, second, other = (episode(env, GO, seed) for seed in (1, 1, 2))
    assert [s[1] for s in first[1:]] == [s[1] for s in second[1:]]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(first[1:], other[1:], strict=False))


def test_the_dream_depends_on_action_and_context(env: WorldModelEnv) -> None:
    first, _ = env.reset(seed=0, options={"context": 0})
    moved, reward, _, _, info = env.step(GO)
    assert set(info) == {"value", "continue", "features", "frames"}
    assert np.array_equal(info["frames"], moved[None]) and 0 < info["continue"] < 1
    env.reset(seed=0, options={"context": 0})
    stayed, other_reward, *_ = env.step(STAY)
    assert not np.array_equal(moved, stayed) and reward != other_reward
    elsewhere, info = env.reset(seed=0, options={"context": 2})
    assert info["context"] == 2 and not np.array_equal(first, elsewhere)


def test_the_features_are_what_the_heads_read(env: WorldModelEnv) -> None:
    _, first = env.reset(seed=0, options={"context": 0})
    _, reward, _, _, info = env.step(GO)
    assert info["features"].shape == (16,) and info["features"].dtype == np.float32
    assert not np.array_equal(first["features"], info["features"])
    features = torch.from_numpy(info["features"])[None]
    with torch.no_grad():
        assert float(env.agent.reward.mean(features)) == reward and float(env.agent.value.mean(features)) == info["value"]
        assert float(env.agent.continue_.mean(features)) == info["continue"]
    with torch.no_grad():  # after reset, those of the context's last step
        row = env.contexts[:1]
        noiseless = [env.sampler.observe(env.sampler.start(1), row.latents, row.prev_actions, row.prev_action_mask)[0, -1] for _ in "ab"]
    spread = (noiseless[0] - noiseless[1]).norm()
    assert (torch.from_numpy(first["features"]) - noiseless[0]).norm() < 4 * spread  # the same but for the noise on the context


def precisions(env: WorldModelEnv) -> tuple[torch.dtype, torch.dtype]:
    return env._state.cache.keys[0].dtype, env._decoder.keys[0].dtype


def test_bf16_is_close_to_full_precision_and_is_used(make_agent, make_batch) -> None:
    agent, contexts = make_agent(), make_batch(batch=3, time=4)
    frames, dtypes = {}, {}
    for precision in ("fp32", "bf16"):
        env = build(agent, contexts, precision=precision)
        out = episode(env, GO, seed=1)
        frames[precision], dtypes[precision] = np.stack([step[0] for step in out]).astype(int), precisions(env)
        assert out[-1][4]["features"].dtype == np.float32
    assert dtypes == {"fp32": (torch.float32,) * 2, "bf16": (torch.bfloat16,) * 2}
    difference = np.abs(frames["fp32"] - frames["bf16"])
    assert 0 < difference.mean() < 4


@pytest.mark.gpu
def test_a_dream_on_a_gpu_in_bf16_is_close_to_the_same_in_fp32(make_agent, make_batch) -> None:
    agent, contexts = make_agent().cuda(), make_batch(batch=3, time=4)
    frames = {}
    for precision in ("fp32", "bf16"):
        env = build(agent, contexts, precision=precision)
        env.tokenizer.cuda()
        frames[precision] = np.stack([step[0] for step in episode(env, GO, seed=1)]).astype(int)
        assert env._state.cache.keys[0].is_cuda
    assert np.abs(frames["fp32"] - frames["bf16"]).mean() < 4


def test_the_first_frame_is_the_end_of_the_recorded_context(env: WorldModelEnv) -> None:
    frame, _ = env.reset(seed=3, options={"context": 1})
    with torch.no_grad():
        expected = env.tokenizer.decode(env.contexts.latents[1:2])
    assert np.array_equal(frame, expected[0, -1].numpy().transpose(1, 2, 0)) and np.array_equal(frame, env.render())


def test_it_is_cut_off_at_its_length_and_must_be_reset(make_agent, make_batch) -> None:
    agent = make_agent()
    torch.nn.init.constant_(agent.continue_.mlp.out.bias, 100.0)
    env = build(agent, make_batch(time=3), length=3)
    env.reset(seed=0)
    assert [env.step(GO)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    with pytest.raises(ValueError, match="call reset"):
        env.step(GO)


@pytest.mark.parametrize("ending", ["sample", "threshold"])
def test_the_continue_head_ends_episodes(make_agent, make_batch, ending: str) -> None:
    agent = make_agent()
    torch.nn.init.constant_(agent.continue_.mlp.out.bias, -100.0)
    env = build(agent, make_batch(time=3), ending=ending)
    env.reset(seed=0)
    assert env.step(GO)[2] is True


def test_bad_input_is_refused(env: WorldModelEnv, make_agent, make_batch) -> None:
    with pytest.raises(ValueError, match="call reset"):
        env.step(GO)
    with pytest.raises(ValueError, match="context is 9; expected 0 to 2"):
        env.reset(options={"context": 9})
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        env.step({"move": 7, "jump": np.array([0], np.int8)})
    with pytest.raises(ValueError, match="contexts hold 7 steps; the dynamics sees at most 6"):
        build(make_agent(), make_batch(time=7))
    with pytest.raises(ValueError, match="the agent was trained with"):
        WorldModelEnv(env.agent, env.tokenizer, env.contexts, action_space=gymnasium.spaces.Discrete(5))
