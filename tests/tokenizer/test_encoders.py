from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.core.errors import InvalidRequestError, ModelFileError
from pellucid.tokenizer import Tokenizer, byte_pair_encoding, encoders
from pellucid.tokenizer.vocabulary import BYTE_LEVEL_ALPHABET, SPACE_SYMBOL, TokenType
from pellucid.weights.gguf import GGUFFile
from tests.support.sentencepiece_oracle import gguf_metadata, model_proto
from tests.support.texts import texts
from tests.support.tokenizers import SHARED, VOCABULARIES, library_encoder, model_path, vocabulary_path

sentencepiece = pytest.importorskip("sentencepiece")


def sentencepiece_metadata(tokens: dict[str, float], **fields: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary of these NORMAL tokens with their scores."""
    names = ["<unk>", "<s>", "</s>", *tokens]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.NORMAL] * len(tokens)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": np.array([0, 0, 0, *tokens.values()], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        **{f"tokenizer.ggml.{name}": value for name, value in fields.items()},
    }


def byte_level_metadata(tokens: list[str], merges: list[str], pre: str = "gpt-2") -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    }


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def metadata_of(path: Path) -> dict[str, Any]:
    with GGUFFile.open(path) as file:
        return dict(file.metadata)


LONG = [
    "a" * 30_000,
    " " * 30_000,
    "日本語" * 8000,
    "<" * 20_000,
    "a\n " * 5000,
    "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyzABCXYZ", k=30_000)),
    "".join(random.Random(8).choices(["the", "of", "and", "to", "in", "is", "you", "that", "it"], k=6000)),
    "".join(map(chr, random.Random(9).choices(range(0x4E00, 0x9FA5), k=8000))),
    "\x04é\u0301😀" * 5000,
]


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2"])
def test_ids_are_those_of_the_library(name: str) -> None:
    metadata = metadata_of(vocabulary_path(name))
    tokenizer, expected = Tokenizer.from_gguf(metadata), library_encoder(metadata)
    for text in [*texts(3, 600), *LONG]:
        assert plain(tokenizer, text) == expected(text), text[:100]


def test_long_texts_of_a_real_model() -> None:
    metadata = metadata_of(model_path("smollm2-135m-instruct"))
    tokenizer, expected = Tokenizer.from_gguf(metadata), library_encoder(metadata)
    for text in LONG:
        assert plain(tokenizer, text) == expected(text), text[:100]


def test_a_mutant_that_does_not_look_where_windows_meet_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pair_encoding, "_stay_apart", lambda *_: True)
    monkeypatch.setattr(byte_pair_encoding, "MARGIN", 0)
    metadata = metadata_of(vocabulary_path("gpt-2"))
    tokenizer, expected = Tokenizer.from_gguf(metadata), library_encoder(metadata)
    assert any(plain(tokenizer, text) != expected(text) for text in LONG)


@pytest.mark.parametrize("name", ["llama-spm", "gemma-3-270m"])
def test_ids_are_those_of_sentencepiece(name: str) -> None:
    metadata = metadata_of(vocabulary_path(name) if name in VOCABULARIES else model_path(name))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model_proto(metadata))
    tokenizer = Tokenizer.from_gguf(metadata)
    sample = list(texts(4, 3000))
    for text, ids in zip(sample, oracle.encode(sample), strict=True):
        assert plain(tokenizer, text) == ids, text
        assert tokenizer.decode(ids) == oracle.decode(ids) == text
    for text in LONG:
        assert plain(tokenizer, text) == oracle.encode(text), text[:100]


@pytest.fixture(scope="module")
def corpus() -> str:
    return "\n".join(text.replace("\n", " ") for text in texts(5, 600) if text.isprintable())


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("add_dummy_prefix", [False, True])
@pytest.mark.parametrize("remove_extra_whitespaces", [False, True])
@pytest.mark.parametrize("split_by_whitespace", [False, True])
def test_models_trained_by_sentencepiece(
    corpus: str,
    byte_fallback: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    split_by_whitespace: bool,
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=1800 + 256 * byte_fallback,
        hard_vocab_limit=False,
        character_coverage=0.98,
        normalization_rule_name="identity",
        byte_fallback=byte_fallback,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
        split_by_whitespace=split_by_whitespace,
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    metadata = gguf_metadata(oracle) | {
        "tokenizer.ggml.add_space_prefix": add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": remove_extra_whitespaces,
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in texts(6, 400):
        assert plain(tokenizer, text) == oracle.encode(text), text


TOKENS = {SPACE_SYMBOL: -9.0, "a": -9.0, "b": -9.0, ">": -9.0, SPACE_SYMBOL + "a": -2.0, ">" + SPACE_SYMBOL + "a": -3.0}


def test_a_merge_may_cross_the_start_of_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = sentencepiece_metadata(TOKENS, add_space_prefix=False)
    crossing = metadata["tokenizer.ggml.tokens"].index(">" + SPACE_SYMBOL + "a")
    assert crossing in plain(Tokenizer.from_gguf(metadata), "b> ab")
    monkeypatch.setattr(encoders, "_characters_before_space", lambda tokens: [])
    assert crossing not in plain(Tokenizer.from_gguf(metadata), "b> ab")


def test_characters_before_a_space() -> None:
    found = encoders._characters_before_space(["a", f"b{SPACE_SYMBOL}", SPACE_SYMBOL * 3, f"x]{SPACE_SYMBOL}y", "c"])
    assert found == ["]", "b"]
    assert encoders._characters_before_space([f"\0{SPACE_SYMBOL}", "a"]) == ["\0"]


def test_equal_scores_take_the_leftmost_pair() -> None:
    tokens = {"a": -9.0, "b": -9.0, "c": -9.0, "ab": -1.0, "bc": -1.0, "ca": -1.0}
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(tokens, add_space_prefix=False))
    oracle = sentencepiece.SentencePieceProcessor(
        model_proto=model_proto(sentencepiece_metadata(tokens, add_space_prefix=False, unknown_token_id=0))
    )
    for text in ("abc", "bca", "cabcab", "bcabca"):
        assert plain(tokenizer, text) == oracle.encode(text)


def test_what_cannot_be_spelled_is_one_unknown_token() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(TOKENS, add_space_prefix=False))
    assert [tokenizer.id_to_token(i) for i in plain(tokenizer, "aéèb")] == ["a", "<unk>", "b"]


def test_the_space_prefix_goes_before_each_stretch_of_text() -> None:
    metadata = sentencepiece_metadata(TOKENS)
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode("a</s>a", add_special_tokens=False, parse_special=True)
    assert [tokenizer.id_to_token(i) for i in ids] == [SPACE_SYMBOL + "a", "</s>", SPACE_SYMBOL + "a"]
    assert plain(tokenizer, "") == []


ALPHABET = list(BYTE_LEVEL_ALPHABET)


def test_a_byte_without_a_token_gives_no_id_and_does_not_part_its_neighbours() -> None:
    tokens = [character for character in ALPHABET if character != BYTE_LEVEL_ALPHABET[4]] + ["!!"]
    metadata = byte_level_metadata(tokens, ["! !"])
    tokenizer = Tokenizer.from_gguf(metadata)
    assert [tokenizer.id_to_token(i) for i in plain(tokenizer, "!\x04!")] == ["!!"]


def test_whole_words_before_merges_only_where_the_pre_tokenizer_says_so() -> None:
    tokens = [*ALPHABET, "ab", "abc"]
    whole = Tokenizer.from_gguf(byte_level_metadata(tokens, ["a b"], "llama-bpe"))
    merged = Tokenizer.from_gguf(byte_level_metadata(tokens, ["a b"], "qwen2"))
    assert [whole.id_to_token(i) for i in plain(whole, "abc")] == ["abc"]
    assert [merged.id_to_token(i) for i in plain(merged, "abc")] == ["ab", "c"]


@pytest.mark.parametrize("merges", [["ab"], ["a b c"], ["a b", "a  b"]])
def test_malformed_merges(merges: list[str]) -> None:
    with pytest.raises(ModelFileError, match="not two tokens") as caught:
        Tokenizer.from_gguf(byte_level_metadata(ALPHABET, merges))
    assert caught.value.param == "tokenizer.ggml.merges"


def test_merges_that_build_no_token() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(ALPHABET, ["a b"]))
    with pytest.raises(ModelFileError, match="'ab', which is not a token"):
        plain(tokenizer, "ab")


def test_text_that_no_token_can_spell_is_refused() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(TOKENS))
    tokenizer._encoder._unknown_token_id = None  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequestError, match="cannot spell 'é'"):
        plain(tokenizer, "aé")


@pytest.mark.parametrize("name", ["llama-spm", "qwen2"])
@pytest.mark.parametrize("text", ["a" * 400_000, " " * 400_000, "日本語" * 100_000, "<" * 300_000, "a\n " * 50_000])
def test_long_texts_are_quick(name: str, text: str) -> None:
    if not SHARED.exists():
        pytest.skip("the shared folder is not here")
    tokenizer = Tokenizer.from_gguf(metadata_of(vocabulary_path(name)))
    assert tokenizer.decode(plain(tokenizer, text)) == text
