"""Tokenizers that tests share."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from pellucid.tokenizer import Tokenizer
from pellucid.weights import catalog
from pellucid.weights.gguf import GGUFFile

SHARED = Path(os.environ.get("PELLUCID_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
VOCABULARIES = ("gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2")


@cache
def gguf_tokenizer(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file.metadata)


def vocabulary_path(name: str) -> Path:
    path = SHARED / "tokenizers" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is not in the shared folder")
    return path


def model_path(name: str) -> Path:
    """The file of a catalog model; skips where it has not been fetched."""
    entry = next(entry for entry in catalog.entries() if entry.name == name)
    if not catalog.is_cached(entry):
        pytest.skip(f"{name} is not in the cache; `pellucid pull {name}` fetches it")
    return catalog.cached_path(entry)
