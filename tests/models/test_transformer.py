"""The transformer: what may see what, and that every shortcut (cache, fused kernel, grouped heads) gives the plain result."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dreamer.models.transformer import Attention, Transformer, TransformerConfig, attend, grid_angles, rope_angles, rotate, rotation

S = 3


def config(**changes) -> TransformerConfig:
    return TransformerConfig(
        **{"width": 16, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2, "time_every": 2, "context_length": 4} | changes
    )


def make(tokens: int = S, **changes) -> Transformer:
    c = config(**changes)
    return Transformer(c, rope_angles(torch.arange(tokens), c.head_width)).eval()


def changed(x: Tensor, *where) -> Tensor:
    out = x.clone()
    out[where] += torch.randn_like(out[where])
    return out


def same_steps(a: Tensor, b: Tensor) -> list[bool]:
    """Per time step: equal bit for bit."""
    return [torch.equal(a[:, t], b[:, t]) for t in range(a.shape[1])]


def test_no_step_sees_a_later_one() -> None:
    model, x = make(), torch.randn(2, 7, S, 16)
    out, other = model(x), model(changed(x, slice(None), 4))
    assert same_steps(out, other) == [True] * 4 + [False] * 3


@pytest.mark.parametrize("softcap", [50.0, None])
def test_the_window_is_exactly_context_length_steps(softcap: float | None) -> None:
    model = make(num_layers=1, time_every=1, context_length=3, logit_softcap=softcap)
    x = torch.randn(1, 8, S, 16)
    out, other = model(x), model(changed(x, slice(None), 2))
    assert same_steps(out, other) == [True, True, False, False, False, True, True, True]


def test_a_time_layer_does_not_mix_tokens_and_a_space_layer_does_not_mix_steps() -> None:
    x = torch.randn(1, 4, S, 16)
    time = make(num_layers=1, time_every=1)
    out, other = time(x), time(changed(x, slice(None), 0, 1))
    assert torch.equal(out[:, :, [0, 2]], other[:, :, [0, 2]])
    assert not torch.equal(out[:, 3, 1], other[:, 3, 1])
    space = make(num_layers=1, time_every=0)
    out, other = space(x), space(changed(x, slice(None), 1, 1))
    assert same_steps(out, other) == [True, False, True, True]
    assert all(not torch.equal(out[:, 1, s], other[:, 1, s]) for s in range(S))


def test_time_layers_stand_where_the_config_says() -> None:
    assert [layer.is_time for layer in make(num_layers=8, time_every=4).layers] == [False] * 3 + [True] + [False] * 3 + [True]
    assert [layer.is_time for layer in make(num_layers=4, time_every=2).layers] == [False, True, False, True]
    assert not any(layer.is_time for layer in make(time_every=0).layers)


def test_rows_without_history_see_only_themselves() -> None:
    model, x = make(), torch.randn(3, 6, S, 16)
    alone = torch.tensor([False, True, False])
    out = model(x, no_history=alone)
    for t in range(6):
        torch.testing.assert_close(out[1:2, t : t + 1], model(x[1:2, t : t + 1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[[0, 2]], model(x[[0, 2]]), rtol=1e-5, atol=1e-5)
    other = model(changed(x, slice(None), 2), no_history=alone)
    assert [torch.equal(out[1, t], other[1, t]) for t in range(6)] == [True, True, False, True, True, True]
    assert not torch.equal(out[0, 5], other[0, 5])


def test_a_batch_of_one_without_history() -> None:
    model, x = make(), torch.randn(1, 3, S, 16)
    out = model(x, no_history=torch.tensor([True]))
    torch.testing.assert_close(out[:, 2:], model(x[:, 2:]), rtol=1e-5, atol=1e-5)


def test_no_history_is_refused_with_a_cache() -> None:
    model = make()
    with pytest.raises(ValueError, match="no_history"):
        model(torch.randn(2, 1, S, 16), no_history=torch.ones(2, dtype=torch.bool), cache=model.new_cache(2, S))


@pytest.mark.parametrize("masked", [False, True])
def test_a_huge_cap_equals_the_fused_kernel(masked: bool) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    mask = torch.ones(2, 1, 5, 6, dtype=torch.bool).tril(1) if masked else None
    torch.testing.assert_close(attend(q, k, v, mask, 1e4), attend(q, k, v, mask, None), rtol=1e-4, atol=1e-5)


def test_the_cap_bounds_the_logits() -> None:
    q, k = torch.full((1, 1, 1, 4), 100.0), torch.tensor([100.0, -100.0]).reshape(1, 1, 2, 1).expand(1, 1, 2, 4)
    v = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1).expand(1, 1, 2, 4)
    out = attend(q, k, v, None, 1.5)  # logits 1.5 and -1.5
    torch.testing.assert_close(out, torch.full((1, 1, 1, 4), 1 / (1 + math.exp(-3))))


def test_attention_by_hand() -> None:
    q = torch.tensor([2.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    k = torch.stack([q[0, 0, 0] * math.log(3) / 2, torch.zeros(4)]).reshape(1, 1, 2, 4)  # logits ln 3 (after / sqrt 4) and 0
    v = torch.tensor([[4.0, 0, 0, 0], [0, 8.0, 0, 0]]).reshape(1, 1, 2, 4)
    expected = torch.tensor([3.0, 2.0, 0.0, 0.0]).reshape(1, 1, 1, 4)  # weights 3/4 and 1/4
    torch.testing.assert_close(attend(q, k, v, None, None), expected)
    torch.testing.assert_close(attend(q, k, v, None, 1e4), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("softcap", [50.0, None])
def test_grouped_queries_equal_repeated_key_heads(softcap: float | None) -> None:
    grouped = make(num_heads=4, num_kv_heads=2, logit_softcap=softcap)
    full = make(num_heads=4, num_kv_heads=4, logit_softcap=softcap)
    weights = grouped.state_dict()
    for name in list(weights):
        if name.endswith("qkv.weight"):
            q, k, v = weights[name].split([16, 8, 8])
            k, v = (w.reshape(2, 4, 16).repeat_interleave(2, dim=0).reshape(16, 16) for w in (k, v))
            weights[name] = torch.cat([q, k, v])
    full.load_state_dict(weights)
    x = torch.randn(2, 6, S, 16)
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-4, atol=1e-5)


def test_queries_and_keys_are_normalised() -> None:
    attention = Attention(config())
    still = rotation(torch.zeros(5, 4))
    x = torch.randn(2, 5, 16)
    q, k, v = attention.project(x, still)
    torch.testing.assert_close(q.square().mean(-1), torch.ones(2, 2, 5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(k.square().mean(-1), torch.ones(2, 2, 5), rtol=1e-3, atol=1e-3)
    q10, k10, v10 = attention.project(10 * x, still)
    torch.testing.assert_close((q10, k10), (q, k), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(v10, 10 * v)


def test_rope_angles_by_hand_and_far_away() -> None:
    torch.testing.assert_close(rope_angles(torch.tensor([0, 3]), 4), torch.tensor([[0.0, 0.0], [3.0, 0.03]], dtype=torch.float64))
    angles = rope_angles(torch.tensor([1_000_000]), 8)[0]
    for i, angle in enumerate(angles.tolist()):
        assert angle == pytest.approx(1_000_000 * 10_000 ** (-2 * i / 8), rel=1e-14)


@pytest.mark.parametrize("shift", [7, 1_000_000])
def test_rope_depends_on_the_distance_alone(shift: int) -> None:
    q, k = torch.randn(5, 1, 8), torch.randn(5, 1, 8)

    def logits(start: int) -> Tensor:
        by = rotation(rope_angles(torch.arange(start, start + 5), 8))
        return rotate(q, by)[:, 0] @ rotate(k, by)[:, 0].T

    torch.testing.assert_close(logits(shift), logits(0), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(0), q[:, 0] @ k[:, 0].T, atol=1e-2)


def test_rotation_keeps_lengths_and_turns_by_the_angle() -> None:
    x = torch.tensor([[[1.0, 5.0, 0.0, 0.0]]])  # the pairs (1, 0) and (5, 0)
    turned = rotate(x, rotation(torch.tensor([[0.5, math.pi / 2]])))
    torch.testing.assert_close(turned, torch.tensor([[[math.cos(0.5), 0.0, math.sin(0.5), 5.0]]]))


def test_grid_angles_follow_row_and_column() -> None:
    angles = grid_angles((2, 3), 8)  # frequencies 1 and 100^(-1/2) for each axis
    assert angles.shape == (6, 4)
    torch.testing.assert_close(angles[5], torch.tensor([1.0, 0.1, 2.0, 0.2], dtype=torch.float64))
    torch.testing.assert_close(angles[1], torch.tensor([0.0, 0.0, 1.0, 0.1], dtype=torch.float64))


def test_nothing_reads_the_agent_tokens_and_they_read_everything() -> None:
    model, x = make(tokens=5), torch.randn(2, 6, 5, 16)
    out, other = model(x, num_agent=2), model(changed(x, slice(None), slice(None), slice(3, 5)), num_agent=2)
    assert torch.equal(out[:, :, :3], other[:, :, :3])
    assert not torch.equal(out[:, :, 3:], other[:, :, 3:])
    torch.testing.assert_close(model(x[:, :, :3]), out[:, :, :3], rtol=1e-5, atol=1e-5)  # as if they were not there
    for token in range(5):
        other = model(changed(x, slice(None), 0, token), num_agent=2)
        assert not torch.equal(out[:, 5, 4], other[:, 5, 4])


@pytest.mark.parametrize("pieces", [[1] * 14, [3, 1, 4, 2, 4], [9, 1, 4], [14]])
@pytest.mark.parametrize("changes", [{}, {"logit_softcap": None}, {"num_kv_heads": 1}])
def test_with_a_cache_the_result_is_the_same_far_beyond_the_context(pieces: list[int], changes: dict) -> None:
    model, x = make(**changes), torch.randn(2, 14, S, 16)
    cache = model.new_cache(2, S)
    out = [model(piece, num_agent=1, cache=cache, write=True) for piece in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(out, dim=1), model(x, num_agent=1), rtol=1e-5, atol=1e-5)
    assert cache.num_steps == 14


@pytest.mark.parametrize("past", [2, 5])  # before and after the ring is full
def test_a_pass_that_is_not_kept_leaves_no_trace(past: int) -> None:
    model, x = make(), torch.randn(2, past + 2, S, 16)
    cache = model.new_cache(2, S)
    model(x[:, :past], cache=cache, write=True)
    for _ in range(3):
        model(torch.randn(2, 1, S, 16), cache=cache)
    assert cache.num_steps == past
    for later in (slice(past, past + 1), slice(past, past + 2)):  # one step, several
        torch.testing.assert_close(model(x[:, later], cache=cache), model(x[:, : later.stop])[:, past:], rtol=1e-5, atol=1e-5)


def test_a_pass_without_the_agent_token_reads_the_same_cache() -> None:
    model, x = make(), torch.randn(2, 6, S, 16)
    cache = model.new_cache(2, S)
    model(x[:, :5], num_agent=1, cache=cache, write=True)
    without = model(x[:, 5:, : S - 1], cache=cache)
    torch.testing.assert_close(without, model(x, num_agent=1)[:, 5:, : S - 1], rtol=1e-5, atol=1e-5)


def test_the_cache_does_not_grow_in_a_thousand_steps() -> None:
    model = make(tokens=2, num_layers=1, time_every=1, context_length=5)
    cache = model.new_cache(1, 2)

    def storage() -> list[tuple[int, int]]:
        return [(t.data_ptr(), t.untyped_storage().nbytes()) for t in (*cache.keys, *cache.values)]

    before = storage()
    x = torch.randn(1, 1000, 2, 16)
    with torch.no_grad():
        out = torch.cat([model(x[:, t : t + 1], cache=cache, write=True) for t in range(1000)], dim=1)
        assert storage() == before
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


def test_a_dream_of_a_million_steps_is_as_good_as_a_young_one() -> None:
    model, x = make(), torch.randn(1, 10, S, 16)
    old = model.new_cache(1, S)
    old.first_step = 1_000_001
    out = torch.cat([model(x[:, t : t + 1], cache=old, write=True) for t in range(10)], dim=1)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [50.0, None])
def test_gradients_reach_every_parameter(softcap: float | None) -> None:
    model = make(logit_softcap=softcap, num_kv_heads=1)
    model(torch.randn(2, 5, S, 16), num_agent=1).square().sin().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_dropout_acts_in_training_alone() -> None:
    model, x = make(dropout=0.5), torch.randn(1, 3, S, 16)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("softcap", [50.0, None])
def test_bfloat16_autocast_is_close_to_full_precision(softcap: float | None) -> None:
    model, x = make(logit_softcap=softcap), torch.randn(2, 6, S, 16)
    expected = model(x, num_agent=1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x, num_agent=1).float(), expected, rtol=0.1, atol=0.1)
        cache = model.new_cache(2, S)
        out = torch.cat([model(x[:, t : t + 1], num_agent=1, cache=cache, write=True) for t in range(6)], dim=1)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("bad", [{"width": 18, "num_heads": 4}, {"num_heads": 4, "num_kv_heads": 3}, {"context_length": 0}, {"typo": 1}])
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValidationError):
        config(**bad)


@pytest.mark.gpu
def test_on_a_gpu_the_cached_pass_equals_the_whole_one() -> None:
    model, x = make().cuda(), torch.randn(2, 14, S, 16).cuda()
    cache = model.new_cache(2, S)
    out = [model(x[:, t : t + 1], num_agent=1, cache=cache, write=True) for t in range(14)]
    torch.testing.assert_close(torch.cat(out, dim=1), model(x, num_agent=1), rtol=1e-3, atol=1e-3)
