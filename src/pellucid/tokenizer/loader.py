"""A tokenizer from the metadata of a GGUF file.

Keys and token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.tokenizer.added_tokens import AddedToken, AddedTokenMatcher
from pellucid.tokenizer.encoders import ByteLevelEncoder, SentencePieceEncoder, TextEncoder
from pellucid.tokenizer.pre_tokenizers import pre_tokenizer
from pellucid.tokenizer.tokenizer import Tokenizer
from pellucid.tokenizer.vocabulary import SPACE_SYMBOL, TokenType, Vocabulary

_PREFIX = "tokenizer.ggml."

# Files name one or two of the tokens that end generation; a chat model often knows more, by these names.
END_OF_GENERATION = frozenset(
    (
        "</s>",
        "<eos>",
        "[EOS]",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
    )
)


class _Fields:
    """Typed access to metadata. Every method raises ModelFileError naming the field."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata

    def __contains__(self, name: str) -> bool:
        return _PREFIX + name in self._metadata

    def get(self, name: str) -> object:
        return self._metadata.get(_PREFIX + name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            raise self._wrong(name, "a boolean", value)
        return bool(value)

    def token_id(self, name: str, vocab_size: int, default: int | None = None) -> int | None:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self._wrong(name, "a token id", value)
        if not 0 <= value < vocab_size:
            raise ModelFileError(
                f"{_PREFIX + name} is {value}, outside the vocabulary of {vocab_size} tokens", param=_PREFIX + name
            )
        return int(value)

    def strings(self, name: str) -> Sequence[str]:
        value = self.get(name)
        if not isinstance(value, list | tuple) or not set(map(type, value)) <= {str}:
            raise self._wrong(name, "an array of strings", value)
        return value

    def numbers(self, name: str, count: int) -> NDArray[np.generic]:
        value = self.get(name)
        if not isinstance(value, np.ndarray | list | tuple):
            raise self._wrong(name, "an array of numbers", value)
        array = np.asarray(value)
        if array.shape != (count,) or array.dtype.kind not in "iuf":
            raise ModelFileError(
                f"{_PREFIX + name} holds {array.size} values of {array.dtype}; one number for each of the "
                f"{count} tokens is expected",
                param=_PREFIX + name,
            )
        return array

    def _wrong(self, name: str, expected: str, value: object) -> ModelFileError:
        found = "missing" if value is None else f"a {type(value).__name__}"
        return ModelFileError(f"{_PREFIX + name} is {found}; {expected} is expected", param=_PREFIX + name)


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """See `Tokenizer.from_gguf`."""
    fields = _Fields(metadata)
    kind = fields.get("model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"vocabularies of kind {kind!r} (tokenizer.ggml.model) are not supported; supported are 'gpt2' "
            "(byte-level BPE) and 'llama' (SentencePiece BPE)",
            param="tokenizer.ggml.model",
        )
    sentencepiece = kind == "llama"
    tokens = fields.strings("tokens")
    if not tokens:
        raise ModelFileError("tokenizer.ggml.tokens is empty", param="tokenizer.ggml.tokens")
    vocabulary = Vocabulary(
        tokens, _token_types(fields, len(tokens), sentencepiece), "sentencepiece" if sentencepiece else "byte_level"
    )

    def token_id(name: str, default: int | None = None) -> int | None:
        return fields.token_id(f"{name}_token_id", len(tokens), default)

    # SentencePiece trainers number them so, and old files leave them out.
    bos, eos, unknown = (
        token_id(name, default if sentencepiece else None) for name, default in (("bos", 1), ("eos", 2), ("unknown", 0))
    )
    encoder: TextEncoder
    if sentencepiece:
        add_space_prefix = fields.flag("add_space_prefix", True)
        add_bos = True
        encoder = SentencePieceEncoder(
            vocabulary,
            _scores(fields, len(tokens)),
            add_space_prefix=add_space_prefix,
            remove_extra_whitespaces=fields.flag("remove_extra_whitespaces", False),
            unknown_token_id=unknown,
        )
    else:
        add_space_prefix = False
        splitting = pre_tokenizer(fields.get("pre"))
        add_bos = splitting.add_bos
        encoder = ByteLevelEncoder(vocabulary, fields.strings("merges"), splitting)
    return Tokenizer(
        vocabulary,
        encoder,
        _added_tokens(vocabulary, encoder, metadata.get("general.architecture")),
        prefix_ids=_added(fields, "bos", add_bos, bos),
        suffix_ids=_added(fields, "eos", False, eos),
        bos_token_id=bos,
        eos_token_id=eos,
        eos_token_ids=end_of_generation(vocabulary, (eos, token_id("eot"), token_id("eom"))),
        unknown_token_id=unknown,
        padding_token_id=token_id("padding"),
        chat_template=_chat_template(metadata),
        strips_leading_space=add_space_prefix,
    )


def _token_types(fields: _Fields, count: int, required: bool) -> NDArray[np.integer]:
    if "token_type" not in fields and not required:
        return np.full(count, TokenType.NORMAL, dtype=np.int32)
    types = fields.numbers("token_type", count)
    if types.dtype.kind == "f" or not bool(np.isin(types, [0, *TokenType]).all()):
        raise ModelFileError(
            f"tokenizer.ggml.token_type holds values outside 0 to {max(TokenType)}", param="tokenizer.ggml.token_type"
        )
    return np.where(types == 0, TokenType.NORMAL, types).astype(np.int32)  # 0 is "undefined"


def _scores(fields: _Fields, count: int) -> NDArray[np.float32]:
    scores = fields.numbers("scores", count).astype(np.float32)
    if not bool(np.isfinite(scores).all()):
        raise ModelFileError("tokenizer.ggml.scores holds values that are not finite", param="tokenizer.ggml.scores")
    return scores


def _added(fields: _Fields, name: str, default: bool, token_id: int | None) -> list[int]:
    if not fields.flag(f"add_{name}_token", default and token_id is not None):
        return []
    if token_id is None:
        raise ModelFileError(
            f"tokenizer.ggml.add_{name}_token is set, but tokenizer.ggml.{name}_token_id is missing",
            param=f"tokenizer.ggml.{name}_token_id",
        )
    return [token_id]


def _added_tokens(vocabulary: Vocabulary, encoder: TextEncoder, architecture: object) -> AddedTokenMatcher:
    # Phi-3 was trained with its control tokens swallowing the white space after them, which GGUF has no field for.
    swallowing = architecture == "phi3"

    def load(special: bool, *types: TokenType) -> list[AddedToken]:
        return [
            AddedToken(
                token_id,
                encoder.prepare(text),
                special=special,
                rstrip=swallowing and text not in ("<unk>", "<s>", "<|endoftext|>"),
            )
            for token_id in vocabulary.ids_of_type(*types)
            for text in (vocabulary.tokens[token_id],)
        ]

    return AddedTokenMatcher(
        load(False, TokenType.USER_DEFINED),
        lambda: load(True, TokenType.CONTROL, TokenType.UNKNOWN),
        extra_white_space=SPACE_SYMBOL if vocabulary.alphabet == "sentencepiece" else "",
    )


def end_of_generation(vocabulary: Vocabulary, declared: Iterable[int | None]) -> set[int]:
    """Ids that end generation: those declared, and the control tokens known by name."""
    found = {token_id for token_id in declared if token_id is not None}
    controls = {vocabulary.tokens[token_id]: token_id for token_id in vocabulary.ids_of_type(TokenType.CONTROL)}
    named = END_OF_GENERATION & controls.keys()
    if {"<|return|>", "<|call|>"} <= named:  # there <|end|> ends a message, after which the model goes on
        named -= {"<|end|>"}
    return found | {controls[token] for token in named}


def _chat_template(metadata: Mapping[str, object]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(
            f"tokenizer.chat_template is a {type(template).__name__}; text is expected", param="tokenizer.chat_template"
        )
    return template or None
