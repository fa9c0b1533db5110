import gc
import itertools
import threading
import time

import pytest

from dreamer.data.prefetch import Prefetcher, map_ahead


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


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


def test_closing_waits_for_no_long_item_and_the_thread_ends_after_it(monkeypatch):
    monkeypatch.setattr("dreamer.data.prefetch.PATIENCE", 0.1)
    closed, begun, may_end = [], threading.Event(), threading.Event()

    def source():
        try:
            yield 0
            begun.set()
            may_end.wait(30)
            yield 1
        finally:
            closed.append(True)

    with Prefetcher(source(), 2) as stream:
        assert next(stream) == 0 and begun.wait(30)
    (thread,) = threads()  # at item 1
    with pytest.raises(StopIteration):
        next(stream)
    may_end.set()
    thread.join(30)
    assert not thread.is_alive() and closed == [True]


def test_closing_a_map_waits_for_no_long_item(monkeypatch):
    monkeypatch.setattr("dreamer.data.prefetch.PATIENCE", 0.1)
    begun, may_end = threading.Event(), threading.Event()

    def make(number: int) -> int:
        if number:
            begun.set()
            may_end.wait(30)
        return number

    stream = map_ahead(make, 0, num_threads=1, depth=2)
    assert next(stream) == 0 and begun.wait(30)
    stream.close()
    (thread,) = threads()
    assert thread.daemon  # so that the process may end
    may_end.set()
    thread.join(30)
    assert not thread.is_alive()


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


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_map_keeps_its_order_whatever_the_threads_take(num_threads):
    def make(number: int) -> int:
        time.sleep(0.002 * (number % 3 == 0))  # some are slow
        return number

    stream = map_ahead(make, 7, num_threads=num_threads, depth=4)
    assert list(itertools.islice(stream, 30)) == list(range(7, 37))
    stream.close()
    assert not threads()


def test_threads_work_side_by_side_and_not_further_than_the_depth():
    started, both = [], threading.Barrier(2, timeout=10)

    def make(number: int) -> int:
        started.append(number)
        if number < 2:
            both.wait()  # passes only if 0 and 1 are made at the same time
        return number

    stream = map_ahead(make, 0, num_threads=2, depth=3)
    assert [next(stream) for _ in range(4)] == [0, 1, 2, 3]
    stream.close()
    assert len(started) <= 4 + 3


def test_a_maps_error_comes_in_its_turn_and_ends_the_threads():
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("shard 7 is damaged")
        return number

    stream = map_ahead(make, 0, num_threads=3, depth=5)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="shard 7 is damaged"):
        next(stream)
    assert not threads()


def test_a_map_that_is_dropped_ends_its_threads():
    stream = map_ahead(lambda number: number, 0, num_threads=2, depth=2)
    next(stream)
    assert threads()
    del stream
    gc.collect()
    assert not threads()


def test_a_map_wants_a_thread_and_a_depth():
    with pytest.raises(ValueError, match="0 threads, depth 2"):
        map_ahead(int, 0, num_threads=0, depth=2)
    with pytest.raises(ValueError, match="1 threads, depth 0"):
        map_ahead(int, 0, num_threads=1, depth=0)
