"""The trained agent on real frames: several environments, each with its own past."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from dreamer.evaluation.agent import BatchPolicy, evaluate_policy
from dreamer.imagination import AgentPolicy, SamplerConfig
from dreamer.models import Agent, AgentConfig, CausalTokenizer, CausalTokenizerConfig, DynamicsConfig, HeadConfig, TransformerConfig
from dreamer.types import ActionComponent, ActionSpace

SPACE = ActionSpace((ActionComponent("action", "categorical", 5),))
# nearly clean: the noise on observations then changes no argmax (it depends on who else is in the batch)
CLEAN = SamplerConfig(num_steps=2, context_signal=0.99999)


@pytest.fixture(params=[0, 2], ids=["frames alone", "with time layers"])
def tokenizer(request: pytest.FixtureRequest) -> CausalTokenizer:
    torch.manual_seed(0)
    small = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=2, time_every=request.param, context_length=4)
    config = CausalTokenizerConfig(patch_size=4, token_grid=(2, 2), latent_channels=3, encoder=small, decoder=small)
    return CausalTokenizer(config, (3, 8, 8)).eval()


@pytest.fixture
def agent() -> Agent:
    torch.manual_seed(0)
    transformer = TransformerConfig(width=16, num_layers=4, num_heads=2, num_kv_heads=1, time_every=2, context_length=6)
    config = AgentConfig(
        dynamics=DynamicsConfig(transformer=transformer, num_registers=1, max_steps=2**16),
        heads=HeadConfig(hidden=16, num_distances=2, num_bins=11, bin_range=3.0),
    )
    made = Agent(config, action_space=SPACE, token_grid=(2, 2), latent_channels=3).eval()
    nn.init.normal_(made.policy.mlp.out.weight)
    for name, weight in made.dynamics.named_parameters():  # at the start little reaches the agent token
        if "action_embedding" in name or "latent_in" in name:
            nn.init.normal_(weight, std=3.0)
        elif name.endswith(("out.weight", "down.weight")):
            weight.data.mul_(6)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.data.mul_(2)
    return made


def frames(count: int, steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (steps, count, 3, 8, 8), dtype=np.uint8)


def play(policy: AgentPolicy, pictures: np.ndarray, firsts: list[list[bool]], seed: int = 0) -> np.ndarray:
    policy.reset(pictures.shape[1], seed)
    return np.stack([policy.act(p, np.array(f)) for p, f in zip(pictures, firsts, strict=True)])


def argmax(agent: Agent, tokenizer: CausalTokenizer) -> AgentPolicy:
    return AgentPolicy(agent, tokenizer, CLEAN, mode="argmax", name="test")


def test_it_is_a_policy_for_evaluation(agent: Agent, tokenizer: CausalTokenizer) -> None:
    policy = argmax(agent, tokenizer)
    assert isinstance(policy, BatchPolicy)
    actions = play(policy, frames(3, 4), [[True] * 3] + [[False] * 3] * 3)
    assert actions.shape == (4, 3, 1) and actions.dtype == np.float32
    SPACE.validate(actions, "test")
    assert len(np.unique(actions)) > 1, "a policy that always does the same tests nothing"


def test_environments_that_begin_at_different_times_keep_their_own_past(agent: Agent, tokenizer: CausalTokenizer) -> None:
    pictures = frames(3, 12)
    firsts = np.zeros((12, 3), bool)
    firsts[0] = True
    firsts[3, 1] = firsts[5, 0] = firsts[5, 2] = firsts[8, 1] = True
    together = play(argmax(agent, tokenizer), pictures, firsts.tolist())
    for slot in range(3):
        starts = [*np.flatnonzero(firsts[:, slot]), 12]
        for begin, end in zip(starts, starts[1:], strict=False):
            own = [[True]] + [[False]] * (end - begin - 1)
            alone = play(argmax(agent, tokenizer), pictures[begin:end, slot : slot + 1], own)
            np.testing.assert_array_equal(together[begin:end, slot], alone[:, 0])


def test_actions_depend_on_frames_and_on_the_past(agent: Agent, tokenizer: CausalTokenizer) -> None:
    firsts = [[True] * 16] + [[False] * 16] * 3
    pictures = frames(16, 4)
    base = play(argmax(agent, tokenizer), pictures, firsts)
    changed = pictures.copy()
    changed[3] = frames(16, 1, seed=1)[0]
    other = play(argmax(agent, tokenizer), changed, firsts)
    assert (other[:3] == base[:3]).all() and (other[3] != base[3]).any()
    forgetful = [[True] * 16] * 4
    assert (play(argmax(agent, tokenizer), pictures, forgetful)[3] != base[3]).any()


def test_sampling_follows_its_seed(agent: Agent, tokenizer: CausalTokenizer) -> None:
    policy = AgentPolicy(agent, tokenizer, CLEAN, mode="sampled", name="test")
    firsts = [[True] * 8] + [[False] * 8] * 3
    first = play(policy, frames(8, 4), firsts, seed=1)
    assert (play(policy, frames(8, 4), firsts, seed=1) == first).all()
    assert (play(policy, frames(8, 4), firsts, seed=2) != first).any()


def test_chunked_actions_are_refused(tokenizer: CausalTokenizer, agent: Agent) -> None:
    chunked = Agent(agent.config, action_space=SPACE, token_grid=(2, 2), latent_channels=3, actions_per_step=4)
    with pytest.raises(ValueError, match="takes 4 actions a latent step of 1 frames; expected 1"):
        argmax(chunked, tokenizer)


class Uneven(gymnasium.Env):
    """Episodes of 2 to 6 steps; the reward is the action."""

    action_space = gymnasium.spaces.Discrete(5)
    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options=None):
        self.rng, self.left = np.random.default_rng(seed), 2 + (seed or 0) % 5
        return self.rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), {}

    def step(self, action):
        self.left -= 1
        return self.rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), float(action), self.left == 0, False, {}


def test_returns_do_not_depend_on_how_many_play_side_by_side(agent: Agent, tokenizer: CausalTokenizer) -> None:
    results = [evaluate_policy(Uneven, argmax(agent, tokenizer), num_episodes=9, seed=0, num_envs=n) for n in (1, 4)]
    assert results[0].returns == results[1].returns
