"""Weights of the Cosmos tokenizer in both layouts, against the network that they came from, and what is said of wrong ones."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamer.models import (
    CosmosTokenizerConfig,
    CosmosTokenizerWrapper,
    cosmos_weights,
    create_cosmos_tokenizer,
    create_cosmos_tokenizer_from_config,
)
from dreamer.models.cosmos_weights import REPOSITORIES, ScriptedCosmos, build_network, diffusers_names, load_network
from dreamer.training.checkpoint import save_checkpoint
from dreamer.training.models_io import load_tokenizer, tokenizer_info

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")

Native = dict[str, Any]
Wrap = Callable[..., CosmosTokenizerWrapper]
Clip = Callable[..., Tensor]
RawEncode = Callable[[Any, Tensor], Tensor]


def nvidia_name(name: str) -> str:
    """diffusers' name to the one in NVIDIA's ``CausalContinuousVideoTokenizer``."""
    steps = [
        (r"\.down_blocks\.(\d)\.resnets", r".down.\1.block"),
        (r"\.down_blocks\.(\d)\.downsamplers\.0", r".down.\1.downsample"),
        (r"\.up_blocks\.(\d)\.resnets", lambda m: f".up.{2 - int(m[1])}.block"),
        (r"\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f".up.{2 - int(m[1])}.upsample"),
        (r"\.mid_block\.resnets\.(\d)", lambda m: f".mid.block_{int(m[1]) + 1}"),
        (r"\.mid_block\.attentions\.0", ".mid.attn_1.0"),
        (r"\.mid_block\.temp_attentions\.0", ".mid.attn_1.1"),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
        (r"\.conv_s\.", ".0."),
        (r"\.conv_t\.", ".1."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
    ]
    for pattern, replacement in steps:
        name = re.sub(pattern, replacement, name)
    return name if ".norm." in name else re.sub(r"\.(weight|bias)$", r".conv3d.\1", name)


def nvidia_names(blocks: int) -> set[str]:
    """Every parameter of NVIDIA's network, after its source: EncoderFactorized, DecoderFactorized and two 1x1x1 convolutions."""

    def resnet(prefix: str, has_shortcut: bool) -> list[str]:
        parts = ["norm1.norm", "conv1.0.conv3d", "conv1.1.conv3d", "norm2.norm", "conv2.0.conv3d", "conv2.1.conv3d"]
        return [f"{prefix}.{part}" for part in parts + ["nin_shortcut.conv3d"] * has_shortcut]

    layers = ["quant_conv.conv3d", "post_quant_conv.conv3d"]
    for part, level, sampler, resampled in (("encoder", "down", "downsample", (0, 1)), ("decoder", "up", "upsample", (1, 2))):
        layers += [f"{part}.{name}" for name in ("conv_in.0.conv3d", "conv_in.1.conv3d", "norm_out.norm", "conv_out.0.conv3d")]
        layers += [f"{part}.conv_out.1.conv3d"]
        layers += resnet(f"{part}.mid.block_1", False) + resnet(f"{part}.mid.block_2", False)
        for attention in ("0", "1"):
            names = ("norm.norm", "q.conv3d", "k.conv3d", "v.conv3d", "proj_out.conv3d")
            layers += [f"{part}.mid.attn_1.{attention}.{name}" for name in names]
        for i in range(3):
            count = blocks + (part == "decoder")
            layers += [name for j in range(count) for name in resnet(f"{part}.{level}.{i}.block.{j}", has_shortcut=j == 0)]
        layers += [f"{part}.{level}.{i}.{sampler}.conv{n}.conv3d" for i in resampled for n in (1, 2, 3)]
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


UNUSED = [
    f"{block}.conv{n}.conv3d.{kind}"
    for block in ("encoder.down.1.downsample", "decoder.up.2.upsample")
    for n in (1, 2, 3)
    for kind in ("weight", "bias")
]


class NvidiaModule(nn.Module):
    """NVIDIA's tree of modules by its names. The network's own layers run on the parameters, which are the same objects."""

    def __init__(self, network: Any, parts: tuple[str, ...], run: Callable[[Any, Tensor], Any], more: dict[str, Tensor]) -> None:
        super().__init__()
        tensors: dict[str, Tensor] = {name: nn.Parameter(torch.randn(3)) for name in UNUSED}
        tensors |= more | {nvidia_name(own): parameter for own, parameter in network.named_parameters()}
        for patcher in ("encoder.patcher3d", "decoder.unpatcher3d"):
            tensors |= {f"{patcher}.wavelets": torch.full((2,), 0.5**0.5), f"{patcher}._arange": torch.arange(2)}
        tensors["encoder.patcher3d.patch_size_buffer"] = torch.full((1,), 4, dtype=torch.int32)
        for name, tensor in tensors.items():
            if name.startswith(parts):
                self._grow(name, tensor)
        self.__dict__["run"] = lambda x: run(network, x)  # the network is no submodule: it would be saved too

    def _grow(self, name: str, value: Tensor) -> None:
        *path, leaf = name.split(".")
        module: nn.Module = self
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        if isinstance(value, nn.Parameter):
            module.register_parameter(leaf, value)
        else:
            module.register_buffer(leaf, value)

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


def save_torchscript(network: Any, folder: Path, files: tuple[str, ...], more: dict[str, Tensor] | None = None) -> None:
    """NVIDIA's layout: ``encoder.jit`` gives (latent, (zero, zero)), ``autoencoder.jit`` (reconstruction, posteriors, latent). ``more``:
    tensors that no layer uses."""
    zero = torch.zeros(1)

    def run_encoder(net: Any, x: Tensor) -> Any:
        return net.quant_conv(net.encoder(x)), (zero.clone(), zero.clone())

    def run_decoder(net: Any, z: Tensor) -> Any:
        return net.decoder(net.post_quant_conv(z))

    def run_both(net: Any, x: Tensor) -> Any:
        latent = net.quant_conv(net.encoder(x))
        return net.decoder(net.post_quant_conv(latent)), (zero.clone(), zero.clone()), latent

    pixels, latents = torch.zeros(1, 3, 9, 16, 16), torch.zeros(1, 16, 2, 2, 2)
    kinds = {
        "encoder.jit": (("encoder.", "quant_conv."), run_encoder, pixels),
        "decoder.jit": (("decoder.", "post_quant_conv."), run_decoder, latents),
        "autoencoder.jit": (("encoder.", "quant_conv.", "decoder.", "post_quant_conv."), run_both, pixels),
    }
    folder.mkdir(exist_ok=True)
    for file in files:
        parts, run, example = kinds[file]
        with torch.no_grad():
            torch.jit.save(torch.jit.trace(NvidiaModule(network, parts, run, more or {}).eval(), example, check_trace=False), folder / file)


@pytest.fixture(scope="module")
def scripts(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchscript")
    save_torchscript(network, folder, ("encoder.jit", "decoder.jit"))
    mean, std = torch.randn(16, 16), torch.rand(16, 16) + 0.5
    torch.save((mean, std), folder / "mean_std.pt")
    return folder


def test_a_network_built_without_content_first_does_not_spoil_the_others() -> None:
    """diffusers makes constants when it is imported: in a process of its own, where the first to ask wants the meta device."""
    lines = [
        "import torch; from dreamer.models.cosmos_weights import build_network",
        "small = dict(encoder_block_out_channels=(8, 8), decode_block_out_channels=(8, 8), num_layers=1)",
        "with torch.device('meta'): build_network(small)",
        "assert not any(b.is_meta for b in build_network(small).buffers())",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def saved(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    network.save_pretrained(folder / "vae")
    return folder


def assert_same_network(tokenizer: CosmosTokenizerWrapper, network: Any, frames: Tensor, raw_encode: RawEncode) -> None:
    expected = raw_encode(network, frames)
    torch.testing.assert_close(raw_encode(tokenizer.network, frames), expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        decoded = tokenizer.network.decode(expected).sample
        torch.testing.assert_close(decoded, network.decode(expected).sample, atol=1e-4, rtol=0)


def test_diffusers_layout(network: Any, saved: Path, clip: Clip, native: Native, raw_encode: RawEncode) -> None:
    for folder in (saved, saved / "vae"):
        tokenizer = create_cosmos_tokenizer(folder, **native)
        assert_same_network(tokenizer, network, clip(17), raw_encode)
    config = tokenizer.config.model_copy(update={"checkpoint_path": saved})
    assert create_cosmos_tokenizer_from_config(config, "cpu").fingerprint() == tokenizer.fingerprint()


def test_torchscript_layout(network: Any, scripts: Path, clip: Clip, native: Native, raw_encode: RawEncode) -> None:
    tokenizer = create_cosmos_tokenizer(scripts, **native)
    assert_same_network(tokenizer, network, clip(17), raw_encode)
    mean, std = torch.load(scripts / "mean_std.pt", weights_only=True)
    torch.testing.assert_close(tokenizer.latent_mean, torch.stack([mean[:, 0], mean[:, 1:].mean(1)]))
    torch.testing.assert_close(tokenizer.latent_std, torch.stack([std[:, 0], std[:, 1:].mean(1)]))


def test_a_checkpoint_of_either_layout_needs_the_original_no_more(
    scripts: Path, saved: Path, tmp_path: Path, clip: Clip, native: Native
) -> None:
    for layout in (scripts, saved):
        folder = shutil.copytree(layout, tmp_path / layout.name)
        tokenizer = create_cosmos_tokenizer(folder, **native)
        tensors, info = tokenizer.state_dict(), tokenizer_info(tokenizer)
        path = save_checkpoint(tmp_path / f"of_{layout.name}", 0, model_tensors=tensors, model_info=info, train_tensors={}, state={})
        shutil.rmtree(folder)
        loaded = load_tokenizer(path)
        assert isinstance(loaded, CosmosTokenizerWrapper) and loaded.config == tokenizer.config
        assert loaded.fingerprint() == tokenizer.fingerprint()
        frames = clip(9)
        assert torch.equal(loaded.encode(frames), tokenizer.encode(frames))
        assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.train().training


def test_torchscript_layout_in_one_file(
    network: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, wrap: Wrap, clip: Clip, native: Native, raw_encode: RawEncode
) -> None:
    save_torchscript(network, tmp_path, ("autoencoder.jit",))
    tokenizer = create_cosmos_tokenizer(tmp_path, **native)
    assert_same_network(tokenizer, network, clip(17), raw_encode)
    assert "no statistics of the latents here" in caplog.text
    torch.testing.assert_close(tokenizer.latent_mean, wrap(network).latent_mean)  # those of diffusers


def test_the_names_are_those_of_nvidias_network() -> None:
    network = build_network({"encoder_block_out_channels": (8, 10, 12, 14), "decode_block_out_channels": (8, 10, 12, 14)})
    own = set(network.state_dict())
    assert {nvidia_name(name) for name in own} | set(UNUSED) == nvidia_names(blocks=2)
    renamed = diffusers_names(dict.fromkeys(nvidia_names(blocks=2), torch.zeros(0)))
    assert own < renamed.keys() and len(renamed.keys() - own) == len(UNUSED) == 12


def test_the_full_width_has_the_published_size() -> None:
    with torch.device("meta"):
        network = build_network({})
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 105.65


def test_a_tensor_too_few_too_many_or_of_another_shape_is_named(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: Native
) -> None:
    save_torchscript(network, tmp_path, ("autoencoder.jit",))
    tensors = cosmos_weights.read_torchscript_tensors(tmp_path / "autoencoder.jit")
    name = "encoder.mid.attn_1.0.q.conv3d.weight"
    cases = {
        "lacks weight 'encoder.mid_block.attentions.0.to_q.weight'": {n: t for n, t in tensors.items() if n != name},
        "has the unknown weight 'quantizer.levels'": tensors | {"quantizer.levels": torch.zeros(6)},
        r"'encoder.mid_block.attentions.0.to_q.weight' has shape \(2,\)": tensors | {name: torch.zeros(2)},
        r"shape .* \(torch.int64\)": tensors | {name: tensors[name].long()},
        "lacks the weight 'quant_conv.weight'": {n: t for n, t in tensors.items() if n != "quant_conv.conv3d.weight"},
    }
    for message, changed in cases.items():
        monkeypatch.setattr(cosmos_weights, "read_torchscript_tensors", lambda _path, changed=changed: changed)
        with pytest.raises(ValueError, match=message):
            create_cosmos_tokenizer(tmp_path, **native)


@pytest.mark.parametrize(("time", "space"), [(8, 16), (4, 8)])
@pytest.mark.parametrize("files", [("encoder.jit", "decoder.jit"), ("autoencoder.jit",)])
def test_other_compression_is_refused_though_names_and_shapes_are_the_same(
    make_network: Callable[..., Any], network: Any, tmp_path: Path, native: Native, files: tuple[str, ...], time: int, space: int
) -> None:
    other = make_network(temporal_compression_ratio=time, spatial_compression_ratio=space)
    kept = {nvidia_name(name): parameter for name, parameter in network.named_parameters()}  # NVIDIA keeps what it does not use
    save_torchscript(other, tmp_path, files, kept)
    loaded = cosmos_weights.read_torchscript_tensors(tmp_path / files[0])
    assert {name for name in kept if name.startswith("encoder.")} <= loaded.keys()
    with pytest.raises(ValueError, match=rf"{files[0]}: this network compresses {time}x in time and {space}x in space; expected CV8x8x8"):
        create_cosmos_tokenizer(tmp_path, **native)


def test_resamplers_that_are_at_work_are_not_taken_for_unused(
    make_network: Callable[..., Any], scripts: Path, monkeypatch: pytest.MonkeyPatch, native: Native
) -> None:
    other = {nvidia_name(name): tensor for name, tensor in make_network(spatial_compression_ratio=16).named_parameters()}

    def parts(path: Path) -> dict[str, Tensor]:
        return {name: t for name, t in other.items() if ("encoder." in name or name.startswith("quant")) == (path.stem == "encoder")}

    monkeypatch.setattr(cosmos_weights, "read_torchscript_tensors", parts)
    with pytest.raises(ValueError, match=r"has the unknown weight 'decoder.up_blocks.0.upsamplers.0.conv"):
        create_cosmos_tokenizer(scripts, **native)


def test_code_that_does_not_tell_the_compression_is_warned_of(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, native: Native
) -> None:
    create_cosmos_tokenizer(scripts, **native)
    assert "does not show by how much it compresses" not in caplog.text
    monkeypatch.setattr(cosmos_weights, "read_torchscript_code", lambda _path: "def forward(self, x): return x")
    create_cosmos_tokenizer(scripts, **native)
    pools = "".join(f"    x = torch.avg_pool3d(x, {size}, {size}, [0, 0, 0], False, True, None)\n" for size in ([1, 2, 2], [2, 1, 1]))
    twice = "".join(f"  def {name}(self, x):\n{pools}    return x\n" for name in ("forward", "forward1"))
    monkeypatch.setattr(cosmos_weights, "read_torchscript_code", lambda _path: twice)
    create_cosmos_tokenizer(scripts, **native)  # of a module that is called in two ways
    assert caplog.text.count("does not show by how much it compresses") == 1
    assert "encoder.jit: its code does not show by how much it compresses; make sure that it is CV8x8x8" in caplog.text


def test_missing_weights_say_where_to_get_them(tmp_path: Path, scripts: Path) -> None:
    with pytest.raises(ValueError) as error:
        create_cosmos_tokenizer(tmp_path / "none")
    message = str(error.value)
    assert all(repository in message for repository in REPOSITORIES) and str(tmp_path / "none") in message
    assert f"hf download {REPOSITORIES[0]} --local-dir {tmp_path / 'none'}" in message
    (tmp_path / "encoder.jit").write_bytes((scripts / "encoder.jit").read_bytes())  # without its decoder
    with pytest.raises(ValueError, match="no weights of the Cosmos tokenizer here"):
        create_cosmos_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="is a file; cosmos_tokenizer.checkpoint_path names the folder"):
        create_cosmos_tokenizer(tmp_path / "encoder.jit")


def test_damaged_files_are_named(saved: Path, scripts: Path, tmp_path: Path) -> None:
    config = (saved / "vae" / "config.json").read_text()
    weights = (saved / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()

    def folder(name: str, text: str, data: bytes) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "diffusion_pytorch_model.safetensors").write_bytes(data)
        return tmp_path / name

    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
        create_cosmos_tokenizer(folder("cut", config, weights[:-100]))
    with pytest.raises(ValueError, match="config.json: not readable"):
        create_cosmos_tokenizer(folder("text", "{", weights))
    with pytest.raises(ValueError, match="config.json: describes a AutoencoderKL; expected AutoencoderKLCosmos"):
        create_cosmos_tokenizer(folder("other", json.dumps({"_class_name": "AutoencoderKL"}), weights))
    with pytest.raises(ValueError, match="does not know this architecture .*depth"):
        create_cosmos_tokenizer(folder("unknown", json.dumps(json.loads(config) | {"depth": 3}), weights))
    (tmp_path / "cut" / "second.safetensors").write_bytes(b"")
    (tmp_path / "cut" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "cut" / "first.safetensors")
    with pytest.raises(ValueError, match=r"several weight files, first.safetensors, second.safetensors"):
        create_cosmos_tokenizer(tmp_path / "cut")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "autoencoder.jit").write_bytes((scripts / "encoder.jit").read_bytes()[:-50])
    with pytest.raises(ValueError, match="autoencoder.jit: not a readable TorchScript archive"):
        create_cosmos_tokenizer(tmp_path / "script")


def test_checksums(scripts: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, native: Native) -> None:
    create_cosmos_tokenizer(scripts, **native)
    warned = [record.message for record in caplog.records if "MD5" in record.message and record.levelno == logging.WARNING]
    assert [re.sub(r"MD5 \w{32}", "MD5 x", text) for text in warned] == [
        f"{scripts / name}: MD5 x, not of a release whose checksums are known" for name in ("encoder.jit", "decoder.jit", "mean_std.pt")
    ]
    with pytest.raises(ValueError, match=r"encoder.jit: its MD5 is \w{32}; nvidia/Cosmos-Tokenize1-CV8x8x8-720p has f5834d03645c379b"):
        create_cosmos_tokenizer(scripts, checksums="require")
    with pytest.raises(ValueError, match="no checksum of this file is known"):
        create_cosmos_tokenizer(saved, checksums="require")
    known = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in scripts.iterdir()}
    monkeypatch.setattr(cosmos_weights, "KNOWN_MD5", known)
    caplog.clear()
    create_cosmos_tokenizer(scripts, checksums="require", **native)
    assert not caplog.records  # nothing to warn of


def test_statistics_that_do_not_fit_are_refused(scripts: Path, tmp_path: Path, native: Native) -> None:
    for name in ("encoder.jit", "decoder.jit"):
        (tmp_path / name).write_bytes((scripts / name).read_bytes())
    path = tmp_path / "mean_std.pt"
    for content, message in (
        ((torch.zeros(9), torch.ones(9)), "9 means and 9 deviations do not divide into 16 channels"),
        ((torch.zeros(16), torch.ones(32)), "16 means and 32 deviations"),
        (torch.zeros(16, 16), "not readable as a pair of tensors"),
        ({"mean": 1}, "not readable as a pair of tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"mean_std.pt: .*{message}"):
            create_cosmos_tokenizer(tmp_path, **native)
    torch.save((torch.zeros(16, 16), torch.zeros(16, 16)), path)
    with pytest.raises(ValueError, match="deviations positive"):
        create_cosmos_tokenizer(tmp_path, **native)


def test_without_diffusers_the_message_names_the_extra(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"needs diffusers, which is not installed .*pip install 'dreamer4\[cosmos\]'"):
        create_cosmos_tokenizer(saved)


def test_torchscript_runs_only_when_trusted_and_on_cuda(scripts: Path, network: Any, wrap: Wrap, clip: Clip, native: Native) -> None:
    with pytest.raises(ValueError, match="TorchScript runs on CUDA only, the device is cpu"):
        create_cosmos_tokenizer(scripts, trust_torchscript=True, **native)
    encoder, decoder = (torch.jit.load(scripts / name) for name in ("encoder.jit", "decoder.jit"))
    for module in (encoder, lambda x: encoder(x)[0]):  # a pair as in NVIDIA's files, or a bare tensor
        tokenizer = wrap(ScriptedCosmos(module, decoder, network.config))
        frames = clip(9)
        latents = wrap(network).encode(frames)
        torch.testing.assert_close(tokenizer.encode(frames), latents, atol=1e-4, rtol=0)
        assert (tokenizer.decode(latents).int() - wrap(network).decode(latents).int()).abs().max() <= 1
        assert not tokenizer.can_stream
        with pytest.raises(ValueError, match="TorchScript encodes whole clips only"):
            tokenizer.new_cache(1, "encoder")


def test_a_program_goes_into_no_checkpoint(scripts: Path, network: Any, wrap: Wrap) -> None:
    encoder, decoder = (torch.jit.load(scripts / name) for name in ("encoder.jit", "decoder.jit"))
    with pytest.raises(ValueError, match="a checkpoint holds weights, no programs; leave it false"):
        tokenizer_info(wrap(ScriptedCosmos(encoder, decoder, network.config)))


def test_a_checkpoint_without_diffusers_is_not_called_damaged(
    network: Any, tmp_path: Path, wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = wrap(network)
    tensors, info = tokenizer.state_dict(), tokenizer_info(tokenizer)
    save_checkpoint(tmp_path, 0, model_tensors=tensors, model_info=info, train_tensors={}, state={})
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"^the Cosmos tokenizer needs diffusers, which is not installed"):
        load_tokenizer(tmp_path)


def test_a_config_that_is_not_enabled_is_refused() -> None:
    with pytest.raises(ValueError, match="cosmos_tokenizer.enabled is false"):
        create_cosmos_tokenizer_from_config(CosmosTokenizerConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_block_out_channels": [1 << 20] * 4}, "it is larger than its weights"),
        ({"num_layers": 10**9}, "1000000000 layers"),
        ({"latent_channels": [3]}, "does not describe a Cosmos tokenizer"),
        ({"patch_size": 0}, "does not describe a Cosmos tokenizer"),
    ],
)
def test_a_config_that_asks_for_too_much_is_refused_before_memory_is(
    cosmos_weights: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(cosmos_weights, tmp_path / "w")
    config = tmp_path / "w" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=f"{tmp_path / 'w'}: config.json does not describe.*{message}|{message}"):
        load_network(tmp_path / "w")
