"""Recordings to episodes: imported, or played and recorded."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from dreamer.data import EpisodeStore, import_recordings
from dreamer.data.actions import env_codec
from dreamer.data.shards import STORE_FILE
from dreamer.envs import make_env, make_player
from dreamer.evaluation.agent import PolicyPlayer
from dreamer.imagination import AgentPolicy, SamplerConfig
from dreamer.imagination.policy import Mode
from dreamer.models import Agent
from dreamer.pipeline.run import Run
from dreamer.training.logging import SECONDS_BETWEEN_LINES, ProgressDisplay
from dreamer.training.models_io import load_agent, load_tokenizer
from dreamer.training.record import record
from dreamer.training.settings import EnvConfig
from dreamer.types import ActionComponent, ActionSpace, Player


def record_episodes(run: Run) -> bool:
    """Fill the run's episode store: from the recordings that ``data.recordings`` names, or by recording the players.

    ``ValueError`` if there is something to add and the run has learned from the episodes that are there.
    """
    config = run.config
    before = _count(run.episodes_path)

    def begin() -> None:
        run.require_untrained()
        run.begin()

    if config.data.recordings is not None:
        recordings = config.data.recordings
        if recordings.reader == "store":
            run.episodes()
            return False
        with ProgressBar("import") as bar:
            import_recordings(
                recordings.path,
                run.episodes_path,
                recordings.reader,
                progress=bar,
                options=recordings.options,
                before_adding=begin,
            )
    else:
        env = config.env
        assert env is not None  # the config's validator
        players = [(player.name, player.options, player.fraction) for player in config.record.players]
        with ProgressBar("record") as bar:
            record(
                env.name,
                env.options,
                players,
                run.episodes_path,
                config.record.num_episodes,
                config.seed,
                player_maker=lambda name, _, **options: make_any_player(name, env, **options),
                progress=bar,
                before_adding=begin,
            )
    if not run.config_path.exists():  # else it tells what the run was made with, which these settings need not be
        run.begin()
    return _count(run.episodes_path) > before


def check_lengths(run: Run) -> None:
    """``ValueError`` that names the first setting whose windows are longer than every episode that they are to be drawn from."""
    config, store = run.config, run.episodes()
    train, held_out = (int(store.lengths[ids].max(initial=0)) for ids in run.split(len(store)))
    cosmos = config.cosmos_tokenizer
    stride = cosmos.temporal_stride if cosmos.enabled else 1
    # latent steps; the first shows one frame
    windows: dict[str, tuple[int, int]] = {}
    for name, phase in {"phase1": config.phase1, "phase2": config.phase2}.items():
        windows[f"{name}.sequence_length"] = phase.sequence_length, min(train, held_out)
        windows[f"{name}.long_sequence_length"] = phase.long_sequence_length or 1, train
    windows["phase3.imagination.rollout.context"] = config.phase3.imagination.rollout.context, min(train, held_out)
    world_model = config.evaluation.world_model
    windows["evaluation.world_model.context + horizon"] = world_model.context + world_model.horizon, held_out
    needed = {key: (steps, 1 + stride * (steps - 1), longest) for key, (steps, longest) in windows.items()}
    if config.tokenizer_steps:
        needed = {"phase0.num_frames": (config.phase0.num_frames, config.phase0.num_frames, train)} | needed
    for key, (value, frames, longest) in needed.items():
        if frames > longest:
            told = f"{value}" if frames == value else f"{value} latent steps, which are {frames} frames"
            raise ValueError(
                f"{key} is {told}; the longest episode to draw from in {store.path} has {longest} frames: "
                "set a smaller one, or record longer episodes"
            )


def make_any_player(name: str, env: EnvConfig, /, **options: Any) -> Player:
    """The players of ``dreamer.envs``, and ``agent``: a trained one, by ``checkpoint`` and ``tokenizer`` (folders) and ``mode``."""
    if name != "agent":
        return make_player(name, env.name, **options)
    expected = {"checkpoint", "tokenizer"}
    if not expected <= options.keys() <= expected | {"mode"}:
        raise ValueError(f"player 'agent' has the options {sorted(options)}; expected checkpoint, tokenizer and, if wanted, mode")
    mode: Mode = options.get("mode", "sampled")
    if mode not in ("sampled", "argmax"):
        raise ValueError(f"player 'agent': mode is {mode!r}; expected sampled or argmax")
    tokenizer = load_tokenizer(Path(options["tokenizer"]))
    agent, info = load_agent(Path(options["checkpoint"]))
    if info["tokenizer"] != tokenizer.fingerprint():
        raise ValueError(f"{options['checkpoint']}: was trained on latents of another tokenizer than {options['tokenizer']}")
    check_actions(agent, env, Path(options["checkpoint"]))
    return PolicyPlayer(AgentPolicy(agent, tokenizer, SamplerConfig(num_steps=1), mode=mode, name=f"agent-{info['phase']}-{mode}"))


def check_actions(agent: Agent, env: EnvConfig, where: Path) -> None:
    """``ValueError`` unless the agent at ``where`` acts as the environment does. Labels count where both have them."""
    made = make_env(env.name, **env.options)
    spaces = agent.action_space, env_codec(made).space
    made.close()
    has_labels = all(component.labels for space in spaces for component in space.components)
    own, other = (_told(space, has_labels) for space in spaces)
    if own != other:
        raise ValueError(
            f"{where}: the agent's actions are {_short(own)}, those of the environment {env.name!r} {_short(other)}; expected the same: "
            "choose the environment that it was trained for"
        )


def _told(space: ActionSpace, has_labels: bool) -> str:
    """What has to agree, in words."""

    def one(c: ActionComponent) -> str:
        bounds = f" from {c.low:g} to {c.high:g}" if c.kind == "continuous" else ""
        return f"{c.name} ({c.kind} {c.size}{bounds}{': ' + ', '.join(c.labels) if has_labels else ''})"

    return " + ".join(map(one, space.components))


def _short(told: str) -> str:
    return textwrap.shorten(told, 300, placeholder=" ...")  # a camera has 121 labels


def _count(path: Path) -> int:
    return len(EpisodeStore(path)) if (path / STORE_FILE).exists() else 0


class ProgressBar:
    """``ProgressDisplay`` on stderr for work whose length is known once its first item is done; called with (done, total). Without a
    terminal, work that takes less than ten seconds prints nothing. ``is_shown`` False: nothing at all."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic, *, is_shown: bool = True) -> None:
        self._name, self._is_shown, self._clock = name, is_shown, clock
        self._began, self._first = clock(), -1
        self._display: ProgressDisplay | None = None

    def __call__(self, done: int, total: int) -> None:
        if not self._is_shown:
            return
        if self._first < 0:
            self._first = done - 1
        if self._display is None:
            console = Console(file=sys.stderr)
            if not console.is_terminal and self._clock() - self._began < SECONDS_BETWEEN_LINES:
                return
            self._display = ProgressDisplay(self._name, total, self._first, console, self._clock, self._began)
        self._display.advance(done)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.close()
