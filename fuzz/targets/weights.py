"""Checkpoints, and the weights of Cosmos in both layouts."""

from __future__ import annotations

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from dreamer.models import Agent, AgentConfig, CausalTokenizer, CausalTokenizerConfig
from dreamer.models.cosmos_torchscript import read_torchscript_code, read_torchscript_tensors
from dreamer.models.cosmos_weights import build_network, check_compression, load_network, read_mean_std
from dreamer.training.checkpoint import find_checkpoint, planned_steps, read_state, read_tensors, save_checkpoint
from dreamer.training.distributed import Ranks
from dreamer.training.logging import RunLogger
from dreamer.training.loop import TrainConfig, Trainer
from dreamer.training.models_io import agent_info, load_agent, load_tokenizer, tokenizer_info
from dreamer.training.phase3 import ImaginationConfig, Phase3
from dreamer.training.sharded_state import piece_name, read_pieces, saved_shapes
from dreamer.types import Trajectory
from fuzz import made
from fuzz.contract import Target, Variant

SMALL = {"width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "time_every": 1, "context_length": 4, "mlp_ratio": 1}


def whole(place: str) -> Callable[[bytes], Mapping[str, bytes]]:
    return lambda data: {place: data}


def values(place: str, valid: bytes) -> Variant:
    """A JSON file with some values replaced."""
    change = made.changed_json(json.loads(valid))
    return Variant(f"{place} values", lambda data: {place: change(data)}, [])


def tensors(place: str, valid: bytes) -> list[Variant]:
    """A safetensors file: as it is, and its header alone."""
    header, payload = made.safetensors_parts(valid)
    change = made.changed_json(json.loads(header))
    return [
        Variant(place, whole(place), [valid]),
        Variant(f"{place} header", lambda data: {place: made.safetensors_of(data, payload)}, [header]),
        Variant(f"{place} header values", lambda data: {place: made.safetensors_of(change(data), payload)}, []),
    ]


# ---- checkpoints


def _checkpoints(folder: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        torch.arange(2)  # imports PyTorch's compiler, which no input should
    sides = {"patch_size": 4, "token_grid": (1, 1), "latent_channels": 2, "encoder": SMALL, "decoder": SMALL}
    tokenizer = CausalTokenizer(CausalTokenizerConfig.model_validate(sides), (3, 8, 8))
    agent = _agent()
    about = {"t": (tokenizer, tokenizer_info(tokenizer)), "a": (agent, agent_info(agent, tokenizer_fingerprint="abc", phase="phase2"))}
    for name, (model, info) in about.items():
        state = {"settings": {"phase2": {"train": {"steps": 5}}}, "seed": 0, "num_skipped": 0}
        weights, train = dict(model.state_dict()), {"x": torch.zeros(2)}
        save_checkpoint(folder / name, 1, model_tensors=weights, model_info=info, train_tensors=train, state=state)
    _training(folder)


def _agent() -> Agent:
    dynamics = {"transformer": SMALL, "num_registers": 1, "max_steps": 4}
    heads = {"hidden": 4, "num_distances": 1, "num_bins": 3, "bin_range": 3.0}
    config = AgentConfig.model_validate({"dynamics": dynamics, "heads": heads})
    return Agent(config, action_space=made.SPACE, token_grid=(1, 1), latent_channels=2, actions_per_step=1)


def _checkpoint_variants(folder: Path) -> Sequence[Variant]:
    found: list[Variant] = []
    for name in ("t", "a"):
        at = find_checkpoint(folder / name)
        place = str(at.relative_to(folder))
        info = (at / "model.json").read_bytes()
        found += [Variant(f"{name} model.json", whole(f"{place}/model.json"), [info]), values(f"{place}/model.json", info)]
        found += tensors(f"{place}/model.safetensors", (at / "model.safetensors").read_bytes())
    state = (at / "state.json").read_bytes()
    found += [Variant("state.json", whole(f"{place}/state.json"), [state]), values(f"{place}/state.json", state)]
    found += tensors(f"{place}/train_state.safetensors", (at / "train_state.safetensors").read_bytes())
    manifest = (at / "manifest.json").read_bytes()
    bare = [Variant("manifest.json", whole(f"{place}/manifest.json"), [manifest]), values(f"{place}/manifest.json", manifest)]
    return [Variant(variant.name, sealed(folder, variant.files), variant.seeds) for variant in found] + bare + _training_variants(folder)


def sealed(folder: Path, files: Callable[[bytes], Mapping[str, bytes]]) -> Callable[[bytes], Mapping[str, bytes]]:
    """With sizes and hashes in manifest.json, where a checkpoint has one, that fit the changed file."""

    def changed(data: bytes) -> Mapping[str, bytes]:
        found = dict(files(data))
        for place, content in files(data).items():
            manifest = (folder / place).with_name("manifest.json")
            if manifest.is_file():
                told = json.loads(manifest.read_text())
                told["files"][Path(place).name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                found[str(manifest.relative_to(folder))] = json.dumps(told).encode()
        return found

    return changed


def _read_checkpoints(folder: Path) -> Any:
    at = find_checkpoint(folder / "a")
    state = read_state(at), planned_steps(at, "phase2"), read_tensors(at / "train_state.safetensors")
    return state, load_tokenizer(folder / "t"), load_agent(folder / "a")


# ---- training that goes on


class _Learning(Phase3):
    """From a dream that nobody dreamed; with ``value_only_steps`` the policy has no moments yet."""

    def forward(self, batch: Any, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        columns = made.SPACE.num_columns
        shapes = {"features": (2, 3, 8), "actions": (2, 2, 1, columns), "rewards": (2, 2), "continues": (2, 2), "latents": (2, 3, 1, 2)}
        dream = {name: torch.ones(shape) for name, shape in shapes.items()} | {"has_ended": torch.zeros(2, dtype=torch.bool)}
        self.trajectory = Trajectory(**dream)
        return self.score(self.trajectory, with_policy=step >= self.config.value_only_steps)


class _Nothing:
    def to(self, device: Any) -> _Nothing:
        return self


def _trainer(folder: Path) -> Trainer:
    imagination = {"rollout": {"horizon": 2, "context": 1}, "value_only_steps": 2, "updates_per_rollout": 5}
    train = {"steps": 9, "keep_best": {"metric": "val"}}
    phase, config = _Learning(_agent(), ImaginationConfig.model_validate(imagination)), TrainConfig.model_validate(train)
    return Trainer(phase, config, folder / "p", seed=0, settings={"phase3": {"train": train}}, model_info={})


def _training(folder: Path) -> None:
    trainer = _trainer(folder)
    trainer.train_step([_Nothing()])
    trainer.step, trainer.best = 1, {"step": 1, "metric": "val", "better": "lower", "value": 0.5}
    trainer._unfinished = {"loss": 1.0}
    trainer.save()
    (folder / "p" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')


def _training_variants(folder: Path) -> list[Variant]:
    at = find_checkpoint(folder / "p")
    place = str(at.relative_to(folder))
    state, rows = (at / "state.json").read_bytes(), (folder / "p" / "metrics.jsonl").read_bytes()
    best = (at.parent / "best.json").read_bytes()
    found = [Variant("resume state.json", whole(f"{place}/state.json"), [state]), values(f"{place}/state.json", state)]
    found += tensors(f"{place}/train_state.safetensors", (at / "train_state.safetensors").read_bytes())
    found += [Variant("resume best.json", whole("p/checkpoints/best.json"), [best])]
    found += [Variant("resume metrics.jsonl", whole("p/metrics.jsonl"), [rows])]
    return [Variant(variant.name, sealed(folder, variant.files), variant.seeds, _resume) for variant in found]


def _resume(folder: Path) -> Any:
    """As training that goes on does, up to its first step."""
    trainer = _trainer(folder)
    console = Console(file=io.StringIO())
    RunLogger(folder / "p", "p", total_steps=9, resume_step=trainer.step, tensorboard=False, console=console).close()
    return trainer.step, trainer.best, trainer.ema


# ---- training state in pieces

PREFIX, INFO = "x.", "DCP_SHARDING_INFO"
PIECES = [piece_name(Ranks(rank, 2)) for rank in range(2)]


def _pieces(folder: Path) -> None:
    for number, (name, rows) in enumerate(zip(PIECES, (3, 2), strict=True)):
        tensors = {f"{PREFIX}w": torch.zeros(rows, 2)} | ({f"{PREFIX}step": torch.zeros(())} if number else {})
        info = {key: {"saved_offsets": [3 * number] + [0] * (tensor.ndim - 1) if tensor.ndim else []} for key, tensor in tensors.items()}
        save_file(tensors, folder / name, {"format": "pt", INFO: json.dumps(info)})
    _read_pieces(folder)  # PyTorch's planner imports much, which no input should


def _piece_variants(folder: Path) -> Sequence[Variant]:
    found: list[Variant] = []
    for name in PIECES:
        valid = (folder / name).read_bytes()
        header, payload = made.safetensors_parts(valid)
        layout = json.loads(header)
        info = layout["__metadata__"][INFO].encode()
        with_info = _with_info(name, layout, payload)
        change = made.changed_json(json.loads(info))
        found += tensors(name, valid)
        found.append(Variant(f"{name} offsets", with_info, [info]))
        found.append(Variant(f"{name} offsets values", lambda data, change=change, put=with_info: put(change(data)), []))
    return found


def _with_info(name: str, layout: dict[str, Any], payload: bytes) -> Callable[[bytes], Mapping[str, bytes]]:
    """A piece that says this of the places of its tensors."""

    def changed(data: bytes) -> Mapping[str, bytes]:
        told = layout["__metadata__"] | {INFO: data.decode("utf-8", "replace")}
        return {name: made.safetensors_of(json.dumps(layout | {"__metadata__": told}).encode(), payload)}

    return changed


def _read_pieces(folder: Path) -> Any:
    """As training that resumes does: room of the shapes that are told, then what is in it."""
    targets = {name: torch.zeros_like(t, device="cpu") for name, t in saved_shapes(folder, (PREFIX,)).items()}
    read_pieces(folder, targets)
    return targets


# ---- NVIDIA's TorchScript


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(2, 2))
        self.register_buffer("_arange", torch.arange(2))
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * 2


def _archive(folder: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(nn.Sequential(OrderedDict(encoder=_Layers())).eval(), torch.zeros(1, 1, 2, 2))
        torch.jit.save(traced, folder / "encoder.jit")
    torch.save((torch.zeros(16), torch.ones(16)), folder / "mean_std.pt")


def _archive_variants(folder: Path) -> Sequence[Variant]:
    archive, statistics = (folder / "encoder.jit").read_bytes(), (folder / "mean_std.pt").read_bytes()
    entries, pair = made.unzipped(archive), made.unzipped(statistics)
    pickled, code = "encoder/data.pkl", next(name for name in entries if name.endswith(".py"))

    def with_pickle(data: bytes) -> Mapping[str, bytes]:
        return {"encoder.jit": made.zipped({**entries, pickled: data})}

    def with_code(data: bytes) -> Mapping[str, bytes]:
        return {"encoder.jit": made.zipped({**entries, code: data})}

    def with_pair(data: bytes) -> Mapping[str, bytes]:
        return {"mean_std.pt": made.zipped({**pair, "mean_std/data.pkl": data})}

    return [
        Variant("archive", whole("encoder.jit"), [archive]),
        Variant("pickle", with_pickle, [entries[pickled]]),
        Variant("code", with_code, [entries[code]]),
        Variant("mean_std", whole("mean_std.pt"), [statistics]),
        Variant("mean_std pickle", with_pair, [pair["mean_std/data.pkl"]]),
    ]


def _read_archive(folder: Path) -> Any:
    script = folder / "encoder.jit"
    found = read_torchscript_tensors(script), read_torchscript_code(script)
    check_compression(script)
    return found, read_mean_std(folder, 16)


# ---- diffusers' layout


def _cosmos(folder: Path) -> None:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (4, 4, 4, 4), "decode_block_out_channels": (4, 4, 4, 4), "num_layers": 1}
    network: Any = build_network(widths)
    network.save_pretrained(folder / "vae")


def _cosmos_variants(folder: Path) -> Sequence[Variant]:
    config = (folder / "vae" / "config.json").read_bytes()
    weights = "vae/diffusion_pytorch_model.safetensors"
    content = (folder / weights).read_bytes()
    header, payload = made.safetensors_parts(content)
    change = made.changed_json(json.loads(header))
    return [
        Variant("config", whole("vae/config.json"), [config]),
        values("vae/config.json", config),
        Variant("header", lambda data: {weights: made.safetensors_of(data, payload)}, [header]),
        Variant("header values", lambda data: {weights: made.safetensors_of(change(data), payload)}, []),
    ]


TARGETS = [
    Target("checkpoint", _checkpoints, _checkpoint_variants, _read_checkpoints),
    Target("pieces", _pieces, _piece_variants, _read_pieces),
    Target("torchscript", _archive, _archive_variants, _read_archive),
    Target("cosmos", _cosmos, _cosmos_variants, load_network, max_bytes=1 << 15),
]
