"""A config key that nothing reads is an error: every field of every Config class must be read somewhere in the package."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dreamer"


def _names(node: ast.AST) -> set[str]:
    return {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))}


def unread_keys(sources: dict[str, str]) -> list[str]:
    """``module: Class.field`` for every field of every Config subclass that no source reads as an attribute (``x.field``).

    Reads inside the class itself do not count, unless in a property: a validator that looks at a value does not use it. A field
    that a name elsewhere shares passes, so this finds keys that nothing can possibly read, not every key that is read in vain.
    """
    trees = {module: ast.parse(source) for module, source in sources.items()}
    classes = [(module, node) for module, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    configs, size = {"Config"}, 0
    while len(configs) > size:  # subclasses of subclasses
        size = len(configs)
        configs |= {node.name for _, node in classes if any(_names(base) & configs for base in node.bases)}
    reads: dict[str, list[ast.Attribute]] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads.setdefault(node.attr, []).append(node)
    unread = []
    for module, node in classes:
        if node.name not in configs:
            continue
        properties = [f for f in node.body if isinstance(f, ast.FunctionDef) and any("property" in _names(d) for d in f.decorator_list)]
        own = set(map(id, ast.walk(node))) - {id(part) for f in properties for part in ast.walk(f)}
        for line in node.body:
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name) or "ClassVar" in _names(line.annotation):
                continue
            if all(id(read) in own for read in reads.get(line.target.id, [])):
                unread.append(f"{module}: {node.name}.{line.target.id}")
    return unread


def test_no_config_key_of_the_package_goes_unread() -> None:
    sources = {str(path.relative_to(PACKAGE.parent)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    assert unread_keys(sources) == []


def test_unread_keys_are_found() -> None:
    room = """
class WidthConfig(Config):
    width: int = 3
    depth: int = 4
    forgotten: int = 5
    only_checked: int = 6
    kind: ClassVar[str] = "x"
    written: int = 7
    derived: int = 8

    def check(self):
        return self.only_checked

    @property
    def twice(self):
        return 2 * self.derived

class DeepConfig(types.WidthConfig):
    inner: WidthConfig = WidthConfig()
    lost: int = 1

class NotAConfig(Base):
    ignored: int = 1
"""
    user = "def f(c, d):\n    d.written = 2\n    lost = 1\n    return c.width + c.inner.depth\n"
    assert unread_keys({"room.py": room, "user.py": user}) == [
        "room.py: WidthConfig.forgotten",
        "room.py: WidthConfig.only_checked",
        "room.py: WidthConfig.written",
        "room.py: DeepConfig.lost",
    ]
