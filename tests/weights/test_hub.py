"""hf: references against a small server that speaks the part of the hub's protocol that is used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from pellucid.core.errors import StorageError
from pellucid.weights import catalog, hub

REPOSITORIES = {
    "org/one": {"model.gguf": b"GGUF one", "README.md": b"text"},
    "org/two": {"a.gguf": b"GGUF a", "sub/b.gguf": b"GGUF b"},
    "org/none": {"README.md": b"text"},
    "org/gated": {"x.gguf": b""},
}
COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            files = REPOSITORIES.get(repo)
            if files is None:
                self.refuse(repo)
            else:
                siblings = [{"rfilename": file} for file in files]
                self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
            return
        repo, file = "/".join(parts[:2]), "/".join(parts[4:])
        content = REPOSITORIES.get(repo, {}).get(file)
        if content is None or repo == "org/gated":
            self.refuse(repo)
        else:
            self.answer(content)

    def refuse(self, repo: str) -> None:
        code = {"org/gated": "GatedRepo"}.get(repo, "EntryNotFound" if repo in REPOSITORIES else "RepoNotFound")
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


RESOLVE_SCRIPT = """
import sys
from pellucid.core.errors import PellucidError
from pellucid.weights.catalog import resolve

for reference in sys.argv[2:]:
    try:
        print(resolve(reference, download=sys.argv[1] == "download").read_bytes().decode())
    except PellucidError as error:
        print(type(error).__name__, error.message.replace("\\n", " "))
"""


def resolve_all(endpoint: str, home: Path, *references: str, download: bool = True) -> list[str]:
    """Runs in a process of its own: huggingface-hub reads its settings when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "PYTHONPATH": str(Path(catalog.__file__).parents[2]),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    mode = "download" if download else "local"
    result = subprocess.run(
        [sys.executable, "-c", RESOLVE_SCRIPT, mode, *references],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_references(endpoint, tmp_path):
    answers = resolve_all(
        endpoint,
        tmp_path,
        "hf:org/one",
        "hf:org/two:sub/b.gguf",
        "hf:org/two",
        "hf:org/none",
        "hf:org/one:other.gguf",
        "hf:org/absent:x.gguf",
        "hf:org/absent",
        "hf:org/gated:x.gguf",
        "hf:org",
        "hf:org/one:README.md",
        "hf:org/..--bad",
    )
    assert answers[:2] == ["GGUF one", "GGUF b"]
    assert answers[2].startswith("ModelNotFoundError hf:org/two holds 2 GGUF files")
    assert "hf:org/two:a.gguf" in answers[2]
    assert answers[3].startswith("ModelNotFoundError hf:org/none holds no .gguf file")
    assert answers[4].startswith("ModelNotFoundError hf:org/one has no file other.gguf; its GGUF files are:")
    assert "hf:org/one:model.gguf" in answers[4]
    assert answers[5].startswith("ModelNotFoundError hf:org/absent:x.gguf: no such repository")
    assert answers[6].startswith("ModelNotFoundError hf:org/absent: no such repository")
    assert answers[7].startswith("DownloadError hf:org/gated:x.gguf: its owner grants access on request")
    assert answers[8].startswith("ModelNotFoundError hf:org is not a reference")
    assert answers[9].startswith("ModelNotFoundError hf:org/one:README.md is not a reference")
    assert answers[10].startswith("ModelNotFoundError hf:org/..--bad")


def test_offline_a_cached_file_is_found_and_another_is_refused(endpoint, tmp_path):
    assert resolve_all(endpoint, tmp_path, "hf:org/one") == ["GGUF one"]
    closed = "http://127.0.0.1:9"
    answers = resolve_all(closed, tmp_path, "hf:org/one:model.gguf", "hf:org/one", "hf:org/two:a.gguf", "hf:org/two")
    assert answers[:2] == ["GGUF one", "GGUF one"]
    for answer, name in zip(answers[2:], ("hf:org/two:a.gguf", "hf:org/two"), strict=True):
        assert answer.startswith(f"DownloadError {name}: the hub cannot be reached")


def test_without_download_the_hub_is_not_asked(endpoint, tmp_path):
    answers = resolve_all(endpoint, tmp_path, "hf:org/one", "hf:org/one:model.gguf", download=False)
    assert answers[0] == "ModelNotFoundError hf:org/one is not on this machine: run `pellucid pull hf:org/one`"
    assert answers[1].startswith("ModelNotFoundError hf:org/one:model.gguf is not on this machine")


def test_a_full_disk(monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub, "_gguf_files", lambda repo: ["model.gguf"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(StorageError, match="is full"):
        catalog.resolve("hf:org/surely-not-cached:model.gguf")
