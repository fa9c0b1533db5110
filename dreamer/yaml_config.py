"""YAML and command-line overrides to a typed config, and back.

``load_config`` works for every subclass of ``dreamer.types.Config``. YAML is read as the YAML 1.2 core schema: ``1e-3`` is a
number, ``yes`` and ``on`` are text. Anchors, tags and repeated keys are errors. Types are strict: ``"3"`` is not an int, ``true``
is not an int, ``3`` is a float. Every problem ends in one ``ConfigError`` that names the dotted key.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml
from pydantic_core import PydanticUndefined, to_jsonable_python

from dreamer.evaluation.media import write_atomic
from dreamer.types import Config

ConfigT = TypeVar("ConfigT", bound=Config)

MAX_BYTES = 1 << 20  # a larger file is not a config
MAX_DEPTH = 32


class ConfigError(ValueError):
    """A config that cannot be used. The message is one line: every problem with its full dotted key, joined by ``; ``."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


def load_config(cls: type[ConfigT], path: Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """A ``cls`` from a YAML file (None: defaults only) and overrides such as ``phase1.train.batch_size=8``.

    Override values are YAML too (``null``, ``[1, 2]``); later ones win, sections merge key by key.
    Raises ``ConfigError`` for a file that is missing, unreadable or not YAML, and for unknown keys, wrong types, values out of range.
    """
    data = {} if path is None else _read_mapping(path)
    for text in overrides:
        _apply_override(data, text)
    config, problems = _validated(cls, data)
    if config is not None:
        return config
    if path is None:
        raise ConfigError("; ".join(problems))
    _, of_file = _validated(cls, _read_mapping(path))  # what the file has by itself; all else comes from the overrides
    if not set(problems) & set(of_file):
        raise ConfigError("on the command line: " + "; ".join(problems))
    texts = [problem if problem in of_file else f"{problem} (on the command line)" for problem in problems]
    raise ConfigError(f"{path}: " + "; ".join(texts))


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """``key=value`` words, the values in YAML, as a dictionary. Raises ``ConfigError`` for anything else."""
    options: dict[str, Any] = {}
    for word in words:
        _apply_override(options, word)
    return options


def config_text(config: Config) -> str:
    """Every value of ``config``, defaults included, as YAML that ``load_config`` reads back to an equal object."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=1 << 20)


def save_config(config: Config, path: Path) -> None:
    """Write ``config_text``, whole or not at all."""
    write_atomic(path, config_text(config).encode())


def config_keys(cls: type[Config]) -> list[str]:
    """Every dotted key of ``cls``, sections before what they hold."""
    return [key for key, _ in _walk_keys(cls, "", ())]


# ---- YAML to plain values -----------------------------------------------------------------------------------------------------

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {"": None, "~": None} | {
    form: value
    for word, value in {
        "null": None,
        "true": True,
        "false": False,
        ".inf": float("inf"),
        "+.inf": float("inf"),
        "-.inf": -float("inf"),
    }.items()
    for form in (word, word.capitalize(), word.upper())
}
_NAN = (".nan", ".NaN", ".NAN")


class _Composer(yaml.BaseLoader):
    """Builds nodes only: nothing in a config file is ever constructed by a tag. Aliases are refused: they can grow without bound."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that ``_scalar`` would read as something else."""

    def represent_text(self, data: str) -> yaml.ScalarNode:
        is_plain = _scalar(data) == data
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if is_plain else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise ConfigError(f"{path}: cannot read the config file: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; expected a config file")
    value = _parse(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: got {_shown(value)} at the top, expected keys and values (key: value)")
    return value


def _parse(text: str, where: str) -> Any:
    """YAML text to dicts with text keys, lists and scalars. ``where`` begins the error message."""
    try:
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _plain(node, "", 0)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}:" if mark is not None else ""
        raise ConfigError(f"{where}:{line} not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply; at most {MAX_DEPTH} levels") from None


def _refuse(problem: str, at: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _plain(node: yaml.Node, key: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise _refuse(f"nested too deeply; at most {MAX_DEPTH} levels", node)
    if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise _refuse(f"{key or 'the file'} has the tag {node.tag}; tags are not supported", node)
    if isinstance(node, yaml.ScalarNode):
        try:
            return _scalar(node.value) if node.style is None else node.value
        except ValueError:
            raise _refuse(f"{key or 'the value'} is a number of {len(node.value)} digits", node) from None
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{key}[{i}]", depth + 1) for i, item in enumerate(node.value)]
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _refuse(f"a key of {key or 'the file'} is a list or a mapping; expected text", key_node)
        name = key_node.value
        full = f"{key}.{name}" if key else name
        if name in mapping:
            raise _refuse(f"{full} is given twice", key_node)
        mapping[name] = _plain(value_node, full, depth + 1)
    return mapping


def _scalar(text: str) -> Any:
    """An unquoted YAML 1.2 scalar. Raises ``ValueError`` for an int with too many digits for Python."""
    if text in _WORDS:
        return _WORDS[text]
    if text in _NAN:
        return float("nan")
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text) if _FLOAT.fullmatch(text) else text


def _apply_override(data: dict[str, Any], text: str) -> None:
    """Put ``a.b=value`` into ``data``."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    *parents, name = key.split(".")
    if not equals or not all((*parents, name)):
        raise ConfigError(f"override {text!r}: expected key=value with a dotted key, for example phase1.train.batch_size=8")
    section = data
    for i, part in enumerate(parents):
        if section.get(part) is None:  # not there, or `part:` with nothing below it
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise ConfigError(f"override {key}: {'.'.join(parents[: i + 1])} is {_shown(section)}, expected a section (key: value)")
    section.update(_merge(section, {name: _parse(value_text, f"override {key}")}))


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _validated(cls: type[ConfigT], data: dict[str, Any]) -> tuple[ConfigT | None, list[str]]:
    """The config and no problems, or None and the problems."""
    merged = _with_defaults(cls, data)
    try:
        return cls.model_validate_json(json.dumps(merged), strict=True), []
    except pydantic.ValidationError as error:
        return None, _problems(cls, merged, error)


def _with_defaults(cls: type[Config], data: dict[str, Any], base: Config | None = None) -> dict[str, Any]:
    """``data`` completed by the defaults as plain values; ``base``, the default of the field that holds this section, comes first.

    For ``tokenizer: TokenizerConfig = TokenizerConfig(width=64)``, setting ``tokenizer.depth`` must not put width back to the
    default of its class. A section that may be one of several classes is left alone: its default may be of another class.
    Plain values, because strict JSON validation would refuse a default ``Path``.
    """
    merged = dict(data)
    for name, info in cls.model_fields.items():
        default = getattr(base, name) if base is not None else info.get_default(call_default_factory=True, validated_data={})
        value, sections = data.get(name), _sections(info.annotation)
        if name not in data:
            if default is not PydanticUndefined:
                merged[name] = to_jsonable_python(default)
        elif isinstance(value, dict) and len(sections) == 1 and info.annotation in (sections[0], sections[0] | None):
            merged[name] = _with_defaults(sections[0], value, default if isinstance(default, Config) else None)
    return merged


# ---- problems, in words -------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid list": "a list",
    "a valid array": "a list",
    "a valid tuple": "a list",
    "a valid dictionary": "a section (key: value)",
    "an object": "a section (key: value)",
}


def _problems(cls: type[Config], data: dict[str, Any], error: pydantic.ValidationError) -> list[str]:
    """What is wrong, key by key in the order of the errors. Several expectations of one key (a union) become one."""
    expected: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False):
        kind, message = item["type"], item["msg"]
        key, value = _locate(item["loc"], data, item["input"])
        if kind == "extra_forbidden":
            problems[key] = f"{key}: unknown key, got {_shown(value)}, expected one that exists; the nearest is {_nearest(cls, key)}"
        elif kind == "missing":
            problems[key] = f"{key}: missing, expected a value"
        elif message.startswith("Input should be "):
            words = message.removeprefix("Input should be ")
            expected.setdefault(key, []).append(_EXPECTED.get(words, words))
            got[key] = _shown(value)
            problems[key] = f"{key}: got {got[key]}, expected {' or '.join(dict.fromkeys(expected[key]))}"
        else:
            words = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
            problems[key] = f"{key}: {words}" if isinstance(value, dict) else f"{key}: got {_shown(value)}: {words}"
    return list(problems.values())


def _locate(loc: tuple[int | str, ...], data: Any, value: Any) -> tuple[str, Any]:
    """Pydantic's location as a dotted key (it mixes in names of union members, which are no keys), and the value there."""
    key = ""
    node = data
    for i, part in enumerate(loc):
        if isinstance(node, dict) and part in node:
            node = node[part]
            key = f"{key}.{part}" if key else str(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part] if part < len(node) else value
            key = f"{key}[{part}]"
        elif isinstance(node, dict) and i == len(loc) - 1 and part != "[key]":
            key = f"{key}.{part}" if key else str(part)
    return key or "the settings", value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a section (key: value)"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(cls: type[Config], key: str) -> str:
    """The valid dotted key that was probably meant: a sibling with a like name, else the same name elsewhere, else the likest of all."""
    parent, _, name = re.sub(r"\[\d+\]", "", key).rpartition(".")
    keys = config_keys(cls)
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == parent}
    everywhere: dict[str, str] = {}
    for k in keys:
        everywhere.setdefault(k.rpartition(".")[2], k)
    for names, cutoff in ((siblings, 0.6), (everywhere, 0.8), (siblings or everywhere, 0.0)):
        if found := difflib.get_close_matches(name[:100], names, n=1, cutoff=cutoff):
            return names[found[0]]
    return "none: there are no keys here"


def _walk_keys(cls: type[Config], prefix: str, above: tuple[type, ...]) -> Iterable[tuple[str, type[Config]]]:
    for name, info in cls.model_fields.items():
        key = f"{prefix}{name}"
        yield key, cls
        for section in _sections(info.annotation):
            if section not in (*above, cls):  # a config that holds itself has no end
                yield from _walk_keys(section, f"{key}.", (*above, cls))


def _sections(annotation: Any) -> list[type[Config]]:
    """The Config classes inside an annotation: ``X``, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
