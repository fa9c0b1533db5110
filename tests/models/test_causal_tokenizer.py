"""The causal tokenizer in both layouts: what reads what, streaming, masking, normalisation, pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dreamer.models import CausalTokenizer, CausalTokenizerConfig, TransformerConfig
from dreamer.models.causal_tokenizer import to_signed, to_uint8
from dreamer.types import Tokenizer

TRANSFORMER = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, time_every=2, context_length=4)
CONTEXT = 4


def make(layout: str = "aligned", frame_shape: tuple[int, int, int] = (3, 16, 24), **changes) -> CausalTokenizer:
    settings = {
        "patch_size": 4,
        "token_grid": (2, 3),
        "latent_channels": 5,
        "layout": layout,
        "encoder": TRANSFORMER,
        "decoder": TRANSFORMER,
    }
    return CausalTokenizer(CausalTokenizerConfig(**settings | changes), frame_shape).eval()


def clip(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, 256, (batch, length, 3, 16, 24), dtype=torch.uint8)


@pytest.fixture(params=["aligned", "free"])
def tokenizer(request: pytest.FixtureRequest) -> CausalTokenizer:
    return make(request.param)


class Capture(nn.Module):
    """Stands where a transformer stood and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, **_: object) -> Tensor:
        self.seen.append(x)
        return x


def outputs_of(module: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    return seen


def test_it_is_a_tokenizer_with_its_shapes(tokenizer: CausalTokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    latents = tokenizer.encode(clip())
    assert latents.shape == (2, 6, 6, 5)
    frames = tokenizer.decode(latents)
    assert (frames.shape, frames.dtype) == ((2, 6, 3, 16, 24), torch.uint8)
    assert (tokenizer.temporal_stride, tokenizer.token_grid, tokenizer.latent_channels) == (1, (2, 3), 5)


def test_every_byte_survives_the_way_to_floats_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_signed(values)), values)
    assert to_signed(values).aminmax() == (-1.0, 1.0)
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.0])).tolist() == [0, 255, 128]


def test_patches_are_in_reading_order_and_unpatch_inverts_them(tokenizer: CausalTokenizer) -> None:
    frames = clip()
    patches = tokenizer.patches(frames)
    assert patches.shape == (2, 6, 24, 48)
    assert torch.equal(patches[0, 0, 7], to_signed(frames[0, 0, :, 4:8, 4:8]).flatten())  # 6 patches a row: the second of row 1
    assert torch.equal(to_uint8(tokenizer.unpatch(patches)), frames)


def test_encoding_is_causal_and_remembers(tokenizer: CausalTokenizer) -> None:
    frames = clip(length=3)
    other = frames.clone()
    other[:, 1] = 255 - other[:, 1]
    a, b = tokenizer.encode(frames), tokenizer.encode(other)
    assert [torch.equal(a[:, t], b[:, t]) for t in range(3)] == [True, False, False]


def test_decoding_is_causal_and_remembers(tokenizer: CausalTokenizer) -> None:
    latents = torch.randn(2, 3, 6, 5)
    other = latents.clone()
    other[:, 1] += 1
    a, b = (tokenizer.reconstruct(x.tanh()) for x in (latents, other))
    assert [torch.equal(a[:, t], b[:, t]) for t in range(3)] == [True, False, False]


@pytest.mark.parametrize("pieces", [[1] * 11, [3, 1, 7]])
def test_streaming_equals_the_whole_clip(tokenizer: CausalTokenizer, pieces: list[int]) -> None:
    frames = clip(length=11)  # longer than the context
    whole = tokenizer.encode(frames)
    with torch.no_grad():
        cache = tokenizer.new_cache(2, "encoder")
        latents = torch.cat([tokenizer.encode(x, cache) for x in frames.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(latents, whole, rtol=1e-4, atol=1e-5)
        cache = tokenizer.new_cache(2, "decoder")
        decoded = torch.cat([tokenizer.decode(x, cache) for x in whole.split(pieces, dim=1)], dim=1)
    assert (decoded.int() - tokenizer.decode(whole).int()).abs().max() <= 1


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 2), (1, 1)])
def test_an_aligned_token_holds_its_own_block_of_the_image(row: int, column: int) -> None:
    tokenizer, frames = make("aligned"), clip(1, 2)
    other, token = frames.clone(), 3 * row + column  # in a grid of 2 x 3 tokens of 8 x 8 pixels
    block = (0, slice(None), slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
    other[block] = 255 - other[block]
    a, b = tokenizer.encode(frames), tokenizer.encode(other)
    assert [torch.equal(a[:, :, n], b[:, :, n]) for n in range(6)] == [n != token for n in range(6)]

    latents = torch.zeros(1, 2, 6, 5)
    other = latents.clone()
    other[:, :, token] = 0.5
    changed = tokenizer.unpatch((tokenizer.reconstruct(latents) != tokenizer.reconstruct(other)).float()) > 0
    assert changed[block].all()
    assert changed.sum() == changed[block].numel()


def test_in_the_free_encoder_nothing_reads_the_latent_tokens() -> None:
    tokenizer = make("free")
    hidden, frames = outputs_of(tokenizer.encoder), clip()
    before = tokenizer.encode(frames)
    with torch.no_grad():
        tokenizer.latent_tokens.add_(1.0)
    after = tokenizer.encode(frames)
    assert torch.equal(hidden[0][:, :, :24], hidden[1][:, :, :24])
    assert not torch.equal(before, after)


def test_in_the_free_decoder_latents_read_only_each_other() -> None:
    tokenizer = make("free")
    hidden, latents = outputs_of(tokenizer.decoder), torch.randn(2, 4, 6, 5).tanh()
    before = tokenizer.reconstruct(latents)
    with torch.no_grad():
        tokenizer.query_position.add_(1.0)
    after = tokenizer.reconstruct(latents)
    assert torch.equal(hidden[0][:, :, :6], hidden[1][:, :, :6])
    assert not torch.equal(before, after)
    other = latents.clone()
    other[:, :, 0] = 0.9
    tokenizer.reconstruct(other)
    assert not torch.equal(hidden[1][:, :, 5], hidden[2][:, :, 5])  # they do read each other


def test_every_free_latent_sees_the_whole_image() -> None:
    tokenizer, frames = make("free"), clip(1, 1)
    other = frames.clone()
    other[..., :4, :4] = 255 - other[..., :4, :4]
    a, b = tokenizer.encode(frames), tokenizer.encode(other)
    assert all(not torch.equal(a[0, 0, n], b[0, 0, n]) for n in range(6))


def test_masking_drops_patches_with_a_chance_uniform_per_image(tokenizer: CausalTokenizer) -> None:
    capture = Capture()
    tokenizer.encoder = capture  # type: ignore[assignment]
    nn.init.zeros_(tokenizer.patch_in.weight)
    nn.init.ones_(tokenizer.patch_in.bias)
    nn.init.zeros_(tokenizer.patch_position)
    nn.init.constant_(tokenizer.masked_patch, 5.0)
    patches = torch.zeros(20, 50, 24, 48)
    tokenizer.bottleneck(patches, masking=0.8, generator=torch.Generator().manual_seed(0))
    tokens = capture.seen[0][:, :, :24]
    if tokenizer.config.layout == "aligned":  # blocks of 4 patches side by side in the batch
        tokens = tokens.unflatten(0, (20, 6)).transpose(1, 2).flatten(2, 3)
    dropped = (tokens == 5).all(-1)
    assert torch.equal(dropped, (tokens == 5).any(-1))  # a patch is dropped whole
    share = dropped.float().mean(-1)
    assert share.mean().item() == pytest.approx(0.4, abs=0.03)
    # uniform p has variance 0.8^2 / 12, and 24 draws add E[p (1 - p)] / 24: together a deviation of 0.247
    assert share.std().item() == pytest.approx(0.247, abs=0.02)
    assert dropped.float().mean(dim=(0, 1)).std() < 0.05  # no patch is special
    assert share.std(dim=1).min() > 0.1  # drawn per image, not per clip


def test_masking_depends_on_the_generator_and_encoding_never_masks(tokenizer: CausalTokenizer) -> None:
    tokenizer.train()
    frames = clip()
    patches = tokenizer.patches(frames)
    draws = [tokenizer.bottleneck(patches, 0.9, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(tokenizer.encode(frames), tokenizer.encode(frames))
    assert torch.equal(tokenizer.encode(frames), tokenizer.bottleneck(patches))


def test_normalised_latents_have_zero_mean_and_unit_deviation_per_channel(tokenizer: CausalTokenizer) -> None:
    batches = [clip(), clip(3, 4)]
    raw = [tokenizer.encode(f) for f in batches]
    decoded = tokenizer.decode(raw[0])
    tokenizer.fit_normalization(batches)
    latents = [tokenizer.encode(f) for f in batches]
    together = torch.cat([x.flatten(0, 2) for x in latents])
    torch.testing.assert_close(together.mean(0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(together.std(0), torch.ones(5), rtol=0, atol=1e-4)
    assert (tokenizer.decode(latents[0]).int() - decoded.int()).abs().max() <= 1  # decode takes the normalisation back
    assert tokenizer.latent_mean.unique().numel() == 5


def test_a_constant_channel_does_not_divide_by_zero(tokenizer: CausalTokenizer) -> None:
    nn.init.zeros_(tokenizer.to_latent.weight)
    tokenizer.fit_normalization([clip()])
    assert torch.isfinite(tokenizer.encode(clip())).all()


def test_latents_beyond_the_tanh_are_clamped_when_decoded(tokenizer: CausalTokenizer) -> None:
    assert torch.equal(tokenizer.decode(torch.full((1, 2, 6, 5), 40.0)), tokenizer.decode(torch.ones(1, 2, 6, 5)))


def test_the_bottleneck_is_bounded(tokenizer: CausalTokenizer) -> None:
    nn.init.normal_(tokenizer.to_latent.weight, std=10.0)
    assert tokenizer.bottleneck(tokenizer.patches(clip())).abs().max() <= 1


def test_the_fingerprint_changes_with_any_weight_and_setting(tokenizer: CausalTokenizer) -> None:
    original = tokenizer.fingerprint()
    assert tokenizer.fingerprint() == original
    for name, tensor in tokenizer.state_dict().items():
        saved = tensor.clone()
        tensor.flatten()[-1:].add_(0.5)
        assert tokenizer.fingerprint() != original, name
        tensor.copy_(saved)
    assert tokenizer.fingerprint() == original
    twin = make(tokenizer.config.layout)
    twin.load_state_dict(tokenizer.state_dict())
    assert twin.fingerprint() == original
    deeper = make(tokenizer.config.layout, max_masking=0.5)
    deeper.load_state_dict(tokenizer.state_dict())
    assert deeper.fingerprint() != original
    turned = make(tokenizer.config.layout)
    turned.load_state_dict(tokenizer.state_dict())
    turned.frame_shape = (3, 24, 16)  # as many patches, other frames
    assert turned.fingerprint() != original
    assert tokenizer.bfloat16().fingerprint() != original


@pytest.mark.parametrize("shape", [(3, 16, 20), (3, 18, 24), (3, 8, 24)])
def test_frames_that_do_not_divide_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{shape[1]}x{shape[2]}.*token_grid"):
        make(frame_shape=shape, token_grid=(4, 3))


def test_frames_of_another_size_are_refused(tokenizer: CausalTokenizer) -> None:
    with pytest.raises(ValueError, match=r"\(3, 24, 16\).*\(3, 16, 24\)"):
        tokenizer.encode(torch.zeros(1, 2, 3, 24, 16, dtype=torch.uint8))


def test_gradients_reach_every_parameter(tokenizer: CausalTokenizer) -> None:
    tokenizer.train()
    patches = tokenizer.patches(clip())
    out = tokenizer.reconstruct(tokenizer.bottleneck(patches, masking=0.9))
    (out - patches).square().mean().backward()
    assert [n for n, p in tokenizer.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_bfloat16_autocast_is_close_to_full_precision(tokenizer: CausalTokenizer) -> None:
    frames = clip()
    expected = tokenizer.encode(frames)
    with torch.autocast("cpu", torch.bfloat16):
        latents = tokenizer.encode(frames)
        out = tokenizer.reconstruct(tokenizer.bottleneck(tokenizer.patches(frames), masking=0.5))
    assert (latents.dtype, out.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(latents, expected, rtol=0.1, atol=0.1)


@pytest.mark.gpu
def test_on_a_gpu_frames_may_come_from_the_cpu() -> None:
    tokenizer, frames = make(), clip()
    expected = tokenizer.encode(frames)
    torch.testing.assert_close(tokenizer.cuda().encode(frames).cpu(), expected, rtol=1e-2, atol=1e-2)
