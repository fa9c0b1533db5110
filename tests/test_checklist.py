"""The user's checklist: its snippets, word for word, on the Cosmos pipeline as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dreamer.data import LatentWriter, create_pretokenized_dataloader
from dreamer.imagination import ImaginationRollout, RolloutConfig, SamplerConfig
from dreamer.losses import PMPOLoss, ShortcutForcingConfig, ShortcutForcingLoss
from dreamer.models import (
    Agent,
    AgentConfig,
    CosmosTokenizerWrapper,
    DynamicsConfig,
    HeadConfig,
    TransformerConfig,
    create_cosmos_tokenizer,
)
from dreamer.ops.minecraft import MINERL
from dreamer.training.phase1 import Phase1
from dreamer.training.phase2 import AgentLossConfig, Phase2
from dreamer.training.phase3 import ImaginationConfig, Phase3
from dreamer.types import Batch

ROOT = Path(__file__).parents[1]

TRAINABLE = """
trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
print(f"Trainable: {trainable:,}, Frozen: {frozen:,}")
"""

CAUSAL = """
from dreamer.models import CosmosTokenizerWrapper
T_lat = CosmosTokenizerWrapper.compute_temporal_latent_steps(32)
assert T_lat == 5, f"Expected 5, got {T_lat}"
"""

GRADIENTS = """
assert all(p.grad is None for p in tokenizer.parameters()), "Tokenizer should be frozen!"
assert all(p.grad is None for p in dynamics.parameters()), "Dynamics should be frozen!"
assert all(p.grad is None for p in reward_head.parameters()), "Reward head should be frozen!"
assert any(p.grad is not None for p in policy_head.parameters()), "Policy head should train!"
assert any(p.grad is not None for p in value_head.parameters()), "Value head should train!"
"""

LOADING = """
from dreamer.data import PretokenizedDataset, create_pretokenized_dataloader

dataloader = create_pretokenized_dataloader(
    data_path="data/pretokenized",
    batch_size=16,
    sequence_length=5,  # In latent steps (not frames!)
)
"""


@pytest.fixture(scope="module")
def tokenizer(cosmos_weights: Path) -> CosmosTokenizerWrapper:
    """With all that the checklist sets: 64x64 to 256x256, means over 16 tokens. Only the network is narrow, and its weights are random."""
    return create_cosmos_tokenizer(cosmos_weights)


@pytest.fixture(scope="module")
def latents(tokenizer: CosmosTokenizerWrapper) -> torch.Tensor:
    encoded = tokenizer.encode(torch.randint(0, 256, (1, 32, 3, 64, 64), dtype=torch.uint8))
    return torch.cat([encoded, encoded.flip(1)])


@pytest.fixture
def agent(tokenizer: CosmosTokenizerWrapper) -> Agent:
    transformer = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, time_every=2, context_length=6)
    config = AgentConfig(
        dynamics=DynamicsConfig(transformer=transformer, num_registers=1, max_steps=4),
        heads=HeadConfig(hidden=8, num_distances=2, num_bins=11),
    )
    return Agent(
        config,
        action_space=MINERL,
        token_grid=tokenizer.token_grid,
        latent_channels=tokenizer.latent_channels,
        actions_per_step=tokenizer.temporal_stride,
    )


def batch(latents: torch.Tensor) -> Batch:
    rows, steps = latents.shape[:2]
    actions = torch.cat([torch.randint(0, 2, (rows, steps, 8, 8)), torch.randint(0, 121, (rows, steps, 8, 1))], dim=-1).float()
    known, none = torch.ones(rows, steps, 8, dtype=torch.bool), torch.zeros(rows, steps, dtype=torch.bool)
    whole = torch.ones(rows, dtype=torch.bool)
    return Batch(latents, actions, known, actions, known, torch.rand(rows, steps), none, torch.zeros(rows, dtype=torch.long), whole, whole)


def imagination() -> ImaginationConfig:
    return ImaginationConfig(rollout=RolloutConfig(horizon=2, context=2, sampler=SamplerConfig(num_steps=2)))


def test_32_frames_are_5_latent_steps_of_16_tokens_of_16(tokenizer: CosmosTokenizerWrapper, latents: torch.Tensor) -> None:
    namespace: dict[str, object] = {}
    exec(CAUSAL, namespace)
    assert latents.shape == (2, namespace["T_lat"], 16, 16)
    assert latents.flatten(2).shape == (2, 5, 256)


@pytest.mark.parametrize("phase", ["phase1", "phase2", "phase3"])
def test_what_trains_in_each_phase(tokenizer: CosmosTokenizerWrapper, agent: Agent, phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The dynamics in phase 1, with heads in phase 2, heads alone in phase 3; the tokenizer never."""
    made = {
        "phase1": lambda: Phase1(agent, ShortcutForcingConfig()),
        "phase2": lambda: Phase2(agent, ShortcutForcingConfig(), AgentLossConfig()),
        "phase3": lambda: Phase3(agent, imagination()),
    }[phase]()
    learning = {
        "phase1": [agent.dynamics],
        "phase2": [agent.dynamics, agent.policy, agent.reward, agent.continue_],
        "phase3": [agent.policy, agent.value],
    }[phase]

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    model = nn.ModuleList([made.model, tokenizer])
    namespace: dict[str, object] = {"model": model}
    exec(TRAINABLE, namespace)
    assert (namespace["trainable"], namespace["frozen"]) == (count(*learning), count(model) - count(*learning))
    assert capsys.readouterr().out == f"Trainable: {count(*learning):,}, Frozen: {count(model) - count(*learning):,}\n"


def test_gradients_after_one_backward_pass_of_phase_3(
    tokenizer: CosmosTokenizerWrapper, latents: torch.Tensor, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    for head in (agent.policy, agent.value):
        nn.init.normal_(head.mlp.out.weight, std=0.2)
    monkeypatch.syspath_prepend(str(ROOT))
    from train_phase3 import freeze_world_model

    tokenizer.requires_grad_(True)  # as if somebody had
    agent.dynamics.train()
    freeze_world_model(agent, tokenizer)
    frozen = (tokenizer, agent.dynamics, agent.reward, agent.continue_)
    assert not any(p.requires_grad for module in frozen for p in module.parameters())
    assert not any(module.training for module in frozen)
    phase = Phase3(agent, imagination()).train()
    assert not any(module.training for module in frozen) and agent.policy.training
    loss, _ = phase(batch(latents), 0, torch.Generator().manual_seed(0))
    loss.backward()
    names = {"tokenizer": tokenizer, "dynamics": agent.dynamics, "reward_head": agent.reward}
    exec(GRADIENTS, names | {"policy_head": agent.policy, "value_head": agent.value})
    policy_head, value_head = agent.policy.mlp.out, agent.value.mlp.out
    assert policy_head.weight.grad is not None  # Policy head SHOULD train
    assert value_head.weight.grad is not None  # Value head SHOULD train
    assert policy_head.weight.grad.any() and value_head.weight.grad.any()


def test_the_gradient_check_fails_where_the_world_model_learns(
    tokenizer: CosmosTokenizerWrapper, latents: torch.Tensor, agent: Agent
) -> None:
    loss, _ = Phase2(agent, ShortcutForcingConfig(), AgentLossConfig())(batch(latents), 0, torch.Generator().manual_seed(0))
    loss.backward()
    names = {"tokenizer": tokenizer, "dynamics": agent.dynamics, "reward_head": agent.reward}
    with pytest.raises(AssertionError, match="Dynamics should be frozen!"):
        exec(GRADIENTS, names | {"policy_head": agent.policy, "value_head": agent.value})


def test_freezing_is_what_phase_3_does(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a decoration: without it the world model would learn, and phase 3 has no other way to hold it still."""
    from dreamer.training import phase3

    called: list[Agent] = []
    monkeypatch.setattr(phase3, "freeze_world_model", called.append)
    agent.requires_grad_(True)
    Phase3(agent, imagination()).train()
    assert called == [agent, agent] and all(p.requires_grad for p in agent.dynamics.parameters())


def test_loading_pretokenized_latents(latents: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = batch(latents)
    path = tmp_path / "data" / "pretokenized"
    sizes = {"token_grid": (4, 4), "latent_channels": 16, "temporal_stride": 8}
    with LatentWriter(path, action_space=MINERL, tokenizer_fingerprint="x", source_fingerprint="y", **sizes) as writer:
        for row in range(2):
            parts = (made.latents[row], made.actions[row], made.action_mask[row], made.rewards[row], made.terminals[row])
            writer.add(*(part.numpy() for part in parts))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(LOADING, namespace)
    loaded = next(iter(namespace["dataloader"]))  # type: ignore[call-overload]
    assert loaded.latents.shape == (16, 5, 16, 16) and loaded.actions.shape == (16, 5, 8, 9)
    assert create_pretokenized_dataloader is namespace["create_pretokenized_dataloader"]


def test_the_names_are_there(agent: Agent) -> None:
    assert ShortcutForcingLoss(ShortcutForcingConfig(), 4).corrupt(torch.zeros(1, 2, 16, 16)).noisy.shape == (1, 2, 16, 16)
    assert float(PMPOLoss()(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1))[0]) == 0.0
    assert ImaginationRollout(agent, RolloutConfig(horizon=1, context=2)).agent is agent
