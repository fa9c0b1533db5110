"""Evaluation of a run: results as JSON, pictures as safetensors. A result that still holds is not computed again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from dreamer.data import EpisodeStore, LatentStore
from dreamer.data.files import read_json
from dreamer.data.pretokenized_dataset import Ids
from dreamer.envs import make_env, make_player
from dreamer.envs.seeding import player_rng
from dreamer.evaluation.agent import AgentResult, BatchPolicy, PlayerPolicy, evaluate_policy
from dreamer.evaluation.latent_dreams import LatentResult, draw_latent_windows, score_latent_dreams
from dreamer.evaluation.media import write_atomic
from dreamer.evaluation.open_loop import Windows, decode, draw_windows, predict, score
from dreamer.evaluation.report import Role
from dreamer.evaluation.video import WorldModelResult
from dreamer.imagination import AgentPolicy, Sampler
from dreamer.imagination.policy import Mode
from dreamer.pipeline.collect import check_actions, make_any_player
from dreamer.pipeline.run import Run, write_json
from dreamer.training.checkpoint import read_tensors
from dreamer.training.models_io import weights_fingerprint
from dreamer.training.settings import EnvConfig, RecordConfig
from dreamer.types import Env, Player, Tokenizer

NUM_RECONSTRUCTIONS = 7
TRAINED: dict[str, tuple[str, Role]] = {
    "phase2": ("Cloning (BC)", "bc"),
    "bc_long": ("Cloning, trained as long", "bc_long"),
    "phase3": ("Imagination RL", "agent"),
}


def evaluate_world_model(run: Run) -> bool:
    """``evaluation/world_model.json`` and ``world_model_clips.safetensors``, with the dynamics of phase 2 (of phase 1, before that): of
    held-out episodes, and under ``training`` of training episodes where ``num_training_windows`` asks for them.

    Where latents cannot be decoded, or recorded frames are not there: ``evaluation/world_model_latents.json``, errors of latents.
    """
    config, store = run.config.evaluation, run.episodes() if run.has_episodes else None
    tokenizer = run.own_tokenizer()
    latents = run.latents(tokenizer)
    phase = "phase2" if run.has("phase2") else "phase1"
    sizes = config.world_model
    inputs = {
        "phase": phase,
        "weights": weights_fingerprint(run.path / phase),
        "latents": latents.fingerprint(),
        "settings": sizes.model_dump(mode="json") | {"sampler": config.sampler.model_dump(mode="json"), "seed": run.config.seed},
    }
    if store is None or tokenizer is None or not tokenizer.can_decode:
        return _evaluate_latent_dreams(run, latents, phase, inputs)
    inputs["tokenizer"] = weights_fingerprint(run.path / "tokenizer")  # its decoder, which the latents do not depend on
    path = run.evaluation_path / "world_model.json"
    clips_path = run.evaluation_path / "world_model_clips.safetensors"
    if _holds(path, inputs, clips_path):
        return False
    agent, seed = run.agent(phase, latents.tokenizer_fingerprint), run.seed("evaluation")

    def dreams(episodes: Ids, num_windows: int) -> tuple[Windows, dict[str, Tensor], WorldModelResult]:
        num_steps = sizes.context + sizes.horizon
        windows = draw_windows(store, latents, episodes, tokenizer=tokenizer, num_steps=num_steps, num_windows=num_windows, seed=seed)
        clips = predict(agent, tokenizer, Sampler(agent.dynamics, config.sampler), windows, sizes.context, seed)
        return windows, clips, score(windows, clips, context=sizes.context, stride=latents.temporal_stride, fps=store.fps, seed=seed)

    train_ids, val_ids = run.split(len(latents))
    windows, clips, result = dreams(val_ids, sizes.num_windows)
    training = dreams(train_ids, sizes.num_training_windows)[2].to_json() if sizes.num_training_windows else None
    kept = {f"dream/{name}": clip[: sizes.num_clips] for name, clip in clips.items()} | {"truth": windows.frames[: sizes.num_clips]}
    first, is_start = windows.batch.latents[:NUM_RECONSTRUCTIONS, :1], windows.is_start[:NUM_RECONSTRUCTIONS]
    kept["reconstruction/recorded"] = windows.frames[:NUM_RECONSTRUCTIONS, 0]
    kept["reconstruction/decoded"] = decode(tokenizer, first, is_start, run.device)[:, 0]
    _write_clips(clips_path, kept)
    write_json(path, {"inputs": inputs, "result": result.to_json(), "training": training})
    run.save_config()
    return True


def _evaluate_latent_dreams(run: Run, latents: LatentStore, phase: str, inputs: dict[str, Any]) -> bool:
    config, path = run.config.evaluation, run.evaluation_path / "world_model_latents.json"
    if _holds(path, inputs):
        return False
    sizes, seed = config.world_model, run.seed("evaluation")
    agent = run.agent(phase, latents.tokenizer_fingerprint)

    def dreams(episodes: Ids, num_windows: int) -> LatentResult:
        drawn = draw_latent_windows(latents, episodes, num_steps=sizes.context + sizes.horizon, num_windows=num_windows, seed=seed)
        return score_latent_dreams(Sampler(agent.dynamics, config.sampler), *drawn, sizes.context, seed)

    train_ids, val_ids = run.split(len(latents))
    training = dreams(train_ids, sizes.num_training_windows).to_json() if sizes.num_training_windows else None
    write_json(path, {"inputs": inputs, "result": dreams(val_ids, sizes.num_windows).to_json(), "training": training})
    run.save_config()
    return True


@dataclass(frozen=True)
class Contestant:
    """Who plays, and its place in the table of returns."""

    label: str
    role: Role
    mode: Mode | None
    make: Callable[[], BatchPolicy]

    @property
    def key(self) -> str:
        return self.role if self.mode is None else f"{self.role} {self.mode}"


def evaluate_agent(run: Run) -> bool:
    """``evaluation/agent.json`` and ``agent_clips.safetensors``: everybody plays the same episodes in the real environment."""
    env, config = run.config.env, run.config.evaluation.agent
    if env is None:
        raise ValueError("env is null: there is no environment to play in; set env.name to evaluate the agent")
    phases = [phase for phase in TRAINED if run.has(phase)]
    if not phases:
        raise ValueError(f"{run.path}: holds no trained agent; run first: {run.command_for('train phase2')}")
    settings = {
        "agent": config.model_dump(mode="json"),
        "env": env.model_dump(mode="json"),
        "record": run.config.record.model_dump(mode="json"),
        "sampler": run.config.evaluation.sampler.model_dump(mode="json"),
        "seed": run.config.seed,
    }
    inputs = {"weights": {phase: weights_fingerprint(run.path / phase) for phase in phases}, "settings": settings}
    path, clips_path = run.evaluation_path / "agent.json", run.evaluation_path / "agent_clips.safetensors"
    if _holds(path, inputs, clips_path):
        return False
    rows: list[dict[str, Any]] = []
    clips: dict[str, Tensor] = {}
    if run.config.data.recordings is not None and run.has_episodes:
        rows.append({"label": "Recordings", "role": "recorded", "mode": None, "result": _recorded(run.episodes()).to_json()})
    for contestant in _contestants(run, env, phases):
        result = evaluate_policy(
            lambda: make_env(env.name, **env.options),
            contestant.make(),
            num_episodes=config.num_episodes,
            seed=run.config.seed,
            num_envs=config.num_envs,
            success_return=config.success_return,
            num_videos=min(config.num_clips, config.num_episodes),
        )
        clips |= {f"{contestant.key}/{i}": torch.from_numpy(video) for i, video in enumerate(result.videos)}
        rows.append({"label": contestant.label, "role": contestant.role, "mode": contestant.mode, "result": result.to_json()})
    _write_clips(clips_path, clips)
    write_json(path, {"inputs": inputs, "fps": _fps(env), "rows": rows})
    run.save_config()
    return True


def _contestants(run: Run, env: EnvConfig, phases: list[str]) -> list[Contestant]:
    config = run.config.evaluation
    found = [Contestant("Random", "random", None, lambda: PlayerPolicy(lambda: make_player("random", env.name)))]
    if run.config.data.recordings is None:
        mixture = run.config.record
        found.append(Contestant("Recorded players", "recorded", None, lambda: PlayerPolicy(lambda: RecordedMixture(mixture, env))))
    if config.agent.scripted is not None:
        scripted = config.agent.scripted
        found.append(Contestant("Scripted player", "scripted", None, lambda: PlayerPolicy(lambda: make_player(scripted, env.name))))
    tokenizer = run.tokenizer() if phases else None
    for phase in phases:
        assert tokenizer is not None
        check_actions(run.agent(phase, tokenizer.fingerprint()), env, run.path / phase)
        label, role = TRAINED[phase]
        for mode in ("sampled", "argmax"):
            found.append(Contestant(label, role, mode, _agent_maker(run, phase, tokenizer, mode)))
    return found


def _agent_maker(run: Run, phase: str, tokenizer: Tokenizer, mode: Mode) -> Callable[[], BatchPolicy]:
    def make() -> BatchPolicy:
        agent = run.agent(phase, tokenizer.fingerprint())
        return AgentPolicy(agent, tokenizer, run.config.evaluation.sampler, mode=mode, name=f"{phase}-{mode}")

    return make


class RecordedMixture:
    """The players that were recorded, each in its share of the episodes."""

    name = "recorded players"

    def __init__(self, config: RecordConfig, env: EnvConfig) -> None:
        self._players = [make_any_player(player.name, env, **player.options) for player in config.players]
        self._shares = [player.fraction for player in config.players]

    def reset(self, env: Env, seed: int) -> None:
        rng = np.random.default_rng(player_rng(seed).integers(2**31))
        self._now: Player = self._players[int(rng.choice(len(self._players), p=np.array(self._shares) / sum(self._shares)))]
        self._now.reset(env, seed)

    def act(self, frame: np.ndarray) -> Any:
        return self._now.act(frame)


def _recorded(store: EpisodeStore) -> AgentResult:
    lengths = tuple(int(n) - 1 for n in store.lengths)
    return AgentResult("recordings", tuple(map(float, store.returns)), lengths, successes=(), seeds=())


def _fps(env: EnvConfig) -> float:
    made = cast(gymnasium.Env, make_env(env.name, **env.options))
    fps = float(made.metadata.get("render_fps") or 10)
    made.close()
    return fps


def _holds(path: Path, inputs: dict[str, Any], *clips_paths: Path) -> bool:
    """Whether the result at ``path`` was computed from the same inputs."""
    return path.exists() and all(p.exists() for p in clips_paths) and read_json(path).get("inputs") == json.loads(json.dumps(inputs))


def _write_clips(path: Path, clips: dict[str, Tensor]) -> None:
    write_atomic(path, save({name: clip.contiguous() for name, clip in clips.items()}))


def read_clips(path: Path, prefix: str) -> dict[str, Tensor]:
    """The clips whose names begin with ``prefix/``, without it."""
    tensors = read_tensors(path)
    return {name.removeprefix(f"{prefix}/"): clip for name, clip in tensors.items() if name.startswith(f"{prefix}/")}
