"""Tokenizers that tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from pellucid.tokenizer import Tokenizer
from pellucid.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from pellucid.tokenizer.vocabulary import BYTE_LEVEL_ALPHABET, TokenType
from pellucid.weights import catalog
from pellucid.weights.gguf import GGUFFile

SHARED = Path(os.environ.get("PELLUCID_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
VOCABULARIES = ("gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2")


@cache
def gguf_tokenizer(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file.metadata)


def library_encoder(metadata: Mapping[str, Any]) -> Callable[[str], list[int]]:
    """What the `tokenizers` library makes of text with a byte-level vocabulary; an oracle."""
    pre_tokenizer = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    kinds = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(metadata["tokenizer.ggml.tokens"]))
    tokens = enumerate(metadata["tokenizer.ggml.tokens"])
    library = tokenizers.Tokenizer(
        models.BPE(
            {token: token_id for token_id, token in tokens if kinds[token_id] == TokenType.NORMAL},
            [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
            ignore_merges=pre_tokenizer.ignore_merges,
        )
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre_tokenizer.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )

    def encode(text: str) -> list[int]:
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    return encode


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
