"""``dreamer play`` and ``dreamer dream``, as they are typed: what is wrong is said in one line, with exit code 2."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dreamer import cli
from dreamer.models import CausalTokenizer
from dreamer.player.commands import EXTRA


def complaint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("dreamer: error: ") and len(said.err.splitlines()) == 1
    return said.err


@pytest.fixture(params=["play", "dream"])
def verb(request: pytest.FixtureRequest, tmp_path: Path) -> list[object]:
    return [request.param, *(["--out", tmp_path / "dream.mp4"] if request.param == "dream" else ["--no-open", "--port", "0"])]


@pytest.fixture
def begun(run_path: Path, tmp_path: Path) -> Path:
    """A run whose world model is still to be trained."""
    for part in ("episodes", "tokenizer", "latents"):
        (tmp_path / "my run" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "my run" / part).symlink_to(run_path / part)
    shutil.copy(run_path / "config.yaml", tmp_path / "my run")
    return tmp_path / "my run"


def test_a_folder_that_is_no_run(verb: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        assert f"{folder}: is no run and no part of one" in complaint(capsys, *verb, folder)


def test_a_run_without_a_world_model_and_one_without_an_agent(
    verb: list[object], begun: Path, run_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"run first: dreamer train phase1 --config '{begun / 'config.yaml'}' 'run_dir=\"{begun}\"'"
    assert command in complaint(capsys, *verb, begun)  # as it can be typed
    assert "holds the model kind 'tokenizer'; expected 'agent'" in complaint(capsys, *verb, run_path / "tokenizer")
    if verb[0] == "dream":
        (begun / "phase1").symlink_to(run_path / "phase1")
        assert "phase 1 trains no policy; play a checkpoint of phase 2 or 3" in complaint(capsys, *verb, begun, "--actions", "policy")


def test_latents_that_cannot_be_decoded(
    verb: list[object], run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"  # a run that learns from latents alone and has no tokenizer
    bare.mkdir()
    (bare / "phase1").symlink_to(run_path / "phase1")
    settings = yaml.safe_load((run_path / "config.yaml").read_text()) | {"env": None}
    settings["data"]["latents"] = str(run_path / "latents")
    (bare / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "tokenizer does not decode, so that a dream has no frames" in complaint(capsys, *verb, bare)
    monkeypatch.setattr(CausalTokenizer, "can_decode", False)  # as Cosmos with one vector a frame
    assert "tokenizer does not decode, so that a dream has no frames" in complaint(capsys, *verb, run_path)


def test_environments_that_do_not_fit(run_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "play", run_path, "--env", "crafter-shop")
    assert "unknown environment 'crafter-shop'; nearest names: crafter-chop" in said
    assert "choose the environment that it was trained for" in complaint(capsys, "play", run_path, "--env", "CartPole-v1")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_ports_that_cannot_be_had(run_path: Path, taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra play: pip install 'dreamer4[play]'")
    said = complaint(capsys, "play", run_path, "--no-open", "--port", taken)
    assert f"port {taken}: Address already in use; choose another with --port" in said
    assert "--port is 99999; expected 0 to 65535" in complaint(capsys, "play", run_path, "--port", 99999)


@pytest.mark.parametrize("package", EXTRA)
def test_without_the_extra_play(
    run_path: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"dreamer play needs the package {package}: pip install 'dreamer4[play]'" in complaint(capsys, "play", run_path)
    out = tmp_path / "dream.gif"  # files need no server
    assert cli.main(["dream", str(run_path), "--out", str(out), "--num", "1", "--steps", "2", "--context", "3"]) == 0 and out.exists()


def test_playing_needs_no_playwright(run_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """That and Chromium are for tests: any browser will do."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra play: pip install 'dreamer4[play]'")
    monkeypatch.setitem(sys.modules, "playwright", None)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    assert cli.main(["play", str(run_path), "--no-open", "--port", "0"]) == 0
    assert "play here: http://127.0.0.1:" in capsys.readouterr().out
