"""Windows, shuffled actions and dreams for the evaluation of the world model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamer.data import EpisodeStore, EpisodeWriter, LatentStore, LatentWriter, episode_from_transitions
from dreamer.evaluation import open_loop
from dreamer.evaluation.open_loop import draw_windows, other_episodes, score
from dreamer.evaluation.video import COPY_LAST_FRAME, RECONSTRUCTION, SHUFFLED_ACTIONS, TRUE_ACTIONS
from dreamer.imagination import Sampler
from dreamer.models import Agent
from dreamer.types import ActionComponent, ActionSpace, Tokenizer

SPACE = ActionSpace((ActionComponent("action", "categorical", 200),))
LENGTHS = (6, 9, 12, 3)


@pytest.fixture
def stores(tmp_path: Path) -> tuple[EpisodeStore, LatentStore]:
    """Frame, latent and action at step t of episode e all say 20 e + t."""
    with (
        EpisodeWriter(tmp_path / "frames", SPACE, frames_per_second=10.0) as frames,
        LatentWriter(
            tmp_path / "latents",
            action_space=SPACE,
            tokenizer_fingerprint="t",
            token_grid=(1, 1),
            latent_channels=2,
            temporal_stride=1,
            source_fingerprint="s",
        ) as latents,
    ):
        for e, length in enumerate(LENGTHS):
            codes = 20 * e + np.arange(length)
            actions = codes[:, None].astype(np.float32)
            pictures = np.broadcast_to(codes.astype(np.uint8)[:, None, None, None], (length, 3, 12, 12)).copy()
            frames.add(episode_from_transitions(pictures, actions[:-1], np.zeros(length - 1), False))
            values = np.broadcast_to(codes.astype(np.float32)[:, None, None], (length, 1, 2)).copy()
            zeros = np.zeros(length, np.float32)
            latents.add(values, actions[:, None], np.ones((length, 1), bool), zeros, zeros.astype(bool))
    return EpisodeStore(tmp_path / "frames"), LatentStore(tmp_path / "latents")


class FakeDynamics:
    device = torch.device("cpu")


class FakeSampler:
    """A world in which the latent after action a is a + 1: what the recordings do."""

    dynamics = FakeDynamics()

    def generate(self, latents: Tensor, prev_actions: Tensor, known: Tensor, *, task: Tensor, generator: torch.Generator) -> Tensor:
        assert known[:, latents.shape[1] :].all()
        return (prev_actions[:, latents.shape[1] :, 0, :1] + 1).unsqueeze(2).expand(-1, -1, 1, 2)


class FakeTokenizer:
    temporal_stride = 1

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :, 0, :1, None, None].expand(-1, -1, 3, 12, 12).to(torch.uint8)


class FakeAgent:
    dynamics = FakeDynamics()


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fakes are no models: call the functions below their type checks."""
    for name in ("predict", "dream", "decode"):
        plain = getattr(open_loop, name)
        while hasattr(plain, "__wrapped__"):
            plain = plain.__wrapped__
        monkeypatch.setattr(open_loop, name, torch.no_grad()(plain))


def test_windows_show_the_same_steps_as_frames_and_latents(stores: tuple[EpisodeStore, LatentStore]) -> None:
    windows = draw_windows(*stores, [0, 1, 2, 3], num_steps=5, num_windows=9, seed=0)
    assert windows.frames.shape == (9, 5, 3, 12, 12)
    assert torch.equal(windows.frames[:, :, 0, 0, 0].float(), windows.batch.latents[:, :, 0, 0])
    assert sorted(np.unique(windows.episodes, return_counts=True)[1]) == [3, 3, 3]  # evenly; the short episode is left out
    assert (windows.frames[:, 0, 0, 0, 0].numpy() // 20 == windows.episodes).all()
    again = draw_windows(*stores, [0, 1, 2, 3], num_steps=5, num_windows=9, seed=0)
    assert torch.equal(again.frames, windows.frames)
    assert not torch.equal(draw_windows(*stores, [0, 1, 2, 3], num_steps=5, num_windows=9, seed=1).frames, windows.frames)


def test_only_the_given_episodes_are_drawn_from(stores: tuple[EpisodeStore, LatentStore]) -> None:
    assert set(draw_windows(*stores, [1, 3], num_steps=3, num_windows=7, seed=0).episodes.tolist()) == {1, 3}
    with pytest.raises(ValueError, match="windows of 10 steps do not fit: the longest held-out episode has 9"):
        draw_windows(*stores, [0, 1], num_steps=10, num_windows=4, seed=0)


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_actions_come_from_another_episode(seed: int) -> None:
    rng = np.random.default_rng(seed)
    episodes = rng.permutation(np.repeat(rng.choice(50, 6, replace=False), [3, 2, 2, 1, 1, 3]))
    other = other_episodes(episodes, torch.Generator().manual_seed(seed)).numpy()
    assert sorted(other) == list(range(12)) and (episodes[other] != episodes).all()


def test_shuffling_within_one_episode_is_refused() -> None:
    with pytest.raises(ValueError, match="3 of 4 windows are of one episode"):
        other_episodes(np.array([1, 1, 1, 2]), torch.Generator())


def test_predictions_follow_their_actions(stores: tuple[EpisodeStore, LatentStore]) -> None:
    windows = draw_windows(*stores, [0, 1, 2], num_steps=5, num_windows=6, seed=0)
    fakes = cast(Agent, FakeAgent()), cast(Tokenizer, FakeTokenizer()), cast(Sampler, FakeSampler())
    clips = open_loop.predict(*fakes, windows, 2, seed=0)
    assert list(clips) == [TRUE_ACTIONS, SHUFFLED_ACTIONS, COPY_LAST_FRAME, RECONSTRUCTION]
    assert all(torch.equal(clip[:, :2], windows.frames[:, :2]) for clip in clips.values())  # the context is the same in all
    assert torch.equal(clips[TRUE_ACTIONS], windows.frames) and torch.equal(clips[RECONSTRUCTION], windows.frames)
    own = windows.episodes
    played = clips[SHUFFLED_ACTIONS][:, 2:, 0, 0, 0].numpy() // 20
    assert (played != own[:, None]).all()
    assert torch.equal(clips[COPY_LAST_FRAME][:, 2:], windows.frames[:, 1:2].expand(-1, 3, -1, -1, -1))
    result = score(windows, clips, context=2, stride=1, fps=10.0, seed=0)
    assert (result.context, result.horizon, result.num_windows, result.num_episodes) == (2, 3, 6, 3)
    assert result.scores[TRUE_ACTIONS].psnr.value == 100.0 > result.scores[COPY_LAST_FRAME].psnr.value
    assert result.psnr_gaps[SHUFFLED_ACTIONS].value > 10


def test_one_held_out_episode_cannot_be_shuffled(stores: tuple[EpisodeStore, LatentStore]) -> None:
    windows = draw_windows(*stores, [2], num_steps=5, num_windows=4, seed=0)
    fakes = cast(Agent, FakeAgent()), cast(Tokenizer, FakeTokenizer()), cast(Sampler, FakeSampler())
    assert SHUFFLED_ACTIONS not in open_loop.predict(*fakes, windows, 2, seed=0)
