"""The denoising loop against a plain one without a cache, and what a dream depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dreamer.imagination import Sampler, SamplerConfig
from dreamer.models import Agent, Dynamics, DynamicsOutput
from dreamer.types import Batch

K_MAX = 8
FINEST = 3
CONTEXT_IDX = 7  # 0.9 of 8, to the nearest

MakeAgent = Callable[..., Agent]
MakeBatch = Callable[..., Batch]
MakeGenerator = Callable[[int], torch.Generator]


def reference(dynamics: Dynamics, batch: Batch, context: int, num_steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The imagined latents and the agent token's outputs of every step, by full forward passes over all of the past."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def forward(noisy: list[Tensor], signal: list[int], steps: list[int], task: Tensor | None) -> DynamicsOutput:
        z, length, rows = torch.stack(noisy, dim=1), len(noisy), len(noisy[0])
        signal_idx, step_idx = (torch.tensor(x).expand(rows, length) for x in (signal, steps))
        return dynamics(z, signal_idx, step_idx, batch.prev_actions[:, :length], batch.prev_action_mask[:, :length], task)

    def show(clean: Tensor, noise: Tensor) -> Tensor:
        return (1 - CONTEXT_IDX / K_MAX) * noise + CONTEXT_IDX / K_MAX * clean

    latents = batch.latents[:, :context]
    past = list(show(latents, randn(*latents.shape)).unbind(1))
    imagined = []
    for _ in range(context, batch.prev_actions.shape[1]):
        z = randn(len(latents), 1, *latents.shape[2:])[:, 0]
        for k in range(num_steps):
            signal = [CONTEXT_IDX] * len(past) + [k * K_MAX // num_steps]
            steps = [FINEST] * len(past) + [int(math.log2(num_steps))]
            prediction = forward([*past, z], signal, steps, None).latents[:, -1]
            z = z + (prediction - z) / (1 - k / num_steps) / num_steps
        imagined.append(z)
        past.append(show(z, randn(len(latents), 1, *latents.shape[2:])[:, 0]))
    features = forward(past, [CONTEXT_IDX] * len(past), [FINEST] * len(past), batch.task).features
    assert features is not None
    return torch.stack(imagined, dim=1), features


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("num_steps", [1, 4, 8])
@pytest.mark.parametrize("context_length", [4, 32])  # shorter and longer than the dream
@torch.no_grad()
def test_the_cached_sampler_equals_full_forward_passes(
    slots: int, num_steps: int, context_length: int, make_agent: MakeAgent, make_batch: MakeBatch, make_generator: MakeGenerator
) -> None:
    dynamics = make_agent(slots, context_length).dynamics
    batch, context = make_batch(2, 10, slots), 3
    latents, features = reference(dynamics, batch, context, num_steps, make_generator(7))
    sampler = Sampler(dynamics, SamplerConfig(num_steps=num_steps))
    generated = sampler.generate(
        batch.latents[:, :context], batch.prev_actions, batch.prev_action_mask, task=batch.task, generator=make_generator(7)
    )
    torch.testing.assert_close(generated, latents, rtol=1e-4, atol=1e-4)
    state = sampler.start(2, task=batch.task, generator=make_generator(7))
    outputs = [sampler.observe(state, batch.latents[:, :context], batch.prev_actions[:, :context], batch.prev_action_mask[:, :context])]
    for t in range(context, 10):
        outputs.append(sampler.imagine(state, batch.prev_actions[:, t], batch.prev_action_mask[:, t])[1].unsqueeze(1))
    torch.testing.assert_close(torch.cat(outputs, dim=1), features, rtol=1e-4, atol=1e-4)


Call = dict[str, Any]


def record(dynamics: Dynamics) -> list[Call]:
    names = ("noisy", "signal_idx", "step_idx", "prev_actions", "prev_action_mask", "task")
    calls: list[Call] = []

    def keep(_module: object, args: tuple, kwargs: dict) -> None:
        calls.append(dict(zip(names, args, strict=False)) | kwargs)

    dynamics.register_forward_pre_hook(keep, with_kwargs=True)
    return calls


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_a_step_is_denoised_at_0_to_1_in_k_steps_and_then_committed(num_steps: int, make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    dynamics, batch = make_agent().dynamics, make_batch()
    calls = record(dynamics)
    sampler = Sampler(dynamics, SamplerConfig(num_steps=num_steps))
    state = sampler.start(2)
    latents, _ = sampler.imagine(state, batch.prev_actions[:, 1])
    assert [c["signal_idx"].unique().tolist() for c in calls] == [[k * K_MAX // num_steps] for k in range(num_steps)] + [[CONTEXT_IDX]]
    assert [c["step_idx"].unique().tolist() for c in calls] == [[int(math.log2(num_steps))]] * num_steps + [[FINEST]]
    assert [bool(c.get("write")) for c in calls] == [False] * num_steps + [True]
    assert all(torch.equal(c["prev_actions"][:, 0], batch.prev_actions[:, 1]) for c in calls)
    assert all(c["prev_action_mask"].all() for c in calls)
    committed = calls[-1]["noisy"][:, 0] - CONTEXT_IDX / K_MAX * latents
    assert committed.std().item() == pytest.approx(1 - CONTEXT_IDX / K_MAX, rel=0.5)


def test_the_context_is_shown_at_nine_tenths_of_signal_not_of_noise(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    dynamics, batch = make_agent(max_steps=64).dynamics, make_batch()
    calls = record(dynamics)
    sampler = Sampler(dynamics, SamplerConfig())
    sampler.observe(sampler.start(2), torch.full_like(batch.latents, 1000.0), batch.prev_actions, batch.prev_action_mask)
    assert calls[0]["signal_idx"].unique().tolist() == [58]
    assert (calls[0]["noisy"] - 1000 * 58 / 64).abs().max() < 1  # and not 1000 * 6 / 64


def test_a_model_that_knows_the_answer_dreams_it(make_agent: MakeAgent, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    dynamics, batch = make_agent().dynamics, make_batch()
    answer = torch.randn(2, 1, 4, 3)
    forward = dynamics.forward
    monkeypatch.setattr(dynamics, "forward", lambda *a, **k: DynamicsOutput(answer, forward(*a, **k).features))
    for num_steps in (1, 2, 8):
        sampler = Sampler(dynamics, SamplerConfig(num_steps=num_steps))
        latents, _ = sampler.imagine(sampler.start(2), batch.prev_actions[:, 1])
        torch.testing.assert_close(latents, answer[:, 0], rtol=1e-5, atol=1e-5)


@pytest.fixture
def dream(make_agent: MakeAgent, make_generator: MakeGenerator) -> Callable[..., Tensor]:
    sampler = Sampler(make_agent().dynamics, SamplerConfig(num_steps=2))

    def run(batch: Batch, seed: int = 0, context: int = 3, task: Tensor | None = None) -> Tensor:
        return sampler.generate(
            batch.latents[:, :context], batch.prev_actions, batch.prev_action_mask, task=task, generator=make_generator(seed)
        )

    return run


def test_a_dream_depends_on_its_seed_alone_for_its_noise(dream: Callable[..., Tensor], make_batch: MakeBatch) -> None:
    batch = make_batch(2, 8)
    first = dream(batch, seed=1)
    assert first.shape == (2, 5, 4, 3)
    torch.manual_seed(77)
    assert torch.equal(first, dream(batch, seed=1))
    assert not torch.equal(first, dream(batch, seed=2))


@pytest.mark.parametrize("step", [0, 2])
def test_a_dream_depends_on_its_context(step: int, dream: Callable[..., Tensor], make_batch: MakeBatch) -> None:
    batch = make_batch(2, 8)
    before = dream(batch)
    batch.latents[0, step] += 1.0
    after = dream(batch)
    assert all(not torch.equal(before[0, t], after[0, t]) for t in range(5))
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("step", range(1, 8))
@pytest.mark.parametrize("column", [0, 1])
def test_a_dream_depends_on_each_action_from_its_step_on(
    step: int, column: int, dream: Callable[..., Tensor], make_batch: MakeBatch
) -> None:
    batch = make_batch(1, 8)
    batch.prev_actions.zero_()
    before = dream(batch)
    batch.prev_actions[:, step, 0, column] = 1.0
    after = dream(batch)
    assert [torch.equal(before[:, t], after[:, t]) for t in range(5)] == [t + 3 < step for t in range(5)]


def test_a_dream_does_not_read_unknown_actions_but_knows_that_they_are_unknown(dream: Callable[..., Tensor], make_batch: MakeBatch) -> None:
    batch = make_batch(1, 8)
    known = dream(batch)
    batch.prev_action_mask[:, 5] = False
    unknown = dream(batch)
    assert not torch.equal(known[:, 2:], unknown[:, 2:])
    batch.prev_actions[:, 5] = float("nan")
    assert torch.equal(unknown, dream(batch))


def test_the_task_changes_the_features_but_not_the_dream(dream: Callable[..., Tensor], make_batch: MakeBatch) -> None:
    batch = make_batch(2, 8)
    assert torch.equal(dream(batch, task=torch.tensor([0, 0])), dream(batch, task=torch.tensor([0, 1])))


@pytest.mark.parametrize("pieces", [[1] * 10, [4, 1, 5], [10]])
def test_observing_in_pieces_equals_observing_at_once(
    pieces: list[int], make_agent: MakeAgent, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same noise, whatever the pieces, and also beyond the context length."""
    sampler, batch = Sampler(make_agent(context_length=4).dynamics, SamplerConfig()), make_batch(2, 10)
    noise = torch.randn(2, 11, 4, 3)

    def run(sizes: list[int]) -> tuple[Tensor, Tensor]:
        queue = list(noise.split([*sizes, 1], dim=1))
        queue.append(queue[-1])
        monkeypatch.setattr(Sampler, "_noise", staticmethod(lambda _like, _state: queue.pop(0)))
        state = sampler.start(2)
        parts = zip(*(x.split(sizes, dim=1) for x in (batch.latents, batch.prev_actions, batch.prev_action_mask)), strict=True)
        features = torch.cat([sampler.observe(state, *part) for part in parts], dim=1)
        return features, sampler.imagine(state, batch.actions[:, -1])[0]

    torch.testing.assert_close(run(pieces), run([10]), rtol=1e-4, atol=1e-4)


def test_dreams_carry_no_gradient(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    sampler, batch = Sampler(make_agent().dynamics, SamplerConfig(num_steps=1)), make_batch()
    state = sampler.start(2)
    features = sampler.observe(state, batch.latents.requires_grad_(), batch.prev_actions, batch.prev_action_mask)
    latents, next_features = sampler.imagine(state, batch.actions[:, -1])
    assert not any(x.requires_grad for x in (features, latents, next_features, *state.cache.keys, *state.cache.values))


def test_what_a_dream_gives_can_be_learned_on(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    """Phase 3 does; tensors of inference mode would refuse."""
    sampler, batch = Sampler(make_agent().dynamics, SamplerConfig(num_steps=1)), make_batch()
    state = sampler.start(2)
    features = sampler.observe(state, batch.latents, batch.prev_actions, batch.prev_action_mask)
    for tensor in (features, *sampler.imagine(state, batch.actions[:, -1])):
        weight = torch.ones(tensor.shape[-1], requires_grad=True)
        (tensor * weight).square().sum().backward()
        assert not tensor.is_inference() and weight.grad is not None


def test_a_dream_can_start_from_nothing(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    sampler = Sampler(make_agent().dynamics, SamplerConfig(num_steps=2))
    batch = make_batch()
    latents, features = sampler.imagine(sampler.start(2), batch.prev_actions[:, 0], batch.prev_action_mask[:, 0])
    assert latents.shape == (2, 4, 3)
    assert features.shape == (2, 16)
    assert torch.isfinite(latents).all()


def test_bad_settings_and_lengths_are_refused(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    dynamics, batch = make_agent().dynamics, make_batch()
    with pytest.raises(ValidationError, match="num_steps is 3"):
        SamplerConfig(num_steps=3)
    with pytest.raises(ValidationError):
        SamplerConfig(context_signal=1.0)
    with pytest.raises(ValueError, match="16.*at most 8"):
        Sampler(dynamics, SamplerConfig(num_steps=16))
    with pytest.raises(ValueError, match="holds 6 steps.*more than the 6"):
        Sampler(dynamics, SamplerConfig()).generate(batch.latents, batch.prev_actions, batch.prev_action_mask)


def test_bfloat16_autocast_dreams_in_float32(make_agent: MakeAgent, make_batch: MakeBatch, make_generator: MakeGenerator) -> None:
    sampler, batch = Sampler(make_agent(8).dynamics, SamplerConfig(num_steps=2)), make_batch(2, 6, 8)

    def run() -> Tensor:
        return sampler.generate(batch.latents[:, :4], batch.prev_actions, batch.prev_action_mask, generator=make_generator(1))

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        out = run()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.15, atol=0.15)


class Work(TorchDispatchMode):
    """Counts operations, and the bytes that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        self.made += sum(x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


def test_every_step_of_a_long_dream_costs_the_same(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    context = 6
    sampler, batch = Sampler(make_agent(context_length=context).dynamics, SamplerConfig(num_steps=2)), make_batch()
    state = sampler.start(2)
    memory = [(ring.data_ptr(), ring.untyped_storage().nbytes()) for ring in (*state.cache.keys, *state.cache.values)]
    costs = []
    for _ in range(4 * context):
        with FlopCounterMode(display=False) as counter, Work() as work:
            sampler.imagine(state, batch.prev_actions[:, 1])
        costs.append((counter.get_total_flops(), work.operations, work.made))
    flops = [flops for flops, _, _ in costs]
    assert len(set(flops)) == 1
    assert len(set(costs[context - 1 :])) == 1  # before, a mask hides the slots that are still empty
    assert memory == [(ring.data_ptr(), ring.untyped_storage().nbytes()) for ring in (*state.cache.keys, *state.cache.values)]


def test_each_pass_works_on_one_step_alone(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    """What came before is read as keys and values: computed once a step, and used again in every pass."""
    dynamics, batch = make_agent().dynamics, make_batch(2, 8)
    calls = record(dynamics)
    Sampler(dynamics, SamplerConfig(num_steps=4)).generate(batch.latents[:, :5], batch.prev_actions, batch.prev_action_mask)
    assert [call["noisy"].shape[1] for call in calls] == [5] + 3 * (4 + 1) * [1]


@pytest.mark.gpu
def test_on_a_gpu_dreams_follow_their_own_generator(make_agent: MakeAgent, make_batch: MakeBatch) -> None:
    sampler, batch = Sampler(make_agent().dynamics.cuda(), SamplerConfig()), make_batch(2, 8).to("cuda")

    def run(seed: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return sampler.generate(batch.latents[:, :4], batch.prev_actions, batch.prev_action_mask, generator=generator)

    torch.testing.assert_close(run(1), run(1))
    assert not torch.allclose(run(1), run(2))
