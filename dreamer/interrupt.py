"""Ctrl-C and SIGTERM: the first lets the work reach a place where it can be saved, the second stops it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 12.0  # seconds after which a step that has not ended is given up: what was saved before it stays
AGAIN = 1.0  # seconds after which a step that was to be given up, and still goes on, is told so again
ECHO = 0.5  # seconds in which another signal is the same one: Ctrl-C reaches a process from the terminal and from its parent
ECHO_OF_SEVERAL = 20.0  # where several processes train: schedulers signal them one by one, and torchrun passes its own on to all


class Interrupted(KeyboardInterrupt):
    """A signal has ended the work. ``is_final``: it was the second one, so nothing more is to be saved."""

    def __init__(self, signum: int, is_final: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.is_final = signum, is_final


def exit_code(interruption: KeyboardInterrupt) -> int:
    """130 for Ctrl-C, 143 for SIGTERM, as shells have it."""
    return 128 + getattr(interruption, "signum", signal.SIGINT)


class Stop:
    """What a block knows of the signals that came: see ``deferred``."""

    def __init__(self, promise: str, echo: float) -> None:
        self.signum: int | None = None
        self._promise, self._echo, self._since = promise, echo, 0.0
        self._patience: float | None = None  # None: not in a breakable block

    @property
    def is_wanted(self) -> bool:
        return self.signum is not None

    def agree(self, signum: int) -> None:
        """Another process has heard ``signum`` (0: none has), so that this one stops as well. Its own signal may still come."""
        if self.signum is None and signum:
            self.signum, self._since = signum, time.monotonic()

    @contextmanager
    def breakable(self, patience: float = 0.0) -> Iterator[None]:
        """A block that ``Interrupted`` may end anywhere, ``patience`` seconds after the first signal: nothing in it is to be saved, or it
        is saved by itself."""
        try:
            self._patience = patience
            self._arm()
            yield
        finally:
            self._disarm()

    def _arm(self) -> None:
        """End the breakable block, now or by an alarm; again each second, as what is raised in a finaliser or a callback of C is lost."""
        if self.signum is None or self._patience is None:
            return
        left = self._since + self._patience - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, left if left > 0 else AGAIN, AGAIN)
        if left <= 0:
            raise Interrupted(self.signum)

    def _disarm(self) -> None:
        if self._patience is not None:
            self._patience = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
            _say(f"{signal.Signals(signum).name}: {self._promise}; once more to stop at once")
            self._arm()
        elif time.monotonic() - self._since > self._echo:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            self._disarm()
            raise Interrupted(self.signum, is_final=True)

    def on_alarm(self, signum: int, frame: FrameType | None) -> None:
        if not isinstance(sys.exc_info()[1], Interrupted):  # else it has arrived, and what cleans up after it is at work
            self._arm()


def _say(text: str) -> None:
    os.write(2, f"\ndreamer: {text}\n".encode())  # not print: the signal may have come in the middle of one


@contextmanager
def deferred(promise: str, echo: float = ECHO) -> Iterator[Stop]:
    """A block that SIGINT and SIGTERM do not break: the first one is announced with ``promise`` and noted, so that the block can end where
    it may, which raises ``Interrupted``; the second one raises it at once. Outside the main thread, where Python hears no signals, and
    for signals that are ignored, nothing changes. For ``echo`` seconds another signal counts as the first."""
    stop = Stop(promise, echo)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {each: stop.on_signal for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN} | {signal.SIGALRM: stop.on_alarm}
    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
    if stop.signum is not None:
        raise Interrupted(stop.signum)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises ``Interrupted`` in this block, as Ctrl-C raises ``KeyboardInterrupt`` anywhere: files are closed, halves removed."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def on_signal(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
