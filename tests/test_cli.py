"""The command line: one line and exit code 2 for bad input, 130 when interrupted, and nothing touched by either."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dreamer import cli
from dreamer.cli import PRESETS, main, presets
from dreamer.config import DreamerConfig
from dreamer.data import EpisodeStore
from dreamer.yaml_config import load_config

ROOT = Path(__file__).parents[1]


def fails(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one line that ``dreamer WORDS`` ends with."""
    assert main(words) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dreamer: error: ")
    return line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "verb"),
        (["train"], "part"),
        (["train", "phase9", "--preset", "smoke"], "invalid choice: 'phase9'"),
        (["demo", "--preset", "nope"], "invalid choice: 'nope'"),
        (["demo", "--preset", "smoke", "--config", "x.yaml"], "not allowed with"),
        (["train", "phase1"], "no settings: give --config FILE, --preset NAME or key=value"),
        (["train", "phase1", "--config", "/no/such.yaml"], "/no/such.yaml: no such config file"),
        (["train", "phase1", "--preset", "smoke", "phase1.train.stepz=3"], "the nearest is phase1.train.steps"),
        (["train", "phase1", "--preset", "smoke", "seed=many"], 'seed: got "many", expected a whole number'),
        (["train", "phase1", "--preset", "smoke", "phase1.train.steps=0"], "phase1.train.steps"),
        (["train", "phase1", "--preset", "smoke", "steps"], "expected key=value"),
        (["train", "phase1", "--preset", "smoke", "--steps", "3"], "unrecognized argument '--steps'"),
        (["demo", "--preset", "smoke", "phase3.imagination.rollout.context=60"], "phase3.imagination.rollout.context is 60"),
        (["demo", "--preset", "smoke", "evaluation.sampler.num_steps=3"], "num_steps is 3; expected a power of two"),
        (
            ["demo", "--preset", "smoke", "evaluation.sampler.context_signal=0.8"],
            "evaluation.sampler.context_signal=0.8: the past must look",
        ),
        (["demo", "--preset", "smoke", "phase1.shortcut.heads_context_fraction=1"], "no heads learn in phase 1"),
        (["demo", "--preset", "smoke", "evaluation.sampler.num_steps=16"], "evaluation.sampler.num_steps is 16; agent.dynamics.max_steps"),
        (["demo", "--preset", "smoke", "--seeds", "0", "one"], "--seeds: 'one' is no seed"),
        (["demo", "--preset", "smoke", "--seeds", "1", "01"], "--seeds: got 1 1; expected different ones"),
        (["demo", "--preset", "smoke", "--seeds", "run_dir=x"], "--seeds: got none"),
        (["demo", "--preset", "smoke", "--seeds", "0", "1", "seed=3"], "seed= and --seeds are both given"),
        (["demo", "--preset", "smoke", "--out", "x"], "give --seeds too"),
        (["results", "/no/such/run", "--out", "x"], "/no/such/run: is not the folder of a run"),
        (["record", "env=null"], "nothing to learn from"),
        (["report", "run_dir=/no/such/run"], "/no/such/run: no stage of a run was begun here"),
        (["import", "/no/such", "--reader", "npy", "--out", "x"], "/no/such: does not exist"),
        (["import", "/tmp", "--reader", "telepathy", "--out", "x"], "no reader is called 'telepathy'"),
        (["import", "/tmp", "--reader", "vpt", "--option", "sise=3", "--out", "x"], "the reader 'vpt' has no option 'sise'"),
        (["import", "/tmp", "--reader", "vpt", "--option", "size", "--out", "x"], "expected key=value"),
        (["inspect", "/no/such"], "/no/such: does not exist"),
        (["inspect", "/tmp", "--reader", "telepathy"], "no reader is called 'telepathy'"),
        (["inspect", "/tmp", "--max-episodes", "none"], "invalid int value: 'none'"),
    ],
)
def test_bad_words_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert said in fails(capsys, *words)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("env.name=crafter-chopp", "unknown environment 'crafter-chopp'; nearest names: crafter-chop"),
        ("env.options.colour=1", "colour"),
        ("record.players=[{name: expert}]", "unknown player 'expert'"),
        ("record.players=[{name: random, fraction: 0.5}]", "sum to 1"),
        ("record.players=[{name: agent}]", "expected checkpoint, tokenizer"),
        ("device=cuda", "sees no CUDA device"),
    ],
)
def test_bad_settings_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str) -> None:
    if override == "device=cuda" and __import__("torch").cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert said in fails(capsys, "record", "--preset", "smoke", f"run_dir={tmp_path / 'run'}", override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "tokenizer"], "run first: dreamer record"),
        (["pretokenize"], "run first: dreamer record"),
        (["train", "phase1"], "run first: dreamer train tokenizer"),
        (["evaluate", "world-model"], "run first: dreamer record"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in fails(capsys, *words, "--preset", "smoke", f"run_dir={tmp_path / 'run'}")


def test_the_command_that_is_recommended_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my settings.yaml"
    file.write_text((PRESETS / "smoke.yaml").read_text())
    words = ["--config", str(file), f"run_dir={tmp_path / 'run'}", "record.num_episodes=2"]
    line = fails(capsys, "train", "phase1", *words)
    hint = line.partition("run first: ")[2]
    assert shlex.split(hint) == ["dreamer", "train", "tokenizer", *words]
    hint = fails(capsys, *shlex.split(hint)[1:]).partition("run first: ")[2]
    assert shlex.split(hint) == ["dreamer", "record", *words]
    assert main(shlex.split(hint)[1:]) == 0 and len(EpisodeStore(tmp_path / "run" / "episodes")) == 2
    line = fails(capsys, "train", "phase1", "--preset", "smoke", *words[2:])
    assert line.endswith(f"run first: dreamer train tokenizer --preset smoke {words[2]} {words[3]}")


def test_the_folder_of_a_run_is_no_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("{}\n")
    assert f"to go on with its settings: --config {tmp_path / 'config.yaml'}" in fails(capsys, "check", str(tmp_path))


@pytest.mark.parametrize("word", ["phase3.imagination.rollout.context=60", "phase1.train.stepz=3"])
def test_a_bad_word_is_not_blamed_on_the_preset(capsys: pytest.CaptureFixture[str], word: str) -> None:
    line = fails(capsys, "demo", "--preset", "smoke", word)
    assert line.startswith("dreamer: error: on the command line: ") and "smoke.yaml" not in line


def test_a_run_is_not_continued_with_another_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "smoke", f"run_dir={tmp_path / 'run'}", "record.num_episodes=6"]
    small = ["phase0.train.steps=2", "phase0.normalization_frames=8"]
    assert main(["record", *words]) == 0 and main(["train", "tokenizer", *words, *small]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    line = fails(capsys, "train", "tokenizer", *words, *small, "tokenizer.latent_channels=9")
    assert "was trained with tokenizer.latent_channels=8, this config says 9" in line
    assert "extra is" in fails(capsys, "record", *words, "seed=4")
    line = fails(capsys, "record", *words, "record.num_episodes=7")
    assert f"{tmp_path / 'run'}: tokenizer learned from the episodes that are here" in line and line.endswith("into another run_dir")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert main(["record", *words]) == 0  # there is nothing to add


def test_a_config_alone_runs_no_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("cosmos_tokenizer: {enabled: true, trust_torchscript: true}\n")
    for words in (["config"], ["train", "tokenizer"]):
        line = fails(capsys, *words, "--config", str(file), f"run_dir={tmp_path / 'run'}")
        assert line.endswith(
            f"{file}: cosmos_tokenizer.trust_torchscript is true, so that programs in files would run; if you trust them, "
            "type cosmos_tokenizer.trust_torchscript=true as well"
        )
    assert main(["config", "--config", str(file), "cosmos_tokenizer.trust_torchscript=true"]) == 0
    assert not (tmp_path / "run").exists()


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "seed=1", "--preset", "smoke", "phase1.train.steps=9", "seed=2"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seed"], shown["phase1"]["train"]["steps"], shown["run_dir"]) == (2, 9, "runs/smoke")


def test_the_printed_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert load_config(DreamerConfig, tmp_path / "c.yaml") == load_config(DreamerConfig)


def test_every_config_that_comes_along_loads() -> None:
    files = [*PRESETS.glob("*.yaml"), *(ROOT / "configs").glob("*.yaml")]
    assert {"demo", "smoke"} <= set(presets()) and len(files) >= 3
    for path in files:
        load_config(DreamerConfig, path)


def raising(error: BaseException) -> Any:
    def verb(arguments: Any, command: str) -> int:
        raise error

    return verb


def test_interruption_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_show_config", raising(KeyboardInterrupt()))
    assert main(["config"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_messages_of_several_lines_become_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_show_config", raising(ValueError("first\n  second")))
    assert fails(capsys, "config") == "dreamer: error: first second"
    monkeypatch.setattr(cli, "_show_config", raising(OSError(28, "No space left on device", "/x/y")))
    assert fails(capsys, "config") == "dreamer: error: /x/y: No space left on device"


def test_a_traceback_is_shown_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMER_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such config file"):
        main(["train", "phase1", "--config", "/no/such.yaml"])


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_show_config", raising(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        main(["config"])


def test_help_is_quick_and_complete() -> None:
    code = "import sys; from dreamer.cli import main; main(['--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip().endswith("False")
    verbs = ("demo", "record", "train", "pretokenize", "evaluate", "report", "config", "import", "inspect", "play", "dream")
    assert all(verb in out for verb in verbs)


def test_recordings_are_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episode = tmp_path / "in" / "one"
    episode.mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.save(episode / "frames.npy", rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8))
    np.savez(episode / "actions.npz", keyboard=rng.integers(0, 2, (5, 8)), camera=rng.integers(0, 121, 5))
    np.save(episode / "rewards.npy", np.zeros(5))
    words = ["import", str(tmp_path / "in"), "--reader", "npy", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "1 episodes with 5 frames added" in capsys.readouterr().out
    assert main(words) == 0
    assert "1 were there already" in capsys.readouterr().out and len(EpisodeStore(tmp_path / "out")) == 1
