"""A small run, made in seconds, that is played in; its models answer to actions although they have learned nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dreamer import cli
from dreamer.player.source import DreamSource, open_source

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
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        self.host = f"127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.link = f"http://{self.host}/#{self.token}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def serve(source: DreamSource) -> Iterator[Callable[..., Server]]:
    pytest.importorskip("uvicorn", reason="needs the extra play: pip install 'dreamer4[play]'")
    servers: list[Server] = []

    def start(**limits: Any) -> Server:
        servers.append(Server(source, **limits))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
