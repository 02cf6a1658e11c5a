"""The `llm` command, unchanged, with the server among its `extra-openai-models.yaml`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import KEY
from tests.support.server_process import MODEL, SECONDS, ServerProcess

Run = Callable[..., str]


@pytest.fixture
def run(server: ServerProcess, tmp_path: Path) -> Run:
    """Runs `llm` with a folder of its own; the text that it prints."""
    entry = f"- model_id: served\n  model_name: {MODEL}\n  api_base: {server.url}/v1\n  api_key_name: served\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry + "  supports_schema: true\n", encoding="utf-8")
    (tmp_path / "keys.json").write_text(f'{{"served": "{KEY}"}}', encoding="utf-8")

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_stream_is_the_answer(run: Run) -> None:
    options = ("-m", "served", "-o", "seed", "7", "-o", "max_tokens", "24", "-o", "temperature", "1", "--no-log", "Hi")
    whole = run(*options, "--no-stream")
    assert whole.strip()
    assert run(*options) == whole


def test_an_answer_is_held_to_a_schema(run: Run) -> None:
    twice = {"type": "object", "properties": {"twice": {"type": "boolean"}}, "required": ["twice"]}
    schema = json.dumps({**twice, "additionalProperties": False})
    text = run("-m", "served", "--schema", schema, "-o", "max_tokens", "100", "--no-log", "Hi")
    assert text.replace(" ", "").strip() in ('{"twice":true}', '{"twice":false}')
