"""Reading the tensors of TorchScript archives without running them: the same as torch.jit.load, and nothing that a file asks for."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dreamer.models.cosmos_torchscript import read_torchscript_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(2, 3, (1, 3, 3)), nn.GroupNorm(1, 3))
        self.register_buffer("_arange", torch.arange(2))
        self.register_buffer("constants", torch.tensor([0.5, 0.25]), persistent=False)
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * self.constants[0]


@pytest.fixture(params=["traced", "scripted", "bfloat16"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    module = nn.Sequential(OrderedDict(encoder=Inner(), quant_conv=nn.Linear(3, 3))).eval()
    example = torch.zeros(1, 2, 1, 3, 5)
    if request.param == "scripted":
        script = torch.jit.script(module)
    else:
        module.to(torch.bfloat16 if request.param == "bfloat16" else torch.float32)
        script = torch.jit.trace(module, example.to(module.quant_conv.weight.dtype))
    path = tmp_path / "encoder.jit"
    torch.jit.save(script, path)
    return path


def test_tensors_are_those_of_the_state_dict(archive: Path) -> None:
    expected = torch.jit.load(archive).state_dict()
    found = read_torchscript_tensors(archive)
    assert {"encoder.layers.0.weight", "encoder._arange", "encoder.constants", "quant_conv.bias"} <= found.keys()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_nothing_is_executed(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("TorchScript was loaded as code")

    monkeypatch.setattr(torch.jit, "load", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    assert read_torchscript_tensors(archive)


class Call:
    """Pickled, it asks for a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def write_archive(path: Path, data: bytes, extra: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("m/data.pkl", data)
        for name, content in (extra or {}).items():
            archive.writestr(f"m/{name}", content)
    return path


def test_a_pickle_that_asks_for_a_call_is_refused(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = write_archive(tmp_path / "m.jit", pickle.dumps(Call(os.mkdir, str(witness)), protocol=2))
    with pytest.raises(ValueError, match="m.jit: not a readable TorchScript archive .*asks for posix.mkdir"):
        read_torchscript_tensors(path)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["os\nsystem", "builtins\neval", "torch\nload", "torch._utils\n_rebuild_tensor", "__main__\nX"])
def test_only_what_weights_need_can_be_asked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="asks for"):
        read_torchscript_tensors(write_archive(tmp_path / "m.jit", f"c{name}\n.".encode()))


def tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...], offset: int, length: int) -> bytes:
    """What PyTorch writes for a module with one tensor, opcode by opcode."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + v.to_bytes(4, "little", signed=True) for v in values) + b"t"

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"J" + length.to_bytes(4, "little") + b"tQ"
    arguments = (
        b"(" + storage + b"J" + offset.to_bytes(4, "little") + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    )
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    return b"\x80\x02c__torch__.M\nM\n)\x81}" + text("weight") + tensor + b"sb."


def test_a_tensor_written_by_hand(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    path = write_archive(tmp_path / "m.jit", tensor_pickle((2, 2), (3, 1), 1, 6), {"data/0": values.numpy().tobytes()})
    assert read_torchscript_tensors(path)["weight"].tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize(
    ("pickled", "content", "compression"),
    [
        (tensor_pickle((4, 2), (2, 1), 0, 6), 24, zipfile.ZIP_STORED),  # reaches beyond its storage
        (tensor_pickle((2, 2), (2, 1), 0, 6), 20, zipfile.ZIP_STORED),  # fewer bytes than announced
        (tensor_pickle((2, 2), (2, 1), 0, 6), 24, zipfile.ZIP_DEFLATED),  # could be much larger than the file
        (tensor_pickle((2, 2), (-2, 1), 0, 6), 24, zipfile.ZIP_STORED),
    ],
)
def test_tensors_stay_inside_their_bytes(tmp_path: Path, pickled: bytes, content: int, compression: int) -> None:
    path = write_archive(tmp_path / "m.jit", pickled, {"data/0": bytes(content)}, compression)
    with pytest.raises(ValueError, match="m.jit: not a readable TorchScript archive"):
        read_torchscript_tensors(path)


def test_files_of_other_kinds_are_named_with_what_they_are(tmp_path: Path) -> None:
    pointer = tmp_path / "pointer.jit"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 93000000\n")
    with pytest.raises(ValueError, match="pointer.jit: .*git lfs pull or use hf download"):
        read_torchscript_tensors(pointer)
    page = tmp_path / "page.jit"
    page.write_text("<html>")
    with pytest.raises(ValueError, match="page.jit: .*no zip file, it starts with b'<html>'"):
        read_torchscript_tensors(page)
    saved = tmp_path / "saved.jit"
    torch.save({"weight": torch.zeros(2)}, saved)
    with pytest.raises(ValueError, match="saved.jit: .*not a TorchScript module"):
        read_torchscript_tensors(saved)
    with pytest.raises(ValueError, match="missing.jit: .*No such file"):
        read_torchscript_tensors(tmp_path / "missing.jit")


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused(archive: Path, fraction: float) -> None:
    content = archive.read_bytes()
    archive.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match="not a readable TorchScript archive"):
        read_torchscript_tensors(archive)


def test_a_pickle_of_a_few_bytes_asks_for_no_memory(tmp_path: Path) -> None:
    """Python's unpickler makes a list as long as the highest place that a value is kept at: 2.7 GB for this one."""
    path = write_archive(tmp_path / "m.jit", b"\x80\x02Nr" + (170_000_000).to_bytes(4, "little") + b".")
    with pytest.raises(ValueError, match="keeps a value at place 170000000 in 9 bytes"):
        read_torchscript_tensors(path)
