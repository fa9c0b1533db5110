"""Task numbers that the agent has no embedding for are named before a phase begins."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamer.data import EpisodeStore, EpisodeWriter
from dreamer.pipeline import STAGES, Run


@pytest.mark.parametrize("task", [-1, 1])
def test_unknown_tasks_are_refused(make_run: Callable[..., Run], dots: Path, tmp_path: Path, task: int) -> None:
    episodes = tmp_path / "episodes"
    shutil.copytree(dots, episodes)
    run = make_run(tmp_path / "run", data={"recordings": {"path": episodes}})
    for stage in ("tokenizer", "pretokenize", "phase1", "phase2"):
        assert STAGES[stage](run)
    store = EpisodeStore(episodes)
    with EpisodeWriter(episodes, store.action_space, frames_per_second=store.fps) as writer:
        writer.add(dataclasses.replace(store.episode(0), task=task))
    STAGES["pretokenize"](run)
    for phase in ("phase3", "phase2", "phase1"):
        shutil.rmtree(run.path / phase, ignore_errors=True)
        with pytest.raises(ValueError, match=rf"tasks {min(task, 0)} to {max(task, 0)}; agent\.dynamics\.num_tasks is 1: expected 0 to 0"):
            STAGES[phase](run)
