import json
from pathlib import Path

import pytest

from pellucid.cli.main import main
from pellucid.weights import catalog


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path))
    return tmp_path


def put_in_cache(entry: catalog.CatalogEntry) -> Path:
    path = catalog.cached_path(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(entry.size)  # sparse
    return path


def test_models_says_what_is_cached(capsys: pytest.CaptureFixture[str]) -> None:
    put_in_cache(catalog.entries()[0])
    assert main(["models"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "size", "license", "cached", "description"]
    assert len(rows) == len(catalog.entries())
    assert rows[0].startswith("smollm2-135m-instruct (default)  98.4 MB")
    assert [" yes " in row for row in rows] == [True] + [False] * (len(rows) - 1)


def test_models_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in models] == [entry.name for entry in catalog.entries()]
    assert not any(model["cached"] for model in models)
    assert all(len(model["sha256"]) == 64 for model in models)


def test_pull_says_where_it_is_and_its_license(capsys: pytest.CaptureFixture[str]) -> None:
    path = put_in_cache(catalog.entries()[0])
    assert main(["pull"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == f"{path} (98.4 MB)"
    assert "Apache-2.0" in captured.out
    assert captured.err == ""


def test_pull_of_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "smollm2-135m"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Did you mean smollm2-135m-instruct" in captured.err
