"""Threads that stay a few items ahead."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()
PATIENCE = 2.0  # seconds to wait for a thread whose item, such as a long video, is not wanted any more


def map_ahead(make: Callable[[int], T], start: int, *, num_threads: int, depth: int) -> Generator[T, None, None]:
    """``make(start)``, ``make(start + 1)``, ... without end and in this order, whatever the number of threads that make them.

    At most ``depth`` items wait beyond the one that was given last. An exception of ``make`` is raised in its turn. Closing the
    generator, or dropping it, ends the threads after the items that they are at, and waits ``PATIENCE`` seconds for that. Raises
    ``ValueError`` for less than one thread, or a depth of less than one.
    """
    if num_threads < 1 or depth < 1:
        raise ValueError(f"{num_threads} threads, depth {depth}; expected at least 1 of each")
    return _map_ahead(make, start, num_threads, depth)


def _map_ahead(make: Callable[[int], T], start: int, num_threads: int, depth: int) -> Generator[T, None, None]:
    ahead: deque[Future[T]] = deque()
    tasks: queue.SimpleQueue[tuple[int, Future[T]] | None] = queue.SimpleQueue()
    threads = [threading.Thread(target=_work, args=(make, tasks), name="prefetch", daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        for number in itertools.count(start):
            ahead.append(Future())
            tasks.put((number, ahead[-1]))
            if len(ahead) > depth:
                yield ahead.popleft().result()
    finally:
        for item in ahead:
            item.cancel()
        for _ in threads:
            tasks.put(None)
        given_up = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, given_up - time.monotonic()))


def _work(make: Callable[[int], T], tasks: queue.SimpleQueue[tuple[int, Future[T]] | None]) -> None:
    while (task := tasks.get()) is not None:
        number, item = task
        if item.set_running_or_notify_cancel():
            try:
                item.set_result(make(number))
            except BaseException as error:  # raised where the item is asked for
                item.set_exception(error)


class Prefetcher(Generic[T]):
    """Iterates over ``source`` in a thread, at most ``depth`` items ahead.

    An exception in the thread is raised in the consumer, in its turn. ``close`` (also by ``with``, or when the consumer drops
    the iterator) stops the thread after the item that it is at. A thread, not processes: copies between processes cost more than making
    a batch.
    """

    def __init__(self, source: Iterator[T], depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"prefetch depth is {depth}; expected at least 1")
        self._queue: queue.Queue[tuple[object, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        # the thread must not hold a reference to self, or dropping the iterator would never stop it
        self._thread = threading.Thread(target=_fill, args=(source, self._queue, self._stop), name="prefetch", daemon=True)
        self._thread.start()
        self._failed: BaseException | None = None

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._failed is not None:
            raise self._failed
        if self._stop.is_set():
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self._failed = error
            raise error
        if item is _END:
            self._stop.set()
            raise StopIteration
        return item  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        """Stop the thread, and wait until it has ended or for ``PATIENCE`` seconds: an item that takes longer holds up no exit. That
        thread then ends by itself after the item, which is dropped."""
        self._stop.set()
        given_up = time.monotonic() + PATIENCE
        while self._thread.is_alive() and time.monotonic() < given_up:
            try:  # it may wait for room in the queue
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_stop"):
            self._stop.set()


def _fill(source: Iterator[T], out: queue.Queue[tuple[object, BaseException | None]], stop: threading.Event) -> None:
    def put(item: object, error: BaseException | None) -> None:
        while not stop.is_set():
            try:
                return out.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    try:
        for item in source:
            put(item, None)
            if stop.is_set():
                break
        put(_END, None)
    except BaseException as error:  # handed to the consumer, which raises it
        put(None, error)
    finally:
        if isinstance(source, Generator):
            source.close()
