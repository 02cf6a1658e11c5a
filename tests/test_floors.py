"""Imports inside the package point down (docs/structure.md, Floors), and no two packages import each other."""

from __future__ import annotations

import ast
import graphlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "pellucid"

FLOORS = {
    **dict.fromkeys(["core"], 0),
    **dict.fromkeys(["tokenizer", "models", "quant", "weights", "kvcache", "decoding", "estimate", "client"], 1),
    **dict.fromkeys(["backends"], 2),
    **dict.fromkeys(["engine"], 3),
    **dict.fromkeys(["explain"], 4),
    **dict.fromkeys(["server"], 5),
    **dict.fromkeys(["cli"], 6),
}


def imported_packages(path: Path) -> Iterator[tuple[str, int]]:
    """The packages under `pellucid` that a file imports, at any depth of its code, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{path}:{node.lineno}: relative import")
            names = [node.module] if node.module != "pellucid" else [f"pellucid.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = (name or "").split(".")
            if parts[0] == "pellucid" and len(parts) > 1:
                yield parts[1], node.lineno


def check(package: Path) -> None:
    edges: dict[str, set[str]] = defaultdict(set)
    for path in sorted(package.glob("*/**/*.py")):
        source = path.relative_to(package).parts[0]
        assert source in FLOORS, f"{path}: the package {source} has no floor"
        for target, line in imported_packages(path):
            if target == source or target not in FLOORS:
                continue
            assert FLOORS[target] <= FLOORS[source], f"{path}:{line}: {source} imports {target}, which is above it"
            edges[source].add(target)
    graphlib.TopologicalSorter(edges).prepare()


def test_imports_point_down() -> None:
    check(PACKAGE)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"kvcache/a.py": "def f():\n    from pellucid.engine.llm import LLM\n"}, "kvcache imports engine"),
        ({"core/a.py": "import pellucid.quant.formats\n"}, "core imports quant"),
        ({"core/a.py": "from . import b\n"}, "relative import"),
        ({"novel/a.py": ""}, "no floor"),
        (
            {"quant/a.py": "from pellucid.weights import tensor", "weights/b.py": "from pellucid import quant"},
            "nodes are in a cycle",
        ),
    ],
)
def test_the_check_catches(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises((AssertionError, graphlib.CycleError), match=message):
        check(tmp_path)
