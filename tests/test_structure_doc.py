"""docs/structure.md names every source file, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["src/pellucid", "native", "build_backend", "cmake", "benchmarks", "tests"]
SOURCE_SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cmake", ".txt"}


def source_files(root: Path) -> set[str]:
    """Every source file under the documented folders, but those that say it all in their name: tests, empty files."""
    return {
        path.relative_to(root).as_posix()
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.suffix in SOURCE_SUFFIXES
        and not path.name.startswith("test_")
        and path.name != "BUILD_FAILED.txt"
        and path.stat().st_size > 0
    }


def documented_files(text: str) -> list[str]:
    """The files listed: a heading names a folder in backquotes, the bullets under it the files."""
    folder = ""
    files = []
    for line in text.splitlines():
        if heading := re.match(r"#+ .*`(.+)/`", line):
            folder = heading[1]
        elif bullet := re.match(r"- `([^`]+)`: ", line):
            files.append(f"{folder}/{bullet[1]}")
    return files


def check(root: Path) -> None:
    documented = documented_files((root / "docs/structure.md").read_text(encoding="utf-8"))
    assert len(documented) == len(set(documented)), "docs/structure.md names a file twice"
    missing = source_files(root) - set(documented)
    assert not missing, f"not in docs/structure.md: {sorted(missing)}"
    gone = {name for name in documented if not (root / name).is_file()}
    assert not gone, f"in docs/structure.md, but not there: {sorted(gone)}"


def test_every_file_has_its_line() -> None:
    check(ROOT)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("- `a.py`: adds.\n", "not in docs"),
        ("- `a.py`: adds.\n- `b.py`: b.\n- `c.py`: c.\n", "but not there"),
        ("- `a.py`: adds.\n- `b.py`: b.\n- `a.py`: adds.\n", "twice"),
    ],
)
def test_the_check_catches(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "native").mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / "native" / name).write_text("x = 1\n")
    (tmp_path / "docs/structure.md").write_text("## The core: `native/`\n\n" + lines)
    with pytest.raises(AssertionError, match=message):
        check(tmp_path)
