import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer.data.windows import BLOCK, WindowSampler, permute


def sampler(lengths=(5, 9, 3), window=3, batch_size=4, seed=0, **options) -> WindowSampler:
    return WindowSampler(np.array(lengths), window, batch_size, seed, **options)


def every_window(lengths, window) -> list[tuple[int, int]]:
    return [(e, s) for e, n in enumerate(lengths) for s in range(n - window + 1)]


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
def test_permute_is_a_permutation(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, (seed, epoch)).tolist()) == list(range(size))


def test_permute_mixes():
    size = 10_000
    order = permute(np.arange(size), size, (0, 0))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
    assert (order == permute(np.arange(size), size, (0, 1))).mean() < 0.01


@given(st.lists(st.integers(3, 12), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 7), st.integers(0, 99))
def test_an_epoch_holds_every_window_once(lengths, window, batch_size, seed):
    drawn = sampler(lengths, window, batch_size, seed)
    total = drawn.num_windows
    stream = [row for step in range(2 * total) for row in drawn.rows(step)]
    assert sorted(stream[:total]) == every_window(lengths, window)
    assert sorted(stream[total : 2 * total]) == every_window(lengths, window)


def test_rows_are_a_function_of_seed_and_step():
    one, two = sampler(), sampler()
    forward = [one.rows(s) for s in range(20)]
    assert [two.rows(s) for s in reversed(range(20))] == forward[::-1]
    assert [sampler(seed=1).rows(s) for s in range(20)] != forward
    stream = [row for rows in forward for row in rows]
    epochs = [stream[i * one.num_windows : (i + 1) * one.num_windows] for i in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_an_order_that_is_made_block_by_block_is_the_whole_one():
    size = 2 * BLOCK + 100
    drawn = sampler((size,), window=1, batch_size=37, seed=5)
    order = [*permute(np.arange(size), size, (5, 0)), *permute(np.arange(size), size, (5, 1))]
    for step in [0, 1, BLOCK // 37, 2 * BLOCK // 37, size // 37, size // 37 + 1, 110, 0]:
        assert [start for _, start in drawn.rows(step)] == order[37 * step : 37 * step + 37]


def test_only_chosen_episodes_are_drawn():
    drawn = sampler((5, 9, 3, 8), episodes=[1, 3])
    assert {e for step in range(10) for e, _ in drawn.rows(step)} == {1, 3}
    assert drawn.num_windows == 7 + 6


def test_short_episodes_are_counted():
    with pytest.warns(UserWarning, match="2 of 3 episodes are shorter than the window of 6"):
        drawn = sampler(window=6)
    assert {e for step in range(10) for e, _ in drawn.rows(step)} == {1}


def test_a_window_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="a window of 10 is longer than every episode .the longest has 9"):
        sampler(window=10)


@pytest.mark.parametrize("options", [{"window": 0}, {"batch_size": 0}, {"episodes": []}, {"episodes": [3]}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        sampler(**options)
