"""Where the weights of the Cosmos tokenizer CV8x8x8 come from: a folder on the disk, in one of two layouts. Nothing is downloaded.

``diffusers``     ``config.json`` and one ``.safetensors`` file, in the folder itself or in ``vae/`` below it
``TorchScript``   NVIDIA's ``encoder.jit`` with ``decoder.jit``, or ``autoencoder.jit``; ``mean_std.pt`` beside them if there is one

Both give the network of diffusers, which is the network of NVIDIA under other names (after ``convert_cosmos_to_diffusers.py`` in
huggingface/diffusers). Every tensor must be used and every parameter filled.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamer.models.cosmos_torchscript import read_torchscript_code, read_torchscript_tensors, require_small_archive

Checksums = Literal["report", "require"]
REPOSITORIES = ("nvidia/Cosmos-1.0-Tokenizer-CV8x8x8", "nvidia/Cosmos-0.1-Tokenizer-CV8x8x8", "nvidia/Cosmos-Tokenize1-CV8x8x8-720p")

PLAIN_SIZE = 1024  # CV8x8x8 is 512 wide; a network of larger numbers is looked at before it is built
MAX_STATISTICS_BYTES = 1 << 24  # mean_std.pt, unpacked: some kB

# MD5 of the files of nvidia/Cosmos-Tokenize1-CV8x8x8-720p, from its checksum list. Those of the other releases are not known here.
KNOWN_MD5 = {
    "encoder.jit": "f5834d03645c379bc0f8ad14b9bc0299",
    "decoder.jit": "ff21a63ed817ffdbe4b6841111ec79a8",
    "autoencoder.jit": "7f658580d5cf617ee1a1da85b1f51f0d",
    "mean_std.pt": "f07680ad7eefae57d698778e2a0c7c96",
}

# NVIDIA's names to those of diffusers, in this order; up.N counts the other way round and is renamed apart
_RENAMES = (
    (r"\bdown\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"\bdown\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"\bmid\.block_1\.", "mid_block.resnets.0."),
    (r"\bmid\.block_2\.", "mid_block.resnets.1."),
    (r"\bmid\.attn_1\.0\.", "mid_block.attentions.0."),
    (r"\bmid\.attn_1\.1\.", "mid_block.temp_attentions.0."),
    (r"\.([qkv])\.conv3d\.", r".to_\1."),
    (r"\.proj_out\.conv3d\.", ".to_out.0."),
    (r"\.0\.conv3d\.", ".conv_s."),
    (r"\.1\.conv3d\.", ".conv_t."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.conv3d\.", "."),
)
_CONSTANT = re.compile(r"(^|\.)(wavelets|_arange|patch_size_buffer)$")  # of the Haar transform
_RESAMPLER = re.compile(r"^(.+\.(?:down|up)samplers\.0)\.(conv[123]\.(?:weight|bias))$")
_RESAMPLER_TENSORS = {f"conv{n}.{kind}" for n in (1, 2, 3) for kind in ("weight", "bias")}
_POOLING = re.compile(r"avg_pool3d\(.*?\[(\d+), (\d+), (\d+)\], \[\1, \2, \3\]")  # kernel, and the same stride
_POOLINGS = Counter({("1", "2", "2"): 1, ("2", "1", "1"): 1})  # in CV8x8x8's encoder; the Haar transform does the other 4x

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CosmosFiles:
    """The files that a checkpoint folder offers."""

    folder: Path
    safetensors: Path | None = None  # with config.json beside it
    scripts: tuple[Path, ...] = ()  # encoder.jit and decoder.jit, or autoencoder.jit


@dataclass(frozen=True)
class CosmosWeights:
    """A network before it is built: arguments of diffusers' ``AutoencoderKLCosmos``, and its tensors under diffusers' names."""

    architecture: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)


def find_files(path: Path, *, prefer_scripts: bool = False) -> CosmosFiles:
    """What ``path`` holds. Raises ``ValueError`` that says where to get weights, and with which command, if it holds none."""
    if path.is_file():
        raise ValueError(f"{path}: is a file; cosmos_tokenizer.checkpoint_path names the folder that it is in")
    names = ("encoder.jit", "decoder.jit")
    scripts = tuple(path / name for name in names if (path / name).is_file())
    if len(scripts) < 2:
        scripts = (path / "autoencoder.jit",) if (path / "autoencoder.jit").is_file() else ()
    safetensors = None
    for folder in (path, path / "vae"):
        found = sorted(folder.glob("*.safetensors"))
        if found and (folder / "config.json").is_file():
            plain = [file for file in found if file.name == "diffusion_pytorch_model.safetensors"] or found
            if len(plain) > 1:
                raise ValueError(f"{folder}: holds several weight files, {', '.join(f.name for f in plain)}; leave the one to use")
            safetensors = plain[0]
            break
    if prefer_scripts and scripts:
        return CosmosFiles(path, scripts=scripts)
    if safetensors is not None:
        return CosmosFiles(path, safetensors=safetensors)
    if scripts:
        return CosmosFiles(path, scripts=scripts)
    raise ValueError(
        f"{path}: no weights of the Cosmos tokenizer here; expected config.json with a .safetensors file (also in vae/), or encoder.jit "
        f"with decoder.jit, or autoencoder.jit. Get them once, under the NVIDIA Open Model License, with: "
        f"hf download {REPOSITORIES[0]} --local-dir {path}  (or from {' or '.join(REPOSITORIES[1:])}); without Cosmos, "
        "train the causal tokenizer instead, as configs/vpt_causal.yaml does"
    )


def read_weights(path: Path, checksums: Checksums = "report") -> CosmosWeights:
    """The weights in the folder ``path``, in either layout. Raises ``ValueError`` naming the file for whatever is missing or wrong."""
    files = find_files(path)
    if files.safetensors is not None:
        if checksums == "require":
            raise ValueError(f"{files.safetensors}: no checksum of this file is known; set cosmos_tokenizer.checksums to report")
        return _read_diffusers(files.safetensors)
    check_checksums(files, checksums)
    tensors: dict[str, Tensor] = {}
    for script in files.scripts:
        renamed = diffusers_names(read_torchscript_tensors(script))
        if twice := tensors.keys() & renamed.keys():
            raise ValueError(f"{script}: holds {min(twice)!r}, which {files.scripts[0].name} holds too; these files do not belong together")
        tensors |= renamed
        check_compression(script)
    where = " and ".join(str(script) for script in files.scripts)
    architecture = _architecture_of(tensors, where)
    statistics = read_mean_std(path, architecture["latent_channels"])
    return CosmosWeights(architecture | (statistics or {}), tensors)


def build_network(architecture: dict[str, Any]) -> nn.Module:
    """diffusers' ``AutoencoderKLCosmos`` with random weights, in eval mode.

    Raises ``ValueError`` without diffusers, and for keys that it does not know.
    """
    network = _network_class()
    try:
        return network(**architecture).eval()
    except TypeError as error:
        raise ValueError(f"Cosmos tokenizer: diffusers does not know this architecture ({error}); it takes 0.38 or newer") from error


def load_network(path: Path, checksums: Checksums = "report") -> nn.Module:
    """The network in fp32 on the CPU with the weights in the folder ``path``. Raises ``ValueError`` as ``read_weights`` does."""
    _network_class()  # before some hundred MB are read
    weights = read_weights(path, checksums)
    network = _network_of(weights, path)
    own = network.state_dict()
    unused = _unused_resamplers(weights.tensors.keys() - own.keys())
    tensors = {name: t for name, t in weights.tensors.items() if name not in unused}
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or name not in own:
            lacks = "lacks" if name not in tensors else "has the unknown"
            raise ValueError(f"{path}: {lacks} weight {name!r}; these are not the weights of a Cosmos tokenizer CV8x8x8")
        if own[name].shape != tensors[name].shape or not tensors[name].is_floating_point():
            shapes = f"{tuple(tensors[name].shape)} ({tensors[name].dtype}), CV8x8x8 has {tuple(own[name].shape)}"
            raise ValueError(f"{path}: weight {name!r} has shape {shapes}; these are the weights of another network")
    network.load_state_dict(tensors)
    return network


def _network_of(weights: CosmosWeights, path: Path) -> nn.Module:
    """The network that config.json describes, which comes from elsewhere: it must not ask for more than its weights could fill."""
    numbers = [n for value in weights.architecture.values() for n in (value if isinstance(value, list | tuple) else [value])]
    sizes = [n for n in numbers if type(n) is int]
    num_layers = weights.architecture.get("num_layers")
    try:
        if type(num_layers) is int and num_layers > len(weights.tensors):
            raise ValueError(f"{num_layers} layers, in {len(weights.tensors)} tensors")
        if max(sizes, default=0) > PLAIN_SIZE:
            with torch.device("meta"):  # without content
                hollow = build_network(weights.architecture).state_dict()
            if sum(t.numel() for t in hollow.values()) > 2 * sum(t.numel() for t in weights.tensors.values()):
                raise ValueError("it is larger than its weights")
        return build_network(weights.architecture)
    except Exception as error:  # diffusers checks little of it
        raise ValueError(f"{path}: config.json does not describe a Cosmos tokenizer ({error}); get the files again") from error


def diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """NVIDIA's names to those of diffusers. The constants of the Haar transform are left out: the network has them already."""
    levels = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)

    def renamed(name: str) -> str:
        if m := re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.", name):
            part = {"block": "resnets", "upsample": "upsamplers.0"}[m[2]]
            name = f"decoder.up_blocks.{levels - 1 - int(m[1])}.{part}.{name[m.end() :]}"
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        return name

    return {renamed(name): tensor for name, tensor in tensors.items() if not _CONSTANT.search(name)}


def check_compression(script: Path) -> None:
    """Raise ``ValueError`` if the encoder in ``script`` compresses by other factors than 8 in time and space.

    CV4x8x8 and CV8x16x16 can have tensors of the same names and shapes, and differ in what is done with them: each halving is a
    convolution beside an average pooling, which stand in the archive's code. That is counted, not run. Code without any pooling (not
    written by tracing NVIDIA's modules) cannot be judged; the log warns of it. A file without an encoder passes.
    """
    if script.name == "decoder.jit":
        return
    by_method: dict[str, Counter[tuple[str, ...]]] = {}  # modules that are called twice have forward and forward1
    for method, body in re.findall(r"def (\w+)\((.*?)(?=\n *def |\Z)", read_torchscript_code(script), re.DOTALL):
        by_method.setdefault(method, Counter()).update(match.groups() for match in _POOLING.finditer(body))
    counts = [count for count in by_method.values() if count]
    if not counts:
        _log.warning("%s: its code does not show by how much it compresses; make sure that it is CV8x8x8", script)
    for found in counts:
        if found == _POOLINGS:
            continue
        time, space = 4 * 2 ** found["2", "1", "1"], 4 * 2 ** found["1", "2", "2"]
        raise ValueError(f"{script}: this network compresses {time}x in time and {space}x in space; expected CV8x8x8: {REPOSITORIES[0]}")


def check_checksums(files: CosmosFiles, checksums: Checksums) -> None:
    """Say which of the files are of a release that is known, or with ``require`` raise ``ValueError`` for one that is not."""
    for path in (*files.scripts, files.folder / "mean_std.pt"):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found == KNOWN_MD5[path.name]:
            _log.info("%s: as in %s", path, REPOSITORIES[-1])
        elif checksums == "require":
            raise ValueError(
                f"{path}: its MD5 is {found}; {REPOSITORIES[-1]} has {KNOWN_MD5[path.name]}. Get the file again, or set checksums"
            )
        else:
            _log.warning("%s: MD5 %s, not of a release whose checksums are known", path, found)


def read_mean_std(folder: Path, latent_channels: int) -> dict[str, list[float]] | None:
    """``latents_mean`` and ``latents_std`` of ``mean_std.pt``, channel by channel as diffusers has them.

    None, and a warning in the log, without the file. Raises ``ValueError`` naming the file if it holds something else.
    """
    path = folder / "mean_std.pt"
    if not path.is_file():
        _warn_of_statistics(path)
        return None
    try:
        require_small_archive(path, MAX_STATISTICS_BYTES)
        mean, std = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = mean.float().flatten(), std.float().flatten()
    except Exception as error:  # PyTorch's unpickler raises many kinds for a damaged or a hostile file
        raise ValueError(f"{path}: not readable as a pair of tensors ({type(error).__name__}: {error}); get the file again") from error
    if not len(mean) or len(mean) % latent_channels or mean.shape != std.shape:
        raise ValueError(f"{path}: {len(mean)} means and {len(std)} deviations do not divide into {latent_channels} channels")
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


def latent_statistics(network: Any) -> tuple[Float[Tensor, "2 Z"], Float[Tensor, "2 Z"]]:
    """Mean and standard deviation per channel of a video's first latent frame (row 0) and of the rest (row 1).

    Source: ``latents_mean`` and ``latents_std`` of the network's config, Z channels times some latent positions in time. Position 0
    differs, the others drift by some percent and are averaged. Raises ``ValueError`` if they do not fit the network.
    """
    config = network.config
    pair = []
    for name in ("latents_mean", "latents_std"):
        values = getattr(config, name)
        if values is None or not len(values) or len(values) % config.latent_channels:
            count = "no values" if values is None else f"{len(values)} values"
            raise ValueError(f"Cosmos tokenizer: {name} has {count}; expected some for each of {config.latent_channels} channels")
        table = torch.tensor(values, dtype=torch.float32, device="cpu").reshape(config.latent_channels, -1)
        pair.append(torch.stack([table[:, 0], table[:, min(1, table.shape[1] - 1) :].mean(1)]))
    mean, std = pair
    if not bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError("Cosmos tokenizer: latents_mean and latents_std must be finite, and the deviations positive")
    return mean, std


class ScriptedCosmos(nn.Module):
    """NVIDIA's own TorchScript, run as it is. It is code from elsewhere, in bf16 for CUDA, and cannot stream."""

    def __init__(self, encoder: Callable[[Tensor], Any], decoder: Callable[[Tensor], Any], config: Any) -> None:
        super().__init__()
        self.encoder, self.decoder, self.config = encoder, decoder, config

    def encode(self, pixels: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B Z T Y X"]:
        """``encoder.jit`` returns (latent, (zero, zero)); a bare tensor is taken too."""
        output = self.encoder(pixels)
        return output if isinstance(output, Tensor) else output[0]

    def decode(self, latents: Float[Tensor, "B Z T Y X"]) -> Float[Tensor, "B 3 F H W"]:
        output = self.decoder(latents)
        return output if isinstance(output, Tensor) else output[0]


def load_scripted(path: Path, device: torch.device | str, checksums: Checksums = "report") -> ScriptedCosmos:
    """NVIDIA's ``encoder.jit`` and ``decoder.jit`` as executable TorchScript: only for files that you trust as you trust a program.

    Raises ``ValueError`` if the device is no CUDA device (bf16 TorchScript cannot run elsewhere) or if the files are missing or damaged.
    """
    if torch.device(device).type != "cuda":
        raise ValueError(
            f"cosmos_tokenizer.trust_torchscript: TorchScript runs on CUDA only, the device is {device}; leave it false, then the "
            "weights are read from the same files and run anywhere"
        )
    files = find_files(path, prefer_scripts=True)
    if len(files.scripts) != 2:
        raise ValueError(f"{path}: running TorchScript needs encoder.jit and decoder.jit")
    check_checksums(files, checksums)
    check_compression(files.scripts[0])
    try:
        encoder, decoder = (torch.jit.load(script, map_location=device).eval() for script in files.scripts)
    except RuntimeError as error:
        raise ValueError(f"{path}: encoder.jit or decoder.jit is not TorchScript ({str(error).splitlines()[0]})") from error
    statistics = read_mean_std(path, 16) or _published_statistics()
    config = SimpleNamespace(latent_channels=16, spatial_compression_ratio=8, temporal_compression_ratio=8, **statistics)
    return ScriptedCosmos(encoder, decoder, config)


def _network_class() -> Callable[..., nn.Module]:
    try:
        with torch.device("cpu"):  # it makes tensors when it is imported, for good: not on the meta device of whoever comes first
            from diffusers import AutoencoderKLCosmos  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]
    except ImportError as error:
        raise ValueError(
            f"the Cosmos tokenizer needs diffusers, which is not installed ({error}); install it with: pip install 'dreamer4[cosmos]'"
        ) from error
    return AutoencoderKLCosmos


def _warn_of_statistics(path: Path) -> None:
    _log.warning("%s: no statistics of the latents here; they are normalised with those of %s", path, REPOSITORIES[0])


def _published_statistics() -> dict[str, list[float]]:
    """Those of CV8x8x8-1.0: the defaults of diffusers."""
    defaults = inspect.signature(_network_class()).parameters
    return {name: defaults[name].default for name in ("latents_mean", "latents_std")}


def _unused_resamplers(names: set[str]) -> set[str]:
    """Of ``names``, which CV8x8x8 does not use, those that NVIDIA keeps beside it: resamplers with all of their six tensors. One with fewer
    is at work, in a network that resamples more often."""
    parts: dict[str, set[str]] = {}
    for name in names:
        if match := _RESAMPLER.search(name):
            parts.setdefault(match[1], set()).add(match[2])
    return {f"{place}.{tensor}" for place, tensors in parts.items() if tensors == _RESAMPLER_TENSORS for tensor in tensors}


def _read_diffusers(path: Path) -> CosmosWeights:
    config_path = path.with_name("config.json")
    try:
        config = json.loads(config_path.read_text())
        kind = config.pop("_class_name", None)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{config_path}: not readable as the config of a network ({error}); get the file again") from error
    if kind != "AutoencoderKLCosmos":
        raise ValueError(f"{config_path}: describes a {kind}; expected AutoencoderKLCosmos")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); get the file again") from error
    if config.get("latents_mean", "") is None or config.get("latents_std", "") is None:
        _warn_of_statistics(config_path)
        config = {key: value for key, value in config.items() if key not in ("latents_mean", "latents_std")}  # diffusers has a default
    return CosmosWeights({key: value for key, value in config.items() if not key.startswith("_")}, tensors)


def _architecture_of(tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """The widths, read off the shapes: NVIDIA's files do not state them. All else is as in CV8x8x8, diffusers' default."""

    def blocks(pattern: str) -> int:
        return len({m[1] for name in tensors if (m := re.match(pattern, name))})

    try:
        encoder, decoder = ([tensors[f"{part}.conv_in.conv_s.weight"].shape[0]] for part in ("encoder", "decoder"))
        for level in range(blocks(r"encoder\.down_blocks\.(\d+)\.resnets\.")):
            encoder.append(tensors[f"encoder.down_blocks.{level}.resnets.0.conv1.conv_s.weight"].shape[0])
        for level in range(blocks(r"decoder\.up_blocks\.(\d+)\.resnets\.")):
            decoder.append(tensors[f"decoder.up_blocks.{level}.resnets.0.conv1.conv_s.weight"].shape[0])
        latent_channels = tensors["quant_conv.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise ValueError(f"{where}: lacks the weight {error}; these are not the weights of a Cosmos tokenizer CV8x8x8") from error
    return {
        "encoder_block_out_channels": tuple(encoder),
        "decode_block_out_channels": tuple(reversed(decoder)),
        "latent_channels": latent_channels,
        "num_layers": blocks(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
    }
