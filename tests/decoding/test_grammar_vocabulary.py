"""Every kind of vocabulary gives llguidance the bytes that decoding gives."""

from __future__ import annotations

import pytest

from pellucid.decoding.grammar_vocabulary import FORCED_CHARACTERS, _Wrapper, build_vocabulary
from pellucid.tokenizer import Tokenizer
from tests.support.grammars import random_texts
from tests.support.tokenizers import byte_level_tokenizer, gguf_tokenizer, model_path, vocabulary_path

TEXTS = [
    '{"name":"',
    "plain text, with spaces",
    " a leading space",
    "né 日本 😀",
    "\t\n  1.5",
    "<|im_end|>",
    "\x02a",
]


def tokenizers() -> list[str]:
    return ["bytes", "gpt-2", "llama-spm", "llama-bpe", "smollm2-135m-instruct"]


def tokenizer(name: str) -> Tokenizer:
    if name == "bytes":
        return byte_level_tokenizer()
    return gguf_tokenizer(model_path(name) if name.startswith("smollm") else vocabulary_path(name))


@pytest.mark.parametrize("name", tokenizers())
def test_tokens_are_the_bytes_that_decoding_gives(name: str) -> None:
    ours = tokenizer(name)
    vocabulary = build_vocabulary(ours)
    assert vocabulary.vocab_size == ours.vocab_size
    assert set(vocabulary.eos_tokens) == ours.eos_token_ids
    for token_id in range(0, ours.vocab_size, 97):
        if token_id not in ours.special_ids | ours.eos_token_ids:
            assert vocabulary.decode_bytes([token_id]) == ours.token_bytes(token_id)
    assert all(vocabulary.is_special_token(token_id) for token_id in ours.eos_token_ids)


@pytest.mark.parametrize("name", tokenizers())
@pytest.mark.parametrize("text", TEXTS)
def test_forced_text_is_spelled_exactly_or_not_at_all(name: str, text: str) -> None:
    ours = tokenizer(name)
    token_ids = _Wrapper(ours)(text)
    assert b"".join(map(ours.token_bytes, token_ids)) == (text.encode() if token_ids else b"")
    if "\x02" not in text:
        assert token_ids
    assert not ours.special_ids & set(token_ids)


def test_forced_text_is_only_looked_at_as_far_as_is_of_use() -> None:
    wrapper = _Wrapper(byte_level_tokenizer())
    assert len(b"".join(wrapper.tokens[token_id] for token_id in wrapper("ab " * 1000))) == FORCED_CHARACTERS


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "smollm2-135m-instruct"])
def test_answers_of_every_kind_of_vocabulary_follow_their_grammar(name: str) -> None:
    choices = ["yes", " no", '{"name":"née 😀"}', "two  spaces"]
    assert set(random_texts(tokenizer(name), count=40, choice=choices)) == set(choices)
