"""Short and long rows: what the config refuses and warns of, and what the loop gets to see."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamer.config import DreamerConfig
from dreamer.pipeline import STAGES, Run, train
from dreamer.training.lengths import SequenceConfig
from dreamer.training.phase1 import Phase1
from dreamer.types import Batch
from dreamer.yaml_config import ConfigError, load_config

CONTEXT = "agent.dynamics.transformer.context_length=12"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["phase1.long_sequence_length=12"], "phase1.long_sequence_length is 12; expected above .*context_length = 12, or null"),
        (["phase2.long_sequence_length=9", "phase2.sequence_length=8"], "phase2.long_sequence_length is 9; expected above"),
        (["phase1.long_sequence_length=16"], "phase1: long_sequence_length is 16; expected above sequence_length = 16"),
        (["phase1.long_every=0"], "phase1.long_every: got 0"),
    ],
)
def test_lengths_that_do_not_fit(overrides: list[str], said: str) -> None:
    small = ["evaluation.world_model.context=4", "phase1.sequence_length=8"]
    words = [CONTEXT, *(small if "expected above sequence_length" not in said else small[:1]), *overrides]
    with pytest.raises(ConfigError, match=said):
        load_config(DreamerConfig, None, words)


def test_rows_may_be_longer_than_the_context() -> None:
    config = load_config(DreamerConfig, None, [CONTEXT, "phase2.sequence_length=40", "phase1.long_sequence_length=17"])
    assert (config.phase2.longest, config.phase1.longest, SequenceConfig().longest) == (40, 17, 16)


def test_unseen_distances_are_said_once(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    short = {"long_sequence_length": None}
    run = make_run(tmp_path, phase1=short, phase2=short)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        train.warn_of_unseen_distances(run)
        train.warn_of_unseen_distances(run)
    (said,) = [str(w.message) for w in caught]
    assert "phase1.sequence_length is 5, phase2.sequence_length is 5, but agent.dynamics.transformer.context_length is 6" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train.warn_of_unseen_distances(make_run(tmp_path))
        train.warn_of_unseen_distances(make_run(tmp_path, phase1=short | {"sequence_length": 6}))


def test_training_sees_many_short_and_a_few_long_rows(
    tmp_path: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    shapes: list[tuple[int, ...]] = []
    forward = Phase1.forward

    def watched(self: Phase1, batch: Batch, step: int, generator: torch.Generator) -> Any:
        if torch.is_grad_enabled():
            shapes.append(tuple(batch.latents.shape[:2]))
        return forward(self, batch, step, generator)

    monkeypatch.setattr(Phase1, "forward", watched)
    for stage in ("tokenizer", "pretokenize", "phase1"):
        STAGES[stage](run)
    assert shapes == [(4, 5), (4, 5), (2, 8), (4, 5), (4, 5), (2, 8), (4, 5)]


def test_a_setting_without_effect_does_not_stop_a_run(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    short = {"long_sequence_length": None, "sequence_length": 6}
    run = make_run(tmp_path, phase1=short)
    for stage in ("tokenizer", "pretokenize", "phase1"):
        STAGES[stage](run)
    assert STAGES["phase1"](make_run(tmp_path, phase1=short | {"long_every": 5})) is False
    with pytest.raises(ValueError, match="was trained with phase1.long_every=None"):
        STAGES["phase1"](make_run(tmp_path, phase1=short | {"long_sequence_length": 9}))
