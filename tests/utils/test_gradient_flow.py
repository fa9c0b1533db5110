"""The proof of gradient flow: what it says of the phases as they are, and of phases in which something is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dreamer.imagination import RolloutConfig, SamplerConfig
from dreamer.losses import ShortcutForcingConfig
from dreamer.models import Agent, AgentConfig, DynamicsConfig, HeadConfig, TransformerConfig
from dreamer.training import phase3
from dreamer.training.phase1 import Phase1
from dreamer.training.phase2 import AgentLossConfig, Phase2
from dreamer.training.phase3 import ImaginationConfig, Phase3
from dreamer.types import ActionComponent, ActionSpace, Batch
from dreamer.utils.gradient_flow import LEARNS, PARTS, PartFlow, gradient_flow

SPACE = ActionSpace((ActionComponent("move", "categorical", 3),))
ROWS, STEPS = 16, 4


@pytest.fixture
def agent() -> Agent:
    transformer = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, time_every=2, context_length=4)
    dynamics = DynamicsConfig(transformer=transformer, num_registers=1, max_steps=4)
    config = AgentConfig(dynamics=dynamics, heads=HeadConfig(hidden=8, num_distances=2, num_bins=11))
    return Agent(config, action_space=SPACE, token_grid=(1, 2), latent_channels=4)


@pytest.fixture
def batch() -> Batch:
    actions, known = torch.randint(0, 3, (ROWS, STEPS, 1, 1)).float(), torch.ones(ROWS, STEPS, 1, dtype=torch.bool)
    return Batch(
        latents=torch.randn(ROWS, STEPS, 2, 4),
        prev_actions=actions,
        prev_action_mask=known,
        actions=actions,
        action_mask=known,
        rewards=torch.rand(ROWS, STEPS),
        terminals=torch.arange(ROWS * STEPS).view(ROWS, STEPS) == ROWS * STEPS - 1,
        task=torch.zeros(ROWS, dtype=torch.long),
        has_rewards=torch.ones(ROWS, dtype=torch.bool),
        is_relevant=torch.arange(ROWS) < ROWS // 2,
    )


def make(kind: type, agent: Agent, **imagination: object) -> Phase1 | Phase2 | Phase3:
    if kind is Phase1:
        return Phase1(agent, ShortcutForcingConfig())
    if kind is Phase2:
        return Phase2(agent, ShortcutForcingConfig(), AgentLossConfig())
    rollout = RolloutConfig(horizon=2, context=2, sampler=SamplerConfig(num_steps=2))
    return Phase3(agent, ImaginationConfig(**{"rollout": rollout, **imagination}))


def frozen_tokenizer() -> nn.Module:
    return nn.Linear(3, 5).requires_grad_(False).eval()


def problems(flows: tuple[PartFlow, ...]) -> dict[str, str]:
    return {flow.part: flow.problem for flow in flows if flow.problem}


@pytest.mark.parametrize("kind", [Phase1, Phase2, Phase3])
def test_each_phase_as_it_is(kind: type, agent: Agent, batch: Batch) -> None:
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.dynamics.agent_token.grad = torch.ones_like(agent.dynamics.agent_token)  # of somebody before
    phase = make(kind, agent)
    flows = {flow.part: flow for flow in gradient_flow(phase, batch, tokenizer=frozen_tokenizer())}
    assert list(flows) == ["tokenizer", *PARTS, *(["prior"] if kind is Phase3 else [])]
    for part, flow in flows.items():
        assert flow.problem == "" and flow.row().endswith("  ok"), flow
        module = getattr(agent, "policy" if part == "prior" else part, None) or nn.Linear(3, 5)
        size = sum(p.numel() for p in module.parameters())
        learns = part in LEARNS[kind]
        assert (flow.trainable, flow.frozen, flow.expected) == ((size, 0, "learns") if learns else (0, size, "frozen")), flow
        assert 0 < flow.reached <= size if learns else flow.reached == 0, flow
    assert flows["value"].reached == (11 * 8 + 11 if kind is Phase3 else 0)  # it starts at zero, which lets nothing into its hidden layer
    assert all(torch.equal(before[name], value) for name, value in agent.state_dict().items())
    assert all(p.grad is None for p in agent.parameters())


def test_the_policy_is_looked_at_once_it_learns(agent: Agent, batch: Batch) -> None:
    assert problems(gradient_flow(make(Phase3, agent, value_only_steps=5), batch)) == {}


def asks(agent: Agent, phase: nn.Module) -> None:
    agent.value.requires_grad_(True)


def gets(agent: Agent, phase: nn.Module) -> None:
    forward = phase.forward

    def leaking(*given: object):
        agent.value.mlp.out.bias.grad = torch.zeros_like(agent.value.mlp.out.bias)
        return forward(*given)

    phase.forward = leaking  # type: ignore[method-assign]


def freezes(agent: Agent, phase: nn.Module) -> None:
    agent.dynamics.latent_in.requires_grad_(False)


def freezes_all(agent: Agent, phase: nn.Module) -> None:
    agent.requires_grad_(False)


def explodes(agent: Agent, phase: nn.Module) -> None:
    nn.init.constant_(agent.dynamics.latent_out.bias, float("inf"))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (asks, {"value": "asks for gradients"}),
        (gets, {"value": "got a gradient"}),
        (freezes, {"dynamics": "some of it is frozen"}),
        (freezes_all, {"dynamics": "some of it is frozen"}),
        (explodes, {"dynamics": "its gradient is not finite"}),
    ],
)
def test_what_is_wrong_in_phase_1_is_named(
    broken: Callable[[Agent, nn.Module], None], said: dict[str, str], agent: Agent, batch: Batch
) -> None:
    phase = make(Phase1, agent)
    broken(agent, phase)
    flows = gradient_flow(phase, batch)
    assert problems(flows) == said
    assert sum("FAILS" in flow.row() for flow in flows) == 1


def test_a_world_model_that_is_not_frozen_in_phase_3(agent: Agent, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase3, "freeze_world_model", lambda agent: None)
    said = problems(gradient_flow(make(Phase3, agent), batch))
    assert said == dict.fromkeys(("dynamics", "reward", "continue_"), "asks for gradients")


def test_a_world_model_that_is_frozen_in_training_mode(agent: Agent, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_eval(agent: Agent) -> None:
        for part in ("dynamics", "reward", "continue_"):
            getattr(agent, part).requires_grad_(False)

    monkeypatch.setattr(phase3, "freeze_world_model", without_eval)
    said = problems(gradient_flow(make(Phase3, agent), batch))
    assert said == dict.fromkeys(("dynamics", "reward", "continue_"), "is not in eval mode")


def test_a_policy_without_gradient(agent: Agent, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    phase = make(Phase3, agent)
    monkeypatch.setattr(phase.normalizer, "forward", lambda name, term: 0 * term if name == "policy" else term)
    assert problems(gradient_flow(phase, batch)) == {"policy": "no gradient arrived"}


def test_a_tokenizer_that_moves(agent: Agent, batch: Batch) -> None:
    assert problems(gradient_flow(make(Phase1, agent), batch, tokenizer=nn.Linear(3, 5).eval())) == {"tokenizer": "asks for gradients"}
    awake = nn.Linear(3, 5).requires_grad_(False)
    assert problems(gradient_flow(make(Phase1, agent), batch, tokenizer=awake)) == {"tokenizer": "is not in eval mode"}


def test_heads_that_find_nothing_to_learn_from(agent: Agent, batch: Batch) -> None:
    """Unknown rewards and actions are no fault of the phase."""
    silent = dataclasses.replace(batch, has_rewards=torch.zeros(ROWS, dtype=torch.bool), is_relevant=torch.zeros(ROWS, dtype=torch.bool))
    flows = {flow.part: flow for flow in gradient_flow(make(Phase2, agent), silent)}
    assert {part for part, flow in flows.items() if flow.expected == "trainable"} == {"policy", "reward", "continue_"}
    assert flows["policy"].reached == flows["reward"].reached == flows["continue_"].reached == 0 and not problems(tuple(flows.values()))
    weightless = Phase2(agent, ShortcutForcingConfig(), AgentLossConfig(policy_weight=0))
    assert {flow.part for flow in gradient_flow(weightless, batch) if flow.expected == "trainable"} == {"policy"}


def test_a_continue_head_that_is_sure_of_itself_is_no_fault(agent: Agent, batch: Batch) -> None:
    """Where no episode ends, it learns to put out certainty, and its gradient rounds to nothing."""
    nn.init.zeros_(agent.continue_.mlp.out.weight)
    nn.init.constant_(agent.continue_.mlp.out.bias, 40.0)
    endless = dataclasses.replace(batch, terminals=torch.zeros_like(batch.terminals))
    flows = gradient_flow(make(Phase2, agent), endless)
    (flow,) = (flow for flow in flows if flow.part == "continue_")
    assert (flow.expected, flow.reached, flow.problem) == ("trainable", 0, "")
