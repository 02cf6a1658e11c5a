"""Tokenizers that tests share."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from pellucid.tokenizer import Tokenizer, byte_pair_encoding
from pellucid.weights import catalog
from pellucid.weights.gguf import GGUFFile

SHARED = Path(os.environ.get("PELLUCID_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
VOCABULARIES = ("gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2")


@cache
def gguf_tokenizer(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file.metadata)


def encode_by_library_only(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    """Makes encoding take the library's encoder, which it else leaves to long pieces, for every piece."""
    monkeypatch.setattr(byte_pair_encoding, "LONG_PIECE", 0)
    tokenizer.prepare_library()
    encoder = tokenizer._encoder._bpe  # type: ignore[attr-defined]
    assert encoder._library is not None
    monkeypatch.setattr(encoder, "_encode_piece", None)


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
