"""A small run, made in seconds, that is played in; its models answer to actions although they have learned nothing."""

from __future__ import annotations

import asyncio
import io
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dreamer import cli
from dreamer.data import EpisodeStore, EpisodeWriter, pretokenize
from dreamer.data.alignment import episode_from_transitions
from dreamer.models import Agent
from dreamer.player.controls import Controls
from dreamer.player.source import DreamSource, open_source
from dreamer.types import ActionSpace

PHASES = ("tokenizer", "phase1", "phase2", "phase3")
SMALL = ["threads=1", "record.num_episodes=8", "phase0.normalization_frames=16", "phase0.train.steps=20"]
SMALL += [f"phase{n}.train.steps=2" for n in (1, 2, 3)]


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("player") / "tiny"
    words = ["--preset", "smoke", f"run_dir={path}", *SMALL]
    for verb in (["record"], ["train", "tokenizer"], ["pretokenize"], *(["train", phase] for phase in PHASES[1:])):
        assert cli.main([*verb, *words]) == 0
    return path


def _awaken(source: DreamSource) -> DreamSource:
    """Two steps of training leave the action without a visible effect, and heads that say nothing."""
    agent = source.agent
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in agent.dynamics.action_embedding.components:
            nn.init.normal_(layer.weight, std=3.0)
        nn.init.normal_(agent.dynamics.latent_out.weight, std=1.0)
        for head in (agent.policy, agent.reward, agent.value):
            nn.init.normal_(head.mlp.out.weight)
        agent.continue_.mlp.out.bias.fill_(20.0)  # dreams do not end by themselves
    return source


@pytest.fixture(scope="session")
def opened(run_path: Path) -> DreamSource:
    return _awaken(open_source(run_path))


@pytest.fixture
def source(opened: DreamSource, tmp_path: Path) -> DreamSource:
    """With a fresh folder to write in."""
    opened.run.path = tmp_path
    return opened


@pytest.fixture
def of_space(source: DreamSource, tmp_path: Path) -> Callable[[ActionSpace], DreamSource]:
    """An agent of random weights over another action space, with the same tokenizer; in its recordings nothing is done."""

    def make(space: ActionSpace) -> DreamSource:
        assert source.episodes is not None
        rows = np.tile(Controls(space).rest, (12, 1))
        with EpisodeWriter(tmp_path / "episodes", space, frames_per_second=source.fps) as writer:
            for episode in range(4):
                frames = source.episodes.frames(episode, 0, len(rows) + 1)
                writer.add(episode_from_transitions(frames, rows, np.zeros(len(rows), np.float32), False, info={}))
        store = EpisodeStore(tmp_path / "episodes")
        latents = pretokenize(store, source.tokenizer, tmp_path / "latents")
        sizes = {"token_grid": source.tokenizer.token_grid, "latent_channels": source.tokenizer.latent_channels}
        agent = Agent(source.agent.config, action_space=space, **sizes).eval()
        return _awaken(DreamSource(source.run, "phase3", agent, source.tokenizer, latents, source.fps, None, store))

    return make


def _wait_for(is_it: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Tests wait for what must come; how long it takes is the machine's affair."""
    deadline = time.monotonic() + seconds
    while not is_it():
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    return _wait_for


class Server:
    """The application on a port of its own, in a thread."""

    def __init__(self, source: DreamSource, **limits: Any) -> None:
        import uvicorn

        from dreamer.player.protocol import MAX_MESSAGE
        from dreamer.player.server import Player

        self.token = "the-token-of-the-link"
        self.player = Player(source, self.token, **limits)
        config = uvicorn.Config(
            self.player.app, port=0, log_level="error", ws="websockets-sansio", ws_max_size=MAX_MESSAGE, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))
        self._thread.start()
        _wait_for(lambda: self._server.started or not self._thread.is_alive(), "server")
        assert self._thread.is_alive(), "the server did not start"
        self.host = f"127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.link = f"http://{self.host}/#{self.token}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def serve(source: DreamSource) -> Iterator[Callable[..., Server]]:
    pytest.importorskip("uvicorn", reason="needs the extra play: pip install 'dreamer4[play]'")
    servers: list[Server] = []

    def start(other: DreamSource | None = None, **limits: Any) -> Server:
        servers.append(Server(other or source, **limits))
        return servers[-1]

    start.seats = lambda: [seat for server in servers for seat in server.player.seats.values()]
    yield start
    for server in servers:
        server.stop()  # once more does no harm


# ---- a real browser

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """A page, with what tests ask it. Playwright's own functions that evaluate text in the page are what the policy forbids."""

    def __init__(self, context: Any, link: str, seats: Callable[[], list[Any]], until_index: int = 1) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(link)
        self.until(lambda: self.index >= until_index, f"frame {until_index}")
        self.seat = seats()[-1]  # the server's side of it

    def until(self, is_it: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not is_it():
            assert time.monotonic() < deadline, f"no {what} in {seconds} s; problem: {self.text('problem')!r}; {self.complaints}"
            self.page.wait_for_timeout(20)

    @property
    def index(self) -> int:
        return int(self.page.locator("body").get_attribute("data-index") or -1)

    def text(self, name: str) -> str:
        return self.page.locator(f"#{name}").text_content() or ""

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def picture(self, name: str = "dream") -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.page.locator(f"#{name}").screenshot())).convert("RGB"))

    def step(self, index: int) -> None:
        self.press("n")
        self.until(lambda: self.index == index, f"frame {index}")

    def pause(self) -> None:
        self.press("p")
        self.until(lambda: "paused" in self.text("notice"), "pause")
        self.until(lambda: self.index == self.seat.dream.now.index, "frame that was on its way")

    def restart(self) -> None:
        self.press("r")
        self.until(lambda: self.index == 0, "restart")


@pytest.fixture
def visit(browser: Any, serve: Any) -> Iterator[Callable[..., Tab]]:
    contexts, tabs = [], []

    def open_tab(link: str, context: Any = None, until_index: int = 1, **settings: Any) -> Tab:
        if context is None:
            contexts.append(context := browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | settings))
        tabs.append(Tab(context, link, serve.seats, until_index))
        return tabs[-1]

    yield open_tab  # pages close before servers do
    for context in contexts:
        context.close()
    assert [tab.complaints for tab in tabs if tab.complaints] == []
