"""``dreamer check`` on fresh models, on a run, on models that learned something else, and on phases that are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamer.cli import PRESETS, main
from dreamer.config import DreamerConfig
from dreamer.data import LatentStore, LatentWriter
from dreamer.losses import ShortcutForcingConfig, ShortcutForcingLoss
from dreamer.models import Agent, CausalTokenizer
from dreamer.pipeline import Run, check, run_stage
from dreamer.training import phase3
from dreamer.training.checkpoint import save_checkpoint
from dreamer.training.models_io import agent_info
from dreamer.types import ActionComponent, ActionSpace
from dreamer.yaml_config import load_config

SPACE = ActionSpace((ActionComponent("action", "categorical", 5),))
MAX_STEPS, PICTURES = 16, 4
SMALL = ["threads=1", "record.num_episodes=10", "phase0.normalization_frames=16", *(f"phase{n}.train.steps=2" for n in range(2))]


def run_check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    return main(["check", *words]), capsys.readouterr().out


def parts(text: str, phase: str) -> dict[str, list[str]]:
    """The table of a phase: part -> trainable, frozen, got gradient, mode, expected, verdict."""
    block = text.split(f"gradient flow in {phase},")[1].split("\n\n")[0]
    return {row.split()[0]: row.split()[1:] for row in block.splitlines()[2:]}


def test_fresh_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run_check(capsys, "--preset", "smoke", f"run_dir={tmp_path / 'run'}")
    assert code == 0 and text.endswith("all 23 checks hold\n")
    assert "tokenizer  fresh" in text and "latents    made up" in text and "agent      fresh" in text
    assert "F = 3 frames are encoded as (B, T, N, Z) = (1, 3, 16, 8); expected (1, 3, 16, 8)" in text
    config = load_config(DreamerConfig, PRESETS / "smoke.yaml")
    sizes = {"action_space": SPACE, "token_grid": (4, 4), "latent_channels": 8}
    number = f"{sum(p.numel() for p in Agent(config.agent, **sizes).value.parameters()):,}"
    assert parts(text, "phase2")["value"] == ["0", number, "0", "train", "frozen", "ok"]
    value = parts(text, "phase3")["value"]
    assert value[:2] == [number, "0"] and value[2] != "0" and value[3:] == ["train", "learns", "ok"]
    assert [part for part, row in parts(text, "phase3").items() if row[4] == "learns"] == ["policy", "value"]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("check") / "run"
    made = Run(load_config(DreamerConfig, PRESETS / "smoke.yaml", [*SMALL, f"run_dir={path}"]))
    for stage in ("record", "tokenizer", "pretokenize", "phase1"):
        run_stage(made, stage)
    return made


def test_a_run_that_has_learned_too_little(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    code, text = run_check(capsys, "--preset", "smoke", *SMALL, f"run_dir={run.path}")
    assert f"tokenizer  {run.path / 'tokenizer'}\nlatents    {run.path / 'latents'}, 10 episodes" in text
    assert f"agent      {run.path / 'phase1'}\n" in text
    assert code == 1 and "1 of 26 checks FAIL\n  x-prediction: the output reads as nothing clear; expected clean latents" in text
    steps = sum(run.episodes().lengths)
    assert f"ok     each episode of F frames has 1 + ceil((F - 1) / 1) latent steps, {steps} in all" in text
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_trained_agent_is_never_passed_over(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Fresh models in its place would pass."""
    away = run.latents_path.rename(run.path / "away")
    try:
        assert main(["check", "--preset", "smoke", *SMALL, f"run_dir={run.path}"]) == 2
    finally:
        away.rename(run.latents_path)
    assert f"{run.latents_path}: does not exist; run first: dreamer pretokenize" in capsys.readouterr().err


def test_every_broken_promise_is_found(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    encode = CausalTokenizer.encode
    monkeypatch.setattr(CausalTokenizer, "encode", lambda self, frames: encode(self, frames)[:, : 1 + len(frames) // 8])  # floor, not ceil
    monkeypatch.setattr(phase3, "freeze_world_model", lambda agent: None)
    code, text = run_check(capsys, "--preset", "smoke", *SMALL, f"run_dir={run.path}")
    assert code == 1 and "5 of 26 checks FAIL" in text
    assert "FAILS  F = 3 frames are encoded as (B, T, N, Z) = (1, 1, 16, 8); expected (1, 3, 16, 8)" in text
    for part in ("dynamics", "reward", "continue_"):
        assert " ".join(parts(text, "phase3")[part][4:]) == "frozen FAILS: asks for gradients"
        assert re.search(rf"^  gradient flow in phase3, .*: {part} asks for gradients$", text, flags=re.M)


# ---- latents from elsewhere, and models that learned from them --------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos that walk through four pictures."""
    path = tmp_path_factory.mktemp("latents") / "latents"
    pictures = np.random.default_rng(0).standard_normal((PICTURES, 4, 3)).astype(np.float32)
    facts = {"tokenizer_fingerprint": "t", "token_grid": (2, 2), "latent_channels": 3, "temporal_stride": 1, "source_fingerprint": "s"}
    with LatentWriter(path, action_space=SPACE, **facts) as writer:
        for start in range(10):
            zeros = np.zeros(6, np.float32)
            writer.add(pictures[(start + np.arange(6)) % PICTURES], zeros[:, None, None], np.ones((6, 1), bool), zeros, zeros > 0)
    return path


@pytest.fixture
def words(latents: Path, tmp_path: Path) -> list[str]:
    transformer = "{width: 32, num_layers: 2, num_heads: 2, num_kv_heads: 2, time_every: 2, context_length: 4}"
    return [
        f"run_dir={tmp_path / 'run'}",
        f"data.latents={latents}",
        "env=null",
        "device=cpu",
        f"agent.dynamics={{transformer: {transformer}, num_registers: 1, max_steps: {MAX_STEPS}}}",
        "agent.heads={hidden: 8, num_distances: 1, num_bins: 11}",
        "phase1.sequence_length=3",
        "phase2.sequence_length=3",
        "phase3.imagination.rollout={horizon: 2, context: 2, sampler: {num_steps: 2}}",
        "evaluation.world_model.context=2",
    ]


def train_and_save(words: list[str], target: Callable[[Tensor, Tensor], Tensor], tokenizer: str = "t") -> None:
    """Phase 1's checkpoint of a dynamics that was taught ``target(clean, noise)``."""
    run = Run(load_config(DreamerConfig, None, words))
    torch.manual_seed(0)
    agent = Agent(run.config.agent, action_space=SPACE, token_grid=(2, 2), latent_channels=3)
    loss, batch = (
        ShortcutForcingLoss(ShortcutForcingConfig(bootstrap_fraction=0), MAX_STEPS),
        check._recorded_batch(run, run.latents(None), 3),
    )
    optimizer, generator = torch.optim.Adam(agent.dynamics.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    for _ in range(200):
        c = loss.corrupt(batch.latents, generator)
        tau = (c.signal_idx / MAX_STEPS)[..., None, None]
        output = agent.dynamics(c.noisy, c.signal_idx, c.step_idx, batch.prev_actions, batch.prev_action_mask).latents
        optimizer.zero_grad()
        (output - target(c.clean, (c.noisy - tau * c.clean) / (1 - tau))).square().mean().backward()
        optimizer.step()
    info = agent_info(agent, tokenizer_fingerprint=tokenizer, phase="phase1")
    tensors: dict[str, Any] = {"model_tensors": agent.state_dict(), "model_info": info, "train_tensors": {"x": torch.zeros(1)}}
    save_checkpoint(run.path / "phase1", 1, **tensors, state={})


def test_a_model_that_predicts_clean_latents(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    train_and_save(words, lambda clean, noise: clean)
    code, text = run_check(capsys, *words)
    assert code == 0, text
    assert "tokenizer  none: the latents come without theirs" in text and "ok     the output reads as clean latents" in text
    assert [line.split()[0] for line in text.splitlines() if re.match(r" +0\.\d{3} ", line)] == [
        "0.000",
        "0.250",
        "0.500",
        "0.750",
        "0.938",
    ]
    assert "tokenizer" not in parts(text, "phase1")


def test_a_model_that_predicts_velocities(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    train_and_save(words, lambda clean, noise: clean - noise)
    code, text = run_check(capsys, *words)
    assert code == 1 and "1 of 19 checks FAIL\n  x-prediction: the output reads as velocities; expected clean latents\n" in text


def test_bad_input_ends_with_2(words: list[str], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*given: str) -> str:
        assert main(["check", *given]) == 2
        return capsys.readouterr().err

    assert "no settings" in refused()
    assert "window of 7 is longer" in refused(*words, "phase1.sequence_length=7")
    assert "absent: does not exist" in refused(*words, f"data.latents={tmp_path / 'absent'}")
    assert "no recordings here" in refused(f"run_dir={tmp_path / 'run'}", "env=null", f"data.recordings={{path: {tmp_path}, reader: npy}}")
    save = Run(load_config(DreamerConfig, None, words))
    agent = Agent(save.config.agent, action_space=SPACE, token_grid=(2, 2), latent_channels=3)
    info = agent_info(agent, tokenizer_fingerprint="another one", phase="phase1")
    save_checkpoint(
        save.path / "phase1", 1, model_tensors=agent.state_dict(), model_info=info, train_tensors={"x": torch.zeros(1)}, state={}
    )
    assert "was trained on latents of another tokenizer" in refused(*words)


def test_without_rewards_there_is_no_phase_3(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(LatentStore, "has_rewards", property(lambda self: np.zeros(len(self), bool)))
    code, text = run_check(capsys, *words)
    assert code == 0 and "left out: no episode's rewards are known" in text
    assert [parts(text, "phase2")[part][4] for part in ("policy", "reward", "continue_")] == ["learns", "trainable", "trainable"]


# ---- Cosmos -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "tokens", "channels"), [("mean", 16, 16), ("project", 16, 24), ("none", 64, 16)])
def test_a_fresh_cosmos_tokenizer(
    mode: str, tokens: int, channels: int, small_cosmos: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """At reduced width, without weights and without recordings: 10 frames are 3 latent steps, and 8 actions go with each."""
    monkeypatch.setattr(check, "build_network", lambda architecture: small_cosmos())
    settings = [
        f"run_dir={tmp_path}",
        "env=null",
        "device=cpu",
        "data.recordings={path: /no/such, reader: minerl}",
        "phase3.train.batch_size=2",
    ]
    settings += ["cosmos_tokenizer.enabled=true", f"cosmos_tokenizer.spatial_mode={mode}", f"cosmos_tokenizer.latent_dim={channels}"]
    settings += ["cosmos_tokenizer.upsampled_size=[64, 64]", "phase0.num_frames=9", "agent.dynamics.max_steps=4"]
    settings += ["agent.dynamics.transformer={width: 16, num_layers: 1, num_heads: 1, num_kv_heads: 1, time_every: 1, context_length: 4}"]
    settings += ["agent.heads={hidden: 8, num_distances: 1, num_bins: 11}", "phase1.sequence_length=3", "phase2.sequence_length=3"]
    settings += ["phase3.imagination.rollout={horizon: 1, context: 2, sampler: {num_steps: 1}}", "evaluation.world_model.context=2"]
    code, text = run_check(capsys, *settings)
    assert code == 0, text
    shape = f"(1, 3, {tokens}, {channels})"
    assert f"F = 10 frames are encoded as (B, T, N, Z) = {shape}; expected {shape}: T = 1 + ceil((F - 1) / 8)" in text
    assert "actions of a latent step: 8;" in text and "ok     the tokenizer stays in eval mode after .train()" in text
    for phase in ("phase1", "phase2", "phase3"):
        trainable, frozen, reached, *rest = parts(text, phase)["tokenizer"]
        assert (trainable, reached, rest) == ("0", "0", ["eval", "frozen", "ok"]) and int(frozen.replace(",", "")) > 10_000
