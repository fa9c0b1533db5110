"""One person's place at the server: a dream, its clock, and what is to be sent. It outlives the connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import anyio
import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from dreamer.envs import env_kind
from dreamer.player import protocol
from dreamer.player.controls import Controls, Hands
from dreamer.player.engine import DreamSession, Moment, default_settings
from dreamer.player.images import encode_frame, thumbnail
from dreamer.player.source import NOT_CHEAP, DreamSource, Picture, Start

T = TypeVar("T")

MAX_UNSENT = 2  # frames that wait for the page; older ones are dropped
MAX_COMMANDS = 32
NUM_PLACES = 12  # recorded frames that are offered to start from
RECORDINGS = "played"  # folder of a run for episodes that were played in its dreams


class Seat:
    """Everything that works on models or pictures runs in ``workers``, one thread for all seats: a seat waits, and the loop never does."""

    def __init__(self, source: DreamSource, controls: Controls, workers: Executor) -> None:
        self.id = secrets.token_urlsafe(24)
        self.source, self.controls, self.hands, self._workers = source, controls, Hands(controls), workers
        self.fps, self.is_paused = source.fps, False
        self.connection: anyio.CancelScope | None = anyio.CancelScope()  # of who is there, or coming; None: nobody
        self.left_at = time.monotonic()
        self._rng = np.random.default_rng()
        self._commands: deque[tuple[protocol.Command | Start, asyncio.Future[None] | None]] = deque()
        self._stirred = asyncio.Event()  # input or a command has come
        self._news = asyncio.Event()  # something is to be sent, or may be sent now
        self._texts: deque[str] = deque(maxlen=64)
        self._frames: deque[tuple[int, bytes]] = deque(maxlen=MAX_UNSENT)
        self._unseen: deque[int] = deque()  # numbers of the frames that are on their way
        self._number = self._num_dropped = 0
        self._due = 0.0

    async def _work(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, job)

    async def open(self) -> None:
        """Make the dream. Raises ``ValueError`` if it cannot be."""
        settings = default_settings(self.source)
        env = self.source.env
        has_real = env is not None and env_kind(env.name) not in NOT_CHEAP

        def make() -> DreamSession:
            (place,) = self.source.places(1, int(self._rng.integers(2**31)), settings.context)
            return DreamSession(self.source, self.source.recorded(*place, settings.context), settings, has_real=has_real)

        self.dream = await self._work(make)
        self.offers = await self._work(self._offers)

    def _offers(self) -> list[dict[str, Any]]:
        context = self.dream.settings.context
        starts = [self.source.recorded(*place, context) for place in self.source.places(NUM_PLACES, self.dream.settings.seed, context)]
        return [{"episode": s.episode, "step": s.step, "picture": thumbnail(s.picture)} for s in starts]

    def leave(self) -> None:
        """Nobody is there any more; what was held is let go."""
        self.connection, self.left_at = None, time.monotonic()
        self.hands.release()

    async def close(self) -> None:
        await self._work(self.dream.close)

    # ---- what comes from the page

    def take(self, message: protocol.Input | protocol.Seen | protocol.Command) -> None:
        """Raises ``ValueError`` for what cannot be meant, and for commands that come faster than they can be done."""
        if isinstance(message, protocol.Seen):
            while self._unseen and self._unseen[0] <= message.frame:
                self._unseen.popleft()
            self._news.set()
        elif isinstance(message, protocol.Input):
            self.hands.hold(message.number, message.pressed, message.turn)
            self._stirred.set()
        else:
            self._put(message)

    async def begin(self, picture: Picture) -> None:
        """Dream on from a picture that somebody sent; done when the dream has begun. Raises ``ValueError`` if nobody is connected."""
        if self.connection is None:
            raise ValueError("nobody is connected to this dream; open its page again")
        start = await self._work(lambda: self.source.from_picture(picture, "image", "your image"))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(start, done)
        with anyio.move_on_after(60) as patience:
            await done
        if patience.cancelled_caught:
            raise ValueError("the dream did not begin within a minute; try again")

    def _put(self, command: protocol.Command | Start, done: asyncio.Future[None] | None = None) -> None:
        if len(self._commands) >= MAX_COMMANDS:
            raise ValueError(f"more than {MAX_COMMANDS} commands wait")
        self._commands.append((command, done))
        self._stirred.set()

    # ---- the clock

    async def play(self) -> None:
        """Frames at ``fps`` for as long as somebody is connected. A press does not wait for the clock, only for half a frame."""
        self._due = time.monotonic()
        while True:
            if self._commands:
                await self._obey()
            elif (wait := self._wait()) is None or wait > 0:
                self._stirred.clear()
                if not self._commands:
                    with anyio.move_on_after(wait):
                        await self._stirred.wait()
            else:
                try:
                    await self._tick()
                except (ValueError, OSError) as problem:  # a real environment that is lost, say
                    self.is_paused = True
                    self._tell_problem(problem)

    def _wait(self) -> float | None:
        """Seconds until the next frame is to be made; None: until something happens."""
        if self.is_paused or self.dream.now.is_over:
            return None
        if self.dream.mode is None and self.controls.idle is None and not self.hands.is_busy:
            return None  # no action means to do nothing: the dream waits
        early = 0.5 / self.fps if self.hands.is_fresh and self.dream.mode is None else 0.0
        return self._due - early - time.monotonic()

    async def _tick(self) -> None:
        now, period = time.monotonic(), 1 / self.fps
        is_off_beat = now < self._due or now - self._due > period  # a press came early, or the models are slower than the clock
        self._due = period + (now if is_off_beat else self._due)
        row, number = self.hands.take(), self.hands.input
        if row is None:
            row = self.controls.rest  # the policy acts: it is not looked at
        before, was_recording = self.dream.now, self.dream.is_recording

        def make() -> tuple[Moment, list[bytes]]:
            moment = self.dream.tick(row)
            return moment, [] if moment is before else _pictures(moment)

        moment, pictures = await self._work(make)
        if moment is not before:
            self._post(moment, pictures, number, time.monotonic() - now)
        if moment.is_over or was_recording != self.dream.is_recording:
            self.tell_state()

    def _post(self, moment: Moment, pictures: list[bytes], number: int, seconds: float = 0.0) -> None:
        self._number += 1
        if len(self._frames) == MAX_UNSENT:
            self._num_dropped += 1
        signals = {"reward": moment.reward, "value": moment.value, "continue": moment.continues, "real_reward": moment.real_reward}
        row = moment.row
        header = {
            "frame": self._number,
            "index": moment.index,
            "input": number,
            "ms": round(1000 * seconds, 1),
            "dropped": self._num_dropped,
            "buttons": [] if row is None else self.controls.buttons_of(row),
            "camera": None if row is None else self.controls.camera_of(row),
            "policy": moment.is_by_policy,
            "over": moment.is_over,
            "real_over": moment.real_is_over,
        } | {name: None if x is None else round(x, 4) for name, x in signals.items()}
        self._frames.append((self._number, protocol.pack(header, pictures)))
        self._news.set()

    # ---- commands

    async def _obey(self) -> None:
        command, done = self._commands.popleft()
        if done is not None and done.cancelled():  # whoever sent it has been told that it did not begin
            return
        try:
            await self._do(command)
        except (ValueError, OSError) as error:
            if done is not None and not done.cancelled():
                done.set_exception(error)
            else:
                self._tell_problem(error)
        else:
            if done is not None and not done.cancelled():
                done.set_result(None)
        self.tell_state()

    async def _do(self, command: protocol.Command | Start) -> None:
        dream = self.dream
        match command:
            case Start():
                await self._begin(lambda: command)
            case protocol.Pause(value=value):
                self.is_paused, self._due = value, time.monotonic()
            case protocol.Step():
                self.is_paused = True
                if not dream.now.is_over:
                    await self._tick_once()
            case protocol.Policy(mode=mode):
                if mode is not None and not self.source.has_policy:
                    raise ValueError(f"{self.source.name}: phase 1 trains no policy; play a checkpoint of phase 2 or 3")
                if mode is not None and dream.mode is None:  # who lets the agent play wants to see it play
                    self.is_paused, self._due = False, time.monotonic()
                dream.mode = mode
            case protocol.Settings():
                await self._set(command)
            case protocol.Restart():
                await self._begin(lambda: self._start(command))
            case protocol.Record(value=value):
                dream.record(value)
            case protocol.Store():
                await self._store()

    async def _tick_once(self) -> None:
        if self.controls.idle is None and not self.hands.is_busy and self.dream.mode is None:
            raise ValueError("nothing is no action here: hold a key for a single step")
        self._due = time.monotonic()
        await self._tick()

    async def _set(self, wanted: protocol.Settings) -> None:
        dream = self.dream
        changes = {key: value for key in ("num_steps", "context", "seed") if (value := getattr(wanted, key)) is not None}
        if changes:
            dream.set(dream.settings.model_validate(dream.settings.model_dump() | changes))
        self.fps = wanted.fps or self.fps
        if wanted.real is not None and wanted.real != (dream.real is not None):
            await self._work(lambda: dream.put_beside(bool(wanted.real)))
            await self._begin(lambda: dream.start)  # the two must begin together

    def _start(self, wanted: protocol.Restart) -> Start:
        """Where to begin; in the worker."""
        context = self.dream.settings.context
        if wanted.where == "same":
            now = self.dream.start
            return self.source.recorded(now.episode, now.step, context) if now.episode is not None and now.step is not None else now
        if wanted.where == "environment":
            return self.source.from_environment(self.dream.settings.seed)
        if wanted.where == "random":
            return self.source.recorded(*self.source.places(1, int(self._rng.integers(2**31)), context)[0], context)
        if wanted.episode is None or wanted.step is None:
            raise ValueError("restart: a recorded start has an episode and a step")
        return self.source.recorded(wanted.episode, wanted.step, context)

    async def _begin(self, choose: Callable[[], Start]) -> None:
        self.hands.forget()

        def make() -> tuple[Moment, list[bytes]]:
            moment = self.dream.begin(choose())
            return moment, _pictures(moment)

        moment, pictures = await self._work(make)
        self._due = time.monotonic() + 1 / self.fps
        self._post(moment, pictures, self.hands.input)

    async def _store(self) -> None:
        recording, source = self.dream.recording, self.source
        if recording is None:
            raise ValueError("there is no recording; press record first")
        path = source.run.path / RECORDINGS
        number = await self._work(lambda: recording.store(path, source.agent.action_space, source.fps, source.has_policy))
        self.tell({"type": "stored", "text": f"episode {number} of {path}"})

    async def mp4(self) -> bytes:
        """Raises ``ValueError`` if nothing was recorded."""
        recording = self.dream.recording
        if recording is None:
            raise ValueError("there is no recording; press record first")
        return await asyncio.to_thread(recording.mp4, self.source.fps)

    # ---- what goes to the page

    def tell(self, message: dict[str, Any]) -> None:
        self._texts.append(json.dumps(message, allow_nan=False))
        self._news.set()

    def _tell_problem(self, problem: Exception) -> None:
        self.tell({"type": "problem", "text": " ".join(str(problem).split())})
        self.tell_state()

    def tell_state(self) -> None:
        dream, recording = self.dream, self.dream.recording
        self.tell(
            {
                "type": "state",
                "paused": self.is_paused,
                "policy": dream.mode,
                "over": dream.now.is_over,
                "start": dream.start.label,
                "settings": dream.settings.model_dump() | {"fps": self.fps},
                "real": dream.real is not None,
                "real_problem": dream.real_problem,
                "recording": dream.is_recording,
                "recorded": 0 if recording is None else len(recording),
            }
        )

    async def greet(self, is_resumed: bool) -> None:
        """What a page needs that has just (again) connected; a picture, too."""
        for queue in (self._texts, self._frames, self._unseen):
            queue.clear()
        source = self.source
        self.tell(
            {
                "type": "hello",
                "session": self.id,
                "resumed": is_resumed,
                "name": source.name,
                "fps": source.fps,
                "shape": list(source.tokenizer.frame_shape[1:]),
                "controls": self.controls.to_json(),
                "offers": self.offers,
                "most_context": source.most_context,
                "num_steps": source.denoise_steps,
                "has": {"policy": source.has_policy, "value": source.has_value, "env": source.env is not None},
            }
        )
        self.tell_state()
        now = self.dream.now
        self._post(now, await self._work(lambda: _pictures(now)), self.hands.input)

    async def send(self, socket: WebSocket) -> None:
        """Everything that is to be sent, frames only while fewer than ``MAX_UNSENT`` are on their way unseen."""
        with contextlib.suppress(WebSocketDisconnect):  # who reads hears of it, too
            while True:
                await self._news.wait()
                self._news.clear()
                while self._texts:
                    await socket.send_text(self._texts.popleft())
                while self._frames and len(self._unseen) < MAX_UNSENT:
                    number, data = self._frames.popleft()
                    self._unseen.append(number)
                    await socket.send_bytes(data)


def _pictures(moment: Moment) -> list[bytes]:
    return [encode_frame(moment.picture)] + ([] if moment.real is None else [encode_frame(moment.real)])
