import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreamer.data.alignment import (
    chunk_actions,
    chunk_rewards,
    chunk_terminals,
    episode_from_steps,
    episode_from_transitions,
    episode_without_rewards,
    linspace_actions,
    mtp_targets,
    num_latent_steps,
    shift_actions,
)


def frames(length: int) -> np.ndarray:
    return np.zeros((length, 3, 2, 2), np.uint8)


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def test_transitions_put_the_reward_with_the_frame_it_led_to():
    episode = episode_from_transitions(frames(4), column(1, 2, 3), np.array([10.0, 20.0, 30.0]), True, task=2, info={"seed": 7})
    assert episode.actions[:, 0].tolist() == [1, 2, 3, 0]
    assert episode.action_mask.tolist() == [True, True, True, False]
    assert episode.rewards.tolist() == [0, 10, 20, 30]
    assert episode.terminals.tolist() == [False, False, False, True]
    assert (episode.task, episode.info) == (2, {"seed": 7})
    assert (episode.actions.dtype, episode.rewards.dtype) == (np.float32, np.float32)


def test_a_time_limit_is_not_terminal():
    assert not episode_from_transitions(frames(3), column(1, 2), np.zeros(2), False).terminals.any()


def test_unknown_actions_stay_masked():
    mask = np.array([True, False])
    assert episode_from_transitions(frames(3), column(1, 0), np.zeros(2), False, action_mask=mask).action_mask.tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(("num_actions", "num_rewards"), [(4, 3), (3, 4), (2, 2)])
def test_transitions_of_other_lengths_are_refused(num_actions, num_rewards):
    with pytest.raises(ValueError, match=rf"4 frames need 3 .* got {num_actions} actions and {num_rewards} rewards"):
        episode_from_transitions(frames(4), np.zeros((num_actions, 1), np.float32), np.zeros(num_rewards), False)


def test_steps_keep_every_action_and_name_the_reward_after_the_end():
    episode = episode_from_steps(frames(3), column(1, 2, 3), np.array([10.0, 20.0, 30.0]))
    assert episode.actions[:, 0].tolist() == [1, 2, 3]
    assert episode.action_mask.all()
    assert episode.rewards.tolist() == [0, 10, 20]
    assert episode.info["reward_after_end"] == 30
    with pytest.raises(ValueError, match="3 frames, 2 actions, 3 rewards"):
        episode_from_steps(frames(3), column(1, 2), np.zeros(3))


def test_without_rewards_every_frame_has_its_action():
    episode = episode_without_rewards(frames(3), column(1, 2, 3), action_mask=np.array([True, False, True]), info={"a": 1})
    assert episode.actions[:, 0].tolist() == [1, 0, 3] and episode.action_mask.tolist() == [True, False, True]
    assert not episode.has_rewards and not episode.rewards.any() and not episode.terminals.any() and episode.info == {"a": 1}
    assert episode_without_rewards(frames(2), column(1, 2)).action_mask.all()
    with pytest.raises(ValueError, match="3 frames, 2 actions, a mask of 3"):
        episode_without_rewards(frames(3), column(1, 2))


@pytest.mark.parametrize(
    ("length", "stride", "steps"), [(1, 1, 1), (5, 1, 5), (1, 8, 1), (2, 8, 2), (9, 8, 2), (10, 8, 3), (32, 8, 5), (33, 8, 5)]
)
def test_num_latent_steps(length, stride, steps):
    assert num_latent_steps(length, stride) == steps


def test_stride_1_changes_nothing():
    chunks, mask = chunk_actions(column(5, 6, 7), np.array([True, True, False]), 1)
    assert chunks.tolist() == [[[5]], [[6]], [[7]]]
    assert mask.tolist() == [[True], [True], [False]]
    assert chunk_rewards(np.array([0, 1, 2], np.float32), 1).tolist() == [0, 1, 2]
    assert chunk_terminals(np.array([False, False, True]), 1).tolist() == [False, False, True]


def test_stride_3_is_the_table_of_the_module():
    known = np.ones(7, bool)
    chunks, mask = chunk_actions(column(0, 1, 2, 3, 4, 5, 6), known, 3)
    assert chunks[:, :, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    prev, prev_mask = shift_actions(chunks, mask)
    assert prev[:, :, 0].tolist() == [[0, 0, 0], [0, 1, 2], [3, 4, 5]]
    assert prev_mask.tolist() == [[False] * 3, [True] * 3, [True] * 3]
    assert chunk_rewards(np.array([0, 1, 2, 4, 8, 16, 32], np.float32), 3).tolist() == [0, 7, 56]
    assert chunk_terminals(np.arange(7) == 6, 3).tolist() == [False, False, True]


def test_stride_8_with_a_partial_last_step():
    # 12 frames: step 0 = frame 0, step 1 = frames 1..8, step 2 = frames 9..11
    chunks, mask = chunk_actions(np.arange(12, dtype=np.float32)[:, None], np.arange(12) < 11, 8)
    assert chunks[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert chunks[1, :, 0].tolist() == [8, 9, 10, 11, 0, 0, 0, 0]
    assert mask[1].tolist() == [True, True, True, False, False, False, False, False]
    assert not mask[2].any()
    prev, prev_mask = shift_actions(chunks, mask)
    assert prev[1, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # all the eight actions that led through frames 1..8
    assert prev_mask[2].tolist() == [True, True, True, False, False, False, False, False]
    assert chunk_rewards(np.arange(12, dtype=np.float32), 8).tolist() == [0, 36, 30]
    assert chunk_terminals(np.arange(12) == 11, 8).tolist() == [False, False, True]


@given(st.integers(1, 60), st.integers(1, 9))
def test_chunks_lose_no_action_and_no_reward(length, stride):
    actions = np.arange(1, length + 1, dtype=np.float32)[:, None]
    chunks, mask = chunk_actions(actions, np.ones(length, bool), stride)
    assert chunks[mask][:, 0].tolist() == actions[:, 0].tolist()
    assert len(chunks) == num_latent_steps(length, stride)
    rewards = np.arange(length, dtype=np.float32)
    assert chunk_rewards(rewards, stride).sum() == rewards.sum()
    prev, prev_mask = shift_actions(chunks, mask)
    for t in range(1, len(chunks)):  # what led into frame f was done at frame f - 1
        through = np.arange(stride * (t - 1) + 1, min(stride * t, length - 1) + 1)
        assert prev[t, prev_mask[t], 0].tolist()[: len(through)] == actions[through - 1, 0].tolist()


@pytest.mark.parametrize(
    ("length", "stride", "frames"),
    [
        (1, 8, [0]),
        (2, 8, [0, 1]),
        (17, 8, [0, 8, 16]),
        (32, 8, [0, 7, 15, 23, 31]),  # 31 / 4 = 7.75 frames apart
        (7, 3, [0, 3, 6]),
        (9, 3, [0, 2, 5, 8]),  # 8 / 3 = 2.67
        (4, 1, [0, 1, 2, 3]),
    ],
)
def test_one_action_a_step(length, stride, frames):
    actions, mask = np.arange(2.0 * length, dtype=np.float32).reshape(length, 2), np.arange(length) != length - 1
    chosen, known = linspace_actions(actions, mask, stride)
    assert chosen.tolist() == [[[2 * t, 2 * t + 1]] for t in frames]
    assert known.tolist() == [[t != length - 1] for t in frames]


def test_mtp_targets_table():
    target, mask = mtp_targets(torch.tensor([[10, 11, 12]]), 3)
    assert target.tolist() == [[[10, 11, 12], [11, 12, 12], [12, 12, 12]]]
    assert mask.tolist() == [[[True, True, True], [True, True, False], [True, False, False]]]


def test_mtp_targets_keep_the_shape_behind():
    x = torch.randn(2, 5, 8, 3)
    target, mask = mtp_targets(x, 4)
    assert target.shape == (2, 5, 4, 8, 3)
    assert mask.shape == (2, 5, 4)
    assert torch.equal(target[:, 1, 2], x[:, 3])
    with pytest.raises(ValueError, match="num_distances is 0"):
        mtp_targets(x, 0)
