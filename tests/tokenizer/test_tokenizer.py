from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from pellucid.core.errors import InvalidRequestError, ModelFileError
from pellucid.tokenizer import Tokenizer, byte_pair_encoding
from pellucid.tokenizer import tokenizer as tokenizer_module
from pellucid.tokenizer.vocabulary import BYTE_LEVEL_ALPHABET, TokenType
from tests.support.texts import texts
from tests.support.tokenizers import VOCABULARIES, byte_level_tokenizer, gguf_tokenizer, model_path, vocabulary_path


@pytest.mark.parametrize("name", VOCABULARIES)
def test_round_trip(name: str) -> None:
    tokenizer = gguf_tokenizer(vocabulary_path(name))
    for text in texts(9, 1000):
        ids = tokenizer.encode(text)
        if name != "phi-3" or "</s>" not in text:  # user-defined there, and a space is put after it
            assert tokenizer.decode(ids) == text
        assert len(tokenizer.encode(text, parse_special=True)) <= len(ids)


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts are decoded in parts, wherever these cut a character."""
    tokenizer = byte_level_tokenizer()
    rng = random.Random(3)
    every = [*range(tokenizer.vocab_size)]
    ids = [*tokenizer.encode("é字😀 null" * 10), *rng.choices(every, k=500), *tokenizer.encode("字")[:-1]]
    whole = tokenizer.decode(ids), tokenizer.decode(iter(ids), skip_special_tokens=False)
    data = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    assert whole[1] == data.decode("utf-8", "replace")
    for size in (1, 2, 3, 7, 100):
        monkeypatch.setattr(tokenizer_module, "TOKENS_AT_ONCE", size)
        assert (tokenizer.decode(ids), tokenizer.decode(iter(ids), skip_special_tokens=False)) == whole


def test_special_tokens_in_text_stay_text_unless_asked_for() -> None:
    tokenizer = gguf_tokenizer(vocabulary_path("qwen2"))
    text = "<|im_start|>user"
    start = tokenizer.token_to_id("<|im_start|>")
    assert start not in tokenizer.encode(text)
    assert tokenizer.encode(text, parse_special=True)[0] == start
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([start]) == ""
    assert tokenizer.decode([start], skip_special_tokens=False) == "<|im_start|>"


def test_bos_and_eos_where_the_file_wants_them() -> None:
    llama = gguf_tokenizer(vocabulary_path("llama-spm"))
    assert llama.encode("Hello")[0] == llama.bos_token_id == 1
    assert llama.encode("Hello")[-1] != llama.eos_token_id
    assert llama.encode("Hello", add_special_tokens=False) == llama.encode("Hello")[1:]
    assert llama.encode("") == [1]
    llama3 = gguf_tokenizer(vocabulary_path("llama-bpe"))
    assert llama3.encode("Hello")[0] == llama3.bos_token_id == 128000
    gpt2 = gguf_tokenizer(vocabulary_path("gpt-2"))
    assert gpt2.encode("") == []


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("llama-bpe", {"<|end_of_text|>", "<|eot_id|>"}),
        ("phi-3", {"<|endoftext|>", "<|end|>"}),
        ("qwen2", {"<|endoftext|>", "<|im_end|>"}),
        ("smollm2-135m-instruct", {"<|endoftext|>", "<|im_end|>"}),
        ("gemma-3-270m", {"<eos>", "<end_of_turn>"}),
    ],
)
def test_what_ends_generation(name: str, ends: set[str]) -> None:
    tokenizer = gguf_tokenizer(vocabulary_path(name) if name in VOCABULARIES else model_path(name))
    assert {tokenizer.id_to_token(token_id) for token_id in tokenizer.eos_token_ids} == ends
    assert all(map(tokenizer.is_special, tokenizer.eos_token_ids))


def test_vocabulary() -> None:
    tokenizer = gguf_tokenizer(vocabulary_path("llama-spm"))
    assert tokenizer.vocab_size == 32000
    assert tokenizer.id_to_token(15043) == "▁Hello"
    assert tokenizer.token_bytes(15043) == b" Hello"
    assert tokenizer.token_to_id("▁Hello") == 15043
    assert tokenizer.token_to_id("</s>") == 2
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"
    assert not tokenizer.is_special(15043)
    assert tokenizer.is_special(1)
    assert tokenizer.decode(np.array([15043], dtype=np.int32)) == "Hello"


@pytest.mark.parametrize("token_id", [-1, 32000, 2**63, -(2**63)])
@pytest.mark.parametrize("call", ["decode", "token_bytes", "id_to_token", "is_special"])
def test_ids_out_of_range(call: str, token_id: int) -> None:
    tokenizer = gguf_tokenizer(vocabulary_path("llama-spm"))
    argument = [token_id] if call == "decode" else token_id
    with pytest.raises(InvalidRequestError, match=f"token id {token_id} is out of range: .* ids 0 to 31999") as caught:
        getattr(tokenizer, call)(argument)
    assert caught.value.param == "token_ids"


@pytest.mark.parametrize("token_id", ["1", 1.0, None, [1], True])
def test_ids_of_a_wrong_type(token_id: object) -> None:
    with pytest.raises(InvalidRequestError, match="a token id is an integer"):
        gguf_tokenizer(vocabulary_path("llama-spm")).decode([token_id])  # type: ignore[list-item]


@pytest.mark.parametrize("text", ["\ud800", "abc\udfffdef", "🦙\ud83e"])
def test_lone_surrogates(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"lone surrogate \(U\+D[0-9A-F]{3}\) at character \d"):
        gguf_tokenizer(vocabulary_path("gpt-2")).encode(text)


@pytest.mark.parametrize("text", [b"abc", None, 1, ["a"]])
def test_not_text(text: object) -> None:
    with pytest.raises(InvalidRequestError, match="text is expected, not"):
        gguf_tokenizer(vocabulary_path("gpt-2")).encode(text)  # type: ignore[arg-type]


def test_batch() -> None:
    tokenizer = gguf_tokenizer(vocabulary_path("llama-spm"))
    sample = list(texts(10, 20))
    assert tokenizer.encode_batch(sample) == [tokenizer.encode(text) for text in sample]
    assert tokenizer.encode_batch(sample, add_special_tokens=False)[0] == tokenizer.encode_batch(sample)[0][1:]


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pair_encoding, "_MAX_CACHED_PIECES", 50)
    path = vocabulary_path("llama-spm")
    expected = gguf_tokenizer(path).encode_batch(texts(11, 200))
    tokenizer = gguf_tokenizer.__wrapped__(path)
    assert isinstance(tokenizer, Tokenizer)
    wrong: list[str] = []

    def work() -> None:
        for text, ids in zip(texts(11, 200), expected, strict=True):
            if tokenizer.encode(text) != ids:
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_prepares_for_the_first_prompt() -> None:
    tokenizer = gguf_tokenizer.__wrapped__(vocabulary_path("qwen2"))
    tokenizer.prepare()
    assert {"_template"} <= vars(tokenizer).keys()
    assert {"_ids"} <= vars(tokenizer._vocabulary).keys()
    assert tokenizer.encode("a") == gguf_tokenizer(vocabulary_path("qwen2")).encode("a")


def test_a_faulty_template_does_not_keep_a_model_from_loading() -> None:
    tokenizer = gguf_tokenizer.__wrapped__(vocabulary_path("qwen2"))
    tokenizer.chat_template = "{% if %}"
    tokenizer.prepare()
    assert tokenizer.encode("a")
    with pytest.raises(ModelFileError, match="cannot be used"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}])


def test_a_vocabulary_without_a_template_is_prepared_too() -> None:
    gguf_tokenizer.__wrapped__(vocabulary_path("llama-spm")).prepare()


def test_where_two_vocabularies_first_differ() -> None:
    def tokenizer(tokens: list[str]) -> Tokenizer:
        return Tokenizer.from_gguf(
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "smollm",
                "tokenizer.ggml.tokens": [*BYTE_LEVEL_ALPHABET, *tokens],
                "tokenizer.ggml.token_type": [TokenType.NORMAL] * (256 + len(tokens)),
                "tokenizer.ggml.merges": [],
            }
        )

    one = tokenizer(["aa", "bb"])
    assert one.first_difference(tokenizer(["aa", "bb"])) is None
    assert one.first_difference(tokenizer(["aa", "bc"])) == 257
    assert one.first_difference(tokenizer(["bb", "aa"])) == 256
    for other in (tokenizer(["aa"]), tokenizer(["aa", "bb", "cc"])):
        at = min(one.vocab_size, other.vocab_size)
        assert one.first_difference(other) == other.first_difference(one) == at
