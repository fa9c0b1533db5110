"""The root config: the config classes of all rooms in one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from dreamer.envs import env_kind, make_player
from dreamer.models import AgentConfig, CausalTokenizerConfig, CosmosTokenizerConfig
from dreamer.training.distributed import ParallelConfig
from dreamer.training.phase0 import Phase0Config
from dreamer.training.phase1 import Phase1Config
from dreamer.training.phase2 import Phase2Config
from dreamer.training.phase3 import Phase3Config
from dreamer.training.settings import DataConfig, EnvConfig, EvaluationConfig, LongCloningConfig, RecordConfig, ReportConfig
from dreamer.types import Config


class DreamerConfig(Config):
    """Everything that a run in ``run_dir`` depends on."""

    seed: int = Field(default=0, ge=0)
    run_dir: Path = Path("runs/default")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)  # of PyTorch on the CPU; null: as many as it likes
    parallel: ParallelConfig = ParallelConfig()
    env: EnvConfig | None = EnvConfig()  # null: recordings or latents only, no evaluation of the agent
    record: RecordConfig = RecordConfig()
    data: DataConfig = DataConfig()
    tokenizer: CausalTokenizerConfig = CausalTokenizerConfig()
    cosmos_tokenizer: CosmosTokenizerConfig = CosmosTokenizerConfig()
    agent: AgentConfig = AgentConfig()
    phase0: Phase0Config = Phase0Config()
    phase1: Phase1Config = Phase1Config()
    phase2: Phase2Config = Phase2Config()
    bc_long: LongCloningConfig = LongCloningConfig()
    phase3: Phase3Config = Phase3Config()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> DreamerConfig:
        """What would otherwise fail only when its phase begins, long after the start."""
        if self.env is None and self.data.recordings is None and self.data.latents is None:
            raise ValueError("env, data.recordings and data.latents are null: there is nothing to learn from; set one of them")
        self._check_tokenizer()
        if self.env is not None:
            self._check_env(self.env)
        seen, finest = self.agent.dynamics.transformer.context_length, self.agent.dynamics.max_steps
        for key, steps in {
            "phase3.imagination.rollout.context": self.phase3.imagination.rollout.context,
            "evaluation.world_model.context": self.evaluation.world_model.context,
        }.items():
            if steps > seen:
                raise ValueError(f"{key} is {steps}; agent.dynamics.transformer.context_length is only {seen}")
        for key, phase in {"phase1": self.phase1, "phase2": self.phase2}.items():
            if phase.long_sequence_length is not None and phase.long_sequence_length <= seen:
                raise ValueError(
                    f"{key}.long_sequence_length is {phase.long_sequence_length}; expected above "
                    f"agent.dynamics.transformer.context_length = {seen}, or null for no long rows"
                )
        signals = {
            "phase1.shortcut.context_signal": self.phase1.shortcut.context_signal,
            "phase2.shortcut.context_signal": self.phase2.shortcut.context_signal,
            "phase3.imagination.rollout.sampler.context_signal": self.phase3.imagination.rollout.sampler.context_signal,
            "evaluation.sampler.context_signal": self.evaluation.sampler.context_signal,
        }
        if len(set(signals.values())) > 1:
            told = ", ".join(f"{key}={value:g}" for key, value in signals.items())
            raise ValueError(f"{told}: the past must look the same in training, imagination and evaluation; give all of them one value")
        for key, steps in {
            "phase3.imagination.rollout.sampler.num_steps": self.phase3.imagination.rollout.sampler.num_steps,
            "evaluation.sampler.num_steps": self.evaluation.sampler.num_steps,
        }.items():
            if steps > finest:
                raise ValueError(f"{key} is {steps}; agent.dynamics.max_steps is only {finest}")
        return self

    def _check_env(self, env: EnvConfig) -> None:
        try:
            env_kind(env.name)
        except ValueError as error:
            raise ValueError(f"env.name: {error}") from None
        if self.evaluation.agent.scripted is not None:
            try:
                make_player(self.evaluation.agent.scripted, env.name)
            except ValueError as error:
                raise ValueError(f"evaluation.agent.scripted: {error}") from None

    def _check_tokenizer(self) -> None:
        cosmos, adapt, num_frames = self.cosmos_tokenizer, self.phase0.cosmos.adapt, self.phase0.num_frames
        if not cosmos.enabled:
            if adapt != "none":
                raise ValueError(f"phase0.cosmos.adapt is {adapt}, but cosmos_tokenizer.enabled is false: it would have no effect")
            return
        if self.tokenizer != CausalTokenizerConfig():
            raise ValueError("cosmos_tokenizer.enabled is true, so that the section tokenizer has no effect; remove one of them")
        if adapt != "none" and cosmos.spatial_mode == "mean":
            raise ValueError(
                f"phase0.cosmos.adapt is {adapt}, but what cosmos_tokenizer.spatial_mode mean keeps cannot be decoded, so that nothing "
                "tells how to adapt; use spatial_mode project or none, or adapt none"
            )
        stride, longest = cosmos.temporal_stride, cosmos.reset_every
        in_time = stride > 1 and (adapt != "none" or cosmos.spatial_mode == "project")
        if in_time and ((num_frames - 1) % stride or not stride < num_frames <= longest):
            raise ValueError(
                f"phase0.num_frames is {num_frames}; Cosmos learns from whole latent steps, so in time_mode video expected {stride}k + 1, "
                f"from {stride + 1} to cosmos_tokenizer.reset_every = {longest}"
            )

    @property
    def tokenizer_steps(self) -> int:
        """Optimiser steps of phase 0: none for a Cosmos tokenizer that is taken as it is."""
        return 0 if self.cosmos_tokenizer.enabled and self.phase0.cosmos.adapt == "none" else self.phase0.train.steps
