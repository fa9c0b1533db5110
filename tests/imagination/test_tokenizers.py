"""Latent windows from an episode's start and from within, decoded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dreamer.imagination.tokenizers import decode_windows, decodes_windows
from dreamer.models import CosmosTokenizerWrapper

MakeCosmos = Callable[..., CosmosTokenizerWrapper]


def test_each_window_is_decoded_as_what_it_is(make_cosmos: MakeCosmos) -> None:
    tokenizer = make_cosmos()
    latents = torch.randn(5, 2, 4, 16)
    is_start = torch.tensor([False, True, False, False, True])
    frames = decode_windows(tokenizer, latents, is_start)
    assert frames.shape == (5, 9, 3, 16, 16)
    for row, begins in enumerate(is_start.tolist()):
        own, other = (tokenizer.decode(latents[row : row + 1], is_start=value)[0].int() for value in (begins, not begins))
        assert (frames[row].int() - own).abs().max() <= 1 < (frames[row].int() - other).abs().max()
    for value in (True, False):
        assert torch.equal(decode_windows(tokenizer, latents, torch.full((5,), value)), tokenizer.decode(latents, is_start=value))


def test_who_can_decode_windows_from_within(make_cosmos: MakeCosmos, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decodes_windows(make_cosmos()) and decodes_windows(make_cosmos(time_mode="per_frame"))
    monkeypatch.setattr(CosmosTokenizerWrapper, "can_decode_windows", False)
    tokenizer, latents = make_cosmos(), torch.randn(2, 2, 4, 16)
    assert not decodes_windows(tokenizer) and decodes_windows(make_cosmos(time_mode="per_frame"))
    decode_windows(tokenizer, latents, torch.tensor([True, True]))
    with pytest.raises(ValueError, match="1 of 2 windows begin within an episode.*temporal stride 8"):
        decode_windows(tokenizer, latents, torch.tensor([True, False]))
