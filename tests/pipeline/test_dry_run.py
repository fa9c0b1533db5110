from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreamer.cli import PRESETS, main
from dreamer.config import DreamerConfig
from dreamer.data import LatentWriter
from dreamer.models import Agent, CausalTokenizer
from dreamer.models.cosmos_weights import build_network
from dreamer.ops.minecraft import MINERL
from dreamer.pipeline import Run
from dreamer.pipeline.dry_run import count_parameters, dry_run, find_inputs, make_plan
from dreamer.training.loop import Phase
from dreamer.yaml_config import load_config

PARTS = ("tokenizer", "phase1", "phase2", "bc_long", "phase3")


def config(run_dir: Path, *overrides: str, preset: str | None = "smoke") -> DreamerConfig:
    return load_config(DreamerConfig, PRESETS / f"{preset}.yaml" if preset else None, [f"run_dir={run_dir}", *overrides])


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text, flags=re.M)
    assert found, text
    return float(found.group(1).replace(",", ""))


def numel(module: Any, is_trainable: bool) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad == is_trainable)


@pytest.mark.parametrize("part", PARTS)
def test_parameters_are_those_of_the_real_modules(tmp_path, part):
    """Built with content, on the CPU, and counted by PyTorch's own lists."""
    run = Run(config(tmp_path))
    inputs = find_inputs(run)
    phase: Phase = make_plan(run.config, part, inputs).build()
    tokenizer = CausalTokenizer(run.config.tokenizer, inputs.frame_shape).requires_grad_(False)
    counts = count_parameters(phase, None if part == "tokenizer" else inputs.tokenizer)
    trainable, frozen = (sum(column) for column in zip(*counts.values(), strict=True))
    assert trainable == numel(phase, True)
    assert frozen == numel(phase, False) + (0 if part == "tokenizer" else numel(tokenizer, False))
    if isinstance(phase.model, Agent):
        dynamics, heads = phase.model.dynamics, [phase.model.policy, phase.model.reward, phase.model.continue_, phase.model.value]
        assert counts["tokenizer"] == (0, numel(tokenizer, False))
        assert counts["dynamics"] == (numel(dynamics, True), numel(dynamics, False))
        assert counts["heads"] == (sum(numel(h, True) for h in heads), sum(numel(h, False) for h in heads))
        assert (counts["dynamics"][0] > 0) == (part != "phase3")


@pytest.mark.parametrize("part", ["tokenizer", "phase1", "phase3"])
def test_the_command_needs_no_data_and_writes_nothing(tmp_path, capsys, part):
    assert main(["train", part, "--preset", "smoke", "--dry-run", f"run_dir={tmp_path / 'run'}"]) == 0
    text = capsys.readouterr().out
    for expected in ("parameters", "trainable", "TFLOP", "gradients", "optimizer state", "activations", "8 GB            fits, "):
        assert expected in text, expected
    rows = re.findall(r"^  (tokenizer|dynamics|heads|prior policy|all) +([\d,]+) +([\d,]+)$", text, flags=re.M)
    values = np.array([[int(n.replace(",", "")) for n in row[1:]] for row in rows])
    assert (values[:-1].sum(0) == values[-1]).all() and len(rows) > 1
    assert not list(tmp_path.iterdir())


def test_each_of_several_processes(tmp_path, capsys, monkeypatch):
    words = ["train", "phase1", "--preset", "smoke", "--dry-run", f"run_dir={tmp_path / 'run'}", "phase1.long_sequence_length=null"]
    adamw = "phase1.train.optim.optimizer=adamw"

    def text(*more: str) -> str:
        assert main([*words, *more]) == 0
        return capsys.readouterr().out

    def refused(*more: str) -> str:
        assert main([*words, *more]) == 2
        return capsys.readouterr().err

    alone, ddp, fsdp = text(adamw), text("--processes", "2", adamw), text("--processes", "2", adamw, "parallel.strategy=fsdp")
    assert "latents         (8, 6, 16, 8)" in alone and "latents         (4, 6, 16, 8)" in ddp
    assert "20 steps in fp32, in each of 2 processes (fsdp)" in fsdp and "processes" not in alone
    state = r"^  optimizer state +([\d.]+)"
    assert number(fsdp, state) <= number(ddp, state) == number(alone, state)
    assert "in each of 3 processes (ddp)" in text("--processes", "3")
    assert "muon, which needs whole matrices" in refused("--processes", "2", "parallel.strategy=fsdp", "phase1.train.optim.optimizer=muon")
    assert "a batch has 8 rows, and each of 9 processes needs one" in refused("--processes", "9")
    assert "0 processes; expected at least 1" in refused("--processes", "0")
    assert main(["train", "phase1", "--preset", "smoke", "--processes", "2", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "--processes is for --dry-run; torchrun" in capsys.readouterr().err
    assert "computed" not in alone and "what goes into the layers" in text("phase1.train.activation_checkpointing=true")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "in each of 4 processes (ddp)" in text()


def test_long_rows_and_reused_dreams_are_steps_of_their_own(tmp_path):
    own = config(
        tmp_path, "phase1.sequence_length=4", "phase1.long_sequence_length=32", "phase1.long_every=4", "phase1.train.batch_size=16"
    )
    plan = make_plan(own, "phase1", find_inputs(Run(own)))
    assert [(step.share, step.batch().latents.shape[:2]) for step in plan.steps] == [(0.75, (16, 4)), (0.25, (2, 32))]
    own = config(tmp_path, "phase3.imagination.updates_per_rollout=4", "phase3.imagination.value_only_steps=6")
    plan = make_plan(own, "phase3", find_inputs(Run(own)))
    assert [(step.share, step.number) for step in plan.steps] == [(0.25, 8), (0.75, 9)]


def test_uniform_rows_of_phase2(tmp_path):
    def rows(*overrides: str) -> list[int]:
        own = config(tmp_path, "phase2.train.batch_size=8", *overrides)
        return [step.num_uniform_rows for step in make_plan(own, "phase2", find_inputs(Run(own))).steps]

    assert set(rows("phase2.relevant.fraction=0.25", "phase2.long_sequence_length=null")) == {6}
    assert set(rows("phase2.relevant.fraction=1", "phase2.long_sequence_length=null")) == {8}  # then the dynamics learns from all


def test_the_latents_that_are_there_decide(tmp_path):
    with LatentWriter(
        tmp_path / "latents",
        action_space=MINERL,
        tokenizer_fingerprint="any",
        token_grid=(4, 2),
        latent_channels=5,
        temporal_stride=8,
        source_fingerprint="",
    ) as writer:
        rows = np.zeros((3, 8, MINERL.num_columns), np.float32), np.ones((3, 8), bool)
        writer.add(np.zeros((3, 8, 5), np.float32), *rows, np.zeros(3, np.float32), np.zeros(3, bool))
    inputs = find_inputs(Run(config(tmp_path)))
    assert (inputs.action_space, inputs.token_grid, inputs.latent_channels, inputs.actions_per_step) == (MINERL, (4, 2), 5, 8)


def test_a_run_on_latents_alone_holds_no_tokenizer(tmp_path):
    test_the_latents_that_are_there_decide(tmp_path)
    assert "\n  tokenizer " in dry_run(config(tmp_path), "phase1")
    alone = dry_run(config(tmp_path, f"data.latents={tmp_path / 'latents'}"), "phase1")
    assert "\n  tokenizer " not in alone and re.search(r"^  all +[\d,]+ +[\d,]+$", alone, flags=re.M)


MINECRAFT = ("env=null", "data.recordings={path: /no/such/recordings, reader: minerl}")


def test_the_cosmos_tokenizer_at_full_width_and_a_card_that_is_too_small(tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    sizes = {"width": 4096, "num_layers": 8, "num_heads": 32, "num_kv_heads": 32, "time_every": 4}
    large = [f"agent.dynamics.transformer.{key}={value}" for key, value in sizes.items()]
    text = dry_run(config(tmp_path, "cosmos_tokenizer.enabled=true", *MINECRAFT, *large, "phase1.sequence_length=5", preset=None), "phase1")
    assert "latents         (16, 5, 16, 16)" in text and "actions         (16, 5, 8, 9)" in text
    assert "  tokenizer                      0     105,653,696" in text
    trainable = number(text, r"^  dynamics +([\d,]+) ")
    assert number(text, r"^  gradients +([\d.]+)$") == pytest.approx(4 * trainable / 1e9, abs=1e-3)
    assert number(text, r"^  optimizer state +([\d.]+)$") == pytest.approx(8 * trainable / 1e9, abs=1e-2)
    assert re.search(r"^  24 GB +too small by [\d.]+ GB$", text, flags=re.M) and re.search(r"^  80 GB +fits, ", text, flags=re.M)


NATIVE = [f"cosmos_tokenizer.{word}" for word in ("enabled=true", "frame_size=[16, 24]", "upsampled_size=[16, 24]", "spatial_mode=none")]


def test_diffusers_may_be_imported_first_by_a_dry_run():
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    code = (
        "import torch\n"
        "from dreamer.models.cosmos_weights import build_network\n"
        "with torch.device('meta'):\n"
        "    build_network({})\n"
        "print({buffer.device.type for buffer in build_network({'num_layers': 1}).buffers()})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "{'cpu'}"


def test_phase0_adapts_the_cosmos_decoder_or_all_of_it(tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    words = [*MINECRAFT, *NATIVE, "phase0.num_frames=9", "phase0.train.batch_size=2"]
    decoder = config(tmp_path, *words, "phase0.cosmos.adapt=decoder", preset=None)
    text = dry_run(decoder, "tokenizer")
    assert "frames          (2, 9, 3, 16, 24)         uint8" in text
    trainable, frozen = (int(n.replace(",", "")) for n in re.findall(r"^  tokenizer +([\d,]+) +([\d,]+)$", text, flags=re.M)[0])
    with torch.device("meta"):
        network: Any = build_network({})
    assert trainable == numel(network.decoder, True) + numel(network.post_quant_conv, True) and trainable + frozen == 105_653_696
    assert number(text, r"^  gradients +([\d.]+)$") == pytest.approx(4 * trainable / 1e9, abs=1e-3)
    assert number(text, r"^  weights +([\d.]+)$") == pytest.approx(4 * 105_653_696 / 1e9, abs=1e-3)  # fp32, also of the frozen encoder
    whole = config(tmp_path, *words, "phase0.cosmos.adapt=all", preset=None)
    plan = make_plan(whole, "tokenizer", find_inputs(Run(whole)))
    with torch.device("meta"):
        counts = count_parameters(plan.build(), None)
    assert counts == {"tokenizer": (105_653_696, 0)}


@pytest.mark.parametrize(
    ("more", "said", "unsaid"),
    [
        ("spatial_mode=mean", "with cosmos_tokenizer.spatial_mode project or none", "its projection"),
        ("spatial_mode=project", "its projection is fitted to 99 frames", "what mean keeps"),
        ("spatial_mode=none", "phase0.cosmos.adapt=decoder", "its projection"),
    ],
)
def test_a_tokenizer_that_learns_nothing_says_so(tmp_path, capsys, more, said, unsaid):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    words = ["cosmos_tokenizer.enabled=true", f"cosmos_tokenizer.{more}", "phase0.normalization_frames=99", "phase0.num_frames=9"]
    assert main(["train", "tokenizer", "--dry-run", *words, *MINECRAFT, f"run_dir={tmp_path / 'run'}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("dry run of tokenizer: there is nothing to train\n") and "105,653,696" in text
    assert said in text and unsaid not in text and not list(tmp_path.iterdir())


def test_extracted_recordings_need_not_be_there_if_their_actions_are_told(tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    recordings = "data.recordings={path: /no/such, reader: npy, options: {action_space: minerl}}"
    inputs = find_inputs(Run(config(tmp_path, *NATIVE, "env=null", recordings, preset=None)))
    assert (inputs.action_space, inputs.frame_shape, inputs.token_grid) == (MINERL, (3, 16, 24), (2, 3))


@pytest.mark.parametrize(
    ("overrides", "part", "said"),
    [
        (("env=null", "data.recordings={path: /no/such, reader: npy}"), "phase1", "/no/such: no recordings here"),
        (("env=null", "data.recordings={path: /no/such, reader: telepathy}"), "phase1", "no reader is called 'telepathy'"),
        (("env=null", "data.recordings={path: /no/such, reader: store}"), "phase1", "no episodes store here"),
        (("env.name=crafter-chopp",), "phase1", "unknown environment"),
        ((), "phase4", "no part is called 'phase4'"),
        (
            ("env=null", "data.recordings={path: /no/such, reader: npy}", "cosmos_tokenizer.enabled=true"),
            "phase1",
            "a dry run before they are there needs data.recordings.options.action_space, such as minerl",
        ),
    ],
)
def test_what_is_not_known_is_said(tmp_path, overrides, part, said):
    if "cosmos_tokenizer.enabled=true" in overrides:
        pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    with pytest.raises(ValueError, match=re.escape(said)):
        dry_run(config(tmp_path, *overrides, preset=None), part)
