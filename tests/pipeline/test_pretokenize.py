"""Recordings to latents from the command line, with the Cosmos network at reduced width, and a run's own stage."""

from __future__ import annotations

import errno
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreamer import cli
from dreamer.cli import main
from dreamer.config import DreamerConfig
from dreamer.data import EpisodeStore, LatentStore, import_recordings, make_reader
from dreamer.models import CausalTokenizer, CausalTokenizerConfig, TransformerConfig, create_cosmos_tokenizer
from dreamer.models.cosmos_weights import build_network
from dreamer.pipeline import collect
from dreamer.pipeline.collect import ProgressBar
from dreamer.pipeline.pretokenize import open_source, open_tokenizer, own_share, pretokenize_path

ROOT = Path(__file__).parents[2]
SETTINGS = {"frame_size": [16, 16], "upsampled_size": [32, 32], "num_latent_tokens": 4, "reset_every": 17}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow Cosmos network with random weights, as diffusers saves it."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    torch.manual_seed(0)
    narrow: Any = build_network({"encoder_block_out_channels": (8, 8, 8, 8), "decode_block_out_channels": (8, 8, 8, 8), "num_layers": 1})
    folder = tmp_path_factory.mktemp("cosmos")
    narrow.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def config(weights: Path) -> Path:
    file = weights / "minerl_cosmos.yaml"
    file.write_text(json.dumps({"cosmos_tokenizer": {"enabled": True, "checkpoint_path": str(weights), **SETTINGS}}))
    return file


def write_npy(folder: Path, name: str, length: int) -> None:
    rng = np.random.default_rng(length)
    (folder / name).mkdir(parents=True)
    np.save(folder / name / "frames.npy", rng.integers(0, 256, (length, 16, 16, 3), dtype=np.uint8))
    np.savez(folder / name / "actions.npz", keyboard=rng.integers(0, 2, (length, 8)), camera=rng.integers(0, 121, length))
    np.save(folder / name / "rewards.npy", np.ones(length))


def test_a_projection_is_fitted_first(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_npy(tmp_path / "in", "a", 9)
    words = ["--config", str(config), "cosmos_tokenizer.spatial_mode=project", "phase0.num_frames=9"]
    assert main(["pretokenize", "--data-path", str(tmp_path / "in"), "--output-path", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert "dreamer train tokenizer; then give --tokenizer RUN_DIR/tokenizer" in error and not (tmp_path / "out").exists()


def test_the_script_of_the_checklist(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its command, word for word; only the settings are a test's."""
    monkeypatch.setattr(cli, "PRESETS", config.parent)
    monkeypatch.chdir(tmp_path)
    for name, length in (("b", 9), ("a", 20), ("c", 2)):
        write_npy(tmp_path / "data" / "mineRL_extracted" / "Treechop", name, length)
    command = "pretokenize_dataset.py --data-path data/mineRL_extracted --output-path data/pretokenized_test --max-episodes 2"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "pretokenize_dataset.py"), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == "data/pretokenized_test: 2 episodes with 6 latent steps, 0 recordings left out\n"
    store = LatentStore(tmp_path / "data" / "pretokenized_test")
    assert store.lengths.tolist() == [4, 2]  # 1 + ceil((20 - 1) / 8) and 1 + ceil((9 - 1) / 8)
    assert (store.token_grid, store.latent_channels, store.temporal_stride, store.actions_per_step) == ((2, 2), 16, 8, 8)
    assert store.latents(0).dtype == np.float16 and store.arrays(1)["rewards"].tolist() == [0, 8]
    assert store.extra["source"] == {"reader": "npy"} and store.extra["frames_per_second"] == 20
    made_by = store.extra["tokenizer"]
    assert made_by["kind"] == "CosmosTokenizerWrapper" and np.shape(made_by["latent_mean"]) == np.shape(made_by["latent_std"]) == (2, 16)
    assert made_by["settings"]["spatial_mode"] == "mean" and made_by["settings"]["time_mode"] == "video"
    assert "checkpoint_path" not in made_by["settings"]
    assert len((ROOT / "pretokenize_dataset.py").read_text().splitlines()) <= 25


def test_the_verb(tmp_path: Path, config: Path, capsys: Any, caplog: Any, write_vpt: Callable[..., Path]) -> None:
    """Options, parts, leftovers, and what training refuses."""
    data, out = tmp_path / "in", tmp_path / "out"
    for number in range(3):
        write_vpt(data / f"clip{number}.mp4", [{"keys": ["w"]}] * (10 + number))
    (data / "clip1.mp4").write_bytes(b"")
    (data / "lonely.mp4").write_bytes(b"")
    words = ["pretokenize", "--data-path", str(data), "--output-path", str(out), "--config", str(config), "--shard-episodes", "1"]
    words += ["--option", "skip_first=1", "--actions", "linspace", "--dtype", "float32", "--batch-frames", "8", "--device", "cpu"]
    assert main([*words, "--shard", "1/2"]) == 0
    told = capsys.readouterr().out
    assert "0 episodes with 0 latent steps, 1 recordings left out" in told and "1 of 3 groups of episodes are there" in told
    assert "lonely.mp4: no .jsonl beside it" in caplog.text
    with pytest.raises(ValueError, match="incomplete: 1 of 3 groups"):
        LatentStore(out)
    assert main([*words, "--shard", "0/2"]) == 0
    assert f"{out}: 2 episodes with 5 latent steps, 1 recordings left out\nwhy: see {out / 'quarantine.json'}" in capsys.readouterr().out
    store = LatentStore(out)
    assert store.extra["source"] == {"reader": "vpt", "options": {"size": [16, 16], "skip_first": 1}}
    assert store.actions_per_step == 1 and store.latents(0).dtype == np.float32 and not store.has_rewards.any()
    assert json.loads((out / "quarantine.json").read_text())[0]["name"] == "clip1.mp4"
    assert main(["inspect", str(out)]) == 0
    assert "clip1.mp4 was left out: clip1.mp4: cannot be decoded" in capsys.readouterr().out

    assert main([*words, "cosmos_tokenizer.reset_every=25"]) == 2
    assert "latents were made by tokenizer" in capsys.readouterr().err
    assert main([*words, "--strict"]) == 2
    assert "clip1.mp4: cannot be decoded" in capsys.readouterr().err


def test_the_flag_comes_before_the_setting_of_the_actions(tmp_path: Path, config: Path) -> None:
    write_npy(tmp_path / "in", "a", 9)
    words = ["pretokenize", "--data-path", str(tmp_path / "in"), "--config", str(config), "data.actions=linspace"]
    assert main([*words, "--output-path", str(tmp_path / "setting")]) == 0
    assert main([*words, "--output-path", str(tmp_path / "flag"), "--actions", "all"]) == 0
    assert [LatentStore(tmp_path / name).actions_per_step for name in ("setting", "flag")] == [1, 8]


def test_too_many_open_files_end_the_command_and_quarantine_nothing(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        write_npy(tmp_path / "in", name, 9)
    words = ["pretokenize", "--data-path", str(tmp_path / "in"), "--output-path", str(tmp_path / "out"), "--config", str(config)]
    load, failing = np.load, tmp_path / "in" / "b" / "frames.npy"

    def load_or_fail(file: Any, **options: Any) -> Any:
        if file == failing:
            raise OSError(errno.EMFILE, "Too many open files", str(file))
        return load(file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(np, "load", load_or_fail)
        assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "in: b could not be read now ([Errno 24] Too many open files" in error
    assert error.endswith("which is no fault of the recording; run again")
    assert main(words) == 0
    assert len(LatentStore(tmp_path / "out")) == 3 and json.loads((tmp_path / "out" / "quarantine.json").read_text()) == []


def test_lines_tell_where_there_is_no_terminal(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of work that takes its time; short work says nothing."""
    for name in "ab":
        write_npy(tmp_path / "in", name, 9)
    words = ["pretokenize", "--data-path", str(tmp_path / "in"), "--config", str(config), "--output-path"]
    assert main([*words, str(tmp_path / "short")]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(collect, "SECONDS_BETWEEN_LINES", 0.0)
    assert main([*words, str(tmp_path / "out")]) == 0
    assert re.fullmatch(r"pretokenize: 2/2 \(100 %\), 0:00:\d\d passed, 0:00:00 left\n", capsys.readouterr().err)
    assert main(["import", str(tmp_path / "in"), "--reader", "npy", "--out", str(tmp_path / "episodes")]) == 0
    assert re.fullmatch(r"import: 2/2 \(100 %\), 0:00:\d\d passed, 0:00:00 left\n", capsys.readouterr().err)


def test_a_line_comes_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Six seconds an item, 40 of 60 items done by an earlier call."""
    now = 0.0
    with ProgressBar("work", lambda: now) as bar:
        for done in range(41, 47):
            now += 6
            bar(done, 60)
    assert capsys.readouterr().err.splitlines() == [
        "work: 42/60 (70 %), 0:00:12 passed, 0:01:48 left",
        "work: 44/60 (73 %), 0:00:24 passed, 0:01:36 left",
        "work: 46/60 (77 %), 0:00:36 passed, 0:01:24 left",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data-path", "x"], "got --data-path without --output-path; with none"),
        (["--preset", "smoke", "--strict", "--shard", "0/2"], "got --shard, --strict without --data-path and --output-path"),
        (["--data-path", "/no/such", "--output-path", "y"], "/no/such: does not exist"),
        (["--data-path", "x", "--output-path", "y", "--shard", "2/2"], "--shard is '2/2'; expected i/n with 0 <= i < n"),
        (["--data-path", "x", "--output-path", "y", "--tokenizer", "t", "seed=1"], "--tokenizer and settings are both given"),
        (["--data-path", "x", "--output-path", "y", "--preset", "smoke"], "no tokenizer: cosmos_tokenizer.enabled is false"),
    ],
)
def test_bad_words(words: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if "/no/such" in words:
        words = [*words, "--config", str(config)]
    assert main(["pretokenize", *words]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_torchrun_says_which_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_share(None) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="RANK/WORLD_SIZE is '3/1'"):
        own_share(None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert own_share(None) == (3, 4) and own_share("1/2") == (1, 2)
    for text in ("1", "a/2", "-1/2", "1/2/3"):
        with pytest.raises(ValueError, match="expected i/n"):
            own_share(text)


def causal(size: int = 16) -> CausalTokenizer:
    network = TransformerConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=2, time_every=0)
    return CausalTokenizer(CausalTokenizerConfig(token_grid=(2, 2), encoder=network, decoder=network), (3, size, size)).eval()


def test_recordings_and_their_episode_store_give_the_same_latents(tmp_path: Path) -> None:
    for name in "abc":
        write_npy(tmp_path / "in", name, 5 + ord(name) % 3)
    import_recordings(tmp_path / "in", tmp_path / "episodes", "npy")
    assert isinstance(open_source(tmp_path / "episodes", (3, 16, 16), None, {}), EpisodeStore)
    tokenizer = causal()
    direct = pretokenize_path(tmp_path / "in", tmp_path / "direct", tokenizer)
    stored = pretokenize_path(tmp_path / "episodes", tmp_path / "stored", tokenizer)
    assert len(direct) == len(stored) == 3
    for number in range(3):
        for name, rows in stored.arrays(number).items():
            assert np.array_equal(rows, direct.arrays(number)[name]), name
    with pytest.raises(ValueError, match="is a store, which takes no options"):
        open_source(tmp_path / "episodes", (3, 16, 16), None, {"size": [8, 8]})
    with pytest.raises(ValueError, match=r"a: frames of shape \(3, 16, 16\); the tokenizer takes \(3, 32, 32\)"):
        pretokenize_path(tmp_path / "in", tmp_path / "other", causal(32))


def test_a_real_clip(sample_data: Path, weights: Path, tmp_path: Path) -> None:
    """445 frames in 57 steps, streamed, equal to the whole clip in one call; all eight actions of each step."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    (clip,) = (path for path in (sample_data / "vpt").glob("*.mp4") if "beaver" in path.name)
    for file in (clip, clip.with_suffix(".jsonl")):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "in" / file.name)
    settings = {**SETTINGS, "reset_every": 121}
    cosmos = DreamerConfig.model_validate({"cosmos_tokenizer": {"enabled": True, "checkpoint_path": weights, **settings}})
    tokenizer = open_tokenizer(cosmos, torch.device("cpu"))
    latents = pretokenize_path(tmp_path / "in", tmp_path / "l", tokenizer, dtype="float32", batch_frames=50)
    episode = make_reader("vpt", clip, size=(16, 16)).read(clip)
    assert latents.lengths.tolist() == [57] and len(episode) == 445
    whole = create_cosmos_tokenizer(weights, **settings).encode(torch.from_numpy(episode.frames)[None])[0]
    assert np.abs(latents.latents(0) - whole.numpy()).max() < 1e-4
    rows = latents.arrays(0)
    assert rows["actions"].shape == (57, 8, episode.actions.shape[1])
    assert np.array_equal(rows["actions"].reshape(456, -1)[:445], episode.actions) and not rows["action_mask"].reshape(-1)[445:].any()
