"""The Cosmos tokenizer on a network of reduced width with random weights: shapes, modes, freezing, pixels, normalisation, projection."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer.models import CosmosTokenizerConfig, CosmosTokenizerWrapper
from dreamer.models.causal_tokenizer import to_uint8
from dreamer.models.cosmos_weights import build_network, latent_statistics
from dreamer.types import Tokenizer

Wrap = Callable[..., CosmosTokenizerWrapper]
Clip = Callable[..., Tensor]
Signed = Callable[[Tensor], Tensor]
RawEncode = Callable[[Any, Tensor], Tensor]


@pytest.mark.parametrize("num_frames", range(1, 35))
def test_latent_steps(num_frames: int) -> None:
    expected = 1 + sum(1 for start in range(1, num_frames, 8))  # frame 0, then windows of up to 8
    assert CosmosTokenizerWrapper.compute_temporal_latent_steps(num_frames) == expected


def test_latent_steps_of_the_checklist() -> None:
    assert CosmosTokenizerWrapper.compute_temporal_latent_steps(32) == 5
    with pytest.raises(ValueError, match="num_frames is 0"):
        CosmosTokenizerWrapper.compute_temporal_latent_steps(0)


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 9, 10, 17, 18, 32, 34])
def test_shape_of_latents_and_frames(network: Any, num_frames: int, wrap: Wrap, clip: Clip) -> None:
    tokenizer = wrap(network)
    steps = tokenizer.compute_temporal_latent_steps(num_frames)
    latents = tokenizer.encode(clip(num_frames))
    assert latents.shape == (1, steps, 4, 16) and latents.dtype == torch.float32
    frames = tokenizer.decode(latents)
    assert frames.shape == (1, 1 + 8 * (steps - 1), 3, 16, 16) and frames.dtype == torch.uint8


@pytest.mark.parametrize("time_mode", ["video", "per_frame"])
@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"spatial_mode": "mean", "num_latent_tokens": 4}, (4, 16)),
        ({"spatial_mode": "project", "num_latent_tokens": 4, "latent_dim": 6}, (4, 6)),
        ({"spatial_mode": "none"}, (16, 16)),
    ],
)
def test_every_mode(network: Any, time_mode: str, settings: dict[str, Any], shape: tuple[int, int], wrap: Wrap, clip: Clip) -> None:
    tokenizer = wrap(network, frame_size=(16, 16), upsampled_size=(32, 32), time_mode=time_mode, **settings)
    assert isinstance(tokenizer, Tokenizer)
    stride = 8 if time_mode == "video" else 1
    rows, columns = tokenizer.token_grid
    assert (tokenizer.temporal_stride, rows * columns, tokenizer.latent_channels) == (stride, *shape)
    assert tokenizer.frame_shape == (3, 16, 16) and tokenizer.can_stream
    frames = clip(9, batch=2)
    if tokenizer.projection is not None:
        tokenizer.fit_projection(tokenizer.encode_positions(frames))
    latents = tokenizer.encode(frames)
    assert latents.shape == (2, 2 if stride == 8 else 9, *shape)
    if tokenizer.can_decode:
        assert tokenizer.decode(latents).shape == frames.shape
    else:
        with pytest.raises(ValueError, match="spatial_mode mean .* cannot be decoded; use project or none"):
            tokenizer.decode(latents)


def test_the_setting_of_the_checklist(network: Any, clip: Clip) -> None:
    config = CosmosTokenizerConfig(enabled=True)
    tokenizer = CosmosTokenizerWrapper(config, network)
    frames = clip(10, size=64)
    assert tokenizer._preprocess(frames).shape == (1, 3, 10, 256, 256)
    assert tokenizer.encode(frames[:, :2]).shape == (1, 2, 16, 16) and tokenizer.token_grid == (4, 4)


def test_frames_that_are_not_square(network: Any, wrap: Wrap) -> None:
    tokenizer = wrap(network, frame_size=(12, 20), upsampled_size=(16, 32), num_latent_tokens=2, spatial_mode="mean")
    frames = torch.zeros(1, 3, 3, 12, 20, dtype=torch.uint8)
    assert tokenizer.token_grid == (1, 2) and tokenizer.encode(frames).shape == (1, 2, 2, 16)
    native = wrap(network, frame_size=(12, 20), upsampled_size=(16, 32))
    assert native.decode(native.encode(frames)).shape == (1, 9, 3, 12, 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"upsampled_size": (62, 64), "frame_size": (32, 32)}, "upsampled_size has the height 62; expected a multiple of 8"),
        ({"upsampled_size": (64, 60), "frame_size": (32, 32)}, "upsampled_size has the width 60"),
        ({"upsampled_size": (32, 32), "frame_size": (64, 64)}, "frame_size has the height 64; expected 1 to that of upsampled_size"),
        ({"reset_every": 120}, "reset_every is 120; expected 8k"),
        ({"reset_every": 1}, "greater than or equal to 9"),
        ({"spatial_mode": "max"}, "'mean', 'project' or 'none'"),
        ({"pool_tokens": 16}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CosmosTokenizerConfig(**settings)


def test_tokens_that_do_not_fit_the_network(network: Any, wrap: Wrap) -> None:
    with pytest.raises(ValueError, match="latent_dim is 8; in spatial_mode mean tokens have the network's 16 channels"):
        wrap(network, spatial_mode="mean", num_latent_tokens=4, latent_dim=8)
    with pytest.raises(ValueError, match="2x2 latent positions do not divide into 3"):
        wrap(network, spatial_mode="mean", num_latent_tokens=3)
    with pytest.raises(ValueError, match="latent_dim is 17; the blocks of positions hold only 16"):
        wrap(network, spatial_mode="project", num_latent_tokens=4, latent_dim=17)


def test_another_compression_is_refused(make_network: Callable[..., Any], wrap: Wrap) -> None:
    with pytest.raises(ValueError, match="compresses 4x in time and 8x in space; expected CV8x8x8"):
        wrap(make_network(temporal_compression_ratio=4))


def test_frames_and_latents_that_do_not_fit(network: Any, wrap: Wrap, clip: Clip) -> None:
    tokenizer = wrap(network)
    for frames in (clip(3, size=8), clip(3).float(), clip(3)[:, :0], clip(3)[:, :, :2]):
        with pytest.raises((ValueError, TypeError), match="frames"):
            tokenizer.encode(frames)
    for shape in ((1, 2, 4, 15), (1, 2, 3, 16), (1, 0, 4, 16)):
        with pytest.raises(ValueError, match=r"this tokenizer has \(any, 4, 16\)"):
            tokenizer.decode(torch.zeros(shape))


def test_it_is_frozen_and_stays_in_eval_mode(network: Any, wrap: Wrap, clip: Clip) -> None:
    tokenizer = wrap(network, spatial_mode="project", num_latent_tokens=4, latent_dim=4)
    around = nn.ModuleList([tokenizer]).train()
    assert around.training and not any(module.training for module in tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert not tokenizer.train().training
    assert all(p.dtype == torch.float32 for p in tokenizer.network.parameters())
    assert not wrap(network).encode(clip(2)).requires_grad


def test_fingerprint_depends_on_what_latents_depend_on(make_network: Callable[..., Any], network: Any, wrap: Wrap) -> None:
    first = wrap(network).fingerprint()
    same = wrap(network, checkpoint_path="elsewhere", trust_torchscript=True, checksums="require")
    assert same.fingerprint() == first
    others = [
        wrap(network, reset_every=17),
        wrap(network, time_mode="per_frame"),
        wrap(network, upsampled_size=(24, 24)),
        wrap(make_network()),
    ]
    with torch.no_grad():
        others[-1].network.quant_conv.bias[0] += 0.5
    projected = wrap(network, spatial_mode="project", num_latent_tokens=1, latent_dim=4)
    before = projected.fingerprint()
    projected.fit_projection(torch.randn(3, 16, 4, 2, 2))
    assert len({first, before, projected.fingerprint(), *(o.fingerprint() for o in others)}) == 7
    moved = wrap(make_network())
    moved.network.to(torch.bfloat16)  # as on CUDA
    assert moved.fingerprint() == first
    with torch.no_grad():
        for part in (moved.network.decoder, moved.network.post_quant_conv):
            for parameter in part.parameters():
                parameter.add_(1)
    assert moved.fingerprint() == first  # decoders change no latents
    for name in ("latent_mean", "latent_std"):
        shifted = wrap(network)
        getattr(shifted, name)[1, 3] += 0.5
        assert shifted.fingerprint() != first


def test_state_and_architecture_make_the_same_tokenizer(network: Any, wrap: Wrap, clip: Clip) -> None:
    tokenizer = wrap(network, spatial_mode="project", num_latent_tokens=1, latent_dim=4)
    tokenizer.fit_projection(torch.randn(3, 16, 4, 2, 2))
    architecture = json.loads(json.dumps(tokenizer.architecture))
    again = CosmosTokenizerWrapper(tokenizer.config, build_network(architecture))
    again.load_state_dict(tokenizer.state_dict())
    assert again.fingerprint() == tokenizer.fingerprint()
    frames = clip(9)
    assert torch.equal(again.encode(frames), tokenizer.encode(frames))


@pytest.mark.gpu
def test_bf16_on_cuda_and_fp32_on_the_cpu(make_network: Callable[..., Any], wrap: Wrap, clip: Clip) -> None:
    tokenizer = wrap(make_network())
    frames, expected = clip(17), wrap(make_network()).encode(clip(17))
    fingerprint = tokenizer.fingerprint()
    tokenizer.to("cuda")
    assert {p.dtype for p in tokenizer.network.parameters()} == {torch.bfloat16} and tokenizer.latent_mean.dtype == torch.float32
    latents = tokenizer.encode(frames)
    assert latents.dtype == torch.float32 and tokenizer.decode(latents).shape == (1, 17, 3, 16, 16)
    assert latents.shape == expected.shape and tokenizer.fingerprint() == fingerprint
    assert {p.dtype for p in tokenizer.cpu().network.parameters()} == {torch.float32}


# ---- pixels, padding, normalisation ----------------------------------------------------------------------------------------------


def test_preprocessing_by_hand(network: Any, wrap: Wrap, clip: Clip, signed: Signed) -> None:
    tokenizer = wrap(network, frame_size=(16, 16), upsampled_size=(32, 32))
    frames = clip(3, batch=2)
    frames[:, 0], frames[:, 1, :, :8], frames[:, 1, :, 8:] = 7, 0, 255
    pixels = tokenizer._preprocess(frames)
    assert pixels.shape == (2, 3, 3, 32, 32) and pixels.aminmax() == (-1, 1)
    expected = F.interpolate(frames[1].float() / 127.5 - 1, scale_factor=4 // 2, mode="bicubic")
    assert expected.abs().max() > 1.01  # the edge overshoots: clamping does something
    torch.testing.assert_close(pixels[1].transpose(0, 1), expected.clamp(-1, 1))
    torch.testing.assert_close(wrap(network)._preprocess(frames), signed(frames))


def test_what_is_scaled_up_comes_back_when_scaled_down(network: Any, wrap: Wrap) -> None:
    tokenizer = wrap(network, frame_size=(16, 16), upsampled_size=(64, 64))
    ramp = torch.linspace(20, 230, 16).expand(16, 16)
    frames = torch.stack([ramp, ramp.T, (ramp + ramp.T) / 2]).to(torch.uint8)[None, None]
    back = tokenizer._postprocess(tokenizer._preprocess(frames))
    assert back.shape == frames.shape and (back.int() - frames.int()).abs().max() <= 3


@pytest.mark.parametrize("num_frames", [2, 9, 10, 16])
def test_the_last_frame_fills_up(network: Any, num_frames: int, wrap: Wrap, clip: Clip) -> None:
    tokenizer, frames = wrap(network), clip(17)[:, :num_frames]
    missing = -(num_frames - 1) % 8
    full = torch.cat([frames] + [frames[:, -1:]] * missing, dim=1)
    assert torch.equal(tokenizer.encode(frames), tokenizer.encode(full))


def test_two_sets_of_statistics_by_hand(network: Any, wrap: Wrap, clip: Clip, raw_encode: RawEncode) -> None:
    mean, std = latent_statistics(network)
    table = torch.tensor(network.config.latents_mean).reshape(16, 16)  # channel by channel, 16 positions each
    torch.testing.assert_close(mean, torch.stack([table[:, 0], table[:, 1:].sum(1) / 15]))
    assert mean[0, 0].item() == pytest.approx(0.11362758) and std[0, 0].item() == pytest.approx(0.56700271)
    assert std[1].min() > 0.6 > std[0].min()
    frames = clip(17)
    raw = raw_encode(network, frames)
    expected = torch.stack([(raw[0, :, t] - mean[min(t, 1)][:, None, None]) / std[min(t, 1)][:, None, None] for t in range(3)])
    tokens = wrap(network).encode(frames)
    torch.testing.assert_close(tokens[0], expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_per_frame_is_each_frame_alone_with_the_first_set(network: Any, wrap: Wrap, clip: Clip, raw_encode: RawEncode) -> None:
    mean, std = latent_statistics(network)
    tokenizer, frames = wrap(network, time_mode="per_frame"), clip(5, batch=2)
    latents = tokenizer.encode(frames)
    for row, t in ((0, 0), (1, 3)):
        raw = raw_encode(network, frames[row : row + 1, t : t + 1])[0, :, 0]
        expected = (raw - mean[0][:, None, None]) / std[0][:, None, None]
        torch.testing.assert_close(latents[row, t], expected.flatten(1).T, atol=1e-5, rtol=1e-5)
    alone = tokenizer.decode(latents[1:, 3:4])
    assert (tokenizer.decode(latents)[1:, 3:4].int() - alone.int()).abs().max() <= 1
    cache = tokenizer.new_cache(2, "encoder")
    pieces = torch.cat([tokenizer.encode(frames[:, t : t + 1], cache) for t in range(5)], dim=1)
    torch.testing.assert_close(pieces, latents, atol=1e-5, rtol=1e-5)


def test_decoding_undoes_the_normalisation(network: Any, wrap: Wrap, clip: Clip, raw_encode: RawEncode) -> None:
    tokenizer, frames = wrap(network), clip(17)
    with torch.no_grad():
        expected = to_uint8(network.decode(raw_encode(network, frames)).sample).transpose(1, 2)
    assert (tokenizer.decode(tokenizer.encode(frames)).int() - expected.int()).abs().max() <= 1


def test_a_window_from_within_an_episode_has_no_first_frame(network: Any, wrap: Wrap) -> None:
    tokenizer = wrap(network)
    latents = torch.randn(1, 3, 4, 16)
    mean, std = tokenizer.latent_mean, tokenizer.latent_std
    shifted = latents.clone()  # the same values before normalisation, whichever set is used
    shifted[:, 0] = (latents[:, 0] * std[1] + mean[1] - mean[0]) / std[0]
    inside = tokenizer.decode(latents, is_start=False)
    assert (inside.int() - tokenizer.decode(shifted).int()).abs().max() <= 1
    assert not torch.equal(inside, tokenizer.decode(latents))


# ---- projection --------------------------------------------------------------------------------------------------------------------


def test_projection_loses_less_than_the_mean(network: Any, wrap: Wrap, clip: Clip) -> None:
    settings = {"upsampled_size": (32, 32), "num_latent_tokens": 4, "latent_dim": 16}
    tokenizer = wrap(network, spatial_mode="project", **settings)
    with pytest.raises(ValueError, match="not fitted yet"):
        tokenizer.encode(clip(1))
    positions = torch.cat([tokenizer.encode_positions(clip(17)) for _ in range(8)])
    tokenizer.fit_projection(positions)
    tokens = tokenizer._to_tokens(positions)
    restored = tokenizer._from_tokens(tokens)
    means = F.interpolate(F.avg_pool3d(positions, (1, 2, 2)), scale_factor=(1, 2, 2))  # the mean, put back at each of its positions
    assert (restored - positions).square().mean() < 0.5 * (means - positions).square().mean()
    torch.testing.assert_close(tokens.flatten(0, 2).std(0), torch.ones(16), atol=1e-2, rtol=0)
    whole = wrap(network, spatial_mode="project", **settings | {"latent_dim": 64})
    whole.fit_projection(positions)
    torch.testing.assert_close(whole._from_tokens(whole._to_tokens(positions)), positions, atol=1e-3, rtol=1e-3)


def test_errors_of_fitting(network: Any, wrap: Wrap) -> None:
    with pytest.raises(ValueError, match="spatial_mode is none; only project has a projection to fit"):
        wrap(network).fit_projection(torch.zeros(1, 16, 1, 2, 2))
    tokenizer = wrap(network, spatial_mode="project", num_latent_tokens=4, latent_dim=4)
    with pytest.raises(ValueError, match=r"expected \(B, 16, T, \*\(2, 2\)\)"):
        tokenizer.fit_projection(torch.zeros(1, 16, 1, 4, 4))
