"""Broken disks: stores that are cut or changed at any byte, recordings that end in the middle, full and read-only disks, killed imports.

Whatever happens is found and named, and what was saved before stays.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dreamer.cli import main
from dreamer.data import EpisodeStore, LatentStore, import_recordings
from dreamer.data.shards import shard_paths
from fuzz.contract import Target
from fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]


# ---- stores -----------------------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, np.ndarray]]:
    """Every row of a store of either kind, as training reads them."""
    if (path / "sources.json").exists():
        store = LatentStore(path)
        return [dict(store.arrays(i)) | {"task": store.tasks[i : i + 1]} for i in range(len(store))]
    episodes = EpisodeStore(path)
    read = [episodes.episode(i) for i in range(len(episodes))]
    names = ("frames", "actions", "action_mask", "rewards", "terminals")
    return [{name: getattr(e, name) for name in names} | {"task": np.array([e.task]), "fps": np.array([episodes.fps])} for e in read]


def is_same(found: list[dict[str, np.ndarray]], good: list[dict[str, np.ndarray]]) -> bool:
    return len(found) == len(good) and all(
        f.keys() == g.keys() and all(np.array_equal(f[k], g[k]) for k in g) for f, g in zip(found, good, strict=True)
    )


@pytest.fixture(params=["episodes", "latents"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store of two short episodes."""
    path = tmp_path / "store"
    path.mkdir()
    TARGETS[request.param].prepare(path)
    return path


def files_of(store: Path) -> list[Path]:
    return sorted(file for file in store.iterdir() if file.is_file())


def test_a_store_that_is_cut_at_any_byte_is_refused_by_name(store: Path) -> None:
    good = rows_of(store)
    for file in files_of(store):
        whole = file.read_bytes()
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            try:
                found = rows_of(store)
            except ValueError as error:
                assert str(store) in str(error), (file.name, length)
            else:  # a line break at the end of a text
                assert file.suffix == ".json" and not whole[length:].strip() and is_same(found, good), (file.name, length)
        file.write_bytes(whole)
    assert is_same(rows_of(store), good)


def test_a_flipped_bit_in_any_byte_is_found_or_harmless(store: Path) -> None:
    good, unseen = rows_of(store), []
    for file in files_of(store):
        whole = file.read_bytes()
        for place in range(len(whole)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
            try:
                found = rows_of(store)
            except ValueError as error:
                assert str(store) in str(error), (file.name, place)
            else:
                assert is_same(found, good), (file.name, place)
                unseen.append(whole[place : place + 1])
        file.write_bytes(whole)
    assert all(not byte.strip() for byte in unseen)  # blanks between the parts of a text


# ---- recordings that end in the middle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["npy", "video", "minerl", "vpt", "minari"])
def test_a_recording_that_ends_in_the_middle_is_refused_by_name(tmp_path: Path, name: str) -> None:
    if name == "minari":
        pytest.importorskip("minari")
    target: Target = TARGETS[name]
    target.prepare(tmp_path)
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    (whole,) = target.read(tmp_path)
    for file in files:
        content = file.read_bytes()
        for length in range(0, len(content), max(1, len(content) // 30)):
            file.write_bytes(content[:length])
            if content[:length].endswith(b"}\n"):  # rows that end with a line are a shorter recording
                (episode,) = target.read(tmp_path)
                assert len(episode) < len(whole) and episode.info["dropped"]["frames_without_row"]
                continue
            with pytest.raises(ValueError, match=str(tmp_path)):
                target.read(tmp_path)
        file.write_bytes(content)
    assert len(target.read(tmp_path)[0]) == len(whole)


# ---- disks ------------------------------------------------------------------------------------------------------------------------


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a small disk ({done.stderr.strip()})")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of three MiB."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "size=3m")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Seventy of noise, 60 kB each: two shards and a part of one."""
    rng = np.random.default_rng(0)
    for number in range(70):
        folder = tmp_path / "in" / f"r{number:02}"
        folder.mkdir(parents=True)
        np.save(folder / "frames.npy", rng.integers(0, 256, (5, 64, 64, 3), np.uint8))
        np.savez(folder / "actions.npz", keyboard=np.zeros((5, 8)), camera=np.full(5, number))
        np.save(folder / "rewards.npy", np.zeros(5, np.float32))
    return tmp_path / "in"


def cameras(path: Path) -> list[int]:
    store = EpisodeStore(path)
    return [int(store.episode(i).actions[0, -1]) for i in range(len(store))]


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_a_disk_that_fills_up_keeps_what_was_saved(
    small_disk: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_foreseen: bool
) -> None:
    """The free space is looked at first; others may fill the disk in the meantime, so that the write itself fails."""
    if not is_foreseen:
        monkeypatch.setattr("dreamer.data.shards.require_disk", lambda folder, num_bytes: None)
    out = small_disk / "store"
    words = ["import", str(recordings), "--reader", "npy", "--out", str(out)]
    assert main(words) != 0
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert ("too little disk" if is_foreseen else os.strerror(errno.ENOSPC)) in told and str(out) in told
    assert [file.name for file in shard_paths(out)] == ["shard-000000.safetensors"]
    assert not list(out.glob(".*.tmp")) and cameras(out) == list(range(32))
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert main(words) == 0
    assert cameras(out) == list(range(70))


def test_a_disk_that_may_only_be_read_is_named(
    small_disk: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "store"
    import_recordings(recordings, out, "npy", max_episodes=3)
    subprocess.run(["mount", "-o", "remount,ro,size=9m", str(small_disk)], check=True)
    for words in ([str(out)], [str(small_disk / "new")]):
        assert main(["import", str(recordings), "--reader", "npy", "--out", *words]) != 0
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert os.strerror(errno.EROFS) in told and words[0] in told
    assert cameras(out) == [0, 1, 2]


# ---- kills ------------------------------------------------------------------------------------------------------------------------

IMPORT = "import sys; from dreamer.data import import_recordings; import_recordings(sys.argv[1], sys.argv[2], 'npy')"


def test_a_killed_import_goes_on_where_it_was(recordings: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    process = subprocess.Popen([sys.executable, "-c", IMPORT, str(recordings), str(out)], cwd=ROOT)
    while not shard_paths(out) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    saved = cameras(out)
    assert saved in (list(range(32)), list(range(64)))
    report = import_recordings(recordings, out, "npy")
    assert report.num_known == len(saved) and cameras(out) == list(range(70))
