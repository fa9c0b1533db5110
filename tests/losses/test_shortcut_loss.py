"""Shortcut forcing (Eq. 7) against the equation written out by hand for a tiny linear denoiser."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dreamer.losses import ShortcutForcingConfig, ShortcutForcingLoss
from dreamer.losses.shortcut_loss import Corrupted, bootstrap_target
from dreamer.ops import flow

MAX_STEPS = 16
FINEST = 4  # d = 2^-4 = 1 / 16


def linear(noisy: Tensor, signal_idx: Tensor, step_idx: Tensor) -> Tensor:
    """0.5 z - 0.3 + 0.7 tau + 0.11 step_idx: every input counts."""
    extra = -0.3 + 0.7 * signal_idx / MAX_STEPS + 0.11 * step_idx
    return 0.5 * noisy + extra[..., None, None]


def linear_number(z: float, tau: float, step_idx: int) -> float:
    return 0.5 * z - 0.3 + 0.7 * tau + 0.11 * step_idx


def equation_7(prediction: float, noisy: float, clean: float, tau: float, step_idx: int) -> float:
    """One entry of Eq. 7, without the ramp, as the paper prints it."""
    d = 2.0**-step_idx
    if step_idx == FINEST:
        return (prediction - clean) ** 2
    b1 = (linear_number(noisy, tau, step_idx + 1) - noisy) / (1 - tau)
    halfway = noisy + b1 * d / 2
    b2 = (linear_number(halfway, tau + d / 2, step_idx + 1) - halfway) / (1 - (tau + d / 2))
    return (1 - tau) ** 2 * ((prediction - noisy) / (1 - tau) - (b1 + b2) / 2) ** 2


def make_loss(**settings) -> ShortcutForcingLoss:
    return ShortcutForcingLoss(ShortcutForcingConfig(**settings), MAX_STEPS)


def never(*_: Tensor) -> Tensor:
    raise AssertionError("the denoiser was called without need")


def recorder(calls: list[tuple[Tensor, Tensor, Tensor]]):
    def denoise(noisy: Tensor, signal_idx: Tensor, step_idx: Tensor) -> Tensor:
        calls.append((noisy, signal_idx, step_idx))
        return linear(noisy, signal_idx, step_idx)

    return denoise


@pytest.mark.parametrize("context_fraction", [0.0, 0.4])
def test_both_terms_equal_equation_7_written_out(context_fraction: float) -> None:
    loss = make_loss(bootstrap_fraction=0.5, context_fraction=context_fraction)
    corrupted = loss.corrupt(torch.randn(6, 5, 2, 3), torch.Generator().manual_seed(3))
    prediction = linear(corrupted.noisy, corrupted.signal_idx, corrupted.step_idx)
    value, metrics = loss(prediction, corrupted, linear)
    rows = []
    for b in range(6):
        terms = []
        for t in range(5):
            tau, step = corrupted.signal_idx[b, t].item() / MAX_STEPS, int(corrupted.step_idx[b, t])
            entries = zip(*(x[b, t].flatten().tolist() for x in (prediction, corrupted.noisy, corrupted.clean)), strict=True)
            squared = [equation_7(p, n, c, tau, step) for p, n, c in entries]
            terms.append((0.9 * tau + 0.1) * sum(squared) / len(squared))
        rows.append(sum(terms) / len(terms))
    assert value.item() == pytest.approx(sum(rows) / 6, rel=1e-5)
    assert metrics["flow_loss"].item() == pytest.approx(sum(rows[:3]) / 3, rel=1e-5)
    assert metrics["bootstrap_loss"].item() == pytest.approx(sum(rows[3:]) / 3, rel=1e-5)


def test_one_bootstrap_entry_with_numbers() -> None:
    """tau 1/2, d 1/2, z~ = 2, f = 0 always: b' = -4, z' = 1, b'' = -4; the target is 2 + 1/2 * -4 = 0."""
    target = bootstrap_target(
        lambda z, *_: torch.zeros_like(z), torch.full((1, 1, 1, 1), 2.0), torch.tensor([[8]]), torch.tensor([[1]]), MAX_STEPS
    )
    assert target.item() == 0.0
    # f = z: no velocity, so the target is z~ itself
    target = bootstrap_target(lambda z, *_: z, torch.full((1, 1, 1, 1), 2.0), torch.tensor([[8]]), torch.tensor([[1]]), MAX_STEPS)
    assert target.item() == 2.0
    # f = 3 then 5: b' = (3 - 2) / 0.5 = 2, z' = 2 + 2 / 4 = 2.5, b'' = (5 - 2.5) / 0.25 = 10; target 2 + 0.5 * (2 + 10) / 2 = 5
    answers = iter([3.0, 5.0])
    target = bootstrap_target(
        lambda z, *_: torch.full_like(z, next(answers)), torch.full((1, 1, 1, 1), 2.0), torch.tensor([[8]]), torch.tensor([[1]]), MAX_STEPS
    )
    assert target.item() == 5.0


def test_the_half_steps_get_half_of_d_and_the_second_starts_where_the_first_ends() -> None:
    loss = make_loss(bootstrap_fraction=1.0)
    corrupted = loss.corrupt(torch.randn(8, 6, 2, 2))
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    loss(corrupted.clean, corrupted, recorder(calls))
    (noisy1, signal1, step1), (noisy2, signal2, step2) = calls
    assert torch.equal(step1, corrupted.step_idx + 1)  # d / 2
    assert torch.equal(step2, corrupted.step_idx + 1)
    assert torch.equal(noisy1, corrupted.noisy)
    assert torch.equal(signal1, corrupted.signal_idx)
    half = MAX_STEPS // 2 ** (corrupted.step_idx + 1)
    assert torch.equal(signal2, corrupted.signal_idx + half)  # tau + d / 2
    assert (signal2 < MAX_STEPS).all()
    tau, half_d = corrupted.signal_idx / MAX_STEPS, half / MAX_STEPS
    b1 = (linear(noisy1, signal1, step1) - noisy1) / (1 - tau)[..., None, None]
    torch.testing.assert_close(noisy2, noisy1 + b1 * half_d[..., None, None])


def test_only_the_bootstrap_rows_are_denoised_again() -> None:
    loss = make_loss(bootstrap_fraction=0.25)
    corrupted = loss.corrupt(torch.randn(8, 3, 2, 2))
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    loss(corrupted.clean, corrupted, recorder(calls))
    assert [len(noisy) for noisy, _, _ in calls] == [2, 2]
    assert torch.equal(calls[0][0], corrupted.noisy[6:])


def test_no_gradient_flows_through_the_half_steps() -> None:
    loss = make_loss(bootstrap_fraction=1.0)
    corrupted = loss.corrupt(torch.randn(4, 3, 2, 2))
    weight = torch.tensor(0.4, requires_grad=True)
    prediction = corrupted.clean.clone().requires_grad_()
    value, _ = loss(prediction, corrupted, lambda z, *_: weight * z)
    value.backward()
    assert weight.grad is None
    target = bootstrap_target(lambda z, *_: 0.4 * z, corrupted.noisy, corrupted.signal_idx, corrupted.step_idx, MAX_STEPS)
    ramp = 0.9 * corrupted.signal_idx / MAX_STEPS + 0.1
    assert prediction.grad is not None
    torch.testing.assert_close(prediction.grad, 2 * ramp[..., None, None] * (corrupted.clean - target) / prediction.numel())


def test_at_d_min_it_is_the_plain_flow_loss() -> None:
    loss = make_loss(bootstrap_fraction=0.0)
    corrupted = loss.corrupt(torch.randn(4, 3, 2, 2))
    assert (corrupted.step_idx == FINEST).all()
    prediction = torch.randn(4, 3, 2, 2)
    value, metrics = loss(prediction, corrupted, never)
    ramp = 0.9 * corrupted.signal_idx / MAX_STEPS + 0.1
    torch.testing.assert_close(value, (ramp[..., None, None] * (prediction - corrupted.clean) ** 2).mean())
    assert "bootstrap_loss" not in metrics
    assert loss(corrupted.clean, corrupted, never)[0] == 0


def test_bootstrap_targets_are_never_the_clean_latents() -> None:
    loss = make_loss(bootstrap_fraction=1.0)
    corrupted = loss.corrupt(torch.randn(4, 3, 2, 2))
    prediction = torch.randn(4, 3, 2, 2)
    value, metrics = loss(prediction, corrupted, linear)
    elsewhere = dataclasses.replace(corrupted, clean=corrupted.clean + 100)
    assert torch.equal(loss(prediction, elsewhere, linear)[0], value)
    assert loss(corrupted.clean, corrupted, linear)[0] > 0.01
    assert "flow_loss" not in metrics


def test_a_model_that_knows_the_clean_latents_has_no_loss_at_any_step_size() -> None:
    loss = make_loss(bootstrap_fraction=0.5)
    corrupted = loss.corrupt(torch.randn(8, 3, 2, 2))
    value, _ = loss(corrupted.clean, corrupted, lambda *_: corrupted.clean[corrupted.num_flow :])
    assert value.item() == pytest.approx(0, abs=1e-8)


def test_only_the_scored_rows_count_and_they_keep_their_share_of_bootstrap() -> None:
    """As in agent finetuning: the first rows are relevant ones, from which the dynamics does not learn."""
    loss = make_loss(bootstrap_fraction=0.25)
    corrupted = loss.corrupt(torch.randn(12, 3, 2, 2), num_scored=8)
    assert corrupted.num_flow == 10  # a quarter of the 8, not of the 12
    prediction = torch.randn(12, 3, 2, 2, requires_grad=True)
    rows = torch.arange(12) >= 4
    value, metrics = loss(prediction, corrupted, linear, rows)
    value.backward()
    assert prediction.grad is not None
    assert (prediction.grad[:4] == 0).all()
    assert (prediction.grad[4:] != 0).any(dim=(1, 2, 3)).all()
    tail = Corrupted(
        *(getattr(corrupted, name)[4:] for name in ("clean", "noisy", "signal_idx", "step_idx")), num_flow=6, has_bootstrap=True
    )
    alone, alone_metrics = loss(prediction[4:], tail, linear)
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(metrics, alone_metrics)
    assert loss(prediction, corrupted, linear, torch.zeros(12, dtype=torch.bool))[0] == 0


def test_tau_and_d_are_drawn_for_each_frame_as_the_paper_says() -> None:
    rows, time = 2000, 8
    corrupted = make_loss(bootstrap_fraction=0.5).corrupt(torch.zeros(rows, time, 1, 1))
    assert corrupted.num_flow == rows // 2
    flow_tau, flow_step = corrupted.signal_idx[: rows // 2], corrupted.step_idx[: rows // 2]
    assert (flow_step == FINEST).all()
    draws = flow_tau.numel()
    frequency = torch.bincount(flow_tau.flatten(), minlength=MAX_STEPS) / draws
    assert (frequency - 1 / MAX_STEPS).abs().max() < 5 * math.sqrt(1 / MAX_STEPS / draws)
    tau, step = corrupted.signal_idx[rows // 2 :], corrupted.step_idx[rows // 2 :]
    frequency = torch.bincount(step.flatten(), minlength=FINEST + 1) / draws
    assert frequency[FINEST] == 0
    assert (frequency[:FINEST] - 1 / FINEST).abs().max() < 5 * math.sqrt(1 / FINEST / draws)
    for i in range(FINEST):  # given d, tau is uniform on the multiples of d
        taus = tau[step == i]
        values, counts = taus.unique(return_counts=True)
        assert values.tolist() == [k * MAX_STEPS // 2**i for k in range(2**i)]
        assert (counts / len(taus) - 2.0**-i).abs().max() < 5 * math.sqrt(2.0**-i / len(taus))
    for x in (flow_tau, tau, step):  # neighbours in time are independent
        x = x.float() - x.float().mean()
        assert ((x[:, :-1] * x[:, 1:]).mean() / x.var()).abs() < 5 / math.sqrt(draws)


def test_the_noise_is_standard_normal_and_mixed_in_by_tau() -> None:
    corrupted = make_loss().corrupt(torch.full((400, 4, 4, 4), 3.0))
    tau = (corrupted.signal_idx / MAX_STEPS)[..., None, None]
    noise = (corrupted.noisy - tau * corrupted.clean) / (1 - tau)
    assert noise.mean().abs() < 0.03
    assert (noise.std() - 1).abs() < 0.03


@pytest.mark.parametrize("bootstrap_fraction", [0.0, 0.5])
def test_context_steps_stand_as_in_the_sampler(bootstrap_fraction: float) -> None:
    loss = make_loss(context_fraction=1.0, bootstrap_fraction=bootstrap_fraction)
    corrupted = loss.corrupt(torch.full((8, 4, 2, 2), 1000.0))
    assert (corrupted.signal_idx == flow.signal_index(0.9, MAX_STEPS)).all()
    assert (corrupted.step_idx == FINEST).all()
    torch.testing.assert_close(corrupted.noisy, torch.full((8, 4, 2, 2), 875.0), rtol=0, atol=1.0)  # 14 / 16 of the signal, not 2 / 16
    prediction = torch.randn(8, 4, 2, 2)
    value, _ = loss(prediction, corrupted, linear)  # even in bootstrap rows their target is the clean latents
    torch.testing.assert_close(value, ((0.9 * 14 / 16 + 0.1) * (prediction - corrupted.clean) ** 2).mean())


def test_context_fraction_is_a_share_of_the_steps_of_all_rows() -> None:
    loss = make_loss(context_fraction=0.3, bootstrap_fraction=0.5)
    corrupted = loss.corrupt(torch.zeros(1000, 8, 1, 1))
    is_context = corrupted.step_idx[500:] == FINEST  # only context steps have d_min in bootstrap rows
    assert (is_context.float().mean() - 0.3).abs() < 0.04
    assert (corrupted.signal_idx[500:][is_context] == 14).all()
    flow_share = (corrupted.signal_idx[:500] == 14).float().mean()
    assert (flow_share - (0.3 + 0.7 / 16)).abs() < 0.04
    assert 0 < is_context.float().mean(1).std() < 0.25  # drawn per step, not per row


def test_without_context_fraction_nothing_is_pinned() -> None:
    corrupted = make_loss(context_fraction=0.0, bootstrap_fraction=1.0).corrupt(torch.zeros(50, 4, 1, 1))
    assert (corrupted.step_idx < FINEST).all()


@pytest.mark.parametrize(("batch", "expected"), [(4, 1), (8, 2), (16, 4)])
def test_a_quarter_of_the_rows_bootstraps(batch: int, expected: int) -> None:
    assert {batch - make_loss().corrupt(torch.zeros(batch, 1, 1, 1)).num_flow for _ in range(20)} == {expected}


@pytest.mark.parametrize(("batch", "low"), [(1, 0), (2, 0), (6, 1)])
def test_small_batches_bootstrap_as_often_on_average(batch: int, low: int) -> None:
    counts = [batch - make_loss().corrupt(torch.zeros(batch, 1, 1, 1)).num_flow for _ in range(1000)]
    assert set(counts) == {low, low + 1}
    assert sum(counts) / 1000 == pytest.approx(batch / 4, abs=0.08)


def test_everything_drawn_depends_on_the_generator_alone() -> None:
    loss, latents = make_loss(context_fraction=0.2), torch.randn(6, 3, 2, 2)

    def draw(seed: int) -> Corrupted:
        return loss.corrupt(latents, torch.Generator().manual_seed(seed))

    first = draw(5)
    torch.manual_seed(1234)
    again, other = draw(5), draw(6)
    for name in ("noisy", "signal_idx", "step_idx"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_the_ramp_floor_is_a_setting() -> None:
    loss = make_loss(bootstrap_fraction=0.0, ramp_floor=1.0)
    corrupted = loss.corrupt(torch.randn(4, 3, 2, 2))
    prediction = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(loss(prediction, corrupted, never)[0], (prediction - corrupted.clean).square().mean())


def test_max_steps_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="48"):
        ShortcutForcingLoss(ShortcutForcingConfig(), 48)


def test_bfloat16_latents_give_a_float32_loss() -> None:
    loss = make_loss(bootstrap_fraction=0.5)
    corrupted = loss.corrupt(torch.randn(4, 3, 2, 2).bfloat16())
    value, _ = loss(torch.zeros(4, 3, 2, 2), corrupted, lambda z, *_: torch.zeros(z.shape))
    assert value.dtype == torch.float32
    assert torch.isfinite(value)


def test_alternating_context_is_every_other_step_of_its_rows() -> None:
    loss = make_loss(context_fraction=0.5, context_pattern="alternating", bootstrap_fraction=0.0)
    corrupted = loss.corrupt(torch.zeros(400, 6, 1, 1), torch.Generator().manual_seed(0))
    context_idx = flow.signal_index(loss.config.context_signal, loss.max_steps)
    is_context = corrupted.signal_idx == context_idx
    even, odd = is_context[:, ::2].all(1), is_context[:, 1::2].all(1)
    assert 0.4 < (even | odd).float().mean() < 0.62  # half of the rows, and a few by chance
    assert even.any() and odd.any()
    other = is_context[~(even | odd)]
    assert other.float().mean() < 0.35


def test_rows_that_teach_only_the_heads_can_be_shown_as_acting_shows_them() -> None:
    """``num_scored`` rows count and come last; the rows before them take ``heads_context_fraction``."""
    loss = make_loss(context_fraction=0.0, heads_context_fraction=1.0, bootstrap_fraction=0.5)
    corrupted = loss.corrupt(torch.zeros(8, 5, 1, 1), torch.Generator().manual_seed(0), num_scored=3)
    context_idx = flow.signal_index(loss.config.context_signal, loss.max_steps)
    assert (corrupted.signal_idx[:5] == context_idx).all() and (corrupted.step_idx[:5] == FINEST).all()
    assert not (corrupted.signal_idx[5:] == context_idx).all(1).any()
    everywhere = make_loss(context_fraction=0.0, bootstrap_fraction=0.5)
    assert not (everywhere.corrupt(torch.zeros(8, 5, 1, 1), torch.Generator().manual_seed(0), 3).signal_idx[:5] == context_idx).all()
