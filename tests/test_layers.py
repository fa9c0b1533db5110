"""Imports only go down (see LAYERS), siblings do not know each other, and there are no circles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "dreamer"

# Lowest first. A room imports itself and the rows above its own; rooms of one row are siblings. A new room needs a place here.
LAYERS = [
    {"types", "interrupt"},
    {"ops"},
    {"data", "models", "losses", "envs"},
    {"imagination"},
    {"evaluation"},
    {"training"},
    {"utils"},
    {"config", "yaml_config"},
    {"pipeline"},
    {"player"},
    {"cli"},
    {"__main__"},
]
RANKS = {room: rank for rank, row in enumerate(LAYERS) for room in row}


def module_name(path: Path, root: Path) -> str:
    parts = (root.name, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, name: str, is_package: bool, modules: set[str]) -> set[str]:
    """Which of the package's ``modules`` the source of ``name`` imports, also inside functions and under TYPE_CHECKING."""
    top = name.split(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = name.split(".") if is_package else name.split(".")[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in modules else base)
    return {f for f in found if f == top or f.startswith(f"{top}.")}


def import_graph(root: Path) -> dict[str, set[str]]:
    paths = {module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    return {name: imports_of(path.read_text(), name, path.name == "__init__.py", set(paths)) for name, path in paths.items()}


def violations(graph: dict[str, set[str]]) -> list[str]:
    problems = []
    for name, imported in sorted(graph.items()):
        room = name.split(".")[1] if "." in name else None
        if room is not None and room not in RANKS:
            problems.append(f"{name}: the room {room!r} has no layer; give it one in LAYERS in tests/test_layers.py")
            continue
        for other in sorted(imported):
            target = other.split(".")[1] if "." in other else None
            if target is None or target == room:  # the bare package holds only the version
                continue
            if room is None:
                problems.append(f"{name} imports {other}: the package's own __init__ imports nothing")
            elif target not in RANKS:
                problems.append(f"{name} imports {other}: the room {target!r} has no layer")
            elif RANKS[target] == RANKS[room]:
                problems.append(f"{name} imports {other}: siblings never import each other")
            elif RANKS[target] > RANKS[room]:
                problems.append(f"{name} imports {other}: imports only go down")
    return problems


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle per way back that a depth-first walk meets."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_layers_of_the_package() -> None:
    problems = violations(import_graph(ROOT))
    assert not problems, "\n".join(problems)


def test_no_circles_in_the_package() -> None:
    found = circles(import_graph(ROOT))
    assert not found, "\n".join(" -> ".join(c) for c in found)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that keeps the rules."""
    root = tmp_path / "dreamer"
    files = {
        "__init__.py": '__version__ = "1"\n',
        "types.py": "import numpy\n",
        "ops/__init__.py": "",
        "ops/flow.py": "from dreamer.types import Batch\n",
        "data/__init__.py": "from dreamer.data.store import Store\n",
        "data/store.py": "from .. import types\nfrom . import actions\n",
        "data/actions.py": "import dreamer.types\n",
        "models/__init__.py": "",
        "models/heads.py": "from ..ops.flow import x\n",
        "training/__init__.py": "",
        "training/loop.py": "def f():\n    from dreamer.data import Store\n    import dreamer.models.heads\n",
        "cli.py": "from dreamer import training, __version__\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_package_that_keeps_the_rules_passes(package: Path) -> None:
    graph = import_graph(package)
    assert violations(graph) == [] and circles(graph) == []
    assert graph["dreamer.data.store"] == {"dreamer.types", "dreamer.data.actions"}
    assert graph["dreamer.models.heads"] == {"dreamer.ops.flow"}
    assert graph["dreamer.training.loop"] == {"dreamer.data", "dreamer.models.heads"}


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("models/heads.py", "from dreamer.data import Store", "siblings never import each other"),
        ("models/heads.py", "from ..data.store import Store", "siblings never import each other"),
        ("models/heads.py", "from .. import data", "siblings never import each other"),
        ("models/heads.py", "def f():\n    import dreamer.training.loop", "imports only go down"),
        ("types.py", "from .ops import flow", "imports only go down"),
        ("training/loop.py", "from dreamer.cli import main", "imports only go down"),
        ("training/loop.py", "from dreamer import cli", "imports only go down"),
        ("types.py", "if TYPE_CHECKING:\n    from dreamer.models import heads", "imports only go down"),
        ("__init__.py", "from dreamer.types import Batch", "imports nothing"),
        ("attic/junk.py", "import os", "has no layer"),
    ],
)
def test_violations_are_caught(package: Path, file: str, line: str, complaint: str) -> None:
    path = package / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{path.read_text() if path.exists() else ''}{line}\n")
    problems = violations(import_graph(package))
    assert any(complaint in p for p in problems), problems


def test_circles_are_caught(package: Path) -> None:
    (package / "data/actions.py").write_text("from dreamer.data.store import Store\n")
    assert circles(import_graph(package)) == [["dreamer.data.store", "dreamer.data.actions", "dreamer.data.store"]]


def test_a_circle_through_the_rooms_own_init_is_caught(package: Path) -> None:
    (package / "data/actions.py").write_text("from dreamer.data import Store\n")
    assert circles(import_graph(package))
