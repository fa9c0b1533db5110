"""The dream that somebody plays in: what it depends on, who acts, what is beside it, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreamer.config import DreamerConfig
from dreamer.data import EpisodeStore
from dreamer.models import Agent, AgentConfig, CosmosTokenizerConfig, CosmosTokenizerWrapper, DynamicsConfig, HeadConfig, TransformerConfig
from dreamer.player import recording
from dreamer.player.engine import DreamSession, DreamSettings, Moment, default_settings
from dreamer.player.source import DreamSource, open_source
from dreamer.types import ActionComponent, ActionSpace
from dreamer.yaml_config import load_config, save_config

LEFT, DO = np.array([1], np.float32), np.array([5], np.float32)


@pytest.fixture
def play(source: DreamSource) -> Callable[..., list[Moment]]:
    def run(*rows: np.ndarray, mode: Any = None, place: tuple[int, int] = (1, 6), **changes: Any) -> list[Moment]:
        settings = DreamSettings(**default_settings(source).model_dump() | changes)
        session = DreamSession(source, source.recorded(*place, settings.context), settings)
        session.mode = mode
        return [session.now, *(session.tick(row) for row in rows)]

    return run


def same(a: list[Moment], b: list[Moment]) -> list[bool]:
    return [np.array_equal(x.picture, y.picture) for x, y in zip(a, b, strict=True)]


def test_frames_depend_on_the_action_and_on_nothing_that_comes_later(play: Callable[..., list[Moment]]) -> None:
    assert same(play(LEFT, LEFT, LEFT), play(LEFT, DO, LEFT)) == [True, True, False, False]


def test_the_seed_makes_the_noise(play: Callable[..., list[Moment]]) -> None:
    one, again, other = play(LEFT, LEFT, seed=3), play(LEFT, LEFT, seed=3), play(LEFT, LEFT, seed=4)
    assert same(one, again) == [True] * 3 and same(one, other) == [True, False, False]
    assert [m.reward for m in one] == [m.reward for m in again]


def test_the_dream_depends_on_the_context_that_it_is_shown(play: Callable[..., list[Moment]]) -> None:
    assert same(play(LEFT, context=2), play(LEFT, context=6)) == [True, False]  # the last frame is the same


def test_the_dream_begins_where_the_recording_is(play: Callable[..., list[Moment]], source: DreamSource) -> None:
    decoded = play(place=(1, 6))[0].picture.astype(int)
    errors = [np.abs(decoded - source.recorded(1, step, 4).picture).mean() for step in range(4, 9)]
    recorded = source.episodes.frames(1, 6, 7)[0].transpose(1, 2, 0)
    assert np.array_equal(source.recorded(1, 6, 4).picture, recorded)
    assert np.argmin(errors) == 2 or len(set(errors)) < 5  # frames may stand still


def test_denoising_steps_change_in_mid_dream(source: DreamSource) -> None:
    settings = DreamSettings(num_steps=2, context=4)
    sessions = [DreamSession(source, source.recorded(1, 6, 4), settings) for _ in range(2)]
    sessions[1].set(DreamSettings(num_steps=8, context=4))
    assert not np.array_equal(*(s.tick(LEFT).picture for s in sessions))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context": 9}, "context is 9; expected 1 to 8 latent steps"),
        ({"num_steps": 3}, "K is 3; expected one of 1, 2, 4, 8"),
        ({"num_steps": 16}, "K is 16; expected one of 1, 2, 4, 8"),
    ],
)
def test_settings_that_the_model_does_not_allow(source: DreamSource, changes: dict[str, int], said: str) -> None:
    session = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(context=4))
    before = session.settings
    with pytest.raises(ValueError, match=said):
        session.set(DreamSettings(**{"context": 4} | changes))
    assert session.settings == before


@pytest.mark.parametrize(
    ("place", "said"),
    [((99, 0), "episode is 99"), ((1, 99), "step is 99; episode 1 has the latent steps 0 to 20")],
)
def test_places_that_are_not_there(source: DreamSource, place: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        source.recorded(*place, 4)


def test_early_starts_have_a_shorter_context(source: DreamSource) -> None:
    assert source.recorded(1, 2, 8).batch.latents.shape[1] == 3 and source.recorded(1, 2, 8).is_start
    assert source.recorded(1, 9, 8).batch.latents.shape[1] == 8 and not source.recorded(1, 9, 8).is_start


def test_the_policy_takes_over_and_gives_back(source: DreamSource) -> None:
    session = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(context=4))
    assert not session.tick(LEFT).is_by_policy
    session.mode = "argmax"
    expected = source.agent.policy.now(session._features).mode()[0, 0].numpy()
    moment = session.tick(LEFT)
    assert moment.is_by_policy and np.array_equal(moment.row, expected)
    session.mode = None
    moment = session.tick(DO)
    assert not moment.is_by_policy and moment.row.tolist() == [5]


def test_sampled_actions_follow_the_seed(play: Callable[..., list[Moment]]) -> None:
    def actions(seed: int) -> list[float]:
        return [float(m.row[0]) for m in play(*[LEFT] * 8, mode="sampled", seed=seed)[1:]]

    assert actions(0) == actions(0) and len({tuple(actions(seed)) for seed in range(4)}) > 1


def test_heads_that_were_not_trained_say_nothing(run_path: Path) -> None:
    values = {}
    for phase in ("phase1", "phase2", "phase3"):
        source = open_source(run_path / phase)
        moment = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(context=4)).tick(LEFT)
        values[phase] = [x is not None for x in (moment.reward, moment.continues, moment.value)]
    assert values == {"phase1": [False] * 3, "phase2": [True, True, False], "phase3": [True] * 3}
    session = DreamSession(open_source(run_path / "phase1"), source.recorded(1, 6, 4), DreamSettings(context=4))
    session.mode = "sampled"
    with pytest.raises(ValueError, match="phase 1 trains no policy"):
        session.tick(LEFT)


def test_when_the_model_says_that_it_is_over_it_is(source: DreamSource, monkeypatch: pytest.MonkeyPatch) -> None:
    session = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(context=4))
    monkeypatch.setattr(source.agent.continue_, "mean", lambda features: torch.tensor([0.4]))
    assert session.tick(LEFT).is_over and session.now.continues == pytest.approx(0.4)
    with pytest.raises(ValueError, match="the dream is over"):
        session.tick(LEFT)
    assert session.begin(session.start).index == 0 and session.tick(LEFT).index == 1


def test_actions_outside_the_space_are_refused(source: DreamSource) -> None:
    session = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(context=4))
    with pytest.raises(ValueError, match="expected \\[0, 5\\]"):
        session.tick(np.array([6], np.float32))
    assert session.tick(LEFT).index == 1


# ---- the real environment beside


def test_the_real_environment_starts_at_the_recorded_frame_and_does_the_same(source: DreamSource) -> None:
    session = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(context=4), has_real=True)
    assert session.real_problem is None and np.array_equal(session.now.real, session.start.picture)
    actions = source.episodes.arrays(1, 6, 9)["actions"]
    seen = [session.tick(row).real.transpose(2, 0, 1) for row in actions]
    assert np.array_equal(np.stack(seen), source.episodes.frames(1, 7, 10))


def test_a_new_real_episode_is_the_context_of_one_frame(source: DreamSource) -> None:
    start = source.from_environment(5)
    assert start.batch.latents.shape[1] == 1 and not start.batch.prev_action_mask.any()
    session = DreamSession(source, start, DreamSettings(context=4), has_real=True)
    assert np.array_equal(session.now.real, start.picture)
    assert not np.array_equal(source.from_environment(6).picture, start.picture)


def test_where_nobody_knows_the_way_the_real_environment_stays_away(source: DreamSource) -> None:
    start = source.from_picture(np.zeros((64, 64, 3), np.uint8), "image", "your image")
    session = DreamSession(source, start, DreamSettings(context=4), has_real=True)
    assert "your image: nobody knows" in session.real_problem and session.tick(LEFT).real is None


def test_an_environment_that_shows_another_frame_is_not_shown(source: DreamSource) -> None:
    start = source.recorded(1, 6, 4)
    start.picture[0, 0] ^= 1
    session = DreamSession(source, start, DreamSettings(context=4), has_real=True)
    assert "shows another frame" in session.real_problem and session.now.real is None


# ---- what is kept


def test_a_recording_becomes_an_episode_in_the_time_contract(source: DreamSource, tmp_path: Path) -> None:
    session = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(context=4, seed=7), has_real=True)
    session.tick(LEFT)
    session.record(True)
    moments = [session.now, session.tick(DO), session.tick(LEFT)]
    session.record(False)
    session.tick(DO)  # no part of it
    kept = session.recording
    assert kept.store(tmp_path / "played", source.agent.action_space, source.fps, has_rewards=True) == 0
    store = EpisodeStore(tmp_path / "played")
    episode = store.episode(0)
    assert np.array_equal(episode.frames, np.stack([m.picture.transpose(2, 0, 1) for m in moments]))
    assert episode.actions[:, 0].tolist() == [5, 1, 0] and episode.action_mask.tolist() == [True, True, False]
    assert episode.rewards.tolist() == pytest.approx([0, moments[1].reward, moments[2].reward]) and not episode.terminals.any()
    assert store.fps == source.fps and episode.info["seed"] == 7 and episode.info["rewards"] == "predicted"
    assert kept.store(tmp_path / "played", source.agent.action_space, source.fps, has_rewards=True) == 1
    assert kept.mp4(source.fps)[4:8] == b"ftyp" and len(kept.real) == 3


def test_without_trained_heads_a_recording_has_no_rewards(source: DreamSource) -> None:
    session = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(context=4))
    session.record(True)
    session.tick(DO)
    episode = session.recording.episode(has_rewards=False)
    assert not episode.has_rewards and not episode.rewards.any()


def test_recordings_are_bounded(source: DreamSource, monkeypatch: pytest.MonkeyPatch) -> None:
    session = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(context=4))
    monkeypatch.setattr(recording, "MAX_BYTES", 4 * session.now.picture.nbytes)
    session.record(True)
    for _ in range(6):
        session.tick(LEFT)
    assert len(session.recording) == 4 and not session.is_recording


def test_an_empty_recording_is_not_stored(source: DreamSource, tmp_path: Path) -> None:
    session = DreamSession(source, source.recorded(1, 6, 4), DreamSettings(context=4))
    session.record(True)
    with pytest.raises(ValueError, match="one frame and no action"):
        session.recording.store(tmp_path / "played", source.agent.action_space, source.fps, True)


# ---- opening


def test_a_run_a_phase_and_a_checkpoint_open(run_path: Path) -> None:
    (checkpoint,) = (run_path / "phase2" / "checkpoints").iterdir()
    assert [open_source(p).phase for p in (run_path, run_path / "phase2", checkpoint)] == ["phase3", "phase2", "phase2"]


def test_latents_alone_can_be_played_if_somebody_says_how_fast(run_path: Path, tmp_path: Path) -> None:
    for part in ("tokenizer", "phase3"):
        (tmp_path / part).symlink_to(run_path / part)
    config = load_config(DreamerConfig, run_path / "config.yaml", [f"data.latents={run_path / 'latents'}"])
    save_config(config, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="give --fps"):
        open_source(tmp_path)
    source = open_source(tmp_path, fps=12.0)
    start = source.recorded(1, 6, 4)
    assert source.fps == 12 and start.env_seed is None
    assert np.array_equal(DreamSession(source, start, DreamSettings(context=4)).now.picture, start.picture)  # as it was decoded


@pytest.mark.parametrize(
    ("part", "options", "said"),
    [
        ("..", {}, "is no run and no part of one"),
        ("tokenizer", {}, "holds the model kind 'tokenizer'; expected 'agent'"),
        ("", {"env": "CartPole-v1"}, "expected the same"),
        ("", {"env": "no-such-env"}, "unknown environment 'no-such-env'"),
    ],
)
def test_what_cannot_be_played(run_path: Path, part: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_source(run_path / part, **options)


# ---- several frames a latent step

SPACE = ActionSpace((ActionComponent("move", "categorical", 5), ActionComponent("jump", "binary", 1)))


@pytest.fixture
def chunked(opened: DreamSource, small_cosmos: Callable[..., Any]) -> Callable[[int], DreamSource]:
    """A model of 8 frames a latent step, of random weights, that takes 8 actions or one."""
    config = CosmosTokenizerConfig(enabled=True, frame_size=(16, 16), upsampled_size=(16, 16), spatial_mode="none")
    tokenizer = CosmosTokenizerWrapper(config, small_cosmos())
    transformer = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, time_every=2, context_length=6)
    heads = HeadConfig(hidden=16, num_distances=1, num_bins=21, bin_range=3.0)
    settings = AgentConfig(dynamics=DynamicsConfig(transformer=transformer, num_registers=1, max_steps=8), heads=heads)

    def make(num_actions: int) -> DreamSource:
        rows, columns = tokenizer.token_grid
        sizes = {"token_grid": (rows, columns), "latent_channels": tokenizer.latent_channels, "actions_per_step": num_actions}
        agent = Agent(settings, action_space=SPACE, **sizes).eval()
        torch.nn.init.normal_(agent.policy.mlp.out.weight)
        return DreamSource(opened.run, "phase3", agent, tokenizer, opened.latents, 20.0, None)

    return make


def rows_of(num: int) -> list[np.ndarray]:
    return [np.array([t % 5, t % 2], np.float32) for t in range(num)]


def test_frames_of_a_long_step_are_shown_one_by_one(chunked: Callable[[int], DreamSource]) -> None:
    source = chunked(8)
    start = source.from_picture(np.full((16, 16, 3), 90, np.uint8), "image", "grey")
    session = DreamSession(source, start, DreamSettings(num_steps=2, context=1))
    indices = [session.tick(row).index for row in rows_of(24)]
    assert indices == [0] * 7 + list(range(1, 18))  # P - 1 ticks behind
    assert session.now.row.tolist() == rows_of(24)[16].tolist()  # frame 17 was led to by action 16


def test_an_agent_of_one_action_holds_the_first_of_a_step(chunked: Callable[[int], DreamSource]) -> None:
    source = chunked(1)
    start = source.from_picture(np.full((16, 16, 3), 90, np.uint8), "image", "grey")
    session = DreamSession(source, start, DreamSettings(num_steps=2, context=1))
    moments = [session.tick(row) for row in rows_of(16)]
    assert [m.index for m in moments] == list(range(1, 17))  # nothing to wait for
    assert [m.row[0] for m in moments] == [0] * 8 + [3] * 8


def test_the_policy_plans_a_whole_step(chunked: Callable[[int], DreamSource]) -> None:
    source = chunked(8)
    start = source.from_picture(np.full((16, 16, 3), 90, np.uint8), "image", "grey")
    session = DreamSession(source, start, DreamSettings(num_steps=2, context=1))
    session.mode = "argmax"
    plan = source.agent.policy.now(session._features).mode()[0].numpy()
    moments = [session.tick(rows_of(1)[0]) for _ in range(15)]
    assert np.array_equal(np.stack([m.row for m in moments[7:]]), plan)
