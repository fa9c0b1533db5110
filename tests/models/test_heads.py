"""Action distributions against torch.distributions, and the heads on the agent token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as td
from torch.nn import functional as F

from dreamer.models import ActionDistribution, ContinueHead, HeadConfig, PolicyHead, ScalarHead
from dreamer.types import ActionComponent, ActionSpace

CATEGORICAL = ActionComponent("move", "categorical", 4)
BINARY = ActionComponent("keys", "binary", 3)
CONTINUOUS = ActionComponent("camera", "continuous", 2, low=-10.0, high=30.0)
SPACES = {
    "categorical": ActionSpace((CATEGORICAL,)),
    "binary": ActionSpace((BINARY,)),
    "continuous": ActionSpace((CONTINUOUS,)),
    "two categoricals": ActionSpace((CATEGORICAL, ActionComponent("look", "categorical", 2))),
    "mixture": ActionSpace((BINARY, CATEGORICAL, CONTINUOUS)),
}


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> ActionSpace:
    return SPACES[request.param]


def distribution(space: ActionSpace, *shape: int, scale: float = 1.0) -> ActionDistribution:
    return ActionDistribution(space, scale * torch.randn(*shape, ActionDistribution.num_parameters(space)))


def reference(d: ActionDistribution) -> list[td.Distribution]:
    """The same, from torch.distributions, a continuous part over the action scaled to [-1, 1]."""
    out: list[td.Distribution] = []
    start = 0
    for component in d.space.components:
        size = component.size * (2 if component.kind == "continuous" else 1)
        p = d.parameters[..., start : start + size]
        start += size
        if component.kind == "categorical":
            out.append(td.Categorical(logits=p))
        elif component.kind == "binary":
            out.append(td.Independent(td.Bernoulli(logits=p), 1))
        else:
            mean, raw = p[..., : component.size], p[..., component.size :]
            out.append(td.Independent(td.Normal(mean, F.softplus(raw) + d.min_std), 1))
    return out


def columns(space: ActionSpace, actions: Tensor) -> list[Tensor]:
    out = []
    for component, where in space.slices():
        values = actions[..., where]
        if component.kind == "continuous":
            values = (values - component.low) / (component.high - component.low) * 2 - 1
        out.append(values[..., 0] if component.kind == "categorical" else values)
    return out


def test_log_prob_agrees_with_torch(space: ActionSpace) -> None:
    d = distribution(space, 5, 3)
    actions = distribution(space, 5, 3).sample()
    expected = sum(r.log_prob(a) for r, a in zip(reference(d), columns(space, actions), strict=True))
    assert d.log_prob(actions).shape == (5, 3)
    torch.testing.assert_close(d.log_prob(actions), expected, rtol=1e-4, atol=1e-4)


def test_entropy_agrees_with_torch(space: ActionSpace) -> None:
    d = distribution(space, 5, 3)
    torch.testing.assert_close(d.entropy(), sum(r.entropy() for r in reference(d)), rtol=1e-4, atol=1e-4)


def test_kl_agrees_with_torch_and_the_first_comes_first(space: ActionSpace) -> None:
    p, q = distribution(space, 5, 3), distribution(space, 5, 3)
    expected = sum(td.kl_divergence(a, b) for a, b in zip(reference(p), reference(q), strict=True))
    torch.testing.assert_close(p.kl(q), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(p.kl(q), q.kl(p), atol=1e-2)  # the direction matters
    torch.testing.assert_close(p.kl(p), torch.zeros(5, 3), rtol=0, atol=1e-6)


def test_kl_is_the_mean_log_ratio_under_the_first() -> None:
    space = ActionSpace((CATEGORICAL,))
    p, q = (ActionDistribution(space, torch.tensor(x).log()) for x in ([0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]))
    expected = 0.7 * math.log(0.7 / 0.25) + 0.3 * math.log(0.1 / 0.25)
    assert p.kl(q).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_extreme_logits_stay_finite(space: ActionSpace, scale: float) -> None:
    d = distribution(space, 20, scale=scale)
    for value in (d.entropy(), d.kl(distribution(space, 20, scale=scale)), d.log_prob(d.sample())):
        assert torch.isfinite(value).all()


def test_sampling_frequencies() -> None:
    space, n = SPACES["mixture"], 20_000
    one = distribution(space)
    one.parameters[7:9] = torch.tensor([0.2, -0.3])  # camera means, well inside
    one.parameters[9:11] = torch.tensor([-3.0, -2.0])
    samples = ActionDistribution(space, one.parameters.expand(n, -1)).sample(torch.Generator().manual_seed(0))
    keys, move, camera = reference(one)
    torch.testing.assert_close(samples[:, :3].mean(0), keys.mean, rtol=0, atol=0.02)
    frequencies = torch.bincount(samples[:, 3].long(), minlength=4) / n
    torch.testing.assert_close(frequencies, move.probs, rtol=0, atol=0.02)  # type: ignore[attr-defined]
    scaled = (samples[:, 4:] + 10) / 20 - 1
    torch.testing.assert_close(scaled.mean(0), camera.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(scaled.std(0), camera.stddev, rtol=0, atol=0.02)
    assert abs(torch.corrcoef(samples[:, :4].T)[0, 3]) < 0.03  # components are independent


def test_sampling_depends_on_the_generator_alone(space: ActionSpace) -> None:
    d = distribution(space, 64)
    first = d.sample(torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    assert torch.equal(first, d.sample(torch.Generator().manual_seed(1)))
    assert not torch.equal(first, d.sample(torch.Generator().manual_seed(2)))


def test_samples_and_modes_lie_in_the_action_space(space: ActionSpace) -> None:
    d = distribution(space, 500, scale=4.0)
    for actions in (d.sample(), d.mode()):
        assert actions.shape == (500, space.num_columns)
        assert actions.dtype == torch.float32
        space.validate(actions.numpy(), "samples")


@given(st.floats(-100, 100, width=32), st.floats(0.015625, 100, width=32), st.integers(0, 1000))
def test_no_rounding_leads_out_of_the_bounds(low: float, span: float, seed: int) -> None:
    space = ActionSpace((ActionComponent("action", "continuous", 3, low, float(np.float32(low + span))),))
    d = ActionDistribution(space, 5 * torch.randn(20, 6, generator=torch.Generator().manual_seed(seed)))
    for actions in (d.sample(), d.mode()):
        space.validate(actions.numpy(), "samples")


def test_mode_is_the_likeliest_action() -> None:
    d = ActionDistribution(SPACES["mixture"], torch.tensor([2.0, -1.0, 0.1, 0.0, 3.0, 1.0, 2.0, 0.5, -3.0, 0.0, 0.0]))
    # camera: mean 0.5 of [-1, 1] is 20 in [-10, 30]; mean -3 is clamped to the lower end
    assert d.mode().tolist() == [1.0, 0.0, 1.0, 1.0, 20.0, -10.0]


@pytest.mark.parametrize("name", ["categorical", "binary", "two categoricals"])
def test_no_action_is_likelier_than_the_mode(name: str) -> None:
    d = distribution(SPACES[name], 50)
    assert (d.log_prob(d.mode()).unsqueeze(0) >= torch.stack([d.log_prob(d.sample()) for _ in range(20)]) - 1e-6).all()


def test_a_deviation_has_a_floor() -> None:
    space = SPACES["continuous"]
    d = ActionDistribution(space, torch.tensor([0.0, 0.0, -50.0, -50.0]), min_std=0.2)
    assert d.entropy().item() == pytest.approx(2 * td.Normal(0.0, 0.2).entropy().item(), rel=1e-4)


def test_half_precision_parameters_are_scored_in_full_precision(space: ActionSpace) -> None:
    d = distribution(space, 8)
    half = ActionDistribution(space, d.parameters.bfloat16())
    for value in (half.log_prob(d.sample()), half.entropy(), half.kl(d)):
        assert value.dtype == torch.float32


CONFIG = HeadConfig(hidden=16, num_distances=3, num_bins=21, bin_range=5.0)


def test_policy_head_has_its_own_output_for_each_distance_and_action_of_a_step() -> None:
    space = SPACES["mixture"]
    head = PolicyHead(space, 12, CONFIG, actions_per_step=2)
    torch.nn.init.normal_(head.mlp.out.weight)
    features = torch.randn(4, 5, 12)
    d = head(features)
    assert d.parameters.shape == (4, 5, 3, 2, ActionDistribution.num_parameters(space))
    assert d.sample().shape == (4, 5, 3, 2, space.num_columns)
    torch.testing.assert_close(head.now(features).parameters, d.parameters[:, :, 0])
    for m in range(3):  # no two distances or slots share their outputs
        for p in range(2):
            others = [d.parameters[:, :, a, b] for a in range(3) for b in range(2) if (a, b) != (m, p)]
            assert not any(torch.allclose(d.parameters[:, :, m, p], x) for x in others)


def test_policy_starts_almost_uniform() -> None:
    head = PolicyHead(SPACES["categorical"], 12, CONFIG)
    probabilities = head.now(torch.randn(50, 12)).parameters.softmax(-1)
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 0.25), rtol=0, atol=0.02)


def test_scalar_head_starts_at_zero_and_reads_distance_zero() -> None:
    head = ScalarHead(12, CONFIG, num_distances=3)
    features = torch.randn(4, 5, 12)
    torch.testing.assert_close(head.mean(features), torch.zeros(4, 5), rtol=0, atol=1e-5)
    assert head(features).shape == (4, 5, 3, 21)
    with torch.no_grad():
        head.mlp.out.bias[20] = 50.0  # distance 0: the last bin, symexp(5)
        head.mlp.out.bias[21] = 50.0  # distance 1: the first bin
    torch.testing.assert_close(head.mean(features), torch.full((4, 5), math.exp(5) - 1), rtol=1e-3, atol=0)


def test_continue_head_is_a_probability_at_distance_zero() -> None:
    head = ContinueHead(12, CONFIG)
    features = torch.randn(4, 5, 12)
    assert head(features).shape == (4, 5, 3)
    with torch.no_grad():
        head.mlp.out.bias.copy_(torch.tensor([math.log(3), -9.0, -9.0]))
    torch.testing.assert_close(head.mean(features), torch.full((4, 5), 0.75))


@pytest.mark.parametrize("kind", ["policy", "scalar", "continue"])
def test_heads_depend_on_their_features(kind: str) -> None:
    heads = {
        "policy": PolicyHead(SPACES["mixture"], 12, CONFIG),
        "scalar": ScalarHead(12, CONFIG, 3),
        "continue": ContinueHead(12, CONFIG),
    }
    head = heads[kind]
    torch.nn.init.normal_(head.mlp.out.weight)
    out = [head(torch.randn(2, 12)) for _ in range(2)]
    a, b = (x.parameters if isinstance(x, ActionDistribution) else x for x in out)
    assert not torch.allclose(a, b)


def test_every_weight_of_a_head_gets_a_gradient() -> None:
    head = PolicyHead(SPACES["mixture"], 12, CONFIG, actions_per_step=2)
    d = head(torch.randn(6, 5, 12))
    (-d.log_prob(d.sample()).mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
