"""What a checkpoint offers to somebody who wants to play in it: models, places to start from, and the real environment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
from jaxtyping import Float, UInt8

from dreamer.config import DreamerConfig
from dreamer.data import EpisodeStore, LatentStore, PretokenizedDataset
from dreamer.data.actions import env_codec
from dreamer.envs import make_env
from dreamer.evaluation.media import image_layout
from dreamer.imagination.tokenizers import decode_windows, decodes_windows
from dreamer.models import Agent
from dreamer.pipeline import Run
from dreamer.pipeline.collect import check_actions
from dreamer.training.checkpoint import newest_checkpoint
from dreamer.training.models_io import load_agent
from dreamer.training.settings import EnvConfig
from dreamer.types import Batch, Tokenizer
from dreamer.yaml_config import load_config

NEWEST_FIRST = ("phase3", "phase2", "phase1")
NOT_CHEAP = ("minerl", "minestudio")  # environments that take minutes to start: beside the dream only when asked for

Picture = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class Start:
    """Where a dream begins: ``batch`` is one row of latent steps that the model is shown, ``picture`` the last frame of them."""

    kind: Literal["recorded", "environment", "image"]
    label: str
    batch: Batch
    is_start: bool  # the first of these steps begins its episode
    picture: Picture
    episode: int | None = None  # of the recordings
    step: int | None = None  # latent step of that episode, the last that the model is shown
    env_seed: int | None = None  # of the real environment's episode; None: it is not known
    env_actions: Float[np.ndarray, "K A"] | None = None  # what was done there up to the picture


@dataclass(repr=False)
class DreamSource:
    """The models of a run, frozen, shared by everybody who plays."""

    run: Run
    phase: str
    agent: Agent
    tokenizer: Tokenizer
    latents: LatentStore
    fps: float  # of the recordings
    env: EnvConfig | None  # the real environment, where there is one
    episodes: EpisodeStore | None = None

    @property
    def name(self) -> str:
        return f"{self.run.path.name} · {self.phase}"

    @property
    def has_policy(self) -> bool:
        """Whether policy, reward and continue were trained; the value was only in phase 3."""
        return self.phase != "phase1"

    @property
    def has_value(self) -> bool:
        return self.phase == "phase3"

    @property
    def denoise_steps(self) -> list[int]:
        """Each K that the model was trained for."""
        return [1 << n for n in range(self.agent.config.dynamics.max_steps.bit_length())]

    @property
    def most_context(self) -> int:
        return self.agent.config.dynamics.transformer.context_length

    @property
    def device(self) -> torch.device:
        return self.agent.dynamics.device

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """That of the phase's training, on a GPU: few processors have products in bf16, and without them it is slower."""
        config = self.run.config
        trained = {"phase1": config.phase1, "phase3": config.phase3}.get(self.phase, config.phase2)  # bc_long is phase 2 for longer
        return trained.train.precision if self.device.type == "cuda" else "fp32"

    def num_steps(self, episode: int) -> int:
        """Latent steps of a recorded episode that all their frames are there for."""
        if not 0 <= episode < len(self.latents):
            raise ValueError(f"episode is {episode}; {self.latents.path} holds 0 to {len(self.latents) - 1}")
        if self.episodes is None:
            return int(self.latents.lengths[episode])
        return 1 + (int(self.episodes.lengths[episode]) - 1) // self.latents.temporal_stride

    def recorded(self, episode: int, step: int, context: int) -> Start:
        """A dream that goes on after latent step ``step`` of a recorded episode; the model is shown up to ``context`` steps before it."""
        longest, stride = self.num_steps(episode), self.latents.temporal_stride
        if not 0 <= step < longest:
            raise ValueError(f"step is {step}; episode {episode} has the latent steps 0 to {longest - 1}")
        if not 1 <= context <= self.most_context:
            raise ValueError(f"context is {context}; expected 1 to {self.most_context}, what the model sees")
        first = max(0, step + 1 - context)
        if first and not decodes_windows(self.tokenizer):
            raise ValueError(
                f"step is {step} with a context of {context}; this tokenizer decodes from an episode's start only: "
                f"choose a step below {context}"
            )
        batch = PretokenizedDataset(self.latents, step + 1 - first, [episode]).batch([(episode, first)])
        label = f"episode {episode}, step {step}"
        if self.episodes is None:
            frames = decode_windows(self.tokenizer, batch.latents.to(self.device), torch.tensor([first == 0]))
            return Start("recorded", label, batch, first == 0, image_layout(frames[0])[-1], episode, step)
        frame = stride * step
        rows, seed = self.episodes.arrays(episode, 0, frame), self.episodes.infos[episode].get("seed")
        is_known = isinstance(seed, int) and bool(rows["action_mask"].all())
        picture = np.ascontiguousarray(image_layout(self.episodes.frames(episode, frame, frame + 1))[0])
        return Start(
            "recorded",
            label,
            batch,
            first == 0,
            picture,
            episode,
            step,
            env_seed=seed if is_known else None,
            env_actions=rows["actions"].copy() if is_known else None,
        )

    def places(self, count: int, seed: int, context: int) -> list[tuple[int, int]]:
        """``count`` places (episode, step) to start from, of held-out episodes, each with a full context where one fits."""
        rng = np.random.default_rng(seed)
        held_out = self.run.split(len(self.latents))[1]
        chosen = rng.choice(held_out, count, replace=count > len(held_out))
        return [(int(episode), self._place(int(episode), rng, context)) for episode in chosen]

    def _place(self, episode: int, rng: np.random.Generator, context: int) -> int:
        """A step with a past of ``context`` before it, in the first half of what is left: the real one goes on a while."""
        last = self.num_steps(episode) - 1
        earliest = min(context - 1, last)
        return int(rng.integers(earliest, (earliest + last) // 2 + 1)) if decodes_windows(self.tokenizer) else earliest

    def from_picture(self, picture: Picture, kind: Literal["environment", "image"], label: str, env_seed: int | None = None) -> Start:
        """A dream that knows one frame and no past."""
        space, num_actions = self.agent.action_space, self.agent.dynamics.actions_per_step
        frames = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None, None].to(self.device)
        with torch.no_grad():
            latents = self.tokenizer.encode(frames).cpu()
        actions, nothing = torch.zeros(1, 1, num_actions, space.num_columns), torch.zeros(1, 1, dtype=torch.bool)
        known = torch.zeros(1, 1, num_actions, dtype=torch.bool)
        batch = Batch(latents, actions, known, actions, known, torch.zeros(1, 1), nothing, torch.zeros(1).long(), nothing[0], nothing[0])
        empty = np.zeros((0, space.num_columns), np.float32)
        return Start(kind, label, batch, True, picture, env_seed=env_seed, env_actions=None if env_seed is None else empty)

    def from_environment(self, seed: int) -> Start:
        """A dream that begins as an episode of the real environment does."""
        env = self.make_env()
        picture, _ = env.reset(seed=seed)
        env.close()
        return self.from_picture(picture, "environment", f"new episode, seed {seed}", seed)

    def make_env(self) -> gymnasium.Env:
        if self.env is None:
            raise ValueError(f"{self.run.path}: knows no environment; name one with --env")
        return make_env(self.env.name, **self.env.options)


class RealEnv:
    """The real environment, brought to where a dream begins and given the same actions."""

    def __init__(self, source: DreamSource) -> None:
        self._env = source.make_env()
        self._codec = env_codec(self._env)
        self.is_over = False

    def begin(self, start: Start) -> Picture:
        """Play up to the start. Raises ``ValueError`` if it is not known how, or if the environment then shows something else."""
        if start.env_seed is None or start.env_actions is None:
            raise ValueError(f"{start.label}: nobody knows how the real environment comes to this frame")
        self._picture, _ = self._env.reset(seed=start.env_seed)
        self.is_over = False
        for row in start.env_actions:
            self.step(row)
        if not np.array_equal(self._picture, start.picture):
            raise ValueError(f"{start.label}: the real environment, played again from its seed, shows another frame")
        return self._picture

    def step(self, row: Float[np.ndarray, " A"]) -> tuple[Picture, float]:
        """The next frame and its reward; the last frame again once the episode is over."""
        if self.is_over:
            return self._picture, 0.0
        self._picture, reward, is_terminated, is_truncated, _ = self._env.step(self._codec.decode(row))
        self.is_over = bool(is_terminated or is_truncated)
        return self._picture, float(reward)

    def close(self) -> None:
        self._env.close()


def open_source(checkpoint: Path, *, env: str | None = None, device: str | None = None, fps: float | None = None) -> DreamSource:
    """``checkpoint``: the folder of a run (its newest phase is taken), of a phase in it, or one of that phase's checkpoints.

    env: name of the real environment (default: the run's). fps: frames a second (default: the recordings').
    Raises ``ValueError`` for what is no part of a run, for untrained or damaged models, and if latents cannot be decoded.
    """
    folder = checkpoint.resolve()
    root = next((path for path in (folder, *folder.parents[:3]) if (path / "config.yaml").is_file()), None)
    if root is None:
        raise ValueError(f"{checkpoint}: is no run and no part of one (no config.yaml in it or above it); expected such as runs/demo")
    overrides = [f"run_dir={json.dumps(str(root))}"] + ([f"device={device}"] if device else [])
    run = Run(load_config(DreamerConfig, root / "config.yaml", overrides), words=["--config", str(root / "config.yaml"), *overrides])
    phases = [root / name for name in NEWEST_FIRST if newest_checkpoint(root / name)] if folder == root else [folder]
    if not phases:
        raise ValueError(f"{checkpoint}: holds no trained world model; run first: {run.command_for('train phase1')}")
    tokenizer = run.own_tokenizer()
    if tokenizer is None or not tokenizer.can_decode:
        raise ValueError(f"{checkpoint}: this run's tokenizer does not decode, so that a dream has no frames; expected one that does")
    agent, info = load_agent(phases[0], run.device)
    if info["tokenizer"] != tokenizer.fingerprint():
        raise ValueError(f"{phases[0]}: was trained on latents of another tokenizer than {root / 'tokenizer'}")
    latents, episodes = run.latents(tokenizer), run.episodes() if run.has_episodes else None
    if fps is None:
        if episodes is None:
            raise ValueError(f"{checkpoint}: latents alone do not say how many frames a second there were; give --fps")
        fps = episodes.fps
    real = run.config.env if env is None else EnvConfig(name=env, options=_options(run, env))
    if env is not None and real is not None:
        check_actions(agent, real, phases[0])
    return DreamSource(run, info["phase"], agent, tokenizer, latents, fps, real, episodes)


def _options(run: Run, name: str) -> dict[str, object]:
    """The run's own options for the run's own environment."""
    own = run.config.env
    return dict(own.options) if own is not None and own.name == name else {}
