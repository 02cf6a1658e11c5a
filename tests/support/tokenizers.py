"""Tokenizers that tests share."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pellucid.tokenizer import Tokenizer, byte_pair_encoding
from pellucid.tokenizer.vocabulary import BYTE_LEVEL_ALPHABET, TokenType
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


def byte_level_metadata() -> dict[str, Any]:
    """Of a byte-level vocabulary: every byte, some longer tokens, and three special ones; ends with <|im_end|> and
    <|endoftext|>."""
    merges = ['{ "', '" :', ': "', '" ,', ', "', "t r", "tr u", "tru e", "Ġ t", "a b", "n u", "l l", "nu ll", "1 2"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*BYTE_LEVEL_ALPHABET, *(merge.replace(" ", "") for merge in merges), *special]
    first = len(tokens) - len(special)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [TokenType.NORMAL] * first + [TokenType.CONTROL] * len(special),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": first,
        "tokenizer.ggml.eos_token_id": first + 2,
    }


@cache
def byte_level_tokenizer() -> Tokenizer:
    """The tokenizer of `byte_level_metadata`."""
    return Tokenizer.from_gguf(byte_level_metadata())
