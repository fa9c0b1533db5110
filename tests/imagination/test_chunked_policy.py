"""Acting with a tokenizer of 8 frames a latent step: what is seen when, what is played when, and who disturbs whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from dreamer.data.alignment import chunk_actions, shift_actions
from dreamer.envs import make_env
from dreamer.evaluation.agent import PolicyPlayer, evaluate_policy
from dreamer.imagination import AgentPolicy, Sampler, SamplerConfig
from dreamer.models import Agent, CosmosTokenizerWrapper
from dreamer.types import ActionComponent, ActionSpace

P = 8
SPACE = ActionSpace(tuple(ActionComponent(f"action_{i}", "categorical", 5) for i in range(6)))
CLEAN = SamplerConfig(num_steps=2, context_signal=0.99999)  # the noise on observations then changes no argmax
MakeCosmos = Callable[..., CosmosTokenizerWrapper]


@pytest.fixture(params=[P, 1], ids=["8 actions", "1 action, held"])
def agent(request: pytest.FixtureRequest, make_agent: Callable[..., Agent]) -> Agent:
    """Its actions depend on frames and on earlier actions, which at the start of training hardly reach the agent token."""
    made = make_agent(request.param, max_steps=2**16, channels=16, space=SPACE)
    for name, weight in made.dynamics.named_parameters():
        if name.startswith("action_embedding") or "latent_in" in name:
            nn.init.normal_(weight, std=3.0)
        elif name.endswith(("out.weight", "down.weight")):
            weight.data.mul_(6)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.data.mul_(2)
    return made


@pytest.fixture
def tokenizer(make_cosmos: MakeCosmos) -> CosmosTokenizerWrapper:
    return make_cosmos()


def frames(count: int, steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (steps, count, 3, 16, 16), dtype=np.uint8)


def argmax(agent: Agent, tokenizer: CosmosTokenizerWrapper) -> AgentPolicy:
    return AgentPolicy(agent, tokenizer, CLEAN, mode="argmax", name="test")


def play(policy: AgentPolicy, pictures: np.ndarray, firsts: np.ndarray | None = None) -> np.ndarray:
    policy.reset(pictures.shape[1], 0)
    is_first = np.arange(len(pictures))[:, None] == np.zeros(pictures.shape[1]) if firsts is None else firsts
    return np.stack([policy.act(p, f) for p, f in zip(pictures, is_first, strict=True)])


def test_it_acts_as_the_table_of_alignment_says(agent: Agent, tokenizer: CosmosTokenizerWrapper) -> None:
    """Whole clips of frames and of the actions played, chunked as training does it, give the actions that were played."""
    pictures = frames(6, 28)
    actions = play(argmax(agent, tokenizer), pictures)  # decided at frames 0, 8, 16 and 24
    slots = agent.dynamics.actions_per_step
    played, prev = [], []
    for row in range(6):
        chunks, known = chunk_actions(actions[:, row], np.ones(28, bool), P)
        played.append(chunks[:, :slots])
        prev.append(shift_actions(played[-1], known[:, :slots]))
    given, known = (torch.from_numpy(np.stack(x)[:, :4]) for x in zip(*prev, strict=True))
    latents = tokenizer.encode(torch.from_numpy(pictures[:25]).transpose(0, 1))
    sampler = Sampler(agent.dynamics, CLEAN)
    features = sampler.observe(sampler.start(6), latents, given, known)
    expected = agent.policy.now(features).mode().numpy()
    np.testing.assert_array_equal(np.stack(played)[:, :3], expected[:, :3])
    np.testing.assert_array_equal(actions[24:].swapaxes(0, 1), np.broadcast_to(expected[:, 3, :4], (6, 4, 6)))
    other = sampler.observe(sampler.start(6), latents, (given + 1) % 5, known)
    assert (agent.policy.now(other).mode().numpy()[:, 1:] != expected[:, 1:]).any(), "the actions must depend on those before"
    assert len(np.unique(actions)) > 1


def test_an_only_action_is_held(agent: Agent, tokenizer: CosmosTokenizerWrapper) -> None:
    actions = play(argmax(agent, tokenizer), frames(8, 24)).reshape(3, P, 8, 6)
    assert (actions == actions[:, :1]).all() == (agent.dynamics.actions_per_step == 1)
    assert (actions[0] != actions[1]).any()


@pytest.mark.parametrize(("changed", "first_other"), [(0, 0), (1, 8), (8, 8), (9, 16)])
def test_a_frame_is_answered_when_its_latent_step_is_whole(
    agent: Agent, tokenizer: CosmosTokenizerWrapper, changed: int, first_other: int
) -> None:
    pictures = frames(16, 24)
    base = play(argmax(agent, tokenizer), pictures)
    pictures[changed] = frames(16, 1, seed=1)[0]
    other = play(argmax(agent, tokenizer), pictures)
    assert (other[:first_other] == base[:first_other]).all()
    assert (other[first_other:][:P] != base[first_other:][:P]).any()


def test_episodes_that_begin_in_the_middle_of_another_chunk(agent: Agent, tokenizer: CosmosTokenizerWrapper) -> None:
    pictures = frames(4, 32)
    firsts = np.zeros((32, 4), bool)
    firsts[0] = firsts[3, 1] = firsts[8, 3] = firsts[13, 1] = firsts[13, 2] = True
    together = play(argmax(agent, tokenizer), pictures, firsts)
    for slot in range(4):
        starts = [*np.flatnonzero(firsts[:, slot]), 32]
        for begin, end in zip(starts, starts[1:], strict=False):
            alone = play(argmax(agent, tokenizer), pictures[begin:end, slot : slot + 1])
            np.testing.assert_array_equal(together[begin:end, slot], alone[:, 0])


def test_what_does_not_fit_is_refused(make_agent: Callable[..., Agent], make_cosmos: MakeCosmos) -> None:
    with pytest.raises(ValueError, match="takes 4 actions a latent step of 8 frames; expected 8, or 1 that is held"):
        argmax(make_agent(4, channels=16), make_cosmos())
    with pytest.raises(ValueError, match="takes 8 actions a latent step of 1 frames; expected 1"):
        argmax(make_agent(8, channels=16), make_cosmos(time_mode="per_frame"))
    whole_clips = make_cosmos()
    whole_clips.can_stream = False
    with pytest.raises(ValueError, match="encodes whole clips only"):
        argmax(make_agent(8, channels=16), whole_clips)


@pytest.mark.parametrize("spatial_mode", ["none", "project"])
def test_in_a_real_environment(make_agent: Callable[..., Agent], make_cosmos: MakeCosmos, spatial_mode: str) -> None:
    """Episodes of 18 and of 21 frames, so that they end within a chunk; the results do not depend on who plays beside whom."""
    tokenizer = make_cosmos(spatial_mode=spatial_mode, num_latent_tokens=4, latent_dim=16, reset_every=9)
    if spatial_mode == "project":
        tokenizer.fit_projection(tokenizer.encode_positions(torch.from_numpy(frames(4, 33)).transpose(0, 1)))
    lengths = iter([17, 20, 17, 20, 17, 20, 17, 20])

    def make() -> gymnasium.Env:
        env: Any = make_env("crafter-chop", length=next(lengths), size=16)
        return env

    space = ActionSpace((ActionComponent("action", "categorical", int(make().action_space.n)),))  # pyright: ignore[reportAttributeAccessIssue]
    agent = make_agent(P, max_steps=2**16, channels=16, space=space)
    policy = argmax(agent, tokenizer)
    together = evaluate_policy(make, policy, num_episodes=5, seed=0, num_envs=3, num_videos=1)
    assert len(together.returns) == 5 and set(together.lengths) == {17, 20}
    assert together.videos[0].shape == (together.lengths[0] + 1, 16, 16, 3)

    env, player = make_env("crafter-chop", length=together.lengths[0], size=16), PolicyPlayer(policy)
    frame, _ = env.reset(seed=together.seeds[0])
    player.reset(env, 0)
    video = [frame]
    for _ in range(together.lengths[0]):
        frame = env.step(player.act(frame))[0]
        video.append(frame)
    np.testing.assert_array_equal(np.stack(video), together.videos[0])
