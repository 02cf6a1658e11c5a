from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pellucid.core.errors import DownloadError, ModelNotFoundError, StorageError
from pellucid.weights import cache, catalog, download
from pellucid.weights.catalog import cached_path, entries, is_cached, resolve


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend_cached(monkeypatch) -> Path:
    """Puts an empty file of the right size where the default model belongs."""
    entry = entries()[0]
    path = cached_path(entry)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(entry.size)
    return path


def test_entries_are_whole():
    assert entries()[0].name == catalog.DEFAULT_MODEL
    for entry in entries():
        assert entry.name == entry.name.lower()
        assert entry.file_name.endswith(".gguf")
        assert entry.description
        assert entry.license
        assert entry.license_url.startswith("https://")
        for sha256 in (entry.sha256, *(wheel.sha256 for wheel in entry.wheels)):
            assert re.fullmatch("[0-9a-f]{64}", sha256)
        for wheel in entry.wheels:
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", wheel.requirement)
            assert wheel.requirement in entry.source
        assert entry.download_size > entry.size // 2
    assert len({entry.name for entry in entries()}) == len({entry.file_name for entry in entries()}) == len(entries())


def test_a_cached_model_is_found_by_name_in_any_case(monkeypatch):
    path = pretend_cached(monkeypatch)
    monkeypatch.setattr(download, "pull", lambda *args: pytest.fail("fetched"))
    assert is_cached(entries()[0])
    assert resolve("SmolLM2-135M-Instruct") == path == resolve("smollm2-135m-instruct", download=False)


def test_a_cut_off_file_is_not_cached(monkeypatch):
    with pretend_cached(monkeypatch).open("r+b") as file:
        file.truncate(1000)
    assert not is_cached(entries()[0])


def test_a_missing_model_is_pulled_to_its_place(monkeypatch):
    entry = entries()[1]
    seen: list[tuple] = []
    monkeypatch.setattr(download, "pull", lambda *args: seen.append(args))
    progress = print
    assert resolve(entry.name, progress=progress) == cached_path(entry)
    assert seen == [(cached_path(entry), entry.size, entry.sha256, entry.wheels, progress)]


def test_nothing_is_fetched_where_that_is_not_wanted(monkeypatch):
    monkeypatch.setattr(download, "pull", lambda *args: pytest.fail("fetched"))
    with pytest.raises(ModelNotFoundError, match="pellucid pull gemma-3-270m"):
        resolve("gemma-3-270m", download=False)


def test_a_path_is_taken_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert resolve(str(path)) == path
    monkeypatch.chdir(tmp_path)
    assert resolve("model.gguf") == Path("model.gguf")
    path.rename(tmp_path / "blob")
    assert resolve("blob") == Path("blob")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve("~/blob") == tmp_path / "blob"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing.gguf", "no such file: missing.gguf"),
        ("./folder/missing", "no such file: ./folder/missing"),
        ("org/repo", "no such file: org/repo; for a repository of the Hugging Face hub write hf:org/repo"),
        ("org/repo:file.gguf", "write hf:org/repo:file.gguf"),
        ("smollm2", "Did you mean smollm2-135m-instruct?"),
        ("gemma3-270m", "Did you mean gemma-3-270m?"),
        ("qwxyz", "There are: smollm2-135m-instruct, gemma-3-270m; or give"),
        ("", "no model named ''"),
        ("a\0b", "no model named 'a\\x00b'"),
        ("x" * 5000, "no model named"),
    ],
)
def test_what_does_not_exist_is_told_with_what_does(model, message):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(model)
    assert message in caught.value.message
    assert caught.value.param == "model"


def test_a_folder_lists_the_files_in_it(tmp_path):
    with pytest.raises(ModelNotFoundError, match="in it: none"):
        resolve(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"in it: .*model\.gguf"):
        resolve(str(tmp_path))


def test_cache_folder(monkeypatch, tmp_path):
    assert cache.models_dir() == tmp_path / "cache" / "models"
    monkeypatch.setenv("PELLUCID_CACHE", "relative")
    assert cache.models_dir() == Path.cwd() / "relative" / "models"
    monkeypatch.delenv("PELLUCID_CACHE")
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.models_dir() == tmp_path / "xdg" / "pellucid" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.models_dir() == tmp_path / ".cache" / "pellucid" / "models"
    monkeypatch.setattr(cache.sys, "platform", "darwin")
    assert cache.models_dir() == tmp_path / "Library" / "Caches" / "pellucid" / "models"
    monkeypatch.setattr(cache.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache.models_dir() == tmp_path / "local" / "pellucid" / "cache" / "models"


def test_no_home_folder(monkeypatch):
    def no_home():
        raise RuntimeError

    monkeypatch.delenv("PELLUCID_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(StorageError, match="PELLUCID_CACHE"):
        resolve(catalog.DEFAULT_MODEL)


def test_importing_the_catalog_is_light():
    import subprocess

    code = "import sys, pellucid.weights.catalog; print(*sys.modules)"
    source = str(Path(catalog.__file__).parents[2])
    modules = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": source}, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"numpy", "huggingface_hub", "zipfile", "subprocess"} & set(modules)


@pytest.mark.slow
def test_the_default_model_can_be_pulled(monkeypatch):
    stages: set[str] = set()
    try:
        path = resolve(catalog.DEFAULT_MODEL, progress=lambda stage, done, total: stages.add(stage))
    except DownloadError as error:
        if "offline" in error.message:
            pytest.skip(error.message)
        raise
    assert is_cached(entries()[0])
    assert stages == {"download", "extract"}
    assert [file.name for file in path.parent.iterdir() if not file.name.startswith(".")] == [path.name]


@pytest.mark.slow
def test_a_wrong_promise_of_the_catalog_is_noticed(monkeypatch):
    entry = entries()[0]
    wheel = replace(entry.wheels[0], sha256="0" * 64)
    monkeypatch.setattr(catalog, "_ENTRIES", (replace(entry, wheels=(wheel,)),))
    try:
        with pytest.raises(DownloadError) as caught:
            resolve(entry.name)
    finally:
        assert not is_cached(entry)
    if "offline" in caught.value.message:
        pytest.skip(caught.value.message)
    assert caught.value.code == "integrity_mismatch"
