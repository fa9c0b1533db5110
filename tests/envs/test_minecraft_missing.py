"""What Minecraft's adapters say, in one line, where a package or its Java is missing or wrong. Here they are missing for real."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from dreamer import cli
from dreamer.envs import make_env
from dreamer.envs.minecraft import check_java


def write_java(folder: Path, version: str) -> Path:
    folder.mkdir()
    (folder / "java").write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\n")
    (folder / "java").chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("minerl", "minerl", "pip install minerl==0.4.4"),
        ("MineRLBasaltFindCave-v0", "minerl", "pip install git+https://github.com/minerllabs/minerl"),
        ("minestudio", "minestudio", "pip install 'minestudio"),
    ],
)
def test_a_missing_package_is_named(name: str, package: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=f"the package '{package}' is not installed; expected it and Java 8") as error:
        make_env(name)
    assert command in str(error.value) and "openjdk" in str(error.value) and "\n" not in str(error.value)
    assert cli.main(["record", f"env.name={name}", "env.options={}", "record.players=[{name: random}]", f"run_dir={tmp_path}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and package in said[0] and command in said[0]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "there is no java on the PATH; expected Java 8"),
        ("17.0.15", r"java is Java 17\.0\.15; expected Java 8 \(1\.8\) first"),
        ("", "of no"),
    ],
)
def test_the_wrong_java_is_told(version: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("minerl")  # Java is looked for before it is imported
    package.__spec__ = ModuleSpec("minerl", None)
    monkeypatch.setitem(sys.modules, "minerl", package)
    monkeypatch.setenv("PATH", str(tmp_path / "empty" if version is None else write_java(tmp_path / "other", version)))
    with pytest.raises(ValueError, match=f"'MineRLTreechop-v0': .*{message}.*openjdk") as error:
        make_env("MineRLTreechop-v0")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(shutil.which("java") is None, reason="needs a java")
def test_the_java_of_this_machine() -> None:
    try:
        check_java("here")
    except ValueError as error:
        assert str(shutil.which("java")) in str(error) and "Java 1.8" not in str(error)


def test_a_package_that_cannot_be_imported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{write_java(tmp_path / 'java8', '1.8.0_402')}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "minestudio").mkdir()
    (tmp_path / "minestudio" / "__init__.py").write_text("import numpy\nnumpy.no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "minestudio", raising=False)
    with pytest.raises(
        ValueError, match=r"'minestudio' cannot be imported \(AttributeError: .*no_such_thing.*\); try again with pip"
    ) as error:
        make_env("minestudio")
    assert "\n" not in str(error.value)
