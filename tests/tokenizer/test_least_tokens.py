"""How few tokens a text may have: never more than it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.core.errors import ContextLengthError
from pellucid.tokenizer import Tokenizer
from pellucid.tokenizer import tokenizer as tokenizer_module
from pellucid.tokenizer.encoders import ByteLevelEncoder
from pellucid.tokenizer.least_tokens import least_tokens, longest_tokens
from tests.support import texts
from tests.support.tokenizers import (
    VOCABULARIES,
    byte_level_metadata,
    byte_level_tokenizer,
    gguf_tokenizer,
    vocabulary_path,
)

MEGABYTE = 1 << 20


def shortest_cover(data: bytes, tokens: list[bytes]) -> float:
    """The fewest tokens that spell `data`, by trying all ways."""
    fewest = [0.0, *[float("inf")] * len(data)]
    for end in range(1, len(data) + 1):
        fewest[end] = 1 + min(fewest[end - len(token)] for token in tokens if data[:end].endswith(token))
    return fewest[-1]


BYTES = st.binary(max_size=12).map(lambda data: bytes(byte % 3 for byte in data))


@given(BYTES, st.lists(BYTES.filter(len), max_size=6), st.integers(0, 12))
def test_never_more_than_the_shortest_spelling(data: bytes, tokens: list[bytes], enough: int) -> None:
    tokens = [*tokens, b"\0", b"\1", b"\2"]
    assert least_tokens(data, longest_tokens(tokens), enough) <= shortest_cover(data, tokens)


def test_how_near_it_comes() -> None:
    longest = longest_tokens([b"a", b"aaaa", b"bb"])
    assert least_tokens(b"a" * 1000, longest, 1000) == 250
    assert least_tokens(b"b" * 1000, longest, 1000) == 500
    assert least_tokens(b"c" * 1000, longest, 1000) == 1000
    assert least_tokens(b"abc", longest, 1000) == 1
    assert least_tokens(b"", longest, 1000) == 0
    assert least_tokens(b"c" * 1000, longest, 9) == 10 + 990 // 4


def check(tokenizer: Tokenizer, count: int = 60) -> None:
    """`max_tokens` at the number of tokens refuses nothing, whatever the text."""
    for text in texts.texts(7, count):
        ids = tokenizer.encode(text)
        assert tokenizer.encode(text, max_tokens=len(ids)) == ids


@pytest.fixture(autouse=True)
def check_short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 1)


@pytest.mark.parametrize("name", ["bytes", *VOCABULARIES])
def test_no_text_that_fits_is_refused(name: str) -> None:
    tokenizer = byte_level_tokenizer() if name == "bytes" else gguf_tokenizer(vocabulary_path(name))
    check(tokenizer)
    for text in (" " * 3000, "\x01" * 3000, "\U000f0000" * 300, "\n" * 3000, "a" * 3000, "字" * 999, "\u2581" * 99):
        ids = tokenizer.encode(text)
        assert tokenizer.encode(text, max_tokens=len(ids)) == ids


def without_some_bytes() -> dict[str, Any]:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [
        token if token not in "xyz" else f"unused {token}" for token in metadata["tokenizer.ggml.tokens"]
    ]
    return metadata


def test_bytes_without_a_token_are_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a mutant which counts them is caught."""
    tokenizer = Tokenizer.from_gguf(without_some_bytes())
    assert tokenizer.encode("xyz" * 1000 + "a", max_tokens=1) == tokenizer.encode("a")
    monkeypatch.setattr(ByteLevelEncoder, "spelled", lambda self, text: text.encode())
    with pytest.raises(ContextLengthError):
        tokenizer.encode("xyz" * 1000 + "a", max_tokens=1)


def test_a_mutant_that_counts_bytes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    check(tokenizer)
    monkeypatch.setattr(tokenizer_module, "least_tokens", lambda data, longest, enough: len(data))
    with pytest.raises(ContextLengthError):
        check(tokenizer)


def as_text(tokenizer: Tokenizer, text: str) -> None:
    tokenizer.encode(text, max_tokens=1023)


def as_chat(tokenizer: Tokenizer, text: str) -> None:
    tokenizer.apply_chat_template([{"role": "user", "content": text}], max_tokens=1023)


@pytest.mark.parametrize("encode", [as_text, as_chat])
@pytest.mark.parametrize("character", ["a", " ", "字", "😀", "\n", "="])
def test_a_megabyte_is_refused_without_being_encoded(
    monkeypatch: pytest.MonkeyPatch, character: str, encode: Callable[[Tokenizer, str], None]
) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = Tokenizer.from_gguf(byte_level_metadata() | {"tokenizer.chat_template": template})
    monkeypatch.setattr(tokenizer._encoder, "encode", lambda *_args, **_kwargs: pytest.fail("it was encoded"))
    with pytest.raises(ContextLengthError) as caught:
        encode(tokenizer, character * (MEGABYTE // len(character.encode())))
    assert caught.value.param == "prompt"
    assert "tokens or more, but only 1023 fit in the context" in caught.value.message


def test_more_messages_than_tokens_are_refused_without_being_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata() | {"tokenizer.chat_template": "{{ messages | length }}"})
    messages = [{"role": "user", "content": ""}] * 1024
    assert tokenizer.apply_chat_template(messages, max_tokens=1024)
    monkeypatch.setattr(tokenizer._template, "render_marked", lambda *_args, **_kwargs: pytest.fail("it was rendered"))
    with pytest.raises(ContextLengthError, match="1024 messages, but only 1023 tokens") as caught:
        tokenizer.apply_chat_template(messages, max_tokens=1023)
    assert caught.value.param == "messages"


def test_short_texts_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer_module, "least_tokens", lambda *_: pytest.fail("it was looked at"))
    assert len(byte_level_tokenizer().encode("=" * 1000, max_tokens=10)) == 1000
