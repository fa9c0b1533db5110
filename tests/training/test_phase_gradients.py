"""Which parts learn in which phase, and from which rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from dreamer.imagination import RolloutConfig, SamplerConfig
from dreamer.losses import ShortcutForcingConfig
from dreamer.models import Agent, AgentConfig, CausalTokenizer, CausalTokenizerConfig, DynamicsConfig, HeadConfig, TransformerConfig
from dreamer.training.phase0 import Phase0, Phase0Config, make_perceptual
from dreamer.training.phase1 import Phase1
from dreamer.training.phase2 import AgentLossConfig, Phase2, RelevantConfig, relevant_episodes
from dreamer.training.phase3 import ImaginationConfig, Phase3, freeze_world_model
from dreamer.types import ActionComponent, ActionSpace, Batch, FrameBatch

SPACE = ActionSpace((ActionComponent("move", "categorical", 3), ActionComponent("keys", "binary", 2)))
PARTS = ("dynamics", "policy", "reward", "continue_", "value")


@pytest.fixture
def agent() -> Agent:
    transformer = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, time_every=2, context_length=6)
    dynamics = DynamicsConfig(transformer=transformer, num_registers=1, max_steps=4)
    heads = HeadConfig(hidden=8, num_distances=2, num_bins=11, bin_range=3.0)
    made = Agent(AgentConfig(dynamics=dynamics, heads=heads), action_space=SPACE, token_grid=(1, 2), latent_channels=4)
    for head in (made.policy, made.reward, made.continue_, made.value):  # they begin with zeros, which let no gradient through
        nn.init.normal_(head.mlp.out.weight, std=0.2)
    return made


def batch(rows: int = 8, steps: int = 5, num_relevant: int = 0) -> Batch:
    g = torch.Generator().manual_seed(0)
    actions = torch.cat([torch.randint(0, 3, (rows, steps, 1, 1), generator=g), torch.randint(0, 2, (rows, steps, 1, 2), generator=g)], -1)
    known = torch.ones(rows, steps, 1, dtype=torch.bool)
    return Batch(
        latents=torch.randn(rows, steps, 2, 4, generator=g),
        prev_actions=actions.float(),
        prev_action_mask=known,
        actions=actions.float(),
        action_mask=known,
        rewards=torch.randint(0, 2, (rows, steps), generator=g).float(),
        terminals=torch.rand(rows, steps, generator=g) < 0.2,
        task=torch.zeros(rows, dtype=torch.long),
        has_rewards=torch.ones(rows, dtype=torch.bool),
        is_relevant=torch.arange(rows) < num_relevant,
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learns(agent: Agent) -> dict[str, bool]:
    """By part: whether anything in it has a gradient that is not zero. Frozen means no gradient at all."""
    found = {}
    for part in PARTS:
        grads = [p.grad for p in getattr(agent, part).parameters()]
        found[part] = any(g is not None and bool(g.any()) for g in grads)
        assert found[part] or all(g is None for g in grads)
    return found


def imagination(**changes: object) -> ImaginationConfig:
    rollout = RolloutConfig(horizon=3, context=2, sampler=SamplerConfig(num_steps=2))
    return ImaginationConfig(**{"rollout": rollout, **changes})


def test_phase_1_trains_the_dynamics_alone(agent: Agent) -> None:
    loss, metrics = Phase1(agent, ShortcutForcingConfig())(batch(), 0, generator())
    loss.backward()
    assert learns(agent) == {"dynamics": True, "policy": False, "reward": False, "continue_": False, "value": False}
    assert set(metrics) == {"flow_loss", "bootstrap_loss"}


def test_phase_2_trains_all_but_the_value(agent: Agent) -> None:
    loss, _ = Phase2(agent, ShortcutForcingConfig(), AgentLossConfig())(batch(num_relevant=4), 0, generator())
    loss.backward()
    assert learns(agent) == {"dynamics": True, "policy": True, "reward": True, "continue_": True, "value": False}


def test_phase_3_trains_policy_and_value_alone(agent: Agent) -> None:
    tokenizer = tiny_tokenizer()  # not frozen: nothing but the rollout may keep the gradient away from it
    pictures = torch.randint(0, 256, (8, 5, 3, 8, 8), dtype=torch.uint8, generator=generator())
    latents = tokenizer.encode(pictures).flatten(2)[..., :8].unflatten(2, (2, 4))
    assert latents.requires_grad
    phase = Phase3(agent, imagination())
    loss, _ = phase(dataclasses.replace(batch(), latents=latents), 0, generator())
    loss.backward()
    tokenizer_grads = [p.grad for p in tokenizer.parameters()]
    assert all(g is None for g in tokenizer_grads)
    assert all(p.grad is None for p in agent.dynamics.parameters())
    assert all(p.grad is None for p in agent.reward.parameters())
    assert all(p.grad is None for p in agent.continue_.parameters())
    assert all(p.grad is None for p in phase.prior.parameters())
    assert all(p.grad is not None for p in agent.policy.parameters())
    assert all(p.grad is not None and p.grad.any() for p in agent.value.parameters())
    assert any(p.grad.any() for p in agent.policy.parameters() if p.grad is not None)


def test_phase_3_value_only_steps_leave_the_policy_as_it_is(agent: Agent) -> None:
    phase = Phase3(agent, imagination(value_only_steps=2))
    loss, _ = phase(batch(), 0, generator())
    loss.backward()
    assert not any(p.grad.any() for p in agent.policy.parameters() if p.grad is not None)
    assert all(p.grad is not None and p.grad.any() for p in agent.value.parameters())


def test_freezing_holds_when_the_phase_is_put_in_training_mode(agent: Agent) -> None:
    freeze_world_model(agent)
    assert all(p.requires_grad for p in agent.policy.parameters())
    phase = Phase3(agent, imagination()).train()
    assert not agent.dynamics.training and not agent.reward.training and not phase.prior.training
    assert agent.policy.training and agent.value.training
    assert not any(p.requires_grad for p in agent.dynamics.parameters())


def test_the_prior_stays_what_the_policy_was(agent: Agent) -> None:
    phase = Phase3(agent, imagination())
    before = [p.detach().clone() for p in agent.policy.parameters()]
    with torch.no_grad():
        for p in agent.policy.parameters():
            p.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, phase.prior.parameters(), strict=True))


def test_nothing_is_learned_after_an_end_that_was_recorded(agent: Agent) -> None:
    """A context may end on an episode's last frame: what is dreamed behind it has no weight."""
    phase, context = Phase3(agent, imagination()), imagination().rollout.context
    phase.normalizer.eval()  # else each look at the loss moves its scale
    made = batch()
    terminals = torch.zeros_like(made.terminals)
    going = phase.rollout(dataclasses.replace(made, terminals=terminals), generator())
    ended = torch.arange(len(terminals)) < 3
    terminals[:, context - 1] = ended
    mixed = phase.rollout(dataclasses.replace(made, terminals=terminals), generator())
    assert torch.equal(mixed.has_ended, ended) and torch.equal(mixed.features, going.features)

    def with_rewards(rows: Tensor) -> Tensor:
        return phase.score(dataclasses.replace(mixed, rewards=torch.where(rows[:, None], mixed.rewards + 1, mixed.rewards)))[0]

    loss = phase.score(mixed)[0]
    assert torch.equal(with_rewards(ended), loss)
    assert not torch.allclose(with_rewards(~ended), loss)


def test_value_and_policy_terms_of_phase_3_are_on_one_scale(agent: Agent) -> None:
    """The first loss of a term is its own root mean square: what is left is its sign."""
    phase = Phase3(agent, imagination())
    loss, metrics = phase(batch(), 0, generator())
    assert metrics["value_loss"] > 0 and metrics["policy_loss"] != 0
    torch.testing.assert_close(loss.detach(), 1 + metrics["policy_loss"].sign())


def test_a_rollout_serves_several_updates(agent: Agent) -> None:
    phase, seen = Phase3(agent, imagination(updates_per_rollout=3)), []
    for step in range(5):
        phase(batch(), step, generator(step))
        assert phase.trajectory is not None
        seen.append(phase.trajectory.latents.sum().item())
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4]


def changed(made: Batch, rows: slice) -> Batch:
    latents = made.latents.clone()
    latents[rows] += 3.0
    return dataclasses.replace(made, latents=latents)


def test_the_dynamics_learns_from_uniform_rows_alone(agent: Agent) -> None:
    phase = Phase2(agent, ShortcutForcingConfig(), AgentLossConfig()).eval()
    made = batch(num_relevant=4)

    def dynamics_loss(given: Batch) -> Tensor:
        return phase(given, 0, generator())[1]["dynamics_loss"]

    assert torch.equal(dynamics_loss(made), dynamics_loss(changed(made, slice(0, 4))))
    assert not torch.equal(dynamics_loss(made), dynamics_loss(changed(made, slice(4, 5))))
    all_relevant = dataclasses.replace(made, is_relevant=torch.ones(8, dtype=torch.bool))
    assert not torch.equal(dynamics_loss(all_relevant), dynamics_loss(changed(all_relevant, slice(0, 1))))


def test_behaviour_cloning_learns_from_relevant_rows_alone(agent: Agent) -> None:
    phase = Phase2(agent, ShortcutForcingConfig(), AgentLossConfig()).eval()
    made = batch(num_relevant=4)

    def losses(row: int) -> tuple[float, float]:
        rewards, actions = made.rewards.clone(), made.actions.clone()
        rewards[row] += 1.0
        actions[row, :, :, 0] = (actions[row, :, :, 0] + 1) % 3
        metrics = phase(dataclasses.replace(made, rewards=rewards, actions=actions), 0, generator())[1]
        return float(metrics["policy_loss"]), float(metrics["reward_loss"])

    metrics = phase(made, 0, generator())[1]
    policy, reward = losses(6)
    assert policy == float(metrics["policy_loss"]) and reward != float(metrics["reward_loss"])
    assert losses(1)[0] != float(metrics["policy_loss"])


def test_a_term_without_rows_moves_no_scale_and_is_not_logged(agent: Agent) -> None:
    phase = Phase2(agent, ShortcutForcingConfig(independent_fraction=0.0), AgentLossConfig())
    with_rows = phase(batch(num_relevant=4), 0, generator())[1]
    assert {"dynamics_loss", "policy_loss", "reward_loss", "continue_loss"} <= set(with_rows)
    before, counts = phase.normalizer.mean_square.clone(), phase.normalizer.count.clone()
    loss, metrics = phase(batch(num_relevant=0), 1, generator())
    moved = phase.normalizer.mean_square != before
    assert dict(zip(phase.normalizer.names, moved.tolist(), strict=True)) == {
        "dynamics": True,
        "policy": False,
        "reward": True,
        "continue": True,
    }
    assert (phase.normalizer.count - counts).tolist() == [1, 0, 1, 1]
    assert "policy_loss" not in metrics and torch.isfinite(loss)
    images = Phase2(agent, ShortcutForcingConfig(independent_fraction=1.0), AgentLossConfig())
    metrics = images(batch(num_relevant=4), 0, generator())[1]
    assert images.normalizer.count.tolist() == [1, 0, 0, 0] and "reward_loss" not in metrics and "dynamics_loss" in metrics


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7], [4, 0, 5, 1, 6, 2, 7, 3]])
def test_bootstrap_rows_are_a_fraction_of_the_uniform_rows(agent: Agent, monkeypatch: pytest.MonkeyPatch, order: list[int]) -> None:
    phase = Phase2(agent, ShortcutForcingConfig(bootstrap_fraction=0.5), AgentLossConfig())
    seen: list[tuple[int, Tensor]] = []
    corrupt = phase.loss.corrupt

    def watched(latents: Tensor, *args: object):
        made = corrupt(latents, *args)
        seen.append((made.num_flow, latents))
        return made

    monkeypatch.setattr(phase.loss, "corrupt", watched)
    made = batch(num_relevant=4)
    phase(made[torch.tensor(order)], 0, generator())
    num_flow, latents = seen[0]
    assert num_flow == 6  # 2 of the 4 uniform rows
    uniform = {row.sum().item() for row in made.latents[4:]}
    assert {row.sum().item() for row in latents[6:]} <= uniform


def test_which_episodes_are_relevant() -> None:
    import numpy as np

    returns, ids = np.array([0.0, 5.0, 1.0, 2.0, 9.0, 3.0]), np.array([0, 2, 3, 5])
    known = np.ones(6, bool)
    assert relevant_episodes(returns, known, ids, RelevantConfig(return_quantile=0.5)).tolist() == [3, 5]
    assert relevant_episodes(returns, known, ids, RelevantConfig(return_quantile=0.0)).tolist() == [2, 3, 5]
    sparse = np.array([0.0, 0.0, 0.0, 1.0])
    assert relevant_episodes(sparse, known[:4], np.arange(4), RelevantConfig(return_quantile=0.5)).tolist() == [3]
    assert relevant_episodes(np.zeros(4), known[:4], np.arange(4), RelevantConfig()).tolist() == [0, 1, 2, 3]
    some = np.array([True, False, False, True, False, True])
    assert relevant_episodes(returns, some, ids, RelevantConfig(return_quantile=0.0)).tolist() == [3, 5]
    assert relevant_episodes(np.zeros(4), ~known[:4], np.arange(4), RelevantConfig()).tolist() == [0, 1, 2, 3]


def test_unknown_rewards_teach_nothing(agent: Agent) -> None:
    """Rewards and ends of episodes without any do not reach the loss; those of the others do."""

    def losses(change_row: int) -> dict[str, float]:
        made = batch(num_relevant=4)
        rows = torch.arange(8)
        made = dataclasses.replace(made, has_rewards=rows < 6)
        changed = rows[:, None] == change_row
        made = dataclasses.replace(
            made,
            rewards=torch.where(changed, 1 - made.rewards, made.rewards),
            terminals=torch.where(changed, ~made.terminals, made.terminals),
        )
        phase = Phase2(agent, ShortcutForcingConfig(independent_fraction=0.0), AgentLossConfig()).eval()
        return {name: float(value) for name, value in phase(made, 0, generator())[1].items() if name in ("reward_loss", "continue_loss")}

    plain = losses(-1)
    assert losses(7) == plain
    known = losses(1)
    assert known["reward_loss"] != plain["reward_loss"] and known["continue_loss"] != plain["continue_loss"]


# Phase 0


def tiny_tokenizer(max_masking: float = 0.5) -> CausalTokenizer:
    small = TransformerConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=2, time_every=0)
    sizes = {"patch_size": 4, "token_grid": (2, 2), "latent_channels": 3}
    return CausalTokenizer(CausalTokenizerConfig(**sizes, encoder=small, decoder=small, max_masking=max_masking), (3, 8, 8))


def frames(count: int = 6) -> Tensor:
    return torch.randint(0, 256, (count, 1, 3, 8, 8), generator=generator(1), dtype=torch.uint8)


def test_masking_ramps_up() -> None:
    config = Phase0Config.model_validate({"masking_ramp": 0.5, "train": {"steps": 20}})
    phase = Phase0(tiny_tokenizer(), config, lambda: [])
    assert [phase.masking(step) for step in (0, 5, 10, 19)] == pytest.approx([0.0, 0.25, 0.5, 0.5])
    at_once = Phase0(tiny_tokenizer(), config.model_copy(update={"masking_ramp": 0.0}), lambda: [])
    assert at_once.masking(0) == 0.5


def test_phase_0_trains_every_weight_and_exports_normalised_latents() -> None:
    phase = Phase0(tiny_tokenizer(), Phase0Config(), lambda: [frames(8), frames(4)])
    loss, metrics = phase(FrameBatch(frames()), 500, generator())
    loss.backward()
    assert all(p.grad is not None for p in phase.model.parameters()) and set(metrics) == {"mse"}
    assert phase.model.encode(frames()).flatten(0, 2).mean(0).abs().max() > 1e-3
    phase.before_export()
    values = phase.model.encode(torch.cat([frames(8), frames(4)])).flatten(0, 2)
    torch.testing.assert_close(values.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(0), torch.ones(3), atol=1e-3, rtol=0)


def test_the_perceptual_distance_joins_the_loss() -> None:
    plain = Phase0(tiny_tokenizer(), Phase0Config(), lambda: [])
    both = Phase0(plain.model, Phase0Config(perceptual_weight=0.5), lambda: [], lambda prediction, target: torch.ones(len(prediction)))
    first, _ = plain(FrameBatch(frames()), 0, generator())
    second, metrics = both(FrameBatch(frames()), 0, generator())
    assert (second - first).item() == pytest.approx(0.5) and float(metrics["lpips"]) == 1.0


def test_a_perceptual_distance_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(ValueError, match=r"dreamer4\[metrics\].*phase0\.perceptual=none"):
        make_perceptual(Phase0Config(perceptual="lpips"), torch.device("cpu"))
    assert make_perceptual(Phase0Config(), torch.device("cpu")) is None
