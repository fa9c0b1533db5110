"""The agent: its heads, and the frozen copy of its policy."""

from __future__ import annotations

import torch

from dreamer.models import Agent, AgentConfig, DynamicsConfig, HeadConfig, TransformerConfig
from dreamer.types import ActionComponent, ActionSpace


def make() -> Agent:
    transformer = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, time_every=2, context_length=4)
    config = AgentConfig(
        dynamics=DynamicsConfig(transformer=transformer, max_steps=8), heads=HeadConfig(hidden=8, num_distances=3, num_bins=11)
    )
    space = ActionSpace((ActionComponent("move", "categorical", 4),))
    return Agent(config, action_space=space, token_grid=(2, 2), latent_channels=3, actions_per_step=2)


def test_the_heads_fit_the_dynamics_and_each_other() -> None:
    agent, features = make(), torch.randn(2, 3, 16)
    assert agent.policy(features).sample().shape == (2, 3, 3, 2, 1)  # B T M P A
    assert agent.reward(features).shape == (2, 3, 3, 11)
    assert agent.continue_(features).shape == (2, 3, 3)
    assert agent.value(features).shape == (2, 3, 1, 11)  # the value has no distances


def test_the_prior_is_a_frozen_copy_of_the_policy() -> None:
    agent, features = make(), torch.randn(5, 16)
    prior = agent.prior()
    assert torch.equal(prior.now(features).parameters, agent.policy.now(features).parameters)
    assert not any(p.requires_grad for p in prior.parameters())
    assert not prior.training
    assert all(p.requires_grad for p in agent.policy.parameters())
    before = prior.now(features).parameters
    with torch.no_grad():
        for p in agent.policy.parameters():
            p.add_(0.5)
    assert torch.equal(prior.now(features).parameters, before)
    assert (agent.policy.now(features).kl(prior.now(features)) > 0).all()


def test_weights_survive_a_round_trip_into_a_fresh_agent() -> None:
    first, second = make(), make()
    assert not torch.equal(first.dynamics.latent_in.weight, second.dynamics.latent_in.weight)
    second.load_state_dict(first.state_dict(), strict=True)
    features = torch.randn(2, 16)
    assert torch.equal(first.policy.now(features).parameters, second.policy.now(features).parameters)
    assert torch.equal(first.value(features), second.value(features))
