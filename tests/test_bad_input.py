"""Broken files at the command line: one line that says which file, what is wrong with it and what to do, and nothing is lost by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dreamer.cli import main
from dreamer.data import EpisodeStore, LatentStore
from dreamer.models import CausalTokenizer, CausalTokenizerConfig, TransformerConfig
from dreamer.training.checkpoint import save_checkpoint
from dreamer.training.models_io import tokenizer_info

MINERL = "MineRLTreechop-v0"
SAFETENSORS = "vae/diffusion_pytorch_model.safetensors"
Make = Callable[..., Path]


def cut(file: Path, num_bytes: int | None = None) -> None:
    """Keep the first half, or all but the last ``num_bytes``."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2 if num_bytes is None else -num_bytes])


def index_in_front(file: Path) -> Path:
    """The same mp4 as it is made for streaming: what is left of it, once it is cut, decodes without an error."""
    made = file.with_suffix(".made")
    with av.open(str(file)) as source, av.open(str(made), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    assert made.read_bytes().find(b"moov") < made.read_bytes().find(b"mdat")
    return made.replace(file)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the one line says with which ``dreamer WORDS`` ends."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main(list(map(str, words))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("dreamer: error: ")
        return line.removeprefix("dreamer: error: ")

    return run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a causal tokenizer for frames of 16x16."""
    network = TransformerConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=2, time_every=0)
    made = CausalTokenizer(CausalTokenizerConfig(token_grid=(2, 2), encoder=network, decoder=network), (3, 16, 16))
    folder = tmp_path_factory.mktemp("tokenizer")
    save_checkpoint(folder, 0, model_tensors=made.state_dict(), model_info=tokenizer_info(made), train_tensors={}, state={})
    return folder


@pytest.fixture
def write(write_vpt: Make, write_video: Make, write_minerl: Make, write_extracted: Make) -> Callable[[str, Path, str], Path]:
    """``write(reader, folder, name)``: a sound recording of 12 frames; returns its main file or folder."""
    return lambda reader, folder, name: {
        "vpt": lambda: write_vpt(folder / f"{name}.mp4", [{}] * 12, size=(128, 128)),
        "video": lambda: write_video(folder / f"{name}.mp4", 12, (128, 128)),
        "minerl": lambda: write_minerl(folder / MINERL / name, 11, 0),
        "npy": lambda: write_extracted(folder / name, 12, 16),
    }[reader]()


# How a recording breaks: its reader, what is done to it, the file that is to blame, and what is said of it.
BREAKS: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {
    "truncated mp4 beside its actions": ("vpt", cut, "{}.mp4", "cannot be decoded after 0 frames"),
    "truncated mp4 of MineRL": (
        "minerl",
        lambda p: cut(p / "recording.mp4"),
        f"{MINERL}/{{}}/recording.mp4",
        "cannot be decoded after 0 frames",
    ),
    "truncated mp4 with its index in front": ("vpt", lambda p: cut(index_in_front(p), 900), "{}.mp4", "its last 900 bytes are missing"),
    "the same without actions": ("video", lambda p: cut(index_in_front(p), 900), "{}.mp4", "its last 900 bytes are missing"),
    "truncated mp4 without actions": ("video", cut, "{}.mp4", "not a video that can be opened"),
    "JSONL with a cut line": ("vpt", lambda p: cut(p.with_suffix(".jsonl"), 40), "{}.jsonl", "line 12 cannot be read"),
    "npz that is longer than the video": (
        "minerl",
        lambda p: (p / "recording.mp4").write_bytes((p.parents[2] / "short.mp4").read_bytes()),
        f"{MINERL}/{{}}/recording.mp4",
        "got 8 frames; expected true_video_frame_count = 12, as metadata.json says",
    ),
    "truncated npz of MineRL": ("minerl", lambda p: cut(p / "rendered.npz"), f"{MINERL}/{{}}/rendered.npz", "cannot be read"),
    "npz of another length than frames.npy": (
        "npy",
        lambda p: np.savez(p / "actions.npz", keyboard=np.zeros((7, 8)), camera=np.zeros(7)),
        "{}",
        "got lengths that disagree: 12 frames, 7 actions, 12 rewards",
    ),
    "truncated npz": ("npy", lambda p: cut(p / "actions.npz"), "{}/actions.npz", "cannot be read"),
    "truncated npy": ("npy", lambda p: cut(p / "frames.npy"), "{}/frames.npy", "more than its"),
}
REMEDIES = (
    "repair it or move it away",
    "Repair the recording or move it away",
    "remove this line and those behind it, or move the recording away",
)


@pytest.mark.parametrize("broken", ["a", "b"])  # the first or the last of two
@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_recording(
    case: str, broken: str, tmp_path: Path, write: Any, write_video: Make, tokenizer: Path, fails: Any, capsys: Any
) -> None:
    reader, damage, blamed, said = BREAKS[case]
    data, sound = tmp_path / "in" / "data", "b" if broken == "a" else "a"
    write_video(tmp_path / "in" / "short.mp4", 8)
    write(reader, data, sound)
    damage(write(reader, data, broken))
    file = str(data / blamed.format(broken))

    def is_told(text: str, name: str) -> bool:
        return name in text and said in text and text.endswith(REMEDIES)

    assert main(["inspect", str(data), "--reader", reader]) == 0  # the sound one is shown, the broken one is named
    assert is_told(" ".join(capsys.readouterr().out.split()), f"problems {file}")

    words = ["pretokenize", "--data-path", data, "--reader", reader, "--output-path", tmp_path / "latents", "--tokenizer", tokenizer]
    assert main(list(map(str, words))) == 0
    assert "1 episodes with 12 latent steps, 1 recordings left out" in capsys.readouterr().out
    (left_out,) = json.loads((tmp_path / "latents" / "quarantine.json").read_text())
    assert is_told(left_out["reason"], blamed.format(broken)) and len(LatentStore(tmp_path / "latents")) == 1
    assert is_told(fails(*words[:-4], "--output-path", tmp_path / "strict", "--tokenizer", tokenizer, "--strict"), blamed.format(broken))

    options = "" if reader == "npy" else ", options: {size: [16, 16]}"
    record = ["record", "env=null", f"data.recordings={{path: {data}, reader: {reader}{options}}}", f"run_dir={tmp_path / 'run'}"]
    assert is_told(fails(*record), file)
    if broken == "b":
        assert len(EpisodeStore(tmp_path / "run" / "episodes")) == 1  # what came before it is kept
    for path in (data / MINERL if reader == "minerl" else data).glob(f"{broken}*"):  # the remedy
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(record) == 0 and len(EpisodeStore(tmp_path / "run" / "episodes")) == 1


@pytest.mark.parametrize("case", BREAKS)
def test_nothing_but_a_broken_recording(case: str, tmp_path: Path, write: Any, write_video: Make, tokenizer: Path, fails: Any) -> None:
    reader, damage, blamed, said = BREAKS[case]
    data = tmp_path / "in" / "data"
    write_video(tmp_path / "in" / "short.mp4", 8)
    damage(write(reader, data, "a"))
    words = [data, "--reader", reader]
    for line in (
        fails("inspect", *words),
        fails("pretokenize", "--data-path", *words, "--output-path", tmp_path / "latents", "--tokenizer", tokenizer),
    ):
        assert str(data) in line and blamed.format("a") in line and said in line and line.endswith(REMEDIES)
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("reader", [None, "vpt", "video", "minerl", "npy"])
def test_an_empty_folder(reader: str | None, tmp_path: Path, tokenizer: Path, fails: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    words = [] if reader is None else ["--reader", reader]
    said = "is empty; expected recordings in one of the known formats" if reader is None else "here; expected "
    assert fails("inspect", empty, *words).startswith(f"{empty}: ") and said in fails("inspect", empty, *words)
    line = fails("pretokenize", "--data-path", empty, "--output-path", tmp_path / "latents", "--tokenizer", tokenizer, *words)
    assert line.startswith(f"{empty}: ") and said in line
    line = fails("record", "env=null", f"data.recordings={{path: {empty}, reader: {reader or 'store'}}}", f"run_dir={tmp_path / 'run'}")
    expected = "no episodes store here (store.json is missing); data.recordings.reader is store" if reader is None else said
    assert line.startswith(f"{empty}: ") and expected in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


# ---- weights ----------------------------------------------------------------------------------------------------------------------


def other_architecture(folder: Path) -> None:
    file = folder / SAFETENSORS
    tensors = load_file(file)
    save_file({f"blocks.{i}.weight": tensor for i, tensor in enumerate(tensors.values())}, file)


def other_width(folder: Path) -> None:
    file = folder / SAFETENSORS
    tensors = load_file(file)
    save_file({name: torch.cat([tensor, tensor]) if tensor.ndim else tensor for name, tensor in tensors.items()}, file)


def scripts(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shutil.rmtree(folder / "vae")
        for name in ("encoder.jit", "decoder.jit"):
            (folder / name).write_bytes(content)

    return write


@pytest.mark.parametrize(
    ("damage", "more", "blamed", "said"),
    [
        (other_architecture, (), "", "these are not the weights of a Cosmos tokenizer CV8x8x8"),
        (other_width, (), "", "these are the weights of another network"),
        (
            lambda p: cut(p / SAFETENSORS),
            (),
            "/vae/diffusion_pytorch_model.safetensors",
            "get the file again",
        ),
        (lambda p: cut(p / "vae" / "config.json"), (), "/vae/config.json", "not readable as the config of a network"),
        (
            lambda p: None,
            ("cosmos_tokenizer.checksums=require",),
            "/vae/diffusion_pytorch_model.safetensors",
            "set cosmos_tokenizer.checksums to report",
        ),
        (scripts(b"PK, but no more"), ("cosmos_tokenizer.checksums=require",), "/encoder.jit", "Get the file again, or set checksums"),
        (scripts(b"\x80\x02}q\x00."), (), "/encoder.jit", r"it is no zip file, it starts with b'\x80\x02}q\x00.'"),
        (scripts(b"version https://git-lfs.github.com/spec/v1\n"), (), "/encoder.jit", "run git lfs pull or use hf download"),
        (lambda p: shutil.rmtree(p / "vae"), (), "", "hf download nvidia/Cosmos-1.0-Tokenizer-CV8x8x8 --local-dir"),
    ],
)
def test_wrong_weights(
    damage: Callable[[Path], None],
    more: tuple[str, ...],
    blamed: str,
    said: str,
    cosmos_weights: Path,
    tmp_path: Path,
    write: Any,
    fails: Any,
) -> None:
    weights, data = tmp_path / "weights", tmp_path / "data"
    shutil.copytree(cosmos_weights, weights)
    damage(weights)
    write("npy", data, "a")
    settings = [f"cosmos_tokenizer.{word}" for word in (f"checkpoint_path={weights}", "frame_size=[16, 16]", "upsampled_size=[16, 16]")]
    settings += [*more, "cosmos_tokenizer.num_latent_tokens=4", "device=cpu"]
    run = ["cosmos_tokenizer.enabled=true", "env=null", f"data.recordings.path={data}", f"run_dir={tmp_path / 'run'}"]
    for line in (
        fails("pretokenize", "--data-path", data, "--output-path", tmp_path / "latents", *settings),
        fails("train", "tokenizer", *settings, *run),
    ):
        assert line.startswith(f"{weights}{blamed}: ") and said in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "weights"]


# ---- sizes ------------------------------------------------------------------------------------------------------------------------


def test_frames_that_do_not_divide(tmp_path: Path, write_extracted: Make, tokenizer: Path, fails: Any) -> None:
    """62 divides neither by 8, Cosmos' step, nor by the causal tokenizer's patches."""
    for name in "ab":
        write_extracted(tmp_path / "data" / name, 6, 62)
    size = [f"cosmos_tokenizer.{side}=[62, 62]" for side in ("frame_size", "upsampled_size")]
    line = fails("pretokenize", "--data-path", tmp_path / "data", "--output-path", tmp_path / "latents", *size)
    assert line == "on the command line: cosmos_tokenizer: upsampled_size has the height 62; expected a multiple of 8"
    line = fails("pretokenize", "--data-path", tmp_path / "data", "--output-path", tmp_path / "latents", "--tokenizer", tokenizer)
    assert line.startswith(f"{tmp_path / 'data'}: a: frames of shape (3, 62, 62); the tokenizer takes (3, 16, 16): resize the frames, or")
    assert not (tmp_path / "latents").exists()
    run = ["env=null", f"data.recordings={{path: {tmp_path / 'data'}, reader: npy}}", f"run_dir={tmp_path / 'run'}", "device=cpu"]
    assert main(["record", *run]) == 0
    line = fails("train", "tokenizer", *run)
    assert line.startswith("frames of 62x62 do not divide into 4x4 tokens of whole 8x8 patches; change tokenizer.token_grid or ")
    assert len(EpisodeStore(tmp_path / "run" / "episodes")) == 2 and not (tmp_path / "run" / "tokenizer").exists()


@pytest.mark.parametrize("place", ["first", "last"])
def test_an_odd_size_among_others(place: str, tmp_path: Path, write_extracted: Make, tokenizer: Path, fails: Any) -> None:
    """In the last place it is left out. In the first the tokenizer may be the wrong one: that is said before hours are spent."""
    odd = "a" if place == "first" else "c"
    for name in "abc":
        write_extracted(tmp_path / "data" / name, 6, 62 if name == odd else 16)
    words = ["pretokenize", "--data-path", str(tmp_path / "data"), "--output-path", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    said = f"{odd}: frames of shape (3, 62, 62); the tokenizer takes (3, 16, 16): resize the frames, or take a tokenizer for their size"
    if place == "first":
        assert fails(*words) == f"{tmp_path / 'data'}: {said}"
    else:
        assert main(words) == 0 and len(LatentStore(tmp_path / "out")) == 2
        assert json.loads((tmp_path / "out" / "quarantine.json").read_text()) == [{"name": "c", "reason": said}]


def test_a_trained_tokenizer_that_is_cut(tmp_path: Path, tokenizer: Path, write: Any, fails: Any) -> None:
    write("npy", tmp_path / "data", "a")
    shutil.copytree(tokenizer, tmp_path / "cut")
    (file,) = (tmp_path / "cut").rglob("model.safetensors")
    cut(file)
    line = fails("pretokenize", "--data-path", tmp_path / "data", "--output-path", tmp_path / "out", "--tokenizer", tmp_path / "cut")
    assert line.startswith(f"{file.parents[1]}: none of 1 checkpoints is sound") and f"{file}: has " in line
    assert not (tmp_path / "out").exists()
