"""A thread that stays a few items ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Prefetcher(Generic[T]):
    """Iterates over ``source`` in a thread, at most ``depth`` items ahead.

    An exception in the thread is raised in the consumer, in its turn. ``close`` (also by ``with``, or when the consumer drops
    the iterator) stops the thread. A thread, not processes: copies between processes cost more than making a batch.
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
        """Stop the thread and wait until it has ended."""
        self._stop.set()
        while self._thread.is_alive():
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
