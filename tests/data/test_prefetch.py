import gc
import threading

import pytest

from dreamer.data.prefetch import Prefetcher


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def count(closed: list[bool]):
    try:
        number = 0
        while True:
            yield number
            number += 1
    finally:
        closed.append(True)


def failing():
    yield 1
    yield 2
    raise ValueError("shard 7 is damaged")


def test_items_come_in_order():
    assert list(Prefetcher(iter(range(100)), 3)) == list(range(100))


def test_an_error_comes_in_its_turn_and_stays():
    stream = Prefetcher(failing(), 5)
    assert [next(stream), next(stream)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="shard 7 is damaged"):
            next(stream)


def test_the_end_stays():
    stream = Prefetcher(iter([1]))
    assert list(stream) == [1]
    assert list(stream) == []


def test_closing_ends_the_thread_and_the_source():
    closed: list[bool] = []
    with Prefetcher(count(closed), 2) as stream:
        assert next(stream) == 0
        assert threads()
    assert not threads()
    assert closed == [True]
    with pytest.raises(StopIteration):
        next(stream)


def test_dropping_ends_the_thread():
    closed: list[bool] = []
    stream = Prefetcher(count(closed), 2)
    next(stream)
    (thread,) = threads()
    del stream
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert closed == [True]


def test_it_runs_at_most_depth_ahead():
    taken: list[int] = []

    def source():
        for number in range(100):
            taken.append(number)
            yield number

    with Prefetcher(source(), 3) as stream:
        for given in range(1, 20):
            next(stream)
            while not stream._queue.full():
                pass
            assert len(taken) <= given + 3 + 1  # given, waiting, and one in hand


def test_depth_0_is_refused():
    with pytest.raises(ValueError, match="depth is 0"):
        Prefetcher(iter([]), 0)
