"""A seat without its connection: what happens to what was asked of it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

pytest.importorskip("starlette", reason="needs the extra play: pip install 'dreamer4[play]'")

from dreamer.player.controls import Controls
from dreamer.player.seat import Seat
from dreamer.player.source import DreamSource


@pytest.mark.parametrize("is_given_up", [True, False])
def test_a_picture_that_nobody_waits_for_any_more_begins_no_dream(source: DreamSource, is_given_up: bool) -> None:
    async def begin() -> str:
        with ThreadPoolExecutor(1) as workers:
            seat = Seat(source, Controls(source.agent.action_space), workers)
            await seat.open()
            asked = asyncio.create_task(seat.begin(seat.dream.now.picture))
            while not seat._commands:
                await asyncio.sleep(0.01)
            if is_given_up:  # as after a minute, or when the request is gone
                asked.cancel()
                with suppress(asyncio.CancelledError):
                    await asked
            await seat._obey()
            if not is_given_up:
                await asked
            kind = seat.dream.start.kind
            await seat.close()
            return kind

    with ThreadPoolExecutor(1) as own:  # Playwright's loop may still be running in this thread
        assert own.submit(asyncio.run, begin()).result() == ("recorded" if is_given_up else "image")
