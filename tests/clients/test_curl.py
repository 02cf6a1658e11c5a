"""The curl commands of the documents, as they stand there: they answer as it says below them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import KEY
from tests.support.server_process import SECONDS, ServerProcess

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"```(?:sh|bash)\n(?P<commands>.*?)```\n(?:\n```(?:json|text)\n(?P<output>.*?)```\n)?", re.DOTALL)
MADE_UP = re.compile(r"^((?:chatcmpl|cmpl|score|msg|call|resp|rs|fc)[-_])[0-9A-Za-z]+$")
"""Ids; times are left out by their name."""
DOCUMENTED_URL = "http://127.0.0.1:8000"


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """The blocks of shell that call curl: line, commands, and the output that stands below, "" for none."""
    for match in BLOCK.finditer(text):
        if re.search(r"^\s*curl\b", match["commands"], re.MULTILINE):
            yield text.count("\n", 0, match.start()) + 1, match["commands"], match["output"] or ""


def check(commands: str, expected: str, server: ServerProcess) -> None:
    """Run commands with `server` for the one that they name; AssertionError where they fail or print something else."""
    home = os.environ["HOME"]
    script = commands.replace(DOCUMENTED_URL, server.url).replace("YOUR_KEY", KEY)
    # A .curlrc would change what it prints.
    wrapped = (
        f'curl() {{ command curl -q --silent --show-error --fail-with-body -H "x-api-key: {KEY}" "$@"; }}\n{script}'
    )
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", wrapped],
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        env={"PATH": os.environ["PATH"], "HOME": home, "NO_PROXY": "127.0.0.1"},
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    if expected:
        assert is_as_documented(expected, done.stdout), f"{commands}\nprints\n{done.stdout}\nand not\n{expected}"


def is_as_documented(expected: str, found: str) -> bool:
    """Whether an output is the documented one. Space between the parts of JSON, and what is new in every answer
    (MADE_UP, times), make no difference; `, ...}` at the end stands for fields that are left out, `...` elsewhere for
    anything."""
    shortened = expected.rstrip().removesuffix(", ...}")
    is_short = shortened != expected.rstrip()
    try:
        wanted, got = json.loads(shortened + "}" if is_short else shortened), json.loads(found)
    except json.JSONDecodeError:
        return re.fullmatch(".*".join(map(re.escape, compact(expected).split("..."))), compact(found)) is not None
    if is_short:
        got = {name: value for name, value in got.items() if name in wanted}
    return bool(without_made_up(wanted) == without_made_up(got))


def compact(text: str) -> str:
    """JSON without the space between its parts."""
    return re.sub(r'("(?:[^"\\]|\\.)*")|\s+', lambda match: match[1] or "", text)


def without_made_up(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_made_up(each) for name, each in value.items() if name not in ("created", "created_at")}
    if isinstance(value, list):
        return [without_made_up(each) for each in value]
    return MADE_UP.sub(r"\1", value) if isinstance(value, str) else value


FOUND = [
    pytest.param(commands, output, id=f"{path.name}:{line}")
    for path in sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
    for line, commands, output in blocks(path.read_text(encoding="utf-8"))
]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(("commands", "output"), FOUND)
def test_the_commands_answer_as_documented(commands: str, output: str, real_server: ServerProcess) -> None:
    check(commands, output, real_server)


def test_there_are_commands() -> None:
    assert FOUND


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    ("commands", "output"),
    [
        ("curl http://127.0.0.1:8000/nowhere\n", ""),
        ("curl http://127.0.0.1:8000/health\n", '{"status":"ill"}\n'),
        ("curl http://127.0.0.1:8000/v1/completions -d '{'\n", ""),
    ],
)
def test_the_check_catches(commands: str, output: str, server: ServerProcess) -> None:
    check("curl http://127.0.0.1:8000/health\n", '{"status":"ok"}\n', server)
    with pytest.raises(AssertionError):
        check(commands, output, server)
