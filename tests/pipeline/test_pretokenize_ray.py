"""The engine ray on a real cluster of two cores: the same bytes as without it, whatever is killed, broken or there already."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreamer.cli import main
from dreamer.data.pretokenize import GroupMaker
from dreamer.models import CausalTokenizer, CausalTokenizerConfig, TransformerConfig
from dreamer.pipeline import pretokenize_ray
from dreamer.pipeline.pretokenize import open_groups
from dreamer.pipeline.pretokenize_ray import Resources, choose_resources, pretokenize_on_ray
from dreamer.training.checkpoint import save_checkpoint
from dreamer.training.models_io import load_tokenizer, tokenizer_info

NUM_RECORDINGS = 10
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Two cores of this machine, for the whole module: starting it takes seconds."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'dreamer4[ray]'")
    ray = pretokenize_ray.load_ray()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20, address="local")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a test
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer with random weights."""
    torch.manual_seed(0)
    network = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=2, time_every=2, context_length=4)
    made = CausalTokenizer(CausalTokenizerConfig(token_grid=(2, 2), patch_size=2, encoder=network, decoder=network), (3, 16, 16)).eval()
    path = tmp_path_factory.mktemp("tokenizer")
    state = {"settings": {}, "seed": 0, "num_skipped": 0}
    save_checkpoint(path, 0, model_tensors=made.state_dict(), model_info=tokenizer_info(made), train_tensors={}, state=state)
    return path


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten recordings, two of them broken."""
    root = tmp_path_factory.mktemp("recordings")
    for number in range(NUM_RECORDINGS):
        folder, length, rng = root / f"r{number}", 9 + number % 4, np.random.default_rng(number)
        folder.mkdir()
        np.save(folder / "frames.npy", rng.integers(0, 256, (length, 16, 16, 3), dtype=np.uint8))
        np.savez(folder / "actions.npz", keyboard=rng.integers(0, 2, (length, 8)), camera=rng.integers(0, 121, length))
        np.save(folder / "rewards.npy", np.ones(3 if number in (2, 7) else length))
    return root


def contents(path: Path) -> dict[str, bytes]:
    """Hidden files are what killed writers leave behind; run.json holds the command."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if not p.name.startswith(".") and p.name != "run.json"}


@pytest.fixture(scope="module")
def plain(recordings: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the engine local makes, on one thread as an actor has it."""
    threads, out = torch.get_num_threads(), tmp_path_factory.mktemp("plain") / "out"
    torch.set_num_threads(1)
    words = ["--tokenizer", str(tokenizer), "--shard-episodes", "2", "--device", "cpu"]
    assert main(["pretokenize", "--data-path", str(recordings), "--output-path", str(out), *words]) == 0
    torch.set_num_threads(threads)
    return contents(out)


def open_on(device: torch.device, recordings: Path, tokenizer: Path, out: Path) -> GroupMaker:
    return open_groups(recordings, out, load_tokenizer(tokenizer, device), shard_episodes=2)


def opener(recordings: Path, tokenizer: Path, out: Path) -> Any:
    return partial(open_on, recordings=recordings, tokenizer=tokenizer, out=out)


def test_the_verb_gives_the_same_bytes(
    cluster: Any, recordings: Path, tokenizer: Path, plain: dict[str, bytes], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """With relative paths; again: nothing is left to do."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(recordings, target_is_directory=True)
    words = ["pretokenize", "--data-path", "data", "--output-path", "out", "--tokenizer", str(tokenizer), "--shard-episodes", "2"]
    words += ["--device", "cpu", "--engine", "ray", "--workers", "2"]
    assert main(words) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["command"].endswith("--engine ray --workers 2")
    assert "out: 8 episodes with 80 latent steps, 2 recordings left out\nwhy: see out/quarantine.json" in capsys.readouterr().out
    assert contents(tmp_path / "out") == plain and len(plain) == 5 + 3
    listed = json.loads((tmp_path / "out" / "quarantine.json").read_text())
    assert [entry["name"] for entry in listed] == ["r2", "r7"] and "lengths that disagree" in listed[0]["reason"]
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*")}
    assert main(words) == 0 and {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*")} == times


def slow_opener(device: torch.device, *, inner: Any, note: Path) -> Any:
    """As ``inner``; each process says which it is, and takes its time."""
    maker = inner(device)
    (note / str(os.getpid())).touch()
    make = maker.make

    def slow_make(numbers: Any, tick: Any) -> None:
        time.sleep(0.5)
        make(numbers, tick)

    maker.make = slow_make
    return maker


def test_killed_workers_change_nothing(
    cluster: Any, recordings: Path, tokenizer: Path, plain: dict[str, bytes], tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "notes").mkdir()
    slow, killed = partial(slow_opener, inner=opener(recordings, tokenizer, tmp_path / "out"), note=tmp_path / "notes"), []

    def kill() -> None:
        """The first worker that has finished a group, with what it does now."""
        while not list((tmp_path / "out").glob("shard-*")):
            time.sleep(0.01)
        for pid in {int(p.name) for p in (tmp_path / "notes").iterdir()} - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    seen: list[tuple[int, int]] = []
    store = pretokenize_on_ray(slow(CPU), slow, "cpu", 2, lambda *counts: seen.append(counts))
    killer.join(10)
    assert killed and len({int(p.name) for p in (tmp_path / "notes").iterdir()}) > 1 + len(killed)  # others took over
    assert contents(tmp_path / "out") == plain and len(store) == 8
    assert seen == [(number, NUM_RECORDINGS) for number in range(1, NUM_RECORDINGS + 1)]


def test_it_goes_on_with_what_others_have_begun(
    cluster: Any, recordings: Path, tokenizer: Path, plain: dict[str, bytes], tmp_path: Path
) -> None:
    """Groups that the engine local has made are kept."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path / "out"
    on = opener(recordings, tokenizer, out)
    on(CPU).make([1, 3], lambda: None)
    torch.set_num_threads(threads)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    assert len(before) == 2
    seen: list[tuple[int, int]] = []
    assert pretokenize_on_ray(on(CPU), on, "auto", 1, lambda *counts: seen.append(counts)).is_complete
    assert contents(out) == plain and seen == [(number, NUM_RECORDINGS) for number in range(5, 11)]
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def deadly_opener(device: torch.device, *, inner: Any, pid: int) -> Any:
    """Whoever makes a group dies of it, as by a decoder that crashes."""
    maker = inner(device)
    if os.getpid() != pid:
        maker.make = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return maker


def test_a_group_that_kills_every_worker_ends_the_work(
    cluster: Any, recordings: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretokenize_ray, "MAX_RETRIES", 0)
    deadly = partial(deadly_opener, inner=opener(recordings, tokenizer, tmp_path / "out"), pid=os.getpid())
    with pytest.raises(OSError, match="lost the workers of a group 1 times.*what is finished stays, run again"):
        pretokenize_on_ray(deadly(CPU), deadly, "cpu", 1)
    assert not list((tmp_path / "out").glob("shard-*"))


def failing_opener(device: torch.device, *, inner: Any, pid: int) -> Any:
    """A disk that does not answer, in the actors only."""
    if os.getpid() != pid:
        raise OSError(errno.ESTALE, "Stale file handle", "data")
    return inner(device)


def test_errors_are_told_as_without_ray(cluster: Any, recordings: Path, tokenizer: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["pretokenize", "--data-path", str(recordings), "--output-path", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    assert main([*words, "--engine", "ray", "--strict", "--device", "cpu", "--workers", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dreamer: error: r2: got lengths that disagree")
    failing = partial(failing_opener, inner=opener(recordings, tokenizer, tmp_path / "stale"), pid=os.getpid())
    with pytest.raises(OSError, match="Stale file handle"):
        pretokenize_on_ray(failing(CPU), failing, "cpu", 1)
    assert not list((tmp_path / "stale").glob("shard-*"))
    assert main([*words, "--engine", "ray", "--workers", "3", "--device", "cpu"]) == 2
    assert "workers is 3; expected 1 to 2, the cores of the Ray cluster" in capsys.readouterr().err
    assert main([*words, "--engine", "ray", "--shard", "0/2"]) == 2 and "--shard and --engine ray" in capsys.readouterr().err
    assert main([*words, "--workers", "2"]) == 2 and "--workers is for --engine ray" in capsys.readouterr().err


def test_what_actors_get() -> None:
    cores, gpus = {"CPU": 8.0, "memory": 1e9}, {"CPU": 64.0, "GPU": 4.0}
    assert choose_resources(cores, "auto", None) == Resources(1, 0, 8)
    assert choose_resources(gpus, "auto", None) == Resources(0, 1, 4)
    assert choose_resources(gpus, "cpu", 3) == Resources(1, 0, 3)
    with pytest.raises(ValueError, match="the Ray cluster has no GPU"):
        choose_resources(cores, "cuda", None)
    for wanted in (0, 5):
        with pytest.raises(ValueError, match=f"workers is {wanted}; expected 1 to 4, the GPUs of the Ray cluster"):
            choose_resources(gpus, "auto", wanted)


def test_a_missing_ray_is_named(recordings: Path, tokenizer: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["--output-path", str(tmp_path / "out"), "--tokenizer", str(tokenizer), "--engine", "ray"]
    assert main(["pretokenize", "--data-path", str(recordings), *words]) == 2
    assert "pip install 'dreamer4[ray]'" in capsys.readouterr().err and not (tmp_path / "out").exists()
