from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pellucid import ModelFileError
from pellucid.weights import file_hash as module
from pellucid.weights.file_hash import file_hash


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_UNSETTLED_NS", 0)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights" * 1000)
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read in full, by name."""
    names: list[str] = []
    file_digest = hashlib.file_digest

    def watched(file, algorithm):  # type: ignore[no-untyped-def]
        names.append(Path(file.name).name)
        return file_digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", watched)
    return names


def test_a_file_is_read_once(model: Path, hashed: list[str]) -> None:
    wanted = hashlib.sha256(model.read_bytes()).hexdigest()
    assert [file_hash(model, model.stat()) for _ in range(3)] == [wanted] * 3
    assert hashed == ["model.gguf"]
    moved = model.rename(model.with_name("other.gguf"))
    assert file_hash(moved, moved.stat()) == wanted


def test_a_change_is_seen_though_size_and_time_stay(model: Path, hashed: list[str]) -> None:
    before = model.stat()
    first = file_hash(model, before)
    with model.open("r+b") as file:
        file.write(b"W")
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ModelFileError, match="changed"):
        file_hash(model, before)
    assert file_hash(model, model.stat()) != first
    assert len(hashed) == 2


def test_another_file_in_its_place_is_refused(model: Path) -> None:
    before = model.stat()
    other = model.with_name("other")
    other.write_bytes(model.read_bytes())
    os.replace(other, model)
    with pytest.raises(ModelFileError, match=r"model\.gguf has been changed"):
        file_hash(model, before)
    model.unlink()
    with pytest.raises(ModelFileError, match="taken away"):
        file_hash(model, before)


def test_a_file_that_changes_meanwhile_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file_digest = hashlib.file_digest

    def slow(file, algorithm):  # type: ignore[no-untyped-def]
        digest = file_digest(file, algorithm)
        os.utime(model, ns=(1, 1))
        return digest

    monkeypatch.setattr(hashlib, "file_digest", slow)
    with pytest.raises(ModelFileError, match="changed"):
        file_hash(model, model.stat())


def test_a_file_just_written_is_not_remembered(model: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UNSETTLED_NS", 10**15)
    file_hash(model, model.stat())
    file_hash(model, model.stat())
    assert len(hashed) == 2


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"file": 1}', b"[" * 100_000, b"\xff"])
def test_a_damaged_record_is_no_record(model: Path, hashed: list[str], record: bytes) -> None:
    wanted = file_hash(model, model.stat())
    (path,) = (model.parent / "cache" / "hashes").iterdir()
    path.write_bytes(record)
    assert file_hash(model, model.stat()) == wanted
    assert len(hashed) == 2


def test_where_nothing_can_be_kept_it_is_computed_each_time(
    model: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PELLUCID_CACHE", str(model))  # not a folder
    assert file_hash(model, model.stat()) == file_hash(model, model.stat())
    assert len(hashed) == 2


def test_mutant_a_record_that_only_knows_the_size_is_caught(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_identity", lambda status: [status.st_ino, status.st_size])
    before = file_hash(model, model.stat())
    model.write_bytes(model.read_bytes()[::-1])
    assert file_hash(model, model.stat()) == before
