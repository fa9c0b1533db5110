"""Checkpoints: whole or not at all, the newest are kept, damage is named."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dreamer.training import checkpoint
from dreamer.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_weights,
    planned_steps,
    read_json,
    read_state,
    read_tensors,
    save_checkpoint,
)


def save(run: Path, step: int, **options: Any) -> Path:
    tensors = {"w": torch.full((3,), float(step))}
    return save_checkpoint(run, step, model_tensors=tensors, model_info={"kind": "x"}, train_tensors=tensors, state={"a": 1}, **options)


def test_the_newest_are_kept_in_order(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [15, 100]
    assert find_checkpoint(tmp_path) == list_checkpoints(tmp_path)[-1][1]
    assert read_json(find_checkpoint(tmp_path) / "state.json") == {"a": 1, "step": 100}
    assert torch.equal(read_tensors(find_checkpoint(tmp_path) / "model.safetensors")["w"], torch.full((3,), 100.0))


def test_unfinished_checkpoints_do_not_count_and_are_swept_away(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    shutil.copytree(path, path.with_name("step_00000010"))
    (path.with_name("step_00000010") / "state.json").unlink()
    leftover = path.with_name(".writing_step_00000010_77")
    leftover.mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5]
    save(tmp_path, 15)
    assert not leftover.exists()


def test_too_little_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(OSError, match="too little disk") as caught:
        save(tmp_path, 10)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000005"]


@pytest.mark.parametrize("call", [1, 3, 5])
def test_a_failure_while_writing_leaves_the_older_ones_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    save(tmp_path, 5)
    count = 0
    real = checkpoint.os.fsync

    def fails(handle: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 10)
    assert (5, tmp_path / "checkpoints" / "step_00000005") in list_checkpoints(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".writing*"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.json", b"{", "not readable as JSON"),
        ("model.json", b"[1]", "expected a JSON object"),
        ("model.json", b"\xff\xfe", "not readable as JSON"),
        ("model.safetensors", b"short", "not a readable safetensors file"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    file = save(tmp_path, 5) / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_json(file) if name.endswith("json") else read_tensors(file)
    assert str(file) in str(caught.value)


def test_the_state_says_how_long_a_phase_was_to_be_trained(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(1)}
    state = {"settings": {"phase1": {"train": {"steps": 9}}}, "seed": 3, "num_skipped": 0}
    path = save_checkpoint(tmp_path, 5, model_tensors=tensors, model_info={}, train_tensors=tensors, state=state)
    assert read_state(path) == state | {"step": 5} and planned_steps(path, "phase1") == 9
    with pytest.raises(ValueError, match=r"state\.json: is damaged \(settings\.phase2\.train\.steps is no number\); remove the folder"):
        planned_steps(path, "phase2")
    with pytest.raises(ValueError, match=r"state\.json: is damaged \(settings is None\)"):
        read_state(save(tmp_path, 6))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": torch.zeros(2, 3)}, "lacks weight 'bias'"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}, "has the unknown weight 'more'"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"'weight' has shape \(2, 4\), the config makes \(2, 3\)"),
    ],
)
def test_weights_must_fit_exactly(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match=words):
        load_weights(module, tensors, tmp_path)
    assert torch.equal(module.weight, before)
