"""Signal grids, noising, and the way between x-prediction and velocity, with numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreamer.ops import flow


def level(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def test_step_sizes_are_the_powers_of_one_half() -> None:
    assert [flow.num_step_sizes(k) for k in (1, 2, 4, 64)] == [1, 2, 3, 7]
    torch.testing.assert_close(
        flow.step_size(torch.arange(7)), torch.tensor([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64]), rtol=0, atol=0
    )


@pytest.mark.parametrize("bad", [0, -4, 3, 48])
def test_max_steps_must_be_a_power_of_two(bad: int) -> None:
    with pytest.raises(ValueError, match=str(bad)):
        flow.num_step_sizes(bad)


def test_context_signal_is_the_nearest_index_of_the_signal_not_of_the_noise() -> None:
    assert flow.signal_index(0.9, 64) == 58  # 58 / 64 = 0.906; the noise part 0.1 would be index 6
    assert flow.signal_index(0.1, 64) == 6
    assert flow.signal_index(0.0, 64) == 0
    assert flow.signal_index(0.999, 64) == 63  # 1 itself is not on the grid


@given(st.floats(0, 0.98), st.sampled_from([64, 128]))
def test_signal_index_is_nearest(signal: float, max_steps: int) -> None:
    index = flow.signal_index(signal, max_steps)
    best = min(abs(i / max_steps - signal) for i in range(max_steps))
    assert abs(index / max_steps - signal) == pytest.approx(best)


@pytest.mark.parametrize("step_idx", range(5))
def test_tau_is_uniform_on_exactly_the_multiples_of_d_below_one(step_idx: int) -> None:
    count, draws = 2**step_idx, 16_000
    taus = flow.sample_signal_idx(torch.full((draws // 8, 8), step_idx), 16)
    values, frequencies = taus.unique(return_counts=True)
    assert values.tolist() == [i * 16 // count for i in range(count)]
    assert (frequencies / draws - 1 / count).abs().max() < 5 * math.sqrt(1 / count / draws)


def test_tau_follows_each_frames_own_step_size() -> None:
    step_idx = torch.randint(0, 7, (1000, 5))
    taus = flow.sample_signal_idx(step_idx, 64)
    d = 64 // 2**step_idx
    assert (taus % d == 0).all()
    assert (taus <= 64 - d).all()
    assert (taus >= 0).all()
    finest = taus[step_idx == 6]
    assert finest.unique().numel() > 60  # the finest rows are not caught on a coarser grid


def test_tau_stays_below_one_when_the_random_number_rounds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.ones(shape))
    assert flow.sample_signal_idx(torch.tensor([[0, 3, 6]]), 64).tolist() == [[0, 56, 63]]


def test_tau_depends_on_the_generator_alone() -> None:
    step_idx = torch.full((4, 16), 6)
    first = flow.sample_signal_idx(step_idx, 64, torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    assert torch.equal(first, flow.sample_signal_idx(step_idx, 64, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, flow.sample_signal_idx(step_idx, 64, torch.Generator().manual_seed(2)))


def test_noising_by_hand_and_per_frame() -> None:
    clean, noise = torch.full((1, 3, 1, 2), 4.0), torch.full((1, 3, 1, 2), -2.0)
    noisy = flow.add_noise(clean, noise, level(0.0, 0.25, 1.0))
    assert noisy[0, :, 0, 0].tolist() == [-2.0, -0.5, 4.0]  # 0.75 * -2 + 0.25 * 4 = -0.5


def test_noising_ends_at_pure_noise_and_at_clean_exactly() -> None:
    clean, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert torch.equal(flow.add_noise(clean, noise, torch.zeros(2, 3)), noise)
    assert torch.equal(flow.add_noise(clean, noise, torch.ones(2, 3)), clean)


def test_velocity_divides_by_what_is_left_of_the_way() -> None:
    # (3 - 1) / (1 - 0.75) = 8; without the division it would be 2
    assert flow.velocity(torch.full((1, 1, 1, 1), 3.0), torch.ones(1, 1, 1, 1), level(0.75)).item() == 8.0


def test_the_velocity_of_the_true_clean_latents_is_clean_minus_noise() -> None:
    clean, noise, tau = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2, 3) * 0.95
    noisy = flow.add_noise(clean, noise, tau)
    torch.testing.assert_close(flow.velocity(clean, noisy, tau), clean - noise, rtol=1e-4, atol=1e-4)


def test_velocity_and_x_prediction_are_each_others_inverse() -> None:
    prediction, noisy, tau = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2, 3) * 0.95
    back = noisy + flow.velocity(prediction, noisy, tau) * (1 - tau)[..., None, None]
    torch.testing.assert_close(back, prediction, rtol=1e-5, atol=1e-5)


def test_euler_step_by_hand() -> None:
    # 1 + (3 - 1) / (1 - 0.5) * 0.25 = 2
    assert flow.euler_step(torch.full((1, 1, 1, 1), 3.0), torch.ones(1, 1, 1, 1), level(0.5), level(0.25)).item() == 2.0


@pytest.mark.parametrize("num_steps", [1, 2, 4, 64])
def test_euler_with_the_exact_prediction_walks_the_noising_path_to_the_clean_latents(num_steps: int) -> None:
    clean, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    z = noise
    for k in range(num_steps):
        tau, d = torch.full((2, 3), k / num_steps), torch.full((2, 3), 1 / num_steps)
        z = flow.euler_step(clean, z, tau, d)
        torch.testing.assert_close(z, flow.add_noise(clean, noise, tau + d), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z, clean, rtol=1e-4, atol=1e-4)


def test_euler_integrates_the_gaussian_flow_to_its_known_answer() -> None:
    """Data N(mu, s^2): E[z1 | z] is linear, and the flow takes the noise z0 to mu + s z0."""
    mu, s, num_steps = 1.5, 0.5, 2000
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 9, 1)
    z = noise
    for k in range(num_steps):
        t = k / num_steps
        posterior = mu + s**2 * t / (s**2 * t**2 + (1 - t) ** 2) * (z - t * mu)
        z = flow.euler_step(
            posterior, z, torch.full((1, 1), t, dtype=torch.float64), torch.full((1, 1), 1 / num_steps, dtype=torch.float64)
        )
    torch.testing.assert_close(z, mu + s * noise, rtol=0, atol=5e-3)


def test_ramp() -> None:
    torch.testing.assert_close(flow.ramp_weight(level(0.0, 0.5, 1.0)), level(0.1, 0.55, 1.0))
    torch.testing.assert_close(flow.ramp_weight(level(0.0, 0.5, 1.0), floor=0.5), level(0.5, 0.75, 1.0))
    torch.testing.assert_close(flow.ramp_weight(level(0.0, 0.5), floor=1.0), level(1.0, 1.0))


def test_bfloat16_latents_keep_their_dtype_and_the_grid_is_exact_in_it() -> None:
    clean, noise = torch.ones(1, 64, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 64, 1, 1, dtype=torch.bfloat16)
    tau = (torch.arange(64) / 64).unsqueeze(0)
    noisy = flow.add_noise(clean, noise, tau)
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(noisy.float().flatten(), tau.flatten())
