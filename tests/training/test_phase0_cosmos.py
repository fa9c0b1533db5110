"""Adapting the Cosmos tokenizer: what learns, at which rate, what stays frozen, and what comes out of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamer.models import CosmosTokenizerConfig, CosmosTokenizerWrapper
from dreamer.models.causal_tokenizer import to_signed
from dreamer.training.logging import RunLogger
from dreamer.training.loop import Trainer
from dreamer.training.models_io import load_tokenizer, tokenizer_info
from dreamer.training.phase0 import DECODER, ENCODER, CosmosAdaptationConfig, Phase0Config, Phase0Cosmos
from dreamer.training.validation import validate_latent_scale
from dreamer.types import FrameBatch

SETTINGS: dict[str, Any] = {"enabled": True, "frame_size": (16, 16), "upsampled_size": (16, 16), "spatial_mode": "none"}


def clips(count: int, length: int = 9) -> Tensor:
    """A bright square on grey, somewhere else in each clip."""
    frames = torch.full((count, length, 3, 16, 16), 90, dtype=torch.uint8)
    for i in range(count):
        frames[i, :, :, 2 + i % 8 : 8 + i % 8, 4:10] = 220
    return frames


@pytest.fixture
def make(small_cosmos: Callable[..., Any]) -> Callable[..., CosmosTokenizerWrapper]:
    def build(**changes: Any) -> CosmosTokenizerWrapper:
        tokenizer = CosmosTokenizerWrapper(CosmosTokenizerConfig(**SETTINGS | changes), small_cosmos())
        if tokenizer.projection is not None:
            tokenizer.fit_projection(tokenizer.encode_positions(torch.randint(0, 256, (4, 9, 3, 16, 16), dtype=torch.uint8)))
        return tokenizer

    return build


def config(adapt: str, steps: int = 4, rate: float = 1e-3, **changes: Any) -> Phase0Config:
    optim = {"learning_rate": rate, "warmup_steps": 0, "weight_decay": 0.0}
    train = {"steps": steps, "batch_size": 2, "optim": optim, "ema_decay": 0.0, "log_every": 1, "validate_every": steps}
    return Phase0Config.model_validate({"train": train, "num_frames": 9, "cosmos": {"adapt": adapt, **changes}})


def parts_with_gradient(tokenizer: CosmosTokenizerWrapper) -> set[str]:
    return {name.split(".")[1] for name, p in tokenizer.named_parameters() if p.grad is not None and bool(p.grad.any())}


class Clips:
    def __next__(self) -> FrameBatch:
        return FrameBatch(clips(2))

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("adapt", "spatial", "time", "expected"),
    [
        ("decoder", "none", "video", DECODER),
        ("decoder", "project", "per_frame", DECODER),
        ("all", "none", "per_frame", ENCODER + DECODER),
        ("all", "project", "video", ENCODER + DECODER),
    ],
)
def test_the_chosen_parts_learn_and_no_others(
    make: Callable[..., CosmosTokenizerWrapper], adapt: str, spatial: str, time: str, expected: tuple[str, ...]
) -> None:
    tokens = {"num_latent_tokens": 4, "latent_dim": 8} if spatial == "project" else {}
    tokenizer = make(spatial_mode=spatial, time_mode=time, **tokens)
    phase = Phase0Cosmos(tokenizer, config(adapt)).train()
    assert not any(module.training for module in tokenizer.modules())
    loss, metrics = phase(FrameBatch(clips(2)), 0, torch.Generator())
    loss.backward()
    assert parts_with_gradient(tokenizer) == set(expected) and set(metrics) == {"mse"}
    frozen = {name.split(".")[1] for name, p in tokenizer.named_parameters() if not p.requires_grad}
    assert frozen == set(ENCODER + DECODER) - set(expected)


@pytest.mark.parametrize("time", ["video", "per_frame"])
def test_what_adapts_is_what_decode_and_encode_do(make: Callable[..., CosmosTokenizerWrapper], time: str) -> None:
    tokenizer = make(time_mode=time, upsampled_size=(32, 32), spatial_mode="project", num_latent_tokens=4, latent_dim=8)
    frames = torch.randint(0, 256, (2, 9, 3, 16, 16), dtype=torch.uint8)
    through = tokenizer.decode(tokenizer.encode(frames))
    rebuilt = tokenizer.reconstruct(frames)
    assert rebuilt.shape == frames.shape
    torch.testing.assert_close(rebuilt.clamp(-1, 1), to_signed(through), atol=1 / 127, rtol=0)
    with pytest.raises(ValueError, match=r"this tokenizer takes at least one frame of \(3, 16, 16\)"):
        tokenizer.reconstruct(frames[..., :8])


def train(tokenizer: CosmosTokenizerWrapper, settings: Phase0Config, path: Path) -> tuple[Trainer, list[float]]:
    phase = Phase0Cosmos(tokenizer, settings)
    trainer = Trainer(phase, settings.train, path, seed=0, settings={}, model_info=tokenizer_info(tokenizer))
    trainer.run(lambda start: Clips())
    rows = [float(line.partition('"loss": ')[2].split(",")[0]) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return trainer, rows


def test_the_decoder_adapts_and_the_latents_stay(make: Callable[..., CosmosTokenizerWrapper], tmp_path: Path) -> None:
    before = make()
    _, losses = train(make(), config("decoder", steps=20, rate=3e-3), tmp_path)
    assert losses[-1] < 0.7 * losses[0]
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, CosmosTokenizerWrapper)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.train().training
    frames = clips(2)
    assert torch.equal(loaded.encode(frames), before.encode(frames))
    errors = [(t.decode(t.encode(frames)).float() - frames.float()).square().mean() for t in (before, loaded)]
    assert errors[1] < 0.8 * errors[0]
    assert loaded.fingerprint() == before.fingerprint()  # as that of the latents


def test_the_encoder_learns_more_slowly(make: Callable[..., CosmosTokenizerWrapper], tmp_path: Path) -> None:
    """AdamW's first step moves every weight with a gradient by the learning rate, here 1e-3, and the encoder's by a tenth of it."""
    before = make()
    settings = config("all", steps=1)
    settings = settings.model_copy(update={"cosmos": CosmosAdaptationConfig(adapt="all", encoder_rate_factor=0.1)})
    trainer, _ = train(make(), settings, tmp_path)
    assert len(trainer.optimizers[0].param_groups) == 2
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, CosmosTokenizerWrapper)
    moved = {
        name: float((a - b).abs().max())
        for (name, a), b in zip(before.network.named_parameters(), loaded.network.parameters(), strict=True)
        if a.dim() > 1 and "temp_attentions" not in name  # with two latent steps they hardly matter
    }
    for name, distance in moved.items():
        expected = 1e-4 if name.startswith(ENCODER) else 1e-3
        assert distance == pytest.approx(expected, rel=0.01), name
    assert torch.equal(loaded.latent_mean, before.latent_mean) and torch.equal(loaded.latent_std, before.latent_std)


def test_how_far_latents_have_moved(make: Callable[..., CosmosTokenizerWrapper], tmp_path: Path) -> None:
    tokenizer, frames = make(), torch.randint(0, 256, (2, 9, 3, 16, 16), dtype=torch.uint8)
    hook = validate_latent_scale(Phase0Cosmos(tokenizer, config("all")), frames)
    latents = tokenizer.encode(frames)
    with RunLogger(tmp_path, "x", total_steps=1, tensorboard=False) as logger:
        found = hook(logger, 0)
    assert found == pytest.approx({"val_latent_mean": float(latents.mean()), "val_latent_std": float(latents.std())})


def test_means_cannot_teach_a_decoder(make: Callable[..., CosmosTokenizerWrapper]) -> None:
    tokenizer = make(spatial_mode="mean", num_latent_tokens=4)
    with pytest.raises(ValueError, match="spatial_mode mean keeps too little"):
        Phase0Cosmos(tokenizer, config("decoder"))
