"""Tables in docs/ that are made from the code: every setting, every file. ``python tests/test_doc_tables.py`` writes them anew."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import textwrap
import tokenize
import typing
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreamer.config import DreamerConfig
from dreamer.types import Config
from dreamer.yaml_config import config_keys, config_text, load_config
from fuzz.targets import TARGETS

ROOT = Path(__file__).parents[1]
BOUNDS = {"Ge": "at least", "Gt": "above", "Le": "at most", "Lt": "below"}  # pydantic's names


def comments_of(cls: type[Config]) -> dict[str, str]:
    """What the comments beside and directly above each field say."""
    source = textwrap.dedent(inspect.getsource(cls))
    by_line = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(StringIO(source).readline) if t.type == tokenize.COMMENT}
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert field.end_lineno is not None
            above = field.lineno - 1
            while lines[above - 1].lstrip().startswith("#"):
                above -= 1
            numbers = [*range(above + 1, field.lineno), *range(field.lineno, field.end_lineno + 1)]
            found[field.target.id] = " ".join(by_line[n] for n in numbers if n in by_line)
    return found


def field_of(key: str) -> tuple[type[Config], Any]:
    """The class that declares the dotted key, and the pydantic field."""
    cls: type[Config] = DreamerConfig
    *parents, name = key.split(".")
    for parent in parents:
        (cls,) = sections(cls.model_fields[parent].annotation)
    owner = next(c for c in cls.__mro__ if name in c.__dict__.get("__annotations__", {}))
    return owner, cls.model_fields[name]


def sections(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [s for part in typing.get_args(annotation) for s in sections(part)]


def settings_table() -> str:
    defaults = yaml.safe_load(config_text(load_config(DreamerConfig)))
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key in config_keys(DreamerConfig):
        owner, field = field_of(key)
        default: Any = defaults
        for part in key.split("."):
            default = default.get(part, ...) if isinstance(default, dict) else ...
        is_section = bool(sections(field.annotation))
        if is_section and isinstance(default, dict):
            continue
        choices = [a for a in typing.get_args(field.annotation) if isinstance(a, str)]
        words = [
            " or ".join(f"`{c}`" for c in choices),
            ", ".join(f"{BOUNDS[kind]} {getattr(m, kind.lower()):g}" for m in field.metadata if (kind := type(m).__name__) in BOUNDS),
            comments_of(owner).get(key.rpartition(".")[2], ""),
        ]
        shown = "" if default is ... else f"`{default if isinstance(default, str) and default else json.dumps(default)}`"
        rows.append(f"| `{key}` | {shown} | {'; '.join(w for w in words if w).replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def files_table() -> str:
    rows = ["| file | what it is |", "|---|---|"]
    for path in sorted((ROOT / "dreamer").rglob("*.py"), key=lambda p: (order_of(p), p)):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if text:
            first = " ".join(text.split("\n\n")[0].split()).replace("``", "`").rstrip(":")
            rows.append(f"| `{path.relative_to(ROOT)}` | {first.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def order_of(path: Path) -> int:
    """The place of a file's room in the README's tree."""
    names = [name.rstrip("/") for name in re.findall(r"^  ([\w.]+/?) ", (ROOT / "README.md").read_text(), flags=re.M)]
    room = path.relative_to(ROOT / "dreamer").parts[0]
    return names.index(room) if room in names else -1


def scale_tables() -> str:
    scale = runpy.run_path(str(ROOT / "benchmarks" / "scale.py"))
    return "\n\n".join(scale[name](scale["Rates"]()) for name in ("rates_table", "plan_table", "days_table"))


def fuzzing_table() -> str:
    rows = ["| target | seconds | of the processor | executions | edges | findings |", "|---|---|---|---|---|---|"]
    for target in TARGETS:
        run = json.loads((ROOT / "results" / "fuzz" / f"{target}.json").read_text())
        cpu = f"{run['cpu_seconds']:.0f}" if run["cpu_seconds"] is not None else "not taken"
        executions = f"{run['executions']:,}".replace(",", " ")
        findings = ", ".join(f"`{finding['key']}`" for finding in run["findings"]) or "none"
        rows.append(f"| `{target}` | {run['seconds']:.0f} | {cpu} | {executions} | {run['edges']} | {findings} |")
    return "\n".join(rows)


GENERATED: dict[tuple[str, str], Callable[[], str]] = {
    ("configuration.md", "keys"): settings_table,
    ("architecture.md", "files"): files_table,
    ("scale.md", "scale"): scale_tables,
    ("fuzzing.md", "fuzzing"): fuzzing_table,
}


def with_table(text: str, name: str, table: str) -> str:
    pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
    assert len(re.findall(pattern, text, flags=re.S)) == 1
    return re.sub(pattern, lambda m: f"{m.group(1)}\n{table}\n\n{m.group(2)}", text, flags=re.S)


@pytest.mark.parametrize(("page", "name"), GENERATED, ids=[name for _, name in GENERATED])
def test_generated_tables_are_current(page: str, name: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert with_table(text, name, GENERATED[page, name]()) == text, f"docs/{page} is out of date; run: python tests/test_doc_tables.py"


def test_the_settings_table_is_complete() -> None:
    table = settings_table()
    assert all(f"| `{key}` |" in table or f"`{key}." in table for key in config_keys(DreamerConfig))
    assert "| `phase3.imagination.pmpo.alpha` | `0.5` | at least 0, at most 1; weight of the good actions" in table


if __name__ == "__main__":
    for (page_name, table_name), make in GENERATED.items():
        file = ROOT / "docs" / page_name
        file.write_text(with_table(file.read_text(), table_name, make()))
        print(f"docs/{page_name}: {table_name} written")
