"""The Cosmos tokenizer in time: causality, windows of long episodes, and streams that equal the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamer.models import CosmosTokenizerWrapper
from dreamer.models.cosmos_stream import stream_decode, stream_encode

Wrap = Callable[..., CosmosTokenizerWrapper]
Clip = Callable[..., Tensor]
Signed = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_latent_depends_on_its_own_and_earlier_frames_only(network: Any, step: int, wrap: Wrap, clip: Clip) -> None:
    tokenizer, frames = wrap(network), clip(25)
    other = frames.clone()
    other[:, 8 * step + 1 :] = 255 - other[:, 8 * step + 1 :]
    change = (tokenizer.encode(frames) - tokenizer.encode(other)).abs().amax((0, 2, 3))
    assert change[: step + 1].max() < 1e-5 and change[step + 1] > 1e-2


@pytest.mark.parametrize("step", [1, 2])
def test_a_latent_shows_first_in_frame_8t_minus_7(network: Any, step: int) -> None:
    latents = torch.randn(1, 16, 4, 2, 2)
    other = latents.clone()
    other[:, :, step] += 1
    with torch.no_grad():
        change = (network.decode(latents).sample - network.decode(other).sample).abs().amax((0, 1, 3, 4))
    assert change[: 8 * step - 7].max() < 1e-5 and change[8 * step - 7] > 1e-4


@pytest.mark.parametrize("pieces", [[1, 8, 8, 8], [1, 16, 8], [9, 16], [17, 8], [25]])
def test_the_streamed_network_equals_that_of_diffusers(network: Any, pieces: list[int], clip: Clip, signed: Signed) -> None:
    pixels = signed(clip(25, batch=2))
    with torch.no_grad():
        latents = network.encode(pixels).latent_dist.mode()
        tails: dict = {}
        streamed = torch.cat([stream_encode(network, piece, tails) for piece in pixels.split(pieces, dim=2)], dim=2)
        torch.testing.assert_close(streamed, latents, atol=1e-4, rtol=0)
        decoded, tails = network.decode(latents).sample, {}
        steps = [1 + (pieces[0] - 1) // 8, *(length // 8 for length in pieces[1:])]
        streamed = torch.cat([stream_decode(network, piece, tails) for piece in latents.split(steps, dim=2)], dim=2)
        torch.testing.assert_close(streamed, decoded, atol=1e-4, rtol=0)


def test_a_whole_window_of_121_frames_streams_exactly(network: Any, wrap: Wrap, clip: Clip) -> None:
    tokenizer, frames = wrap(network, time_mode="video"), clip(121)
    whole = tokenizer.encode(frames)
    cache = tokenizer.new_cache(1, "encoder")
    pieces = [1] + [8] * 15
    torch.testing.assert_close(torch.cat([tokenizer.encode(f, cache) for f in frames.split(pieces, 1)], 1), whole, atol=1e-4, rtol=0)
    cache = tokenizer.new_cache(1, "decoder")
    decoded = torch.cat([tokenizer.decode(z, cache) for z in whole.split(1, dim=1)], dim=1)
    assert (decoded.int() - tokenizer.decode(whole).int()).abs().max() <= 1


def test_long_clips_go_through_windows_that_share_a_frame(network: Any, wrap: Wrap, clip: Clip) -> None:
    tokenizer, frames = wrap(network, reset_every=17), clip(41)
    latents = tokenizer.encode(frames)
    unbroken = wrap(network).encode(frames)
    assert latents.shape == unbroken.shape == (1, 6, 4, 16)
    torch.testing.assert_close(latents[:, :3], unbroken[:, :3])
    assert (latents[:, 3] - unbroken[:, 3]).abs().max() > 1e-3  # the past before the window is forgotten
    for start, stop, first in ((16, 33, 3), (32, 41, 5)):
        window = wrap(network).encode(frames[:, start:stop])[:, 1:]
        torch.testing.assert_close(latents[:, first : first + window.shape[1]], window, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pieces", [[1, 8, 8, 8, 8, 8], [9, 32], [17, 24], [33, 8], [41]])
def test_streaming_equals_the_whole_clip_across_resets(network: Any, pieces: list[int], wrap: Wrap, clip: Clip) -> None:
    tokenizer, frames = wrap(network, reset_every=17), clip(41, batch=2)
    whole = tokenizer.encode(frames)
    cache = tokenizer.new_cache(2, "encoder")
    streamed = torch.cat([tokenizer.encode(piece, cache) for piece in frames.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(streamed, whole, atol=1e-4, rtol=0)

    raw = tokenizer._denormalize(tokenizer._from_tokens(whole), is_start=True)
    with torch.no_grad():
        expected = torch.cat(list(tokenizer._decoded(raw, tokenizer._stream(None, 2, "decoder"))), dim=2)
        cache, steps = tokenizer.new_cache(2, "decoder"), [1 + (pieces[0] - 1) // 8, *(length // 8 for length in pieces[1:])]
        decoded = torch.cat([p for piece in raw.split(steps, dim=2) for p in tokenizer._decoded(piece, cache)], dim=2)
    assert expected.shape == (2, 3, 41, 16, 16)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)


def test_the_decoder_begins_a_window_with_the_last_decoded_frame(network: Any, wrap: Wrap) -> None:
    tokenizer = wrap(network, reset_every=17)
    raw = torch.randn(1, 16, 4, 2, 2)
    with torch.no_grad():
        first, second = tokenizer._decoded(raw, tokenizer._stream(None, 1, "decoder"))
        again = network.encode(first[:, :, -1:].clamp(-1, 1)).latent_dist.mode()
        expected = network.decode(torch.cat([again, raw[:, :, 3:]], dim=2)).sample[:, :, 1:]
    assert first.shape[2] == 17 and second.shape[2] == 8
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-5)


def test_a_stream_that_was_filled_up_has_ended(network: Any, wrap: Wrap, clip: Clip) -> None:
    tokenizer, frames = wrap(network), clip(20)
    cache = tokenizer.new_cache(1, "encoder")
    latents = torch.cat([tokenizer.encode(frames[:, :9], cache), tokenizer.encode(frames[:, 9:], cache)], dim=1)
    torch.testing.assert_close(latents, tokenizer.encode(frames), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="the stream has ended"):
        tokenizer.encode(frames[:, :8], cache)


def test_caches_that_do_not_fit(network: Any, wrap: Wrap, clip: Clip) -> None:
    tokenizer = wrap(network)
    with pytest.raises(ValueError, match="made for the decoder with batch size 1; this is the encoder with 1"):
        tokenizer.encode(clip(1), tokenizer.new_cache(1, "decoder"))
    with pytest.raises(ValueError, match="made for the encoder with batch size 2; this is the encoder with 1"):
        tokenizer.encode(clip(1), tokenizer.new_cache(2, "encoder"))


def test_rows_of_a_cache_go_on_alone(network: Any, wrap: Wrap, clip: Clip) -> None:
    tokenizer, frames = wrap(network, reset_every=17), clip(33, batch=3)
    whole = tokenizer.encode(frames)
    cache = tokenizer.new_cache(3, "encoder")
    tokenizer.encode(frames[:, :9], cache)
    rows = torch.tensor([2, 0])
    rest = tokenizer.encode(frames[rows, 9:], cache.rows(rows))
    torch.testing.assert_close(rest, whole[rows, 2:], atol=1e-4, rtol=0)


def test_memory_of_a_stream_is_bounded(network: Any, wrap: Wrap, clip: Clip) -> None:
    tokenizer = wrap(network, reset_every=17)
    cache = tokenizer.new_cache(1, "encoder")
    sizes = []
    for length in [1] + [8] * 7:
        tokenizer.encode(clip(length), cache)
        sizes.append(sum(t.untyped_storage().nbytes() for kept in (cache.tails or {}).values() for t in kept))
    assert sizes[2] == max(sizes) and sizes[2] == sizes[4] == sizes[6]  # it grows to the window's end, and begins anew
