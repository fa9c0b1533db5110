"""load_config and save_config: what loads, and what is refused in which words."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from dreamer.config import DreamerConfig
from dreamer.types import Config
from dreamer.yaml_config import ConfigError, config_keys, load_config, save_config


class Optim(Config):
    learning_rate: float = Field(1e-3, gt=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    warm_up_steps: int = Field(100, ge=0)


class Phase(Config):
    optim: Optim = Optim(warm_up_steps=7)
    steps: int = Field(1000, ge=1)
    is_ema: bool = False
    compute: Literal["fp32", "bf16"] = "fp32"
    widths: tuple[int, ...] = (1, 2)
    limit: int | str | None = None


class Run(Config):
    name: str = "run"
    out: Path = Path("runs")
    phase1: Phase = Phase()
    phase2: Phase | None = None
    scales: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _name_fits(self) -> Run:
        if self.name == "forbidden":
            raise ValueError("name 'forbidden' cannot be used")
        return self


def load(tmp_path: Path, text: str, *overrides: str) -> Run:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(Run, path, overrides)


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what loads ----------------------------------------------------------------------------------------------------------------


def test_nothing_given_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(Run, None) == load(tmp_path, "") == load(tmp_path, "# only a comment\n") == Run()


def test_yaml_then_overrides_later_ones_win(tmp_path: Path) -> None:
    text = "name: a\nphase1:\n  steps: 5\n  optim: {learning_rate: 1e-2, betas: [0.5, 1]}\n"
    run = load(
        tmp_path,
        text,
        "phase1.optim.learning_rate=1e-4",
        "phase1.steps=6",
        "phase1.steps=7",
        "phase1.widths=[3, 4, 5]",
        "phase1.limit=null",
    )
    assert run.name == "a"
    assert run.phase1.optim == Optim(learning_rate=1e-4, betas=(0.5, 1.0), warm_up_steps=7)
    assert (run.phase1.steps, run.phase1.widths, run.phase1.limit) == (7, (3, 4, 5), None)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("1", 1.0), ("+.5", 0.5), ("1.", 1.0), ("1.0e-2", 1e-2)])
def test_how_a_float_can_be_written(text: str, value: float) -> None:
    rate = load_config(Run, None, [f"phase1.optim.learning_rate={text}"]).phase1.optim.learning_rate
    assert rate == value and type(rate) is float


@pytest.mark.parametrize("text", ["yes", "on", "2024-01-01", "1_000", "0b_", "1:30", "2001-99-99", "'3'", '"true"', "1e", "a=b", "0x"])
def test_what_stays_text(text: str) -> None:
    assert load_config(Run, None, [f"name={text}"]).name == text.strip("'\"")


def test_a_section_keeps_what_the_default_around_it_set() -> None:
    assert load_config(Run, None, ["phase1.optim.learning_rate=0.5"]).phase1.optim.warm_up_steps == 7
    assert load_config(Run, None, ["phase2.steps=3"]).phase2 == Phase(steps=3)


def test_a_section_override_merges_with_the_file(tmp_path: Path) -> None:
    phase = load(tmp_path, "phase1:\n  steps: 5\nphase2:\n", "phase1={is_ema: true}", "phase2.steps=4")
    assert phase.phase1 == Phase(steps=5, is_ema=True) and phase.phase2 == Phase(steps=4)


def test_config_keys() -> None:
    keys = config_keys(Run)
    assert keys[:3] == ["name", "out", "phase1"] and "phase2.optim.betas" in keys and len(keys) == len(set(keys)) == 23


# ---- what is refused, and how --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("phase1: {steps: '3'}", 'phase1.steps: got "3", expected a whole number'),
        ("phase1: {steps: true}", "phase1.steps: got true, expected a whole number"),
        ("phase1: {steps: 3.0}", "phase1.steps: got 3.0, expected a whole number"),
        ("phase1: {steps: null}", "phase1.steps: got null, expected a whole number"),
        ("phase1: {steps: 0}", "phase1.steps: got 0, expected greater than or equal to 1"),
        ("phase1: {optim: {learning_rate: 1.5}}", "phase1.optim.learning_rate: got 1.5, expected less than or equal to 1"),
        ("phase1: {optim: {learning_rate: .nan}}", "phase1.optim.learning_rate: got NaN, expected less than or equal to 1"),
        ("phase1: {optim: {learning_rate: 1e-3x}}", 'phase1.optim.learning_rate: got "1e-3x", expected a number'),
        ("phase1: {is_ema: yes}", 'phase1.is_ema: got "yes", expected true or false'),
        ("phase1: {is_ema: 1}", "phase1.is_ema: got 1, expected true or false"),
        ("phase1: {compute: fp8}", "phase1.compute: got \"fp8\", expected 'fp32' or 'bf16'"),
        ("phase1: {widths: 3}", "phase1.widths: got 3, expected a list"),
        ("phase1: {widths: [1, x]}", 'phase1.widths[1]: got "x", expected a whole number'),
        ("phase1: {limit: 1.5}", "phase1.limit: got 1.5, expected a whole number or text"),
        ("phase1: 3", "phase1: got 3, expected a section (key: value)"),
        ("name: 3", "name: got 3, expected text"),
        ("name: forbidden", "the settings: name 'forbidden' cannot be used"),
        ("scales: {a: x}", 'scales.a: got "x", expected a number'),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, text: str, expected: str) -> None:
    assert message(tmp_path, text) == f"{tmp_path / 'config.yaml'}: {expected}"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("phase1.optim.learnign_rate", "phase1.optim.learning_rate"),  # a slip
        ("phase3", "phase"),
        ("learning_rate", "phase1.optim.learning_rate"),  # the right name in the wrong place
        ("phase2.warmup_steps", "phase1.optim.warm_up_steps"),
        ("phase1.zzz", "phase1."),  # nothing like it: still one that exists
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, None, [f"{key}=0.5"])
    start = f"{key}: unknown key, got 0.5, expected one that exists; the nearest is "
    assert str(caught.value).startswith(start + nearest)
    assert str(caught.value).removeprefix(start) in config_keys(Run)


def test_several_problems_come_together_with_their_source(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    found = message(tmp_path, "phase1: {steps: 0}\nnmae: x", "phase1.optim.warm_up_steps=-1")
    assert found == (
        f"{path}: phase1.optim.warm_up_steps: got -1, expected greater than or equal to 0 (on the command line); "
        "phase1.steps: got 0, expected greater than or equal to 1; "
        'nmae: unknown key, got "x", expected one that exists; the nearest is name'
    )


def test_what_the_file_has_by_itself_is_the_files(tmp_path: Path) -> None:
    """A word that repeats a mistake of the file changes nothing; a word that makes another one in its place is to blame."""
    path = tmp_path / "config.yaml"
    assert message(tmp_path, "phase1: {steps: 0}", "phase1.steps=0") == f"{path}: phase1.steps: got 0, expected greater than or equal to 1"
    found = message(tmp_path, "phase1: {steps: 0}", "phase1.steps=-1")
    assert found == "on the command line: phase1.steps: got -1, expected greater than or equal to 1"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: a\nphase1:\n  steps: 3\n  steps: 4\n", ["line 4:", "phase1.steps is given twice"]),
        ("name: a\nname: b\n", ["line 2:", "name is given twice"]),
        ("name: a\nphase1: {steps: 3\n", ["line ", "not valid YAML"]),
        ("name: 'a\n", ["line ", "not valid YAML"]),
        ("a: 1\n b: 2\n", ["line 2:", "not valid YAML"]),
        ("name: &x a\nout: *x\n", ["line 2:", "aliases"]),
        ("name: !!python/object/apply:os.system ['true']\n", ["line 1:", "tags are not supported"]),
        ("name: !!timestamp x\n", ["tags are not supported"]),
        ("? [a]\n: b\n", ["expected text"]),
        ("- a\n- b\n", ["at the top, expected keys and values"]),
        ("just words", ["at the top, expected keys and values"]),
        ("a: 1\n---\nb: 2\n", ["not valid YAML"]),
        ("a: " + "[" * 100 + "]" * 100, ["nested too deeply"]),
        ("a: " + "[" * 5000, ["nested too deeply"]),
        ("phase1: {steps: " + "9" * 5000 + "}", ["phase1.steps is a number of 5000 digits"]),
        ("name: a\x07b", ["not valid YAML"]),
        ("name: '" + "x" * (1 << 20) + "'", ["larger than"]),
    ],
)
def test_text_that_is_no_config(tmp_path: Path, text: str, parts: list[str]) -> None:
    found = message(tmp_path, text)
    assert found.startswith(f"{tmp_path / 'config.yaml'}:")
    assert [p for p in parts if p not in found] == []


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    for path, words in (
        (tmp_path / "none.yaml", "no such config file"),
        (tmp_path, "cannot read"),
        (tmp_path / "latin.yaml", "UTF-8 (byte 9)"),
    ):
        with pytest.raises(ConfigError, match=f"^{path}: ") as caught:
            load_config(Run, path)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("phase1.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("phase1..steps=3", "expected key=value"),
        ("name.x=3", 'override name.x: name is "a", expected a section'),
        ("name=[", "override name: line 1: not valid YAML"),
        ("name=\udc80", "override name: not valid YAML"),
        ("na\nme=3", "unknown key"),
    ],
)
def test_overrides_that_cannot_be_used(tmp_path: Path, override: str, words: str) -> None:
    assert words in message(tmp_path, "name: a", override)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluation.agent.scripted=typo"], "'typo' for environment 'crafter-chop'; expected one of random, scripted, noisy, lazy"),
        (
            ["evaluation.agent.scripted=scripted", "env.name=CartPole-v1"],
            "'scripted' for environment 'CartPole-v1'; expected one of random",
        ),
    ],
)
def test_a_scripted_player_that_the_environment_does_not_have_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluation.agent.scripted: unknown player {said}"):
        load_config(DreamerConfig, None, words)
    load_config(DreamerConfig, None, ["evaluation.agent.scripted=scripted"])
    load_config(DreamerConfig, None, [*words, "env=null", "data.recordings.path=x"])  # nobody plays


# ---- saving --------------------------------------------------------------------------------------------------------------------


def test_saving_writes_every_value_and_replaces_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "config.yaml"
    save_config(Run(name="one"), path)
    assert yaml.safe_load(path.read_text())["phase1"]["optim"]["warm_up_steps"] == 7

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        save_config(Run(name="two"), path)
    assert load_config(Run, path).name == "one"
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "",
        "~",
        "null",
        "true",
        "1",
        "1e-3",
        "0x1",
        ".5",
        ".inf",
        ".nan",
        "yes",
        "2020-01-01",
        "- a",
        "a: b",
        "#",
        "*a",
        "&a",
        "!t",
        "'",
        '"',
        "\n",
        "\x85",
        "\u2028",
        "\0",
        " a ",
        "=",
        "<<",
    ]
)
OPTIMS = st.builds(
    Optim,
    learning_rate=st.floats(0, 1, exclude_min=True),
    betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    warm_up_steps=st.integers(0),
)
PHASES = st.builds(
    Phase,
    optim=OPTIMS,
    steps=st.integers(1),
    is_ema=st.booleans(),
    compute=st.sampled_from(["fp32", "bf16"]),
    widths=st.lists(st.integers(), max_size=3).map(tuple),
    limit=st.none() | st.integers() | TEXTS,
)
RUNS = st.builds(
    Run,
    name=TEXTS.filter(lambda t: t != "forbidden"),
    out=TEXTS.map(Path),
    phase1=PHASES,
    phase2=st.none() | PHASES,
    scales=st.dictionaries(TEXTS, st.floats(allow_nan=False), max_size=3),
)


@settings(max_examples=50)
@given(RUNS)
def test_what_is_saved_loads_as_an_equal_object(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save_config(run, path)
    assert load_config(Run, path) == run
    assert load_config(Run, path, [f"phase1.steps={run.phase1.steps}"]) == run


# ---- whatever is given, it loads or it is a ConfigError ------------------------------------------------------------------------

KEYS = st.sampled_from([key.rpartition(".")[2] for key in config_keys(Run)]) | TEXTS
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


def loads_or_refuses(path: Path, overrides: list[str]) -> None:
    try:
        run = load_config(Run, path, overrides)
    except ConfigError as error:
        assert str(error).isprintable()
    else:
        assert isinstance(run, Run)


@given(st.dictionaries(KEYS, VALUES, max_size=5), st.lists(st.tuples(st.lists(KEYS, max_size=3).map(".".join), VALUES), max_size=2))
def test_any_mapping_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any], overrides: list[tuple[str, Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "mapping.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")
    loads_or_refuses(path, [f"{key}={json.dumps(value)}" for key, value in overrides])


@given(
    st.binary(max_size=60)
    | st.text(string.printable + "\x00\x85\u2028\ufeff\ud800", max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass"))
)
@example(b"a: 0b_")
@example(b"a: 2001-99-99")
@example(b"a: !!float x")
@example(b"&a [*a]")
@example(b"? ")
@example(b"%YAML 9.9\n---\n")
@example(b"a: 1e999")
def test_any_bytes_load_or_are_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(raw)
    loads_or_refuses(path, [])
    path.write_bytes(b"")
    loads_or_refuses(path, [raw.decode("utf-8", "surrogateescape"), "name=" + raw.decode("utf-8", "surrogateescape")])
