"""Settings of what happens around training: environment, recording, data, evaluation, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dreamer.evaluation.open_loop import WorldModelEvaluationConfig
from dreamer.imagination import SamplerConfig
from dreamer.types import Config


class EnvConfig(Config):
    name: str = "crafter-chop"
    options: dict[str, Any] = Field(default_factory=dict)  # of the environment


class PlayerConfig(Config):
    name: str
    options: dict[str, Any] = Field(default_factory=dict)  # of the player
    fraction: float = Field(default=1.0, gt=0, le=1)  # of the episodes; all players' fractions sum to 1


class RecordConfig(Config):
    num_episodes: int = Field(default=200, ge=2)
    players: tuple[PlayerConfig, ...] = Field(default=(PlayerConfig(name="random"),), min_length=1)


class RecordingsConfig(Config):
    path: Path
    reader: str = "store"  # store: an episode store as it is; others: recordings that are first imported into the run
    options: dict[str, Any] = Field(default_factory=dict)  # of the reader


class DataConfig(Config):
    val_fraction: float = Field(default=0.1, gt=0, lt=1)  # of the episodes: held out
    recordings: RecordingsConfig | None = None  # null: record with the players
    latents: Path | None = None  # made by pretokenize_dataset.py: then phases 1 to 3 need no recordings. null: those of the run
    actions: Literal["all", "linspace"] = "all"  # of a latent step's frames, or one a step; linspace loses the others
    num_val_batches: int = Field(default=4, ge=1)  # looked at in each validation
    num_workers: int = Field(default=1, ge=0)  # threads that make batches ahead; 0: none. Their number changes no batch


class LongCloningConfig(Config):
    """The baseline that imagination must beat: phase 2 goes on for as long as phase 3 takes."""

    extra_steps: int | None = Field(default=None, ge=1)  # null: phase 3's steps, or more if these take less time than phase 3 took
    learning_rate_scale: float = Field(default=0.3, gt=0, le=1)  # of phase 2's rates at its start; they fall to the end of the baseline


class AgentEvaluationConfig(Config):
    num_episodes: int = Field(default=100, ge=1)
    num_envs: int = Field(default=25, ge=1)  # stepped side by side
    success_return: float | None = None  # an episode that returns this much is a success, where the environment does not say
    scripted: str | None = None  # the player that stands for the optimum
    num_clips: int = Field(default=2, ge=1)  # episodes kept as pictures for the report


class EvaluationConfig(Config):
    sampler: SamplerConfig = SamplerConfig()
    world_model: WorldModelEvaluationConfig = WorldModelEvaluationConfig()
    agent: AgentEvaluationConfig = AgentEvaluationConfig()


class ReportConfig(Config):
    """Words for the people who read the report."""

    title: str = "Dreamer 4"
    summary: str = ""
    notice: str = ""  # a warning above everything
    returns_note: str = ""  # what one unit of return is
    limits: tuple[str, ...] = ()
