"""The frozen Cosmos tokenizer through the stages of a run: every config that comes along, 8 actions a step, latents from elsewhere."""

from __future__ import annotations

import json
import logging
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreamer.cli import PRESETS, main, train_script
from dreamer.config import DreamerConfig
from dreamer.data import EpisodeStore, EpisodeWriter, LatentStore, import_recordings, split_episodes
from dreamer.data.files import read_json
from dreamer.models import CosmosTokenizerWrapper
from dreamer.pipeline import STAGES, Run, run_all, run_stage, stages
from dreamer.pipeline.dry_run import dry_run, find_inputs
from dreamer.pipeline.summary import key_figures
from dreamer.pipeline.train import episode_returns
from dreamer.training.checkpoint import read_manifest
from dreamer.training.loop import Trainer
from dreamer.training.models_io import load_tokenizer
from dreamer.yaml_config import ConfigError, load_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PHASES = ("phase1", "phase2", "phase3")
SCRIPTS = ("train_phase1_cosmos.py", "train_phase2.py", "train_phase3.py")

TRANSFORMER = "{width: 16, num_layers: 2, num_heads: 2, num_kv_heads: 1, time_every: 2, context_length: 4, mlp_ratio: 1}"
TRAIN = "{steps: 2, batch_size: 4, accumulate: 1, precision: fp32, log_every: 1, validate_every: 2, checkpoint_every: 2}"
SMALL = [
    "device=cpu",
    "data.val_fraction=0.4",
    "data.num_val_batches=1",
    f"agent.dynamics.transformer={TRANSFORMER}",
    "agent.dynamics.num_registers=1",
    "agent.dynamics.max_steps=4",
    "agent.heads={hidden: 16, num_distances: 2, num_bins: 11}",
    *(f"phase{n}.train={TRAIN}" for n in range(4)),
    *(f"phase{n}.{key}" for n in (1, 2) for key in ("sequence_length=3", "long_sequence_length=5")),
    "phase0.normalization_frames=18",
    "phase3.imagination.rollout={horizon: 2, context: 2, sampler: {num_steps: 2}}",
    "evaluation.sampler.num_steps=2",
    "evaluation.world_model={context: 2, horizon: 2, num_windows: 4, num_clips: 1}",
]


@pytest.fixture(scope="session")
def recordings(write_extracted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six episodes in the layout of extracted MineRL recordings: 41 frames or, with an unfinished latent step, 44."""
    folder = tmp_path_factory.mktemp("mineRL_extracted") / "MineRLTreechop-v0"
    for index in range(6):
        write_extracted(folder / f"episode_{index}", 41 + 3 * (index % 2), seed=index)
    return folder.parent


@pytest.fixture(scope="session")
def weights(cosmos_weights: Path) -> str:
    return f"cosmos_tokenizer.checkpoint_path={cosmos_weights}"


def words(run_dir: Path, recordings: Path, *more: str) -> list[str]:
    return [*SMALL, f"run_dir={run_dir}", f"data.recordings.path={recordings}", *more]


def make_run(config: str, settings: list[str]) -> Run:
    return Run(load_config(DreamerConfig, CONFIGS / f"{config}.yaml", settings))


def go(run: Run, *names: str) -> None:
    for name in names:
        assert run_stage(run, name), name


def metrics(run: Run, phase: str) -> dict[str, float]:
    return json.loads((run.path / phase / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="session")
def means(recordings: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """configs/minerl_cosmos.yaml, made small, up to its latents; at 64x64, so that a token is the mean of 2x2 positions."""
    path = tmp_path_factory.mktemp("runs") / "means"
    run = make_run("minerl_cosmos", words(path, recordings, weights, "cosmos_tokenizer.upsampled_size=[64, 64]"))
    go(run, "record", "tokenizer", "pretokenize")
    return run


def copy_of(run: Run, path: Path) -> Run:
    shutil.copytree(run.path, path)
    return Run(run.config.model_copy(update={"run_dir": path}))


# ---- the configs ----------------------------------------------------------------------------------------------------------------


def test_the_checklists_config_goes_the_whole_way(means: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """8 actions a latent step through phases 1 to 3; what would need pictures is left out, and says so."""
    run = copy_of(means, tmp_path / "run")
    store = run.latents(run.tokenizer())
    assert (store.token_grid, store.latent_channels, store.temporal_stride, store.actions_per_step) == ((4, 4), 16, 8, 8)
    assert sorted(set(store.lengths.tolist())) == [6, 7]
    with caplog.at_level(logging.WARNING):
        go(run, *PHASES, "evaluate world-model", "report")
    said = [record.message for record in caplog.records if "pictures" in record.message]
    assert said == ["phase1: no pictures of dreams: these latents cannot be decoded (cosmos_tokenizer.spatial_mode mean)"]
    assert not list(run.path.rglob("media/dream*"))
    for phase, keys in {"phase1": {"val_action_gap_db"}, "phase2": {"val_bc_loss", "policy_loss"}, "phase3": {"val_kl", "entropy"}}.items():
        logged = metrics(run, phase)
        assert keys <= logged.keys() and all(np.isfinite(value) for value in logged.values())
        info = read_json(run.path / phase / "checkpoints" / "step_00000002" / "model.json")
        assert (info["actions_per_step"], info["tokenizer"]) == (8, store.tokenizer_fingerprint)
    policy = run.agent("phase3", store.tokenizer_fingerprint).policy.now(torch.randn(3, 16))
    assert policy.sample().shape == (3, 8, 9) and policy.log_prob(policy.mode()).shape == (3, 8)
    result = read_json(run.evaluation_path / "world_model_latents.json")["result"]
    assert set(result["mse"]) == {"true actions", "shuffled actions", "copy last step"} and result["horizon"] == 2
    assert any("latent steps open loop" in line for line in key_figures(run))
    assert "latent error, true actions" in run.report_path.read_text()
    assert not any(run_stage(run, name) for name in ("record", "tokenizer", "pretokenize", *PHASES, "evaluate world-model"))


def test_the_recommended_config_goes_the_whole_way_with_pictures(recordings: Path, weights: str, tmp_path: Path) -> None:
    run = make_run("minerl_cosmos_native", words(tmp_path, recordings, weights))
    go(run, "record", "tokenizer", "pretokenize")
    store = run.latents(run.tokenizer())
    assert (store.token_grid, store.latent_channels, store.actions_per_step) == ((8, 8), 16, 1)
    assert store.lengths.tolist() == run.episodes().lengths.tolist()
    go(run, *PHASES, "evaluate world-model", "report")
    assert "val_dream_psnr" in metrics(run, "phase1")
    assert set(read_json(run.evaluation_path / "world_model.json")["result"]["scores"]) >= {"true actions", "copy last frame"}


def test_an_own_tokenizer_on_contractor_recordings(write_vpt: Callable[..., Path], tmp_path: Path) -> None:
    for index in range(3):
        rows = [{"dx": float(t % 3), "keys": ["w"] if t % 2 else []} for t in range(12)]
        write_vpt(tmp_path / "vpt" / f"clip_{index}.mp4", rows, size=(64, 96))
    small = "{width: 16, num_layers: 2, num_heads: 2, num_kv_heads: 1, time_every: 2, context_length: 4, mlp_ratio: 1}"
    shrunk = [f"tokenizer.encoder={small}", f"tokenizer.decoder={small}", "data.recordings.options.size=[64, 64]"]
    run = make_run("vpt_causal", words(tmp_path / "run", tmp_path / "vpt", *shrunk))
    go(run, "record", "tokenizer", "pretokenize", "phase1", "phase2")
    assert run.latents(run.tokenizer()).token_grid == (8, 8)
    with pytest.raises(ValueError, match="no episode's rewards are known, so there is nothing to practise for"):
        run_stage(run, "phase3")


def test_two_clips_go_the_whole_way(write_vpt: Callable[..., Path], tmp_path: Path) -> None:
    """One trains and one is held out: its windows trade their actions. Without rewards, practice and its baseline are left out."""
    rng = np.random.default_rng(0)
    for index in range(2):
        rows = [{"dx": float(dx), "keys": ["w"] if dx % 2 else []} for dx in rng.integers(0, 40, 30)]
        write_vpt(tmp_path / "vpt" / f"clip_{index}.mp4", rows, size=(64, 96))
    small = "{width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, time_every: 0, mlp_ratio: 1}"
    shrunk = [f"tokenizer.encoder={small}", f"tokenizer.decoder={small}"]
    windows = ["evaluation.world_model={context: 2, horizon: 3, num_windows: 8, num_training_windows: 6, num_clips: 1}"]
    run, said = make_run("vpt_causal_small", words(tmp_path / "run", tmp_path / "vpt", *shrunk, *windows)), []
    run_all(run, said.append)
    assert [line.partition("] ")[2] for line in said if "left out" in line] == [
        "phase3: left out, the recordings hold no rewards to practise for",
        "bc_long: left out, the recordings hold no rewards to practise for",
        "evaluate agent: left out, env is null",
    ]
    found = read_json(run.evaluation_path / "world_model.json")
    names = {"true actions", "shuffled actions", "copy last frame", "reconstruction"}
    for key, count in {"result": 8, "training": 6}.items():
        assert set(found[key]["scores"]) == names and (found[key]["num_windows"], found[key]["num_episodes"]) == (count, 1)
    assert found["result"]["episode_sums"] != found["training"]["episode_sums"]
    told = "\n".join(key_figures(run))
    assert "on 1 held-out episodes" in told and "on 1 training episodes" in told and "training episodes" in run.report_path.read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_says_where_it_writes(path: Path) -> None:
    config = load_config(DreamerConfig, path)
    assert config.run_dir != DreamerConfig().run_dir
    if config.cosmos_tokenizer.enabled:
        assert config.cosmos_tokenizer.checkpoint_path == Path("cosmos_tokenizer/CV8x8x8")


def test_the_checklists_config_has_16_tokens_of_16() -> None:
    cosmos = load_config(DreamerConfig, CONFIGS / "minerl_cosmos.yaml").cosmos_tokenizer
    assert (cosmos.num_tokens, cosmos.latent_dim, cosmos.temporal_stride, cosmos.upsampled_size) == (16, 16, 8, (256, 256))


# ---- the tokenizer --------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_learns_nothing_is_written_at_once_and_needs_its_origin_no_more(
    recordings: Path, cosmos_weights: Path, tmp_path: Path
) -> None:
    origin = shutil.copytree(cosmos_weights, tmp_path / "origin")
    more = [f"cosmos_tokenizer.checkpoint_path={origin}"]
    run = make_run("minerl_cosmos_native", words(tmp_path / "run", recordings, *more))
    go(run, "tokenizer")  # before anything was recorded: nothing is learned from frames
    assert [p.name for p in (run.path / "tokenizer" / "checkpoints").iterdir()] == ["step_00000000"]
    shutil.rmtree(origin)
    assert run_stage(run, "tokenizer") is False
    tokenizer = run.tokenizer()
    assert isinstance(tokenizer, CosmosTokenizerWrapper) and tokenizer.can_decode
    other = words(tmp_path / "run", recordings, *more, "cosmos_tokenizer.time_mode=video")
    with pytest.raises(ValueError, match=r"was trained with cosmos_tokenizer.time_mode='per_frame', this config says 'video'"):
        run_stage(make_run("minerl_cosmos_native", other), "tokenizer")
    go(run, "record")  # it has learned from no episodes, so that there may be new ones


PROJECT = [  # 16x16 frames, 2x2 positions
    *(f"cosmos_tokenizer.{side}=[16, 16]" for side in ("frame_size", "upsampled_size")),
    *(f"cosmos_tokenizer.{word}" for word in ("spatial_mode=project", "num_latent_tokens=4", "latent_dim=8")),
    "phase0.num_frames=9",
    "data.recordings.reader=store",
]


@pytest.fixture(scope="session")
def small_store(write_extracted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    folder = tmp_path_factory.mktemp("small")
    for index in range(6):
        write_extracted(folder / "in" / f"episode_{index}", 30 + index, size=16, seed=index)
    return EpisodeStore(import_recordings(folder / "in", folder / "episodes", "npy").path)


def with_noise_in(store: EpisodeStore, path: Path, episode: int) -> Path:
    """A copy of the store, with other frames in one episode."""
    with EpisodeWriter(path, store.action_space, frames_per_second=store.fps) as writer:
        for index in range(len(store)):
            made = store.episode(index)
            if index == episode:
                made.frames[:] = np.random.default_rng(1).integers(0, 256, made.frames.shape, dtype=np.uint8)
            writer.add(made)
    return path


def test_the_projection_is_fitted_on_training_episodes_alone(small_store: EpisodeStore, weights: str, tmp_path: Path) -> None:
    train_ids, val_ids = split_episodes(len(small_store), 0.4)
    prints = []
    for name, episode in {"as_is": -1, "held_out": int(val_ids[0]), "training": int(train_ids[0])}.items():
        recorded = with_noise_in(small_store, tmp_path / f"episodes_{name}", episode)
        more = [*PROJECT, "phase0.normalization_frames=288", weights]
        run = make_run("minerl_cosmos", words(tmp_path / name, recorded, *more))
        go(run, "tokenizer")
        prints.append(run.tokenizer().fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_an_adaptation_goes_on_where_it_stopped_without_the_original_weights(
    small_store: EpisodeStore, cosmos_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = shutil.copytree(cosmos_weights, tmp_path / "origin")
    more = [*PROJECT, f"cosmos_tokenizer.checkpoint_path={origin}", "phase0.cosmos.adapt=all", "phase0.train.checkpoint_every=1"]
    whole, run = (make_run("minerl_cosmos", words(tmp_path / name, small_store.path, *more)) for name in ("whole", "run"))
    go(whole, "tokenizer")
    assert {"val_psnr", "val_psnr_mean_image", "val_latent_std"} <= metrics(whole, "tokenizer").keys()
    train_step = Trainer.train_step

    def interrupted(self: Trainer, batches: list) -> dict:
        if self.step == 1:
            raise KeyboardInterrupt
        return train_step(self, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", interrupted)
        run_stage(run, "tokenizer")
    with pytest.raises(ValueError, match="tokenizer: is at step 1 of 2; run again to finish it: dreamer train tokenizer"):
        run.tokenizer()
    shutil.rmtree(origin)
    go(run, "tokenizer")
    assert run_stage(run, "tokenizer") is False
    files = [r.path / "tokenizer" / "checkpoints" / "step_00000002" / "model.safetensors" for r in (whole, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    tokenizer = run.tokenizer()
    assert isinstance(tokenizer, CosmosTokenizerWrapper) and not any(p.requires_grad for p in tokenizer.parameters())
    go(run, "pretokenize", "phase1")  # with an unfinished step in most episodes; these latents can be decoded
    assert "val_dream_psnr" in metrics(run, "phase1")


def test_the_decoder_alone_adapts_and_the_same_latents_serve_on(recordings: Path, weights: str, tmp_path: Path) -> None:
    first = make_run("minerl_cosmos_native", words(tmp_path / "first", recordings, weights))
    go(first, "record", "tokenizer", "pretokenize")
    adapting = words(tmp_path / "second", recordings, weights, "phase0.cosmos.adapt=decoder")
    second = make_run("minerl_cosmos_native", adapting)
    for name in ("episodes", "latents"):
        shutil.copytree(first.path / name, second.path / name)
    go(second, "tokenizer")
    assert run_stage(second, "pretokenize") is False
    go(second, "phase1", "evaluate world-model")
    before, after = (run.tokenizer() for run in (first, second))
    sample = torch.from_numpy(LatentStore(second.latents_path).latents(0, 0, 2).astype(np.float32))[None]
    assert not torch.equal(before.decode(sample), after.decode(sample))
    decoder = list(second.path.glob("tokenizer/checkpoints/*/model.safetensors"))[-1]
    assert run_stage(second, "evaluate world-model") is False
    other = next(first.path.glob("tokenizer/checkpoints/*/model.safetensors"))
    manifest = read_manifest(decoder.parent)
    manifest["files"][decoder.name] = read_manifest(other.parent)["files"][other.name]
    shutil.copy(other, decoder)
    (decoder.parent / "manifest.json").write_text(json.dumps(manifest))
    assert run_stage(second, "evaluate world-model") is True  # other pictures of the same latents


def test_one_action_a_step_is_a_setting(means: Run, tmp_path: Path) -> None:
    run = copy_of(means, tmp_path / "run")
    one = Run(run.config.model_copy(update={"data": run.config.data.model_copy(update={"actions": "linspace"})}))
    said = "latents: was made with the actions 'all', not 'linspace'; set data.actions=all"
    for stage in ("pretokenize", "phase1"):
        with pytest.raises(ValueError, match=said):
            run_stage(one, stage)
    with pytest.raises(ValueError, match=said):
        dry_run(one.config, "phase1")
    shutil.rmtree(one.latents_path)
    assert find_inputs(one).actions_per_step == 1
    go(one, "pretokenize", "phase1")
    store = one.latents(one.tokenizer())
    assert (store.actions_per_step, store.temporal_stride) == (1, 8)
    frames = np.linspace(0, 40, 6).astype(int)
    assert np.array_equal(store.arrays(0)["actions"][:, 0], run.episodes().episode(0).actions[frames])
    with pytest.raises(ValueError, match="was made with the actions 'linspace', not 'all'; set data.actions=linspace"):
        run_stage(run, "phase1")


def test_missing_weights_end_the_command_with_the_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent"
    command = ["train", "tokenizer", "--config", str(CONFIGS / "minerl_cosmos.yaml"), f"run_dir={tmp_path / 'run'}"]
    assert main([*command, f"cosmos_tokenizer.checkpoint_path={absent}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"dreamer: error: {absent}: no weights of the Cosmos tokenizer here")
    assert f"hf download nvidia/Cosmos-1.0-Tokenizer-CV8x8x8 --local-dir {absent}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["tokenizer.patch_size=4"], "cosmos_tokenizer.enabled is true, so that the section tokenizer has no effect"),
        (
            ["cosmos_tokenizer.enabled=false", "phase0.cosmos.adapt=all"],
            "phase0.cosmos.adapt is all, but cosmos_tokenizer.enabled is false",
        ),
        (["phase0.cosmos.adapt=decoder"], "what cosmos_tokenizer.spatial_mode mean keeps cannot be decoded"),
        (
            ["cosmos_tokenizer.spatial_mode=project"],
            r"phase0.num_frames is 1; .* expected 8k \+ 1, from 9 to cosmos_tokenizer.reset_every = 121",
        ),
        (["cosmos_tokenizer.spatial_mode=none", "phase0.cosmos.adapt=all", "phase0.num_frames=16"], "phase0.num_frames is 16"),
        (["cosmos_tokenizer.spatial_mode=project", "phase0.num_frames=129"], "phase0.num_frames is 129"),
        (["data.recordings=null"], "env, data.recordings and data.latents are null: there is nothing to learn from"),
    ],
)
def test_settings_that_do_not_fit_together(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(DreamerConfig, CONFIGS / "minerl_cosmos.yaml", settings)
    load_config(DreamerConfig, CONFIGS / "minerl_cosmos.yaml", ["cosmos_tokenizer.spatial_mode=project", "phase0.num_frames=17"])


def test_steps_of_phase_0() -> None:
    def steps(config: str, *more: str) -> int:
        path = PRESETS / f"{config}.yaml" if config == "demo" else CONFIGS / f"{config}.yaml"
        return load_config(DreamerConfig, path, more).tokenizer_steps

    assert steps("demo") == 400 and steps("minerl_cosmos") == 0
    assert steps("minerl_cosmos_native", "phase0.cosmos.adapt=decoder", "phase0.train.steps=7") == 7


# ---- latents from elsewhere -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pretokenized(means: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(means.latents_path, tmp_path_factory.mktemp("data") / "pretokenized")


def test_phases_learn_from_latents_alone(
    means: Run, pretokenized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the scripts, without recordings and without a tokenizer; phases 1 to 3 are those of a run that has both, byte for byte."""
    settings = [*SMALL, f"run_dir={tmp_path / 'run'}", "cosmos_tokenizer.upsampled_size=[64, 64]"]
    for script in SCRIPTS:
        monkeypatch.setattr(sys, "argv", [script, "--data-path", str(pretokenized), *settings])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert done.value.code == 0
    assert "phase1: no pictures of dreams: data.latents come without the recorded frames" in caplog.text
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.yaml", "evaluation", *PHASES}
    run = Run(load_config(DreamerConfig, tmp_path / "run" / "config.yaml"))
    go(run, "evaluate world-model")
    assert read_json(run.evaluation_path / "world_model_latents.json")["result"]["num_windows"] == 4
    with pytest.raises(ValueError, match="run first: dreamer record"):
        run.episodes()
    whole = copy_of(means, tmp_path / "whole")
    for phase in PHASES:
        go(whole, phase)
        files = [r.path / phase / "checkpoints" / "step_00000002" / "model.safetensors" for r in (whole, run)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_returns_come_from_the_latents(means: Run) -> None:
    latents = means.latents(None)
    assert episode_returns(latents).tolist() == means.episodes().returns.tolist() and episode_returns(latents).min() > 0


def test_latents_that_do_not_fit_are_refused(means: Run, pretokenized: Path, tmp_path: Path, small_cosmos: Callable[..., Any]) -> None:
    def run(path: Path, *more: str) -> Run:
        return make_run("minerl_cosmos", [*SMALL, f"run_dir={path}", f"data.latents={pretokenized}", *more])

    with pytest.raises(ValueError, match="16 tokens a latent step of 8 frames; with cosmos_tokenizer as it is set, they would be 64 and 8"):
        run_stage(run(tmp_path / "a", "cosmos_tokenizer.num_latent_tokens=64"), "phase1")
    with pytest.raises(ValueError, match=r"absent: does not exist; .* python pretokenize_dataset.py --data-path RECORDINGS --output-path"):
        run_stage(run(tmp_path / "b", f"data.latents={tmp_path / 'absent'}"), "phase1")
    for more, said in {
        "upsampled_size=[128, 128]": r"was made with cosmos_tokenizer.upsampled_size=\[64, 64\], this config says \[128, 128\]",
        "reset_every=9": "was made with cosmos_tokenizer.reset_every=121, this config says 9; use the settings that the latents were made",
    }.items():
        other = run(tmp_path / "e", "cosmos_tokenizer.upsampled_size=[64, 64]", f"cosmos_tokenizer.{more}")
        with pytest.raises(ValueError, match=said):
            run_stage(other, "phase1")
        with pytest.raises(ValueError, match=said):
            dry_run(other.config, "phase1")
    with pytest.raises(ValueError, match="absent: does not exist; data.latents names a folder of latents"):
        dry_run(run(tmp_path / "e", f"data.latents={tmp_path / 'absent'}").config, "phase1")
    shutil.copytree(means.path / "tokenizer", tmp_path / "c" / "tokenizer")
    same = run(tmp_path / "c", "cosmos_tokenizer.upsampled_size=[64, 64]")
    assert same.latents(same.own_tokenizer()).tokenizer_fingerprint == load_tokenizer(means.path / "tokenizer").fingerprint()
    other = run(tmp_path / "d", "cosmos_tokenizer.upsampled_size=[64, 64]", f"cosmos_tokenizer.checkpoint_path={tmp_path / 'weights'}")
    small_cosmos(encoder_block_out_channels=(8, 12, 16, 24)).save_pretrained(tmp_path / "weights")
    with pytest.raises(ValueError, match="latents were made by tokenizer"):  # by the weights that are named, though none are in the run
        run_stage(other, "phase1")
    go(other, "tokenizer")
    with pytest.raises(ValueError, match="latents were made by tokenizer"):
        run_stage(run(tmp_path / "d", "cosmos_tokenizer.upsampled_size=[64, 64]"), "phase1")


def test_a_run_on_latents_leaves_out_what_makes_them(tmp_path: Path, pretokenized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda run, name=name: bool(ran.append(name)))
    size = "cosmos_tokenizer.upsampled_size=[64, 64]"  # that of the fixture
    run = make_run("minerl_cosmos", [*SMALL, f"run_dir={tmp_path}", f"data.latents={pretokenized}", size])
    stages.run_all(run, lambda text: None)
    assert ran == ["phase1", "phase2", "phase3", "bc_long", "evaluate world-model", "report"]
    monkeypatch.undo()
    before = LatentStore(pretokenized).fingerprint()
    assert run_stage(run, "pretokenize") is False and LatentStore(pretokenized).fingerprint() == before


def test_a_script_takes_the_settings_of_its_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SMALL, f"run_dir={tmp_path}"]
    assert train_script("phase1", CONFIGS / "minerl_cosmos.yaml", ["--data-path", f"{tmp_path}/a b", *settings]) == 2
    assert f"{tmp_path}/a b: does not exist" in capsys.readouterr().err
    assert train_script("phase1", CONFIGS / "minerl_cosmos.yaml", ["--no-such-flag"]) == 2
    assert "unrecognized argument '--no-such-flag'" in capsys.readouterr().err
    assert train_script("phase1", CONFIGS / "minerl_cosmos.yaml", ["--config", "absent.yaml"]) == 2
    assert "absent.yaml: no such config file" in capsys.readouterr().err
    for script in SCRIPTS:
        assert len((ROOT / script).read_text().splitlines()) <= 25
