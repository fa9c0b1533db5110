"""``dreamer runs``: what is listed of each run, what differs, and the curves of seeds taken together."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamer.cli import main
from dreamer.config import DreamerConfig
from dreamer.pipeline.run import write_json
from dreamer.pipeline.runs import compare, write_comparison
from dreamer.training.checkpoint import save_checkpoint
from dreamer.yaml_config import save_config


def make_run(path: Path, curve: dict[int, Any] | None = None, **settings: Any) -> Path:
    """A run that has logged ``flow_loss`` of phase 1 at some steps."""
    save_config(DreamerConfig.model_validate({"run_dir": path, **settings}), path / "config.yaml")
    (path / "phase1").mkdir()
    lines = [json.dumps({"step": step, "flow_loss": value}) + "\n" for step, value in (curve or {}).items()]
    (path / "phase1" / "metrics.jsonl").write_text("".join(lines))
    stage = {"seconds": 90.0, "peak_memory_mb": 500.0, "command": "dreamer train phase1"}
    made = {"command": "dreamer demo", "hardware": {"CPU": "2 cores"}, "revisions": ["0123456789+changes"], "stages": {"phase1": stage}}
    write_json(path / "evaluation" / "run.json", made)
    return path


def checkpoint(run: Path, phase: str, step: int, planned: int) -> None:
    state = {"settings": {phase: {"train": {"steps": planned}}}, "seed": 0, "num_skipped": 0}
    tensors = {"w": torch.zeros(1)}
    save_checkpoint(run / phase, step, model_tensors=tensors, model_info={}, train_tensors=tensors, state=state, keep_last=1)


def test_what_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_run(tmp_path / "deep" / "a", seed=1)
    second = make_run(tmp_path / "b", seed=2, phase1={"train": {"batch_size": 3}}, report={"title": "another"})
    checkpoint(first, "phase1", 40, 100)
    checkpoint(second, "phase1", 100, 100)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "config.yaml").write_text("{}\n")  # settings that nothing was made with
    assert main(["runs", str(tmp_path)]) == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        ["run", "seed", "phase1", "time", "device", "revision"],
        [str(second), "2", "100", "1 min 30 s", "2 cores", "0123456+"],
        [str(first), "1", "40 of 100", "1 min 30 s", "2 cores", "0123456+"],
    ]
    default = DreamerConfig().phase1.train.batch_size
    assert lines[4:] == [["setting", str(second), str(first)], ["seed", "2", "1"], ["phase1.train.batch_size", "3", str(default)]]


def test_the_fullest_run_says_the_order_of_the_columns(tmp_path: Path) -> None:
    make_run(tmp_path / "a")  # has no checkpoint yet
    checkpoint(make_run(tmp_path / "b"), "phase1", 100, 100)
    told = json.loads((tmp_path / "a" / "evaluation" / "run.json").read_text())
    write_json(tmp_path / "a" / "evaluation" / "run.json", told | {"revisions": [None, "abcdefgh"], "stages": {}})
    comparison = compare([tmp_path])
    assert comparison.titles == ["seed", "phase1", "time", "device", "revision"]
    assert comparison.entries[0].columns == {"seed": "0", "phase1": "begun", "device": "2 cores", "revision": "abcdefg"}


def test_a_damaged_run_is_listed_with_its_problem(tmp_path: Path) -> None:
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    (bad / "config.yaml").write_text("seeed: 1\n")
    text = compare([tmp_path]).text()
    assert f"{bad}: " in text and "seeed" in text and str(good) in text


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    for run in (good, bad):
        checkpoint(run, "phase1", 1, 1)
    real = Path.open

    def fails(path: Path, *args: Any, **options: Any) -> Any:  # the rights of files mean nothing to root
        if bad in path.parents and path.name == "manifest.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", fails)
    text = compare([tmp_path]).text()
    assert f"{bad}: " in text and "Permission denied" in text and str(good) in text


def test_seeds_of_one_kind_are_one_curve_with_a_band(tmp_path: Path) -> None:
    for seed, curve in enumerate([{10: 1.0, 20: 4.0, 30: 9.0}, {10: 3.0, 20: 8.0, 40: 1.0}]):
        make_run(tmp_path / "kind" / f"seed_{seed}", curve, seed=seed, threads=1 + seed)
    make_run(tmp_path / "other", {10: 2.0, 20: float("nan"), 30: 5.0}, phase1={"train": {"batch_size": 3}})
    comparison = compare([tmp_path])
    page = write_comparison(comparison, tmp_path / "runs.html", "dreamer runs").read_text()
    # means of steps 10 and 20; NaN cannot be drawn
    assert f"{tmp_path / 'kind'}: 2 seeds from 2 to 6; {tmp_path / 'other'} from 2 to 5." in page
    assert page.count('class="band') == 1 and "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["/no/such"], "/no/such: is not a folder"), ([str(tmp_path)], "no runs here; a run is a folder with config.yaml")):
        assert main(["runs", *words]) == 2 and said in capsys.readouterr().err
    for size in range(1, 7):
        make_run(tmp_path / f"r{size}", {1: 1.0}, phase1={"train": {"batch_size": size}})
    assert main(["runs", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert "6 kinds of runs (seeds aside); expected at most 5" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
