"""Everything that fuzzing found, replayed; a few mutations of every valid input; and the judge itself, on readers that break each promise.

The fuzzing itself runs by hand: docs/fuzzing.md.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuzz.__main__ import main
from fuzz.contract import Target, Variant, Violation, Workplace
from fuzz.driver import TARGET_NAMES, Result
from fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "fuzz_corpus"
NEEDS = {"minari": "minari", "cosmos": "diffusers"}
NUM_MUTATIONS = 40

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def workplace() -> Iterator[Callable[[str], Workplace]]:
    made: dict[str, Workplace] = {}

    def make(name: str) -> Workplace:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            pytest.skip(f"needs the package {NEEDS[name]}")
        if name not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, of TorchScript
                made[name] = Workplace(TARGETS[name])  # reads every seed
        return made[name]

    yield make
    for place in made.values():
        place.close()


def test_every_target_has_a_harness() -> None:
    assert tuple(TARGETS) == TARGET_NAMES
    assert {folder.name for folder in CORPUS.iterdir()} <= set(TARGET_NAMES)


@pytest.mark.parametrize("kept", sorted(f for f in CORPUS.rglob("*") if f.is_file()), ids=lambda f: str(f.relative_to(CORPUS)))
def test_what_was_found_stays_mended(workplace: Callable[[str], Workplace], kept: Path) -> None:
    target, variant, _ = kept.relative_to(CORPUS).parts
    workplace(target).replay(variant, kept.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_mutations_keep_the_promise(workplace: Callable[[str], Workplace], name: str) -> None:
    place, rng = workplace(name), np.random.default_rng(0)
    seeds = place.seeds() + [bytes([i]) + rng.bytes(40) for i in range(len(place.variants))]
    outcomes = set()
    for _ in range(NUM_MUTATIONS):
        data = bytearray(seeds[rng.integers(len(seeds))])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(1, len(data))] = rng.integers(256)
        outcomes.add(place.run(bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)))
    assert outcomes - {"value"}, "no mutation was refused: is the changed file read at all?"


def test_the_commands_of_the_page_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the fuzzing itself, which needs atheris and minutes."""
    asked: list[Any] = []

    def fuzz_target(name: str, seconds: int, seed: int, work: Path, command: str) -> Result:
        asked.append((name, seconds))
        return Result(name, command=command)

    monkeypatch.setattr("fuzz.__main__.fuzz_target", fuzz_target)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python -m fuzz (.+)$", (CORPUS.parents[1] / "docs" / "fuzzing.md").read_text(), re.MULTILINE)
    assert [main(shlex.split(command)) for command in commands] == [0, 0]
    assert asked == [("npy", 600), *((name, 600) for name in TARGET_NAMES)]
    assert len(list((tmp_path / "results" / "fuzz").iterdir())) == len(TARGET_NAMES)
    with pytest.raises(SystemExit):
        main(["nothing"])


# ---- the judge ------------------------------------------------------------------------------------------------------------------


def judged(read: Callable[[Path], Any], content: bytes = b"x", **options: Any) -> str:
    """What the judge says of a reader that is given ``content`` in the place of ``fine``."""

    def prepare(folder: Path) -> None:
        (folder / "file").write_bytes(b"fine")

    def read_all(folder: Path) -> Any:
        return None if (folder / "file").read_bytes() == b"fine" else read(folder)

    place = Workplace(Target("made", prepare, lambda _: [Variant("file", lambda data: {"file": data}, [b"fine"])], read_all, **options))
    try:
        return place.run(b"\0" + content)
    finally:
        place.close()


def raises(error: Exception) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        raise error

    return read


def refuses(folder: Path) -> None:
    raise ValueError(f"{folder / 'file'}: is not fine")


class Shell:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_values_and_clear_errors_are_fine() -> None:
    assert judged(lambda folder: 3) == "value"
    assert "is not fine" in judged(refuses)
    assert judged(raises(ValueError("no file here")), names_files=False) == "no file here"


@pytest.mark.parametrize(
    ("read", "key"),
    [
        (raises(KeyError("x")), "KeyError"),
        (raises(RecursionError("x")), "RecursionError"),
        (raises(MemoryError()), "MemoryError"),
        (raises(ValueError("it went wrong")), "unclear"),  # names no file
        (raises(OSError()), "unclear"),
        (raises(ValueError("x" * 5000)), "unclear"),
        (lambda folder: os.system("true"), "event os.system"),
        (lambda folder: eval("1 + 1"), "event exec"),
        (lambda folder: pickle.loads(pickle.dumps(Shell())), "event pickle.find_class"),
        (lambda folder: bytearray(700 << 20).__setitem__(slice(None, None, 4096), b"x" * (700 << 8)), "memory"),
    ],
)
def test_broken_promises_are_found(read: Callable[[Path], Any], key: str) -> None:
    if key == "memory":
        assert len(b"x" * (900 << 20)) == 900 << 20  # what the process took once hides nothing
    with pytest.raises(Violation) as broken:
        judged(read)
    assert broken.value.key.startswith(key)


def test_a_reader_that_takes_too_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.contract.MAX_SECONDS", 0.05)
    with pytest.raises(Violation, match="promised at most"):
        judged(lambda folder: sum(range(10_000_000)))


def test_files_are_put_back(tmp_path: Path) -> None:
    place = Workplace(TARGETS["episodes"])
    before = {file: file.read_bytes() for file in place.folder.iterdir()}
    place.run(b"\1{}")
    assert {file: file.read_bytes() for file in place.folder.iterdir()} == before
    place.close()
