"""Windows, shuffled actions and dreams for the evaluation of the world model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamer.data import EpisodeStore, EpisodeWriter, LatentStore, episode_from_transitions, pretokenize
from dreamer.evaluation import open_loop
from dreamer.evaluation.open_loop import draw_windows, other_windows, score
from dreamer.evaluation.video import COPY_LAST_FRAME, RECONSTRUCTION, SHUFFLED_ACTIONS, TRUE_ACTIONS
from dreamer.imagination import Sampler
from dreamer.models import Agent
from dreamer.types import ActionComponent, ActionSpace

SPACE = ActionSpace((ActionComponent("action", "categorical", 255),))
CODE = 50  # frame and action t of episode e say CODE * e + t
LENGTHS = {1: (6, 9, 12, 3), 3: (19, 20, 25, 4)}


class CodeTokenizer:
    """Lossless for grey frames: a latent step holds the grey levels of its P frames. An episode's first step, of one frame, is coded with
    the other sign, so that decoding must know where a window begins."""

    token_grid, frame_shape = (1, 1), (3, 12, 12)
    can_decode = can_decode_windows = True
    can_stream = False

    def __init__(self, stride: int) -> None:
        self.temporal_stride = self.latent_channels = stride

    def encode(self, frames: Tensor) -> Tensor:
        codes, stride = frames[:, :, 0, 0, 0].float(), self.temporal_stride
        first, rest = codes[:, :1].expand(-1, stride), codes[:, 1:]
        missing = -rest.shape[1] % stride
        rest = torch.cat([rest, rest[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, stride))
        return torch.cat([-first.unsqueeze(1) if stride > 1 else first.unsqueeze(1), rest], dim=1).unsqueeze(2)

    def decode(self, latents: Tensor, *, is_start: bool = True) -> Tensor:
        first = latents[:, 0, 0, -1:] * (-1 if is_start and self.temporal_stride > 1 else 1)
        codes = torch.cat([first, latents[:, 1:, 0].flatten(1)], dim=1)
        return codes[:, :, None, None, None].expand(-1, -1, *self.frame_shape).to(torch.uint8)

    def fingerprint(self) -> str:
        return "t"


class FromTheStart(CodeTokenizer):
    can_decode_windows = False


def make_stores(path: Path, stride: int) -> tuple[EpisodeStore, LatentStore]:
    with EpisodeWriter(path / "frames", SPACE, frames_per_second=10.0) as frames:
        for e, length in enumerate(LENGTHS[stride]):
            codes = CODE * e + np.arange(length)
            actions = codes[:, None].astype(np.float32)
            pictures = np.broadcast_to(codes.astype(np.uint8)[:, None, None, None], (length, 3, 12, 12)).copy()
            frames.add(episode_from_transitions(pictures, actions[:-1], np.zeros(length - 1), False))
    return EpisodeStore(path / "frames"), pretokenize(EpisodeStore(path / "frames"), CodeTokenizer(stride), path / "latents")


@pytest.fixture
def stores(tmp_path: Path) -> tuple[EpisodeStore, LatentStore]:
    return make_stores(tmp_path, stride=1)


ONE = CodeTokenizer(1)


class FakeDynamics:
    device = torch.device("cpu")


class FakeSampler:
    """A world in which the frame after action a is a + 1: what the recordings do."""

    dynamics = FakeDynamics()

    def generate(self, latents: Tensor, prev_actions: Tensor, known: Tensor, *, task: Tensor, generator: torch.Generator) -> Tensor:
        assert known[:, latents.shape[1] :].all()
        return (prev_actions[:, latents.shape[1] :, :, 0] + 1).unsqueeze(2)


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
    windows = draw_windows(*stores, [0, 1, 2, 3], tokenizer=ONE, num_steps=5, num_windows=9, seed=0)
    assert windows.frames.shape == (9, 5, 3, 12, 12)
    assert torch.equal(windows.frames[:, :, 0, 0, 0].float(), windows.batch.latents[:, :, 0, 0])
    assert sorted(np.unique(windows.episodes, return_counts=True)[1]) == [3, 3, 3]  # evenly; the short episode is left out
    assert (windows.frames[:, 0, 0, 0, 0].numpy() // CODE == windows.episodes).all()
    again = draw_windows(*stores, [0, 1, 2, 3], tokenizer=ONE, num_steps=5, num_windows=9, seed=0)
    assert torch.equal(again.frames, windows.frames)
    assert not torch.equal(draw_windows(*stores, [0, 1, 2, 3], tokenizer=ONE, num_steps=5, num_windows=9, seed=1).frames, windows.frames)


def test_only_the_given_episodes_are_drawn_from(stores: tuple[EpisodeStore, LatentStore]) -> None:
    assert set(draw_windows(*stores, [1, 3], tokenizer=ONE, num_steps=3, num_windows=7, seed=0).episodes.tolist()) == {1, 3}
    with pytest.raises(ValueError, match="windows of 10 steps do not fit: the longest episode to draw from has 9"):
        draw_windows(*stores, [0, 1], tokenizer=ONE, num_steps=10, num_windows=4, seed=0)


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_actions_come_from_another_episode(seed: int) -> None:
    rng = np.random.default_rng(seed)
    episodes = rng.permutation(np.repeat(rng.choice(50, 6, replace=False), [3, 2, 2, 1, 1, 3]))
    other = other_windows(episodes, np.zeros(12, int), 5, torch.Generator().manual_seed(seed))
    assert other is not None
    assert sorted(other.tolist()) == list(range(12)) and (episodes[other.numpy()] != episodes).all()


def test_one_of_several_episodes_with_most_of_the_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="3 of 4 windows are of one episode"):
        other_windows(np.array([1, 1, 1, 2]), np.arange(4), 1, torch.Generator())


@pytest.mark.parametrize("seed", range(5))
def test_windows_of_one_episode_take_the_actions_of_one_far_away(seed: int) -> None:
    starts = np.random.default_rng(seed).integers(100, size=16)
    other = other_windows(np.full(16, 3), starts, 20, torch.Generator())
    assert other is not None and sorted(other.tolist()) == list(range(16))
    assert np.abs(starts[other.numpy()] - starts).min() >= 20


def test_windows_that_lie_too_close_are_not_shuffled(caplog: pytest.LogCaptureFixture) -> None:
    """Of the starts 0 2 7 9, the best turn brings 0 to 7, 2 to 9 and back: 7 steps."""
    episodes, starts = np.full(4, 3), np.array([7, 0, 9, 2])
    other = other_windows(episodes, starts, 7, torch.Generator())
    assert other is not None and other.tolist() == [1, 0, 3, 2]
    assert other_windows(episodes, starts, 8, torch.Generator()) is None
    assert "no shuffled actions: windows of one episode, nearer than 8 steps" in caplog.text


def test_predictions_follow_their_actions(stores: tuple[EpisodeStore, LatentStore]) -> None:
    windows = draw_windows(*stores, [0, 1, 2], tokenizer=ONE, num_steps=5, num_windows=6, seed=0)
    fakes = cast(Agent, FakeAgent()), ONE, cast(Sampler, FakeSampler())
    clips = open_loop.predict(*fakes, windows, 2, seed=0)
    assert list(clips) == [TRUE_ACTIONS, SHUFFLED_ACTIONS, COPY_LAST_FRAME, RECONSTRUCTION]
    assert all(torch.equal(clip[:, :2], windows.frames[:, :2]) for clip in clips.values())  # the context is the same in all
    assert torch.equal(clips[TRUE_ACTIONS], windows.frames) and torch.equal(clips[RECONSTRUCTION], windows.frames)
    own = windows.episodes
    played = clips[SHUFFLED_ACTIONS][:, 2:, 0, 0, 0].numpy() // CODE
    assert (played != own[:, None]).all()
    assert torch.equal(clips[COPY_LAST_FRAME][:, 2:], windows.frames[:, 1:2].expand(-1, 3, -1, -1, -1))
    result = score(windows, clips, context=2, stride=1, fps=10.0, seed=0)
    assert (result.context, result.horizon, result.num_windows, result.num_episodes) == (2, 3, 6, 3)
    assert result.scores[TRUE_ACTIONS].psnr.value == 100.0 > result.scores[COPY_LAST_FRAME].psnr.value
    assert result.psnr_gaps[SHUFFLED_ACTIONS].value > 10


def test_the_windows_of_one_held_out_episode_trade_actions_that_do_not_overlap(stores: tuple[EpisodeStore, LatentStore]) -> None:
    """Windows of 3 steps of an episode of 12, one of them dreamed: its actions come from another place."""
    windows = draw_windows(*stores, [2], tokenizer=ONE, num_steps=3, num_windows=6, seed=1)
    fakes = cast(Agent, FakeAgent()), ONE, cast(Sampler, FakeSampler())
    clips = open_loop.predict(*fakes, windows, 2, seed=0)
    played, own = (clip[:, 2:, 0, 0, 0].numpy() for clip in (clips[SHUFFLED_ACTIONS], windows.frames))
    assert len(np.unique(windows.starts)) > 3 and (played != own).all() and sorted(played.ravel()) == sorted(own.ravel())
    close = draw_windows(*stores, [2], tokenizer=ONE, num_steps=9, num_windows=4, seed=0)  # 7 dreamed steps: always the same ones
    assert SHUFFLED_ACTIONS not in open_loop.predict(*fakes, close, 2, seed=0)


def test_windows_of_a_stride_begin_anywhere_and_show_whole_steps(tmp_path: Path) -> None:
    """Episode 1 has 20 frames: 6 whole latent steps after the first (frames 1-3, .. 16-18), frame 19 begins one that is not whole."""
    stores, tokenizer = make_stores(tmp_path, stride=3), CodeTokenizer(3)
    assert stores[1].lengths[1] == 8
    windows = draw_windows(*stores, [1], tokenizer=tokenizer, num_steps=6, num_windows=8, seed=0)
    shown = windows.frames[:, :, 0, 0, 0].numpy() - CODE
    assert windows.frames.shape[1] == 1 + 3 * 5
    for begins, codes in zip(windows.is_start.tolist(), shown, strict=True):
        assert codes.tolist() == (list(range(16)) if begins else list(range(3, 19)))
    assert 0 < windows.is_start.sum() < 8
    assert (windows.batch.prev_actions[~windows.is_start, 0, :, 0] == torch.tensor([50.0, 51, 52])).all()  # led to frames 1, 2, 3
    assert torch.equal(open_loop.decode(tokenizer, windows.batch.latents, windows.is_start, torch.device("cpu")), windows.frames)
    with pytest.raises(ValueError, match="windows of 8 steps do not fit: the longest episode to draw from has 7"):
        draw_windows(*stores, [1], tokenizer=tokenizer, num_steps=8, num_windows=8, seed=0)


def test_a_tokenizer_that_decodes_from_the_start_only_gets_such_windows(tmp_path: Path) -> None:
    stores = make_stores(tmp_path, stride=3)
    windows = draw_windows(*stores, [0, 1, 2], tokenizer=FromTheStart(3), num_steps=4, num_windows=9, seed=0)
    assert windows.is_start.all()
    assert (windows.frames[:, 0, 0, 0, 0].numpy() == CODE * windows.episodes).all()


def test_dreams_of_a_stride_are_scored_over_the_frames_after_the_context(tmp_path: Path) -> None:
    """Context of 2 latent steps: frames 0 .. 3 of a window. The dream of 2 more: its frames 4 .. 9."""
    tokenizer = CodeTokenizer(3)
    windows = draw_windows(*make_stores(tmp_path, stride=3), [0, 1, 2], tokenizer=tokenizer, num_steps=4, num_windows=9, seed=0)
    assert 0 < windows.is_start.sum() < 9
    clips = open_loop.predict(cast(Agent, FakeAgent()), tokenizer, cast(Sampler, FakeSampler()), windows, 2, seed=0)
    assert torch.equal(clips[TRUE_ACTIONS], windows.frames) and torch.equal(clips[RECONSTRUCTION], windows.frames)
    assert torch.equal(clips[SHUFFLED_ACTIONS][:, :4], windows.frames[:, :4])
    assert (clips[SHUFFLED_ACTIONS][:, 4:, 0, 0, 0].numpy() // CODE != windows.episodes[:, None]).all()
    result = score(windows, clips, context=2, stride=3, fps=20.0, seed=0)
    assert (result.context, result.horizon, len(result.scores[COPY_LAST_FRAME].psnr_per_step)) == (4, 6, 6)
    # copying frame 3 is off by 1 .. 6 grey levels: the mean square of these is 91 / 6
    assert result.scores[COPY_LAST_FRAME].psnr.value == pytest.approx(10 * np.log10(255**2 * 6 / 91))
    assert result.scores[COPY_LAST_FRAME].psnr_per_step[0].value == pytest.approx(10 * np.log10(255**2))
    spoiled = {TRUE_ACTIONS: clips[TRUE_ACTIONS].clone()}
    spoiled[TRUE_ACTIONS][:, :4] = 0  # frames of the context are not scored
    assert score(windows, spoiled, context=2, stride=3, fps=20.0, seed=0).scores[TRUE_ACTIONS].psnr.value == 100.0
