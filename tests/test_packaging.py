"""What a clone or an install must hold: nothing of the package is ignored by git or left out of the wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
import yaml

import dreamer
from dreamer import cli, types

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_files() -> list[Path]:
    """Every file below dreamer/ that was written by a person, relative to the root."""
    files = [p for p in sorted((ROOT / "dreamer").rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    return [p.relative_to(ROOT) for p in files if not p.name.startswith(".")]


def ignored(gitignore: Path, names: list[str], folder: Path) -> list[str]:
    """Which of ``names`` a .gitignore swallows, in a fresh repository: what is tracked already, or ignored elsewhere, does not matter."""
    folder.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    shutil.copy(gitignore, folder / ".gitignore")
    command = ["git", "-c", "core.excludesFile=/dev/null", "check-ignore", "--stdin"]
    done = subprocess.run(command, input="\n".join(names), capture_output=True, text=True, cwd=folder)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_no_source_file_is_ignored_by_git(tmp_path: Path) -> None:
    rooms = ["models", "data", "runs", "build", "dist", "envs", "data/readers", "player/static", "utils"]
    names = [str(p) for p in package_files()] + [f"dreamer/{room}/new_file.py" for room in rooms]
    names += [str(p.relative_to(ROOT)) for folder in ("tests", "configs", "docs", "results") for p in (ROOT / folder).rglob("*.*")]
    names = [n for n in names if "__pycache__" not in n]
    assert ignored(ROOT / ".gitignore", names, tmp_path / "ours") == []
    predecessor = tmp_path / "predecessor"  # the line that once swallowed the models
    predecessor.write_text("models/\n")
    assert "dreamer/models/new_file.py" in ignored(predecessor, names, tmp_path / "theirs")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_what_tools_write_is_ignored_by_git(tmp_path: Path) -> None:
    names = [".venv/bin/python", "runs/demo/report.html", "dreamer/data/__pycache__/store.pyc", "dreamer4.egg-info/PKG-INFO"]
    names += [".pytest_cache/README.md", ".ruff_cache/x", ".hypothesis/x"]
    assert ignored(ROOT / ".gitignore", names, tmp_path / "ours") == names


def test_every_folder_with_code_is_a_package() -> None:
    folders = {(ROOT / p).parent for p in package_files() if p.suffix == ".py"}
    assert [str(f) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dreamer", source / "dreamer", ignore=shutil.ignore_patterns("__pycache__"))
    probes = ["evaluation/templates/probe.html.j2", "player/static/js/probe.js", "presets/probe.yaml"]  # patterns, whatever there is today
    for probe in probes:
        (source / "dreamer" / probe).parent.mkdir(parents=True, exist_ok=True)
        (source / "dreamer" / probe).write_text("x")
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"dreamer4-{dreamer.__version__}-")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {p.as_posix() for p in package_files()} | {f"dreamer/{probe}" for probe in probes}
    assert sorted(wanted - held) == []


def test_the_settings_of_pretokenize_come_with_the_package() -> None:
    """As a preset, which a wheel holds; the file that people know in configs/ is the same one, so that they cannot drift apart."""
    (preset,) = (ROOT / path for path in package_files() if path.as_posix() == f"dreamer/presets/{cli.MINECRAFT}.yaml")
    assert cli.MINECRAFT in cli.presets() and preset.read_text().startswith("# MineRL through the frozen Cosmos tokenizer")
    assert (ROOT / "configs" / "minerl_cosmos.yaml").read_bytes() == preset.read_bytes()


def test_constraints_pin_every_dependency() -> None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name, maxsplit=1)[0]).lower()

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)  # raises unless each line is name==version
    assert pins["torch"] == "2.13.0"  # no +cpu or +cu: each index offers its own build of it
    extras = PROJECT["project"]["optional-dependencies"]
    (own,) = (need for need in extras["dev"] if plain(need) == PROJECT["project"]["name"])  # dreamer4[...]: extras that tests need too
    inner = [need for name in own.partition("[")[2].rstrip("]").split(",") for need in extras[name]]
    needed = PROJECT["project"]["dependencies"] + [need for need in extras["dev"] if need != own] + inner
    assert {"diffusers", "minari"} <= set(map(plain, needed)) and [n for n in map(plain, needed) if n not in pins] == []


def test_shapes_are_checked_at_run_time_under_pytest() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="frames"):
        types.FrameBatch(torch.zeros(1, 2, 3, 4, 4))  # not uint8
    with pytest.raises(jaxtyping.TypeCheckError, match="rewards"):
        lengths = {"frames": 3, "actions": 3, "action_mask": 3, "rewards": 4, "terminals": 3}
        dtypes = {"frames": np.uint8, "action_mask": np.bool_, "terminals": np.bool_}
        rest = {"frames": (3, 4, 4), "actions": (2,)}
        types.Episode(**{k: np.zeros((n, *rest.get(k, ())), dtypes.get(k, np.float32)) for k, n in lengths.items()})


def test_config_files_are_yaml() -> None:
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
