"""Imagined rollouts: what is recorded at which index, what it depends on, and that nothing learns from it by accident."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamer.imagination import ImaginationRollout, RolloutConfig, SamplerConfig
from dreamer.models import Agent
from dreamer.types import Batch, Trajectory

HORIZON, CONTEXT = 5, 3

MakeAgent = Callable[..., Agent]
MakeBatch = Callable[..., Batch]
MakeGenerator = Callable[[int], torch.Generator]


def rollout(agent: Agent) -> ImaginationRollout:
    return ImaginationRollout(agent, RolloutConfig(horizon=HORIZON, context=CONTEXT, sampler=SamplerConfig(num_steps=2)))


@pytest.fixture(params=[1, 8])
def slots(request: pytest.FixtureRequest) -> int:
    return request.param


def test_shapes_and_no_gradient(slots: int, make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    trajectory = rollout(make_agent(slots))(make_batch(2, 6, slots))
    shapes = {f.name: tuple(getattr(trajectory, f.name).shape) for f in dataclasses.fields(Trajectory)}
    assert shapes == {
        "features": (2, HORIZON + 1, 16),
        "actions": (2, HORIZON, slots, 2),
        "rewards": (2, HORIZON),
        "continues": (2, HORIZON),
        "latents": (2, HORIZON + 1, 4, 3),
        "has_ended": (2,),
    }
    assert not any(getattr(trajectory, name).requires_grad for name in shapes)


def test_it_starts_at_the_last_context_step(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    batch = make_batch()
    assert torch.equal(rollout(make_agent())(batch).latents[:, 0], batch.latents[:, CONTEXT - 1])


def test_the_recorded_actions_are_those_that_the_dynamics_was_given(slots: int, make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    agent, batch = make_agent(slots), make_batch(2, 6, slots)
    given: list[Tensor] = []

    def keep(_module: object, args: tuple, kwargs: dict) -> None:
        if kwargs.get("write"):
            given.append(args[3])

    agent.dynamics.register_forward_pre_hook(keep, with_kwargs=True)
    trajectory = rollout(agent)(batch)
    assert torch.equal(given[0], batch.prev_actions[:, :CONTEXT])
    assert torch.equal(torch.cat(given[1:], dim=1), trajectory.actions)  # the action at t led into the state at t + 1


def test_actions_come_from_the_policy_at_their_own_state(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    agent = make_agent()
    torch.nn.init.normal_(agent.policy.mlp.out.weight, std=1000.0)  # so sure that its samples are its mode
    trajectory = rollout(agent)(make_batch(16))
    modes = agent.policy.now(trajectory.features).mode()
    assert (trajectory.actions == modes[:, :-1]).float().mean() > 0.98
    assert (trajectory.actions == modes[:, 1:]).float().mean() < 0.95  # the test can tell a shift


def test_rewards_and_continues_are_those_of_the_next_state(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    agent = make_agent()
    trajectory = rollout(agent)(make_batch())
    rewards, continues = agent.reward.mean(trajectory.features), agent.continue_.mean(trajectory.features)
    torch.testing.assert_close(trajectory.rewards, rewards[:, 1:])
    torch.testing.assert_close(trajectory.continues, continues[:, 1:])
    assert not torch.allclose(trajectory.rewards, rewards[:, :-1])
    assert not torch.allclose(trajectory.continues, continues[:, :-1])
    assert ((trajectory.continues >= 0) & (trajectory.continues <= 1)).all()


def test_it_depends_on_its_seed_alone_for_noise_and_actions(
    make_agent: MakeAgent, make_batch: MakeBatch, make_generator: MakeGenerator
) -> None:
    run, batch = rollout(make_agent()), make_batch(8)
    first = run(batch, make_generator(1))
    torch.manual_seed(55)
    again, other = run(batch, make_generator(1)), run(batch, make_generator(2))
    for f in dataclasses.fields(Trajectory):
        assert torch.equal(getattr(first, f.name), getattr(again, f.name))
        assert f.name == "has_ended" or not torch.equal(getattr(first, f.name), getattr(other, f.name))


@pytest.mark.parametrize("name", ["latents", "prev_actions", "task"])
def test_it_depends_on_its_context(name: str, make_agent: MakeAgent, make_batch: MakeBatch, make_generator: MakeGenerator) -> None:
    run, batch = rollout(make_agent()), make_batch()
    batch.prev_actions.zero_()
    before = run(batch, make_generator(1))
    value = getattr(batch, name).clone()
    value[0, ...] = 1
    after = run(dataclasses.replace(batch, **{name: value}), make_generator(1))
    assert not torch.equal(before.features[0], after.features[0])
    assert not torch.equal(before.rewards[0], after.rewards[0])
    assert torch.equal(before.features[1, 0], after.features[1, 0])


def test_what_follows_the_context_is_not_read(make_agent: MakeAgent, make_batch: MakeBatch, make_generator: MakeGenerator) -> None:
    run, batch = rollout(make_agent()), make_batch()
    before = run(batch, make_generator(1))
    batch.latents[:, CONTEXT:] = 99.0
    batch.prev_actions[:, CONTEXT:] = 1.0
    batch.actions.fill_(0.0)
    after = run(batch, make_generator(1))
    assert torch.equal(before.features, after.features)


def test_the_dream_follows_the_actions_of_the_policy(make_agent: MakeAgent, make_batch: MakeBatch, make_generator: MakeGenerator) -> None:
    agent, batch = make_agent(), make_batch()
    run = rollout(agent)
    ends = []
    for choice in (0, 4):
        torch.nn.init.zeros_(agent.policy.mlp.out.weight)
        torch.nn.init.zeros_(agent.policy.mlp.out.bias)
        with torch.no_grad():
            agent.policy.mlp.out.bias[choice] = 100.0
            agent.policy.mlp.out.bias[5] = -100.0
        trajectory = run(batch, make_generator(1))
        assert (trajectory.actions[..., 0] == choice).all()
        ends.append(trajectory)
    assert torch.equal(ends[0].latents[:, 0], ends[1].latents[:, 0])
    assert all(not torch.equal(ends[0].latents[:, t], ends[1].latents[:, t]) for t in range(1, HORIZON + 1))


def test_no_parameter_gets_a_gradient_from_imagining(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    agent = make_agent()
    trajectory = rollout(agent)(make_batch())
    policy = agent.policy.now(trajectory.features[:, :-1])
    (policy.log_prob(trajectory.actions).sum() + agent.value(trajectory.features).logsumexp(-1).sum()).backward()
    for module in (agent.dynamics, agent.reward, agent.continue_):
        assert all(p.grad is None for p in module.parameters())
    for module in (agent.policy, agent.value):
        assert all(p.grad is not None for p in module.parameters())


def test_contexts_that_do_not_fit_are_refused(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match="context is 7.*at most 6"):
        ImaginationRollout(make_agent(), RolloutConfig(context=7))
    with pytest.raises(ValueError, match="holds 2 steps.*needs 3"):
        rollout(make_agent())(make_batch(2, 2))


def test_bfloat16_autocast(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        trajectory = rollout(make_agent(8))(make_batch(2, 6, 8))
    assert all(torch.isfinite(getattr(trajectory, f.name)).all() for f in dataclasses.fields(Trajectory))
    assert trajectory.features.dtype == torch.float32
