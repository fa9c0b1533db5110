"""Models from checkpoints: the same outputs come back; another kind, another config and damage are named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamer.models import Agent, CausalTokenizer
from dreamer.pipeline import STAGES, Run
from dreamer.training.checkpoint import save_checkpoint
from dreamer.training.models_io import agent_info, load_agent, load_tokenizer, tokenizer_info, weights_fingerprint
from dreamer.types import ActionComponent, ActionSpace


def save(path: Path, model: torch.nn.Module, info: dict[str, Any]) -> Path:
    return save_checkpoint(path, 1, model_tensors=model.state_dict(), model_info=info, train_tensors={"x": torch.zeros(1)}, state={})


@pytest.fixture
def tokenizer(make_run: Callable[..., Run], tmp_path: Path) -> CausalTokenizer:
    torch.manual_seed(1)
    made = CausalTokenizer(make_run(tmp_path).config.tokenizer, (3, 16, 16))
    made.fit_normalization([torch.randint(0, 256, (4, 1, 3, 16, 16), dtype=torch.uint8)])
    return made


@pytest.fixture
def agent(make_run: Callable[..., Run], tmp_path: Path) -> Agent:
    space = ActionSpace((ActionComponent("keys", "binary", 2, labels=("a", "b")), ActionComponent("aim", "continuous", 1, -2.0, 2.0)))
    return Agent(make_run(tmp_path).config.agent, action_space=space, token_grid=(2, 2), latent_channels=4, actions_per_step=3)


def test_a_tokenizer_comes_back_frozen_with_its_normalisation(tokenizer: CausalTokenizer, tmp_path: Path) -> None:
    loaded = load_tokenizer(save(tmp_path, tokenizer, tokenizer_info(tokenizer)))
    assert loaded.fingerprint() == tokenizer.fingerprint()
    frames = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(loaded.encode(frames), tokenizer.encode(frames))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_an_agent_comes_back(agent: Agent, tmp_path: Path) -> None:
    save(tmp_path, agent, agent_info(agent, tokenizer_fingerprint="abc", phase="phase2"))
    loaded, info = load_agent(tmp_path, expected=agent.config)
    assert (info["tokenizer"], info["phase"], loaded.action_space) == ("abc", "phase2", agent.action_space)
    assert all(torch.equal(a, b) for a, b in zip(agent.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_another_kind_is_refused(tokenizer: CausalTokenizer, agent: Agent, tmp_path: Path) -> None:
    save(tmp_path / "t", tokenizer, tokenizer_info(tokenizer))
    save(tmp_path / "a", agent, agent_info(agent, tokenizer_fingerprint="abc", phase="phase2"))
    with pytest.raises(ValueError, match="holds the model kind 'tokenizer'; expected 'agent'"):
        load_agent(tmp_path / "t")
    with pytest.raises(ValueError, match="holds the model kind 'agent'; expected 'tokenizer'"):
        load_tokenizer(tmp_path / "a")


def test_another_config_is_refused_by_its_key(agent: Agent, tmp_path: Path) -> None:
    save(tmp_path, agent, agent_info(agent, tokenizer_fingerprint="abc", phase="phase2"))
    other = agent.config.model_copy(update={"heads": agent.config.heads.model_copy(update={"hidden": 99})})
    with pytest.raises(ValueError, match=re.escape("agent.heads.hidden=16, this config says 99")):
        load_agent(tmp_path, expected=other)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"dynamics": {"transformer": {"width": "wide"}}}},
        {"config": {"unknown": 1}},
        {"token_grid": [2]},
        {"action_space": [{"name": "x", "kind": "telepathy", "size": 1}]},
        {"latent_channels": None},
        {"tokenizer": 3},
    ],
)
def test_a_damaged_description_is_named(agent: Agent, tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(tmp_path, agent, agent_info(agent, tokenizer_fingerprint="abc", phase="phase2") | change)
    with pytest.raises(ValueError, match="does not describe a model") as caught:
        load_agent(tmp_path)
    assert str(path / "model.json") in str(caught.value)


@pytest.mark.parametrize("change", [{"tokenizer": "magic"}, {"tokenizer": None}, {"frame_shape": [3, 17, 16]}, {"config": {"patch": 4}}])
def test_a_damaged_description_of_a_tokenizer_is_named(tokenizer: CausalTokenizer, tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(tmp_path, tokenizer, tokenizer_info(tokenizer) | change)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path / 'model.json'))}: does not describe a model"):
        load_tokenizer(tmp_path)


def test_missing_keys_and_weights_of_another_size_are_named(agent: Agent, tmp_path: Path) -> None:
    info = agent_info(agent, tokenizer_fingerprint="abc", phase="phase2")
    save(tmp_path / "lacks", agent, {k: v for k, v in info.items() if k != "token_grid"})
    with pytest.raises(ValueError, match="'token_grid'"):
        load_agent(tmp_path / "lacks")
    save(tmp_path / "other", agent, info | {"latent_channels": 5})
    with pytest.raises(ValueError, match="was trained with another config"):
        load_agent(tmp_path / "other")


def test_the_fingerprint_is_of_the_weights(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert STAGES["tokenizer"](run)
    first = weights_fingerprint(run.path / "tokenizer")
    assert first == weights_fingerprint(run.path / "tokenizer" / "checkpoints" / "step_00000007")
    assert first != weights_fingerprint(run.path / "tokenizer" / "checkpoints" / "step_00000006")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("dynamics", "transformer", "width"), 1 << 22),
        (("dynamics", "transformer", "num_layers"), 10**9),
        (("dynamics", "transformer", "num_layers"), 5e15),
        (("dynamics", "transformer", "num_layers"), "5_000_000_000"),
        (("dynamics", "transformer", "num_layers"), "9" * 400),
        (("dynamics", "transformer", "width"), float(1 << 22)),
        (("dynamics", "transformer", "width"), str(1 << 22)),
        (("heads", "hidden"), 10**9),
        (("heads", "num_bins"), 10**9 + 1),
    ],
)
def test_sizes_that_the_weights_do_not_have_ask_for_no_memory(agent: Agent, tmp_path: Path, place: tuple[str, ...], value: Any) -> None:
    """A model.json of a few hundred bytes could ask for terabytes, or for ever."""
    info = agent_info(agent, tokenizer_fingerprint="abc", phase="phase2")
    section = info["config"]
    for name in place[:-1]:
        section = section[name]
    section[place[-1]] = value
    at = save(tmp_path, agent, info)
    with pytest.raises(ValueError, match=re.escape(str(at))):
        load_agent(tmp_path)
