"""Signals to this very process, at the moments that are easiest to get wrong. Whole commands: tests/training/test_kills.py."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from dreamer import interrupt
from dreamer.interrupt import Interrupted, deferred


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "AGAIN", 0.05)


def send(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(0.001)


def test_the_first_is_noted_and_the_second_ends_at_once() -> None:
    ended = []
    with pytest.raises(Interrupted) as caught, deferred("saving", echo=0.0) as stop:
        send()
        assert stop.is_wanted
        ended.append("first")
        send(signal.SIGINT)
        ended.append("second")
    assert ended == ["first"] and caught.value.is_final and caught.value.signum == signal.SIGTERM


def test_a_block_is_given_up_when_its_time_is_over() -> None:
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught, deferred("saving") as stop, stop.breakable(patience=0.3):
        send()
        time.sleep(30)
    assert not caught.value.is_final and 0.3 <= time.monotonic() - began < 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_finaliser_swallows_comes_again() -> None:
    class Swallows:
        def __del__(self) -> None:
            send()

    with pytest.raises(Interrupted), deferred("saving") as stop, stop.breakable():
        thing = Swallows()
        del thing
        assert stop.is_wanted
        time.sleep(30)
        pytest.fail("it did not come again")


def test_cleaning_up_is_not_broken_off_but_by_the_second() -> None:
    cleaned = []
    with pytest.raises(Interrupted) as caught, deferred("saving", echo=0.0) as stop, stop.breakable():
        try:
            send()
        finally:
            time.sleep(0.3)  # several alarms
            cleaned.append("first")
            try:
                send()
                cleaned.append("second")
            finally:
                time.sleep(0.3)
    assert cleaned == ["first"] and caught.value.is_final


def test_the_alarm_ends_with_the_block() -> None:
    with pytest.raises(Interrupted), deferred("saving") as stop:
        with stop.breakable(patience=0.2):
            send()
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        time.sleep(0.3)
        with pytest.raises(Interrupted), stop.breakable():  # its time is over already
            time.sleep(30)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_outside_the_main_thread_nothing_changes() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with deferred("saving") as stop:
            found.append((stop.is_wanted, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]
