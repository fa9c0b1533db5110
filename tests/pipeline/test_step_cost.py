"""What the simulation says, against hand-computed numbers and against real training steps on the CPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamer.losses import ShortcutForcingConfig
from dreamer.models import Agent, AgentConfig
from dreamer.models.transformer import checkpoint_layers
from dreamer.pipeline.step_cost import StepCost, in_one_of_several, measure_step, num_bytes, simulate_step
from dreamer.training.loop import Phase, TrainConfig, Trainer
from dreamer.training.optim import optimizer_tensors
from dreamer.training.phase1 import Phase1
from dreamer.training.phase2 import AgentLossConfig, Phase2
from dreamer.training.phase3 import ImaginationConfig, Phase3
from dreamer.types import ActionComponent, ActionSpace, Batch

SPACE = ActionSpace((ActionComponent("move", "categorical", 5), ActionComponent("keys", "binary", 3)))
ROWS, STEPS, GRID, CHANNELS, REGISTERS, WIDTH, HEADS, HIDDEN = 3, 5, (2, 2), 6, 1, 16, 2, 32
TINY = {"width": WIDTH, "num_layers": 2, "num_heads": HEADS, "num_kv_heads": HEADS, "time_every": 2, "mlp_ratio": 2, "context_length": 8}
GROUPED = TINY | {"num_heads": 4, "num_kv_heads": 2, "width": 32, "num_layers": 4, "logit_softcap": None, "context_length": 3}
ADAMW = TrainConfig.model_validate({"steps": 9})
MUON = TrainConfig.model_validate({"steps": 9, "optim": {"optimizer": "muon"}})


def agent(transformer: dict[str, Any] = TINY, actions_per_step: int = 1) -> Agent:
    config = {
        "dynamics": {"transformer": transformer, "num_registers": REGISTERS, "max_steps": 8},
        "heads": {"hidden": 24, "num_distances": 3},
    }
    return Agent(
        AgentConfig.model_validate(config), action_space=SPACE, token_grid=GRID, latent_channels=CHANNELS, actions_per_step=actions_per_step
    )


def batch(rows: int = ROWS, actions_per_step: int = 1, steps: int = STEPS) -> Batch:
    actions, known = torch.zeros(rows, steps, actions_per_step, 4), torch.ones(rows, steps, actions_per_step, dtype=torch.bool)
    return Batch(
        latents=torch.randn(rows, steps, GRID[0] * GRID[1], CHANNELS),
        prev_actions=actions,
        prev_action_mask=known,
        actions=actions.clone(),
        action_mask=known.clone(),
        rewards=torch.zeros(rows, steps),
        terminals=torch.zeros(rows, steps, dtype=torch.bool),
        task=torch.zeros(rows, dtype=torch.long),
        has_rewards=torch.ones(rows, dtype=torch.bool),
        is_relevant=torch.arange(rows) < rows // 2,
    )


def phase1(transformer: dict[str, Any] = TINY, bootstrap: float = 0.0) -> Phase1:
    return Phase1(agent(transformer), ShortcutForcingConfig(bootstrap_fraction=bootstrap))


def phase2(transformer: dict[str, Any] = GROUPED) -> Phase2:
    return Phase2(agent(transformer, actions_per_step=4), ShortcutForcingConfig(bootstrap_fraction=0.5), AgentLossConfig())


def phase3() -> Phase3:
    config = {"rollout": {"horizon": 3, "context": 2, "sampler": {"num_steps": 2}}}
    return Phase3(agent(), ImaginationConfig.model_validate(config))


def forward_flops(rows: int, steps: int) -> tuple[int, int]:
    """Of one pass of the dynamics without agent token, and of ``latent_in`` alone, by hand: 2 a multiply-add."""
    tokens, head_width = 2 + GRID[0] * GRID[1] + REGISTERS, WIDTH // HEADS
    linear = 2 * rows * steps * tokens * (WIDTH * 3 * WIDTH + WIDTH * WIDTH + WIDTH * 2 * HIDDEN + HIDDEN * WIDTH)
    space = 2 * 2 * (rows * steps) * HEADS * tokens * tokens * head_width  # q k, then weights v
    time = 2 * 2 * (rows * tokens) * HEADS * steps * steps * head_width
    latents = 2 * rows * steps * GRID[0] * GRID[1] * CHANNELS * WIDTH
    return 2 * linear + space + time + 2 * latents, latents


def test_flops_of_a_tiny_transformer_by_hand():
    """The backward pass costs twice the forward pass, but nobody needs the gradient of the noisy latents."""
    forward, latents = forward_flops(ROWS, STEPS)
    found = simulate_step(phase1, batch, ADAMW).flops
    assert found == pytest.approx(3 * forward - latents, rel=0.01)


def test_bootstrap_rows_cost_two_more_passes_of_their_own():
    rows = 4
    without = simulate_step(phase1, lambda: batch(rows), ADAMW).flops
    found = simulate_step(lambda: phase1(bootstrap=0.5), lambda: batch(rows), ADAMW).flops
    assert found - without == pytest.approx(2 * forward_flops(2, STEPS)[0], rel=0.01)


def test_flops_are_those_that_pytorch_counts_in_a_real_step():
    phase = phase1(bootstrap=1 / 3)
    with FlopCounterMode(display=False) as counter:
        phase(batch(), 0, torch.Generator())[0].backward()
    assert simulate_step(lambda: phase1(bootstrap=1 / 3), batch, ADAMW).flops == counter.get_total_flops()


def test_accumulated_batches_and_muon_are_counted():
    one = simulate_step(phase1, batch, ADAMW)
    four = simulate_step(phase1, batch, ADAMW.model_copy(update={"accumulate": 4}))
    assert four.flops == 4 * one.flops
    assert four.saved == one.saved
    assert one.peak <= four.peak <= one.peak + one.gradients
    assert simulate_step(phase1, batch, MUON).flops > one.flops  # its matrix products


def test_fewer_rows_and_more_batches_keep_less_for_the_backward_pass():
    whole = simulate_step(phase1, lambda: batch(8), ADAMW)
    halves = simulate_step(phase1, lambda: batch(4), ADAMW.model_copy(update={"accumulate": 2}))
    assert halves.flops == pytest.approx(whole.flops, rel=0.01)
    assert halves.saved == pytest.approx(whole.saved / 2, rel=0.05)
    assert halves.peak < whole.peak


def saved_bytes(phase: Phase, data: Batch) -> int:
    """What autograd keeps of a real forward pass on the CPU, beside weights: each piece of memory once."""
    own = {p.untyped_storage().data_ptr() for p in [*phase.parameters(), *phase.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = phase.train()(data, 0, torch.Generator())
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("build", "make_batch", "uniform"),
    [
        (lambda: phase1(bootstrap=0.25), lambda: batch(8), 8),  # capped attention, by matrix products
        (phase2, lambda: batch(6, actions_per_step=4, steps=9), 3),  # fused attention, grouped queries, heads, chunks of actions
    ],
)
def test_activations_are_what_a_real_step_keeps(build, make_batch, uniform):
    found = simulate_step(build, make_batch, ADAMW, whole_number=uniform).saved
    assert found == pytest.approx(saved_bytes(build(), make_batch()), rel=0.15)


def test_activations_are_what_a_real_step_keeps_with_checkpointing():
    """What goes into the layers, and what is around them; half as many rows a batch keep half."""

    def deep() -> Phase1:
        return phase1(TINY | {"num_layers": 8})

    def checkpointed() -> Phase1:
        phase = deep()
        checkpoint_layers(phase.model)
        return phase

    config = ADAMW.model_copy(update={"activation_checkpointing": True})
    all_kept, found = (simulate_step(deep, lambda: batch(8), c).saved for c in (ADAMW, config))
    real = saved_bytes(checkpointed(), batch(8))
    assert found == pytest.approx(real, rel=0.05)
    assert all_kept == pytest.approx(saved_bytes(deep(), batch(8)), rel=0.05)
    assert found < all_kept / 4
    halves = simulate_step(deep, lambda: batch(4), config.model_copy(update={"accumulate": 2})).saved
    assert halves == pytest.approx(saved_bytes(checkpointed(), batch(4)), rel=0.05) == pytest.approx(real / 2, rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation_checkpointing": True}, {"accumulate": 2}, {"activation_checkpointing": True, "accumulate": 2}],
    ids=["plain", "checkpointing", "accumulating", "both"],
)
def test_the_peak_is_that_of_a_real_step(changes: dict[str, Any], tmp_path: Path):
    """As PyTorch's profiler counts what is allocated and freed."""
    large = TINY | {"width": 64, "num_layers": 6}
    config, rows = ADAMW.model_copy(update=changes), 16 // changes.get("accumulate", 1)
    predicted = simulate_step(lambda: phase1(large), lambda: batch(rows), config).peak
    trainer = Trainer(phase1(large), config, tmp_path / "run", seed=0, settings={}, model_info={})
    batches = [batch(rows) for _ in range(config.accumulate)]
    trainer.train_step(batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.train_step(batches)
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    before = num_bytes([*trainer.phase.parameters(), *trainer.phase.buffers(), *trainer.ema.values()])
    before += num_bytes(optimizer_tensors(trainer.optimizers).values()) + num_bytes(vars(batches[0]).values())
    assert predicted == pytest.approx(before + max(itertools.accumulate(sizes)), rel=0.05)


def test_one_of_several_processes_holds_less():
    phase, processes = phase1(TINY | {"num_layers": 6}), 4
    cost = simulate_step(lambda: phase1(TINY | {"num_layers": 6}), batch, ADAMW)
    assert in_one_of_several(cost, phase, 1, "fsdp") == cost
    ddp, fsdp = (in_one_of_several(cost, phase, processes, strategy) for strategy in ("ddp", "fsdp"))
    assert (ddp.weights, ddp.optimizer, ddp.average, ddp.saved) == (cost.weights, cost.optimizer, cost.average, cost.saved)
    assert ddp.peak - cost.peak == ddp.gradients - cost.gradients == cost.gradients
    for name in ("gradients", "optimizer", "average"):
        assert getattr(fsdp, name) == pytest.approx(getattr(cost, name) / processes, abs=1)
    frozen = num_bytes(p for p in phase.parameters() if not p.requires_grad) + num_bytes(phase.buffers())
    assert fsdp.weights == pytest.approx(frozen + (cost.weights - frozen) / processes, abs=1)
    assert fsdp.saved == cost.saved and fsdp.peak < cost.peak


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("build", [phase1, phase3])
def test_state_is_that_of_a_real_trainer(build, config, tmp_path: Path):
    found = simulate_step(build, batch, config)
    phase = build()
    trainer = Trainer(phase, config, tmp_path / "run", seed=0, settings={}, model_info={})
    trainer.train_step([batch()])

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    assert found.weights == size([*phase.parameters(), *phase.buffers()])
    assert found.gradients == size(p for p in phase.model.parameters() if p.requires_grad)
    # the agent token, which phase 1 does not use, is trainable too, but has no state before it learns
    assert found.optimizer == pytest.approx(size(optimizer_tensors(trainer.optimizers).values()), rel=0.02)
    assert found.average == size(trainer.ema.values())


def test_a_simulated_step_is_a_real_one():
    """The same instrument on tensors with content: nothing in the step goes another way without them."""
    simulated = simulate_step(phase2, lambda: batch(8, actions_per_step=4), ADAMW, whole_number=4)
    real = measure_step(phase2(), batch(8, actions_per_step=4), ADAMW)
    assert simulated.flops == real.flops
    for name in ("saved", "peak"):
        assert getattr(simulated, name) == pytest.approx(getattr(real, name), rel=0.01)


def test_imagination_is_left_out_where_it_is_carried_over():
    imagined = {
        "features": torch.zeros(ROWS, 4, WIDTH),
        "actions": torch.zeros(ROWS, 3, 1, 4),
        "rewards": torch.zeros(ROWS, 3),
        "continues": torch.zeros(ROWS, 3),
        "latents": torch.zeros(ROWS, 4, 4, CHANNELS),
        "has_ended": torch.zeros(ROWS, dtype=torch.bool),
    }

    def again() -> Phase3:
        config = {"updates_per_rollout": 2, "rollout": {"horizon": 3, "context": 2, "sampler": {"num_steps": 2}}}
        return Phase3(agent(), ImaginationConfig.model_validate(config))

    dreaming: StepCost = simulate_step(again, batch, ADAMW, step=0, carried=lambda: imagined)
    learning: StepCost = simulate_step(again, batch, ADAMW, step=1, carried=lambda: imagined)
    assert learning.saved == dreaming.saved > 0
    assert learning.flops < dreaming.flops / 5


def test_a_model_of_a_billion_parameters_takes_no_memory():
    large = TINY | {"width": 4096, "num_heads": 32, "num_kv_heads": 32, "num_layers": 5}
    cost = simulate_step(lambda: phase1(large), lambda: batch(1, steps=2), ADAMW)
    assert cost.weights > 3e9 and cost.optimizer == pytest.approx(2 * cost.gradients, rel=0.01)
