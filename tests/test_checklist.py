"""The user's checklist: its snippets, word for word, on the Cosmos pipeline as it stands."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
import shlex
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from dreamer import cli
from dreamer.config import DreamerConfig
from dreamer.data import LatentStore, LatentWriter, PretokenizedDataset, create_pretokenized_dataloader
from dreamer.imagination import ImaginationRollout, RolloutConfig, SamplerConfig
from dreamer.losses import PMPOLoss, ShortcutForcingConfig, ShortcutForcingLoss, shortcut_loss
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
from dreamer.utils.debug_phase1 import verify_x_prediction
from dreamer.yaml_config import load_config

ROOT = Path(__file__).parents[1]
TIMED = ("latents", "prev_actions", "prev_action_mask", "actions", "action_mask", "rewards", "terminals")  # fields with a time axis

# ---- the snippets ---------------------------------------------------------------------------------------------------------------

TRAINABLE = """
# Check trainable params (should only be dynamics in Phase 1, heads in Phase 2/3)
trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
print(f"Trainable: {trainable:,}, Frozen: {frozen:,}")
"""

CAUSAL = """
# Verify causal temporal compression
from dreamer.models import CosmosTokenizerWrapper
T_lat = CosmosTokenizerWrapper.compute_temporal_latent_steps(32)
assert T_lat == 5, f"Expected 5, got {T_lat}"
"""

GRADIENTS = """
# Verify gradient flow in Phase 3 (after backward pass)
assert all(p.grad is None for p in tokenizer.parameters()), "Tokenizer should be frozen!"
assert all(p.grad is None for p in dynamics.parameters()), "Dynamics should be frozen!"
assert all(p.grad is None for p in reward_head.parameters()), "Reward head should be frozen!"
assert any(p.grad is not None for p in policy_head.parameters()), "Policy head should train!"
assert any(p.grad is not None for p in value_head.parameters()), "Value head should train!"
"""

CRITICAL = """
# CRITICAL CHECKS (these are valid):
assert policy_head.weight.grad is not None   # Policy head SHOULD train
assert value_head.weight.grad is not None    # Value head SHOULD train
assert dynamics grads is None                # Dynamics FROZEN in PMPO
assert reward_head grads is None             # Reward head FROZEN in PMPO
"""

USAGE = """
# Pretokenize full dataset
python pretokenize_dataset.py --data-path data/mineRL_extracted --output-path data/pretokenized

# Pretokenize subset for testing
python pretokenize_dataset.py --data-path data/mineRL_extracted --output-path data/pretokenized_test --max-episodes 10
"""

LOADING = """
from dreamer.data import PretokenizedDataset, create_pretokenized_dataloader

dataloader = create_pretokenized_dataloader(
    data_path="data/pretokenized",
    batch_size=16,
    sequence_length=5,  # In latent steps (not frames!)
)
"""

CONFIG = """
  cosmos_tokenizer:
    enabled: true
    checkpoint_path: "cosmos_tokenizer/CV8x8x8"
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


def in_python(text: str) -> str:
    """``assert dynamics grads is None`` is no Python; what it means is said with the words of the other snippet."""
    return re.sub(r"assert (\w+) grads is None", r"assert all(p.grad is None for p in \1.parameters())", text)


def batch(latents: torch.Tensor) -> Batch:
    rows, steps = latents.shape[:2]
    actions = torch.cat([torch.randint(0, 2, (rows, steps, 8, 8)), torch.randint(0, 121, (rows, steps, 8, 1))], dim=-1).float()
    known, none = torch.ones(rows, steps, 8, dtype=torch.bool), torch.zeros(rows, steps, dtype=torch.bool)
    whole = torch.ones(rows, dtype=torch.bool)
    return Batch(latents, actions, known, actions, known, torch.rand(rows, steps), none, torch.zeros(rows, dtype=torch.long), whole, whole)


def imagination() -> ImaginationConfig:
    return ImaginationConfig(rollout=RolloutConfig(horizon=2, context=2, sampler=SamplerConfig(num_steps=2)))


# ---- shapes and modules ---------------------------------------------------------------------------------------------------------


def test_32_frames_are_5_latent_steps_of_16_tokens_of_16(latents: torch.Tensor, agent: Agent) -> None:
    namespace: dict[str, object] = {}
    exec(CAUSAL, namespace)
    assert latents.shape == (2, namespace["T_lat"], 16, 16)
    assert latents.flatten(2).shape == (2, 5, 256)
    made, zeros = batch(latents), torch.zeros(2, 5, dtype=torch.long)
    assert agent.dynamics(latents, zeros, zeros, made.prev_actions, made.prev_action_mask).latents.shape == latents.shape
    assert "1 + ceil((F - 1) / 8)" in str(CosmosTokenizerWrapper.compute_temporal_latent_steps.__doc__)


def test_nothing_is_tied_to_a_number_of_latent_steps(tokenizer: CosmosTokenizerWrapper, latents: torch.Tensor, agent: Agent) -> None:
    """Every step of windows of any length reaches the losses of phases 1 and 2."""
    made = batch(torch.cat([latents, latents], dim=1))
    for steps in (2, 3, 5, 6):
        window = dataclasses.replace(
            made, **{f.name: getattr(made, f.name)[:, :steps] for f in dataclasses.fields(made) if f.name in TIMED}
        )
        last = dataclasses.replace(window, latents=window.latents + 3.0 * (torch.arange(steps) == steps - 1)[:, None, None])
        for phase in (Phase1(agent, ShortcutForcingConfig()), Phase2(agent, ShortcutForcingConfig(), AgentLossConfig())):
            losses = [phase(given, 0, torch.Generator().manual_seed(0))[1]["flow_loss"] for given in (window, last)]
            assert losses[0] != losses[1]


def test_encoding_carries_no_gradient_even_if_weights_ask_for_it(cosmos_weights: Path) -> None:
    made = create_cosmos_tokenizer(cosmos_weights, upsampled_size=(64, 64)).requires_grad_(True)
    assert not made.encode(torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8)).requires_grad


def test_phase_1_has_the_shortcut_loss_alone(latents: torch.Tensor, agent: Agent) -> None:
    phase = Phase1(agent, ShortcutForcingConfig(bootstrap_fraction=0))
    loss, metrics = phase(batch(latents), 0, torch.Generator().manual_seed(0))
    assert set(metrics) == {"flow_loss"} and torch.equal(loss.detach(), metrics["flow_loss"])


def test_the_config_of_the_checklist() -> None:
    asked = yaml.safe_load(textwrap.dedent(CONFIG))["cosmos_tokenizer"]
    cosmos = load_config(DreamerConfig, ROOT / "configs" / "minerl_cosmos.yaml").cosmos_tokenizer
    assert {key: str(value) if isinstance(value, Path) else value for key, value in cosmos.model_dump().items() if key in asked} == asked
    assert (cosmos.num_latent_tokens, cosmos.latent_dim, cosmos.upsampled_size) == (16, 16, (256, 256))


# ---- what learns ------------------------------------------------------------------------------------------------------------------


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
    exec(in_python(CRITICAL), names | {"policy_head": policy_head, "value_head": value_head})
    assert policy_head.weight.grad.any() and value_head.weight.grad.any()


def test_the_gradient_check_fails_where_the_world_model_learns(
    tokenizer: CosmosTokenizerWrapper, latents: torch.Tensor, agent: Agent
) -> None:
    loss, _ = Phase2(agent, ShortcutForcingConfig(), AgentLossConfig())(batch(latents), 0, torch.Generator().manual_seed(0))
    loss.backward()
    names = {"tokenizer": tokenizer, "dynamics": agent.dynamics, "reward_head": agent.reward}
    with pytest.raises(AssertionError, match="Dynamics should be frozen!"):
        exec(GRADIENTS, names | {"policy_head": agent.policy, "value_head": agent.value})


def test_pmpo_takes_nothing_but_signs_from_the_advantages() -> None:
    """Each advantage scaled by another factor: same loss, same gradient. A sign that flips changes both."""

    def loss_and_gradient(advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = torch.tensor([[-1.0, -2.0, -3.0, -4.0]], requires_grad=True)
        loss, _ = PMPOLoss()(log_probs, advantages, torch.zeros(1, 4))
        return loss.detach(), torch.autograd.grad(loss, log_probs)[0]

    advantages = torch.tensor([[1.0, 0.5, -2.0, -0.5]])
    loss, gradient = loss_and_gradient(advantages)
    assert loss.item() == 0.5 * -3.5 - 0.5 * -1.5 and gradient.tolist() == [[-0.25, -0.25, 0.25, 0.25]]
    scaled = loss_and_gradient(advantages * torch.tensor([[3.0, 0.1, 10.0, 7.0]]))
    assert torch.equal(scaled[0], loss) and torch.equal(scaled[1], gradient)
    assert loss_and_gradient(-advantages)[0] == -loss


def test_freezing_is_what_phase_3_does(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a decoration: without it the world model would learn, and phase 3 has no other way to hold it still."""
    from dreamer.training import phase3

    called: list[Agent] = []
    monkeypatch.setattr(phase3, "freeze_world_model", called.append)
    agent.requires_grad_(True)
    Phase3(agent, imagination()).train()
    assert called == [agent, agent] and all(p.requires_grad for p in agent.dynamics.parameters())


# ---- pretokenizing ----------------------------------------------------------------------------------------------------------------


def test_loading_pretokenized_latents(latents: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_latents(tmp_path / "data" / "pretokenized", latents)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(LOADING, namespace)
    loaded = next(iter(namespace["dataloader"]))  # type: ignore[call-overload]
    assert loaded.latents.shape == (16, 5, 16, 16) and loaded.actions.shape == (16, 5, 8, 9)
    assert create_pretokenized_dataloader is namespace["create_pretokenized_dataloader"]


def test_the_two_commands(
    cosmos_weights: Path, write_extracted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word, with the settings that the script takes by itself; only the network and the pictures that it sees are small."""
    for index in range(12):
        write_extracted(tmp_path / "data" / "mineRL_extracted" / "MineRLTreechop-v0" / f"episode_{index:02}", 2 + index % 3, seed=index)
    (tmp_path / "cosmos_tokenizer").mkdir()
    (tmp_path / "cosmos_tokenizer" / "CV8x8x8").symlink_to(cosmos_weights)
    text = (cli.PRESETS / f"{cli.MINECRAFT}.yaml").read_text()
    small = text.replace("upsampled_size: [256, 256]", "upsampled_size: [64, 64]")
    assert small != text
    (tmp_path / f"{cli.MINECRAFT}.yaml").write_text(small)
    monkeypatch.setattr(cli, "PRESETS", tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = [words for line in USAGE.splitlines() if (words := shlex.split(line, comments=True))]
    for python, script, *arguments in commands:
        assert python == "python"
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert ended.value.code == 0
    stores = [LatentStore(tmp_path / "data" / name) for name in ("pretokenized", "pretokenized_test")]
    assert [len(store) for store in stores] == [12, 10]
    for store in stores:
        assert (store.token_grid, store.latent_channels, store.temporal_stride, store.actions_per_step) == ((4, 4), 16, 8, 8)
        assert store.lengths.tolist() == [2] * len(store)


def test_what_pretokenizing_gains_and_costs(tokenizer: CosmosTokenizerWrapper, latents: torch.Tensor, tmp_path: Path) -> None:
    """In time of the processor, a batch loads more than 3 times as fast as even a narrow network encodes its 16 windows."""
    write_latents(tmp_path, latents)
    began = time.process_time()
    tokenizer.encode(torch.zeros(1, 33, 3, 64, 64, dtype=torch.uint8))
    encoding = 16 * (time.process_time() - began)
    loader = create_pretokenized_dataloader(tmp_path, batch_size=16, sequence_length=5)
    began = time.process_time()
    for _ in range(3):
        assert len(next(iter(loader)).latents) == 16
    assert encoding > 3 * (time.process_time() - began) / 3
    steps, arrays = 4.35e6 / 8, loader.dataset.store.arrays(0)  # of all of MineRL's frames
    latent_bytes = latents[0].half().nbytes / 5 * steps  # kept as float16
    other_bytes = sum(rows.nbytes / len(rows) for name, rows in arrays.items() if name != "latents") * steps
    assert round(latent_bytes / 1e9, 2) == 0.28 and round((latent_bytes + other_bytes) / 1e9, 2) == 0.44


def write_latents(path: Path, latents: torch.Tensor) -> None:
    """A store of an episode for each row."""
    made = batch(latents)
    sizes = {"token_grid": (4, 4), "latent_channels": 16, "temporal_stride": 8}
    with LatentWriter(path, action_space=MINERL, tokenizer_fingerprint="x", source_fingerprint="y", **sizes) as writer:
        for row in range(len(latents)):
            parts = (made.latents[row], made.actions[row], made.action_mask[row], made.rewards[row], made.terminals[row])
            writer.add(*(part.numpy() for part in parts))


# ---- names ------------------------------------------------------------------------------------------------------------------------


def test_the_names_are_there(agent: Agent) -> None:
    assert CosmosTokenizerWrapper.__module__ == "dreamer.models.cosmos_tokenizer_wrapper" == create_cosmos_tokenizer.__module__
    assert PretokenizedDataset.__module__ == "dreamer.data.pretokenized_dataset"
    assert list(inspect.signature(verify_x_prediction).parameters)[:2] == ["model", "batch"]
    sentence = "The model predicts clean latents directly (x-prediction) rather than velocities (v-prediction)"
    assert sentence in str(shortcut_loss.__doc__)
    assert ShortcutForcingLoss(ShortcutForcingConfig(), 4).corrupt(torch.zeros(1, 2, 16, 16)).noisy.shape == (1, 2, 16, 16)
    assert float(PMPOLoss()(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1))[0]) == 0.0
    assert ImaginationRollout(agent, RolloutConfig(horizon=1, context=2)).agent is agent


def test_every_line_of_the_page_names_a_test_and_a_result() -> None:
    """That the files and tests exist is checked in tests/test_readme.py, as on every page."""
    lines = (ROOT / "docs" / "checklist.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    rows = [row for row in rows if row != ["line", "file", "test", "result"]]
    assert len(rows) == 48
    for row in rows:
        assert len(row) == 4 and all(row), row
        assert re.fullmatch(r"`tests/[\w/]+\.py::test_\w+`(, `tests/[\w/]+\.py::test_\w+`)*", row[2]), row
