"""The SentencePiece library as oracle: its models from GGUF metadata, and GGUF metadata from its models."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from pellucid.tokenizer.vocabulary import SPACE_SYMBOL, TokenType

_BPE = 2


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _float_field(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def model_proto(metadata: Mapping[str, Any]) -> bytes:
    """A serialized ModelProto (sentencepiece_model.proto) of what a GGUF file says of its vocabulary."""
    tokens, scores, types = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    unknown = metadata["tokenizer.ggml.unknown_token_id"]
    pieces = []
    for token_id, (token, score, kind) in enumerate(zip(tokens, scores, types.tolist(), strict=True)):
        if token_id == unknown:
            kind = TokenType.UNKNOWN  # files call it CONTROL too
        elif kind == TokenType.UNKNOWN:
            kind = TokenType.UNUSED
        elif kind == TokenType.USER_DEFINED:
            token = token.replace(" ", SPACE_SYMBOL)  # files write their spaces plainly
        pieces.append(_field(1, _field(1, token.encode()) + _float_field(2, score) + _field(3, kind)))
    byte_fallback = int(TokenType.BYTE in types)
    trainer = _field(3, _BPE) + _field(35, byte_fallback) + _field(40, unknown)
    normalizer = (
        _field(1, b"identity")
        + _field(3, int(metadata.get("tokenizer.ggml.add_space_prefix", True)))
        + _field(4, int(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)))
        + _field(5, 1)
    )
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def gguf_metadata(processor: Any) -> dict[str, object]:
    """The GGUF metadata of a loaded SentencePiece model."""
    count = processor.get_piece_size()

    def kind(token_id: int) -> TokenType:
        if processor.is_unknown(token_id):
            return TokenType.UNKNOWN
        if processor.is_control(token_id):
            return TokenType.CONTROL
        if processor.is_byte(token_id):
            return TokenType.BYTE
        return TokenType.NORMAL

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(token_id) for token_id in range(count)],
        "tokenizer.ggml.scores": np.array([processor.get_score(i) for i in range(count)], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([kind(token_id) for token_id in range(count)], dtype=np.int32),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    }
