from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pellucid.core.errors import ModelFileError, UnsupportedModelError
from pellucid.tokenizer import Tokenizer
from pellucid.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from pellucid.tokenizer.vocabulary import BYTE_LEVEL_ALPHABET, TokenType
from tests.support.texts import texts
from tests.support.tokenizers import VOCABULARIES, gguf_tokenizer, vocabulary_path


def expectations(name: str) -> list[tuple[str, list[int]]]:
    path = vocabulary_path(name)
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().split("\n")
    assert texts.pop() == ""
    assert lines.pop() == ""
    return [(text, [int(token_id) for token_id in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_of_the_shared_vocabularies(name: str) -> None:
    tokenizer = gguf_tokenizer(vocabulary_path(name))
    for text, ids in expectations(name):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_metadata(**changes: Any) -> dict[str, object]:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "▁a"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256, 1, 1, 1]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.arange(0, -len(tokens), -1, dtype=np.float32),
        "token_type": np.array(types, dtype=np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


def byte_level_metadata(**changes: Any) -> dict[str, object]:
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": list(BYTE_LEVEL_ALPHABET), "merges": [], **changes}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


def number_of_tokens(metadata: dict[str, object]) -> int:
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    return len(tokens)


COUNT = number_of_tokens(sentencepiece_metadata())


def test_sound_metadata() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    assert tokenizer.decode(tokenizer.encode("a é 🦙")) == "a é 🦙"
    assert tokenizer.encode("a") == [1, COUNT - 1]
    assert Tokenizer.from_gguf(byte_level_metadata()).encode("ab") == [97, 98]


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"tokens": None}, "tokens", "is missing; an array of strings"),
        ({"tokens": "abc"}, "tokens", "is a str; an array of strings"),
        ({"tokens": ["a", 1]}, "tokens", "an array of strings"),
        ({"tokens": []}, "tokens", "is empty"),
        ({"scores": None}, "scores", "is missing; an array of numbers"),
        ({"scores": np.zeros(COUNT - 1, np.float32)}, "scores", f"{COUNT - 1} values of float32"),
        ({"scores": np.zeros((COUNT, 1), np.float32)}, "scores", "one number for each"),
        ({"scores": ["x"] * COUNT}, "scores", "one number for each"),
        ({"scores": np.full(COUNT, np.nan, np.float32)}, "scores", "not finite"),
        ({"scores": np.full(COUNT, -np.inf, np.float32)}, "scores", "not finite"),
        ({"token_type": None}, "token_type", "is missing"),
        ({"token_type": np.full(COUNT, 7, np.int32)}, "token_type", "outside 0 to 6"),
        ({"token_type": np.full(COUNT, -1, np.int32)}, "token_type", "outside 0 to 6"),
        ({"token_type": np.ones(COUNT, np.float32)}, "token_type", "outside 0 to 6"),
        ({"token_type": np.full(COUNT, 6, np.int32)}, "tokens", "not spelled <0x00> to <0xFF>"),
        ({"bos_token_id": COUNT}, "bos_token_id", f"is {COUNT}, outside the vocabulary of {COUNT} tokens"),
        ({"bos_token_id": -1}, "bos_token_id", "is -1, outside"),
        ({"eos_token_id": 2**40}, "eos_token_id", "outside"),
        ({"eot_token_id": COUNT}, "eot_token_id", "outside"),
        ({"unknown_token_id": "0"}, "unknown_token_id", "is a str; a token id"),
        ({"bos_token_id": True}, "bos_token_id", "is a bool; a token id"),
        ({"add_bos_token": 1}, "add_bos_token", "is a int; a boolean"),
        ({"add_space_prefix": "yes"}, "add_space_prefix", "is a str; a boolean"),
    ],
)
def test_malformed_fields(changes: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        Tokenizer.from_gguf(sentencepiece_metadata(**changes))
    assert message in str(caught.value)
    assert caught.value.param == f"tokenizer.ggml.{field}"


def test_a_token_that_is_there_twice() -> None:
    metadata = sentencepiece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    tokens[-1] = "a"
    with pytest.raises(ModelFileError, match="holds the token 'a' twice"):
        Tokenizer.from_gguf(metadata).encode("a")


@pytest.mark.parametrize("kind", [None, "bert", "t5", "rwkv", "", 1, ["gpt2"]])
def test_other_kinds_of_vocabulary(kind: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"supported are 'gpt2' .* and 'llama'") as caught:
        Tokenizer.from_gguf(sentencepiece_metadata(model=kind))
    assert caught.value.param == "tokenizer.ggml.model"


@pytest.mark.parametrize("name", ["nonsense", "", 1, ["gpt-2"]])
def test_unknown_pre_tokenizers(name: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is not supported; supported are .*gpt-2, .*llama-bpe, .*smollm"):
        Tokenizer.from_gguf(byte_level_metadata(pre=name))


def test_no_pre_tokenizer() -> None:
    with pytest.raises(UnsupportedModelError, match="does not name its pre-tokenizer"):
        Tokenizer.from_gguf(byte_level_metadata(pre=None))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_lose_nothing(name: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre=name))
    for text in texts(18, 200):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


PIECES = [
    ("gpt-2", "it's 123 abc  x\n", ["it", "'s", " 123", " abc", " ", " x", "\n"]),
    ("smollm", "a 123 4", ["a", " ", "1", "2", "3", " ", "4"]),
    ("llama-bpe", "I'LL pay 12345\n\n x", ["I", "'LL", " pay", " ", "123", "45", "\n\n", " x"]),
    ("qwen2", "(foo) 123", ["(foo", ")", " ", "1", "2", "3"]),
    ("tekken", "HTTPServer/x", ["HTTPServer", "/x"]),
    ("gpt-4o", "don't HelloWorld", ["don't", " Hello", "World"]),
    ("falcon", "a,b 1234 $5", ["a", ",", "b", " ", "123", "4", " ", "$", "5"]),
    ("deepseek-coder", "a 12\n中b", ["a", " ", "1", "2", "\n", "中", "b"]),
    ("deepseek-v3", "ab 1234中a", ["ab", " ", "123", "4", "中", "a"]),
    ("default", "a 1234, b", ["a", " ", "123", "4", ",", " b"]),
    ("bloom", "a b, c1", ["a", " b", ",", " c1"]),
    ("viking", "a c12", ["a", " c", "1", "2"]),
    ("qwen35", "नमस्ते 12", ["नमस्ते", " ", "1", "2"]),
]


@pytest.mark.parametrize(("name", "text", "pieces"), PIECES)
def test_pieces(name: str, text: str, pieces: list[str]) -> None:
    assert list(PRE_TOKENIZERS[name].compile()(text)) == pieces


def test_bos_without_a_token() -> None:
    with pytest.raises(ModelFileError, match=r"add_bos_token is set, but tokenizer\.ggml\.bos_token_id is missing"):
        Tokenizer.from_gguf(byte_level_metadata(add_bos_token=True))


def test_flags_overrule_the_defaults() -> None:
    neither = Tokenizer.from_gguf(sentencepiece_metadata(add_bos_token=False))
    both = Tokenizer.from_gguf(sentencepiece_metadata(add_bos_token=True, add_eos_token=True))
    assert neither.encode("a") == [COUNT - 1]
    assert both.encode("a") == [1, COUNT - 1, 2]


def test_a_message_end_that_is_not_the_end() -> None:
    names = ["<|return|>", "<|call|>", "<|end|>"]
    tokens = [*BYTE_LEVEL_ALPHABET, *names]
    types = np.array([TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 3, dtype=np.int32)
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(tokens=tokens, token_type=types))
    assert tokenizer.eos_token_ids == {256, 257}


def test_a_template_that_is_not_text() -> None:
    with pytest.raises(ModelFileError, match="chat_template is a list; text is expected"):
        Tokenizer.from_gguf(byte_level_metadata() | {"tokenizer.chat_template": ["x"]})
