"""Checkpoints: whole or not at all, the newest and the best are kept, damage is named and never used."""

from __future__ import annotations

import errno
import json
import logging
import os
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
    newest_checkpoint,
    planned_steps,
    read_json,
    read_manifest,
    read_state,
    read_tensors,
    save_checkpoint,
    tidy_checkpoints,
)

FILES = ("model.safetensors", checkpoint.STATE, "model.json", "state.json")


def save(run: Path, step: int, **options: Any) -> Path:
    tensors = {"w": torch.full((3,), float(step))}
    return save_checkpoint(run, step, model_tensors=tensors, model_info={"kind": "x"}, train_tensors=tensors, state={"a": 1}, **options)


def test_the_newest_are_kept_in_order(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save(tmp_path, step, keep_last=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [15, 100]
    assert find_checkpoint(tmp_path) == list_checkpoints(tmp_path)[-1][1]
    assert read_json(find_checkpoint(tmp_path) / "state.json") == {"a": 1, "step": 100}
    assert torch.equal(read_tensors(find_checkpoint(tmp_path) / "model.safetensors")["w"], torch.full((3,), 100.0))


def test_unfinished_checkpoints_do_not_count_and_are_swept_away(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    leftovers = [path.with_name(name) for name in (".writing_step_00000010_77", ".removing_step_00000003")]
    for leftover in leftovers:
        shutil.copytree(path, leftover)
    mark = path.with_name(".best.json.77.tmp")
    mark.touch()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5] and newest_checkpoint(tmp_path) == (5, path)
    save(tmp_path, 15)
    assert not any(leftover.exists() for leftover in (*leftovers, mark))


def test_too_little_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(OSError, match="too little disk") as caught:
        save(tmp_path, 10)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000005"]


@pytest.mark.parametrize("call", [1, 3, 5, 6])
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
    with pytest.raises(OSError, match=r"not written \(No space left on device\); older ones are as they were: free some space") as caught:
        save(tmp_path, 10)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "checkpoints" / "step_00000010")
    assert newest_checkpoint(tmp_path) == (5, tmp_path / "checkpoints" / "step_00000005")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save(tmp_path, 5)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="step_00000005"):
        save(tmp_path, 5)
    assert contents(tmp_path) == before


def test_the_manifest_lists_all_and_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = checkpoint.fsync_path
    monkeypatch.setattr(checkpoint, "fsync_path", lambda path: order.append(path.name) or real(path))
    path = save(tmp_path, 5)
    assert order == [tmp_path.name, *FILES, "manifest.json", f".writing_step_00000005_{os.getpid()}", "checkpoints"]
    manifest = read_manifest(path)
    assert (manifest["format"], manifest["step"]) == (1, 5)
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {n: len((path / n).read_bytes()) for n in FILES}


NAMES = (*FILES, "manifest.json")


def flip(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x20
    stat = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


DAMAGES: dict[str, Any] = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "first byte": lambda file: flip(file, 0),
    "last byte": lambda file: flip(file, 1),
    "middle byte": lambda file: flip(file, 0.5),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_damaged_newest_one_is_passed_over_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, name: str) -> None:
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == (10, bad)
    DAMAGES[kind](bad / name)
    if name == "manifest.json" and kind == "longer":  # a blank at its end says the same
        assert newest_checkpoint(tmp_path) == (10, bad)
        return
    for _ in range(2):
        assert newest_checkpoint(tmp_path) == (5, good) and find_checkpoint(tmp_path) == good
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    named = str(bad) if name == "manifest.json" else str(bad / name)  # a wrong hash in it speaks of another file
    assert len(told) == 1 and named in told[0] and "step_00000005 is used in its place" in told[0]
    assert bad.is_dir()  # who only reads changes nothing
    with pytest.raises(ValueError, match=r"this checkpoint is damaged; use another one"):
        find_checkpoint(bad)


def test_who_writes_sets_a_damaged_one_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for count, aside in enumerate(["damaged_step_00000010", "damaged_step_00000010_1"]):
        if not count:
            save(tmp_path, 5)
        DAMAGES["cut"](save(tmp_path, 10) / "state.json")
        before = contents(tmp_path / "checkpoints" / "step_00000010")
        assert newest_checkpoint(tmp_path, set_aside=True) == (5, tmp_path / "checkpoints" / "step_00000005")
        assert contents(tmp_path / "checkpoints" / aside) == before and aside in caplog.messages[-1]
    save(tmp_path, 10)
    save(tmp_path, 15)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "damaged_step_00000010",
        "damaged_step_00000010_1",
        "step_00000010",
        "step_00000015",
    ]


def test_where_all_are_damaged_nothing_begins_anew(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 10):
        DAMAGES["missing"](save(tmp_path, step) / "state.json")
    before = contents(tmp_path)
    words = r"checkpoints: none of 2 checkpoints is sound; the newest: .*step_00000010/state\.json: is missing\. Restore one"
    for look in (newest_checkpoint, find_checkpoint, lambda run: newest_checkpoint(run, set_aside=True)):
        with pytest.raises(ValueError, match=words):
            look(tmp_path)
    assert contents(tmp_path) == before


def test_the_bytes_are_compared_once_a_process_for_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = save(tmp_path, 5), []
    real = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda file: hashed.append(file.name) or real(file))
    for _ in range(3):
        assert newest_checkpoint(tmp_path) == (5, path)
    assert sorted(hashed) == sorted(FILES)
    flip(path / "model.json", 0.5)
    assert "SHA-256 differs" in str(checkpoint.find_damage(path))
    assert list_checkpoints(tmp_path) == [(5, path)]  # quick: sizes alone


@pytest.mark.parametrize(
    "change",
    [
        {"format": "2"},
        {"format": True},
        {"step": 6},
        {"step": "5"},
        {"files": {}},
        {"files": 3},
        {"more": {"../../x": {"bytes": 1, "sha256": ""}}},
        {"more": {"x.json": {"bytes": "1", "sha256": ""}}},
        {"more": {"..": {"bytes": 1, "sha256": ""}}},
        {"more": {"a\0.json": {"bytes": 1, "sha256": ""}}},
        {"more": {"\ud800.json": {"bytes": 1, "sha256": ""}}},
    ],
)
def test_a_manifest_that_says_something_else_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    file = save(tmp_path, 5) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"] |= change.pop("more", {})
    file.write_text(json.dumps(manifest | change))
    assert str(checkpoint.find_damage(file.parent)).startswith(str(file))


@pytest.mark.parametrize("found", [0, 2, 10**30])
def test_a_checkpoint_of_another_version_is_no_damage(tmp_path: Path, found: int) -> None:
    save(tmp_path, 5)
    file = save(tmp_path, 10) / "manifest.json"
    file.write_text(json.dumps({"format": found, "other": "things"}))
    before = contents(tmp_path)
    words = (
        rf"step_00000010/manifest\.json: is of format {str(found)[:20]}; this version of dreamer knows format 1; use the version that wrote"
    )
    for look in (newest_checkpoint, find_checkpoint, list_checkpoints, lambda run: newest_checkpoint(run, set_aside=True)):
        with pytest.raises(ValueError, match=words):
            look(tmp_path)
    assert contents(tmp_path) == before


def test_without_a_manifest_it_may_be_an_old_one(tmp_path: Path) -> None:
    DAMAGES["missing"](save(tmp_path, 5) / "manifest.json")
    with pytest.raises(
        ValueError, match=r"manifest\.json: is missing; this checkpoint was made before manifests existed, or it is damaged"
    ):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("call", ["stat", "open"])
def test_what_the_disk_cannot_read_is_damage_and_other_faults_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    real, number = getattr(Path, call), errno.EIO

    def fails(path: Path, *args: Any, **options: Any) -> Any:
        if path == bad / name:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, call, fails)
    assert checkpoint.find_damage(bad) == f"{bad / name}: cannot be read ({os.strerror(errno.EIO)})"
    assert newest_checkpoint(tmp_path) == (5, good)
    number = errno.EACCES
    with pytest.raises(PermissionError):
        checkpoint.find_damage(bad)


def test_the_best_is_kept_and_named(tmp_path: Path) -> None:
    best: dict[str, Any] | None = None
    for step in (1, 2, 3, 4):
        best = {"step": 2, "metric": "val_loss", "better": "lower", "value": 0.5} if step >= 2 else None
        save(tmp_path, step, keep_last=1, best=best)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.json", "step_00000002", "step_00000004"]
    assert json.loads((folder / "best.json").read_text()) == best and newest_checkpoint(tmp_path) == (4, folder / "step_00000004")
    before = contents(tmp_path), (folder / "best.json").stat().st_mtime_ns
    tidy_checkpoints(tmp_path, keep_last=1, best=best)
    assert (contents(tmp_path), (folder / "best.json").stat().st_mtime_ns) == before
    tidy_checkpoints(tmp_path, keep_last=1, best=None)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000004"]


def test_an_interim_one_takes_no_place_and_goes_when_a_later_one_is_there(tmp_path: Path) -> None:
    def steps() -> list[int]:
        return [step for step, _ in list_checkpoints(tmp_path)]

    for step in (3, 6):
        save(tmp_path, step)
    save(tmp_path, 7, is_interim=True)
    assert steps() == [3, 6, 7]
    save(tmp_path, 8, is_interim=True)
    assert steps() == [3, 6, 8]
    save(tmp_path, 9, is_interim=True)
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000006", "interim_step_00000009"]
    assert newest_checkpoint(tmp_path) == (9, tmp_path / "checkpoints" / "interim_step_00000009")
    save(tmp_path, 9)
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["step_00000006", "step_00000009"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.json", b"{", "not readable as JSON"),
        ("model.json", b"[1]", "expected a JSON object"),
        ("model.json", b"\xff\xfe", "not readable as JSON"),
        ("model.json", b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        ("model.json", b"[" * 100_000, "not readable as JSON"),
        ("model.json", b'{"a": "' + b"x" * (16 << 20) + b'"}', "more than 16777216 bytes"),
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
    with pytest.raises(
        ValueError, match=r"state\.json: is damaged \(settings\.phase2\.train\.steps is no number of steps\); remove the folder"
    ):
        planned_steps(path, "phase2")
    for strange in (float("inf"), float("nan"), 0, -3, "9", 9.5, True, None):
        (path / "state.json").write_text(json.dumps(state | {"settings": {"phase1": {"train": {"steps": strange}}}}))
        with pytest.raises(ValueError, match=r"state\.json: is damaged \(settings\.phase1\.train\.steps is no number of steps\)"):
            planned_steps(path, "phase1")
    with pytest.raises(ValueError, match=r"state\.json: is damaged \(settings is None, expected an object\)"):
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
