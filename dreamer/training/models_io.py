"""Models from checkpoints: ``model.json`` says how to build them, ``model.safetensors`` holds the weights."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import pydantic
import torch
from torch import nn

from dreamer.data.files import read_json
from dreamer.models import Agent, AgentConfig, CausalTokenizer, CausalTokenizerConfig, CosmosTokenizerConfig, CosmosTokenizerWrapper
from dreamer.models.cosmos_weights import ScriptedCosmos, build_network
from dreamer.training.checkpoint import find_checkpoint, load_weights, read_manifest, read_tensors
from dreamer.types import ActionSpace, Tokenizer

MAX_UNSEEN_BYTES = 1 << 29  # of a model that is built before its sizes are compared with the weights
ModuleT = TypeVar("ModuleT", bound=nn.Module)
_NO_MODEL = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    OverflowError,
    ZeroDivisionError,
)
AnyTokenizer: TypeAlias = CausalTokenizer | CosmosTokenizerWrapper  # what TOKENIZERS names


def _describe_causal(tokenizer: CausalTokenizer) -> dict[str, Any]:
    return {"config": tokenizer.config.model_dump(mode="json"), "frame_shape": list(tokenizer.frame_shape)}


def _build_causal(info: dict[str, Any]) -> CausalTokenizer:
    channels, height, width = info["frame_shape"]
    return CausalTokenizer(CausalTokenizerConfig.model_validate(info["config"]), (channels, height, width))


def _describe_cosmos(tokenizer: CosmosTokenizerWrapper) -> dict[str, Any]:
    if isinstance(tokenizer.network, ScriptedCosmos):
        raise ValueError(
            "cosmos_tokenizer.trust_torchscript: a checkpoint holds weights, no programs; leave it false, then the weights are read from "
            "the same files"
        )
    return {"config": tokenizer.config.model_dump(mode="json"), "architecture": tokenizer.architecture}


def _build_cosmos(info: dict[str, Any]) -> CosmosTokenizerWrapper:
    return CosmosTokenizerWrapper(CosmosTokenizerConfig.model_validate(info["config"]), build_network(info["architecture"]))


class _Kind(NamedTuple):
    cls: type[nn.Module]
    describe: Callable[[Any], dict[str, Any]]  # a tokenizer -> what building it again needs, as JSON values
    build: Callable[[dict[str, Any]], Any]  # and back: a tokenizer without weights


# A new tokenizer needs a line here: ``model.json`` names it under "tokenizer".
TOKENIZERS = {
    "causal": _Kind(CausalTokenizer, _describe_causal, _build_causal),
    "cosmos": _Kind(CosmosTokenizerWrapper, _describe_cosmos, _build_cosmos),
}


def tokenizer_info(tokenizer: Tokenizer) -> dict[str, Any]:
    """What ``load_tokenizer`` needs beside the weights. Raises ``ValueError`` for a tokenizer that is a program (TorchScript)."""
    name, kind = next((name, kind) for name, kind in TOKENIZERS.items() if isinstance(tokenizer, kind.cls))
    return {"kind": "tokenizer", "tokenizer": name, **kind.describe(tokenizer)}


def agent_info(agent: Agent, *, tokenizer_fingerprint: str, phase: str) -> dict[str, Any]:
    """What ``load_agent`` needs beside the weights, and where the agent comes from."""
    dynamics = agent.dynamics
    return {
        "kind": "agent",
        "config": agent.config.model_dump(mode="json"),
        "action_space": agent.action_space.to_json(),
        "token_grid": list(dynamics.token_grid),
        "latent_channels": dynamics.latent_channels,
        "actions_per_step": dynamics.actions_per_step,
        "tokenizer": tokenizer_fingerprint,
        "phase": phase,
    }


def load_tokenizer(path: Path, device: torch.device | str = "cpu") -> AnyTokenizer:
    """The frozen tokenizer in eval mode, of whichever kind, from a checkpoint or the folder of a run.

    Raises ``ValueError`` naming the file if there is none, if it is damaged, or if it holds another kind of model; and without
    diffusers for a Cosmos tokenizer, whose original weights are not needed.
    """
    checkpoint = find_checkpoint(path)
    info = _read_info(checkpoint, "tokenizer")
    tokenizer = _filled(checkpoint, info, lambda: TOKENIZERS[info["tokenizer"]].build(info))
    return tokenizer.to(device).requires_grad_(False).eval()


def load_agent(path: Path, device: torch.device | str = "cpu", expected: AgentConfig | None = None) -> tuple[Agent, dict[str, Any]]:
    """The agent in eval mode and its ``model.json``, from a checkpoint or the folder of a run.

    Raises ``ValueError`` as ``load_tokenizer`` does, and if its config is not the ``expected`` one.
    """
    checkpoint = find_checkpoint(path)
    info = _read_info(checkpoint, "agent")
    try:
        config = AgentConfig.model_validate(info["config"])
        space = ActionSpace.from_json(info["action_space"])
        if not isinstance(info["tokenizer"], str) or not isinstance(info["phase"], str):
            raise TypeError("tokenizer and phase are not text")
    except _NO_MODEL as error:
        raise _damaged(checkpoint, error) from error
    if expected is not None and (difference := settings_difference(config.model_dump(), expected.model_dump())):
        raise ValueError(f"{checkpoint}: was trained with agent.{difference}; use the same config, or another run_dir to start anew")

    def build() -> Agent:
        rows, columns = info["token_grid"]
        sizes = {name: info[name] for name in ("latent_channels", "actions_per_step")}
        return Agent(config, action_space=space, token_grid=(rows, columns), **sizes)

    return _filled(checkpoint, info, build).to(device).eval(), info


def weights_fingerprint(path: Path) -> str:
    """SHA-256 of the weights of a checkpoint, or of the newest of a run."""
    return read_manifest(find_checkpoint(path))["files"]["model.safetensors"]["sha256"]


def _filled(checkpoint: Path, info: dict[str, Any], build: Callable[[], ModuleT]) -> ModuleT:
    """What ``build`` makes of ``info``, with the weights of the checkpoint.

    One that may be large is built without content first: sizes that the weights do not have must not ask for memory, nor for ever.
    """
    file = checkpoint / "model.safetensors"
    tensors = read_tensors(file)
    try:
        if (num := _largest(info, "num_layers")) > len(tensors):
            raise ValueError(f"{num} layers, in {len(tensors)} tensors")
        if 16 * (side := _largest(info)) ** 3 + 64 * (num + 4) * side**2 > MAX_UNSEEN_BYTES:
            with torch.device("meta"), warnings.catch_warnings():  # the first use takes seconds: it imports PyTorch's compiler
                warnings.simplefilter("ignore")  # that nothing is copied
                load_weights(build(), tensors, file)
        model = build()
    except _NO_MODEL as error:
        # what is not installed, and weights of other shapes, are told already
        if isinstance(error.__cause__, ImportError) or str(file) in str(error):
            raise
        raise _damaged(checkpoint, error) from error
    load_weights(model, tensors, file)
    return model


def _largest(value: Any, name: str | None = None) -> int:
    """The largest whole number in ``model.json``, or of those with a name: no side of a tensor is longer, but for products of three."""
    if isinstance(value, dict):
        return max((_largest(v, name) for k, v in value.items() if name is None or k == name or isinstance(v, dict)), default=0)
    if isinstance(value, list):
        return max((_largest(v, name) for v in value), default=0)
    if type(value) is int:
        return value
    try:
        return int(float(value))  # 5.0 and "5" are sizes as well, where the config says int
    except OverflowError:
        return sys.maxsize
    except (TypeError, ValueError):
        return 0


def _read_info(checkpoint: Path, kind: str) -> dict[str, Any]:
    info = read_json(checkpoint / "model.json")
    if info.get("kind") != kind:
        raise ValueError(f"{checkpoint / 'model.json'}: holds the model kind {info.get('kind')!r}; expected {kind!r}")
    return info


def _damaged(checkpoint: Path, error: Exception) -> ValueError:
    what = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else f"{type(error).__name__}: {error}"
    return ValueError(f"{checkpoint / 'model.json'}: does not describe a model ({what.splitlines()[0][:300]}); use an earlier checkpoint")


def settings_difference(saved: dict[str, Any], now: dict[str, Any], prefix: str = "", ignored: Collection[str] = ()) -> str:
    """The first setting that differs, in words; empty if none does. ``ignored``: names that may differ, in any section."""
    for key in sorted((saved.keys() | now.keys()) - set(ignored)):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if found := settings_difference(old, new, f"{prefix}{key}.", ignored):
                return found
        elif old != new:
            return f"{prefix}{key}={old!r}, this config says {new!r}"
    return ""
