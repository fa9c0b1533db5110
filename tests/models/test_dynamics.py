"""The dynamics: what its prediction depends on, and what it must not depend on (bit for bit)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dreamer.losses import ShortcutForcingConfig, ShortcutForcingLoss
from dreamer.models import Dynamics, DynamicsConfig, DynamicsOutput, TransformerConfig
from dreamer.models.dynamics import ActionEmbedding
from dreamer.types import ActionComponent, ActionSpace

SPACE = ActionSpace(
    (
        ActionComponent("move", "categorical", 5),
        ActionComponent("hotbar.1", "binary", 2),
        ActionComponent("keys", "continuous", 1, low=0.0, high=10.0),
    )
)
TRANSFORMER = TransformerConfig(width=16, num_layers=4, num_heads=2, num_kv_heads=1, time_every=2, context_length=8)
K, T = 8, 5


def make(actions_per_step: int = 1, **changes) -> Dynamics:
    config = DynamicsConfig(**{"transformer": TRANSFORMER, "num_registers": 2, "max_steps": K, "num_tasks": 3} | changes)
    return Dynamics(config, action_space=SPACE, token_grid=(2, 2), latent_channels=3, actions_per_step=actions_per_step).eval()


@dataclasses.dataclass(frozen=True)
class Inputs:
    noisy: Tensor
    signal_idx: Tensor
    step_idx: Tensor
    prev_actions: Tensor
    prev_action_mask: Tensor
    task: Tensor | None = None

    def change(self, name: str, where, value) -> Inputs:
        tensor = getattr(self, name).clone()
        tensor[where] = value
        return dataclasses.replace(self, **{name: tensor})

    def run(self, model: Dynamics, **rest) -> DynamicsOutput:
        return model(*(getattr(self, f.name) for f in dataclasses.fields(self)), **rest)


def draw(batch: int = 2, slots: int = 1, task: bool = False) -> Inputs:
    actions = torch.cat(
        [
            torch.randint(0, 5, (batch, T, slots, 1)).float(),
            torch.randint(0, 2, (batch, T, slots, 2)).float(),
            10 * torch.rand(batch, T, slots, 1),
        ],
        dim=-1,
    )
    return Inputs(
        torch.randn(batch, T, 4, 3),
        torch.randint(0, K, (batch, T)),
        torch.randint(0, 4, (batch, T)),
        actions,
        torch.ones(batch, T, slots, dtype=torch.bool),
        torch.zeros(batch, dtype=torch.long) if task else None,
    )


def steps_equal(a: Tensor, b: Tensor) -> list[bool]:
    return [torch.equal(a[:, t], b[:, t]) for t in range(a.shape[1])]


FROM_2_ON = [True, True, False, False, False]


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        ("noisy", (slice(None), 2), 9.0),
        ("noisy", (0, 2, 3, 1), 9.0),
        ("prev_actions", (slice(None), 2, 0, 0), 4.0),
        ("prev_actions", (slice(None), 2, 0, 1), 0.5),
        ("prev_actions", (slice(None), 2, 0, 3), 3.21),
        ("prev_action_mask", (slice(None), 2), False),
        ("signal_idx", (slice(None), 2), 7),
        ("step_idx", (slice(None), 2), 3),
    ],
)
def test_every_input_of_a_step_reaches_that_step_and_the_later_ones_alone(name: str, where, value) -> None:
    model = make()
    inputs = draw()
    inputs = inputs.change("signal_idx", slice(None), 1).change("step_idx", slice(None), 1).change("prev_actions", (..., 0), 0.0)
    out, other = inputs.run(model).latents, inputs.change(name, where, value).run(model).latents
    assert steps_equal(out[:1], other[:1]) == FROM_2_ON


@pytest.mark.parametrize("junk", [3.0, -1.0, 1e6, float("nan")])
def test_an_action_that_is_not_known_is_not_read(junk: float) -> None:
    model = make()
    inputs = draw().change("prev_action_mask", (slice(None), 2), False)
    assert torch.equal(inputs.run(model).latents, inputs.change("prev_actions", (slice(None), 2), junk).run(model).latents)


def test_a_missing_action_is_not_an_action_of_zeros() -> None:
    model, inputs = make(), draw().change("prev_actions", slice(None), 0.0)
    unknown = inputs.change("prev_action_mask", slice(None), False)
    assert not torch.allclose(inputs.run(model).latents, unknown.run(model).latents)


def test_rows_of_a_batch_do_not_mix() -> None:
    model, inputs = make(), draw(batch=3)
    out = inputs.run(model).latents
    other = inputs.change("noisy", 1, 9.0).change("prev_actions", (1, ..., 0), 4.0).run(model).latents
    assert torch.equal(out[[0, 2]], other[[0, 2]])


def test_the_task_reaches_the_features_and_never_the_latents() -> None:
    model, inputs = make(), draw(task=True)
    out, other = inputs.run(model), inputs.change("task", 0, 2).run(model)
    assert torch.equal(out.latents, other.latents)
    assert out.features is not None
    assert other.features is not None
    assert not torch.equal(out.features[0], other.features[0])
    assert torch.equal(out.features[1], other.features[1])


def test_the_agent_token_reaches_the_features_and_never_the_latents() -> None:
    model, inputs = make(), draw(task=True)
    out = inputs.run(model)
    with torch.no_grad():
        model.agent_token.add_(1.0)
    other = inputs.run(model)
    assert torch.equal(out.latents, other.latents)
    assert out.features is not None
    assert other.features is not None
    assert not torch.equal(out.features, other.features)
    without = dataclasses.replace(inputs, task=None).run(model)
    assert without.features is None
    torch.testing.assert_close(without.latents, out.latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("noisy", 9.0), ("prev_actions", 1.0), ("prev_action_mask", False), ("signal_idx", 7), ("step_idx", 3)]
)
def test_the_features_depend_on_every_input_up_to_their_step(name: str, value) -> None:
    model, inputs = make(), draw(task=True).change("signal_idx", slice(None), 1).change("step_idx", slice(None), 1)
    inputs = inputs.change("prev_actions", slice(None), 0.0)
    out, other = inputs.run(model).features, inputs.change(name, (slice(None), 2), value).run(model).features
    assert out is not None
    assert other is not None
    assert steps_equal(out, other) == FROM_2_ON


def test_features_and_latents_have_their_shapes() -> None:
    model = make()
    out = draw(task=True).run(model)
    assert out.latents.shape == (2, T, 4, 3)
    assert out.features is not None
    assert out.features.shape == (2, T, 16)
    assert model.num_tokens == 2 + 4 + 2 + 1


def test_predictions_are_not_bounded() -> None:
    """The latents are normalised, not in (-1, 1): a tanh would cut them."""
    model = make()
    with torch.no_grad():
        model.latent_out.bias.fill_(50.0)
    assert draw().run(model).latents.min() > 20


def test_the_prediction_is_the_clean_latents_and_not_a_velocity() -> None:
    """Trained for moments on one image, the model answers with that image at every signal level."""
    model = make(num_registers=0).train()
    clean = torch.linspace(-2, 2, 12).reshape(1, 1, 4, 3).expand(8, T, 4, 3)
    loss = ShortcutForcingLoss(ShortcutForcingConfig(bootstrap_fraction=0.25), K)
    inputs = draw(batch=8)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        corrupted = loss.corrupt(clean)

        def denoise(noisy: Tensor, signal_idx: Tensor, step_idx: Tensor, cut: int = corrupted.num_flow) -> Tensor:
            return model(noisy, signal_idx, step_idx, inputs.prev_actions[cut:], inputs.prev_action_mask[cut:]).latents

        prediction = model(corrupted.noisy, corrupted.signal_idx, corrupted.step_idx, inputs.prev_actions, inputs.prev_action_mask).latents
        optimiser.zero_grad()
        loss(prediction, corrupted, denoise)[0].backward()
        optimiser.step()
    model.eval()
    for signal_idx in (0, K // 2, K - 1):
        noise = torch.randn(8, T, 4, 3)
        tau = signal_idx / K
        noisy = (1 - tau) * noise + tau * clean
        answer = dataclasses.replace(
            inputs, noisy=noisy, signal_idx=torch.full((8, T), signal_idx), step_idx=torch.full((8, T), int(math.log2(K)))
        )
        prediction = answer.run(model).latents
        assert (prediction - clean).square().mean() < 0.1  # the velocity clean - noise is 1 away, the noise itself 1 + 1.6
        assert (prediction - (clean - noise)).square().mean() > 0.5


def test_the_action_token_is_the_base_plus_the_sum_of_its_components() -> None:
    embedding = ActionEmbedding(SPACE, 16, 1)
    row = torch.tensor([3.0, 1.0, 0.0, 7.5]).reshape(1, 1, 1, 4)

    move, keys, turn = (layer.weight for layer in embedding.components)
    expected = embedding.base + move[3] + keys[:, 0] + 0.5 * turn[:, 0]  # 7.5 of [0, 10] is 0.5 of [-1, 1]
    torch.testing.assert_close(embedding(row, torch.ones(1, 1, 1, dtype=torch.bool))[0, 0], expected)


@pytest.mark.parametrize("slots", [1, 8])
def test_video_without_labels_uses_the_learned_base_alone(slots: int) -> None:
    embedding = ActionEmbedding(SPACE, 16, slots)
    out = embedding(draw(slots=slots).prev_actions, torch.zeros(2, T, slots, dtype=torch.bool))
    assert torch.equal(out, embedding.base.expand(2, T, 16))
    out.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for n, p in embedding.named_parameters() if n != "base")


def test_a_chunk_depends_on_each_of_its_eight_actions_in_order() -> None:
    model, inputs = make(actions_per_step=8), draw(slots=8).change("prev_actions", (..., 0), 0.0)
    out = inputs.run(model).latents
    for slot in range(8):
        other = inputs.change("prev_actions", (slice(None), 2, slot, 0), 4.0).run(model).latents
        assert steps_equal(out, other) == FROM_2_ON
    first = inputs.change("prev_actions", (slice(None), 2, 0, 0), 4.0).run(model).latents
    last = inputs.change("prev_actions", (slice(None), 2, 7, 0), 4.0).run(model).latents
    assert not torch.allclose(first[:, 2], last[:, 2])  # when an action was taken matters


def test_a_partly_known_chunk() -> None:
    model = make(actions_per_step=8)
    inputs = draw(slots=8).change("prev_action_mask", (slice(None), 2, slice(5, 8)), False)
    out = inputs.run(model).latents
    for junk in (4.0, float("nan")):  # slots that are not known are not read
        assert torch.equal(out, inputs.change("prev_actions", (slice(None), 2, 6), junk).run(model).latents)
    for slot in (0, 4):  # the others are
        assert not torch.equal(out[:, 2], inputs.change("prev_actions", (slice(None), 2, slot, 3), 33.0).run(model).latents[:, 2])
    # which slots are known matters
    assert not torch.equal(out[:, 2], inputs.change("prev_action_mask", (slice(None), 2, 4), False).run(model).latents[:, 2])


def test_rows_without_history_are_separate_images_without_actions() -> None:
    model, inputs = make(), draw()
    alone = torch.tensor([True, False])
    out = inputs.run(model, no_history=alone).latents
    other = inputs.change("noisy", (slice(None), 2), 9.0).run(model, no_history=alone).latents
    assert steps_equal(out[:1], other[:1]) == [True, True, False, True, True]
    assert steps_equal(out[1:], other[1:]) == FROM_2_ON
    other = inputs.change("prev_actions", slice(None), 1.0).run(model, no_history=alone).latents
    assert torch.equal(out[0], other[0])
    assert not torch.equal(out[1], other[1])


@pytest.mark.parametrize("slots", [1, 8])
def test_gradients_reach_every_parameter(slots: int) -> None:
    model = make(actions_per_step=slots).train()
    inputs = draw(batch=4, slots=slots, task=True).change("prev_action_mask", (slice(None), 0), False)
    out = inputs.change("prev_action_mask", (0, 1, slice(0, 1)), False).run(model)
    assert out.features is not None
    (out.latents.square().sum() + out.features.sin().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_the_latents_alone_do_not_train_the_agent_token() -> None:
    model = make().train()
    draw(task=True).run(model).latents.sum().backward()
    assert (model.agent_token.grad == 0).all()
    assert (model.task_embedding.weight.grad == 0).all()


@pytest.mark.parametrize("wrong", ["tokens", "channels", "slots", "columns"])
def test_wrong_shapes_are_refused_and_not_broadcast(wrong: str) -> None:
    inputs = draw()
    if wrong == "tokens":
        inputs = dataclasses.replace(inputs, noisy=torch.randn(2, T, 1, 3))
    elif wrong == "channels":
        inputs = dataclasses.replace(inputs, noisy=torch.randn(2, T, 4, 1))
    elif wrong == "slots":
        inputs = dataclasses.replace(inputs, prev_actions=torch.zeros(2, T, 2, 4), prev_action_mask=torch.ones(2, T, 2, dtype=torch.bool))
    else:
        inputs = dataclasses.replace(inputs, prev_actions=torch.zeros(2, T, 1, 3))
    with pytest.raises(ValueError, match="expected"):
        inputs.run(make())


def test_max_steps_must_be_a_power_of_two() -> None:
    with pytest.raises(ValidationError, match="48"):
        DynamicsConfig(max_steps=48)


def test_bfloat16_autocast_gives_float32_outputs_close_to_full_precision() -> None:
    model, inputs = make(actions_per_step=8), draw(slots=8, task=True)
    expected = inputs.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = inputs.run(model)
        (out.latents.square().mean()).backward()
    assert out.features is not None
    assert expected.features is not None
    assert (out.latents.dtype, out.features.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(out.latents, expected.latents, rtol=0.1, atol=0.1)
    torch.testing.assert_close(out.features, expected.features, rtol=0.1, atol=0.15)


@pytest.mark.gpu
def test_on_a_gpu_the_prediction_is_the_same() -> None:
    model, inputs = make(), draw(task=True)
    expected = inputs.run(model).latents
    moved = Inputs(**{f.name: getattr(inputs, f.name).cuda() for f in dataclasses.fields(inputs)})
    torch.testing.assert_close(moved.run(model.cuda()).latents.cpu(), expected, rtol=1e-2, atol=1e-2)
